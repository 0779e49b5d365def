//! Global best-fit-decreasing on the histogram of lengths: the longest sequence first, each into the row whose
//! remaining space is the smallest that suffices.
//!
//! It takes O(distinct lengths + rows), because it never looks at a single row: rows with the same space left form
//! *ranges*, and sequences of equal length are placed into a whole range at once. (If `space` is the smallest that
//! suffices, the row that got one sequence is the best fit for the next as well, so each row of the range takes
//! `space / length` of them before its neighbor is touched.) These moves are recorded, and a last pass writes the items.

use crate::error::Result;
use crate::interrupt::{INTERVAL, Interrupt};

/// The next `num_rows * per_row` sequences, longest first, go into these rows, `per_row` into each.
#[derive(Clone, Copy)]
pub(crate) struct Move {
    first_row: u32,
    num_rows: u32,
    per_row: u32,
}

/// Best-fit-decreasing on the histogram alone: the moves in order, and the number of rows.
pub(crate) fn moves(counts: &[u32], row_units: u32, interrupt: &Interrupt) -> Result<(Vec<Move>, u32)> {
    let mut open = OpenRows::new(row_units);
    let mut moves = vec![];
    let mut num_rows = 0;
    for units in (1..=row_units).rev() {
        interrupt.every(units as usize)?;
        open.reach(units);
        let mut left = counts[units as usize];
        while left > 0 {
            let Some(best) = open.tightest.last_mut() else {
                let rows = Rows { space: row_units, first: num_rows, count: left.div_ceil(row_units / units) };
                num_rows += rows.count;
                open.tightest.push(rows);
                continue;
            };
            // As many rows of the range as needed, each with as many as fit; the last few share one row.
            let per_row = if best.space < 2 * units { 1 } else { left.min(best.space / units) };
            let count = best.count.min(if per_row == 1 { left } else { left / per_row });
            let filled = Rows { space: best.space - per_row * units, first: best.first, count };
            moves.push(Move { first_row: best.first, num_rows: count, per_row });
            left -= count * per_row;
            best.first += count;
            best.count -= count;
            if best.count == 0 {
                open.tightest.pop();
            }
            open.put(filled, units);
        }
    }
    Ok((moves, num_rows))
}

/// Carries out the moves: items of all rows, and where each row begins.
pub(crate) fn write_items(
    longest_first: &[u32],
    moves: &[Move],
    num_rows: u32,
    interrupt: &Interrupt,
) -> Result<(Vec<u32>, Vec<i64>)> {
    // cursors[row]: first how many more items the row has than the one before it, then where its next item goes.
    let mut cursors = vec![0_u32; num_rows as usize + 1];
    for step in moves {
        let rows = step.rows();
        cursors[rows.start] = cursors[rows.start].wrapping_add(step.per_row);
        cursors[rows.end] = cursors[rows.end].wrapping_sub(step.per_row);
    }
    cursors.pop();
    let mut offsets = Vec::with_capacity(cursors.len() + 1);
    let (mut size, mut next) = (0_u32, 0);
    offsets.push(0);
    for cursors in cursors.chunks_mut(INTERVAL) {
        interrupt.check()?;
        for cursor in cursors {
            size = size.wrapping_add(std::mem::replace(cursor, next));
            next += size;
            offsets.push(i64::from(next));
        }
    }
    let mut items = vec![0; longest_first.len()];
    let mut source = longest_first;
    for step in moves {
        let (taken, rest) = source.split_at((step.num_rows * step.per_row) as usize);
        source = rest;
        // One loop over items instead of two over rows and items: most moves have one or two items, and the processor
        // cannot predict how many.
        let (mut row, mut in_row) = (step.first_row as usize, 0);
        for taken in taken.chunks(INTERVAL) {
            interrupt.check()?;
            for &item in taken {
                let cursor = &mut cursors[row];
                items[*cursor as usize] = item;
                *cursor += 1;
                in_row += 1;
                let full = in_row == step.per_row;
                row += usize::from(full);
                in_row = if full { 0 } else { in_row };
            }
        }
    }
    Ok((items, offsets))
}

impl Move {
    fn rows(self) -> std::ops::Range<usize> {
        self.first_row as usize..(self.first_row + self.num_rows) as usize
    }
}

/// Neighboring rows that have the same space left.
#[derive(Clone, Copy)]
struct Rows {
    space: u32,
    first: u32,
    count: u32,
}

/// Rows that still have space. Since lengths only decrease, those with enough space for the current one form a stack.
struct OpenRows {
    /// With enough space for the current length, the tightest last.
    tightest: Vec<Rows>,
    /// Per smaller space the index of its first range in `ranges`, or [`NONE`].
    heads: Vec<u32>,
    /// Lists of ranges: each with the index of the next one.
    ranges: Vec<(Rows, u32)>,
    /// The list of unused entries of `ranges`.
    unused: u32,
}

const NONE: u32 = u32::MAX;

impl OpenRows {
    fn new(row_units: u32) -> Self {
        Self { tightest: vec![], heads: vec![NONE; row_units as usize + 1], ranges: vec![], unused: NONE }
    }

    /// Moves down to the next length: rows with exactly this space now suffice, and are the tightest.
    fn reach(&mut self, units: u32) {
        let mut head = self.heads[units as usize];
        while head != NONE {
            let (rows, next) = &mut self.ranges[head as usize];
            self.tightest.push(*rows);
            let next = std::mem::replace(next, self.unused);
            self.unused = std::mem::replace(&mut head, next);
        }
    }

    /// Puts back rows whose space is less than that of all of `tightest`.
    fn put(&mut self, rows: Rows, units: u32) {
        if rows.space >= units {
            self.tightest.push(rows);
        } else if rows.space > 0 {
            let head = &mut self.heads[rows.space as usize];
            let entry = (rows, *head);
            if let Some(free) = self.ranges.get_mut(self.unused as usize) {
                *head = self.unused;
                self.unused = std::mem::replace(free, entry).1;
            } else {
                #[expect(clippy::cast_possible_truncation, reason = "there are at most as many ranges as rows")]
                let pushed = self.ranges.len() as u32;
                *head = pushed;
                self.ranges.push(entry);
            }
        }
    }
}
