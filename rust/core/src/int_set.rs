//! A set of small integers with fast "smallest member that is at least x" and "largest that is at most x":
//! a bitset whose words are summarized by a bitset above it, and so on up to a single word (64-way, so 2^18
//! values need three levels).

const WORD_BITS: usize = 64;

pub(crate) struct IntSet {
    /// `levels[0]` has a bit per value; a bit of `levels[l + 1]` says that a word of `levels[l]` is not 0.
    levels: Vec<Vec<u64>>,
}

impl IntSet {
    /// An empty set that can hold `0..=largest`.
    pub(crate) fn new(largest: usize) -> Self {
        let mut levels = vec![vec![0; largest / WORD_BITS + 1]];
        while let Some(words) = levels.last().map(Vec::len).filter(|&words| words > 1) {
            levels.push(vec![0; (words - 1) / WORD_BITS + 1]);
        }
        Self { levels }
    }

    pub(crate) fn insert(&mut self, mut value: usize) {
        for words in &mut self.levels {
            let word = &mut words[value / WORD_BITS];
            let known_above = *word != 0;
            *word |= 1 << (value % WORD_BITS);
            if known_above {
                return;
            }
            value /= WORD_BITS;
        }
    }

    pub(crate) fn remove(&mut self, mut value: usize) {
        for words in &mut self.levels {
            let word = &mut words[value / WORD_BITS];
            *word &= !(1 << (value % WORD_BITS));
            if *word != 0 {
                return;
            }
            value /= WORD_BITS;
        }
    }

    /// The smallest member that is at least `value`.
    pub(crate) fn at_least(&self, value: usize) -> Option<usize> {
        // Upwards: `from` is the first index of this level that may still hold a member.
        let mut from = value;
        for (level, words) in self.levels.iter().enumerate() {
            let word = words.get(from / WORD_BITS)? & (u64::MAX << (from % WORD_BITS));
            if word != 0 {
                // Downwards: the lowest bit of each word leads to the smallest member.
                let mut member = from / WORD_BITS * WORD_BITS + word.trailing_zeros() as usize;
                for below in self.levels[..level].iter().rev() {
                    member = member * WORD_BITS + below[member].trailing_zeros() as usize;
                }
                return Some(member);
            }
            from = from / WORD_BITS + 1;
        }
        None
    }

    /// The largest member that is at most `value`, which is at most what the set can hold.
    pub(crate) fn at_most(&self, value: usize) -> Option<usize> {
        // Upwards: `from` is the last index of this level that may still hold a member.
        let mut from = value;
        for (level, words) in self.levels.iter().enumerate() {
            let word = words[from / WORD_BITS] & (u64::MAX >> (WORD_BITS - 1 - from % WORD_BITS));
            if word != 0 {
                // Downwards: the highest bit of each word leads to the largest member.
                let mut member = from / WORD_BITS * WORD_BITS + word.ilog2() as usize;
                for below in self.levels[..level].iter().rev() {
                    member = member * WORD_BITS + below[member].ilog2() as usize;
                }
                return Some(member);
            }
            from = (from / WORD_BITS).checked_sub(1)?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::IntSet;

    proptest! {
        #[test]
        fn same_as_a_tree(largest in 0..600_000_usize, steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..200)) {
            let (mut set, mut tree) = (IntSet::new(largest), BTreeSet::new());
            for (insert, at) in steps {
                let value = at.index(largest + 1);
                prop_assert_eq!(set.at_least(value), tree.range(value..).next().copied());
                prop_assert_eq!(set.at_most(value), tree.range(..=value).next_back().copied());
                if insert {
                    set.insert(value);
                    tree.insert(value);
                } else {
                    set.remove(value);
                    tree.remove(&value);
                }
                prop_assert_eq!(set.at_least(0), tree.first().copied());
            }
        }
    }
}
