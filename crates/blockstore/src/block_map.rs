//! What a writer of an image knows of each block: two bits a block, read without locks.
//!
//! ```text
//!            write                zero, trim
//!   Base ───────────► Written ◄───────────────► Zero
//!     └──────────────────────────────────────────▲
//!                     zero, trim
//! ```
//!
//! A block never goes back to `Base`. A state is stored with release order after the data it
//! speaks of is in the file, and loaded with acquire order before the file is read, so a reader
//! that sees `Written` finds the data.

use std::sync::atomic::{AtomicU64, Ordering};

const BITS_PER_BLOCK: u64 = 2;
const BLOCKS_PER_WORD: u64 = u64::BITS as u64 / BITS_PER_BLOCK;
const MASK: u64 = 0b11;

/// Where the content of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// In the base image.
    Base,
    /// In the overlay file.
    Written,
    /// Nowhere: it reads as zeros.
    Zero,
}

impl BlockState {
    fn bits(self) -> u64 {
        match self {
            BlockState::Base => 0,
            BlockState::Written => 1,
            BlockState::Zero => 2,
        }
    }

    fn from_bits(bits: u64) -> BlockState {
        match bits & MASK {
            0 => BlockState::Base,
            1 => BlockState::Written,
            // Only the three values above are ever stored.
            _ => BlockState::Zero,
        }
    }
}

/// The states of all blocks of one disk.
pub(crate) struct BlockMap {
    blocks: u64,
    words: Box<[AtomicU64]>,
}

impl BlockMap {
    /// All blocks in the base image.
    pub(crate) fn new(blocks: u64) -> BlockMap {
        let words = blocks.div_ceil(BLOCKS_PER_WORD);
        BlockMap { blocks, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    fn place(block: u64) -> (usize, u64) {
        let word = usize::try_from(block / BLOCKS_PER_WORD).expect("the map fits in memory");
        (word, (block % BLOCKS_PER_WORD) * BITS_PER_BLOCK)
    }

    /// The state of one block.
    pub(crate) fn get(&self, block: u64) -> BlockState {
        let (word, shift) = Self::place(block);
        BlockState::from_bits(self.words[word].load(Ordering::Acquire) >> shift)
    }

    /// Sets the state of one block. Two setters of the same block need a lock of their own; setters
    /// of neighbours do not.
    pub(crate) fn set(&self, block: u64, state: BlockState) {
        let (word, shift) = Self::place(block);
        let replaced = self.words[word].fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            Some((old & !(MASK << shift)) | (state.bits() << shift))
        });
        debug_assert!(replaced.is_ok(), "the update always has a new value");
    }

    /// How many blocks from `block` on, up to and without `end`, share the state of `block`.
    pub(crate) fn run(&self, block: u64, end: u64) -> (BlockState, u64) {
        let state = self.get(block);
        // What a word holds if all its blocks are in this state.
        let uniform = state.bits() * (u64::MAX / MASK);
        let mut next = block + 1;
        while next < end {
            let (word, shift) = Self::place(next);
            if shift == 0 && self.words[word].load(Ordering::Acquire) == uniform {
                next += BLOCKS_PER_WORD;
            } else if self.get(next) == state {
                next += 1;
            } else {
                break;
            }
        }
        (state, next.min(end) - block)
    }

    /// Counts the blocks in state `state`.
    pub(crate) fn count(&self, state: BlockState) -> u64 {
        let mut count = 0;
        let mut block = 0;
        while block < self.blocks {
            let (found, len) = self.run(block, self.blocks);
            count += if found == state { len } else { 0 };
            block += len;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_disturb_each_other() {
        let map = BlockMap::new(70);
        map.set(0, BlockState::Written);
        map.set(31, BlockState::Zero);
        map.set(32, BlockState::Written);
        map.set(69, BlockState::Zero);
        map.set(0, BlockState::Zero);
        let changed: Vec<_> = (0..70)
            .map(|block| (block, map.get(block)))
            .filter(|(_, s)| *s != BlockState::Base)
            .collect();
        assert_eq!(
            changed,
            [
                (0, BlockState::Zero),
                (31, BlockState::Zero),
                (32, BlockState::Written),
                (69, BlockState::Zero)
            ]
        );
        assert_eq!((map.count(BlockState::Zero), map.count(BlockState::Written)), (3, 1));
        assert_eq!(map.count(BlockState::Base), 66);
    }

    #[test]
    fn runs_stop_at_a_change_and_at_the_end() {
        let map = BlockMap::new(100);
        for block in 10..50 {
            map.set(block, BlockState::Written);
        }
        assert_eq!(map.run(0, 100), (BlockState::Base, 10));
        assert_eq!(map.run(10, 100), (BlockState::Written, 40));
        assert_eq!(map.run(20, 30), (BlockState::Written, 10));
        assert_eq!(map.run(50, 100), (BlockState::Base, 50));
        let whole = BlockMap::new(200);
        for block in 0..200 {
            whole.set(block, BlockState::Zero);
        }
        for (block, end) in [(0, 200), (3, 64), (31, 33), (32, 70), (199, 200)] {
            assert_eq!(whole.run(block, end), (BlockState::Zero, end - block));
        }
    }
}
