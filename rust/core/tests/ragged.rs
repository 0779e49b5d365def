//! The container: what is valid is read back, what is not names index and values.

use dasd_lite_core::{Error, Ragged};
use proptest::prelude::*;

proptest! {
    #[test]
    fn rows_come_back(rows in prop::collection::vec(prop::collection::vec(any::<i32>(), 0..6), 0..8)) {
        let values = rows.concat();
        let mut offsets = vec![0];
        offsets.extend(rows.iter().scan(0, |end, row| {
            *end += i64::try_from(row.len()).unwrap();
            Some(*end)
        }));
        let ragged = Ragged::new("offsets", &values, &offsets).unwrap();
        prop_assert_eq!(ragged.len(), rows.len());
        prop_assert_eq!(ragged.is_empty(), rows.is_empty());
        prop_assert!(ragged.iter().eq(rows.iter().map(Vec::as_slice)));
        prop_assert!((0..rows.len()).all(|row| ragged[row] == rows[row]));
        prop_assert_eq!(ragged.get(rows.len()), None);
    }

    #[test]
    fn any_offsets_are_accepted_or_refused_without_a_panic(
        offsets in prop::collection::vec(prop_oneof![-2..8_i64, any::<i64>()], 0..6),
        len in 0..8_usize,
    ) {
        let values = vec![0_u8; len];
        let valid = offsets.first() == Some(&0)
            && offsets.is_sorted()
            && offsets.last().copied() == i64::try_from(len).ok();
        let ragged = Ragged::new("offsets", &values, &offsets);
        prop_assert_eq!(ragged.is_ok(), valid);
        if let Ok(ragged) = ragged {
            prop_assert_eq!(ragged.iter().map(<[u8]>::len).sum::<usize>(), len);
        }
    }
}

#[test]
fn errors_name_index_and_values() {
    let message = |offsets: &[i64]| Ragged::new("offsets", &[0_u8; 5], offsets).unwrap_err().to_string();
    assert_eq!(message(&[]), "offsets is empty; offsets of n rows have n + 1 elements, the first 0");
    assert_eq!(message(&[1, 5]), "offsets[0] is 1; offsets start at 0");
    assert_eq!(message(&[0, 4, 3, 5]), "offsets[2] is 3, less than the 4 before it; offsets never decrease");
    assert_eq!(message(&[0, 4, 6]), "offsets[2] is 6, but there are 5 values; the last offset is their number");
    let error = Ragged::new("ends", &[0_u8; 5], &[0, -1, 5]).unwrap_err();
    assert_eq!(error, Error::OffsetsDecrease { name: "ends", index: 1, value: -1, before: 0 });
}
