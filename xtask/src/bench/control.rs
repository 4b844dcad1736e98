//! The control plane on the fake driver: every cost of a create but the machine's.
//!
//! One server after the other, on SQLite and on PostgreSQL, driven over loopback by this process on
//! the same cores. The floor of each figure comes from the same run: `GET /health` of the same
//! server for what a request costs at all, and the node's own create for what the node costs.

mod cases;
mod client;
mod postgres;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;

use super::report::{self, Figure};
use crate::command;
use crate::places::Places;
use crate::server::{Server, fake_template};
use crate::setup::{self, BuildKind, belljar_program};
use postgres::Postgres;

/// The table of one store.
#[derive(Serialize)]
struct Of {
    store: &'static str,
    figures: Vec<Figure>,
}

/// Runs everything on both stores. `false` if a target was missed or a server did not end well.
pub(super) fn run(places: &Places, program: Option<PathBuf>, live: u32) -> Result<bool> {
    let _lock = places.lock()?;
    let program = match program {
        Some(program) => program,
        None => {
            setup::for_control_bench(places)?;
            belljar_program(places, BuildKind::Release)
        }
    };
    let folder = places.work_folder("bench-control")?;
    let mut all = Vec::new();
    let mut is_clean = true;
    let mut measure = |store: &'static str, database: Option<&str>| -> Result<()> {
        let data = folder.path().join(store);
        std::fs::create_dir_all(&data)?;
        fake_template(&program, &data)?;
        let server = start(&program, &data, database, live, places)?;
        eprintln!("measuring on {store}");
        let figures = cases::all(&server, &data.join("node.sock"), live)?;
        println!("\n{store}\n{}", report::table(&figures));
        all.push(Of { store, figures });
        let stopped = server.stop();
        println!("stopped with {live} sandboxes in {:.1} s", stopped.took.as_secs_f64());
        for fault in &stopped.faults {
            println!("{fault}");
        }
        is_clean &= stopped.faults.is_empty();
        Ok(())
    };
    measure("SQLite", None)?;
    let postgres = Postgres::start()?;
    measure("PostgreSQL", Some(&postgres.address()))?;
    drop(postgres);
    println!("load average: {}", std::fs::read_to_string("/proc/loadavg")?.trim());
    println!("{}", serde_json::to_string(&all)?);
    Ok(is_clean && all.iter().flat_map(|of| &of.figures).all(Figure::is_met))
}

fn start(
    program: &Path,
    data: &Path,
    database: Option<&str>,
    live: u32,
    places: &Places,
) -> Result<Server> {
    if live > 60_000 {
        bail!("--live can be 60000 at most");
    }
    let mut command = command::tied(program);
    command.env("BELLJAR_RUNTIME", "fake");
    // The benchmark is one caller at full speed, which is what the rates are there to refuse.
    command.env("BELLJAR_TEAM_RATE", "off").env("BELLJAR_ADDRESS_RATE", "off");
    // Room for what the concurrent part holds besides.
    command.env("BELLJAR_SANDBOXES_MAX", (live + 200).to_string());
    if let Some(database) = database {
        command.env("BELLJAR_DATABASE", database);
    }
    Server::start_with(command, data.to_owned(), &places.logs().join("bench-control.log"))
}
