//! A flag by which one thread asks the work of others to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Steps of a loop between two checks: a few milliseconds even if every step misses the cache.
pub(crate) const INTERVAL: usize = 1 << 16;

/// Once raised, the next check fails on all threads.
#[derive(Debug, Default)]
pub struct Interrupt(AtomicBool);

impl Interrupt {
    /// A lowered flag.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Asks the work to stop.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Costs one relaxed load; long work calls it at least every few milliseconds.
    ///
    /// # Errors
    /// [`Error::Interrupted`] once the flag is raised.
    #[inline]
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// [`Interrupt::check`] once in [`INTERVAL`] steps of a loop.
    #[inline]
    pub(crate) fn every(&self, step: usize) -> Result<()> {
        if step.is_multiple_of(INTERVAL) { self.check() } else { Ok(()) }
    }
}
