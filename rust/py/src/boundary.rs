//! The one way from Python into the core and back: releases the GIL, lets Ctrl-C through, and turns the core's errors
//! into Python's.
//!
//! Without the GIL, other threads may write to the arrays of a call. So what the core uses as an index is either a copy
//! ([`copied`]) or checked where it is used, and whatever panics nevertheless becomes an exception with one line.

use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dasd_lite_core::{Error, Interrupt, Result};
use numpy::{Element, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

pub mod errors {
    //! The errors of `dasd_lite.errors`.
    pyo3::import_exception!(dasd_lite.errors, ConfigError);
    pyo3::import_exception!(dasd_lite.errors, DataError);
}

/// Work on fewer elements is done before a person could press Ctrl-C; it is not worth another thread.
const SMALL: usize = 1 << 16;

/// How often a waiting call checks for signals.
const POLL: Duration = Duration::from_millis(50);

/// A column of integers as the caller has it.
pub enum Integers<'py> {
    /// int32.
    I32(PyReadonlyArray1<'py, i32>),
    /// uint32.
    U32(PyReadonlyArray1<'py, u32>),
    /// int64.
    I64(PyReadonlyArray1<'py, i64>),
}

// By hand, because the derived one describes each failed attempt, and what describes a dtype handles signals.
impl<'py> FromPyObject<'_, 'py> for Integers<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.extract() {
            return Ok(Self::I32(array));
        }
        if let Ok(array) = object.extract() {
            return Ok(Self::U32(array));
        }
        Ok(Self::I64(object.extract()?))
    }
}

/// What the last panic said, on whichever thread.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// Keeps what Rust writes to standard error about a panic for the exception that it becomes. The hook is that of this
/// library alone.
pub fn keep_panics() {
    panic::set_hook(Box::new(|info| {
        let line = info.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = line;
    }));
}

/// Runs `work`; if it panics, returns what the panic said. Nothing that a panic may leave half done is used afterwards.
pub fn caught<T>(work: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// Copies offsets, of which there are few compared with the values.
pub fn copied<T: Element + Copy>(array: &PyReadonlyArray1<'_, T>) -> PyResult<Vec<T>> {
    Ok(array.as_slice()?.to_vec())
}

/// Runs `work`, which touches about `num_elements`, without the GIL, on the pool's threads if it is worth it. When a
/// signal handler raises an exception (as that of Ctrl-C does), the work is stopped and the exception returned.
pub fn detached<T: Send>(
    py: Python<'_>,
    num_elements: usize,
    work: impl FnOnce(&Interrupt) -> Result<T> + Send,
) -> PyResult<T> {
    let interrupt = Interrupt::new();
    let work = || caught(|| work(&interrupt)).map_err(panicked)?.map_err(to_python);
    if num_elements < SMALL {
        return py.detach(work);
    }
    py.detach(|| {
        let (done, waiting) = channel();
        pool()?.in_place_scope(|scope| {
            scope.spawn(move |_| drop(done.send(work())));
            loop {
                match waiting.recv_timeout(POLL) {
                    Ok(result) => return result,
                    Err(RecvTimeoutError::Disconnected) => return Err(panicked("a thread ended".to_owned())),
                    Err(RecvTimeoutError::Timeout) => {
                        #[expect(clippy::redundant_closure_for_method_calls, reason = "the method is of one lifetime")]
                        Python::attach(|py| py.check_signals()).inspect_err(|_| interrupt.raise())?;
                    }
                }
            }
        })
    })
}

/// The threads of this process: as many as cores, or `RAYON_NUM_THREADS`. A forked process builds its own pool, because
/// threads do not survive a fork; the old pool is leaked.
fn pool() -> PyResult<&'static ThreadPool> {
    static POOL: Mutex<Option<(u32, &'static ThreadPool)>> = Mutex::new(None);
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    match *pool {
        Some((owner, threads)) if owner == process => Ok(threads),
        _ => {
            let built = ThreadPoolBuilder::new().thread_name(|index| format!("dasd-lite-{index}")).build();
            let threads = built.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
            Ok(pool.insert((process, Box::leak(Box::new(threads)))).1)
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn panicked(what: String) -> PyErr {
    errors::DataError::new_err(format!(
        "an array changed during the call, or this is a defect of dasd-lite ({what}); do not write to arrays that \
         another thread is reading"
    ))
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Argument { .. } => PyValueError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        _ => errors::DataError::new_err(message),
    }
}
