//! Token log-probabilities × sentences → probabilities and class of each sentence, counts per response.
//!
//! The probability of a sentence is exp(mean log-probability of its tokens). A token belongs to the sentence of its
//! first byte that is not white space: most tokenizers write a word with the space before it, which is the last byte of
//! the sentence before. A token of white space alone belongs to the sentence of its first byte, and one without bytes
//! (an end-of-text token, say) to that of the next byte; at the end of the text that is the last sentence.

use std::ops::Range;

use crate::class::{NUM_CLASSES, SentenceClass, TOLERANCE, class_of};
use crate::error::{Error, Result, equally_many};
use crate::interrupt::Interrupt;
use crate::parallel::{self, GRAIN, take};
use crate::ragged::{Ragged, to_index, to_offset};
use crate::sentence_kernel::{self, BLOCK, Output, Tokens};
use crate::simd::{self, Level};

/// The first token of each sentence, and at the end the number of tokens: sentence `s` has the tokens
/// `spans[s]..spans[s + 1]`.
///
/// `texts` has the text of each response, `token_bytes` the length of each token in bytes of the text, and `ends` the
/// sentence ends as byte offsets into the text; the last is the text's length. `first_bytes` has the byte at which the
/// first token of each response begins (`None`: 0); no token wrote what is before it.
///
/// # Errors
/// Columns that do not fit together, a token or first byte below 0, token lengths that do not add up to the text's,
/// ends that do not increase to the text's length, tokens of a response without a sentence.
pub fn sentence_spans(
    texts: Ragged<'_, u8>,
    token_bytes: Ragged<'_, i32>,
    ends: Ragged<'_, i64>,
    first_bytes: Option<&[i64]>,
    interrupt: &Interrupt,
) -> Result<Vec<i64>> {
    equally_many("text_offsets", texts.offsets().len(), "end_offsets", ends.offsets().len())?;
    equally_many("token_offsets", token_bytes.offsets().len(), "end_offsets", ends.offsets().len())?;
    if let Some(first_bytes) = first_bytes {
        equally_many("first_bytes", first_bytes.len(), "responses", ends.len())?;
    }
    let num_sentences = ends.values().len();
    let mut spans = vec![0; num_sentences + 1];
    spans[num_sentences] = token_bytes.offsets()[token_bytes.len()];
    let responses = parallel::cut(token_bytes.offsets(), GRAIN);
    let width = |range: &Range<usize>| to_index(ends.offsets()[range.end]) - to_index(ends.offsets()[range.start]);
    let work = responses.iter().zip(parallel::split(&mut spans[..num_sentences], &responses, width)).collect();
    parallel::try_map(work, interrupt, |(responses, mut spans)| {
        for response in responses.clone() {
            let one = Response {
                index: response,
                text: &texts[response],
                token_bytes: &token_bytes[response],
                ends: &ends[response],
                first_byte: first_bytes.map_or(0, |first_bytes| first_bytes[response]),
                first_token: token_bytes.offsets()[response],
            };
            one.spans(take(&mut spans, one.ends.len()), interrupt)?;
        }
        Ok(())
    })?;
    Ok(spans)
}

struct Response<'a> {
    index: usize,
    text: &'a [u8],
    token_bytes: &'a [i32],
    ends: &'a [i64],
    first_byte: i64,
    /// The number of tokens in the responses before.
    first_token: i64,
}

impl Response<'_> {
    /// Writes the first token of each sentence.
    fn spans(&self, spans: &mut [i64], interrupt: &Interrupt) -> Result<()> {
        self.check()?;
        let mut at = self.first_byte;
        let mut sentence = 0_usize;
        for (token, &bytes) in self.token_bytes.iter().enumerate() {
            interrupt.every(token)?;
            let bytes = i64::from(bytes);
            if bytes < 0 {
                return Err(Error::NegativeTokenBytes { response: self.index, token, value: bytes });
            }
            let next = at.saturating_add(bytes);
            // Only a token that reaches beyond the last sentence that has begun can belong to another one.
            let reaches_next = next > self.ends[sentence.saturating_sub(1)];
            let byte = if reaches_next { self.first_byte_of(at, next) } else { at };
            // Sentences that begin at or before this byte. The last one takes all tokens that are left.
            while sentence < spans.len() && (sentence == 0 || self.ends[sentence - 1] <= byte) {
                spans[sentence] = self.first_token + to_offset(token);
                sentence += 1;
            }
            at = next;
        }
        spans[sentence..].fill(self.first_token + to_offset(self.token_bytes.len()));
        let text_bytes = to_offset(self.text.len());
        if at != text_bytes {
            return Err(Error::TokenBytesMismatch { response: self.index, token_bytes: at, text_bytes });
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let response = self.index;
        if self.first_byte < 0 {
            let value = as_f64(self.first_byte);
            return Err(Error::BadValue { name: "first_bytes", index: response, value, must: "at least 0" });
        }
        let mut before = 0;
        for (index, &value) in self.ends.iter().enumerate() {
            if value <= before {
                return Err(Error::EndsNotIncreasing { response, index, value, before });
            }
            before = value;
        }
        if self.ends.is_empty() && !self.token_bytes.is_empty() {
            return Err(Error::NoSentence { response, num_tokens: self.token_bytes.len() });
        }
        if before != to_offset(self.text.len()) {
            return Err(Error::EndsNotTextLength { response, value: before, len: self.text.len() });
        }
        Ok(())
    }

    /// The first byte from `start` to `end` that is not white space, or `start` if there is none.
    fn first_byte_of(&self, start: i64, end: i64) -> i64 {
        let bytes = self.text.get(to_index(start)..to_index(end)).unwrap_or_default();
        // A token may begin or end inside a character.
        let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let white = text.len() - text.trim_start().len();
        if white < bytes.len() { start + to_offset(white) } else { start }
    }
}

/// Probabilities and class of each sentence.
#[derive(Debug, Clone, PartialEq)]
pub struct SentenceStats {
    /// Probability under the teacher, NaN without tokens.
    pub p_teacher: Vec<f32>,
    /// Probability under the student, NaN without tokens.
    pub p_student: Vec<f32>,
    /// Class of each sentence, a [`SentenceClass`].
    pub classes: Vec<i8>,
    /// The number of Shared, Teacher and Student sentences of each response, row after row.
    pub counts: Vec<i64>,
}

/// Probabilities, class and counts of all sentences. Each model has a row of log-probabilities per sentence, as
/// [`sentence_spans`] cuts them; response `r` has the sentences `response_offsets[r]..response_offsets[r + 1]`.
///
/// The error of a probability is at most 1e-7 (`sentence_kernel.rs`).
///
/// ```
/// use dasd_lite_core::stats::sentence_stats;
/// use dasd_lite_core::{Interrupt, Ragged};
///
/// // One response of two sentences. The teacher has 2 + 1 tokens; the student's tokenizer cuts them into 1 + 2.
/// let teacher = Ragged::new("teacher_spans", &[-0.1_f32, -0.3, -0.1], &[0, 2, 3])?;
/// let student = Ragged::new("student_spans", &[-0.2_f32, -2.0, -1.0], &[0, 1, 3])?;
/// let stats = sentence_stats(teacher, student, &[0, 2], 0.1, &Interrupt::new())?;
/// // exp(-0.2) for both models: Shared. exp(-0.1) against exp(-1.5): Teacher.
/// assert_eq!(stats.classes, [0, 1]);
/// assert_eq!(stats.counts, [1, 1, 0]);
/// # Ok::<(), dasd_lite_core::Error>(())
/// ```
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

/// [`sentence_stats`] with the instructions of one level, for tests and benchmarks.
///
/// # Errors
/// The same.
#[doc(hidden)]
pub fn sentence_stats_at(
    level: Level,
    teacher: Ragged<'_, f32>,
    student: Ragged<'_, f32>,
    response_offsets: &[i64],
    beta: f64,
    interrupt: &Interrupt,
) -> Result<SentenceStats> {
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
    let width = |range: &Range<usize>| to_index(response_offsets[range.end]) - to_index(response_offsets[range.start]);
    let work = responses
        .iter()
        .zip(parallel::split(&mut stats.p_teacher, &responses, width))
        .zip(parallel::split(&mut stats.p_student, &responses, width))
        .zip(parallel::split(&mut stats.classes, &responses, width))
        .zip(parallel::split(&mut stats.counts, &responses, |range| NUM_CLASSES * range.len()))
        .collect();
    parallel::try_map(work, interrupt, |((((responses, p_teacher), p_student), classes), counts)| {
        let first = to_index(response_offsets[responses.start]);
        let blocks = p_teacher.chunks_mut(BLOCK).zip(p_student.chunks_mut(BLOCK)).zip(classes.chunks_mut(BLOCK));
        for (block, ((p_teacher, p_student), classes)) in blocks.enumerate() {
            interrupt.check()?;
            let first = first + BLOCK * block;
            let models = [teacher, student].map(|model| Tokens {
                logprobs: model.values(),
                spans: &model.offsets()[first..=first + classes.len()],
            });
            let [teacher_is_valid, student_is_valid] =
                sentence_kernel::run(level, models, beta, Output { p_teacher, p_student, classes });
            if !teacher_is_valid {
                return Err(bad_logprob("teacher_logprobs", models[0]));
            }
            if !student_is_valid {
                return Err(bad_logprob("student_logprobs", models[1]));
            }
        }
        let mut rest = &*classes;
        for (response, counts) in responses.clone().zip(counts.chunks_exact_mut(NUM_CLASSES)) {
            let classes = rest.split_off(..width(&(response..response + 1))).expect("as wide as its responses");
            for (class, count) in (0_i8..).zip(counts) {
                // Sums of up to 255 fit into a byte, and bytes are added 16 to 64 at once.
                let of_part = |part: &[i8]| part.iter().map(|&other| u8::from(other == class)).sum::<u8>();
                *count = classes.chunks(255).map(|part| i64::from(of_part(part))).sum();
            }
        }
        Ok(())
    })?;
    Ok(stats)
}

#[cold]
fn bad_logprob(name: &'static str, Tokens { logprobs, spans }: Tokens<'_>) -> Error {
    let mut range = to_index(spans[0])..to_index(spans[spans.len() - 1]);
    let bad = |index: &usize| logprobs[*index].is_nan() || logprobs[*index] > TOLERANCE;
    range.find(bad).map_or(Error::Changed, |index| Error::BadValue {
        name,
        index,
        value: logprobs[index].into(),
        must: "a log-probability: a number of at most 0",
    })
}

/// The class of each sentence: Teacher if `p_teacher - p_student > beta`, Student if `p_student - p_teacher > beta`,
/// None if one of them is NaN, else Shared.
///
/// # Errors
/// Columns of unequal length, a β that is negative or not a number, a probability outside 0…1.
pub fn classify(p_teacher: &[f32], p_student: &[f32], beta: f64, interrupt: &Interrupt) -> Result<Vec<i8>> {
    equally_many("p_teacher", p_teacher.len(), "p_student", p_student.len())?;
    check_beta(beta)?;
    let mut classes = Vec::with_capacity(p_teacher.len());
    for (index, (&teacher, &student)) in p_teacher.iter().zip(p_student).enumerate() {
        interrupt.every(index)?;
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

fn check_beta(beta: f64) -> Result<()> {
    if beta.is_nan() || beta < 0.0 {
        return Err(Error::Argument { name: "beta", value: beta, must: "a number of at least 0" });
    }
    Ok(())
}

/// The number of Shared, Teacher and Student sentences of each response, row after row.
///
/// # Errors
/// A value that is not a class.
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
