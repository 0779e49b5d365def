//! Sentence statistics against plain loops, and what bad columns get.

use dasd_lite_core::stats::{class_counts, classify, logprob_histogram, quantiles, sentence_logprobs};
use dasd_lite_core::{Interrupt, Ragged};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

/// Tokens of one response, its sentence ends; both cover the same bytes.
#[derive(Debug, Clone)]
struct Response {
    logprobs: Vec<f32>,
    token_bytes: Vec<i32>,
    ends: Vec<i64>,
}

fn response() -> impl Strategy<Value = Response> {
    let token = (0..5_i32, prop_oneof![9 => -20.0..0.0_f32, 1 => Just(0.0), 1 => Just(f32::NEG_INFINITY)]);
    (prop::collection::vec(token, 0..30), prop::collection::vec(any::<bool>(), 150)).prop_map(|(tokens, cuts)| {
        let (token_bytes, logprobs): (Vec<i32>, Vec<f32>) = tokens.into_iter().unzip();
        let length = token_bytes.iter().sum::<i32>();
        let ends = (1..=length).filter(|&at| at == length || cuts[at.unsigned_abs() as usize]).map(i64::from).collect();
        Response { logprobs, token_bytes, ends }
    })
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<i64> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + i64::try_from(length).unwrap());
    }
    offsets
}

proptest! {
    #[test]
    fn means_are_those_of_the_tokens_that_begin_there(responses in prop::collection::vec(response(), 0..5)) {
        let logprobs: Vec<f32> = responses.iter().flat_map(|response| response.logprobs.clone()).collect();
        let token_bytes: Vec<i32> = responses.iter().flat_map(|response| response.token_bytes.clone()).collect();
        let ends: Vec<i64> = responses.iter().flat_map(|response| response.ends.clone()).collect();
        let token_offsets = offsets(responses.iter().map(|response| response.logprobs.len()));
        let end_offsets = offsets(responses.iter().map(|response| response.ends.len()));
        let rows = Ragged::new("token_offsets", &logprobs, &token_offsets).unwrap();
        let ends = Ragged::new("end_offsets", &ends, &end_offsets).unwrap();
        let (means, counts) = sentence_logprobs(rows, &token_bytes, ends, &QUIET).unwrap();

        let mut sentence = 0;
        for response in &responses {
            for (index, &end) in response.ends.iter().enumerate() {
                let start = if index == 0 { 0 } else { response.ends[index - 1] };
                let last = index + 1 == response.ends.len();
                let mut at = 0;
                let mut inside = vec![];
                for (&logprob, &bytes) in response.logprobs.iter().zip(&response.token_bytes) {
                    if start <= at && (at < end || last) {
                        inside.push(f64::from(logprob));
                    }
                    at += i64::from(bytes);
                }
                prop_assert_eq!(usize::try_from(counts[sentence]).unwrap(), inside.len());
                let mean = inside.iter().sum::<f64>() / f64::from(counts[sentence]);
                if inside.is_empty() {
                    prop_assert!(means[sentence].is_nan());
                } else {
                    #[expect(clippy::cast_possible_truncation)]
                    let mean = mean as f32;
                    prop_assert_eq!(means[sentence].to_bits(), mean.to_bits());
                }
                sentence += 1;
            }
        }
        prop_assert_eq!(means.len(), sentence);
        let narrow: Vec<u16> = token_bytes.iter().map(|&bytes| u16::try_from(bytes).unwrap()).collect();
        prop_assert_eq!(sentence_logprobs(rows, &narrow, ends, &QUIET).unwrap().1, counts);
    }

    #[test]
    fn classes_and_counts(
        pairs in prop::collection::vec((prop_oneof![9 => 0.0..=1.0_f32, 1 => Just(f32::NAN)], 0.0..=1.0_f32), 0..40),
        beta in 0.0..0.5_f64,
        cut in any::<prop::sample::Index>(),
    ) {
        let (teacher, student): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
        let classes = classify(&teacher, &student, beta, &QUIET).unwrap();
        for (&class, &(teacher, student)) in classes.iter().zip(&pairs) {
            let difference = f64::from(teacher) - f64::from(student);
            let expected = match class {
                -1 => difference.is_nan(),
                0 => difference.abs() <= beta,
                1 => difference > beta,
                2 => difference < -beta,
                _ => false,
            };
            prop_assert!(expected);
        }
        // Swapped models swap Teacher and Student.
        let swapped = classify(&student, &teacher, beta, &QUIET).unwrap();
        prop_assert!(classes.iter().zip(&swapped).all(|pair| matches!(pair, (-1, -1) | (0, 0) | (1, 2) | (2, 1))));

        let cut = cut.index(classes.len() + 1);
        let offsets = offsets([cut, classes.len() - cut].into_iter());
        let counts = class_counts(Ragged::new("offsets", &classes, &offsets).unwrap(), &QUIET).unwrap();
        for (row, classes) in [&classes[..cut], &classes[cut..]].into_iter().enumerate() {
            for (column, class) in [0, 1, 2].into_iter().enumerate() {
                let expected = classes.iter().filter(|&&found| found == class).count();
                prop_assert_eq!(usize::try_from(counts[3 * row + column]).unwrap(), expected);
            }
        }
    }

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

fn message(logprobs: &[f32], token_bytes: &[i32], token_offsets: &[i64], ends: &[i64], end_offsets: &[i64]) -> String {
    let logprobs = Ragged::new("token_offsets", logprobs, token_offsets).unwrap();
    let ends = Ragged::new("end_offsets", ends, end_offsets).unwrap();
    sentence_logprobs(logprobs, token_bytes, ends, &QUIET).unwrap_err().to_string()
}

#[test]
fn errors_name_response_index_and_value() {
    let two =
        |logprob, bytes, end| message(&[-1.0, -1.0, logprob], &[1, 2, bytes], &[0, 1, 3], &[1, 2, end], &[0, 1, 3]);
    let bad = |value| format!("response 1, token 1: log-probability {value}; it must be a number of at most 0");
    assert_eq!(two(f32::NAN, 1, 3), bad("NaN"));
    assert_eq!(two(f32::INFINITY, 1, 3), bad("inf"));
    assert_eq!(two(0.001, 1, 3), bad("0.001"));
    assert_eq!(two(-1.0, 5, 3), "response 1: its tokens have 7 bytes, its sentences 3; they must agree");
    assert_eq!(two(-1.0, -1, 3), "response 1, token 1: its length is -1 bytes; lengths are at least 0");
    assert_eq!(two(-1.0, 0, 2), "response 1: sentence end 1 is 2, after 2; ends strictly increase from 0");
    assert_eq!(
        message(&[-1.0], &[1, 2], &[0, 1], &[1], &[0, 1]),
        "logprobs has 1 elements and token_bytes 2; they must be equally many"
    );
    assert_eq!(
        message(&[-1.0], &[1], &[0, 1], &[1], &[0, 0, 1]),
        "token_offsets has 2 elements and end_offsets 3; they must be equally many"
    );
}

#[test]
fn errors_of_the_others() {
    let message = |classes: dasd_lite_core::Result<Vec<i8>>| classes.unwrap_err().to_string();
    assert_eq!(
        message(classify(&[0.5, 1.5], &[0.5, 0.5], 0.1, &QUIET)),
        "p_teacher[1] is 1.5; it must be a probability, or NaN without tokens"
    );
    assert_eq!(message(classify(&[0.5], &[0.5], -0.5, &QUIET)), "beta is -0.5; it must be a number of at least 0");
    assert_eq!(
        message(classify(&[0.5], &[], 0.1, &QUIET)),
        "p_teacher has 1 elements and p_student 0; they must be equally many"
    );
    let classes = Ragged::new("offsets", &[0_i8, 3], &[0, 2]).unwrap();
    assert_eq!(class_counts(classes, &QUIET).unwrap_err().to_string(), "classes[1] is 3; it must be a class, -1 to 2");
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
