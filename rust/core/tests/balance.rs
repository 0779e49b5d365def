//! Orders of rows: every row once, whole optimizer steps, and ranks that work equally long.

use dasd_lite_core::balance::{Options, Order, balance};
use dasd_lite_core::{Error, Interrupt, Ragged};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

const OPTIONS: Options = Options { num_ranks: 2, micro_steps: 1, window: 32, linear: 1.0, quadratic: 0.0, seed: 0 };

/// One sequence a row.
fn run(lengths: &[i64], options: &Options) -> Order {
    let items: Vec<u32> = (0..u32::try_from(lengths.len()).unwrap()).collect();
    let offsets: Vec<i64> = (0..=i64::try_from(lengths.len()).unwrap()).collect();
    balance(Ragged::new("offsets", &items, &offsets).unwrap(), lengths, options, &QUIET).unwrap()
}

proptest! {
    #[test]
    fn every_row_once(
        lengths in prop::collection::vec(0..1000_i64, 0..200),
        (num_ranks, micro_steps, window, seed) in (1..9_usize, 1..5_usize, 1..40_usize, any::<u64>()),
    ) {
        let options = Options { num_ranks, micro_steps, window, seed, ..OPTIONS };
        let order = run(&lengths, &options);
        let mut seen = [order.rows.clone(), order.left_over.clone()].concat();
        seen.sort_unstable();
        prop_assert!(seen.into_iter().eq(0..u32::try_from(lengths.len()).unwrap()));
        prop_assert_eq!(order.rows.len() % (num_ranks * micro_steps), 0);
        prop_assert!(order.left_over.len() < num_ranks * micro_steps && order.left_over.is_sorted());
        prop_assert_eq!(run(&lengths, &options), order);
    }
}

#[test]
fn ranks_work_equally_long_and_the_order_stays_random() {
    let lengths: Vec<i64> = (0..10_000).map(|row| 16_384 + row * 48_271 % 49_152).collect();
    let options = Options { num_ranks: 8, micro_steps: 2, window: 64, linear: 24_576.0, quadratic: 1.0, seed: 7 };
    let order = run(&lengths, &options);
    #[expect(clippy::cast_precision_loss)]
    let cost = |&row: &u32| {
        let length = lengths[row as usize] as f64;
        length * (24_576.0 + length)
    };
    let steps: Vec<Vec<f64>> = order.rows.chunks(8).map(|step| step.iter().map(cost).collect()).collect();
    let idle = |step: &Vec<f64>| 8.0 * step.iter().copied().fold(0.0, f64::max) / step.iter().sum::<f64>();
    #[expect(clippy::cast_precision_loss)]
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let ratio = mean(&steps.iter().map(idle).collect::<Vec<f64>>());
    assert!((1.0..1.02).contains(&ratio), "{ratio}");
    // Each tenth of training costs about the same, and so does each rank.
    let whole = mean(&steps.concat());
    for tenth in steps.chunks(steps.len() / 10) {
        if tenth.len() == steps.len() / 10 {
            assert!((mean(&tenth.concat()) / whole - 1.0).abs() < 0.1);
        }
    }
    for rank in 0..8 {
        let of_rank: Vec<f64> = steps.iter().map(|step| step[rank]).collect();
        assert!((mean(&of_rank) / whole - 1.0).abs() < 0.01);
    }
    assert_ne!(run(&lengths, &Options { seed: 8, ..options }).rows, order.rows);
}

#[test]
fn the_same_bytes_on_every_platform() {
    let order = run(&[5, 3, 9, 1, 7], &OPTIONS);
    assert_eq!((order.rows, order.left_over), (vec![2, 0, 1, 3], vec![4]));
}

#[test]
fn errors_name_index_and_value() {
    let items = [0, 3];
    let rows = Ragged::new("offsets", &items, &[0, 2]).unwrap();
    let message = |lengths: &[i64], options: &Options| balance(rows, lengths, options, &QUIET).unwrap_err().to_string();
    assert_eq!(message(&[1, 1], &OPTIONS), "plan.items[1] is 3; it must be from 0 and below 2");
    assert_eq!(message(&[1, 1, 1, -4], &OPTIONS), "lengths[3] is -4; a length is at least 0");
    assert_eq!(message(&[], &Options { num_ranks: 0, ..OPTIONS }), "num_ranks is 0; it must be at least 1");
    assert_eq!(message(&[], &Options { micro_steps: 0, ..OPTIONS }), "micro_steps is 0; it must be at least 1");
    assert_eq!(message(&[], &Options { window: 0, ..OPTIONS }), "window is 0; it must be at least 1");
    let nan = Options { linear: f64::NAN, ..OPTIONS };
    assert_eq!(message(&[], &nan), "the linear cost is NaN; it must be from 0 to 1e15");
    let interrupt = Interrupt::new();
    interrupt.raise();
    assert_eq!(balance(rows, &[1_i64; 4], &OPTIONS, &interrupt), Err(Error::Interrupted));
}
