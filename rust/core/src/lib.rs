//! The computing core of dasd-lite. Columns come in as flat slices with 64-bit offsets ([`Ragged`]) and go out as
//! vectors. Every error names an index and a value, every long loop can be stopped by an [`Interrupt`], and the number
//! of threads changes no byte. Nothing here knows Python.
//!
//! From texts and log-probabilities to the classes of their sentences:
//!
//! ```
//! use dasd_lite_core::{Interrupt, Ragged, segment, stats};
//!
//! let interrupt = Interrupt::new();
//! let text = "Is it prime? Yes.";
//! let texts = Ragged::new("offsets", text.as_bytes(), &[0, 17])?;
//! let (ends, end_offsets) = segment::sentence_ends(texts, &interrupt)?;
//! assert_eq!(ends, [13, 17]);
//!
//! // Both models have the same 4 tokens: `Is it`, ` prime`, `?`, ` Yes.`, whose space ends the first sentence.
//! let token_bytes = Ragged::new("token_offsets", &[5, 6, 1, 5], &[0, 4])?;
//! let ends = Ragged::new("end_offsets", &ends, &end_offsets)?;
//! let spans = stats::sentence_spans(texts, token_bytes, ends, None, &interrupt)?;
//! assert_eq!(spans, [0, 3, 4]);
//!
//! let teacher = Ragged::new("teacher_spans", &[-0.1_f32, -0.2, -0.3, -0.1], &spans)?;
//! let student = Ragged::new("student_spans", &[-0.1_f32, -0.2, -0.3, -2.0], &spans)?;
//! let stats = stats::sentence_stats(teacher, student, &end_offsets, 0.1, &interrupt)?;
//! assert_eq!(stats.counts, [1, 1, 0], "one Shared sentence, one Teacher sentence");
//! # Ok::<(), dasd_lite_core::Error>(())
//! ```
#![deny(unsafe_code)]
#![deny(missing_docs)]

mod abbreviation;
pub mod balance;
mod best_fit;
pub mod class;
pub mod error;
pub mod gather;
mod int_set;
pub mod interrupt;
mod nontemporal;
pub mod pack;
mod parallel;
pub mod ragged;
pub mod random;
pub mod repeat;
pub mod segment;
mod sentence_kernel;
pub mod simd;
pub mod stats;
mod stretch;
mod tight;
pub mod toml;

pub use error::{Error, Result};
pub use interrupt::Interrupt;
pub use ragged::Ragged;
