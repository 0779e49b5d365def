//! Front of `dasd_lite_core::pack`.

use dasd_lite_core::pack::{Method, Options, Overlong};
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::boundary::{Integers, detached};

type PackedArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<u32>>, u64);

#[pyfunction]
#[pyo3(signature = (lengths, *, seq_len, alignment, method, drop_overlong))]
pub fn pack<'py>(
    py: Python<'py>,
    lengths: Integers<'py>,
    seq_len: u32,
    alignment: u32,
    method: &str,
    drop_overlong: bool,
) -> PyResult<PackedArrays<'py>> {
    let method = match method {
        "best_fit" => Method::BestFit,
        "tight" => Method::Tight,
        "in_order" => Method::InOrder,
        _ => {
            return Err(PyValueError::new_err(format!("method is '{method}'; it must be best_fit, tight or in_order")));
        }
    };
    let overlong = if drop_overlong { Overlong::Drop } else { Overlong::Error };
    let options = Options { seq_len, alignment, method, overlong };
    let plan = match &lengths {
        Integers::I32(lengths) => run(py, lengths.as_slice()?, options),
        Integers::U32(lengths) => run(py, lengths.as_slice()?, options),
        Integers::I64(lengths) => run(py, lengths.as_slice()?, options),
    }?;
    Ok((plan.items.into_pyarray(py), plan.offsets.into_pyarray(py), plan.dropped.into_pyarray(py), plan.num_tokens))
}

fn run<T: Copy + Into<i64> + Sync>(
    py: Python<'_>,
    lengths: &[T],
    options: Options,
) -> PyResult<dasd_lite_core::pack::Plan> {
    detached(py, lengths.len(), |interrupt| dasd_lite_core::pack::pack(lengths, &options, interrupt))
}
