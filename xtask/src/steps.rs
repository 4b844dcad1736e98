//! The step engine: independent steps run side by side, each with a log, progress and a fix.

pub(crate) mod display;

use std::cell::RefCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::command::{self, Running};
use crate::places::Places;
use crate::setup::Goal;
use display::{Display, StepView};

/// Lines of a step's log that its failure shows.
const TAIL_LINES: usize = 20;

/// One thing to bring about. Steps that need nothing of each other run at the same time.
pub(crate) struct Step {
    /// Short and unique; also the name of its log.
    pub(crate) name: &'static str,
    /// What it is for, in the user's words.
    pub(crate) why: &'static str,
    /// Names of the steps that must have succeeded before.
    pub(crate) needs: &'static [&'static str],
    /// What to do when it fails and the failure itself knows nothing better.
    pub(crate) fix: &'static str,
    /// Does it, or finds it done.
    pub(crate) run: fn(&StepContext<'_>) -> Result<Outcome, StepError>,
}

/// How a step succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It did something; the text says what.
    Done(String),
    /// Nothing had to be done; the text says why.
    Cached(String),
}

/// Why a step failed and what to do about it.
pub(crate) struct StepError {
    cause: anyhow::Error,
    fix: Option<String>,
}

impl From<anyhow::Error> for StepError {
    fn from(cause: anyhow::Error) -> StepError {
        StepError { cause, fix: None }
    }
}

impl From<std::io::Error> for StepError {
    fn from(cause: std::io::Error) -> StepError {
        StepError { cause: cause.into(), fix: None }
    }
}

/// Puts a better fix than the step's own on an error.
pub(crate) trait OrFix<T> {
    /// The same result; an error carries `fix`.
    fn or_fix(self, fix: impl Into<String>) -> Result<T, StepError>;
}

impl<T> OrFix<T> for Result<T> {
    fn or_fix(self, fix: impl Into<String>) -> Result<T, StepError> {
        self.map_err(|cause| StepError { cause, fix: Some(fix.into()) })
    }
}

/// What a running step has at hand.
pub(crate) struct StepContext<'a> {
    pub(crate) places: &'a Places,
    pub(crate) goal: &'a Goal,
    view: StepView,
    log: RefCell<File>,
    running: &'a Running,
}

impl StepContext<'_> {
    /// Says what is being done now.
    pub(crate) fn say(&self, text: &str) {
        self.view.message(text);
    }

    /// Prints a line that stays on the screen.
    pub(crate) fn note(&self, text: &str) {
        self.view.note(text);
    }

    /// Shows that `done` of `total` pieces are finished.
    pub(crate) fn progress(&self, done: u64, total: u64, text: &str) {
        self.view.progress(done, total, text);
    }

    /// Runs a command into the step's log. It is stopped when another step fails.
    pub(crate) fn run(&self, command: Command, on_line: impl FnMut(&str)) -> Result<()> {
        command::run_logged(command, &self.log.borrow(), Some(self.running), on_line)
    }

    /// Like [`StepContext::run`], for what must not be cut off half way (the package manager).
    pub(crate) fn run_to_the_end(&self, command: Command, on_line: impl FnMut(&str)) -> Result<()> {
        command::run_logged(command, &self.log.borrow(), None, on_line)
    }
}

/// A step that succeeded, for the closing words of the verb.
pub(crate) struct Finished {
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
    pub(crate) took: Duration,
}

/// The step that failed first. [`Failure::show`] tells the user.
pub(crate) struct Failure {
    step: &'static Step,
    error: StepError,
    log: PathBuf,
}

impl Failure {
    /// Step, cause, the end of the log, and the fix.
    pub(crate) fn show(&self) {
        eprintln!("\nstep `{}` failed ({}): {:#}", self.step.name, self.step.why, self.error.cause);
        let lines = command::tail(&self.log, TAIL_LINES);
        if !lines.is_empty() {
            eprintln!("  end of {}:", self.log.display());
            for line in &lines {
                eprintln!("    {line}");
            }
        }
        eprintln!("  fix: {}", self.fix(&lines));
    }

    fn fix(&self, end_of_log: &[String]) -> &str {
        // Every step writes, and no tool's own advice would name the real cause.
        if end_of_log.iter().any(|line| line.contains("No space left on device")) {
            return "free some disk space, also in /tmp, then try again";
        }
        self.error.fix.as_deref().unwrap_or(self.step.fix)
    }
}

type Report = (usize, Duration, Result<Outcome, StepError>);

/// Runs every step as soon as what it needs is there.
///
/// The first failure stops the others; what they finished stays finished.
///
/// # Errors
/// The first step that failed, once nothing runs any more.
pub(crate) fn run_all(
    steps: &'static [Step],
    places: &Places,
    goal: &Goal,
) -> Result<Vec<Finished>, Failure> {
    let display = Display::new(steps.iter().map(|step| step.name));
    let running = Running::default();
    let (sender, reports) = mpsc::sync_channel::<Report>(steps.len());
    std::thread::scope(|scope| {
        let mut waiting: Vec<usize> = (0..steps.len()).collect();
        let mut finished: Vec<Finished> = Vec::new();
        let mut failure: Option<Failure> = None;
        let mut active = 0_usize;
        loop {
            if failure.is_none() {
                let ready = |at: &usize| {
                    let is_done = |need: &&str| finished.iter().any(|done| done.name == *need);
                    steps[*at].needs.iter().all(is_done)
                };
                for at in waiting.extract_if(.., |at| ready(at)) {
                    let (sender, display, running) = (sender.clone(), &display, &running);
                    active += 1;
                    scope.spawn(move || {
                        let report = run_one(&steps[at], at, places, goal, display, running);
                        // The loop below takes one report for each thread before it ends.
                        let _ = sender.send(report);
                    });
                }
            }
            if active == 0 {
                break;
            }
            let Ok((at, took, result)) = reports.recv() else { break };
            active -= 1;
            match result {
                Ok(outcome) => finished.push(Finished { name: steps[at].name, outcome, took }),
                // What ends because it was asked to is not a second failure.
                Err(error) if failure.is_none() => {
                    running.stop_all();
                    let log = log_path(places, steps[at].name);
                    failure = Some(Failure { step: &steps[at], error, log });
                }
                Err(_) => {}
            }
        }
        display.close();
        match failure {
            Some(failure) => Err(failure),
            None => {
                assert!(waiting.is_empty(), "every need names an earlier step");
                Ok(finished)
            }
        }
    })
}

fn run_one(
    step: &Step,
    at: usize,
    places: &Places,
    goal: &Goal,
    display: &Display,
    running: &Running,
) -> Report {
    let started = Instant::now();
    let view = display.start(step.name, step.why);
    let result = open_log(&log_path(places, step.name)).map_err(StepError::from).and_then(|log| {
        let context = StepContext { places, goal, view: view.clone(), log: log.into(), running };
        (step.run)(&context)
    });
    match &result {
        Ok(outcome) => view.succeed(outcome),
        Err(_) if running.is_stopping() => view.stop(),
        Err(_) => view.fail(),
    }
    (at, started.elapsed(), result)
}

fn log_path(places: &Places, step: &str) -> PathBuf {
    places.logs().join(format!("{step}.log"))
}

fn open_log(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))
}
