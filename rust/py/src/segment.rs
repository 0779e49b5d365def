//! Front of `dasd_lite_core::segment`.

use dasd_lite_core::{Ragged, segment};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::boundary::{copied, detached};

type Ends<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

#[pyfunction]
pub fn sentence_ends<'py>(text: PyReadonlyArray1<'py, u8>, offsets: PyReadonlyArray1<'py, i64>) -> PyResult<Ends<'py>> {
    let py = text.py();
    let (text, offsets) = (text.as_slice()?, copied(&offsets)?);
    let (ends, end_offsets) = detached(py, text.len() + offsets.len(), |interrupt| {
        segment::sentence_ends(Ragged::new("offsets", text, &offsets)?, interrupt)
    })?;
    Ok((ends.into_pyarray(py), end_offsets.into_pyarray(py)))
}
