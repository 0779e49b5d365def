//! Criterion benchmarks of the kernels: `cargo bench`. What users would pick instead is measured in `benchmarks/`.
#![allow(missing_docs, reason = "criterion's macros write public functions")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "lengths are small")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dasd_lite_core::pack::{Method, Options, Overlong, pack};
use dasd_lite_core::random::Random;
use dasd_lite_core::{Interrupt, Ragged, simd, stats};

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
            bencher.iter(|| counting_sort(black_box(&lengths)));
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

fn statistics(criterion: &mut Criterion) {
    let mut random = Random::new(1);
    let num_sentences = 1_000_000;
    let mut model = || {
        let mut spans = vec![0_i64];
        for _ in 0..num_sentences {
            let normal = (0..12).map(|_| uniform(&mut random)).sum::<f64>() - 6.0;
            spans.push(spans[spans.len() - 1] + ((18_f64.ln() + 0.6 * normal).exp() as i64).max(1));
        }
        let logprobs: Vec<f32> = (0..spans[spans.len() - 1]).map(|_| -uniform(&mut random) as f32).collect();
        (logprobs, spans)
    };
    let (teacher, student) = (model(), model());
    let responses: Vec<i64> = (0..=num_sentences).step_by(500).collect();
    let mut group = criterion.benchmark_group("sentence_stats");
    group.throughput(Throughput::Elements((teacher.0.len() + student.0.len()) as u64)).sample_size(10);
    for level in simd::levels() {
        group.bench_function(format!("{level:?}"), |bencher| {
            bencher.iter(|| {
                let teacher = Ragged::new("teacher_spans", &teacher.0, &teacher.1).unwrap();
                let student = Ragged::new("student_spans", &student.0, &student.1).unwrap();
                stats::sentence_stats_at(level, teacher, student, black_box(&responses), 0.1, &QUIET).unwrap()
            });
        });
    }
}

criterion_group!(kernels, packing, statistics);
criterion_main!(kernels);
