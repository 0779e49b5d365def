//! Rows → an order in which all ranks take equally long.
//!
//! A micro-step takes as long as its most expensive row. So the rows are shuffled, sorted by cost within windows, and
//! cut into micro-steps of neighbors, whose costs are nearly equal. Within a window the micro-steps are shuffled again,
//! and within a micro-step the ranks. Cheap and expensive rows are spread over all of training and over all ranks.

use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::ragged::Ragged;
use crate::random::Random;

/// How to balance.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Ranks that work at the same time, at least 1.
    pub num_ranks: usize,
    /// Micro-steps of an optimizer step, at least 1: rows are dealt out in whole optimizer steps.
    pub micro_steps: usize,
    /// About how many micro-steps are sorted together, at least 1.
    pub window: usize,
    /// Cost of a token.
    pub linear: f64,
    /// Cost of a pair of tokens of one sequence.
    pub quadratic: f64,
    /// Decides the order.
    pub seed: u64,
}

/// Which rank works on which row when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Rows, `num_ranks` for each micro-step.
    pub rows: Vec<u32>,
    /// Rows that fill no whole optimizer step, increasing; which ones depends on the seed.
    pub left_over: Vec<u32>,
}

/// Orders the rows of a plan: `items` has the indices of the sequences of each row, `lengths` their tokens.
///
/// # Errors
/// An option out of its range; an item without a length; a negative length.
pub fn balance<T: Copy + Into<i64>>(
    items: Ragged<'_, u32>,
    lengths: &[T],
    options: &Options,
    interrupt: &Interrupt,
) -> Result<Order> {
    let step_rows = check(options)?;
    let mut random = Random::new(options.seed);
    let mut keyed = row_costs(items, lengths, options, interrupt)?;
    random.shuffle(&mut keyed, interrupt)?;
    let left = keyed.split_off(keyed.len() - keyed.len() % step_rows);
    let mut left_over: Vec<u32> = left.into_iter().map(|(_, row)| row).collect();
    left_over.sort_unstable();

    let num_micro_steps = keyed.len() / options.num_ranks;
    let num_windows = num_micro_steps.div_ceil(options.window);
    let mut rows = Vec::with_capacity(keyed.len());
    let mut rest = keyed.as_mut_slice();
    for window in 0..num_windows {
        interrupt.check()?;
        // Windows differ by one micro-step at most: a small last one could not be balanced.
        let edge = |window| (window * num_micro_steps / num_windows) * options.num_ranks;
        let (keyed, tail) = rest.split_at_mut(edge(window + 1) - edge(window));
        rest = tail;
        keyed.sort_unstable();
        let mut micro_steps: Vec<&mut [(u64, u32)]> = keyed.chunks_exact_mut(options.num_ranks).collect();
        random.shuffle(&mut micro_steps, interrupt)?;
        for micro_step in micro_steps {
            random.shuffle(micro_step, interrupt)?;
            rows.extend(micro_step.iter().map(|&(_, row)| row));
        }
    }
    Ok(Order { rows, left_over })
}

/// Rows of an optimizer step.
fn check(options: &Options) -> Result<usize> {
    let Options { num_ranks, micro_steps, window, linear, quadratic, .. } = *options;
    for (name, value) in [("num_ranks", num_ranks), ("micro_steps", micro_steps), ("window", window)] {
        if value == 0 {
            return Err(Error::Argument { name, value: 0.0, must: "at least 1" });
        }
    }
    for (name, value) in [("the linear cost", linear), ("the quadratic cost", quadratic)] {
        if !(0.0..=1e15).contains(&value) {
            return Err(Error::Argument { name, value, must: "from 0 to 1e15" });
        }
    }
    num_ranks.checked_mul(micro_steps).ok_or(Error::Argument {
        name: "num_ranks × micro_steps",
        value: f64::INFINITY,
        must: "a number of rows",
    })
}

/// Cost and index of each row. A cost is given as the bits of a non-negative float, which sort like the float.
fn row_costs<T: Copy + Into<i64>>(
    items: Ragged<'_, u32>,
    lengths: &[T],
    options: &Options,
    interrupt: &Interrupt,
) -> Result<Vec<(u64, u32)>> {
    let mut costs = Vec::with_capacity(items.len());
    let mut index = 0;
    for (row, items) in (0_u32..).zip(items.iter()) {
        let mut cost = 0.0;
        for &item in items {
            interrupt.every(index)?;
            let length = *lengths.get(item as usize).ok_or_else(|| Error::BadIndex {
                name: "plan.items",
                index,
                value: item.into(),
                len: lengths.len(),
            })?;
            let length: i64 = length.into();
            if length < 0 {
                return Err(Error::NegativeLength { index: item as usize, value: length });
            }
            #[expect(clippy::cast_precision_loss, reason = "a cost needs no more than 53 bits")]
            let length = length as f64;
            cost += length * (options.linear + options.quadratic * length);
            index += 1;
        }
        costs.push((cost.to_bits(), row));
    }
    Ok(costs)
}
