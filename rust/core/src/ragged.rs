//! Flat values and 64-bit offsets: the one form in which columns of rows of unequal length come in.
//!
//! Row `i` is `values[offsets[i]..offsets[i + 1]]`. Every [`Ragged`] is valid: its offsets start at 0, never decrease,
//! and end at the number of values.

use std::ops::Index;

use crate::error::{Error, Result};

/// A borrowed column of rows of unequal length.
#[derive(Debug)]
pub struct Ragged<'a, T> {
    values: &'a [T],
    offsets: &'a [i64],
}

impl<T> Clone for Ragged<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ragged<'_, T> {}

impl<'a, T> Ragged<'a, T> {
    /// Checks the offsets in one pass; errors call them `name`.
    ///
    /// # Errors
    /// Offsets that are empty, do not start at 0, decrease, or do not end at the number of values.
    pub fn new(name: &'static str, values: &'a [T], offsets: &'a [i64]) -> Result<Self> {
        let &first = offsets.first().ok_or(Error::OffsetsEmpty { name })?;
        if first != 0 {
            return Err(Error::OffsetsStart { name, value: first });
        }
        if let Some(at) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
            let (before, value) = (offsets[at], offsets[at + 1]);
            return Err(Error::OffsetsDecrease { name, index: at + 1, value, before });
        }
        let (index, len) = (offsets.len() - 1, values.len());
        let value = offsets[index];
        if usize::try_from(value) != Ok(len) {
            return Err(Error::OffsetsEnd { name, index, value, len });
        }
        Ok(Self { values, offsets })
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values of all rows.
    #[must_use]
    pub fn values(&self) -> &'a [T] {
        self.values
    }

    /// Where the rows begin and end.
    #[must_use]
    pub fn offsets(&self) -> &'a [i64] {
        self.offsets
    }

    /// The row, or `None` after the last.
    #[must_use]
    pub fn get(&self, row: usize) -> Option<&'a [T]> {
        let (&start, &end) = (self.offsets.get(row)?, self.offsets.get(row + 1)?);
        self.values.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    /// The rows in order.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [T]> + use<'a, T> {
        let rows = *self;
        (0..self.len()).map(move |row| rows.row(row))
    }

    fn row(&self, row: usize) -> &'a [T] {
        self.get(row).unwrap_or_else(|| panic!("row {row} of {}", self.len()))
    }
}

impl<T> Index<usize> for Ragged<'_, T> {
    type Output = [T];

    /// The row.
    ///
    /// # Panics
    /// After the last row, as a slice does.
    fn index(&self, row: usize) -> &[T] {
        self.row(row)
    }
}

/// A number of elements as an offset.
pub(crate) fn to_offset(len: usize) -> i64 {
    i64::try_from(len).expect("a slice has fewer than 2^63 elements")
}

/// An offset of a valid [`Ragged`] as an index.
pub(crate) fn to_index(offset: i64) -> usize {
    usize::try_from(offset).expect("offsets start at 0 and never decrease")
}
