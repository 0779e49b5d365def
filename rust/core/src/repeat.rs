//! Repetition inside a response: of token n-grams, and of whole lines and sentences.
//!
//! All counts are exact: hashes only propose, comparison decides.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::ragged::{Ragged, to_offset};

/// Lines and sentences of at most this many bytes, white space around them apart, are too short to count.
pub const MIN_REPEATED_BYTES: usize = 8;

/// Positions between two looks at the interrupt flag.
const CHUNK: usize = 1 << 16;

/// Repetition of n-grams in one response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repetition {
    /// How many positions hold an n-gram that began at an earlier position as well.
    pub num_repeated: i64,
    /// The length of the longest span of at least n ids that begins at two positions (the two may
    /// overlap); 0 if there is none.
    pub longest: i64,
}

/// Repeated n-grams of each response; responses shorter than `n` have none.
///
/// # Errors
/// An `n` of 0.
pub fn repeated_ngrams<I: Copy + Eq + Into<i64>>(
    ids: Ragged<'_, I>,
    n: usize,
    interrupt: &Interrupt,
) -> Result<Vec<Repetition>> {
    if n == 0 {
        return Err(Error::Argument { name: "n", value: 0.0, must: "at least 1" });
    }
    let mut finder = GramFinder::default();
    ids.iter().map(|ids| finder.repetition(ids, n, interrupt)).collect()
}

/// Finds equal n-grams by a rolling hash and an open-addressing table of first positions.
#[derive(Default)]
struct GramFinder {
    /// Hash and 1 + position of the first occurrence; 0 is a free slot.
    slots: Vec<(u64, usize)>,
}

impl GramFinder {
    fn repetition<I: Copy + Eq + Into<i64>>(
        &mut self,
        ids: &[I],
        n: usize,
        interrupt: &Interrupt,
    ) -> Result<Repetition> {
        let (mut num_repeated, mut run, mut longest_run, mut longest_match) = (0, 0, 0, 0);
        self.for_each_gram(ids, n, interrupt, |found| {
            if let Found::Repeated { matched } = found {
                num_repeated += 1;
                run += 1;
                longest_run = longest_run.max(run);
                longest_match = longest_match.max(matched);
            } else {
                run = 0;
            }
            true
        })?;
        if num_repeated == 0 {
            return Ok(Repetition::default());
        }
        // A span of L ids that repeats makes L - n + 1 repeated n-grams in a row: no span is longer than
        // this. One of `longest_match` is there. Between the two, bisect: where a span repeats, a shorter does.
        let (mut there, mut above) = (longest_match, longest_run + n);
        while above - there > 1 {
            let middle = there.midpoint(above);
            let mut repeats = false;
            self.for_each_gram(ids, middle, interrupt, |found| {
                repeats = matches!(found, Found::Repeated { .. });
                !repeats
            })?;
            if repeats {
                there = middle;
            } else {
                above = middle;
            }
        }
        Ok(Repetition { num_repeated, longest: to_offset(there) })
    }

    /// Visits the n-grams in order until `visit` returns false.
    fn for_each_gram<I: Copy + Eq + Into<i64>>(
        &mut self,
        ids: &[I],
        n: usize,
        interrupt: &Interrupt,
        mut visit: impl FnMut(Found) -> bool,
    ) -> Result<()> {
        let Some(num_grams) = (ids.len() + 1).checked_sub(n).filter(|&grams| grams > 0) else { return Ok(()) };
        let mask = (2 * num_grams).next_power_of_two() - 1;
        self.slots.clear();
        self.slots.resize(mask + 1, (0, 0));
        let mut hash = RollingHash::new(&ids[..n]);
        // Of the last gram: where it began before, and how long the match with that place is by now.
        let mut last: Option<(usize, usize)> = None;
        for at in 0..num_grams {
            if at % CHUNK == 0 {
                interrupt.check()?;
            }
            if at > 0 {
                hash.roll(ids[at - 1], ids[at + n - 1]);
            }
            last = match last {
                // The earlier place goes on as this one does: no need to look it up.
                Some((source, matched)) if ids[source + n] == ids[at + n - 1] => Some((source + 1, matched + 1)),
                _ => self.first_occurrence(ids, n, at, hash.value, mask).map(|source| (source, n)),
            };
            let found = last.map_or(Found::New, |(_, matched)| Found::Repeated { matched });
            if !visit(found) {
                break;
            }
        }
        Ok(())
    }

    /// Where the gram at `at` occurred first, if before; else it is entered.
    fn first_occurrence<I: Copy + Eq>(
        &mut self,
        ids: &[I],
        n: usize,
        at: usize,
        hash: u64,
        mask: usize,
    ) -> Option<usize> {
        #[expect(clippy::cast_possible_truncation, reason = "only the low bits choose the slot")]
        let mut slot = (hash ^ hash >> 32) as usize & mask;
        loop {
            let entry = &mut self.slots[slot];
            match *entry {
                (_, 0) => {
                    *entry = (hash, at + 1);
                    return None;
                }
                (known, first) if known == hash && ids[first - 1..first - 1 + n] == ids[at..at + n] => {
                    return Some(first - 1);
                }
                _ => slot = (slot + 1) & mask,
            }
        }
    }
}

enum Found {
    New,
    Repeated {
        /// Length of the span up to the end of this gram that is known to occur before.
        matched: usize,
    },
}

/// Polynomial hash modulo the prime 2^61 − 1.
struct RollingHash {
    value: u64,
    /// `BASE` to the power n − 1: the weight of the id that leaves.
    leaving: u64,
}

const PRIME: u64 = (1 << 61) - 1;
const BASE: u64 = 0x0B9A_76F3_5E21_D4C7;

fn multiply(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a number below 2^122")]
    let (low, high) = (product as u64 & PRIME, (product >> 61) as u64);
    let sum = low + high;
    if sum >= PRIME { sum - PRIME } else { sum }
}

/// An id as a number of 61 bits; those of 32 bits stay different from each other and from 0.
fn digit(id: impl Into<i64>) -> u64 {
    id.into().wrapping_add(1 << 32).unsigned_abs() & PRIME
}

impl RollingHash {
    fn new(gram: &[impl Copy + Into<i64>]) -> Self {
        let leaving = (1..gram.len()).fold(1, |power, _| multiply(power, BASE));
        let value = gram.iter().fold(0, |value, &id| (multiply(value, BASE) + digit(id)) % PRIME);
        Self { value, leaving }
    }

    fn roll<I: Copy + Into<i64>>(&mut self, old: I, new: I) {
        let kept = self.value + PRIME - multiply(digit(old), self.leaving);
        self.value = (multiply(kept % PRIME, BASE) + digit(new)) % PRIME;
    }
}

/// Share of a response's bytes in lines, and in sentences, that it has said before.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TextRepetition {
    /// Bytes of repeated lines ÷ bytes of the text.
    pub lines: f64,
    /// Bytes of repeated sentences ÷ bytes of the text.
    pub sentences: f64,
}

/// Repetition of lines and sentences in each text. White space around a line or sentence does not
/// count, neither when compared nor as bytes; those of at most [`MIN_REPEATED_BYTES`] are passed over;
/// the first of several equal ones is not a repetition. An empty text has shares of 0.
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
    let rows = texts.iter().zip(ends.iter()).enumerate();
    rows.map(|(response, (text, ends))| {
        let sentences = spans(response, text, ends)?;
        #[expect(clippy::cast_precision_loss, reason = "shares need no more than 53 bits")]
        let share = |repeated: usize| if text.is_empty() { 0.0 } else { repeated as f64 / text.len() as f64 };
        let lines = text.split(|&byte| byte == b'\n');
        Ok(TextRepetition {
            lines: share(repeated_bytes(lines, interrupt)?),
            sentences: share(repeated_bytes(sentences.into_iter(), interrupt)?),
        })
    })
    .collect()
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
