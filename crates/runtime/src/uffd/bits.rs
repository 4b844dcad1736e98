//! One bit for each page, set and read without a lock.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const WORD: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(super) struct Bits(Box<[AtomicU64]>);

impl Bits {
    /// As many, all clear.
    pub(super) fn new(count: u64) -> Bits {
        Bits((0..count.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect())
    }

    fn place(bit: u64) -> (usize, u64) {
        (usize::try_from(bit / WORD).expect("the bits fit in memory"), 1 << (bit % WORD))
    }

    pub(super) fn get(&self, bit: u64) -> bool {
        let (word, mask) = Self::place(bit);
        self.0[word].load(Ordering::Acquire) & mask != 0
    }

    /// Sets one; whether it was set before.
    pub(super) fn set(&self, bit: u64) -> bool {
        let (word, mask) = Self::place(bit);
        self.0[word].fetch_or(mask, Ordering::AcqRel) & mask != 0
    }

    pub(super) fn set_all(&self, bits: Range<u64>) {
        for bit in bits {
            self.set(bit);
        }
    }

    pub(super) fn clear_all(&self, bits: Range<u64>) {
        for bit in bits {
            let (word, mask) = Self::place(bit);
            self.0[word].fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// How many from the first of `bits` on are as it is.
    pub(super) fn run(&self, bits: Range<u64>) -> (bool, u64) {
        let first = self.get(bits.start);
        let same = bits.clone().take_while(|bit| self.get(*bit) == first).count();
        (first, u64::try_from(same).expect("a count of a range"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_a_bit_differs() {
        let bits = Bits::new(200);
        bits.set_all(60..130);
        assert_eq!(bits.run(0..200), (false, 60));
        assert_eq!(bits.run(60..200), (true, 70));
        assert_eq!(bits.run(100..110), (true, 10));
        bits.clear_all(64..65);
        assert_eq!(bits.run(60..200), (true, 4));
        assert!(!bits.set(64) && bits.set(64) && !bits.get(199));
    }
}
