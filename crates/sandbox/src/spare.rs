//! A machine that stands ready: restored, tried out, and nobody's until it is handed over.
//!
//! On an emulated processor most of a start is the guest's code being translated for the first time,
//! in each process anew. A spare has done once what a start makes a guest do: it was told an identity
//! that is nobody's, and was asked something over its network. What it is told when it is handed
//! over is what every sandbox is told: who it is, the time, fresh randomness, its token.

use std::net::Ipv4Addr;
use std::sync::Arc;

use belljar_blockstore::{LayeredImage, Overlay};
use belljar_daemon::fault::{Point, reach};
use belljar_daemon::{Teardown, clock};
use belljar_domain::{SandboxId, UnixMillis};
use belljar_runtime::Machine;
use belljar_runtime::control::GuestControl;
use belljar_wire::guest::Init;

use crate::admission::Allocated;
use crate::boot::{
    Booted, CreateError, Places, Stood, Wanted, become_sandbox, describe, enter_ledger, entry_of,
    guest_init, not_ready, stand_up,
};
use crate::freeze::Held;
use crate::info::CreateSandbox;
use crate::ledger::{Entry, Line};
use crate::probe::{self, Target};
use crate::registry::Inner;
use crate::settings::MetricsFrom;
use crate::source::Source;

/// One of them.
pub(crate) struct Spare {
    machine: Box<dyn Machine>,
    control: GuestControl,
    undo: Teardown,
    source: Arc<Source>,
    memory: Arc<LayeredImage>,
    disk: Option<Arc<Overlay>>,
    route_ip: Ipv4Addr,
    places: Places,
    line: Line,
}

/// What spares of a source take of the host, each.
pub(crate) fn share_of(source: &Source) -> Allocated {
    Allocated::one(source.vcpus, source.memory, source.disk)
}

impl Spare {
    /// Makes one. Not cancel-safe: run it shielded.
    ///
    /// # Errors
    /// [`CreateError`]; nothing of it is left then.
    pub(crate) async fn make(host: &Inner, source: &Arc<Source>) -> Result<Spare, CreateError> {
        let mut undo = Teardown::new(&host.scope, host.settings.teardown_step_deadline);
        match acquire(host, source, &mut undo).await {
            Ok((stood, control, places, line)) => {
                let Stood { machine, memory, disk, route_ip, .. } = stood;
                let source = Arc::clone(source);
                Ok(Spare { machine, control, undo, source, memory, disk, route_ip, places, line })
            }
            Err(e) => {
                let _leaks = undo.run().await;
                Err(e)
            }
        }
    }

    /// Ends when it is of no use any more. Cancel-safe.
    pub(crate) async fn ended(&mut self) {
        let (machine, control) = (&mut self.machine, &mut self.control);
        tokio::select! {
            _cause = machine.exited() => {}
            () = async { while control.receive().await.is_ok() {} } => {}
        }
    }

    /// Makes it the sandbox that is asked for. Not cancel-safe: run it shielded.
    ///
    /// # Errors
    /// [`CreateError`]; nothing of either is left then.
    pub(crate) async fn hand_over(
        mut self,
        host: &Inner,
        request: &CreateSandbox,
    ) -> Result<Booted, CreateError> {
        let started_at = clock::now();
        let entry = entry_of(request, &self.source, &self.places, started_at);
        if let Err(source) = self.line.pass_to(&entry) {
            self.give_back().await;
            return Err(CreateError::Io { step: "write the ledger entry", source });
        }
        reach(Point::BootInLedger);
        let told = self.control.init(guest_init(request), host.settings.ready_deadline).await;
        let Spare { machine, control, mut undo, source, memory, disk, route_ip, .. } = self;
        let envd_version = match told {
            Ok(envd_version) => envd_version,
            Err(source) => {
                let error = not_ready(machine, source, &mut undo).await;
                let _leaks = undo.run().await;
                return Err(error);
            }
        };
        reach(Point::BootGuestReady);
        let info = describe(request, &source, (route_ip, started_at), &envd_version);
        let leaves_layers = source.snapshot.is_some();
        let held = Held { source, disk, memory, leaves_layers };
        Ok(Booted { machine, control, undo, info, held })
    }

    /// Gives everything back that it has. Not cancel-safe: run it shielded.
    pub(crate) async fn give_back(self) {
        let Spare { mut machine, control, mut undo, .. } = self;
        drop(control);
        if let Err(e) = machine.kill().await {
            undo.note_leak("machine", e.to_string());
        }
        drop(machine);
        // Failed steps are logged where they fail, and stay in the ledger.
        let _leaks = undo.run().await;
    }
}

async fn acquire(
    host: &Inner,
    source: &Arc<Source>,
    undo: &mut Teardown,
) -> Result<(Stood, GuestControl, Places, Line), CreateError> {
    let id = SandboxId::random();
    let (settings, places) = (&host.settings, Places::of(&host.settings, &id));
    let files = (places.run_dir.clone(), places.overlay.clone());
    let entry = Entry::spare(id.as_str(), &places.machine, files, clock::now().0);
    let line = enter_ledger(&host.ledger, &entry, undo)?;
    let wanted = Wanted { internet: true, cold: false };
    let mut stood = stand_up(&host.deps, settings, source, &places, wanted, undo).await?;
    let init = rehearsal(&id, source, clock::now());
    match become_sandbox(&mut *stood.machine, init, settings, stood.boots).await {
        Ok((control, _)) => {
            if settings.metrics == MetricsFrom::Guests {
                let target = Target { address: stood.route_ip, access_token: None };
                probe::rehearse(&target).await;
            }
            Ok((stood, control, places, line))
        }
        Err(e) => Err(not_ready(stood.machine, e, undo).await),
    }
}

/// What a guest is told that is nobody's: nothing that another could find in it.
fn rehearsal(id: &SandboxId, source: &Source, now: UnixMillis) -> Init {
    Init {
        nonce: rand::random(),
        sandbox_id: id.to_string(),
        template_id: source.template_id.to_string(),
        time_unix_ns: u64::try_from(now.0).unwrap_or(0).saturating_mul(1_000_000),
        entropy_hex: hex::encode(rand::random::<[u8; 32]>()),
        ..Init::default()
    }
}
