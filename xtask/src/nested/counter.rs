//! How fast this host's time stamp counter runs.
//!
//! An emulated processor shows its guest the host's own counter. The guest cannot measure it well: it
//! counts the ticks of an emulated timer, loses some of them while the host is busy, and then marks the
//! counter unusable; and with a counter of unknown speed KVM never enters a guest. So it is told.

use anyhow::{Result, bail};
use rustix::time::{ClockId, clock_gettime};

use super::sys::time_stamp;

/// The longer, the finer: 50 ms against a clock read in 100 ns is 2 in a million.
const SPAN_NS: i64 = 50_000_000;

/// The frequency in kHz, measured against the raw monotonic clock. Takes 50 ms.
///
/// # Errors
/// The wait was cut so short that the result would be of no use.
pub(super) fn frequency_khz() -> Result<u64> {
    let (began_ns, began) = reading();
    let span = rustix::event::Timespec { tv_sec: 0, tv_nsec: SPAN_NS };
    // A signal may cut the wait short: a coarser result, and below a floor none.
    let _ = rustix::event::poll(&mut [], Some(&span));
    let (ended_ns, ended) = reading();
    let elapsed_ns = u64::try_from(ended_ns - began_ns).unwrap_or(0);
    if elapsed_ns < 1_000_000 {
        bail!("measuring the time stamp counter was interrupted: try again");
    }
    // Below 10 GHz for 50 ms or a busy second or two: far from the limit of 64 bits.
    Ok(ended.wrapping_sub(began).saturating_mul(1_000_000) / elapsed_ns)
}

/// Whether two measurements are of the same counter: a busy host may disturb one.
pub(super) fn is_same(one_khz: u64, other_khz: u64) -> bool {
    one_khz.abs_diff(other_khz).saturating_mul(1000) < one_khz
}

/// Nanoseconds and counter at one moment: of a few tries, the one least disturbed.
fn reading() -> (i64, u64) {
    let clock = || {
        let now = clock_gettime(ClockId::MonotonicRaw);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    };
    let once = || {
        let before = clock();
        let stamp = time_stamp();
        let after = clock();
        (after - before, before + (after - before) / 2, stamp)
    };
    let (_, at, stamp) = (0..8).map(|_| once()).min().expect("eight were taken");
    (at, stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_and_have_the_right_unit() {
        let (one, other) = (frequency_khz().unwrap(), frequency_khz().unwrap());
        assert!(one.abs_diff(other) * 100 < one, "{one} kHz and {other} kHz");
        assert!((100_000..20_000_000).contains(&one), "{one} kHz");
    }

    #[test]
    fn another_machine_is_told_from_a_disturbed_measurement() {
        assert!(is_same(2_445_430, 2_445_900));
        assert!(!is_same(2_445_430, 2_450_000));
    }
}
