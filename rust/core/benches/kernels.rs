//! Criterion benchmarks of the kernels: `cargo bench`. What users would pick instead is measured in `benchmarks/`.
#![allow(missing_docs, reason = "criterion's macros write public functions")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "lengths are small")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dasd_lite_core::Interrupt;
use dasd_lite_core::pack::{Method, Options, Overlong, pack};
use dasd_lite_core::random::Random;

static QUIET: Interrupt = Interrupt::new();

/// From 0 to 1.
fn uniform(random: &mut Random) -> f64 {
    f64::from((random.next_u64() >> 32) as u32) / f64::from(u32::MAX)
}

/// Lengths of long answers: lognormal with median 9,000 and σ 0.8.
fn lengths(num: usize) -> Vec<i32> {
    let mut random = Random::new(0);
    let mut normal = || (0..12).map(|_| uniform(&mut random)).sum::<f64>() - 6.0;
    (0..num).map(|_| ((9000_f64.ln() + 0.8 * normal()).exp() as i32).clamp(64, 65_536)).collect()
}

fn packing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pack");
    for num in [10_000, 448_000, 5_000_000] {
        let lengths = lengths(num);
        group.throughput(Throughput::Elements(num as u64)).sample_size(10);
        for (name, method) in [("best_fit", Method::BestFit), ("tight", Method::Tight), ("in_order", Method::InOrder)] {
            let options = Options { seq_len: 65_536, alignment: 1, method, overlong: Overlong::Error };
            group.bench_function(format!("{name}/{num}"), |bencher| {
                bencher.iter(|| pack(black_box(&lengths), &options, &QUIET).unwrap());
            });
        }
        group.bench_function(format!("counting_sort/{num}"), |bencher| {
            bencher.iter(|| counting_sort(black_box(&lengths)))
        });
    }
}

/// What packing cannot be faster than: it has to bring the sequences into an order.
fn counting_sort(lengths: &[i32]) -> Vec<u32> {
    let mut places = vec![0_u32; 65_537];
    for &length in lengths {
        places[length as usize] += 1;
    }
    let mut before = 0;
    for place in &mut places {
        before += std::mem::replace(place, before);
    }
    let mut sorted = vec![0; lengths.len()];
    for (index, &length) in lengths.iter().enumerate() {
        let place = &mut places[length as usize];
        sorted[*place as usize] = index as u32;
        *place += 1;
    }
    sorted
}

criterion_group!(kernels, packing);
criterion_main!(kernels);
