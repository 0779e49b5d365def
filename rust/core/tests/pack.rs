//! The packer against a plain best-fit-decreasing, and on lengths that are hard for packers.

use dasd_lite_core::pack::{MAX_SEQ_LEN, Method, Options, Overlong, Plan, pack};
use dasd_lite_core::{Error, Interrupt};
use proptest::prelude::*;

const BEST_FIT: Options = Options { seq_len: 100, alignment: 1, method: Method::BestFit, overlong: Overlong::Error };

fn run(lengths: &[i64], options: Options) -> Plan {
    pack(lengths, &options, &Interrupt::new()).unwrap()
}

/// Best-fit-decreasing item by item: the number of rows.
fn reference_rows(lengths: &[i64], seq_len: i64) -> usize {
    let mut longest_first = lengths.to_vec();
    longest_first.sort_unstable_by(|a, b| b.cmp(a));
    let mut spaces: Vec<i64> = vec![];
    for length in longest_first {
        match spaces.iter_mut().filter(|space| **space >= length).min() {
            Some(space) => *space -= length,
            None => spaces.push(seq_len - length),
        }
    }
    spaces.len()
}

fn check(lengths: &[i64], options: Options) -> Plan {
    let plan = run(lengths, options);
    let mut seen = [plan.items.clone(), plan.dropped.clone()].concat();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..u32::try_from(lengths.len()).unwrap()), "every index exactly once");
    assert!(plan.dropped.iter().all(|&item| lengths[item as usize] > i64::from(options.seq_len)));
    assert_eq!((plan.offsets[0], plan.offsets[plan.offsets.len() - 1]), (0, i64::try_from(plan.items.len()).unwrap()));
    let alignment = i64::from(options.alignment);
    for row in plan.offsets.windows(2) {
        let row = &plan.items[usize::try_from(row[0]).unwrap()..usize::try_from(row[1]).unwrap()];
        let used: i64 = row.iter().map(|&item| (lengths[item as usize] + alignment - 1) / alignment * alignment).sum();
        assert!(!row.is_empty() && used <= i64::from(options.seq_len));
    }
    assert_eq!(plan, run(lengths, options), "same input, same bytes");
    plan
}

proptest! {
    #[test]
    fn as_many_rows_as_the_reference(
        (seq_len, lengths) in (1..300_u32).prop_flat_map(|seq_len| {
            (Just(seq_len), prop::collection::vec(1..=i64::from(seq_len), 0..200))
        }),
    ) {
        let plan = check(&lengths, Options { seq_len, ..BEST_FIT });
        prop_assert_eq!(plan.offsets.len() - 1, reference_rows(&lengths, i64::from(seq_len)));
        prop_assert_eq!(i64::try_from(plan.num_tokens).unwrap(), lengths.iter().sum::<i64>());
        let tight = check(&lengths, Options { seq_len, method: Method::Tight, ..BEST_FIT });
        prop_assert!(tight.offsets.len() <= plan.offsets.len());
    }

    #[test]
    fn alignment_and_dropping(
        (units, alignment) in (1..40_u32, 1..9_u32),
        lengths in prop::collection::vec(1..400_i64, 0..100),
        method in prop::sample::select(vec![Method::InOrder, Method::BestFit, Method::Tight]),
    ) {
        let options = Options { seq_len: units * alignment, alignment, method, overlong: Overlong::Drop };
        let plan = check(&lengths, options);
        if method == Method::InOrder {
            prop_assert!(plan.items.is_sorted());
        }
    }

    #[test]
    fn all_types_of_lengths_agree(lengths in prop::collection::vec(1..=100_u32, 0..50)) {
        let wide: Vec<i64> = lengths.iter().map(|&length| length.into()).collect();
        let signed: Vec<i32> = lengths.iter().map(|&length| i32::try_from(length).unwrap()).collect();
        let plan = run(&wide, BEST_FIT);
        prop_assert_eq!(&pack(&lengths, &BEST_FIT, &Interrupt::new()).unwrap(), &plan);
        prop_assert_eq!(&pack(&signed, &BEST_FIT, &Interrupt::new()).unwrap(), &plan);
    }
}

#[test]
fn hard_lengths() {
    for seq_len in [1, 2, 63, 64, 65, 4095, 4096, 4097, 65_536] {
        let full = i64::from(seq_len);
        let options = Options { seq_len, ..BEST_FIT };
        for length in [1, full / 3 + 1, full / 2 + 1, full / 2, full - 1, full] {
            if length >= 1 {
                for count in [0, 1, 7, 500] {
                    let plan = check(&vec![length; count], options);
                    let per_row = usize::try_from(full / length).unwrap();
                    for alignment in [2, 8, 64].into_iter().filter(|&alignment| seq_len % alignment == 0) {
                        let padded = (length + i64::from(alignment) - 1) / i64::from(alignment) * i64::from(alignment);
                        let per_row = usize::try_from(full / padded).unwrap();
                        for method in [Method::BestFit, Method::Tight] {
                            let plan = check(&vec![length; count], Options { alignment, method, ..options });
                            assert_eq!(plan.offsets.len() - 1, count.div_ceil(per_row));
                        }
                    }
                    assert_eq!(plan.offsets.len() - 1, count.div_ceil(per_row));
                    let tight = check(&vec![length; count], Options { method: Method::Tight, ..options });
                    assert_eq!(tight.offsets, plan.offsets);
                }
            }
        }
        let mixed: Vec<i64> = (0..400).map(|index| index * 7919 % full + 1).collect();
        let rows = check(&mixed, options).offsets.len() - 1;
        assert_eq!(rows, reference_rows(&mixed, full));
        assert!(check(&mixed, Options { method: Method::Tight, ..options }).offsets.len() - 1 <= rows);
    }
}

#[test]
fn tight_needs_fewer_rows_where_pairs_and_triples_matter() {
    // Spread over seq_len / 7 to seq_len / 2, the law that decreasing-fit packers do worst on.
    let seq_len = 65_536_i64;
    let span = seq_len / 2 - seq_len / 7 + 1;
    let lengths: Vec<i64> = (0..50_000).map(|index| seq_len / 7 + index * 48_271 % span).collect();
    let options = Options { seq_len: 65_536, ..BEST_FIT };
    let best_fit = check(&lengths, options).offsets.len() - 1;
    let tight = check(&lengths, Options { method: Method::Tight, ..options }).offsets.len() - 1;
    assert!(100 * tight <= 97 * best_fit, "{tight} rows instead of {best_fit}");
}

#[test]
fn in_order_opens_a_row_when_the_next_does_not_fit() {
    let plan = run(&[60, 40, 1, 99, 100, 50], Options { method: Method::InOrder, ..BEST_FIT });
    assert_eq!((plan.items, plan.offsets), (vec![0, 1, 2, 3, 4, 5], vec![0, 2, 4, 5, 6]));
    let plan = run(&[], Options { method: Method::InOrder, ..BEST_FIT });
    assert_eq!((plan.items, plan.offsets), (vec![], vec![0]));
}

#[test]
fn errors_name_index_and_value() {
    let message = |lengths: &[i64], options| pack(lengths, &options, &Interrupt::new()).unwrap_err().to_string();
    assert_eq!(message(&[5, 0], BEST_FIT), "lengths[1] is 0; a sequence has at least 1 token");
    assert_eq!(message(&[5, 101], BEST_FIT), "lengths[1] is 101, more than seq_len 100");
    let dropping = Options { overlong: Overlong::Drop, ..BEST_FIT };
    assert_eq!(message(&[101, -3], dropping), "lengths[1] is -3; a sequence has at least 1 token");
    assert_eq!(message(&[1 << 40], BEST_FIT), "lengths[0] is 1099511627776, more than seq_len 100");
    assert_eq!(message(&[], Options { seq_len: 0, ..BEST_FIT }), "seq_len is 0; it must be from 1 to 16777216");
    let huge = Options { seq_len: MAX_SEQ_LEN + 1, ..BEST_FIT };
    assert_eq!(message(&[], huge), "seq_len is 16777217; it must be from 1 to 16777216");
    let odd = Options { alignment: 3, ..BEST_FIT };
    assert_eq!(message(&[], odd), "alignment is 3; it must be at least 1 and a divisor of seq_len");
}

#[test]
fn an_interrupt_stops_it() {
    let interrupt = Interrupt::new();
    interrupt.raise();
    assert_eq!(pack(&[1_i64], &BEST_FIT, &interrupt), Err(Error::Interrupted));
}
