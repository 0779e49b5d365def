//! Random input to every entry point, most of it wrong: each call returns `Ok` or `Err`, and never panics.
//!
//! `make fuzz` runs a million inputs an entry point with overflow checks; `cargo test` a thousand.

use std::env;

use dasd_lite_core::pack::{self, Method, Options, Overlong};
use dasd_lite_core::random::Random;
use dasd_lite_core::{Interrupt, Ragged, balance, gather, repeat, segment, simd, stats, toml};

/// Random input.
struct Input(Random);

impl Input {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Mostly a small number, sometimes one at an edge of its type.
    fn number(&mut self) -> i64 {
        match self.below(24) {
            0 => self.one_of(&[i64::MIN, i64::MIN + 1, i64::MAX, i64::MAX - 1]),
            1 => self.one_of(&[-1, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 32) - 1, -(1 << 31), 1 << 24]),
            _ => i64::try_from(self.below(9)).unwrap(),
        }
    }

    fn logprob(&mut self) -> f32 {
        match self.below(40) {
            0 => self.one_of(&[f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1.0, 1e-4, 2e-4]),
            1 => self.one_of(&[f32::NEG_INFINITY, f32::MIN, -f32::MIN_POSITIVE, -0.0, 0.0]),
            #[expect(clippy::cast_precision_loss, reason = "any number will do")]
            _ => -(self.below(1 << 20) as f32) / 65536.0,
        }
    }

    fn vec<T>(&mut self, max: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(max + 1)).map(|_| one(self)).collect()
    }

    /// Offsets of rows over `len` values: mostly right.
    fn offsets(&mut self, len: usize) -> Vec<i64> {
        let mut offsets = self.vec(6, |random| i64::try_from(random.below(len + 1)).unwrap());
        offsets.extend([0, i64::try_from(len).unwrap()]);
        offsets.sort_unstable();
        self.spoil(&mut offsets);
        offsets
    }

    /// Byte offsets that rise to `len`: mostly right.
    fn ends(&mut self, len: usize) -> Vec<i64> {
        let mut ends = self.offsets(len);
        ends.dedup();
        if ends.first() == Some(&0) {
            ends.remove(0);
        }
        ends
    }

    /// Damages a column, one time in eight.
    fn spoil(&mut self, values: &mut Vec<i64>) {
        match self.below(16) {
            0 if !values.is_empty() => {
                let at = self.below(values.len());
                values[at] = self.number();
            }
            1 => drop(values.pop()),
            _ => {}
        }
    }

    fn text(&mut self) -> Vec<u8> {
        const PIECES: [&str; 32] = [
            ".", "!", "?", "…", "。", "！", "｡", "\n", "\r\n", " ", "\t", "$", "$$", "\\(", "\\)", "\\[", "\\]", "\\",
            "```", "`", "<think>", "</think>", "3.14", "12. ", "e.g.", "Dr.", "A", "é", "𝕏", "”", "）", "\u{2003}",
        ];
        let mut text = self.vec(30, |random| random.one_of(&PIECES)).concat().into_bytes();
        if self.below(30) == 0 {
            let at = self.below(text.len() + 1);
            text.insert(at, 0xE2);
        }
        text
    }
}

fn fuzz(seed: u64, mut call: impl FnMut(&mut Input, &Interrupt)) {
    let num_inputs = env::var("FUZZ_INPUTS").map_or(1000, |text| text.parse().expect("FUZZ_INPUTS is a number"));
    let interrupt = Interrupt::new();
    let mut random = Input(Random::new(seed));
    for _ in 0..num_inputs {
        call(&mut random, &interrupt);
    }
}

#[test]
fn packing() {
    fuzz(1, |random, interrupt| {
        let lengths = random.vec(20, Input::number);
        let options = Options {
            // The longest has tables of 64 MB: now and then.
            seq_len: match random.below(5000) {
                0 => pack::MAX_SEQ_LEN,
                _ => random.one_of(&[0, 1, 2, 7, 8, 64, 4096, 65_536, u32::MAX]),
            },
            alignment: random.one_of(&[0, 1, 1, 1, 2, 8, u32::MAX]),
            method: random.one_of(&[Method::BestFit, Method::Tight, Method::InOrder]),
            overlong: random.one_of(&[Overlong::Drop, Overlong::Error]),
        };
        if let Ok(plan) = pack::pack(&lengths, &options, interrupt) {
            assert_eq!(plan.items.len() + plan.dropped.len(), lengths.len());
        }
    });
}

#[test]
fn balancing() {
    fuzz(7, |random, interrupt| {
        let lengths = random.vec(20, Input::number);
        let items = random.vec(20, |random| u32::try_from(random.below(22)).unwrap());
        let offsets = random.offsets(items.len());
        let options = balance::Options {
            num_ranks: random.one_of(&[0, 1, 2, 3, usize::MAX]),
            micro_steps: random.one_of(&[0, 1, 2, 3, usize::MAX]),
            window: random.one_of(&[0, 1, 2, 32, usize::MAX]),
            linear: random.one_of(&[0.0, 24_576.0, -1.0, f64::NAN, f64::INFINITY, 1e15]),
            quadratic: random.one_of(&[0.0, 1.0, -1.0, f64::NAN, 1e15]),
            seed: random.0.next_u64(),
        };
        let Ok(rows) = Ragged::new("plan.offsets", &items, &offsets) else { return };
        if let Ok(order) = balance::balance(rows, &lengths, &options, interrupt) {
            assert_eq!(order.rows.len() + order.left_over.len(), rows.len());
        }
    });
}

#[test]
fn gathering() {
    fuzz(8, |random, interrupt| {
        let tokens = random.vec(40, |random| u32::try_from(random.below(90)).unwrap().wrapping_sub(1));
        let offsets = random.offsets(tokens.len());
        let items = random.vec(6, |random| u32::try_from(random.below(7)).unwrap());
        let item_offsets = random.offsets(items.len());
        let rows = random.vec(4, Input::number);
        let alignment = random.one_of(&[0, 1, 1, 4, u32::MAX]);
        let Ok(plan) = Ragged::new("plan.offsets", &items, &item_offsets) else { return };
        let seq_len = random.one_of(&[8, 100, u32::MAX]);
        let Ok(mut layout) = gather::layout(&offsets, plan, &rows, seq_len, alignment, interrupt) else { return };
        let num_tokens = usize::try_from(*layout.row_offsets.last().unwrap()).unwrap().min(1000);
        if random.below(9) == 0 && !layout.sequences.is_empty() {
            layout.sequences[0] = random.one_of(&[0, 1, 99]);
        }
        let mask = vec![1; tokens.len() + random.one_of(&[0, 0, 0, 1])];
        let mut position_ids = vec![0; num_tokens];
        let [mut ids, mut labels] = [num_tokens, num_tokens + random.one_of(&[0, 0, 1])].map(|len| vec![0; len]);
        let Ok(tokens) = Ragged::new("offsets", &tokens, &offsets) else { return };
        let source = gather::Source { tokens, loss_mask: Some(&mask) };
        let buffers = gather::Buffers {
            ids: &mut ids,
            position_ids: Some(&mut position_ids),
            labels: Some(&mut labels),
            reused: true,
        };
        let _ = gather::gather(&source, &layout.sequences, &layout.cu_seqlens, 0, buffers, interrupt);
    });
}

#[test]
fn sentences() {
    fuzz(2, |random, interrupt| {
        let text = random.text();
        let mut offsets = vec![0, i64::try_from(text.len()).unwrap()];
        random.spoil(&mut offsets);
        let Ok(texts) = Ragged::new("offsets", &text, &offsets) else { return };
        let Ok((ends, end_offsets)) = segment::sentence_ends(texts, interrupt) else { return };
        assert!(ends.is_sorted_by(|a, b| a < b));
        assert_eq!(ends.last().map_or(0, |&end| usize::try_from(end).unwrap()), text.len());
        let ends = Ragged::new("end_offsets", &ends, &end_offsets).unwrap();
        repeat::text_repetition(texts, ends, interrupt).unwrap();
    });
}

#[test]
fn repetition_of_texts() {
    fuzz(3, |random, interrupt| {
        let text = random.text();
        let offsets = random.offsets(text.len());
        let ends = random.ends(text.len());
        let end_offsets = random.offsets(ends.len());
        let columns = (Ragged::new("offsets", &text, &offsets), Ragged::new("end_offsets", &ends, &end_offsets));
        if let (Ok(texts), Ok(ends)) = columns {
            let _ = repeat::text_repetition(texts, ends, interrupt);
        }
    });
}

#[test]
fn repetition_of_ids() {
    fuzz(4, |random, interrupt| {
        let num_kinds = random.one_of(&[1, 2, 3, 100]);
        let ids = random.vec(60, |random| {
            u32::try_from(random.below(num_kinds)).unwrap().wrapping_sub(random.one_of(&[0, 0, 0, 1]))
        });
        let offsets = random.offsets(ids.len());
        let n = random.one_of(&[0, 1, 2, 3, 20, 1000, usize::MAX]);
        if let Ok(rows) = Ragged::new("offsets", &ids, &offsets) {
            let result = repeat::repeated_ngrams(rows, n, interrupt);
            assert!(result.is_err() == (n == 0));
        }
    });
}

#[test]
fn statistics() {
    fuzz(9, |random, interrupt| {
        let token_bytes = random.vec(30, |random| i32::try_from(random.number().clamp(-9, 9)).unwrap());
        let num_bytes = usize::try_from(token_bytes.iter().sum::<i32>().max(0)).unwrap();
        let text: Vec<u8> = (0..num_bytes).map(|_| random.one_of(b" a.\n\xE3\x80")).collect();
        let ends = random.ends(num_bytes);
        // Mostly one response, so that the columns fit together.
        let fit = random.below(4) > 0;
        let mut edges = |len: usize| if fit { vec![0, i64::try_from(len).unwrap()] } else { random.offsets(len) };
        let (text_offsets, token_offsets) = (edges(text.len()), edges(token_bytes.len()));
        let end_offsets = edges(ends.len());
        let first_bytes = random.vec(8, Input::number);
        let tokens = Ragged::new("t", &token_bytes, &token_offsets);
        let columns = (Ragged::new("x", &text, &text_offsets), tokens, Ragged::new("e", &ends, &end_offsets));
        if let (Ok(texts), Ok(tokens), Ok(ends)) = columns {
            let first_bytes = if random.below(2) == 0 { Some(&first_bytes[..]) } else { None };
            if let Ok(spans) = stats::sentence_spans(texts, tokens, ends, first_bytes, interrupt) {
                assert!(spans.is_sorted());
            }
        }
        let logprobs = random.vec(120, Input::logprob);
        let (teacher_spans, student_spans) = (random.offsets(logprobs.len()), random.offsets(logprobs.len()));
        let responses = random.offsets(teacher_spans.len().saturating_sub(1));
        let beta = random.one_of(&[0.1, 0.0, -1.0, f64::NAN, f64::INFINITY]);
        let models = (Ragged::new("t", &logprobs, &teacher_spans), Ragged::new("s", &logprobs, &student_spans));
        if let (Ok(teacher), Ok(student)) = models {
            let mut results = simd::levels().into_iter().map(|level| {
                let result = stats::sentence_stats_at(level, teacher, student, &responses, beta, interrupt);
                let bits = |p: &[f32]| p.iter().map(|p| p.to_bits()).collect::<Vec<u32>>();
                // As text: an error that holds a NaN is not even equal to itself.
                result
                    .map(|result| (bits(&result.p_teacher), bits(&result.p_student), result.classes, result.counts))
                    .map_err(|error| error.to_string())
            });
            let first = results.next();
            assert!(results.all(|other| Some(other) == first));
        }
    });
}

#[test]
fn classes() {
    fuzz(5, |random, interrupt| {
        let p_teacher = random.vec(20, |random| random.logprob().exp());
        let mut p_student = p_teacher.clone();
        p_student.rotate_left(p_teacher.len() / 2);
        let beta = random.one_of(&[0.1, 0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300]);
        let Ok(mut classes) = stats::classify(&p_teacher, &p_student, beta, interrupt) else { return };
        if random.below(9) == 0 {
            classes.push(random.one_of(&[3, -2, i8::MIN, i8::MAX]));
        }
        let offsets = random.offsets(classes.len());
        if let Ok(rows) = Ragged::new("offsets", &classes, &offsets) {
            let _ = stats::class_counts(rows, interrupt);
        }
    });
}

#[test]
fn toml_documents() {
    const PIECES: [&str; 40] = [
        "a",
        "b",
        "\"c\"",
        "'d'",
        ".",
        " = ",
        "=",
        "\n",
        "\n",
        "\r\n",
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        ", ",
        ",",
        " ",
        "#",
        "1",
        "-1",
        "0x",
        "1.5",
        "1e9",
        "inf",
        "nan",
        "true",
        "2020-01-01",
        "12:30",
        "\"\"\"",
        "'''",
        "\"",
        "'",
        "\\u00e9",
        "\\",
        "\0",
        "é",
        "\u{feff}",
        "a.b = 1\n",
    ];
    fuzz(9, |random, _| {
        let text = random.vec(30, |random| random.one_of(&PIECES)).concat();
        if let Err(error) = toml::parse(&text) {
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    });
}
