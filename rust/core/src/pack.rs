//! Lengths of token sequences → rows of at most `seq_len` tokens.
//!
//! [`Method::BestFit`] is global best-fit-decreasing: the longest sequence first, each into the row
//! whose remaining space is the smallest that suffices. Its cost is O(sequences + `seq_len`), for it
//! never looks at a single row: rows with the same space left form *ranges*, and a run of equally
//! long sequences is placed into a whole range at once (if `space` is the smallest that suffices,
//! the row that got one sequence is the best fit for the next as well, so each row of the range
//! takes `space / length` of them before its neighbour is touched). What is recorded are these
//! moves; a last pass writes the items. Same input, same bytes, on every platform.

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::ragged::to_offset;
use crate::spaces::SpaceSet;

/// The longest row: a bound on the tables, which have one entry per possible remaining space.
pub const MAX_SEQ_LEN: u32 = 1 << 24;

/// Between two looks at the interrupt flag.
const CHUNK: usize = 1 << 16;

/// How rows are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Global best-fit-decreasing.
    BestFit,
    /// Next-fit: in the given order, a new row as soon as the next sequence does not fit.
    InOrder,
}

/// What becomes of a sequence that is longer than a row.
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
    /// What becomes of too long ones.
    pub overlong: Overlong,
}

/// Which sequence lies in which row.
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

/// Packs sequences of these lengths into rows: every index is once in `items` or in `dropped`.
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
        Method::BestFit => best_fit(lengths, options, interrupt),
        Method::InOrder => in_order(lengths, options, interrupt),
    }
}

impl Options {
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
    for chunk in lengths.chunks(CHUNK) {
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
    let row_units = options.seq_len / options.alignment;
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

fn best_fit<T: Copy + Into<i64>>(lengths: &[T], options: &Options, interrupt: &Interrupt) -> Result<Plan> {
    let row_units = options.seq_len / options.alignment;

    // The histogram of lengths, and with it a stable counting sort, longest first.
    let mut counts = vec![0_u32; row_units as usize + 1];
    let mut dropped = vec![];
    let mut num_tokens = 0;
    for_each(lengths, options, interrupt, |index, length, units| match units {
        Some(units) => {
            counts[units as usize] += 1;
            num_tokens += length.unsigned_abs();
        }
        None => dropped.push(index),
    })?;
    let mut cursors = counts.clone();
    let mut before = 0;
    for cursor in cursors.iter_mut().rev() {
        before += std::mem::replace(cursor, before);
    }
    let mut longest_first = vec![0; lengths.len() - dropped.len()];
    for_each(lengths, options, interrupt, |index, _, units| {
        if let Some(units) = units {
            let cursor = &mut cursors[units as usize];
            longest_first[*cursor as usize] = index;
            *cursor += 1;
        }
    })?;
    drop(cursors);

    let (moves, num_rows) = best_fit_moves(&counts, row_units, interrupt)?;
    let (items, offsets) = write_items(&longest_first, &moves, num_rows, interrupt)?;
    Ok(Plan { items, offsets, dropped, num_tokens })
}

/// The next `num_rows * per_row` sequences, longest first, go into these rows, `per_row` into each.
#[derive(Clone, Copy)]
struct Move {
    first_row: u32,
    num_rows: u32,
    per_row: u32,
}

/// Best-fit-decreasing on the histogram alone: the moves in order, and the number of rows.
fn best_fit_moves(counts: &[u32], row_units: u32, interrupt: &Interrupt) -> Result<(Vec<Move>, u32)> {
    let mut open = OpenRows::new(row_units);
    let mut moves = vec![];
    let mut num_rows = 0;
    for units in (1..=row_units).rev() {
        interrupt.check()?;
        let mut left = counts[units as usize];
        while left > 0 {
            let (space, rows) = open.take_best_fit(units).unwrap_or_else(|| {
                let rows = Rows { first: num_rows, count: left.div_ceil(row_units / units) };
                num_rows += rows.count;
                (row_units, rows)
            });
            let per_row = space / units;
            let full = rows.count.min(left / per_row);
            if full > 0 {
                moves.push(Move { first_row: rows.first, num_rows: full, per_row });
                open.put(space - per_row * units, Rows { first: rows.first, count: full });
                left -= full * per_row;
            }
            let mut rest = Rows { first: rows.first + full, count: rows.count - full };
            if rest.count > 0 && left > 0 {
                // Fewer are left than a row could take: they share the next one.
                moves.push(Move { first_row: rest.first, num_rows: 1, per_row: left });
                open.put(space - left * units, Rows { first: rest.first, count: 1 });
                rest = Rows { first: rest.first + 1, count: rest.count - 1 };
                left = 0;
            }
            open.put(space, rest);
        }
    }
    Ok((moves, num_rows))
}

/// Carries out the moves: items of all rows, and where each row begins.
fn write_items(
    longest_first: &[u32],
    moves: &[Move],
    num_rows: u32,
    interrupt: &Interrupt,
) -> Result<(Vec<u32>, Vec<i64>)> {
    // cursors[row]: first the number of items of the row, then where its next item goes.
    let mut cursors = vec![0_u32; num_rows as usize];
    for step in moves {
        for cursor in &mut cursors[step.rows()] {
            *cursor += step.per_row;
        }
    }
    let mut offsets = Vec::with_capacity(cursors.len() + 1);
    let mut next = 0;
    offsets.push(0);
    for cursor in &mut cursors {
        next += std::mem::replace(cursor, next);
        offsets.push(i64::from(next));
    }
    let mut items = vec![0; longest_first.len()];
    let mut source = longest_first;
    for step in moves {
        interrupt.check()?;
        let per_row = step.per_row as usize;
        for cursor in &mut cursors[step.rows()] {
            let (head, tail) = source.split_at(per_row);
            let to = *cursor as usize;
            items[to..to + per_row].copy_from_slice(head);
            *cursor += step.per_row;
            source = tail;
        }
    }
    Ok((items, offsets))
}

impl Move {
    fn rows(self) -> std::ops::Range<usize> {
        self.first_row as usize..(self.first_row + self.num_rows) as usize
    }
}

/// Neighbouring rows that have the same space left.
#[derive(Clone, Copy)]
struct Rows {
    first: u32,
    count: u32,
}

/// Rows that still have space, by how much: a list of ranges per space, and the set of spaces that have one.
struct OpenRows {
    spaces: SpaceSet,
    /// Per space the index of its first range in `ranges`, or [`NONE`].
    heads: Vec<u32>,
    ranges: Vec<(Rows, u32)>,
    /// A list of unused entries of `ranges`.
    unused: u32,
}

const NONE: u32 = u32::MAX;

impl OpenRows {
    fn new(row_units: u32) -> Self {
        let spaces = SpaceSet::new(row_units as usize);
        Self { spaces, heads: vec![NONE; row_units as usize + 1], ranges: vec![], unused: NONE }
    }

    /// Takes out a range of rows with the smallest space that is at least `units`.
    fn take_best_fit(&mut self, units: u32) -> Option<(u32, Rows)> {
        let space = self.spaces.at_least(units as usize)?;
        let head = self.heads[space];
        let (rows, next) = self.ranges[head as usize];
        self.ranges[head as usize].1 = std::mem::replace(&mut self.unused, head);
        self.heads[space] = next;
        if next == NONE {
            self.spaces.remove(space);
        }
        #[expect(clippy::cast_possible_truncation, reason = "a space is at most row_units, which is a u32")]
        Some((space as u32, rows))
    }

    fn put(&mut self, space: u32, rows: Rows) {
        if space == 0 || rows.count == 0 {
            return;
        }
        let head = self.heads[space as usize];
        match self.ranges.get_mut(head as usize) {
            Some((last, _)) if last.first + last.count == rows.first => {
                last.count += rows.count;
                return;
            }
            Some(_) => {}
            None => self.spaces.insert(space as usize),
        }
        let entry = (rows, head);
        self.heads[space as usize] = if self.unused == NONE {
            self.ranges.push(entry);
            #[expect(clippy::cast_possible_truncation, reason = "there are at most as many ranges as rows")]
            let pushed = (self.ranges.len() - 1) as u32;
            pushed
        } else {
            let reused = self.unused;
            self.unused = std::mem::replace(&mut self.ranges[reused as usize], entry).1;
            reused
        };
    }
}
