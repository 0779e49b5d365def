//! Peers of the benchmarks outside of Python: the crate seqpacker, and the physical limits of one core.
//!
//! ```text
//! native-limits pack LENGTHS.npy SEQ_LEN            seqpacker's strategies, and a counting sort
//! native-limits sort-lengths LENGTHS.npy SEQ_LEN    the counting sort alone
//! native-limits copy NUM_BYTES PIECE_BYTES          memory copied into touched memory, into fresh memory, and in pieces
//! native-limits read FILE.npy…                      the sum of 32-bit values
//! native-limits sort FILE.npy                       a sort of 64-bit keys
//! native-limits find FILE                           a count of periods
//! ```
//!
//! Prints one JSON object with a line per measurement: the shortest time of several runs in seconds.

mod limits;
mod npy;

use std::env;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use seqpacker::algorithms::optimized_best_fit_decreasing::optimized_best_fit_decreasing_lengths;
use seqpacker::{PackStrategy, Packer};

/// One measurement: its name, the time of the best run, and the number of rows if there are any.
pub struct Measured {
    name: String,
    best: Duration,
    rows: Option<usize>,
}

impl Measured {
    fn new(name: impl Into<String>, best: Duration) -> Self {
        Self { name: name.into(), best, rows: None }
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let measured = match arguments.as_slice() {
        ["pack", lengths, seq_len] => pack(&npy::read(Path::new(lengths)), number(seq_len)),
        ["sort-lengths", lengths, seq_len] => vec![counting_sort(&npy::read(Path::new(lengths)), number(seq_len))],
        ["copy", bytes, piece] => limits::copy(number(bytes), number(piece)),
        ["read", files @ ..] if !files.is_empty() => limits::read(files),
        ["sort", file] => limits::sort(&npy::read(Path::new(file))),
        ["find", file] => limits::find(&std::fs::read(file).expect("a text file")),
        _ => panic!("unknown arguments; the first lines of main.rs list the commands"),
    };
    let lines: Vec<String> = measured.iter().map(line).collect();
    println!("{{{}}}", lines.join(",\n "));
}

/// seqpacker's decreasing strategies, its function for bare lengths, and the counting sort that they all start with.
fn pack(lengths: &[u32], seq_len: usize) -> Vec<Measured> {
    let wide: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    let mut measured = vec![counting_sort(lengths, seq_len)];
    let bare = || optimized_best_fit_decreasing_lengths(&wide, seq_len).expect("lengths that fit").len();
    measured.push(Measured { rows: Some(bare()), ..Measured::new("seqpacker OBFD, bare lengths", best(5, bare)) });
    for (strategy, times) in [
        (PackStrategy::OptimizedBestFitDecreasing, 5),
        (PackStrategy::ParallelOptimizedBestFitDecreasing, 5),
        (PackStrategy::BestFitDecreasing, 2),
        (PackStrategy::FirstFitDecreasing, 2),
        (PackStrategy::ModifiedFirstFitDecreasing, 2),
    ] {
        let packer = Packer::new(seq_len).with_strategy(strategy);
        let run = || packer.pack_lengths(&wide).expect("lengths that fit").packs.len();
        let name = format!("seqpacker {}", strategy.name());
        measured.push(Measured { rows: Some(run()), ..Measured::new(name, best(times, run)) });
    }
    measured
}

fn counting_sort(lengths: &[u32], seq_len: usize) -> Measured {
    Measured::new("counting sort", best(9, || limits::counting_sort(lengths, seq_len)))
}

/// The shortest of several runs.
fn best<T>(times: usize, mut work: impl FnMut() -> T) -> Duration {
    (0..times)
        .map(|_| {
            let start = Instant::now();
            let result = black_box(work());
            let elapsed = start.elapsed();
            drop(result); // freeing its memory is not measured
            elapsed
        })
        .min()
        .expect("at least one run")
}

fn line(measured: &Measured) -> String {
    let rows = measured.rows.map_or(String::new(), |rows| format!(", \"rows\": {rows}"));
    format!("\"{}\": {{\"seconds\": {:.9}{rows}}}", measured.name, measured.best.as_secs_f64())
}

fn number(text: &str) -> usize {
    text.parse().expect("a number")
}
