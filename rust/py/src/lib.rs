//! The extension module `dasd_lite._rust`: thin fronts of `dasd-lite-core` for numpy arrays.
//! `python/dasd_lite/_rust.pyi` documents what Python sees.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![allow(clippy::needless_pass_by_value, reason = "functions for Python own their arguments")]

mod balance;
mod boundary;
mod gather;
mod pack;
mod repeat;
mod segment;
mod stats;
mod toml;

/// The Rust core; use `dasd_lite.method`.
#[pyo3::pymodule]
mod _rust {
    use numpy::PyArray1;
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::balance::balance_rows;
    #[pymodule_export]
    use crate::gather::{gather_layout, gather_rows};
    #[pymodule_export]
    use crate::pack::pack;
    #[pymodule_export]
    use crate::repeat::{repeated_ngrams, text_repetition};
    #[pymodule_export]
    use crate::segment::sentence_ends;
    #[pymodule_export]
    use crate::stats::{class_counts, classify, sentence_spans, sentence_stats};
    #[pymodule_export]
    use crate::toml::parse_toml;

    /// Keeps panics off standard error, and loads numpy's C API now: a signal handler that raises while a call loads it
    /// would be a panic.
    #[pymodule_init]
    #[expect(clippy::unnecessary_wraps, reason = "the form that pyo3 asks for")]
    fn prepare(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::boundary::keep_panics();
        drop(PyArray1::<u8>::zeros(module.py(), 0, false));
        Ok(())
    }
}
