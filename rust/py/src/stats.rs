//! Front of `dasd_lite_core::stats`.

use dasd_lite_core::class::NUM_CLASSES;
use dasd_lite_core::{Ragged, stats};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::boundary::{copied, detached};

#[pyfunction]
#[pyo3(signature = (text, text_offsets, token_bytes, token_offsets, ends, end_offsets, first_bytes))]
pub fn sentence_spans<'py>(
    text: PyReadonlyArray1<'py, u8>,
    text_offsets: PyReadonlyArray1<'py, i64>,
    token_bytes: PyReadonlyArray1<'py, i32>,
    token_offsets: PyReadonlyArray1<'py, i64>,
    ends: PyReadonlyArray1<'py, i64>,
    end_offsets: PyReadonlyArray1<'py, i64>,
    first_bytes: Option<PyReadonlyArray1<'py, i64>>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let py = token_bytes.py();
    let (text, text_offsets) = (text.as_slice()?, copied(&text_offsets)?);
    let (token_bytes, token_offsets) = (token_bytes.as_slice()?, copied(&token_offsets)?);
    let (ends, end_offsets) = (ends.as_slice()?, copied(&end_offsets)?);
    let first_bytes = first_bytes.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let spans = detached(py, token_bytes.len() + ends.len() + token_offsets.len(), |interrupt| {
        let texts = Ragged::new("text_offsets", text, &text_offsets)?;
        let token_bytes = Ragged::new("token_offsets", token_bytes, &token_offsets)?;
        let ends = Ragged::new("end_offsets", ends, &end_offsets)?;
        stats::sentence_spans(texts, token_bytes, ends, first_bytes, interrupt)
    })?;
    Ok(spans.into_pyarray(py))
}

type Stats<'py> =
    (Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<i8>>, Bound<'py, PyArray2<i64>>);

#[pyfunction]
pub fn sentence_stats<'py>(
    teacher_logprobs: PyReadonlyArray1<'py, f32>,
    teacher_spans: PyReadonlyArray1<'py, i64>,
    student_logprobs: PyReadonlyArray1<'py, f32>,
    student_spans: PyReadonlyArray1<'py, i64>,
    response_offsets: PyReadonlyArray1<'py, i64>,
    beta: f64,
) -> PyResult<Stats<'py>> {
    let py = teacher_logprobs.py();
    let (teacher_logprobs, teacher_spans) = (teacher_logprobs.as_slice()?, teacher_spans.as_slice()?);
    let (student_logprobs, student_spans) = (student_logprobs.as_slice()?, student_spans.as_slice()?);
    let response_offsets = copied(&response_offsets)?;
    let num_elements = teacher_logprobs.len() + student_logprobs.len() + teacher_spans.len() + response_offsets.len();
    let stats = detached(py, num_elements, |interrupt| {
        let teacher = Ragged::new("teacher_spans", teacher_logprobs, teacher_spans)?;
        let student = Ragged::new("student_spans", student_logprobs, student_spans)?;
        stats::sentence_stats(teacher, student, &response_offsets, beta, interrupt)
    })?;
    let counts = stats.counts.into_pyarray(py).reshape([response_offsets.len() - 1, NUM_CLASSES])?;
    Ok((stats.p_teacher.into_pyarray(py), stats.p_student.into_pyarray(py), stats.classes.into_pyarray(py), counts))
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
    let (classes, offsets) = (classes.as_slice()?, copied(&offsets)?);
    let counts = detached(py, classes.len() + offsets.len(), |interrupt| {
        stats::class_counts(Ragged::new("offsets", classes, &offsets)?, interrupt)
    })?;
    counts.into_pyarray(py).reshape([offsets.len() - 1, NUM_CLASSES])
}
