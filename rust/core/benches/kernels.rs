//! Criterion benchmarks of the kernels: `cargo bench`. What users would pick instead is measured in `benchmarks/`.
#![allow(missing_docs, reason = "criterion's macros write public functions")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "all are small"
)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dasd_lite_core::pack::{Method, Options, Overlong, pack};
use dasd_lite_core::random::Random;
use dasd_lite_core::{Interrupt, Ragged, balance, gather, repeat, segment, simd, stats};

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
    let mut starts = vec![0_u32; 65_537];
    for &length in lengths {
        starts[length as usize] += 1;
    }
    let mut before = 0;
    for start in &mut starts {
        before += std::mem::replace(start, before);
    }
    let mut sorted = vec![0; lengths.len()];
    for (index, &length) in lengths.iter().enumerate() {
        let start = &mut starts[length as usize];
        sorted[*start as usize] = index as u32;
        *start += 1;
    }
    sorted
}

fn statistics(criterion: &mut Criterion) {
    // In the second-level cache, and out of memory.
    for num_sentences in [3_000, 1_000_000] {
        let mut random = Random::new(1);
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
            group.bench_function(format!("{level:?}/{num_sentences}"), |bencher| {
                bencher.iter(|| {
                    let teacher = Ragged::new("teacher_spans", &teacher.0, &teacher.1).unwrap();
                    let student = Ragged::new("student_spans", &student.0, &student.1).unwrap();
                    stats::sentence_stats_at(level, teacher, student, black_box(&responses), 0.1, &QUIET).unwrap()
                });
            });
        }
    }
}

fn rows(criterion: &mut Criterion) {
    let lengths = lengths(100_000);
    let options = Options { seq_len: 65_536, alignment: 1, method: Method::BestFit, overlong: Overlong::Error };
    let plan = pack(&lengths, &options, &QUIET).unwrap();
    let items = Ragged::new("plan.offsets", &plan.items, &plan.offsets).unwrap();
    let mut group = criterion.benchmark_group("rows");
    let balanced =
        balance::Options { num_ranks: 8, micro_steps: 4, window: 64, linear: 24_576.0, quadratic: 1.0, seed: 0 };
    group.throughput(Throughput::Elements(items.len() as u64));
    group.bench_function("balance", |bencher| {
        bencher.iter(|| balance::balance(black_box(items), &lengths, &balanced, &QUIET).unwrap());
    });

    // As many documents as make 10M tokens, into buffers that are written again and again.
    let ends = lengths.iter().scan(0, |end, &length| {
        *end += i64::from(length);
        Some(*end)
    });
    let offsets: Vec<i64> = [0].into_iter().chain(ends).take_while(|&end| end < 10_000_000).collect();
    let num_tokens = *offsets.last().unwrap() as usize;
    let tokens = vec![1; num_tokens];
    let mask = vec![1; num_tokens];
    let tokens = Ragged::new("offsets", &tokens, &offsets).unwrap();
    let sequences: Vec<u32> = (0..tokens.len() as u32).rev().collect();
    let widths = sequences.iter().scan(0, |end, &sequence| {
        *end += lengths[sequence as usize];
        Some(*end)
    });
    let cu_seqlens: Vec<i32> = [0].into_iter().chain(widths).collect();
    let source = gather::Source { tokens, loss_mask: Some(&mask) };
    let [mut ids, mut position_ids, mut labels] = [const { Vec::new() }; 3].map(|_: Vec<i32>| vec![0; num_tokens]);
    group.throughput(Throughput::Elements(num_tokens as u64)).sample_size(10);
    group.bench_function("gather ids, position ids and labels", |bencher| {
        bencher.iter(|| {
            let (position_ids, labels) = (Some(&mut position_ids[..]), Some(&mut labels[..]));
            let buffers = gather::Buffers { ids: &mut ids, position_ids, labels, reused: true };
            gather::gather(&source, &sequences, &cu_seqlens, 0, buffers, &QUIET).unwrap();
        });
    });
}

fn texts(criterion: &mut Criterion) {
    let text = "We have $x^2 + 1 = 3.14$, e.g. for Fig. 2. So what? Let us see:\n1. First step.\n2. Second one!\n"
        .repeat(10_000);
    let offsets = [0, text.len() as i64];
    let mut group = criterion.benchmark_group("texts");
    group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(10);
    group.bench_function("sentence_ends", |bencher| {
        let texts = Ragged::new("offsets", text.as_bytes(), &offsets).unwrap();
        bencher.iter(|| segment::sentence_ends(black_box(texts), &QUIET).unwrap());
    });
    let mut random = Random::new(2);
    let ids: Vec<i32> = (0..1_000_000).map(|_| random.below(150_000) as i32).collect();
    let offsets: Vec<i64> = (0..=1_000_000).step_by(10_000).collect();
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("repeated_ngrams", |bencher| {
        let ids = Ragged::new("offsets", &ids, &offsets).unwrap();
        bencher.iter(|| repeat::repeated_ngrams(black_box(ids), 20, &QUIET).unwrap());
    });
}

criterion_group!(kernels, packing, statistics, rows, texts);
criterion_main!(kernels);
