//! The figures of one run: a table for people and JSON for machines.

use serde::Serialize;

/// One measured thing.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    pub(super) what: &'static str,
    /// Of both figures.
    pub(super) unit: &'static str,
    pub(super) ours: f64,
    /// The bare mechanism or the peer in the same run; `None` for weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peer: Option<f64>,
    /// What the ratio, or the figure itself, should reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target: Option<Target>,
    /// Processor time of the daemon and of its peer for the same work, seconds a gigabyte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cpu_seconds_per_gb: Option<(f64, Option<f64>)>,
}

/// What a figure should reach.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum Target {
    /// Ours at least this.
    AtLeast(f64),
    /// Ours at most this.
    AtMost(f64),
    /// Ours at least this part of the peer's.
    Share(f64),
    /// Ours at most this much more than the peer's, in the unit of both.
    Added(f64),
}

impl Figure {
    /// Whether the target was met; figures without one always are.
    pub(super) fn is_met(&self) -> bool {
        let peer = self.peer.unwrap_or(f64::NAN);
        match self.target {
            None => true,
            Some(Target::AtLeast(least)) => self.ours >= least,
            Some(Target::AtMost(most)) => self.ours <= most,
            Some(Target::Share(share)) => self.ours >= share * peer,
            Some(Target::Added(most)) => self.ours - peer <= most,
        }
    }

    fn row(&self) -> [String; 7] {
        let number = |value: f64| match value {
            value if value >= 100.0 => format!("{value:.0}"),
            value => format!("{value:.2}"),
        };
        let target = match self.target {
            None => String::new(),
            Some(Target::AtLeast(least)) => format!(">= {}", number(least)),
            Some(Target::AtMost(most)) => format!("<= {}", number(most)),
            Some(Target::Share(share)) => format!("ratio >= {share}"),
            Some(Target::Added(most)) => format!("added <= {}", number(most)),
        };
        let verdict = if self.is_met() { target } else { format!("{target}  MISSED") };
        let cpu = self.cpu_seconds_per_gb.map_or(String::new(), |(ours, peer)| {
            let peer = peer.map_or(String::new(), |peer| format!(" / {peer:.2}"));
            format!("{ours:.2}{peer}")
        });
        [
            self.what.to_owned(),
            self.unit.to_owned(),
            number(self.ours),
            self.peer.map_or(String::new(), number),
            self.peer.map_or(String::new(), |peer| format!("{:.2}", self.ours / peer)),
            cpu,
            verdict,
        ]
    }
}

/// The table, as Markdown so that it can be pasted into a page.
pub(super) fn table(figures: &[Figure]) -> String {
    let heads = ["what", "unit", "ours", "raw or peer", "ratio", "cpu s/GB", "target"];
    let rows: Vec<[String; 7]> = figures.iter().map(Figure::row).collect();
    let width = |at: usize| {
        rows.iter().map(|row| row[at].len()).chain([heads[at].len()]).max().unwrap_or_default()
    };
    let line = |cells: [&str; 7]| {
        let mut line = String::from("|");
        for (at, cell) in cells.into_iter().enumerate() {
            line.push_str(&format!(" {cell:<width$} |", width = width(at)));
        }
        line + "\n"
    };
    let mut table = line(heads);
    table.push_str(&line(["---"; 7]));
    for row in &rows {
        table.push_str(&line(row.each_ref().map(String::as_str)));
    }
    table
}

/// The middle of some figures; 0 of none.
pub(super) fn median(values: &mut [f64]) -> f64 {
    percentile(values, 50)
}

/// The smallest value that `percent` of all are not above.
pub(super) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let mut values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(median(&mut values), 3.0);
        assert_eq!(percentile(&mut values, 90), 5.0);
        assert_eq!(percentile(&mut values, 20), 1.0);
        assert_eq!(median(&mut []), 0.0);
    }

    #[test]
    fn a_missed_target_is_named() {
        let figure = |ours, peer, target| Figure {
            what: "a thing",
            unit: "MB/s",
            ours,
            peer,
            target: Some(target),
            cpu_seconds_per_gb: None,
        };
        assert!(figure(500.0, None, Target::AtLeast(500.0)).is_met());
        assert!(!figure(79.0, Some(100.0), Target::Share(0.8)).is_met());
        assert!(figure(4.0, Some(2.0), Target::Added(3.0)).is_met());
        assert!(!figure(9.0, None, Target::AtMost(8.0)).is_met());
        let missed = table(&[figure(79.0, Some(100.0), Target::Share(0.8))]);
        assert!(missed.contains("0.79") && missed.contains("MISSED"), "{missed}");
    }
}
