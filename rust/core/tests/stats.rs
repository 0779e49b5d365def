//! Sentence statistics against plain loops, at every level of instructions; and what bad columns get.

use dasd_lite_core::random::Random;
use dasd_lite_core::simd::levels;
use dasd_lite_core::stats::{SentenceStats, class_counts, classify, sentence_spans, sentence_stats, sentence_stats_at};
use dasd_lite_core::{Interrupt, Ragged};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

/// One response: its text, the byte lengths of its tokens, where the first one begins, and its sentence ends.
#[derive(Debug, Clone)]
struct Response {
    text: String,
    token_bytes: Vec<i32>,
    first_byte: i64,
    ends: Vec<i64>,
}

fn response() -> impl Strategy<Value = Response> {
    // White space of one and three bytes, characters of one, two and four bytes; tokens and sentences may cut them.
    let text = prop::collection::vec(prop::sample::select(vec![' ', '\n', '\u{3000}', 'a', '.', 'é', '🎉']), 0..40);
    let cuts = prop::collection::vec((any::<bool>(), any::<bool>()), 160);
    (text, cuts, 0..10_usize).prop_map(|(text, cuts, first_byte)| {
        let text: String = text.into_iter().collect();
        let (len, first_byte) = (text.len(), first_byte.min(text.len()));
        let mut token_ends = (first_byte + 1..=len).filter(|&at| at == len || cuts[at].0).collect::<Vec<_>>();
        if len > 0 && cuts[0].0 {
            token_ends.insert(token_ends.len() / 2, *token_ends.get(token_ends.len() / 2).unwrap_or(&len));
        }
        let mut at = first_byte;
        let lengths = token_ends.into_iter().map(|end| i32::try_from(end - std::mem::replace(&mut at, end)).unwrap());
        let ends = (1..=len).filter(|&at| at == len || cuts[at].1).map(|at| i64::try_from(at).unwrap());
        Response {
            token_bytes: lengths.collect(),
            first_byte: i64::try_from(first_byte).unwrap(),
            ends: ends.collect(),
            text,
        }
    })
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<i64> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + i64::try_from(length).unwrap());
    }
    offsets
}

/// exp(mean) of each sentence, in f64.
fn reference(logprobs: &[f32], spans: &[i64]) -> Vec<f64> {
    let edge = |offset: i64| usize::try_from(offset).unwrap();
    let p = |span: &[i64]| {
        let tokens = &logprobs[edge(span[0])..edge(span[1])];
        #[expect(clippy::cast_precision_loss)]
        let mean = tokens.iter().copied().map(f64::from).sum::<f64>() / tokens.len() as f64;
        mean.exp()
    };
    spans.windows(2).map(p).collect()
}

/// The statistics, the same to the bit at every level.
fn run(models: [(&[f32], &[i64]); 2], responses: &[i64], beta: f64) -> SentenceStats {
    let [teacher, student] = models.map(|(logprobs, spans)| Ragged::new("spans", logprobs, spans).unwrap());
    let stats = sentence_stats(teacher, student, responses, beta, &QUIET).unwrap();
    let bits = |p: &[f32]| p.iter().map(|p| p.to_bits()).collect::<Vec<_>>();
    for level in levels() {
        let at_level = sentence_stats_at(level, teacher, student, responses, beta, &QUIET).unwrap();
        assert_eq!(bits(&at_level.p_teacher), bits(&stats.p_teacher), "{level:?}");
        assert_eq!(bits(&at_level.p_student), bits(&stats.p_student), "{level:?}");
        assert_eq!((&at_level.classes, &at_level.counts), (&stats.classes, &stats.counts), "{level:?}");
    }
    stats
}

proptest! {
    #[test]
    fn spans_hold_the_tokens_that_begin_there(responses in prop::collection::vec(response(), 0..5)) {
        let token_bytes: Vec<i32> = responses.iter().flat_map(|response| response.token_bytes.clone()).collect();
        let ends: Vec<i64> = responses.iter().flat_map(|response| response.ends.clone()).collect();
        let first_bytes: Vec<i64> = responses.iter().map(|response| response.first_byte).collect();
        let token_offsets = offsets(responses.iter().map(|response| response.token_bytes.len()));
        let end_offsets = offsets(responses.iter().map(|response| response.ends.len()));
        let ends = Ragged::new("end_offsets", &ends, &end_offsets).unwrap();
        let tokens = Ragged::new("token_offsets", &token_bytes, &token_offsets).unwrap();
        let text: String = responses.iter().map(|response| response.text.as_str()).collect();
        let text_offsets = offsets(responses.iter().map(|response| response.text.len()));
        let texts = Ragged::new("text_offsets", text.as_bytes(), &text_offsets).unwrap();
        let spans = sentence_spans(texts, tokens, ends, Some(&first_bytes), &QUIET).unwrap();

        let mut expected = vec![];
        for (response, &first_token) in responses.iter().zip(&token_offsets) {
            // The byte that decides where each token belongs; the first token of a sentence is the first one whose
            // byte is at or after the sentence's start.
            let mut at = usize::try_from(response.first_byte).unwrap();
            let mut begins = vec![];
            for &bytes in &response.token_bytes {
                let next = at + usize::try_from(bytes).unwrap();
                // White space of three bytes counts only where all of it is in the token.
                let whole = |start: usize| {
                    let part = &response.text.as_bytes()[start..next];
                    part.starts_with(" ".as_bytes()) || part.starts_with(b"\n") || part.starts_with("\u{3000}".as_bytes())
                };
                let mut first = at;
                while first < next && whole(first) {
                    first += 1;
                    while first < next && !response.text.is_char_boundary(first) {
                        first += 1;
                    }
                }
                begins.push(if first < next { first } else { at });
                at = next;
            }
            for sentence in 0..response.ends.len() {
                let start = if sentence == 0 { 0 } else { response.ends[sentence - 1] };
                let first = begins.iter().position(|&begin| i64::try_from(begin).unwrap() >= start);
                expected.push(first_token + i64::try_from(first.unwrap_or(response.token_bytes.len())).unwrap());
            }
        }
        expected.push(i64::try_from(token_bytes.len()).unwrap());
        prop_assert_eq!(&spans, &expected);
    }

    #[test]
    fn probabilities_are_within_1e_7(
        lengths in prop::collection::vec((0..130_usize, 0..60_usize), 0..150),
        scale in prop_oneof![Just(0.01), Just(1.0), Just(30.0)],
        beta in 0.0..0.5_f64,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let mut model = |spans: &[i64]| {
            let logprob = |random: &mut Random| match random.below(200) {
                0 => f32::NEG_INFINITY,
                1 => -0.0,
                #[expect(clippy::cast_precision_loss)]
                other => -scale * other as f32 / 200.0 * random.below(1000) as f32 / 1000.0,
            };
            (0..spans[spans.len() - 1]).map(|_| logprob(&mut random)).collect::<Vec<f32>>()
        };
        let spans = [offsets(lengths.iter().map(|one| one.0)), offsets(lengths.iter().map(|one| one.1))];
        let logprobs = spans.each_ref().map(|spans| model(spans));
        let cut = i64::try_from(lengths.len() / 3).unwrap();
        let responses = [0, cut, cut, i64::try_from(lengths.len()).unwrap()];
        let stats = run([(&logprobs[0], &spans[0]), (&logprobs[1], &spans[1])], &responses, beta);
        for (column, model) in [&stats.p_teacher, &stats.p_student].into_iter().zip(0..) {
            for (&p, expected) in column.iter().zip(reference(&logprobs[model], &spans[model])) {
                let close = (f64::from(p) - expected).abs() <= 1e-7 || (p.is_nan() && expected.is_nan());
                prop_assert!(close, "{p} {expected}");
            }
        }
        prop_assert_eq!(&stats.classes, &classify(&stats.p_teacher, &stats.p_student, beta, &QUIET).unwrap());
        let classes = Ragged::new("offsets", &stats.classes, &responses).unwrap();
        prop_assert_eq!(&stats.counts, &class_counts(classes, &QUIET).unwrap());
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
                let expected = classes.iter().filter(|&&other| other == class).count();
                prop_assert_eq!(usize::try_from(counts[3 * row + column]).unwrap(), expected);
            }
        }
    }
}

#[test]
fn long_columns_on_many_threads() {
    let mut random = Random::new(5);
    let spans = offsets((0..30_000).map(|_| random.below(60)));
    #[expect(clippy::cast_precision_loss)]
    let mut model = || (0..spans[30_000]).map(|_| -(random.below(4096) as f32) / 1024.0).collect::<Vec<f32>>();
    let (teacher, student) = (model(), model());
    let responses: Vec<i64> = (0..=30_000).step_by(300).collect();
    let stats = run([(&teacher, &spans), (&student, &spans)], &responses, 0.1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let again = pool.install(|| run([(&teacher, &spans), (&student, &spans)], &responses, 0.1));
    assert_eq!((&stats.classes, &stats.counts), (&again.classes, &again.counts));
    let classes = Ragged::new("offsets", &stats.classes, &responses).unwrap();
    assert_eq!(stats.counts, class_counts(classes, &QUIET).unwrap());
    assert!(
        stats
            .p_teacher
            .iter()
            .zip(reference(&teacher, &spans))
            .all(|(&p, expected)| { (f64::from(p) - expected).abs() <= 1e-7 || (p.is_nan() && expected.is_nan()) })
    );
}

#[test]
fn errors_of_spans_name_response_index_and_value() {
    let message = |token_bytes: &[i32], token_offsets: &[i64], ends: &[i64], end_offsets: &[i64], first: &[i64]| {
        // Texts as long as the last end of each response says.
        let to_index = |value: i64| usize::try_from(value).unwrap();
        let of_response = |edge: &[i64]| ends[to_index(edge[0])..to_index(edge[1])].last().copied().unwrap_or(0);
        let text_offsets = offsets(end_offsets.windows(2).map(|edge| to_index(of_response(edge))));
        let text = vec![b'a'; to_index(*text_offsets.last().unwrap())];
        let texts = Ragged::new("text_offsets", &text, &text_offsets).unwrap();
        let tokens = Ragged::new("token_offsets", token_bytes, token_offsets).unwrap();
        let ends = Ragged::new("end_offsets", ends, end_offsets).unwrap();
        sentence_spans(texts, tokens, ends, Some(first), &QUIET).unwrap_err().to_string()
    };
    let two = |bytes, end, first| message(&[1, 2, bytes], &[0, 1, 3], &[1, 2, end], &[0, 1, 3], &[0, first]);
    assert_eq!(two(5, 3, 0), "response 1: its tokens end at byte 7, its text at 3; they must agree");
    assert_eq!(two(-1, 3, 0), "response 1, token 1: its length is -1 bytes; lengths are at least 0");
    assert_eq!(two(0, 2, 0), "response 1: sentence end 1 is 2, after 2; ends strictly increase from 0");
    assert_eq!(two(1, 4, -1), "first_bytes[1] is -1; it must be at least 0");
    assert_eq!(
        message(&[0], &[0, 1], &[], &[0, 0], &[0]),
        "response 0: 1 tokens, but no sentence that they could begin in"
    );
    assert_eq!(
        message(&[1], &[0, 1], &[1], &[0, 0, 1], &[0]),
        "token_offsets has 2 elements and end_offsets 3; they must be equally many"
    );
    let texts = Ragged::new("text_offsets", b"abc".as_slice(), &[0, 3]).unwrap();
    let tokens = Ragged::new("token_offsets", &[2], &[0, 1]).unwrap();
    let ends = Ragged::new("end_offsets", &[2], &[0, 1]).unwrap();
    assert_eq!(
        sentence_spans(texts, tokens, ends, None, &QUIET).unwrap_err().to_string(),
        "response 0: the last sentence ends at byte 2, the text has 3 bytes"
    );
    assert_eq!(
        message(&[1], &[0, 1], &[1], &[0, 1], &[]),
        "first_bytes has 0 elements and responses 1; they must be equally many"
    );
}

#[test]
fn errors_of_statistics_name_index_and_value() {
    for level in levels() {
        let message = |teacher: &[f32], student: &[f32], beta| {
            let teacher = Ragged::new("teacher_spans", teacher, &[0, 1, 3]).unwrap();
            let student = Ragged::new("student_spans", student, &[0, 3, 3]).unwrap();
            sentence_stats_at(level, teacher, student, &[0, 1, 2], beta, &QUIET).unwrap_err().to_string()
        };
        let good = [-1.0, 1e-5, f32::NEG_INFINITY];
        let must = "it must be a log-probability: a number of at most 0";
        assert_eq!(message(&[-1.0, -1.0, f32::NAN], &good, 0.1), format!("teacher_logprobs[2] is NaN; {must}"));
        assert_eq!(message(&good, &[-1.0, f32::INFINITY, 0.0], 0.1), format!("student_logprobs[1] is inf; {must}"));
        assert_eq!(message(&good, &[0.5, 0.0, 0.0], 0.1), format!("student_logprobs[0] is 0.5; {must}"));
        assert_eq!(message(&good, &good, -0.5), "beta is -0.5; it must be a number of at least 0");
    }
    let three = Ragged::new("teacher_spans", &[-1.0_f32], &[0, 1]).unwrap();
    let message = |spans: &[i64], responses: &[i64]| {
        let student = Ragged::new("student_spans", &[], spans).unwrap();
        sentence_stats(three, student, responses, 0.1, &QUIET).unwrap_err().to_string()
    };
    assert_eq!(message(&[0], &[0, 1]), "teacher_spans has 2 elements and student_spans 1; they must be equally many");
    assert_eq!(
        message(&[0, 0], &[0, 2]),
        "response_offsets[1] is 2, but there are 1 values; the last offset is their number"
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
}
