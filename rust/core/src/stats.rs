//! Token log-probabilities × byte spans → log-probability and class per sentence, counts per response.
//!
//! The probability of a sentence is exp(mean log-probability of the tokens that begin in it). A token
//! begins in the sentence in which its first byte lies; a token without bytes (an end-of-text token,
//! say) where it stands, at the end of the text in the last sentence. Sums are kept in f64.

use crate::error::{Error, Result, equally_many};
use crate::interrupt::Interrupt;
use crate::ragged::Ragged;

/// Log-probabilities up to this far above 0 are rounding, not errors.
pub const TOLERANCE: f32 = 1e-4;

/// Elements between two looks at the interrupt flag.
const CHUNK: usize = 1 << 16;

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

/// Mean log-probability (NaN without tokens) and number of tokens of each sentence.
///
/// `token_bytes` has one row per response beside `logprobs`, so it shares its offsets. `ends` are the
/// sentence ends of each response as byte offsets into its text; the last is the text's length.
///
/// # Errors
/// Columns that do not fit together, a token of negative length, token lengths that do not add up to
/// the text's, ends that do not increase, a log-probability that is NaN or above [`TOLERANCE`].
pub fn sentence_logprobs<B: Copy + Into<i64>>(
    logprobs: Ragged<'_, f32>,
    token_bytes: &[B],
    ends: Ragged<'_, i64>,
    interrupt: &Interrupt,
) -> Result<(Vec<f32>, Vec<i32>)> {
    equally_many("logprobs", logprobs.values().len(), "token_bytes", token_bytes.len())?;
    equally_many("token_offsets", logprobs.offsets().len(), "end_offsets", ends.offsets().len())?;
    let token_bytes = Ragged::new("token_offsets", token_bytes, logprobs.offsets())?;
    let mut means = Vec::with_capacity(ends.values().len());
    let mut counts = Vec::with_capacity(ends.values().len());
    for (response, ((logprobs, token_bytes), ends)) in
        logprobs.iter().zip(token_bytes.iter()).zip(ends.iter()).enumerate()
    {
        check_response(response, logprobs, token_bytes, ends, interrupt)?;
        let mut tokens = logprobs.iter().zip(token_bytes);
        let mut at = 0;
        for (index, &end) in ends.iter().enumerate() {
            let is_last = index + 1 == ends.len();
            let (mut sum, mut count) = (0.0, 0_i32);
            while at < end || is_last {
                let Some((&logprob, &bytes)) = tokens.next() else { break };
                sum += f64::from(logprob);
                count += 1;
                at += bytes.into();
            }
            #[expect(clippy::cast_possible_truncation, reason = "f32 is what columns hold")]
            means.push(if count == 0 { f32::NAN } else { (sum / f64::from(count)) as f32 });
            counts.push(count);
        }
    }
    Ok((means, counts))
}

fn check_response<B: Copy + Into<i64>>(
    response: usize,
    logprobs: &[f32],
    token_bytes: &[B],
    ends: &[i64],
    interrupt: &Interrupt,
) -> Result<()> {
    let mut total = 0_i64;
    for (chunk, (logprobs, token_bytes)) in logprobs.chunks(CHUNK).zip(token_bytes.chunks(CHUNK)).enumerate() {
        interrupt.check()?;
        for (index, (&logprob, &bytes)) in logprobs.iter().zip(token_bytes).enumerate() {
            let token = || chunk * CHUNK + index;
            let bytes = bytes.into();
            // Not `logprob > TOLERANCE`: NaN is to fail as well.
            if !matches!(logprob.partial_cmp(&TOLERANCE), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
                return Err(Error::BadLogprob { response, token: token(), value: logprob });
            }
            if bytes < 0 {
                return Err(Error::NegativeTokenBytes { response, token: token(), value: bytes });
            }
            total += bytes;
        }
    }
    let mut before = 0;
    for (index, &value) in ends.iter().enumerate() {
        if value <= before {
            return Err(Error::EndsNotIncreasing { response, index, value, before });
        }
        before = value;
    }
    if total != before {
        return Err(Error::TokenBytesMismatch { response, token_bytes: total, text_bytes: before });
    }
    Ok(())
}

/// The class of each sentence: Teacher if `p_teacher - p_student > beta`, Student if `p_student - p_teacher > beta`,
/// None if one is NaN, else Shared.
///
/// # Errors
/// Columns of unequal length, a β that is negative or not a number, a probability outside 0…1.
pub fn classify(p_teacher: &[f32], p_student: &[f32], beta: f64, interrupt: &Interrupt) -> Result<Vec<i8>> {
    equally_many("p_teacher", p_teacher.len(), "p_student", p_student.len())?;
    if beta.is_nan() || beta < 0.0 {
        return Err(Error::Argument { name: "beta", value: beta, must: "a number of at least 0" });
    }
    let mut classes = Vec::with_capacity(p_teacher.len());
    for (index, (&teacher, &student)) in p_teacher.iter().zip(p_student).enumerate() {
        if index % CHUNK == 0 {
            interrupt.check()?;
        }
        for (name, value) in [("p_teacher", teacher), ("p_student", student)] {
            if !(value.is_nan() || (0.0..=1.0 + 2.0 * TOLERANCE).contains(&value)) {
                let value = f64::from(value);
                return Err(Error::BadValue { name, index, value, must: "a probability, or NaN without tokens" });
            }
        }
        let difference = f64::from(teacher) - f64::from(student);
        let class = if difference.is_nan() {
            SentenceClass::None
        } else if difference > beta {
            SentenceClass::Teacher
        } else if -difference > beta {
            SentenceClass::Student
        } else {
            SentenceClass::Shared
        };
        classes.push(class as i8);
    }
    Ok(classes)
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

/// Counts of log-probabilities in `num_bins` equal bins from `low` to 0: bin `i` holds those of at least
/// its lower edge and below its upper. The first bin takes also what is below `low`, the last also 0 and
/// rounding above it.
///
/// # Errors
/// No bins, a `low` that is not a negative number, a log-probability that is NaN or above [`TOLERANCE`].
pub fn logprob_histogram(logprobs: &[f32], num_bins: u32, low: f64, interrupt: &Interrupt) -> Result<Vec<i64>> {
    if num_bins == 0 {
        return Err(Error::Argument { name: "num_bins", value: 0.0, must: "at least 1" });
    }
    if !(low.is_finite() && low < 0.0) {
        return Err(Error::Argument { name: "low", value: low, must: "a finite number below 0" });
    }
    let mut counts = vec![0; num_bins as usize];
    let width = -low / f64::from(num_bins);
    for (index, &logprob) in logprobs.iter().enumerate() {
        if index % CHUNK == 0 {
            interrupt.check()?;
        }
        if logprob.is_nan() || logprob > TOLERANCE {
            let value = f64::from(logprob);
            return Err(Error::BadValue { name: "logprobs", index, value, must: "a number of at most 0" });
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts of floats saturate")]
        let bin = ((f64::from(logprob) - low) / width) as usize;
        counts[bin.min(num_bins as usize - 1)] += 1;
    }
    Ok(counts)
}

/// Exact quantiles with linear interpolation between the two nearest ranks.
///
/// Two passes of counting, by the upper and the lower half of an order-preserving key: no copy, no sort.
///
/// # Errors
/// No values, a NaN among them, a `q` outside 0…1.
pub fn quantiles(values: &[f32], qs: &[f64], interrupt: &Interrupt) -> Result<Vec<f64>> {
    if let Some((index, &value)) = qs.iter().enumerate().find(|(_, q)| !(0.0..=1.0).contains(*q)) {
        return Err(Error::BadValue { name: "q", index, value, must: "from 0 to 1" });
    }
    if values.is_empty() {
        return Err(Error::Argument { name: "the number of values", value: 0.0, must: "at least 1" });
    }
    let mut ranks = vec![];
    for &q in qs {
        #[expect(clippy::cast_precision_loss, reason = "the definition is in floating point")]
        let position = q * (values.len() - 1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to len - 1")]
        let below = position.floor() as usize;
        ranks.push((below, (below + 1).min(values.len() - 1), position.fract()));
    }
    let wanted: Vec<usize> = ranks.iter().flat_map(|&(below, above, _)| [below, above]).collect();
    let found = order_statistics(values, &wanted, interrupt)?;
    Ok(ranks
        .iter()
        .zip(found.chunks_exact(2))
        .map(|(&(_, _, weight), pair)| {
            let (below, above) = (f64::from(pair[0]), f64::from(pair[1]));
            // Between −∞ and anything lies −∞, not NaN.
            if weight == 0.0 || below == f64::NEG_INFINITY { below } else { below + (above - below) * weight }
        })
        .collect())
}

/// For each rank the value that would stand there if `values` were sorted.
fn order_statistics(values: &[f32], ranks: &[usize], interrupt: &Interrupt) -> Result<Vec<f32>> {
    const HALF: usize = 1 << 16;
    let mut upper = vec![0_usize; HALF];
    for (chunk, part) in values.chunks(CHUNK).enumerate() {
        interrupt.check()?;
        for (index, &value) in part.iter().enumerate() {
            if value.is_nan() {
                let (index, value) = (chunk * CHUNK + index, f64::from(value));
                return Err(Error::BadValue { name: "values", index, value, must: "a number" });
            }
            upper[(order_key(value) >> 16) as usize] += 1;
        }
    }
    // Which upper halves hold a wanted rank, and a table of lower halves for each of those.
    let mut tables: Vec<Vec<usize>> = vec![];
    let mut table_of = vec![usize::MAX; HALF];
    let places: Vec<(usize, usize)> = ranks
        .iter()
        .map(|&rank| {
            let (half, before) = bin_of_rank(&upper, rank);
            if table_of[half] == usize::MAX {
                table_of[half] = tables.len();
                tables.push(vec![0; HALF]);
            }
            (half, rank - before)
        })
        .collect();
    for part in values.chunks(CHUNK) {
        interrupt.check()?;
        for &value in part {
            let key = order_key(value);
            if let Some(table) = tables.get_mut(table_of[(key >> 16) as usize]) {
                table[(key & 0xFFFF) as usize] += 1;
            }
        }
    }
    let value_at = |&(half, rank): &(usize, usize)| {
        let (low, _) = bin_of_rank(&tables[table_of[half]], rank);
        #[expect(clippy::cast_possible_truncation, reason = "both halves are below 2^16")]
        let key = (half << 16 | low) as u32;
        f32::from_bits(if key >> 31 == 1 { key ^ (1 << 31) } else { !key })
    };
    Ok(places.iter().map(value_at).collect())
}

/// The bin in which the value of this rank lies, and how many lie before that bin.
fn bin_of_rank(counts: &[usize], rank: usize) -> (usize, usize) {
    let mut before = 0;
    for (bin, &count) in counts.iter().enumerate() {
        if rank < before + count {
            return (bin, before);
        }
        before += count;
    }
    unreachable!("rank {rank} of {before} values")
}

/// An integer that is ordered as the number is.
fn order_key(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}
