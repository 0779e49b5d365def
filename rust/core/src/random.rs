//! A small generator of random numbers (splitmix64), the same on every platform.

use crate::error::Result;
use crate::interrupt::Interrupt;

/// A stream of numbers that depends on its seed alone.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The stream of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`, which is above 0; uniform but for one part in 2^64 / `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        let scaled = u128::from(self.next_u64()) * bound as u128;
        #[expect(clippy::cast_possible_truncation, reason = "below bound")]
        let below = (scaled >> 64) as usize;
        below
    }

    /// Puts the values into a random order.
    ///
    /// # Errors
    /// [`crate::Error::Interrupted`].
    pub fn shuffle<T>(&mut self, values: &mut [T], interrupt: &Interrupt) -> Result<()> {
        for last in (1..values.len()).rev() {
            interrupt.every(last)?;
            values.swap(last, self.below(last + 1));
        }
        Ok(())
    }
}
