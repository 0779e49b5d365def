//! Repetition against counting with sets.

use std::collections::HashSet;

use dasd_lite_core::repeat::{MIN_REPEATED_BYTES, Repetition, repeated_ngrams, text_repetition};
use dasd_lite_core::segment::sentence_ends;
use dasd_lite_core::{Interrupt, Ragged};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

fn find(ids: &[u32], n: usize) -> Repetition {
    let offsets = [0, i64::try_from(ids.len()).unwrap()];
    repeated_ngrams(Ragged::new("offsets", ids, &offsets).unwrap(), n, &QUIET).unwrap()[0]
}

fn reference(ids: &[u32], n: usize) -> Repetition {
    let mut seen = HashSet::new();
    let num_repeated = ids.windows(n).filter(|gram| !seen.insert(*gram)).count();
    let mut longest_stretch = 0;
    for period in 1..=ids.len() / 3 {
        let mut equal = 0;
        for at in period..ids.len() {
            equal = if ids[at] == ids[at - period] { equal + 1 } else { 0 };
            if equal >= 2 * period && equal + period >= 3 * n {
                longest_stretch = longest_stretch.max(equal + period);
            }
        }
    }
    let [num_repeated, longest_stretch] = [num_repeated, longest_stretch].map(|number| i64::try_from(number).unwrap());
    Repetition { num_repeated, longest_stretch }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn same_as_sets(ids in (1..5_u32).prop_flat_map(|ids| prop::collection::vec(0..ids, 0..120)), n in 1..8_usize) {
        prop_assert_eq!(find(&ids, n), reference(&ids, n));
    }

    #[test]
    fn a_copied_span_is_found(
        ids in prop::collection::vec(any::<u32>(), 20..300),
        (from, to) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        n in 1..30_usize,
    ) {
        let (from, to) = (from.index(ids.len()), to.index(ids.len()));
        let mut ids = ids;
        ids.extend_from_within(from.min(to)..from.max(to));
        prop_assert_eq!(find(&ids, n), reference(&ids, n));
    }

    #[test]
    fn copies_back_to_back_are_found(
        (unit, before, after) in prop::collection::vec(0..3_u32, 1..20).prop_flat_map(|unit| {
            let ids = || prop::collection::vec(0..3_u32, 0..40);
            (Just(unit), ids(), ids())
        }),
        length in 0..150_usize,
        n in 1..9_usize,
    ) {
        let ids: Vec<u32> = before.into_iter().chain(unit.into_iter().cycle().take(length)).chain(after).collect();
        prop_assert_eq!(find(&ids, n), reference(&ids, n));
    }

    #[test]
    fn lines_and_sentences(pieces in prop::collection::vec(
        prop::sample::select(vec!["One long sentence. ", "Short. ", "Another sentence! ", "\n", "中文的一个句子。", " "]), 0..30,
    )) {
        let text = pieces.concat();
        let offsets = [0, i64::try_from(text.len()).unwrap()];
        let (ends, end_offsets) =
            sentence_ends(Ragged::new("offsets", text.as_bytes(), &offsets).unwrap(), &QUIET).unwrap();
        let count = |units: Vec<&str>| {
            let mut seen = HashSet::new();
            let units = units.into_iter().map(str::trim).filter(|unit| unit.len() > MIN_REPEATED_BYTES);
            units.filter(|unit| !seen.insert(*unit)).map(str::len).sum::<usize>()
        };
        let starts = [0].into_iter().chain(ends.iter().map(|&end| usize::try_from(end).unwrap())).collect::<Vec<_>>();
        let sentences = count(starts.windows(2).map(|span| &text[span[0]..span[1]]).collect());
        let lines = count(text.split('\n').collect());
        let repetition = text_repetition(
            Ragged::new("offsets", text.as_bytes(), &offsets).unwrap(),
            Ragged::new("end_offsets", &ends, &end_offsets).unwrap(),
            &QUIET,
        ).unwrap()[0];
        #[expect(clippy::cast_precision_loss)]
        let bytes = |share: f64| share * text.len() as f64;
        #[expect(clippy::cast_precision_loss)]
        let close = |share: f64, expected: usize| (bytes(share) - expected as f64).abs() < 1e-6;
        prop_assert!(close(repetition.lines, lines) && close(repetition.sentences, sentences));
    }
}

#[test]
fn long_and_regular_sequences_take_no_square_time() {
    // All equal, periodic, and the Thue-Morse word, on which polynomial hashes modulo 2^64 collide.
    let length = 200_000_u32;
    assert_eq!(find(&vec![7; length as usize], 20), Repetition { num_repeated: 199_980, longest_stretch: 200_000 });
    let periodic: Vec<u32> = (0..length).map(|id| id % 1000).collect();
    assert_eq!(find(&periodic, 20), Repetition { num_repeated: 198_981, longest_stretch: 200_000 });
    let thue_morse: Vec<u32> = (0..1 << 16).map(|id: u32| id.count_ones() % 2).collect();
    assert_eq!(find(&thue_morse, 3).longest_stretch, 0, "it holds nothing three times in a row");
    assert!(find(&thue_morse, 20).num_repeated > 1 << 15);
    let different: Vec<u32> = (0..length).collect();
    assert_eq!(find(&different, 20), Repetition::default());
}

#[test]
fn a_stretch_is_what_comes_three_times_in_a_row() {
    let unit: Vec<u32> = (100..2100).collect();
    let stretch = |copies: usize, extra: usize| {
        let text = unit.repeat(copies).into_iter().chain(unit[..extra].iter().copied());
        find(&(0..50).chain(text).chain(50..99).collect::<Vec<u32>>(), 20).longest_stretch
    };
    assert_eq!([stretch(2, 0), stretch(2, 1999), stretch(3, 0), stretch(3, 7)], [0, 0, 6000, 6007]);
    // Nine ids four hundred times in a long answer: as long as they are, however long the rest is.
    let rest: Vec<u32> = (1000..15_330).collect();
    let looped = (0..3600).map(|at| at % 9);
    assert_eq!(find(&rest.iter().copied().chain(looped).collect::<Vec<u32>>(), 20).longest_stretch, 3600);
}

#[test]
fn responses_are_apart() {
    let repetition =
        repeated_ngrams(Ragged::new("offsets", &[1_i32, 2, 1, 2, 1, 2, 1, 2], &[0, 2, 2, 8]).unwrap(), 2, &QUIET);
    let second = Repetition { num_repeated: 3, longest_stretch: 6 };
    assert_eq!(repetition.unwrap(), [Repetition::default(), Repetition::default(), second]);
}

#[test]
fn errors_name_response_and_value() {
    let message = |ends: &[i64]| {
        let texts = Ragged::new("offsets", b"one two", &[0, 3, 7]).unwrap();
        let end_offsets = [0, 1, i64::try_from(ends.len()).unwrap()];
        text_repetition(texts, Ragged::new("end_offsets", ends, &end_offsets).unwrap(), &QUIET).unwrap_err().to_string()
    };
    assert_eq!(message(&[3, 5]), "response 1: the last sentence ends at byte 5, the text has 4 bytes");
    assert_eq!(message(&[3, 2, 2]), "response 1: sentence end 1 is 2, after 2; ends strictly increase from 0");
    assert_eq!(message(&[3, 2]), "response 1: the last sentence ends at byte 2, the text has 4 bytes");
    let error = repeated_ngrams(Ragged::new("offsets", &[1_i32], &[0, 1]).unwrap(), 0, &QUIET).unwrap_err();
    assert_eq!(error.to_string(), "n is 0; it must be at least 1");
}
