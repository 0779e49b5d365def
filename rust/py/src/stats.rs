//! Front of `dasd_lite_core::stats`.

use dasd_lite_core::stats::{self, NUM_CLASSES};
use dasd_lite_core::{Ragged, Result};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::boundary::detached;

#[derive(FromPyObject)]
pub enum TokenBytes<'py> {
    I32(PyReadonlyArray1<'py, i32>),
    U16(PyReadonlyArray1<'py, u16>),
}

type Means<'py> = (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<i32>>);

#[pyfunction]
pub fn sentence_logprobs<'py>(
    py: Python<'py>,
    logprobs: PyReadonlyArray1<'py, f32>,
    token_bytes: TokenBytes<'py>,
    token_offsets: PyReadonlyArray1<'py, i64>,
    ends: PyReadonlyArray1<'py, i64>,
    end_offsets: PyReadonlyArray1<'py, i64>,
) -> PyResult<Means<'py>> {
    let (logprobs, token_offsets) = (logprobs.as_slice()?, token_offsets.as_slice()?);
    let (ends, end_offsets) = (ends.as_slice()?, end_offsets.as_slice()?);
    let columns = || -> Result<_> {
        Ok((Ragged::new("token_offsets", logprobs, token_offsets)?, Ragged::new("end_offsets", ends, end_offsets)?))
    };
    let num_elements = logprobs.len() + ends.len() + token_offsets.len();
    let (means, counts) = match &token_bytes {
        TokenBytes::I32(token_bytes) => {
            let token_bytes = token_bytes.as_slice()?;
            detached(py, num_elements, |interrupt| {
                let (logprobs, ends) = columns()?;
                stats::sentence_logprobs(logprobs, token_bytes, ends, interrupt)
            })
        }
        TokenBytes::U16(token_bytes) => {
            let token_bytes = token_bytes.as_slice()?;
            detached(py, num_elements, |interrupt| {
                let (logprobs, ends) = columns()?;
                stats::sentence_logprobs(logprobs, token_bytes, ends, interrupt)
            })
        }
    }?;
    Ok((means.into_pyarray(py), counts.into_pyarray(py)))
}

#[pyfunction]
pub fn classify<'py>(
    p_teacher: PyReadonlyArray1<'py, f32>,
    p_student: PyReadonlyArray1<'py, f32>,
    beta: f64,
) -> PyResult<Bound<'py, PyArray1<i8>>> {
    let py = p_teacher.py();
    let (p_teacher, p_student) = (p_teacher.as_slice()?, p_student.as_slice()?);
    let classes = detached(py, p_teacher.len(), |interrupt| stats::classify(p_teacher, p_student, beta, interrupt))?;
    Ok(classes.into_pyarray(py))
}

#[pyfunction]
pub fn class_counts<'py>(
    classes: PyReadonlyArray1<'py, i8>,
    offsets: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let py = classes.py();
    let (classes, offsets) = (classes.as_slice()?, offsets.as_slice()?);
    let counts = detached(py, classes.len() + offsets.len(), |interrupt| {
        stats::class_counts(Ragged::new("offsets", classes, offsets)?, interrupt)
    })?;
    counts.into_pyarray(py).reshape([offsets.len() - 1, NUM_CLASSES])
}

#[pyfunction]
pub fn logprob_histogram(
    logprobs: PyReadonlyArray1<'_, f32>,
    num_bins: u32,
    low: f64,
) -> PyResult<Bound<'_, PyArray1<i64>>> {
    let py = logprobs.py();
    let logprobs = logprobs.as_slice()?;
    let counts =
        detached(py, logprobs.len(), |interrupt| stats::logprob_histogram(logprobs, num_bins, low, interrupt))?;
    Ok(counts.into_pyarray(py))
}

#[pyfunction]
pub fn quantiles<'py>(
    values: PyReadonlyArray1<'py, f32>,
    q: PyReadonlyArray1<'py, f64>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let py = values.py();
    let (values, q) = (values.as_slice()?, q.as_slice()?);
    let quantiles = detached(py, values.len(), |interrupt| stats::quantiles(values, q, interrupt))?;
    Ok(quantiles.into_pyarray(py))
}
