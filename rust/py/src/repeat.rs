//! Front of `dasd_lite_core::repeat`.

use dasd_lite_core::Ragged;
use dasd_lite_core::repeat::{self, Repetition};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::boundary::{Integers, copied, detached};

type Counts<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);
type Shares<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>);

#[pyfunction]
pub fn repeated_ngrams<'py>(
    py: Python<'py>,
    ids: Integers<'py>,
    offsets: PyReadonlyArray1<'py, i64>,
    n: usize,
) -> PyResult<Counts<'py>> {
    let offsets = copied(&offsets)?;
    let repetition = match &ids {
        Integers::I32(ids) => run(py, ids.as_slice()?, &offsets, n),
        Integers::U32(ids) => run(py, ids.as_slice()?, &offsets, n),
        Integers::I64(_) => Err(PyTypeError::new_err("ids must be int32 or uint32")),
    }?;
    let (num_repeated, longest_stretch): (Vec<_>, Vec<_>) =
        repetition.iter().map(|one| (one.num_repeated, one.longest_stretch)).unzip();
    Ok((num_repeated.into_pyarray(py), longest_stretch.into_pyarray(py)))
}

fn run<I: Copy + Eq + Into<i64> + Sync>(
    py: Python<'_>,
    ids: &[I],
    offsets: &[i64],
    n: usize,
) -> PyResult<Vec<Repetition>> {
    detached(py, ids.len() + offsets.len(), |interrupt| {
        repeat::repeated_ngrams(Ragged::new("offsets", ids, offsets)?, n, interrupt)
    })
}

#[pyfunction]
pub fn text_repetition<'py>(
    text: PyReadonlyArray1<'py, u8>,
    offsets: PyReadonlyArray1<'py, i64>,
    ends: PyReadonlyArray1<'py, i64>,
    end_offsets: PyReadonlyArray1<'py, i64>,
) -> PyResult<Shares<'py>> {
    let py = text.py();
    let (text, offsets) = (text.as_slice()?, copied(&offsets)?);
    let (ends, end_offsets) = (ends.as_slice()?, copied(&end_offsets)?);
    let repetition = detached(py, text.len() + offsets.len(), |interrupt| {
        let (texts, ends) = (Ragged::new("offsets", text, &offsets)?, Ragged::new("end_offsets", ends, &end_offsets)?);
        repeat::text_repetition(texts, ends, interrupt)
    })?;
    let (lines, sentences): (Vec<_>, Vec<_>) = repetition.iter().map(|one| (one.lines, one.sentences)).unzip();
    Ok((lines.into_pyarray(py), sentences.into_pyarray(py)))
}
