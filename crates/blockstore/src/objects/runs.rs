//! The flat map of an image: runs of blocks that lie one after the other in one object.

use std::ops::Range;

/// Blocks of an image that are consecutive blocks of one object. Blocks in no run read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First block of the image.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Which object of the manifest's table.
    pub object: u32,
    /// First block in the object.
    pub at: u32,
}

impl Run {
    /// Blocks of the image, without the end. 64 bits, because the end may be 2^32.
    pub fn blocks(&self) -> Range<u64> {
        u64::from(self.first)..u64::from(self.first) + u64::from(self.count)
    }

    /// The part of this run inside `blocks`, if any.
    fn clipped(&self, blocks: &Range<u64>) -> Option<Run> {
        let own = self.blocks();
        let (start, end) = (own.start.max(blocks.start), own.end.min(blocks.end));
        if start >= end {
            return None;
        }
        let narrow = |value: u64| u32::try_from(value).expect("a part of a run of 32-bit blocks");
        Some(Run {
            first: narrow(start),
            count: narrow(end - start),
            at: self.at + narrow(start - own.start),
            object: self.object,
        })
    }
}

/// The parts of sorted `runs` inside `blocks`.
pub(super) fn within(runs: &[Run], blocks: Range<u64>) -> impl Iterator<Item = Run> + '_ {
    let from = runs.partition_point(|run| run.blocks().end <= blocks.start);
    let end = blocks.end;
    runs[from..]
        .iter()
        .take_while(move |run| run.blocks().start < end)
        .filter_map(move |run| run.clipped(&blocks))
}

/// Appends `run`, which lies after all others, as a part of the last one where it continues it.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut() {
        let continues = last.object == run.object
            && last.blocks().end == u64::from(run.first)
            && u64::from(last.at) + u64::from(last.count) == u64::from(run.at);
        if continues {
            last.count += run.count;
            return;
        }
    }
    runs.push(run);
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn run(first: u32, count: u32, object: u32, at: u32) -> Run {
        Run { first, count, object, at }
    }

    #[test]
    fn runs_grow_only_where_both_sides_go_on() {
        let mut runs = Vec::new();
        for each in [
            run(0, 2, 0, 5),
            run(2, 1, 0, 7),
            run(4, 1, 0, 8),
            run(5, 1, 1, 9),
            run(6, 1, 1, 11),
            run(u32::MAX, 1, 1, 12),
        ] {
            push(&mut runs, each);
        }
        let expected = [
            run(0, 3, 0, 5),
            run(4, 1, 0, 8),
            run(5, 1, 1, 9),
            run(6, 1, 1, 11),
            run(u32::MAX, 1, 1, 12),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn a_range_cuts_the_runs_at_its_edges() {
        let runs = [run(2, 4, 0, 10), run(8, 2, 1, 0)];
        let cut = |blocks| within(&runs, blocks).collect::<Vec<_>>();
        assert_eq!(cut(0..2), []);
        assert_eq!(cut(3..9), [run(3, 3, 0, 11), run(8, 1, 1, 0)]);
        assert_eq!(cut(5..6), [run(5, 1, 0, 13)]);
        assert_eq!(cut(6..8), []);
        assert_eq!(cut(9..1 << 40), [run(9, 1, 1, 1)]);
    }
}
