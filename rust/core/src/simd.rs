//! Which vector instructions the kernels may use: what the processor has, unless `DASD_LITE_SIMD` asks for less.
//!
//! All levels give the same results to the bit; the tests compare them.

#![allow(unsafe_code, reason = "one prefetch")]

use std::sync::OnceLock;

/// A set of instructions that this processor has: only [`levels`] and `level` make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Instructions);

/// Sets of instructions, each with all of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Instructions {
    /// What every processor has.
    Portable,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, VL, BW and DQ.
    Avx512,
}

impl Level {
    pub(crate) fn instructions(self) -> Instructions {
        self.0
    }
}

/// All levels of this processor, for tests and benchmarks.
#[doc(hidden)]
#[must_use]
pub fn levels() -> Vec<Level> {
    let all = [Instructions::Portable, Instructions::Avx2, Instructions::Avx512];
    all.into_iter().filter(|&instructions| instructions <= best()).map(Level).collect()
}

/// The level to use: the highest, or that of the environment variable `DASD_LITE_SIMD` (`portable`, `avx2` or `avx512`)
/// at the first call, if the processor has it. Any other value is ignored: a library must not end a program over it.
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let asked = match std::env::var("DASD_LITE_SIMD").as_deref() {
            Ok("portable") => Instructions::Portable,
            Ok("avx2") => Instructions::Avx2,
            _ => Instructions::Avx512,
        };
        Level(asked.min(best()))
    })
}

/// Asks for a cache line that will be read soon; does nothing if the address is not mapped.
#[inline]
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "left to the processor"))]
pub(crate) fn prefetch<T>(address: *const T) {
    // SAFETY: every x86-64 processor has SSE; a prefetch of any address is allowed.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
}

#[cfg(target_arch = "x86_64")]
fn best() -> Instructions {
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    if has_avx512 {
        Instructions::Avx512
    } else if is_x86_feature_detected!("avx2") {
        Instructions::Avx2
    } else {
        Instructions::Portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn best() -> Instructions {
    Instructions::Portable
}
