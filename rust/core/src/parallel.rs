//! Work over the rows of a column on the threads of the caller's rayon pool. The number of threads does not change the
//! result: rows are cut into ranges by their sizes alone, results are in the order of the ranges, and of several errors
//! the one of the first row is returned. A caller outside of any pool does the work itself: after a fork, the threads
//! of rayon's global pool would be missing.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::interrupt::Interrupt;

/// The fewest elements of a range: fewer are not worth a second thread.
pub(crate) const GRAIN: usize = 1 << 16;

/// Cuts the rows that `offsets` describe into ranges of at least `grain` elements each, except for the last.
pub(crate) fn cut(offsets: &[i64], grain: usize) -> Vec<Range<usize>> {
    let num_rows = offsets.len() - 1;
    let grain = i64::try_from(grain).unwrap_or(i64::MAX);
    let mut ranges = vec![];
    let mut first = 0;
    while first < num_rows {
        let goal = offsets[first].saturating_add(grain);
        let end = first + 1 + offsets[first + 1..num_rows].partition_point(|&offset| offset < goal);
        ranges.push(first..end);
        first = end;
    }
    ranges
}

/// Cuts a slice into one part per range; `len` returns how many elements a range has.
pub(crate) fn split<'v, T>(
    mut values: &'v mut [T],
    ranges: &[Range<usize>],
    len: impl Fn(&Range<usize>) -> usize,
) -> Vec<&'v mut [T]> {
    let take = |range| values.split_off_mut(..len(range)).expect("the ranges have as many elements as the slice");
    ranges.iter().map(take).collect()
}

/// Takes the next `len` elements of a slice that has as many.
#[expect(clippy::mut_mut, reason = "the slice itself moves on")]
pub(crate) fn take<'v, T>(values: &mut &'v mut [T], len: usize) -> &'v mut [T] {
    values.split_off_mut(..len).expect("as wide as its rows")
}

/// Calls `work` for every item, on several threads if there are several items; checks the flag before each.
///
/// # Errors
/// The error of the first item that has one; [`crate::Error::Interrupted`].
pub(crate) fn try_map<I: Send, T: Send>(
    items: Vec<I>,
    interrupt: &Interrupt,
    work: impl Fn(I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let work = |item| {
        interrupt.check()?;
        work(item)
    };
    if items.len() < 2 || rayon::current_thread_index().is_none() {
        return items.into_iter().map(work).collect();
    }
    let results: Vec<Result<T>> = items.into_par_iter().map(work).collect();
    results.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Error;

    proptest! {
        #[test]
        fn ranges_cover_all_rows_once(lengths in prop::collection::vec(0..50_i64, 0..40), grain in 1..200_usize) {
            let mut offsets = vec![0];
            offsets.extend(lengths.iter().scan(0, |sum, length| { *sum += length; Some(*sum) }));
            let ranges = cut(&offsets, grain);
            prop_assert!(ranges.iter().flat_map(Clone::clone).eq(0..lengths.len()));
            for range in ranges.iter().rev().skip(1) {
                prop_assert!(offsets[range.end] - offsets[range.start] >= i64::try_from(grain).unwrap());
            }
        }

        #[test]
        fn the_first_error_is_returned(bad in prop::collection::btree_set(0..100_usize, 0..5)) {
            let result = try_map((0..100).collect(), &Interrupt::new(), |item| {
                if bad.contains(&item) { Err(Error::OffsetsEnd { name: "x", index: item, value: 0, len: 0 }) } else { Ok(2 * item) }
            });
            match bad.first() {
                Some(&index) => prop_assert_eq!(result, Err(Error::OffsetsEnd { name: "x", index, value: 0, len: 0 })),
                None => prop_assert!(result.unwrap().into_iter().eq((0..100).map(|item| 2 * item))),
            }
        }
    }

    #[test]
    fn parts_follow_each_other() {
        let mut values = [1, 2, 3, 4, 5];
        let parts = split(&mut values, &[0..2, 2..2, 2..5], ExactSizeIterator::len);
        assert_eq!(parts, [&[1, 2][..], &[], &[3, 4, 5]]);
    }

    #[test]
    fn a_raised_flag_stops_it() {
        let interrupt = Interrupt::new();
        interrupt.raise();
        assert_eq!(try_map(vec![1, 2], &interrupt, Ok), Err(Error::Interrupted));
    }
}
