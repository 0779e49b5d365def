//! Rows copied out of one column, against a loop over documents.

use dasd_lite_core::gather::{Buffers, IGNORE, Layout, Source, TokenId, gather, layout};
use dasd_lite_core::random::Random;
use dasd_lite_core::{Interrupt, Ragged, Result};
use proptest::prelude::*;

static QUIET: Interrupt = Interrupt::new();

fn offsets(lengths: &[usize]) -> Vec<i64> {
    let ends = lengths.iter().scan(0, |end, &length| {
        *end += i64::try_from(length).unwrap();
        Some(*end)
    });
    [0].into_iter().chain(ends).collect()
}

/// Ids, position ids and labels.
type Columns = [Vec<i32>; 3];

fn run<I: TokenId>(tokens: &[I], offsets: &[i64], mask: &[u8], layout: &Layout) -> Result<Columns> {
    let num_tokens = usize::try_from(*layout.row_offsets.last().unwrap()).unwrap();
    let [mut ids, mut position_ids, mut labels] = [const { Vec::new() }; 3].map(|_: Vec<i32>| vec![7; num_tokens]);
    let source = Source { tokens: Ragged::new("offsets", tokens, offsets)?, loss_mask: Some(mask) };
    let buffers =
        Buffers { ids: &mut ids, position_ids: Some(&mut position_ids), labels: Some(&mut labels), reused: true };
    gather(&source, &layout.sequences, &layout.cu_seqlens, -1, buffers, &QUIET)?;
    Ok([ids, position_ids, labels])
}

/// The same, one document after the other; `items` are the sequences of all rows.
fn reference(tokens: &[i32], offsets: &[i64], mask: &[u8], items: &[u32], alignment: usize) -> Columns {
    let [mut ids, mut position_ids, mut labels] = [const { Vec::new() }; 3];
    for &item in items {
        let edge = |index: u32| usize::try_from(offsets[index as usize]).unwrap();
        let document = edge(item)..edge(item + 1);
        let padded = document.len().div_ceil(alignment) * alignment;
        for position in 0..padded {
            let at = document.start + position;
            let inside = position < document.len();
            ids.push(if inside { tokens[at] } else { -1 });
            position_ids.push(i32::try_from(position).unwrap());
            labels.push(if inside && position > 0 && mask[at] != 0 { tokens[at] } else { IGNORE });
        }
    }
    [ids, position_ids, labels]
}

proptest! {
    #[test]
    fn same_as_a_loop(
        lengths in prop::collection::vec(0..40_usize, 1..20),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        alignment in 1..9_u32,
        seed in any::<u64>(),
    ) {
        let offsets = offsets(&lengths);
        let mut random = Random::new(seed);
        let num = usize::try_from(offsets[lengths.len()]).unwrap();
        let tokens: Vec<i32> = (0..num).map(|_| i32::try_from(random.below(1 << 31)).unwrap()).collect();
        let mask: Vec<u8> = (0..num).map(|_| u8::try_from(random.below(3)).unwrap()).collect();
        // Two sequences a row, and rows picked at random.
        let items: Vec<u32> = (0..u32::try_from(lengths.len()).unwrap()).collect();
        let mut edges: Vec<i64> = (0..=lengths.len()).step_by(2).map(|edge| i64::try_from(edge).unwrap()).collect();
        if lengths.len() % 2 == 1 {
            edges.push(i64::try_from(lengths.len()).unwrap());
        }
        let rows: Vec<i64> = picks.iter().map(|pick| i64::try_from(pick.index(edges.len() - 1)).unwrap()).collect();
        let plan = Ragged::new("plan.offsets", &items, &edges).unwrap();
        let documents = layout(&offsets, plan, &rows, 100, alignment, &QUIET).unwrap();

        let picked: Vec<&[u32]> = rows.iter().map(|&row| &plan[usize::try_from(row).unwrap()]).collect();
        prop_assert_eq!(&documents.sequences, &picked.concat());
        let expected = reference(&tokens, &offsets, &mask, &documents.sequences, alignment as usize);
        prop_assert_eq!(&run(&tokens, &offsets, &mask, &documents).unwrap(), &expected);
        let unsigned: Vec<u32> = tokens.iter().map(|token| token.cast_unsigned()).collect();
        prop_assert_eq!(run(&unsigned, &offsets, &mask, &documents).unwrap(), expected);
        let sizes = documents.cu_seqlens.windows(2).map(|pair| usize::try_from(pair[1] - pair[0]).unwrap());
        let padded = |&sequence: &u32| lengths[sequence as usize].div_ceil(alignment as usize) * alignment as usize;
        prop_assert!(sizes.eq(documents.sequences.iter().map(padded)));
    }
}

#[test]
fn large_batches_are_written_past_the_cache() {
    let lengths: Vec<usize> = (0..1000).map(|index| 1 + index * 48_271 % 20_000).collect();
    let offsets = offsets(&lengths);
    let mut random = Random::new(3);
    let num = usize::try_from(offsets[lengths.len()]).unwrap();
    let tokens: Vec<i32> = (0..num).map(|_| i32::try_from(random.below(1 << 31)).unwrap()).collect();
    let mask: Vec<u8> = (0..num).map(|_| u8::try_from(random.below(3)).unwrap()).collect();
    let mut items: Vec<u32> = (0..1000).collect();
    random.shuffle(&mut items, &QUIET).unwrap();
    let edges: Vec<i64> = (0..=1000).collect();
    let rows: Vec<i64> = (0..1000).rev().collect();
    let documents = layout(&offsets, Ragged::new("plan.offsets", &items, &edges).unwrap(), &rows, 20_000, 1, &QUIET);
    let documents = documents.unwrap();
    assert!(
        run(&tokens, &offsets, &mask, &documents).unwrap()
            == reference(&tokens, &offsets, &mask, &documents.sequences, 1)
    );
}

#[test]
fn errors_name_index_and_value() {
    let (items, edges) = ([0, 1, 2], [0, 2, 3]);
    let plan = Ragged::new("plan.offsets", &items, &edges).unwrap();
    let message = |offsets: &[i64], rows: &[i64]| layout(offsets, plan, rows, 8, 1, &QUIET).unwrap_err().to_string();
    assert_eq!(message(&[0, 1, 2, 3], &[0, 2]), "rows[1] is 2; it must be from 0 and below 2");
    assert_eq!(message(&[0, 1, 2, 3], &[-1]), "rows[0] is -1; it must be from 0 and below 2");
    assert_eq!(message(&[0, 1, 2], &[1]), "plan.items[2] is 2; it must be from 0 and below 2");
    assert_eq!(
        message(&[0, 1, 10, 11], &[0]),
        "sequence 1 has 9 tokens, more than seq_len 8; is the plan made of these sequences?"
    );
    let fits_not = "row 0 has 9 tokens, more than seq_len 8; is the plan made of these sequences?";
    assert_eq!(message(&[0, 4, 9, 10], &[0]), fits_not);

    let documents = layout(&[0, 2, 3, 4], plan, &[0, 1], 8, 1, &QUIET).unwrap();
    let message =
        |tokens: &[u32], offsets: &[i64], mask: &[u8]| run(tokens, offsets, mask, &documents).unwrap_err().to_string();
    let mask = [1; 4];
    assert_eq!(
        message(&[1, 2, u32::MAX - 2, 4], &[0, 2, 3, 4], &mask),
        "tokens[2] is 4294967293; it must be an id below 2147483648"
    );
    assert_eq!(
        message(&[1, 2, 3, 4], &[0, 2, 3, 4], &mask[1..]),
        "loss_mask has 3 elements and tokens 4; they must be equally many"
    );
    assert_eq!(
        message(&[1, 2, 3, 4], &[0, 3, 3, 4], &mask),
        "a sequence has 3 elements and its place in cu_seqlens 2; they must be equally many"
    );
}
