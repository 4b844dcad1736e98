//! The flat map of an image: for each block, where its content is.

use std::ops::Range;

use crate::block_map::{BlockMap, BlockState};

/// Blocks an image may have, so that a run takes eight bytes: 16 TiB.
pub(crate) const BLOCKS_MAX: u64 = u32::MAX as u64;

/// Where the content of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nowhere: it reads as zeros.
    Zero,
    /// In this layer of the image, at its own offset.
    Layer(u16),
}

impl Source {
    pub(crate) fn layer(self) -> Option<usize> {
        match self {
            Source::Zero => None,
            Source::Layer(layer) => Some(usize::from(layer)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The run ends where the next one begins.
    first: u32,
    source: Source,
}

/// Runs of blocks in order, without gaps; neighbours differ in their source.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RunMap {
    blocks: u64,
    runs: Vec<Run>,
}

impl RunMap {
    pub(crate) fn new() -> RunMap {
        RunMap::default()
    }

    /// Adds `count` blocks at the end. The map has at most [`BLOCKS_MAX`] afterwards: the caller has
    /// checked the image's size.
    pub(crate) fn push(&mut self, count: u64, source: Source) {
        if count == 0 {
            return;
        }
        if self.runs.last().is_none_or(|last| last.source != source) {
            let first = u32::try_from(self.blocks).expect("an image has at most BLOCKS_MAX blocks");
            self.runs.push(Run { first, source });
        }
        self.blocks += count;
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// The runs of `blocks`, cut at its ends. `blocks` lies inside the map.
    pub(crate) fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = (Range<u64>, Source)> {
        let after = self.runs.partition_point(|run| u64::from(run.first) <= blocks.start);
        let mut next = after.saturating_sub(1);
        std::iter::from_fn(move || {
            let run = self.runs.get(next)?;
            let start = u64::from(run.first).max(blocks.start);
            if start >= blocks.end {
                return None;
            }
            next += 1;
            let end = self.runs.get(next).map_or(self.blocks, |after| u64::from(after.first));
            Some((start..end.min(blocks.end), run.source))
        })
    }

    /// All runs.
    pub(crate) fn all(&self) -> impl Iterator<Item = (Range<u64>, Source)> {
        self.within(0..self.blocks)
    }

    /// This map with `changes` over it; what they have written is in layer `top`.
    pub(crate) fn under(&self, changes: &BlockMap, top: u16) -> RunMap {
        let mut map = RunMap::new();
        let mut block = 0;
        while block < self.blocks {
            let (state, count) = changes.run(block, self.blocks);
            match state {
                BlockState::Written => map.push(count, Source::Layer(top)),
                BlockState::Zero => map.push(count, Source::Zero),
                BlockState::Base => {
                    for (blocks, source) in self.within(block..block + count) {
                        map.push(blocks.end - blocks.start, source);
                    }
                }
            }
            block += count;
        }
        map
    }

    /// The same runs with other sources.
    pub(crate) fn map(&self, mut source: impl FnMut(Source) -> Source) -> RunMap {
        let mut map = RunMap::new();
        for (blocks, from) in self.all() {
            map.push(blocks.end - blocks.start, source(from));
        }
        map
    }

    /// How many blocks lie in each of `layers` layers.
    pub(crate) fn used_blocks(&self, layers: usize) -> Vec<u64> {
        let mut used = vec![0; layers];
        for (blocks, source) in self.all() {
            if let Some(layer) = source.layer() {
                used[layer] += blocks.end - blocks.start;
            }
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(runs: &[(u64, Source)]) -> RunMap {
        let mut map = RunMap::new();
        for (count, source) in runs {
            map.push(*count, *source);
        }
        map
    }

    #[test]
    fn neighbours_of_one_source_are_one_run() {
        let map = map(&[
            (3, Source::Zero),
            (2, Source::Zero),
            (0, Source::Layer(1)),
            (4, Source::Layer(0)),
        ]);
        assert_eq!((map.len(), map.blocks()), (2, 9));
        let within: Vec<_> = map.within(4..6).collect();
        assert_eq!(within, [(4..5, Source::Zero), (5..6, Source::Layer(0))]);
        assert_eq!(map.within(9..9).count(), 0);
        assert_eq!(map.within(5..9).collect::<Vec<_>>(), [(5..9, Source::Layer(0))]);
        assert_eq!(RunMap::new().all().count(), 0);
    }

    #[test]
    fn changes_hide_what_is_below_them() {
        let base = map(&[(4, Source::Layer(0)), (4, Source::Zero)]);
        let changes = BlockMap::new(8);
        changes.set(1, BlockState::Zero);
        changes.set(3, BlockState::Written);
        changes.set(4, BlockState::Written);
        let expected = [
            (0..1, Source::Layer(0)),
            (1..2, Source::Zero),
            (2..3, Source::Layer(0)),
            (3..5, Source::Layer(1)),
            (5..8, Source::Zero),
        ];
        let over = base.under(&changes, 1);
        assert_eq!(over.all().collect::<Vec<_>>(), expected);
        assert_eq!(over.used_blocks(2), [2, 2]);
    }
}
