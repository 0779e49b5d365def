//! Lower bounds for any program on one core: a counting sort, a copy, a pass over memory, a sort, a search for a byte.

use std::hint::black_box;
use std::path::Path;

use bytemuck::cast_slice;
use memmap2::{Advice, MmapMut};

use crate::{Measured, best, npy};

/// Indices in order of length: count, sum, scatter. Any packer that takes the longest first needs at least this.
pub fn counting_sort(lengths: &[u32], longest: usize) -> Vec<u32> {
    let mut starts = vec![0_u32; longest + 2];
    for &length in lengths {
        starts[length as usize + 1] += 1;
    }
    let mut sum = 0;
    for start in &mut starts {
        sum += *start;
        *start = sum;
    }
    let mut sorted = vec![0_u32; lengths.len()];
    for (index, &length) in (0_u32..).zip(lengths) {
        let start = &mut starts[length as usize];
        sorted[*start as usize] = index;
        *start += 1;
    }
    sorted
}

/// Copies into memory that was written before, into fresh memory, and piece by piece into one small buffer.
pub fn copy(num_bytes: usize, piece: usize) -> Vec<Measured> {
    let mut source = fresh(num_bytes, true);
    source.fill(1);
    let mut target = fresh(num_bytes, true);
    let touched = best(6, || black_box(&mut target[..]).copy_from_slice(black_box(&source)));
    drop(target);
    let new = |huge| {
        best(3, || {
            let mut target = fresh(num_bytes, huge);
            target.copy_from_slice(black_box(&source));
            target
        })
    };
    let mut buffer = fresh(piece, true);
    let pieces = best(5, || {
        for part in source.chunks(piece) {
            black_box(&mut buffer)[..part.len()].copy_from_slice(part);
        }
    });
    vec![
        Measured::new("memcpy, touched", touched),
        Measured::new("memcpy, fresh", new(true)),
        Measured::new("memcpy, fresh, small pages", new(false)),
        Measured::new("memcpy, in pieces", pieces),
    ]
}

/// Memory that the system maps page by page on the first write; in huge pages if available, as numpy requests them.
fn fresh(num_bytes: usize, huge: bool) -> MmapMut {
    let memory = MmapMut::map_anon(num_bytes).expect("memory");
    // A system without huge pages refuses; small pages are its limit then.
    let _ = memory.advise(if huge { Advice::HugePage } else { Advice::NoHugePage });
    memory
}

/// Adds the 32-bit values of all files, from front to back or as several streams at once, whichever is faster here.
pub fn read(files: &[&str]) -> Vec<Measured> {
    let columns: Vec<MmapMut> = files.iter().map(|file| column(file)).collect();
    let add =
        |streams| best(5, || columns.iter().map(|bytes| sum(cast_slice(bytes), streams)).fold(0, u32::wrapping_add));
    let seconds = [1, 2, 4, 8, 16].map(add);
    vec![Measured::new("memory read", seconds.into_iter().min().expect("some"))]
}

fn column(file: &str) -> MmapMut {
    let values: Vec<u32> = npy::read(Path::new(file));
    let mut memory = fresh(size_of_val(&values[..]), true);
    memory.copy_from_slice(cast_slice(&values));
    memory
}

/// The wrapping sum. Reads `streams` parts of the values in turn, which keeps more of the memory busy.
fn sum(values: &[u32], streams: usize) -> u32 {
    let (blocks, rest) = values.as_chunks::<64>();
    let length = blocks.len() / streams;
    let mut sums = [0_u32; 64];
    let mut add = |block: &[u32; 64]| {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*value);
        }
    };
    for index in 0..length {
        (0..streams).for_each(|stream| add(&blocks[stream * length + index]));
    }
    blocks[streams * length..].iter().for_each(&mut add);
    sums.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

/// Sorts 64-bit keys.
pub fn sort(keys: &[u64]) -> Vec<Measured> {
    let mut copy = keys.to_vec();
    let seconds = best(7, || {
        copy.copy_from_slice(keys);
        copy.sort_unstable();
    });
    vec![Measured::new("sort of the keys", seconds)]
}

/// Counts the periods of a text at the speed of vector comparisons.
pub fn find(text: &[u8]) -> Vec<Measured> {
    let count = || memchr::memchr_iter(b'.', text).count();
    let each = || memchr::memchr_iter(b'.', text).fold(0_usize, |sum, position| sum ^ position);
    vec![Measured::new("memchr, counted", best(5, count)), Measured::new("memchr, every position", best(5, each))]
}
