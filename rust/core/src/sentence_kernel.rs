//! The kernel of sentence statistics: flat log-probabilities and where sentences begin → a probability per sentence.
//!
//! The same code is compiled once for each level of instructions. All give the same bits, because the order of all
//! additions is fixed: a sentence is cut into pieces of 3 × 16 tokens; lane `l` adds tokens `l`, `l + 16` and `l + 32` of
//! a piece in f32; lanes `l` and `l + 8` are also added in f32 (three roundings, so at most 3 · 2⁻²⁴ of the sum, as no
//! log-probability is positive); the remaining eight lanes, and the pieces, are added in f64.
//!
//! With AVX-512 a piece is read as 48 values whatever its length, and those after its end count as 0: most sentences are
//! one piece, without a branch that a processor could mispredict.
#![allow(unsafe_code, reason = "masked loads, and calls of functions compiled for one level; each with its argument")]
#![allow(clippy::inline_always, reason = "what is not inlined is not compiled for the level")]
#![allow(clippy::needless_range_loop, reason = "a loop over lanes is clearest with their numbers")]

use crate::class::{TOLERANCE, class_of};
use crate::ragged::to_index;
use crate::simd::{self, Instructions, Level};

/// The most sentences of one call.
pub(crate) const BLOCK: usize = 64;

const LANES: usize = 16;

const PIECE: usize = 3 * LANES;

/// How far ahead memory is prefetched.
const AHEAD_BYTES: usize = 4096;

/// Log-probabilities of one model, and where its sentences begin: one element more than sentences, at most [`BLOCK`] of
/// them, valid offsets into the log-probabilities.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) logprobs: &'a [f32],
    pub(crate) spans: &'a [i64],
}

/// Probabilities and class of each sentence.
pub(crate) struct Output<'a> {
    pub(crate) p_teacher: &'a mut [f32],
    pub(crate) p_student: &'a mut [f32],
    pub(crate) classes: &'a mut [i8],
}

/// Writes exp(mean) of each sentence, NaN without tokens, and its class. Returns for teacher and student whether all
/// log-probabilities are numbers of at most [`TOLERANCE`].
pub(crate) fn run(level: Level, models: [Tokens<'_>; 2], beta: f64, output: Output<'_>) -> [bool; 2] {
    match level.instructions() {
        // SAFETY: a `Level` exists only for instructions that the processor has.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => unsafe { avx512::run(models, beta, output) },
        // SAFETY: as before.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2(models, beta, output) },
        _ => run_with(models, beta, output, sum),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(models: [Tokens<'_>; 2], beta: f64, output: Output<'_>) -> [bool; 2] {
    run_with(models, beta, output, sum)
}

/// Adds up a piece, given the values, where it starts and its length; raises the highest value of each lane.
trait Sum: Fn(&[f32], usize, usize, &mut [f32; LANES]) -> f64 {}

impl<F: Fn(&[f32], usize, usize, &mut [f32; LANES]) -> f64> Sum for F {}

#[inline(always)]
#[expect(clippy::needless_pass_by_value, reason = "it is what is written to")]
fn run_with([teacher, student]: [Tokens<'_>; 2], beta: f64, output: Output<'_>, sum: impl Sum) -> [bool; 2] {
    let (p_teacher, p_student) = (&mut [0.0; BLOCK], &mut [0.0; BLOCK]);
    let valid = [probabilities(teacher, p_teacher, &sum), probabilities(student, p_student, &sum)];
    // Always all 64: a loop of fixed length becomes vector code.
    let mut classes = [0; BLOCK];
    for ((class, &p_teacher), &p_student) in classes.iter_mut().zip(&*p_teacher).zip(&*p_student) {
        *class = class_of(p_teacher, p_student, beta);
    }
    let num = output.classes.len();
    output.p_teacher.copy_from_slice(&p_teacher[..num]);
    output.p_student.copy_from_slice(&p_student[..num]);
    output.classes.copy_from_slice(&classes[..num]);
    valid
}

#[inline(always)]
fn probabilities(Tokens { logprobs, spans }: Tokens<'_>, p: &mut [f32; BLOCK], sum: &impl Sum) -> bool {
    let mut sums = [0.0; BLOCK];
    let mut counts = [0.0; BLOCK];
    let mut highest = [f32::NEG_INFINITY; LANES];
    let (mut long, mut num_long) = ([0; BLOCK], 0);
    let mut start = to_index(spans[0]);
    for (sentence, &end) in spans[1..].iter().enumerate() {
        let num_tokens = to_index(end) - start;
        sums[sentence] = sum(logprobs, start, num_tokens.min(PIECE), &mut highest);
        #[expect(clippy::cast_precision_loss, reason = "a sentence has fewer than 2^53 tokens")]
        let count = num_tokens as f64;
        counts[sentence] = count;
        // Without a branch, since a misprediction costs as much as the sentence.
        long[num_long] = sentence;
        num_long += usize::from(num_tokens > PIECE);
        start += num_tokens;
    }
    for &sentence in &long[..num_long] {
        let (start, end) = (to_index(spans[sentence]), to_index(spans[sentence + 1]));
        for start in (start + PIECE..end).step_by(PIECE) {
            sums[sentence] += sum(logprobs, start, (end - start).min(PIECE), &mut highest);
        }
    }
    // Only a NaN makes a sum NaN: +∞ is above the tolerance, and −∞ alone stays −∞.
    let mut valid = true;
    for ((p, total), count) in p.iter_mut().zip(sums).zip(counts) {
        *p = exp(total / count);
        valid &= !total.is_nan();
    }
    for highest in highest {
        valid &= highest <= TOLERANCE;
    }
    valid
}

/// The sum of `num` values from `start` on, at most [`PIECE`].
#[inline(always)]
fn sum(values: &[f32], start: usize, num: usize, highest: &mut [f32; LANES]) -> f64 {
    let mut copy = [0.0; PIECE];
    let window = values.get(start..start + PIECE).unwrap_or_else(|| {
        copy[..num].copy_from_slice(&values[start..start + num]);
        &copy
    });
    for line in 0..2 {
        simd::prefetch(window.as_ptr().wrapping_add(LANES * line).wrapping_byte_add(AHEAD_BYTES));
    }
    let (thirds, _) = window.as_chunks::<LANES>();
    let (full, rest) = (num / LANES, num % LANES);
    let mut lanes = [0.0_f32; LANES];
    for third in &thirds[..full] {
        for lane in 0..LANES {
            lanes[lane] += third[lane];
            highest[lane] = if third[lane] > highest[lane] { third[lane] } else { highest[lane] };
        }
    }
    if rest > 0 {
        for lane in 0..LANES {
            let value = if lane < rest { thirds[full][lane] } else { 0.0 };
            lanes[lane] += value;
            highest[lane] = if value > highest[lane] { value } else { highest[lane] };
        }
    }
    let mut total = [0.0_f64; LANES / 2];
    for lane in 0..LANES / 2 {
        total[lane] = f64::from(lanes[lane] + lanes[lane + LANES / 2]);
    }
    for width in [4, 2, 1] {
        for lane in 0..width {
            total[lane] += total[lane + width];
        }
    }
    total[0]
}

/// e^x for an `x` of at most 1 (or NaN) as f32, rounded from a result with a relative error of 1e-10.
#[inline(always)]
fn exp(x: f64) -> f32 {
    // e^x = 2^k · e^r, with r from −ln 2 / 2 to ln 2 / 2.
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 · 2^52: adding it leaves the integer in the low bits
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    const FACTORIALS: [f64; 9] = [40_320.0, 5_040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0];
    // Below that the result is 0 in f32, and the exponent would leave its range. NaN stays NaN.
    let clamped = if x < -104.0 { -104.0 } else { x };
    let shifted = clamped * std::f64::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = (clamped - k * LN_2_HIGH) - k * LN_2_LOW;
    let mut series = 1.0 / 362_880.0;
    for factorial in FACTORIALS {
        series = series * r + 1.0 / factorial;
    }
    let power = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1.0_f64.to_bits()));
    #[expect(clippy::cast_possible_truncation, reason = "f32 is what columns hold")]
    let result = (series * power) as f32;
    if x < -104.0 { 0.0 } else { result }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64, _mm_unpackhi_pd, _mm256_add_pd, _mm256_add_ps, _mm256_castpd256_pd128,
        _mm256_extractf128_pd, _mm512_add_ps, _mm512_castpd512_pd256, _mm512_castps512_ps256, _mm512_cvtps_pd,
        _mm512_extractf32x8_ps, _mm512_extractf64x4_pd, _mm512_loadu_ps, _mm512_maskz_loadu_ps, _mm512_max_ps,
        _mm512_storeu_ps,
    };

    use super::{AHEAD_BYTES, LANES, Output, PIECE, Tokens, run_with, simd};

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    pub(super) fn run(models: [Tokens<'_>; 2], beta: f64, output: Output<'_>) -> [bool; 2] {
        run_with(models, beta, output, |values: &[f32], start, num, highest: &mut _| sum(values, start, num, highest))
    }

    /// The same as [`super::sum`], without branches.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
    fn sum(values: &[f32], start: usize, num: usize, highest: &mut [f32; LANES]) -> f64 {
        let values = &values[start..start + num];
        let mask = (1_u64 << num.min(PIECE)) - 1;
        let load = |third: usize| {
            #[expect(clippy::cast_possible_truncation, reason = "these 16 bits are meant")]
            let mask = (mask >> (LANES * third)) as u16;
            let address = values.as_ptr().wrapping_add(LANES * third);
            if third < 2 {
                simd::prefetch(address.wrapping_byte_add(AHEAD_BYTES));
            }
            // SAFETY: nothing after the slice's end is read, because those bits of the mask are 0.
            unsafe { _mm512_maskz_loadu_ps(mask, address) }
        };
        let (a, b, c) = (load(0), load(1), load(2));
        // SAFETY: 16 values each way.
        unsafe {
            let known = _mm512_loadu_ps(highest.as_ptr());
            let higher = _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, known));
            _mm512_storeu_ps(highest.as_mut_ptr(), higher);
        }
        let lanes = _mm512_add_ps(_mm512_add_ps(a, b), c);
        let lanes = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
        let eight = _mm512_cvtps_pd(lanes);
        let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    }
}
