//! Non-temporal stores: large buffers are filled past the cache. An ordinary store first reads the cache line that it
//! overwrites, which doubles the traffic for a buffer that is read much later. Small buffers are better left in the
//! cache.
#![allow(unsafe_code, reason = "a view as lines and the stores, each with its argument; the portable twin is a loop")]

use crate::simd::Level;

/// Smaller buffers are written through the cache.
pub(crate) const MIN_BYTES: usize = 32 << 20;

/// Elements of a cache line.
pub(crate) const WIDTH: usize = 16;

/// Strips that are written in turn: a processor reads ahead in each page separately.
const STRIPS: usize = 4;

/// Lines of a strip, at most: a page.
const STRIP: usize = 64;

/// A cache line.
#[repr(C, align(64))]
struct Line([i32; WIDTH]);

/// Writes `value(i)` to `to[i]` for each `i`; `values(i)` are the [`WIDTH`] values from `i` on. With the instructions of
/// a level it writes past the cache, with `None` through it.
#[inline]
pub(crate) fn fill(
    to: &mut [i32],
    past_cache: Option<Level>,
    value: impl Fn(usize) -> i32,
    values: impl Fn(usize) -> [i32; WIDTH],
) {
    // SAFETY: a `Line` is 16 `i32`s without padding, every bit pattern of which is valid.
    let (head, lines, tail) = unsafe { to.align_to_mut::<Line>() };
    for (index, to) in head.iter_mut().enumerate() {
        *to = value(index);
    }
    for (index, to) in (head.len() + WIDTH * lines.len()..).zip(tail) {
        *to = value(index);
    }
    let first = head.len();
    let values = |line: usize| values(first + WIDTH * line);
    if let Some(level) = past_cache {
        fill_past_cache(level, lines, values);
    } else {
        for (number, line) in lines.iter_mut().enumerate() {
            line.0 = values(number);
        }
    }
}

/// The [`WIDTH`] elements from `index` on.
#[inline]
pub(crate) fn at<T: Copy>(values: &[T], index: usize) -> [T; WIDTH] {
    values[index..index + WIDTH].try_into().expect("as many elements as asked for")
}

/// Writes every line, [`STRIPS`] strips in turn.
#[inline]
fn write_all(lines: &mut [Line], values: impl Fn(usize) -> [i32; WIDTH], write: impl Fn(&mut Line, [i32; WIDTH])) {
    let mut first = 0;
    for block in lines.chunks_mut(STRIPS * STRIP) {
        let strip = block.len() / STRIPS;
        for line in 0..strip {
            for number in 0..STRIPS {
                let line = number * strip + line;
                write(&mut block[line], values(first + line));
            }
        }
        for (line, to) in block.iter_mut().enumerate().skip(STRIPS * strip) {
            write(to, values(first + line));
        }
        first += block.len();
    }
}

#[cfg(target_arch = "x86_64")]
fn fill_past_cache(level: Level, lines: &mut [Line], values: impl Fn(usize) -> [i32; WIDTH]) {
    use std::arch::x86_64::{
        __m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128, _mm512_loadu_si512, _mm512_stream_si512,
    };

    use crate::simd::Instructions;

    #[target_feature(enable = "avx512f")]
    fn with_avx512(lines: &mut [Line], values: impl Fn(usize) -> [i32; WIDTH]) {
        // SAFETY: both are 64 bytes, and a line is aligned to them; the fence below orders the stores.
        write_all(lines, values, |line, values| unsafe {
            _mm512_stream_si512((&raw mut *line).cast(), _mm512_loadu_si512(values.as_ptr().cast()));
        });
    }

    if level.instructions() == Instructions::Avx512 {
        // SAFETY: the processor has it.
        unsafe { with_avx512(lines, values) };
    } else {
        write_all(lines, values, |line, values| {
            #[expect(clippy::cast_ptr_alignment, reason = "loaded as unaligned")]
            let from = values.as_ptr().cast::<__m128i>();
            let to = (&raw mut *line).cast::<__m128i>();
            for quarter in 0..4 {
                // SAFETY: every x86-64 processor has SSE2; both are four quarters of 16 bytes, and a line is aligned to
                // them; the fence below orders the stores.
                unsafe { _mm_stream_si128(to.add(quarter), _mm_loadu_si128(from.add(quarter))) };
            }
        });
    }
    // SAFETY: every x86-64 processor has SSE. Whatever follows, on any thread, comes after these stores.
    unsafe { _mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
fn fill_past_cache(_: Level, lines: &mut [Line], values: impl Fn(usize) -> [i32; WIDTH]) {
    write_all(lines, values, |line, values| line.0 = values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::levels;

    #[test]
    fn past_the_cache_the_same_is_written() {
        for (start, len) in [(0, 0), (0, 1), (3, 12), (0, 16), (1, 100), (15, 1000), (5, 4096), (1, 20_000)] {
            let mut plain = vec![0; start + len];
            let value = |index| i32::try_from(7 * index).unwrap() - 50;
            let values = |index| std::array::from_fn(|next| value(index + next));
            fill(&mut plain[start..], None, value, values);
            for level in levels() {
                let mut streamed = vec![0; start + len];
                fill(&mut streamed[start..], Some(level), value, values);
                assert_eq!(plain, streamed, "{level:?}");
            }
            assert!(plain[start..].iter().copied().eq((0..len).map(value)));
        }
    }
}
