//! The guest daemon against bare mechanisms and nginx, in host mode on this machine.
//!
//! Every pair takes turns in one run, and the figure is the median of its rounds, so whatever else
//! the machine does falls on both.

mod cases;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::peers::Peer;
use super::report::{self, Figure};
use crate::places::Places;
use crate::setup;

/// A part of the benchmark: what it is called and what it does.
type Part = (&'static str, fn(&Stage<'_>) -> Result<Vec<Figure>>);

const PARTS: &[Part] = &[
    ("weights", |stage| cases::weights(stage.program)),
    ("commands", |stage| cases::commands(&stage.envd)),
    ("streams", |stage| cases::streams(&stage.envd)),
    ("downloads", |stage| cases::downloads(&stage.envd, &stage.nginx, stage.folder)),
    ("uploads", |stage| cases::uploads(&stage.envd, &stage.nginx, stage.folder)),
];

/// What the parts are given.
struct Stage<'a> {
    program: &'a Path,
    folder: &'a Path,
    envd: Peer,
    nginx: Peer,
}

/// Runs all parts, or those named, with the program given, or with the shipped form built now.
/// `false` if a target was missed.
pub(super) fn run(places: &Places, program: Option<PathBuf>, only: &[String]) -> Result<bool> {
    if let Some(unknown) = only.iter().find(|name| !PARTS.iter().any(|part| part.0 == **name)) {
        let known: Vec<_> = PARTS.iter().map(|part| part.0).collect();
        bail!("the benchmark has no part '{unknown}'; it has {}", known.join(", "));
    }
    let _lock = places.lock()?;
    let program = match program {
        Some(program) => program,
        None => {
            setup::for_native_bench(places)?;
            places.envd()
        }
    };
    let folder = places.work_folder("bench")?;
    let (envd, nginx) = (Peer::envd(&program)?, Peer::nginx(folder.path())?);
    let stage = Stage { program: &program, folder: folder.path(), envd, nginx };
    let mut figures = Vec::new();
    for (name, measure) in PARTS {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        eprintln!("measuring {name}");
        figures.extend(measure(&stage)?);
    }
    print!("{}", report::table(&figures));
    println!("load average: {}", std::fs::read_to_string("/proc/loadavg")?.trim());
    println!("{}", serde_json::to_string(&figures)?);
    Ok(figures.iter().all(Figure::is_met))
}
