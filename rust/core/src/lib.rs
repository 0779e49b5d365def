//! The computing core of dasd-lite. Columns come in as flat slices with 64-bit offsets
//! ([`ragged::Ragged`]) and go out as vectors; every error names an index and a value; every
//! long loop can be stopped by an [`interrupt::Interrupt`]. Nothing here knows of Python.
#![deny(unsafe_code)]
#![deny(missing_docs)]

pub mod error;
pub mod interrupt;
pub mod pack;
#[allow(dead_code, reason = "its users follow")]
mod parallel;
pub mod ragged;
pub mod repeat;
pub mod segment;
mod spaces;
pub mod stats;

pub use error::{Error, Result};
pub use interrupt::Interrupt;
pub use ragged::Ragged;
