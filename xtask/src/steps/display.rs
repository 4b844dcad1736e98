//! What the user sees while steps run: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Outcome;

/// Without a terminal, progress of one step is told at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);
/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// The whole screen.
pub(crate) struct Display {
    bars: Option<MultiProgress>,
    name_width: usize,
    started: Instant,
}

impl Display {
    /// Bars if standard error is a terminal.
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Display {
        Display {
            bars: std::io::stderr().is_terminal().then(MultiProgress::new),
            name_width: names.map(str::len).max().unwrap_or(0),
            started: Instant::now(),
        }
    }

    /// Shows that a step began.
    pub(crate) fn start(&self, name: &'static str, why: &str) -> StepView {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new_spinner());
            bar.set_style(style("{spinner} {prefix} {elapsed:>5} {wide_msg}"));
            bar.set_prefix(format!("{name:width$}", width = self.name_width));
            bar.set_message(why.to_owned());
            bar.enable_steady_tick(TICK);
            bar
        });
        let view = StepView {
            name,
            name_width: self.name_width,
            bar,
            origin: self.started,
            began: Instant::now(),
            last_plain: Arc::new(Mutex::new(Instant::now())),
        };
        if view.bar.is_none() {
            view.plain(why);
        }
        view
    }

    /// Leaves the terminal as it was found.
    pub(crate) fn close(&self) {
        if let Some(bars) = &self.bars {
            bars.set_move_cursor(false);
        }
    }
}

/// The line of one step.
#[derive(Clone)]
pub(crate) struct StepView {
    name: &'static str,
    name_width: usize,
    bar: Option<ProgressBar>,
    origin: Instant,
    began: Instant,
    last_plain: Arc<Mutex<Instant>>,
}

impl StepView {
    /// What the step does now.
    pub(crate) fn message(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => self.plain_now_and_then(text),
        }
    }

    /// A line that stays.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("  {text}")),
            None => self.plain(text),
        }
    }

    /// How far the step is.
    pub(crate) fn progress(&self, done: u64, total: u64, text: &str) {
        match &self.bar {
            Some(bar) => {
                if bar.length() != Some(total) {
                    bar.set_length(total);
                    bar.set_style(style(
                        "{spinner} {prefix} {elapsed:>5} {bar:24} {pos}/{len} {wide_msg}",
                    ));
                }
                bar.set_position(done.min(total));
                bar.set_message(text.to_owned());
            }
            None => self.plain_now_and_then(&format!("{done} of {total} {text}")),
        }
    }

    /// The step succeeded.
    pub(crate) fn succeed(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Done(text) => self.end("done", text),
            Outcome::Cached(text) => self.end("ready", text),
        }
    }

    /// The step failed; the story follows once everything else has stopped.
    pub(crate) fn fail(&self) {
        self.end("FAILED", "");
    }

    /// The step was stopped because another one failed.
    pub(crate) fn stop(&self) {
        self.end("stopped", "");
    }

    fn end(&self, word: &str, text: &str) {
        let took = self.began.elapsed().as_secs_f64();
        match &self.bar {
            Some(bar) => {
                bar.set_style(style("  {prefix} {msg}"));
                bar.finish_with_message(format!("{took:6.1} s  {word} {text}"));
            }
            None => self.plain(&format!("{word} in {took:.1} s {text}")),
        }
    }

    fn plain_now_and_then(&self, text: &str) {
        let mut last = self.last_plain.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= PLAIN_INTERVAL {
            *last = Instant::now();
            self.plain(text);
        }
    }

    fn plain(&self, text: &str) {
        let at = self.origin.elapsed().as_secs_f64();
        eprintln!("[{at:7.1} s] {:width$} {}", self.name, text.trim_end(), width = self.name_width);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates are constants of this file")
}
