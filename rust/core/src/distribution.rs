//! How numbers lie: histogram and exact quantiles, without a sort.

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::stats::TOLERANCE;

/// Elements between two looks at the interrupt flag.
const CHUNK: usize = 1 << 16;

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
