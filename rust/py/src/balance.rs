//! Front of `dasd_lite_core::balance`.

use dasd_lite_core::Ragged;
use dasd_lite_core::balance::{self, Options};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::boundary::{Integers, copied, detached};

type Order<'py> = (Bound<'py, PyArray2<u32>>, Bound<'py, PyArray1<u32>>);

#[pyfunction]
#[pyo3(signature = (items, offsets, lengths, *, num_ranks, micro_steps, window, cost, seed))]
#[expect(clippy::too_many_arguments, reason = "they are named")]
pub fn balance_rows<'py>(
    items: PyReadonlyArray1<'py, u32>,
    offsets: PyReadonlyArray1<'py, i64>,
    lengths: Integers<'py>,
    num_ranks: usize,
    micro_steps: usize,
    window: usize,
    cost: (f64, f64),
    seed: u64,
) -> PyResult<Order<'py>> {
    let py = items.py();
    let options = Options { num_ranks, micro_steps, window, linear: cost.0, quadratic: cost.1, seed };
    let (items, offsets) = (items.as_slice()?, copied(&offsets)?);
    let order = match &lengths {
        Integers::I32(lengths) => run(py, items, &offsets, lengths.as_slice()?, options),
        Integers::U32(lengths) => run(py, items, &offsets, lengths.as_slice()?, options),
        Integers::I64(lengths) => run(py, items, &offsets, lengths.as_slice()?, options),
    }?;
    let num_micro_steps = order.rows.len() / num_ranks;
    Ok((order.rows.into_pyarray(py).reshape([num_micro_steps, num_ranks])?, order.left_over.into_pyarray(py)))
}

fn run<T: Copy + Into<i64> + Sync>(
    py: Python<'_>,
    items: &[u32],
    offsets: &[i64],
    lengths: &[T],
    options: Options,
) -> PyResult<balance::Order> {
    detached(py, items.len() + offsets.len(), |interrupt| {
        balance::balance(Ragged::new("plan.offsets", items, offsets)?, lengths, &options, interrupt)
    })
}
