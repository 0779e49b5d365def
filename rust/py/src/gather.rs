//! Front of `dasd_lite_core::gather`.

use dasd_lite_core::Ragged;
use dasd_lite_core::gather::{self, Buffers, Source};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::boundary::detached;

type Layout<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

#[pyfunction]
#[pyo3(signature = (offsets, items, item_offsets, rows, *, seq_len, alignment))]
pub fn gather_layout<'py>(
    offsets: PyReadonlyArray1<'py, i64>,
    items: PyReadonlyArray1<'py, u32>,
    item_offsets: PyReadonlyArray1<'py, i64>,
    rows: PyReadonlyArray1<'py, i64>,
    seq_len: u32,
    alignment: u32,
) -> PyResult<Layout<'py>> {
    let py = offsets.py();
    let (offsets, rows) = (offsets.as_slice()?, rows.as_slice()?);
    let (items, item_offsets) = (items.as_slice()?, item_offsets.as_slice()?);
    let found = detached(py, items.len() + rows.len(), |interrupt| {
        let items = Ragged::new("plan.offsets", items, item_offsets)?;
        gather::layout(offsets, items, rows, seq_len, alignment, interrupt)
    })?;
    Ok((found.sequences.into_pyarray(py), found.cu_seqlens.into_pyarray(py), found.row_offsets.into_pyarray(py)))
}

#[pyfunction]
#[pyo3(signature = (tokens, offsets, loss_mask, sequences, cu_seqlens, *, pad_id, check, reused, ids, position_ids, labels))]
#[expect(clippy::too_many_arguments, reason = "they are named")]
pub fn gather_rows<'py>(
    tokens: PyReadonlyArray1<'py, i32>,
    offsets: PyReadonlyArray1<'py, i64>,
    loss_mask: Option<PyReadonlyArray1<'py, u8>>,
    sequences: PyReadonlyArray1<'py, u32>,
    cu_seqlens: PyReadonlyArray1<'py, i32>,
    pad_id: i32,
    check: bool,
    reused: bool,
    mut ids: PyReadwriteArray1<'py, i32>,
    mut position_ids: Option<PyReadwriteArray1<'py, i32>>,
    mut labels: Option<PyReadwriteArray1<'py, i32>>,
) -> PyResult<()> {
    let py = tokens.py();
    let (tokens, offsets) = (tokens.as_slice()?, offsets.as_slice()?);
    let loss_mask = loss_mask.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let (sequences, cu_seqlens) = (sequences.as_slice()?, cu_seqlens.as_slice()?);
    let ids = ids.as_slice_mut()?;
    let position_ids = position_ids.as_mut().map(PyReadwriteArray1::as_slice_mut).transpose()?;
    let labels = labels.as_mut().map(PyReadwriteArray1::as_slice_mut).transpose()?;
    detached(py, ids.len() + offsets.len(), |interrupt| {
        let source = Source { tokens: Ragged::new("offsets", tokens, offsets)?, loss_mask, check };
        gather::gather(&source, sequences, cu_seqlens, pad_id, Buffers { ids, position_ids, labels, reused }, interrupt)
    })
}
