//! Traffic that resumes sandboxes: what a proxy may ask of the control plane.
//!
//! Only sandboxes that were created so are resumed, and only for who could use them: the guest
//! daemon of a secured one asks for its token, so a request for it must show that. A sandbox that
//! would have to boot is not resumed by traffic. Source: contract section 3.6.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::OnError;
use belljar_domain::{SandboxId, Secret};
use subtle::ConstantTimeEq as _;
use tokio::sync::{mpsc, oneshot};

use crate::app::App;
use crate::creation::CreateError;
use crate::resume::{self, ResumeError, Rouse, Running};

/// Questions that wait to be taken up. Each is answered by a task of its own.
const QUEUE: usize = 1024;
/// A sandbox that traffic resumed lives this long at least. Source: contract section 3.6.
const LIFETIME_MIN: Duration = Duration::from_secs(300);

/// Why a sandbox does not run after it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Asleep {
    /// There is none, or none that traffic resumes.
    #[error("resume the sandbox: there is none that traffic resumes")]
    NotFound,
    /// Whoever asks may not use it.
    #[error("resume the sandbox: the request shows no token for it, or a wrong one")]
    NotPermitted,
    /// It is being paused or resumed, and that takes too long.
    #[error("resume the sandbox: it is still changing")]
    Changing,
    /// Its team has as many sandboxes as it may.
    #[error("resume the sandbox: its team is at its limit of {limit}")]
    AtLimit {
        /// Sandboxes the team may have running.
        limit: u32,
    },
    /// Its node is away, or did not start it.
    #[error("resume the sandbox: its node did not do it")]
    Unavailable,
}

/// Asks for sandboxes to be resumed. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WakeCaller(mpsc::Sender<Question>);

/// Where such questions come in; for [`crate::Deps`].
#[derive(Debug)]
pub struct WakeDoor(mpsc::Receiver<Question>);

#[derive(Debug)]
struct Question {
    id: SandboxId,
    for_daemon: bool,
    token: Option<Secret<String>>,
    answer: oneshot::Sender<Result<(), Asleep>>,
}

/// Both ends.
pub fn wake_door() -> (WakeCaller, WakeDoor) {
    let (questions, door) = mpsc::channel(QUEUE);
    (WakeCaller(questions), WakeDoor(door))
}

impl WakeCaller {
    /// Resumes the sandbox `id` if it is paused and traffic may, and waits until it can be reached:
    /// a minute or two at most. `for_daemon` says that the traffic is for its guest daemon, and
    /// `token` what it shows for that. Any number of callers at once resume it once. Cancel-safe: what
    /// has begun goes on.
    ///
    /// # Errors
    /// [`Asleep`] when it does not run afterwards.
    pub async fn wake(
        &self,
        id: &SandboxId,
        for_daemon: bool,
        token: Option<Secret<String>>,
    ) -> Result<(), Asleep> {
        let (answer, wait) = oneshot::channel();
        let question = Question { id: id.clone(), for_daemon, token, answer };
        // A control plane that does not keep up, or is on its way out, resumes nothing.
        self.0.try_send(question).map_err(|_| Asleep::Unavailable)?;
        wait.await.unwrap_or(Err(Asleep::Unavailable))
    }
}

/// Answers questions until dropped.
pub(crate) async fn answer_all(app: Arc<App>, mut door: WakeDoor) -> Result<(), Infallible> {
    while let Some(question) = door.0.recv().await {
        let this = Arc::clone(&app);
        app.scope.spawn_shielded("wake sandbox", OnError::Log, async move {
            let Question { id, for_daemon, token, answer } = question;
            // Whoever asked may be gone.
            let _heard = answer.send(resume_for_traffic(&this, &id, for_daemon, token).await);
            Ok::<(), Infallible>(())
        });
    }
    Ok(())
}

/// Resumes the sandbox `id` for traffic. One that runs is left as it is.
async fn resume_for_traffic(
    app: &Arc<App>,
    id: &SandboxId,
    for_daemon: bool,
    token: Option<Secret<String>>,
) -> Result<(), Asleep> {
    let sandbox = app.live.owner(id).ok_or(Asleep::NotFound)?;
    let boots = sandbox.pause().is_some_and(|saved| saved.filesystem_only);
    if !sandbox.lifecycle.auto_resume || boots {
        return Err(Asleep::NotFound);
    }
    if for_daemon && let Some(wanted) = app.token_of(&sandbox) {
        let shown = token.as_ref().map_or("", |token| token.expose());
        if !bool::from(wanted.expose().as_bytes().ct_eq(shown.as_bytes())) {
            return Err(Asleep::NotPermitted);
        }
    }
    let team = app.access.team(&sandbox.team).await.map_err(|_| Asleep::Unavailable)?;
    let team = team.filter(|team| team.blocked.is_none()).ok_or(Asleep::NotFound)?;
    let lifetime = sandbox.lifecycle.lifetime.min(team.limits.max_length()).max(LIFETIME_MIN);
    let running = Running::Leave;
    let how = Rouse { lifetime, cold_boot: false, on_end: None, running };
    match resume::rouse(app, &team, id, how).await {
        Ok(_) => Ok(()),
        Err(ResumeError::NotFound | ResumeError::NeedsColdBoot) => Err(Asleep::NotFound),
        Err(ResumeError::Busy | ResumeError::Runs) => Err(Asleep::Changing),
        Err(ResumeError::Place(CreateError::AtLimit(e))) => Err(Asleep::AtLimit { limit: e.limit }),
        Err(_) => Err(Asleep::Unavailable),
    }
}
