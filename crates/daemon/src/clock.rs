//! The one place that reads the wall clock, and the way to wait for a time on it.

pub mod shift;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use belljar_domain::UnixMillis;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::scope::{OnError, Scope};

/// Now, by the host's wall clock.
#[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
pub fn now() -> UnixMillis {
    let host = UnixMillis::from(std::time::SystemTime::now());
    UnixMillis(host.0.saturating_add(shift::ms()))
}

/// A wall clock that can be waited for. Cheap to clone.
///
/// Waiting costs nothing until the time comes: the kernel says when somebody sets the clock, so
/// nobody has to look at it now and then.
#[derive(Debug, Clone)]
pub struct Clock {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    hands: Hands,
    /// Told when the clock is set.
    set: Notify,
}

#[derive(Debug)]
enum Hands {
    Host,
    /// What it showed, and when that was.
    ByHand(Mutex<(UnixMillis, Instant)>),
}

impl Clock {
    /// The host's clock. A task of `scope` listens for its being set.
    ///
    /// # Errors
    /// When the kernel gives no timer.
    pub fn of_host(scope: &Scope) -> io::Result<Clock> {
        let clock = Clock::new(Hands::Host);
        let watched = clock.clone();
        #[expect(
            deprecated,
            reason = "unsound for types that lie about their descriptor; this one owns it"
        )]
        let timer = AsyncFd::new(settings_timer()?)?;
        let mut shifts = shift::Shifts::from_now();
        scope.spawn("clock watch", OnError::FailScope, async move {
            loop {
                tokio::select! {
                    set = clock_was_set(&timer) => set?,
                    () = shifts.next() => {}
                }
                tracing::warn!(now_unix_ms = now().0, "the wall clock was set");
                watched.inner.set.notify_waiters();
            }
            #[expect(unreachable_code, reason = "names the type of the error above")]
            Ok::<(), io::Error>(())
        });
        Ok(clock)
    }

    /// A clock that starts at `start`, goes as fast as tokio's time, and is set by hand.
    pub fn by_hand(start: UnixMillis) -> Clock {
        Clock::new(Hands::ByHand(Mutex::new((start, Instant::now()))))
    }

    fn new(hands: Hands) -> Clock {
        Clock { inner: Arc::new(Inner { hands, set: Notify::new() }) }
    }

    /// What it shows.
    pub fn now(&self) -> UnixMillis {
        match &self.inner.hands {
            Hands::Host => now(),
            Hands::ByHand(hands) => {
                let (showed, then) = *hands.lock().unwrap_or_else(PoisonError::into_inner);
                showed.plus(then.elapsed())
            }
        }
    }

    /// Sets a clock that is set by hand; the host's stays what it is.
    pub fn set(&self, to: UnixMillis) {
        if let Hands::ByHand(hands) = &self.inner.hands {
            *hands.lock().unwrap_or_else(PoisonError::into_inner) = (to, Instant::now());
            self.inner.set.notify_waiters();
        }
    }

    /// Ends when the clock shows `at`, at most a few milliseconds later, also when it is set
    /// meanwhile. Cancel-safe.
    pub async fn until(&self, at: UnixMillis) {
        loop {
            // Made before the clock is read: a setting in between ends the wait below.
            let set = self.inner.set.notified();
            let left = at.since(self.now());
            if left.is_zero() {
                return;
            }
            // Either way the clock is read again.
            let _was_set = tokio::time::timeout(left, set).await.is_ok();
        }
    }
}

/// A timer that never rings and is cancelled whenever the clock is set (timerfd_create(2),
/// `TFD_TIMER_CANCEL_ON_SET`), also by the host waking up from sleep.
fn settings_timer() -> io::Result<OwnedFd> {
    /// The year 2255; the kernel's own time ends in 2262.
    const NEVER_S: i64 = 9_000_000_000;
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
    let never = Itimerspec {
        it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: Timespec { tv_sec: NEVER_S, tv_nsec: 0 },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(&timer, flags, &never)?;
    Ok(timer)
}

/// Ends when the clock was set since the last call. It stays armed between calls.
async fn clock_was_set(timer: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = timer.readable().await?;
        let mut rings = [0; 8];
        match rustix::io::read(timer.get_ref(), &mut rings) {
            Err(rustix::io::Errno::CANCELED) => return Ok(()),
            Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
            Err(e) => return Err(e.into()),
            // It rang after all: the clock was set beyond its end of time.
            Ok(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const HOUR: Duration = Duration::from_secs(3600);
    const START: UnixMillis = UnixMillis(1_000_000);

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_time_and_not_before() {
        let clock = Clock::by_hand(START);
        let began = Instant::now();
        clock.until(START.plus(HOUR)).await;
        assert_eq!(began.elapsed(), HOUR);
        clock.until(START).await;
        assert_eq!(began.elapsed(), HOUR, "what is past is not waited for");
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_set_forward_ends_waits_and_one_set_back_prolongs_them() {
        let clock = Clock::by_hand(START);
        let began = Instant::now();
        let wait = clock.until(START.plus(HOUR));
        tokio::join!(wait, async { clock.set(START.plus(2 * HOUR)) });
        assert_eq!(began.elapsed(), Duration::ZERO);
        clock.set(START);
        let wait = clock.until(START.plus(HOUR));
        tokio::join!(wait, async {
            tokio::time::sleep(HOUR / 2).await;
            clock.set(START);
        });
        assert_eq!(began.elapsed(), HOUR / 2 + HOUR);
    }

    #[tokio::test]
    async fn the_hosts_clock_is_watched_and_waited_for() {
        let scope = Scope::root("test");
        let clock = Clock::of_host(&scope).expect("a timer");
        let at = clock.now().plus(Duration::from_millis(30));
        clock.until(at).await;
        assert!(clock.now() >= at);
        assert!(!scope.is_cancelled());
        assert!(scope.close(Duration::from_secs(5)).await);
    }
}
