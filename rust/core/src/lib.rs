//! The computing core of dasd-lite. Columns come in as flat slices with 64-bit offsets
//! ([`ragged::Ragged`]) and go out as vectors; every error names an index and a value; every
//! long loop can be stopped by an [`interrupt::Interrupt`]. Nothing here knows of Python.
#![deny(unsafe_code)]
#![deny(missing_docs)]

pub mod balance;
mod best_fit;
pub mod distribution;
pub mod error;
pub mod gather;
mod int_set;
pub mod interrupt;
pub mod pack;
mod parallel;
pub mod ragged;
pub mod random;
pub mod repeat;
pub mod segment;
mod sentence_kernel;
pub mod simd;
pub mod stats;
mod stream;
mod tight;
pub mod toml;

pub use error::{Error, Result};
pub use interrupt::Interrupt;
pub use ragged::Ragged;
