//! Token log-probabilities × sentences → probabilities and class of each sentence, counts per response.
//!
//! The probability of a sentence is exp(mean log-probability of the tokens that begin in it). A token begins in the
//! sentence in which its first byte lies; a token without bytes (an end-of-text token, say) where it stands, at the end
//! of the text in the last sentence.

use std::ops::Range;

use crate::error::{Error, Result, equally_many};
use crate::interrupt::Interrupt;
use crate::parallel::{self, GRAIN, take};
use crate::ragged::{Ragged, place, to_offset};
use crate::sentence_kernel::{self, BLOCK, Found, Model};
use crate::simd::{self, Level};

/// Log-probabilities up to this far above 0 are rounding, not errors.
pub const TOLERANCE: f32 = 1e-4;

/// Class of a sentence by the probabilities of teacher and student; the discriminant is what columns hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum SentenceClass {
    /// No token of the one or the other begins in it.
    None = -1,
    /// Neither probability is above the other by more than β.
    Shared = 0,
    /// The teacher's is.
    Teacher = 1,
    /// The student's is.
    Student = 2,
}

/// Number of classes that are counted: Shared, Teacher, Student.
pub const NUM_CLASSES: usize = 3;

/// The first token of each sentence, and at the end the number of tokens: sentence `s` has the tokens
/// `spans[s]..spans[s + 1]`.
///
/// `token_bytes` has the length of each token in bytes of the text, one row per response, and `ends` the sentence ends
/// as byte offsets into the text; the last is the text's length. `first_bytes` has the byte at which the first token of
/// each response begins, 0 without it: what lies before was written by no token.
///
/// # Errors
/// Columns that do not fit together, a token or first byte below 0, token lengths that do not add up to the text's,
/// ends that do not increase, tokens of a response without a sentence.
pub fn sentence_spans<B: Copy + Into<i64> + Sync>(
    token_bytes: Ragged<'_, B>,
    ends: Ragged<'_, i64>,
    first_bytes: Option<&[i64]>,
    interrupt: &Interrupt,
) -> Result<Vec<i64>> {
    equally_many("token_offsets", token_bytes.offsets().len(), "end_offsets", ends.offsets().len())?;
    if let Some(first_bytes) = first_bytes {
        equally_many("first_bytes", first_bytes.len(), "responses", ends.len())?;
    }
    let num_sentences = ends.values().len();
    let mut spans = vec![0; num_sentences + 1];
    spans[num_sentences] = token_bytes.offsets()[token_bytes.len()];
    let responses = parallel::cut(token_bytes.offsets(), GRAIN);
    let width = |range: &Range<usize>| place(ends.offsets()[range.end]) - place(ends.offsets()[range.start]);
    let work = responses.iter().zip(parallel::split(&mut spans[..num_sentences], &responses, width)).collect();
    parallel::try_map(work, interrupt, |(responses, mut spans)| {
        for response in responses.clone() {
            let ends = &ends[response];
            let spans = take(&mut spans, ends.len());
            let first_byte = first_bytes.map_or(0, |first_bytes| first_bytes[response]);
            let first_token = token_bytes.offsets()[response];
            spans_of_response(response, &token_bytes[response], ends, first_byte, first_token, spans, interrupt)?;
        }
        Ok(())
    })?;
    Ok(spans)
}

fn spans_of_response<B: Copy + Into<i64>>(
    response: usize,
    token_bytes: &[B],
    ends: &[i64],
    first_byte: i64,
    first_token: i64,
    spans: &mut [i64],
    interrupt: &Interrupt,
) -> Result<()> {
    if first_byte < 0 {
        let value = as_f64(first_byte);
        return Err(Error::BadValue { name: "first_bytes", index: response, value, must: "at least 0" });
    }
    let mut before = 0;
    for (index, &value) in ends.iter().enumerate() {
        if value <= before {
            return Err(Error::EndsNotIncreasing { response, index, value, before });
        }
        before = value;
    }
    if ends.is_empty() && !token_bytes.is_empty() {
        return Err(Error::NoSentence { response, num_tokens: token_bytes.len() });
    }
    let mut at = first_byte;
    let mut sentence = 0;
    for (token, &bytes) in token_bytes.iter().enumerate() {
        if token % GRAIN == 0 {
            interrupt.check()?;
        }
        // Sentences that begin at or before this token, the last one apart, which takes all that is left.
        while sentence < spans.len() && (sentence == 0 || ends[sentence - 1] <= at) {
            spans[sentence] = first_token + to_offset(token);
            sentence += 1;
        }
        let bytes = bytes.into();
        if bytes < 0 {
            return Err(Error::NegativeTokenBytes { response, token, value: bytes });
        }
        at = at.saturating_add(bytes);
    }
    spans[sentence..].fill(first_token + to_offset(token_bytes.len()));
    if at != before {
        return Err(Error::TokenBytesMismatch { response, token_bytes: at, text_bytes: before });
    }
    Ok(())
}

/// What both models say about each sentence.
#[derive(Debug, Clone, PartialEq)]
pub struct SentenceStats {
    /// Probability under the teacher, NaN without tokens.
    pub p_teacher: Vec<f32>,
    /// Probability under the student, NaN without tokens.
    pub p_student: Vec<f32>,
    /// Class of each sentence, a [`SentenceClass`].
    pub classes: Vec<i8>,
    /// Per response the number of its Shared, Teacher and Student sentences, row after row.
    pub counts: Vec<i64>,
}

/// Probabilities, class and counts of all sentences. Each model has a row of log-probabilities per sentence, as
/// [`sentence_spans`] cuts them; response `r` has the sentences `response_offsets[r]..response_offsets[r + 1]`.
///
/// The error of a probability is at most 1e-7 (`sentence_kernel.rs`).
///
/// # Errors
/// Columns that do not fit together, a β that is negative or not a number, a log-probability that is NaN or above
/// [`TOLERANCE`].
pub fn sentence_stats(
    teacher: Ragged<'_, f32>,
    student: Ragged<'_, f32>,
    response_offsets: &[i64],
    beta: f64,
    interrupt: &Interrupt,
) -> Result<SentenceStats> {
    sentence_stats_at(simd::level(), teacher, student, response_offsets, beta, interrupt)
}

/// [`sentence_stats`] with the instructions of one level, which the processor must have ([`simd::levels`]).
///
/// # Errors
/// As there.
///
/// # Panics
/// If the processor does not have it.
pub fn sentence_stats_at<'a>(
    level: Level,
    teacher: Ragged<'a, f32>,
    student: Ragged<'a, f32>,
    response_offsets: &[i64],
    beta: f64,
    interrupt: &Interrupt,
) -> Result<SentenceStats> {
    assert!(simd::levels().contains(&level), "a processor without {level:?}");
    equally_many("teacher_spans", teacher.offsets().len(), "student_spans", student.offsets().len())?;
    check_beta(beta)?;
    let num_sentences = teacher.len();
    let mut stats = SentenceStats {
        p_teacher: vec![0.0; num_sentences],
        p_student: vec![0.0; num_sentences],
        classes: vec![0; num_sentences],
        counts: vec![],
    };
    // Only for its check.
    Ragged::new("response_offsets", &stats.classes, response_offsets)?;
    stats.counts = vec![0; NUM_CLASSES * (response_offsets.len() - 1)];
    let responses = parallel::cut(response_offsets, GRAIN / 16);
    let width = |range: &Range<usize>| place(response_offsets[range.end]) - place(response_offsets[range.start]);
    let work = responses
        .iter()
        .zip(parallel::split(&mut stats.p_teacher, &responses, width))
        .zip(parallel::split(&mut stats.p_student, &responses, width))
        .zip(parallel::split(&mut stats.classes, &responses, width))
        .zip(parallel::split(&mut stats.counts, &responses, |range| NUM_CLASSES * range.len()))
        .collect();
    parallel::try_map(work, interrupt, |((((responses, p_teacher), p_student), classes), counts)| {
        let first = place(response_offsets[responses.start]);
        let blocks = p_teacher.chunks_mut(BLOCK).zip(p_student.chunks_mut(BLOCK)).zip(classes.chunks_mut(BLOCK));
        for (block, ((p_teacher, p_student), classes)) in blocks.enumerate() {
            let first = first + BLOCK * block;
            if block % 16 == 0 {
                interrupt.check()?;
            }
            let model = |rows: Ragged<'a, f32>| Model {
                values: rows.values(),
                spans: &rows.offsets()[first..=first + classes.len()],
            };
            let models = [model(teacher), model(student)];
            let valid = sentence_kernel::run(level, models, beta, Found { p_teacher, p_student, classes });
            if !valid[0] {
                return Err(bad_logprob("teacher_logprobs", models[0]));
            }
            if !valid[1] {
                return Err(bad_logprob("student_logprobs", models[1]));
            }
        }
        let mut rest = &*classes;
        for (response, counts) in responses.clone().zip(counts.chunks_exact_mut(NUM_CLASSES)) {
            let classes = rest.split_off(..width(&(response..response + 1))).expect("as wide as its responses");
            for (class, count) in (0_i8..).zip(counts) {
                // Bytes are added as bytes, 16 to 64 at once, as long as their sum is one.
                let of_part = |part: &[i8]| part.iter().map(|&found| u8::from(found == class)).sum::<u8>();
                *count = classes.chunks(255).map(|part| i64::from(of_part(part))).sum();
            }
        }
        Ok(())
    })?;
    Ok(stats)
}

#[cold]
fn bad_logprob(name: &'static str, Model { values, spans }: Model<'_>) -> Error {
    let range = place(spans[0])..place(spans[spans.len() - 1]);
    let bad = |index: &usize| values[*index].is_nan() || values[*index] > TOLERANCE;
    let index = range.clone().find(bad).expect("the kernel found one");
    Error::BadValue { name, index, value: values[index].into(), must: "a log-probability: a number of at most 0" }
}

/// The class of each sentence: Teacher if `p_teacher - p_student > beta`, Student if `p_student - p_teacher > beta`,
/// None if one is NaN, else Shared.
///
/// # Errors
/// Columns of unequal length, a β that is negative or not a number, a probability outside 0…1.
pub fn classify(p_teacher: &[f32], p_student: &[f32], beta: f64, interrupt: &Interrupt) -> Result<Vec<i8>> {
    equally_many("p_teacher", p_teacher.len(), "p_student", p_student.len())?;
    check_beta(beta)?;
    let mut classes = Vec::with_capacity(p_teacher.len());
    for (index, (&teacher, &student)) in p_teacher.iter().zip(p_student).enumerate() {
        if index % GRAIN == 0 {
            interrupt.check()?;
        }
        for (name, value) in [("p_teacher", teacher), ("p_student", student)] {
            if !(value.is_nan() || (0.0..=1.0 + 2.0 * TOLERANCE).contains(&value)) {
                let value = f64::from(value);
                return Err(Error::BadValue { name, index, value, must: "a probability, or NaN without tokens" });
            }
        }
        classes.push(class_of(teacher, student, beta));
    }
    Ok(classes)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "part of the kernel")]
pub(crate) fn class_of(p_teacher: f32, p_student: f32, beta: f64) -> i8 {
    let difference = f64::from(p_teacher) - f64::from(p_student);
    if difference > beta {
        SentenceClass::Teacher as i8
    } else if -difference > beta {
        SentenceClass::Student as i8
    } else if difference.is_nan() {
        SentenceClass::None as i8
    } else {
        SentenceClass::Shared as i8
    }
}

fn check_beta(beta: f64) -> Result<()> {
    if beta.is_nan() || beta < 0.0 {
        return Err(Error::Argument { name: "beta", value: beta, must: "a number of at least 0" });
    }
    Ok(())
}

/// Per response the number of its Shared, Teacher and Student sentences, row after row.
///
/// # Errors
/// A value that is no class.
pub fn class_counts(classes: Ragged<'_, i8>, interrupt: &Interrupt) -> Result<Vec<i64>> {
    let mut counts = vec![0; classes.len() * NUM_CLASSES];
    let mut index = 0;
    for (classes, counts) in classes.iter().zip(counts.chunks_exact_mut(NUM_CLASSES)) {
        interrupt.check()?;
        for &class in classes {
            if let Some(count) = usize::try_from(class).ok().and_then(|class| counts.get_mut(class)) {
                *count += 1;
            } else if class != SentenceClass::None as i8 {
                let value = f64::from(class);
                return Err(Error::BadValue { name: "classes", index, value, must: "a class, -1 to 2" });
            }
            index += 1;
        }
    }
    Ok(counts)
}

#[expect(clippy::cast_precision_loss, reason = "for a message")]
fn as_f64(value: i64) -> f64 {
    value as f64
}
