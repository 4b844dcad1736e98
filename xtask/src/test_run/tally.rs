//! Counting what passed, failed and was skipped, from the lines test programs print.

use std::time::Duration;

/// The whole run.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: u64,
    /// Name and reason.
    failed: Vec<(String, String)>,
    skipped: Vec<String>,
}

impl Tally {
    pub(super) fn pass(&mut self) {
        self.passed += 1;
    }

    pub(super) fn fail(&mut self, name: &str, reason: &str) {
        self.failed.push((name.to_owned(), reason.to_owned()));
    }

    pub(super) fn skip(&mut self, name: &str, reason: &str) {
        self.skipped.push(format!("{name}: {reason}"));
    }

    pub(super) fn is_clean(&self) -> bool {
        self.failed.is_empty()
    }

    /// How many checks were counted so far.
    pub(super) fn counted(&self) -> u64 {
        self.passed + count(&self.failed) + count(&self.skipped)
    }

    /// Adds the result of `cargo test`. `skip_log` has one line for each test that found the
    /// machine lacking something and returned early: the harness calls that a pass.
    pub(super) fn add_cargo(&mut self, lines: CargoLines, skip_log: &str, is_success: bool) {
        let skips: Vec<_> = skip_log.lines().filter(|line| !line.trim().is_empty()).collect();
        self.passed += lines.passed.saturating_sub(count(&skips));
        self.skipped.extend(skips.into_iter().map(|line| line.trim().to_owned()));
        for number in 0..lines.ignored {
            self.skipped.push(format!("ignored test {} (tests must not be ignored)", number + 1));
        }
        let unnamed = lines.failed.saturating_sub(count(&lines.failures));
        for name in lines.failures {
            self.failed.push((name, "see the output above".to_owned()));
        }
        for _ in 0..unnamed {
            self.fail("cargo test", "a test failed; see the output above");
        }
        if !is_success && lines.failed == 0 {
            self.fail("cargo test", "it did not build, or a test program crashed; see above");
        }
    }

    /// Adds one line of an SDK suite; other lines are not counted. Gives back whether it failed.
    pub(super) fn add_suite_line(&mut self, suite: &str, line: &str) -> bool {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "ok" => self.passed += 1,
            "skip" => self.skipped.push(format!("{suite}: {rest}")),
            "FAIL" => {
                let (name, reason) = rest.split_once(": ").unwrap_or((rest, "no reason given"));
                self.fail(&format!("{suite}: {name}"), reason);
                return true;
            }
            _ => {}
        }
        false
    }

    /// Prints what to look at and the last line.
    pub(super) fn show(&self, took: Duration) {
        println!("\n== result after {:.0} s", took.as_secs_f64());
        for skip in &self.skipped {
            println!("skipped: {skip}");
        }
        for (name, reason) in &self.failed {
            println!("FAILED: {name}: {reason}");
        }
        println!("{}", self.last_line());
    }

    fn last_line(&self) -> String {
        format!(
            "belljar: {} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        )
    }
}

fn count<T>(list: &[T]) -> u64 {
    u64::try_from(list.len()).expect("usize fits in 64 bits")
}

/// What the standard test harness printed, over all test programs of the workspace.
#[derive(Debug, Default)]
pub(super) struct CargoLines {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Names of failed tests.
    failures: Vec<String>,
}

impl CargoLines {
    /// Takes one line of `cargo test`'s standard output.
    pub(super) fn read(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            // `ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s`
            for part in result.split(['.', ';']) {
                let mut words = part.split_whitespace();
                let (Some(number), Some(what)) = (words.next(), words.next()) else { continue };
                let Ok(number) = number.parse::<u64>() else { continue };
                match what {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.ignored += number,
                    _ => {}
                }
            }
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> CargoLines {
        let mut lines = CargoLines::default();
        text.lines().for_each(|line| lines.read(line));
        lines
    }

    #[test]
    fn harness_lines_add_up_and_skips_are_not_passes() {
        let lines = read(
            "running 3 tests\ntest a::b ... ok\ntest a::c ... FAILED\n\
             test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s\n\
             test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        let mut tally = Tally::default();
        tally.add_cargo(lines, "host_slots: needs root\n\n", false);
        assert_eq!(tally.last_line(), "belljar: 5 passed, 1 failed, 2 skipped");
        assert_eq!(tally.failed[0].0, "a::c");
    }

    #[test]
    fn a_build_that_fails_is_a_failure() {
        let mut tally = Tally::default();
        tally.add_cargo(read(""), "", false);
        assert_eq!(tally.last_line(), "belljar: 0 passed, 1 failed, 0 skipped");
        assert!(!tally.is_clean());
    }

    #[test]
    fn suite_lines_are_counted_by_their_first_word() {
        let mut tally = Tally::default();
        assert!(!tally.add_suite_line("js", "ok create (120 ms)"));
        assert!(!tally.add_suite_line("js", "server ready"));
        assert!(!tally.add_suite_line("js", "skip pty: no terminal"));
        assert!(tally.add_suite_line("js", "FAIL kill: returned false: twice"));
        assert_eq!(tally.last_line(), "belljar: 1 passed, 1 failed, 1 skipped");
        assert_eq!(tally.failed[0], ("js: kill".into(), "returned false: twice".into()));
        assert_eq!(tally.counted(), 3);
    }
}
