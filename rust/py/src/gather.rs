//! Front of `dasd_lite_core::gather`.

use dasd_lite_core::Ragged;
use dasd_lite_core::gather::{self, Buffers, Source, TokenId};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::boundary::{Integers, copied, detached};

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
    let (offsets, item_offsets) = (copied(&offsets)?, copied(&item_offsets)?);
    let (items, rows) = (items.as_slice()?, rows.as_slice()?);
    let layout = detached(py, items.len() + rows.len(), |interrupt| {
        let items = Ragged::new("plan.offsets", items, &item_offsets)?;
        gather::layout(&offsets, items, rows, seq_len, alignment, interrupt)
    })?;
    Ok((layout.sequences.into_pyarray(py), layout.cu_seqlens.into_pyarray(py), layout.row_offsets.into_pyarray(py)))
}

#[pyfunction]
#[pyo3(signature = (tokens, offsets, loss_mask, sequences, cu_seqlens, *, pad_id, ids, position_ids, labels, reused))]
#[expect(clippy::too_many_arguments, reason = "they are named")]
pub fn gather_rows<'py>(
    py: Python<'py>,
    tokens: Integers<'py>,
    offsets: PyReadonlyArray1<'py, i64>,
    loss_mask: Option<PyReadonlyArray1<'py, u8>>,
    sequences: PyReadonlyArray1<'py, u32>,
    cu_seqlens: PyReadonlyArray1<'py, i32>,
    pad_id: i32,
    mut ids: PyReadwriteArray1<'py, i32>,
    mut position_ids: Option<PyReadwriteArray1<'py, i32>>,
    mut labels: Option<PyReadwriteArray1<'py, i32>>,
    reused: bool,
) -> PyResult<()> {
    let offsets = copied(&offsets)?;
    let loss_mask = loss_mask.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let layout = (sequences.as_slice()?, cu_seqlens.as_slice()?);
    let ids = ids.as_slice_mut()?;
    let position_ids = position_ids.as_mut().map(PyReadwriteArray1::as_slice_mut).transpose()?;
    let labels = labels.as_mut().map(PyReadwriteArray1::as_slice_mut).transpose()?;
    let buffers = Buffers { ids, position_ids, labels, reused };
    match &tokens {
        Integers::I32(tokens) => run(py, tokens.as_slice()?, &offsets, loss_mask, layout, pad_id, buffers),
        Integers::U32(tokens) => run(py, tokens.as_slice()?, &offsets, loss_mask, layout, pad_id, buffers),
        Integers::I64(_) => Err(PyTypeError::new_err("tokens must be int32 or uint32")),
    }
}

fn run(
    py: Python<'_>,
    tokens: &[impl TokenId],
    offsets: &[i64],
    loss_mask: Option<&[u8]>,
    (sequences, cu_seqlens): (&[u32], &[i32]),
    pad_id: i32,
    buffers: Buffers<'_>,
) -> PyResult<()> {
    detached(py, buffers.ids.len() + offsets.len(), |interrupt| {
        let source = Source { tokens: Ragged::new("offsets", tokens, offsets)?, loss_mask };
        gather::gather(&source, sequences, cu_seqlens, pad_id, buffers, interrupt)
    })
}
