//! The one way from Python into the core and back: releases the GIL, lets Ctrl-C through, and
//! turns the core's errors into Python's.

use std::panic::resume_unwind;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use dasd_lite_core::{Error, Interrupt, Result};
use pyo3::exceptions::{PyKeyboardInterrupt, PyValueError};
use pyo3::prelude::*;

mod errors {
    pyo3::import_exception!(dasd_lite.errors, DataError);
}

/// Work on fewer elements is over before a person could press Ctrl-C; it is not worth a thread.
const SMALL: usize = 1 << 16;

/// How often a waiting call looks for signals.
const POLL: Duration = Duration::from_millis(50);

/// Runs `work`, which touches about `num_elements`, without the GIL. When a signal handler raises (as that of
/// Ctrl-C does), the work is stopped and its exception returned.
pub fn detached<T: Send>(
    py: Python<'_>,
    num_elements: usize,
    work: impl FnOnce(&Interrupt) -> Result<T> + Send,
) -> PyResult<T> {
    let interrupt = Interrupt::new();
    if num_elements < SMALL {
        return py.detach(|| work(&interrupt)).map_err(to_python);
    }
    py.detach(|| {
        thread::scope(|scope| {
            let (done, waiting) = channel::<()>();
            let worker = scope.spawn(|| {
                // Dropped at the end, also that of a panic: wakes the waiting thread.
                let _done = done;
                work(&interrupt)
            });
            let mut raised = Ok(());
            while raised.is_ok() && waiting.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                raised = Python::attach(|py| {
                    py.check_signals()?;
                    Ok(())
                });
            }
            if raised.is_err() {
                interrupt.raise();
            }
            let result = worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            raised.and_then(|()| result.map_err(to_python))
        })
    })
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
