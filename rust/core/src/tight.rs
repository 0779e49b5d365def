//! Rows that are completed as exactly as possible: the longest sequence opens a row, and what is left of the row is
//! filled by the longest sequence that fits, the best pair, or the longest with the best pair beside it.
//!
//! The lengths that are left form a set with a fast "largest that is at most x", so a pair costs one look-up for each
//! first length that is tried, and [`MAX_PAIRS`] bounds the tries. Which of several pairs that fill a space exactly is
//! taken decides what is left for the last rows, and neither choice is better for all data ([`Pairs`]): the caller tries
//! both.

use crate::error::Result;
use crate::int_set::IntSet;
use crate::interrupt::Interrupt;
use crate::ragged::to_offset;

/// First lengths of a pair that are tried.
const MAX_PAIRS: usize = 64;

/// A row with room for more than this many of the longest gets one of them without a search.
const FAR: u32 = 4;

/// Which of the pairs that fill a space exactly is tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// The two most alike: short sequences are kept for later rows.
    Alike,
    /// The longest and the shortest: long sequences are placed early.
    Apart,
}

/// The sequences of all rows, row after row, and where each row begins; `starts[length]` is where the sequences of that
/// length begin in `longest_first`.
pub(crate) fn rows(
    counts: Vec<u32>,
    mut starts: Vec<u32>,
    longest_first: &[u32],
    row_units: u32,
    pairs: Pairs,
    interrupt: &Interrupt,
) -> Result<(Vec<u32>, Vec<i64>)> {
    let mut left = Left::new(counts, pairs);
    let (mut items, mut offsets) = (Vec::with_capacity(longest_first.len()), vec![0]);
    let mut row = vec![];
    while let Some(longest) = left.at_most(row_units) {
        interrupt.check()?;
        left.take(longest, &mut row);
        left.complete(row_units - longest, &mut row, interrupt)?;
        for units in row.drain(..) {
            let start = &mut starts[units as usize];
            items.push(longest_first[*start as usize]);
            *start += 1;
        }
        offsets.push(to_offset(items.len()));
    }
    Ok((items, offsets))
}

/// The lengths that are not placed yet, in units.
struct Left {
    counts: Vec<u32>,
    lengths: IntSet,
    shortest: u32,
    pairs: Pairs,
}

/// Up to three lengths (0: none) that together fill a space best.
struct Best {
    total: u32,
    parts: [u32; 3],
}

impl Left {
    fn new(counts: Vec<u32>, pairs: Pairs) -> Self {
        let mut lengths = IntSet::new(counts.len() - 1);
        for (units, _) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            lengths.insert(units);
        }
        let shortest = lengths.at_least(0).map_or(u32::MAX, to_units);
        Self { counts, lengths, shortest, pairs }
    }

    fn at_most(&self, units: u32) -> Option<u32> {
        self.lengths.at_most(units as usize).map(to_units)
    }

    fn below(&self, units: u32) -> Option<u32> {
        self.at_most(units.checked_sub(1)?)
    }

    fn above(&self, units: u32) -> Option<u32> {
        self.lengths.at_least(units as usize + 1).map(to_units)
    }

    fn take(&mut self, units: u32, row: &mut Vec<u32>) {
        row.push(units);
        let count = &mut self.counts[units as usize];
        *count -= 1;
        if *count == 0 {
            self.lengths.remove(units as usize);
            if units == self.shortest {
                self.shortest = self.lengths.at_least(0).map_or(u32::MAX, to_units);
            }
        }
    }

    /// Fills up a row that has this much space left.
    fn complete(&mut self, mut space: u32, row: &mut Vec<u32>, interrupt: &Interrupt) -> Result<()> {
        while let Some(single) = self.at_most(space) {
            let mut best = Best { total: single, parts: [single, 0, 0] };
            if single < space && space / FAR < single {
                self.best_pair(space, 0, &mut best);
                if best.total < space && single >= space / 3 {
                    self.best_pair(space, single, &mut best);
                }
            }
            for units in best.parts.into_iter().filter(|&units| units > 0) {
                self.take(units, row);
            }
            space -= best.total;
            interrupt.every(row.len())?;
        }
        Ok(())
    }

    /// Looks for a pair that fills more than `best`, but not over `space`, together with `third` (0: alone).
    fn best_pair(&self, space: u32, third: u32, best: &mut Best) {
        let room = space - third;
        let mut first = match self.pairs {
            Pairs::Apart => room.checked_sub(self.shortest).and_then(|most| self.at_most(most)),
            Pairs::Alike => self.at_most(room / 2).or_else(|| self.above(room / 2)),
        };
        for _ in 0..MAX_PAIRS {
            let Some(long) = first.filter(|&long| long < room) else { return };
            let Some(short) = self.at_most(room - long) else { return };
            if self.pairs == Pairs::Apart && third + 2 * long <= best.total {
                return; // no shorter pair is better
            }
            let total = third + long + short;
            if total > best.total && self.has(long, short, third) {
                *best = Best { total, parts: [third, long, short] };
                if total == space {
                    return;
                }
            }
            first = if self.pairs == Pairs::Apart { self.below(long) } else { self.above(long) };
        }
    }

    /// Whether all three are left at once.
    fn has(&self, long: u32, short: u32, third: u32) -> bool {
        let equal = |units: u32| u32::from(units == long) + u32::from(units == short) + u32::from(units == third);
        [long, short].into_iter().all(|units| self.counts[units as usize] >= equal(units))
    }
}

fn to_units(length: usize) -> u32 {
    u32::try_from(length).expect("no length is above that of a row, which is a u32")
}
