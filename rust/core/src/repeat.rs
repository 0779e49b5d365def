//! Repetition inside a response: of token n-grams, of back-to-back copies, and of whole lines and sentences.
//!
//! All counts are exact: hashes only propose, comparison decides.

use std::collections::HashSet;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::parallel::{self, GRAIN};
use crate::ragged::{Ragged, to_offset};
use crate::stretch::StretchFinder;

/// Lines and sentences of at most this many bytes, without the white space around them, are too short to count.
pub const MIN_REPEATED_BYTES: usize = 8;

/// Repetition of n-grams in one response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repetition {
    /// Number of positions whose n-gram also begins at an earlier position.
    pub num_repeated: i64,
    /// The length of the longest stretch of back-to-back copies: at least three, and at least 3n ids together; a last
    /// copy may be cut short. 0 if there is none.
    pub longest_stretch: i64,
}

/// Repeated n-grams of each response; responses shorter than `n` have none.
///
/// # Errors
/// An `n` of 0; a response of 2^31 ids or more.
pub fn repeated_ngrams<I: Copy + Eq + Into<i64> + Sync>(
    ids: Ragged<'_, I>,
    n: usize,
    interrupt: &Interrupt,
) -> Result<Vec<Repetition>> {
    if n == 0 {
        return Err(Error::Argument { name: "n", value: 0.0, must: "at least 1" });
    }
    let parts = parallel::try_map(parallel::cut(ids.offsets(), 4 * GRAIN), interrupt, |responses| {
        let (mut grams, mut stretches) = (GramFinder::default(), StretchFinder::default());
        responses
            .map(|response| {
                let ids = &ids[response];
                if i32::try_from(ids.len()).is_err() {
                    return Err(Error::TooManyIds { response, len: ids.len() });
                }
                let runs = grams.repeated(ids, n, interrupt)?;
                Ok(Repetition {
                    num_repeated: to_offset(runs.iter().map(ExactSizeIterator::len).sum()),
                    longest_stretch: to_offset(longest_stretch(ids, n, &runs, &mut stretches, interrupt)?),
                })
            })
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(parts.concat())
}

/// The longest stretch of back-to-back copies, which is looked for only where n-grams repeat: most responses repeat
/// nothing, and this costs them nothing.
///
/// In a stretch of L ids with period p ≤ L/3, all n-grams from its second copy on have begun before. There are
/// L − p − n + 1 of them, more than n if L ≥ 3n, and they lie in one run. So a run of g grams, which spans g + n − 1
/// ids, holds a stretch of at most 3/2 of these ids, and of its first copy at most half of them lie before the run.
fn longest_stretch<I: Copy + Eq>(
    ids: &[I],
    n: usize,
    runs: &[Range<usize>],
    finder: &mut StretchFinder<I>,
    interrupt: &Interrupt,
) -> Result<usize> {
    let mut longest = n.saturating_mul(3) - 1;
    let too_short = longest;
    for run in runs {
        let spanned = run.len() + n - 1;
        if spanned + spanned / 2 > longest {
            let part = &ids[run.start.saturating_sub(spanned / 2)..run.end + n - 1];
            longest = finder.longer_than(longest, part, interrupt)?;
        }
    }
    Ok(if longest == too_short { 0 } else { longest })
}

/// Finds equal n-grams with a rolling hash and an open-addressing table of first positions.
#[derive(Default)]
struct GramFinder {
    /// The upper half of a hash, and above 0 the number of the gram that occurred first. Grams are numbered through all
    /// calls: those of earlier calls have smaller numbers and count as free, so nothing has to be cleared.
    slots: Vec<u64>,
    /// The number of the last gram of the last call.
    last: u32,
}

impl GramFinder {
    /// Where the grams begin that have begun before: runs without gaps.
    fn repeated<I: Copy + Eq + Into<i64>>(
        &mut self,
        ids: &[I],
        n: usize,
        interrupt: &Interrupt,
    ) -> Result<Vec<Range<usize>>> {
        let mut runs: Vec<Range<usize>> = vec![];
        let Some(num_grams) = (ids.len() + 1).checked_sub(n).filter(|&grams| grams > 0) else { return Ok(runs) };
        let before = self.begin(num_grams);
        let slots = &mut self.slots[..(2 * num_grams).next_power_of_two()];
        let mut hash = RollingHash::new(&ids[..n]);
        // How far back the equal gram began, inside a run.
        let mut distance: Option<usize> = None;
        for at in 0..num_grams {
            interrupt.every(at)?;
            if at > 0 {
                hash.roll(ids[at - 1], ids[at + n - 1]);
            }
            // While the next id is equal too, the gram need not be looked up.
            if !distance.is_some_and(|distance| ids[at + n - 1 - distance] == ids[at + n - 1]) {
                distance = first_occurrence(slots, before, ids, n, at, hash.value()).map(|first| at - first);
            }
            if distance.is_some() {
                match runs.last_mut() {
                    Some(run) if run.end == at => run.end += 1,
                    _ => runs.push(at..at + 1),
                }
            }
        }
        Ok(runs)
    }

    /// Makes room for the grams and numbers them; returns the number before the first.
    fn begin(&mut self, num_grams: usize) -> u32 {
        let num_slots = (2 * num_grams).next_power_of_two();
        if self.slots.len() < num_slots {
            self.slots.resize(num_slots, 0);
        }
        let num_grams = u32::try_from(num_grams).expect("a response has fewer than 2^31 ids");
        let before = self.last;
        if let Some(last) = before.checked_add(num_grams) {
            self.last = last;
            return before;
        }
        self.slots.fill(0);
        self.last = num_grams;
        0
    }
}

/// Where the gram at `at` first occurred; `None` if it is new, and then it is entered.
#[inline]
fn first_occurrence<I: Copy + Eq>(
    slots: &mut [u64],
    before: u32,
    ids: &[I],
    n: usize,
    at: usize,
    hash: u64,
) -> Option<usize> {
    let mask = slots.len() - 1;
    #[expect(clippy::cast_possible_truncation, reason = "at is below 2^31, and of the hash only some bits are needed")]
    let (number, tag, mut slot) = (before + at as u32 + 1, (hash >> 29) as u32, hash as usize & mask);
    loop {
        #[expect(clippy::cast_possible_truncation, reason = "these are the two halves")]
        let (known_tag, known) = ((slots[slot] >> 32) as u32, slots[slot] as u32);
        if known <= before {
            slots[slot] = u64::from(tag) << 32 | u64::from(number);
            return None;
        }
        if known_tag == tag {
            let first = (known - before - 1) as usize;
            if ids[first..first + n] == ids[at..at + n] {
                return Some(first);
            }
        }
        slot = (slot + 1) & mask;
    }
}

/// Polynomial hash modulo the prime 2^61 − 1. Terms are reduced only to below 2^61 + 8, which is enough to compute the
/// next one.
struct RollingHash {
    term: u64,
    /// `BASE` to the power n: the weight of the id that leaves.
    leaving: u64,
}

const PRIME: u64 = (1 << 61) - 1;
const BASE: u64 = 0x0B9A_76F3_5E21_D4C7;

/// The sum modulo the prime, below 2^61 + 8.
#[inline]
fn fold(sum: u64) -> u64 {
    (sum & PRIME) + (sum >> 61)
}

/// The product modulo the prime, below 2^62 + 2^61 for factors below 2^61 + 8.
#[inline]
fn multiply(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a number below 2^123")]
    let (low, high) = (product as u64 & PRIME, (product >> 61) as u64);
    low + high
}

/// An id as a number below 2^61; those of 32 bits stay different from each other and from 0.
#[inline]
fn digit(id: impl Into<i64>) -> u64 {
    id.into().wrapping_add(1 << 32).unsigned_abs() & (PRIME >> 1)
}

impl RollingHash {
    fn new(gram: &[impl Copy + Into<i64>]) -> Self {
        let leaving = gram.iter().fold(1, |power, _| fold(multiply(power, BASE)));
        let term = gram.iter().fold(0, |term, &id| fold(fold(multiply(term, BASE)) + digit(id)));
        Self { term, leaving }
    }

    #[inline]
    fn roll<I: Copy + Into<i64>>(&mut self, old: I, new: I) {
        // Computed apart from the last term, so that the processor can work on several steps at once.
        let change = fold(digit(new) + (4 * PRIME - multiply(digit(old), self.leaving)));
        self.term = fold(multiply(self.term, BASE) + change);
    }

    /// The hash, below the prime.
    #[inline]
    fn value(&self) -> u64 {
        if self.term >= PRIME { self.term - PRIME } else { self.term }
    }
}

/// Share of a response's bytes in lines, and in sentences, that occurred before.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TextRepetition {
    /// Bytes of repeated lines ÷ bytes of the text.
    pub lines: f64,
    /// Bytes of repeated sentences ÷ bytes of the text.
    pub sentences: f64,
}

/// Repetition of lines and sentences in each text. White space around a line or sentence is ignored, both in comparisons
/// and in the number of bytes; those of at most [`MIN_REPEATED_BYTES`] are skipped; the first of several equal ones is
/// not a repetition. An empty text has shares of 0.
///
/// # Errors
/// Columns of unequal length; sentence ends that do not increase or do not end with the text.
pub fn text_repetition(
    texts: Ragged<'_, u8>,
    ends: Ragged<'_, i64>,
    interrupt: &Interrupt,
) -> Result<Vec<TextRepetition>> {
    if texts.len() != ends.len() {
        let (left, right) = ("offsets", "end_offsets");
        return Err(Error::UnequalLengths { left, left_len: texts.len() + 1, right, right_len: ends.len() + 1 });
    }
    let parts = parallel::try_map(parallel::cut(texts.offsets(), 4 * GRAIN), interrupt, |responses| {
        let one = |response| repetition_of_text(response, &texts[response], &ends[response], interrupt);
        responses.map(one).collect::<Result<Vec<_>>>()
    })?;
    Ok(parts.concat())
}

fn repetition_of_text(response: usize, text: &[u8], ends: &[i64], interrupt: &Interrupt) -> Result<TextRepetition> {
    let sentences = spans(response, text, ends)?;
    #[expect(clippy::cast_precision_loss, reason = "shares need no more than 53 bits")]
    let share = |repeated: usize| if text.is_empty() { 0.0 } else { repeated as f64 / text.len() as f64 };
    let lines = text.split(|&byte| byte == b'\n');
    Ok(TextRepetition {
        lines: share(repeated_bytes(lines, interrupt)?),
        sentences: share(repeated_bytes(sentences.into_iter(), interrupt)?),
    })
}

fn spans<'t>(response: usize, text: &'t [u8], ends: &[i64]) -> Result<Vec<&'t [u8]>> {
    let mut before = 0;
    let mut spans = Vec::with_capacity(ends.len());
    for (index, &value) in ends.iter().enumerate() {
        let end = usize::try_from(value).ok().filter(|&end| end > before);
        let not_increasing = || Error::EndsNotIncreasing { response, index, value, before: to_offset(before) };
        let end = end.ok_or_else(not_increasing)?;
        spans.push(text.get(before..end).ok_or(Error::EndsNotTextLength { response, value, len: text.len() })?);
        before = end;
    }
    if before != text.len() {
        let value = to_offset(before);
        return Err(Error::EndsNotTextLength { response, value, len: text.len() });
    }
    Ok(spans)
}

fn repeated_bytes<'t>(units: impl Iterator<Item = &'t [u8]>, interrupt: &Interrupt) -> Result<usize> {
    let mut seen = HashSet::new();
    let mut repeated = 0;
    for unit in units {
        interrupt.check()?;
        let unit = unit.trim_ascii();
        if unit.len() > MIN_REPEATED_BYTES && !seen.insert(unit) {
            repeated += unit.len();
        }
    }
    Ok(repeated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_grams_restart_when_they_run_out() {
        let ids: Vec<i32> = (0..40).chain(10..30).collect();
        let quiet = Interrupt::new();
        let mut finder = GramFinder { slots: vec![], last: u32::MAX - 200 };
        for _ in 0..20 {
            let runs = finder.repeated(&ids, 5, &quiet).unwrap();
            assert_eq!((runs.len(), runs[0].start, runs[0].end), (1, 40, 56));
        }
        assert!(finder.last < 2000, "they have run out once");
    }
}
