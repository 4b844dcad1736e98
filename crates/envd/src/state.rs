//! Who this sandbox is and how its requests are treated: what an init message changes.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use belljar_domain::Secret;
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;

use crate::guest::disks::Disks;
use crate::process::log_tap::LogTap;
use crate::task;
use crate::workload::Workload;

/// `PATH` of processes when nothing else sets it: what a Debian login gives root.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is fixed for the life of the daemon, and the identity it starts with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whether this daemon is PID 1 of a guest and may change the machine.
    pub in_guest: bool,
    /// `PATH` of processes below what global variables and requests say.
    pub search_path: String,
    /// The user of requests that name none.
    pub default_user: String,
    /// The directory an empty path means; `None` is the user's home.
    pub default_workdir: Option<String>,
    /// What `X-Access-Token` must say; `None` asks for none.
    pub access_token: Option<Secret<String>>,
    /// How long the client of an upload may send nothing before the upload is cut.
    pub upload_stall_limit: Duration,
    /// The control groups of user processes; `None` runs them beside the daemon.
    pub workload: Option<Arc<Workload>>,
}

/// A pause in sending that no working network makes, and that leaves a thread busy meanwhile.
pub const UPLOAD_STALL_LIMIT: Duration = Duration::from_secs(120);

impl Settings {
    /// Serves as `default_user` and leaves the machine alone.
    pub fn on_host(default_user: impl Into<String>) -> Settings {
        Settings {
            in_guest: false,
            search_path: DEFAULT_PATH.to_owned(),
            default_user: default_user.into(),
            default_workdir: None,
            access_token: None,
            upload_stall_limit: UPLOAD_STALL_LIMIT,
            workload: None,
        }
    }
}

/// Shared by every request.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    identity: RwLock<Identity>,
    /// Whether part of an identity is still being put in place; requests wait for that.
    settling: watch::Sender<bool>,
    /// Which run of the machine this is, counted up by each boot and restore.
    incarnation: watch::Sender<u64>,
    /// The disks, which the host may have stopped.
    pub disks: Disks,
    /// Every task of the daemon.
    pub tasks: task::Group,
    /// Lines on their way to the host.
    pub(crate) logs: Arc<LogTap>,
}

/// What an init message replaces.
#[derive(Debug, Clone, Default)]
struct Identity {
    sandbox_id: String,
    template_id: String,
    access_token: Option<Secret<String>>,
    env_vars: BTreeMap<String, String>,
    default_user: String,
    default_workdir: Option<String>,
    /// Time of the newest init request over HTTP, nanoseconds since the Unix epoch.
    initialised_at_ns: Option<i128>,
}

/// What an init message says, whichever way it came.
#[derive(Debug, Clone, Default)]
pub struct NewIdentity {
    /// The machine was booted or restored for this: connections that seem open are of a run that
    /// is over.
    pub new_run: bool,
    /// The sandbox; `None` keeps the current one.
    pub sandbox_id: Option<String>,
    /// Its template; `None` keeps the current one.
    pub template_id: Option<String>,
    /// What `X-Access-Token` must say from now on; `None` asks for none.
    pub access_token: Option<Secret<String>>,
    /// Environment of every process; replaces the current one.
    pub env_vars: BTreeMap<String, String>,
    /// The user of requests that name none; `None` keeps the current one.
    pub default_user: Option<String>,
    /// The directory an empty path means; `None` keeps the current one.
    pub default_workdir: Option<String>,
}

/// What an access token is to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenCheck {
    /// The sandbox asks for none.
    Open,
    /// It is the right one.
    Right,
    /// The request has none.
    Missing,
    /// It is another one.
    Wrong,
}

impl State {
    /// A fresh daemon.
    pub fn new(settings: Settings) -> State {
        let identity = Identity {
            access_token: settings.access_token.clone(),
            default_user: settings.default_user.clone(),
            default_workdir: settings.default_workdir.clone(),
            ..Identity::default()
        };
        State {
            settings,
            identity: RwLock::new(identity),
            settling: watch::Sender::new(false),
            incarnation: watch::Sender::new(0),
            disks: Disks::default(),
            tasks: task::Group::default(),
            logs: Arc::default(),
        }
    }

    /// Ends every freeze of disks and processes: whoever froze them has what it wanted, or is gone.
    pub fn thaw(&self) {
        self.disks.thaw();
        if let Some(workload) = &self.settings.workload {
            workload.thaw();
        }
    }

    /// What was fixed at start.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes on an identity. With a new run every connection of the last one is dropped, whether
    /// this is another sandbox now or the same one resumed: their peers are gone and would hold
    /// back running processes. Processes and watchers stay.
    pub fn become_sandbox(&self, new: NewIdentity) {
        let mut identity = self.write();
        let other = new.sandbox_id.as_ref().is_some_and(|id| *id != identity.sandbox_id);
        if let Some(id) = new.sandbox_id {
            identity.sandbox_id = id;
        }
        if let Some(id) = new.template_id {
            identity.template_id = id;
        }
        if let Some(user) = new.default_user.filter(|user| !user.is_empty()) {
            identity.default_user = user;
        }
        if let Some(workdir) = new.default_workdir {
            identity.default_workdir = Some(workdir).filter(|workdir| !workdir.is_empty());
        }
        identity.access_token = new.access_token;
        identity.env_vars = new.env_vars;
        drop(identity);
        if other {
            // What the sandbox this one was cloned from said is not this one's to send.
            self.logs.clear();
        }
        if new.new_run {
            self.incarnation.send_modify(|count| *count += 1);
        }
    }

    /// Says whether part of an identity is still being put in place.
    pub fn set_settling(&self, settling: bool) {
        self.settling.send_replace(settling);
    }

    /// Waits until nothing of an identity is being put in place. Cancel-safe.
    pub async fn settled(&self) {
        if *self.settling.borrow() {
            // The sender lives in `self`, so the wait can only end well.
            let _ = self.settling.subscribe().wait_for(|settling| !settling).await;
        }
    }

    /// Records the time of an init request, nanoseconds since the Unix epoch, and says whether it
    /// is newer than all before. Others are replays.
    pub fn accept_init_time(&self, unix_ns: i128) -> bool {
        let mut identity = self.write();
        if identity.initialised_at_ns.is_some_and(|newest| newest >= unix_ns) {
            return false;
        }
        identity.initialised_at_ns = Some(unix_ns);
        true
    }

    /// Changes with each boot and restore.
    pub fn incarnation(&self) -> watch::Receiver<u64> {
        self.incarnation.subscribe()
    }

    /// Compares a token in constant time.
    pub fn check_token(&self, given: Option<&[u8]>) -> TokenCheck {
        match (&self.read().access_token, given) {
            (None, _) => TokenCheck::Open,
            (Some(_), None) => TokenCheck::Missing,
            (Some(token), Some(given)) if bool::from(token.expose().as_bytes().ct_eq(given)) => {
                TokenCheck::Right
            }
            (Some(_), Some(_)) => TokenCheck::Wrong,
        }
    }

    /// The token, for signatures.
    pub fn access_token(&self) -> Option<Secret<String>> {
        self.read().access_token.clone()
    }

    /// The user of requests that name none.
    pub fn default_user(&self) -> String {
        self.read().default_user.clone()
    }

    /// The directory an empty path means; `None` is the user's home.
    pub fn default_workdir(&self) -> Option<String> {
        self.read().default_workdir.clone()
    }

    /// Variables every process gets: the sandbox's names, then what the init message set.
    pub fn global_env(&self) -> BTreeMap<String, String> {
        let identity = self.read();
        let mut env = BTreeMap::from([("E2B_SANDBOX".to_owned(), "true".to_owned())]);
        for (name, value) in
            [("E2B_SANDBOX_ID", &identity.sandbox_id), ("E2B_TEMPLATE_ID", &identity.template_id)]
        {
            if !value.is_empty() {
                env.insert(name.to_owned(), value.clone());
            }
        }
        env.extend(identity.env_vars.clone());
        env
    }

    /// The environment the last init message set, without the sandbox's names.
    pub fn own_env(&self) -> BTreeMap<String, String> {
        self.read().env_vars.clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Identity> {
        self.identity.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Identity> {
        self.identity.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secured() -> State {
        let token = Some(Secret::new("tok".to_owned()));
        State::new(Settings { access_token: token, ..Settings::on_host("root") })
    }

    #[test]
    fn only_the_exact_token_is_right() {
        let state = secured();
        assert_eq!(state.check_token(Some(b"tok")), TokenCheck::Right);
        for wrong in ["", "to", "tok ", "tokk", "Tok"] {
            assert_eq!(state.check_token(Some(wrong.as_bytes())), TokenCheck::Wrong, "{wrong}");
        }
        assert_eq!(state.check_token(None), TokenCheck::Missing);
        let open = State::new(Settings::on_host("root"));
        assert_eq!(open.check_token(Some(b"anything")), TokenCheck::Open);
    }

    #[test]
    fn an_identity_replaces_token_and_environment_and_keeps_what_it_leaves_out() {
        let state = secured();
        let seen = state.incarnation();
        let identity = NewIdentity {
            new_run: true,
            sandbox_id: Some("ione".to_owned()),
            template_id: Some("base".to_owned()),
            env_vars: BTreeMap::from([("A".to_owned(), "1".to_owned())]),
            default_workdir: Some("/srv".to_owned()),
            ..NewIdentity::default()
        };
        state.become_sandbox(identity.clone());
        assert_eq!(state.check_token(None), TokenCheck::Open);
        assert_eq!(state.default_user(), "root");
        assert_eq!(state.default_workdir().as_deref(), Some("/srv"));
        let env = state.global_env();
        assert_eq!(env["E2B_SANDBOX"], "true");
        assert_eq!(env["E2B_SANDBOX_ID"], "ione");
        assert_eq!(env["E2B_TEMPLATE_ID"], "base");
        assert_eq!(env["A"], "1");
        assert!(seen.has_changed().expect("state lives"));

        let mut seen = state.incarnation();
        seen.mark_unchanged();
        let again = NewIdentity { env_vars: BTreeMap::new(), ..identity };
        state.become_sandbox(NewIdentity { new_run: false, ..again.clone() });
        assert!(!seen.has_changed().expect("state lives"), "same run, same connections");
        assert!(!state.global_env().contains_key("A"));
        state.become_sandbox(again);
        assert!(seen.has_changed().expect("state lives"), "resumed: whoever was connected is gone");
    }

    #[test]
    fn init_times_only_go_forward() {
        let state = secured();
        assert!(state.accept_init_time(10));
        assert!(!state.accept_init_time(10));
        assert!(!state.accept_init_time(9));
        assert!(state.accept_init_time(11));
    }
}
