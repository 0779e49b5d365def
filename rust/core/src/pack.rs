//! Lengths of token sequences → rows of at most `seq_len` tokens.
//!
//! Both [`Method::BestFit`] (`best_fit.rs`) and [`Method::Tight`] (`tight.rs`) work on the histogram of lengths that a
//! counting sort leaves, never on single sequences. The same input gives the same bytes on every platform.

use crate::best_fit;
use crate::error::{Error, Result};
use crate::interrupt::{INTERVAL, Interrupt};
use crate::ragged::to_offset;
use crate::tight::{self, Pairs};

/// The longest row: it bounds the tables, which have one entry per possible remaining space.
pub const MAX_SEQ_LEN: u32 = 1 << 24;

/// How rows are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Global best-fit-decreasing.
    BestFit,
    /// The longest sequence first, each row completed as exactly as possible; best-fit-decreasing where that needs no
    /// more rows.
    Tight,
    /// Next-fit: in the given order, a new row as soon as the next sequence does not fit.
    InOrder,
}

/// What happens to a sequence that is longer than a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// An error that names it.
    Error,
    /// It is listed in [`Plan::dropped`].
    Drop,
}

/// How to pack.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Tokens that a row can hold, 1 to [`MAX_SEQ_LEN`].
    pub seq_len: u32,
    /// Every sequence takes a multiple of this many tokens of its row; divides `seq_len`.
    pub alignment: u32,
    /// How rows are filled.
    pub method: Method,
    /// What happens to sequences that are too long.
    pub overlong: Overlong,
}

/// Which sequence is in which row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Indices of sequences, row after row.
    pub items: Vec<u32>,
    /// Row `r` is `items[offsets[r]..offsets[r + 1]]`.
    pub offsets: Vec<i64>,
    /// Indices of the sequences left out, increasing.
    pub dropped: Vec<u32>,
    /// Sum of the packed lengths, before alignment.
    pub num_tokens: u64,
}

/// Packs sequences of these lengths into rows: every index is exactly once in `items` or in `dropped`.
///
/// ```
/// use dasd_lite_core::pack::{Method, Options, Overlong, pack};
/// use dasd_lite_core::{Interrupt, Ragged};
///
/// let options = Options { seq_len: 8, alignment: 1, method: Method::BestFit, overlong: Overlong::Error };
/// let plan = pack(&[3_i32, 5, 2, 4, 2], &options, &Interrupt::new())?;
/// // Sequence 1 has 5 tokens and sequence 0 has 3: together they fill a row of 8. The others fill the second row.
/// let rows = Ragged::new("offsets", &plan.items, &plan.offsets)?;
/// assert!(rows.iter().eq([[1, 0].as_slice(), &[3, 2, 4]]));
/// assert_eq!(plan.num_tokens, 16);
/// # Ok::<(), dasd_lite_core::Error>(())
/// ```
///
/// # Errors
/// A length below 1; one above `seq_len` (unless dropped); `seq_len` or `alignment` out of range;
/// more than 2^32 − 1 sequences.
pub fn pack<T: Copy + Into<i64>>(lengths: &[T], options: &Options, interrupt: &Interrupt) -> Result<Plan> {
    let &Options { seq_len, alignment, .. } = options;
    let argument = |name, value: u32, must| Err(Error::Argument { name, value: f64::from(value), must });
    if seq_len == 0 || seq_len > MAX_SEQ_LEN {
        return argument("seq_len", seq_len, "from 1 to 16777216");
    }
    if alignment == 0 || seq_len % alignment != 0 {
        return argument("alignment", alignment, "at least 1 and a divisor of seq_len");
    }
    if u32::try_from(lengths.len()).is_err() {
        #[expect(clippy::cast_precision_loss, reason = "for a message")]
        let value = lengths.len() as f64;
        return Err(Error::Argument { name: "the number of sequences", value, must: "at most 4294967295" });
    }
    match options.method {
        Method::BestFit | Method::Tight => by_length(lengths, options, interrupt),
        Method::InOrder => in_order(lengths, options, interrupt),
    }
}

impl Options {
    fn row_units(&self) -> u32 {
        self.seq_len / self.alignment
    }

    /// Units of `alignment` tokens that a sequence takes; `None` if it is to be dropped.
    #[inline]
    fn units(&self, index: usize, length: i64) -> Result<Option<u32>> {
        let Some(length) = u32::try_from(length).ok().filter(|length| (1..=self.seq_len).contains(length)) else {
            return self.misfit(index, length);
        };
        Ok(Some(if self.alignment == 1 { length } else { length.div_ceil(self.alignment) }))
    }

    #[cold]
    fn misfit(&self, index: usize, value: i64) -> Result<Option<u32>> {
        if value < 1 {
            Err(Error::LengthTooShort { index, value })
        } else if self.overlong == Overlong::Error {
            Err(Error::LengthTooLong { index, value, seq_len: self.seq_len })
        } else {
            Ok(None)
        }
    }
}

/// Calls `visit(index, length, units)` for every sequence in order; `units` is `None` for a dropped one.
fn for_each<T: Copy + Into<i64>>(
    lengths: &[T],
    options: &Options,
    interrupt: &Interrupt,
    mut visit: impl FnMut(u32, i64, Option<u32>),
) -> Result<()> {
    let mut index = 0_u32;
    for chunk in lengths.chunks(INTERVAL) {
        interrupt.check()?;
        for &length in chunk {
            let length = length.into();
            visit(index, length, options.units(index as usize, length)?);
            index = index.wrapping_add(1);
        }
    }
    Ok(())
}

fn in_order<T: Copy + Into<i64>>(lengths: &[T], options: &Options, interrupt: &Interrupt) -> Result<Plan> {
    let row_units = options.row_units();
    let mut plan = Plan { items: Vec::with_capacity(lengths.len()), offsets: vec![0], dropped: vec![], num_tokens: 0 };
    let mut used = 0;
    for_each(lengths, options, interrupt, |index, length, units| {
        let Some(units) = units else {
            plan.dropped.push(index);
            return;
        };
        if used + units > row_units {
            plan.offsets.push(to_offset(plan.items.len()));
            used = 0;
        }
        used += units;
        plan.items.push(index);
        plan.num_tokens += length.unsigned_abs();
    })?;
    if !plan.items.is_empty() {
        plan.offsets.push(to_offset(plan.items.len()));
    }
    Ok(plan)
}

/// Sequences by length, the longest first: a histogram and a stable counting sort.
struct Sorted {
    /// Number of sequences of each length, in units.
    counts: Vec<u32>,
    /// Their indices, longest first.
    items: Vec<u32>,
    dropped: Vec<u32>,
    num_tokens: u64,
}

impl Sorted {
    // Not inlined: among the rest its two loops would run out of registers, which costs a tenth of all packing.
    #[inline(never)]
    fn new<T: Copy + Into<i64>>(lengths: &[T], options: &Options, interrupt: &Interrupt) -> Result<Self> {
        let mut counts = vec![0_u32; options.row_units() as usize + 1];
        let mut dropped = vec![];
        let mut num_tokens = 0;
        for_each(lengths, options, interrupt, |index, length, units| match units {
            Some(units) => {
                counts[units as usize] += 1;
                num_tokens += length.unsigned_abs();
            }
            None => dropped.push(index),
        })?;
        let mut cursors = starts(&counts);
        let mut items = vec![0; lengths.len() - dropped.len()];
        let mut dropped_again = dropped.iter();
        let mut changed = false;
        for_each(lengths, options, interrupt, |index, _, units| {
            let Some(units) = units else {
                changed |= dropped_again.next() != Some(&index);
                return;
            };
            let cursor = &mut cursors[units as usize];
            items[*cursor as usize] = index;
            *cursor += 1;
        })?;
        // If each cursor is now where the next length starts, every index is there once.
        let mut end = 0;
        for (&cursor, count) in cursors.iter().zip(&counts).rev() {
            end += count;
            changed |= cursor != end;
        }
        if changed {
            return Err(Error::Changed);
        }
        Ok(Self { counts, items, dropped, num_tokens })
    }
}

/// Where the sequences of each length begin among those longest first.
fn starts(counts: &[u32]) -> Vec<u32> {
    let mut starts = counts.to_vec();
    let mut before = 0;
    for start in starts.iter_mut().rev() {
        before += std::mem::replace(start, before);
    }
    starts
}

fn by_length<T: Copy + Into<i64>>(lengths: &[T], options: &Options, interrupt: &Interrupt) -> Result<Plan> {
    let Sorted { counts, items: longest_first, dropped, num_tokens } = Sorted::new(lengths, options, interrupt)?;
    let row_units = options.row_units();
    let (moves, num_rows) = best_fit::moves(&counts, row_units, interrupt)?;
    if options.method == Method::Tight {
        let units = counts.iter().zip(0_u64..).map(|(&count, units)| u64::from(count) * units);
        let bound = units.sum::<u64>().div_ceil(u64::from(row_units));
        let mut fewest = num_rows as usize;
        let mut tightest = None;
        for pairs in [Pairs::Alike, Pairs::Apart] {
            if fewest as u64 == bound {
                break; // no method could do with fewer
            }
            let rows = tight::rows(counts.clone(), starts(&counts), &longest_first, row_units, pairs, interrupt)?;
            if rows.1.len() - 1 < fewest {
                fewest = rows.1.len() - 1;
                tightest = Some(rows);
            }
        }
        if let Some((items, offsets)) = tightest {
            return Ok(Plan { items, offsets, dropped, num_tokens });
        }
    }
    let (items, offsets) = best_fit::write_items(&longest_first, &moves, num_rows, interrupt)?;
    Ok(Plan { items, offsets, dropped, num_tokens })
}
