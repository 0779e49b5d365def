//! Histogram and quantiles against sorting.

use dasd_lite_core::Interrupt;
use dasd_lite_core::distribution::{logprob_histogram, quantiles};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

proptest! {
    #[test]
    fn histogram_counts_all(logprobs in prop::collection::vec(-30.0..=0.0_f32, 0..100), num_bins in 1..50_u32, low in -20.0..-0.1_f64) {
        let counts = logprob_histogram(&logprobs, num_bins, low, &QUIET).unwrap();
        prop_assert_eq!(counts.len(), num_bins as usize);
        prop_assert_eq!(usize::try_from(counts.iter().sum::<i64>()).unwrap(), logprobs.len());
        let below = logprobs.iter().filter(|&&logprob| f64::from(logprob) < low).count();
        prop_assert!(usize::try_from(counts[0]).unwrap() >= below);
    }

    #[test]
    fn quantiles_of_the_sorted(
        values in prop::collection::vec(prop_oneof![any::<f32>(), -1.0..1.0_f32], 1..200),
        qs in prop::collection::vec(0.0..=1.0_f64, 0..5),
    ) {
        let mut sorted: Vec<f32> = values.into_iter().filter(|value| value.is_finite()).collect();
        prop_assume!(!sorted.is_empty());
        let found = quantiles(&sorted, &qs, &QUIET).unwrap();
        sorted.sort_unstable_by(f32::total_cmp);
        for (q, found) in qs.iter().zip(found) {
            #[expect(clippy::cast_precision_loss)]
            let position = q * (sorted.len() - 1) as f64;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
            let expected = f64::from(below) + (f64::from(above) - f64::from(below)) * position.fract();
            prop_assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1e-300), "{found} {expected}");
        }
    }
}

#[test]
fn errors_name_index_and_value() {
    let error = logprob_histogram(&[-1.0, f32::NAN], 5, -10.0, &QUIET).unwrap_err();
    assert_eq!(error.to_string(), "logprobs[1] is NaN; it must be a number of at most 0");
    let error = quantiles(&[0.0, f32::NAN], &[0.5], &QUIET).unwrap_err();
    assert_eq!(error.to_string(), "values[1] is NaN; it must be a number");
    let error = quantiles(&[0.0], &[0.5, 2.0], &QUIET).unwrap_err();
    assert_eq!(error.to_string(), "q[1] is 2; it must be from 0 to 1");
}

#[test]
fn quantiles_with_minus_infinity() {
    let values = [f32::NEG_INFINITY, -1.0, 0.0];
    assert_eq!(
        quantiles(&values, &[0.0, 0.25, 0.5, 0.75], &QUIET).unwrap(),
        [f64::NEG_INFINITY, f64::NEG_INFINITY, -1.0, -0.5]
    );
}
