//! Rows of a plan → token ids, position ids and labels, document after document.
//!
//! First [`layout`] decides where each document goes, then [`gather`] fills the caller's buffers, which can be used
//! again. Documents are copied whole; with an alignment each is padded to a multiple of it.

use std::ops::Range;

use crate::error::{Error, Result, equally_many};
use crate::interrupt::Interrupt;
use crate::nontemporal;
use crate::parallel::{self, GRAIN, take};
use crate::ragged::{Ragged, to_index, to_offset};
use crate::simd::{self, Level};

/// The label of a token that is no target.
pub const IGNORE: i32 = -100;

/// Where the documents of some rows go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The sequence of each document.
    pub sequences: Vec<u32>,
    /// Document `d` takes the tokens `cu_seqlens[d]..cu_seqlens[d + 1]`, padding included.
    pub cu_seqlens: Vec<i32>,
    /// Row `r` takes the tokens `row_offsets[r]..row_offsets[r + 1]`.
    pub row_offsets: Vec<i64>,
}

/// Lays out the documents of `rows`; `items` has the indices of the sequences of each row of the plan, `offsets` where
/// each sequence begins and ends among the tokens.
///
/// # Errors
/// A row or a sequence that does not exist; a row longer than `seq_len`; 2^31 tokens or more.
pub fn layout(
    offsets: &[i64],
    items: Ragged<'_, u32>,
    rows: &[i64],
    seq_len: u32,
    alignment: u32,
    interrupt: &Interrupt,
) -> Result<Layout> {
    let num_sequences = offsets.len().saturating_sub(1);
    let mut layout = Layout { sequences: vec![], cu_seqlens: vec![0], row_offsets: vec![0] };
    let mut end = 0_i64;
    for (index, &row) in rows.iter().enumerate() {
        interrupt.check()?;
        let number = usize::try_from(row).ok().filter(|&number| number < items.len());
        let number = number.ok_or(Error::BadIndex { name: "rows", index, value: row, len: items.len() })?;
        let start = end;
        for (item, &sequence) in (to_index(items.offsets()[number])..).zip(&items[number]) {
            let Some(&[from, to]) =
                offsets.get(sequence as usize..sequence as usize + 2).and_then(|edges| edges.first_chunk())
            else {
                let (name, value) = ("plan.items", i64::from(sequence));
                return Err(Error::BadIndex { name, index: item, value, len: num_sequences });
            };
            let length = to.wrapping_sub(from).max(0);
            if length > i64::from(seq_len) {
                return Err(Error::SequenceTooLong { sequence: sequence as usize, value: length, seq_len });
            }
            let alignment = i64::from(alignment.max(1));
            end += (length + alignment - 1) / alignment * alignment;
            let Ok(edge) = i32::try_from(end) else {
                #[expect(clippy::cast_precision_loss, reason = "for a message")]
                let value = end as f64;
                let must = "below 2147483648; gather fewer rows at once";
                return Err(Error::Argument { name: "the number of tokens", value, must });
            };
            layout.sequences.push(sequence);
            layout.cu_seqlens.push(edge);
        }
        if end - start > i64::from(seq_len) {
            return Err(Error::RowTooLong { row, value: end - start, seq_len });
        }
        layout.row_offsets.push(end);
    }
    Ok(layout)
}

/// A token id as the caller's column has it.
pub trait TokenId: Copy + Sync {
    /// The id, with the same bits.
    fn to_i32(self) -> i32;

    /// Whether it is 2^31 or more, which no signed id can be.
    fn is_too_large(self) -> bool;

    /// Copies ids into a slice of as many.
    fn copy(ids: &[Self], to: &mut [i32]) {
        for (to, id) in to.iter_mut().zip(ids) {
            *to = id.to_i32();
        }
    }
}

impl TokenId for i32 {
    #[inline]
    fn to_i32(self) -> i32 {
        self
    }

    #[inline]
    fn is_too_large(self) -> bool {
        false
    }

    #[inline]
    fn copy(ids: &[i32], to: &mut [i32]) {
        to.copy_from_slice(ids);
    }
}

impl TokenId for u32 {
    #[inline]
    fn to_i32(self) -> i32 {
        self.cast_signed()
    }

    #[inline]
    fn is_too_large(self) -> bool {
        self > i32::MAX.cast_unsigned()
    }
}

/// What is read.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a, I> {
    /// Token ids of each sequence.
    pub tokens: Ragged<'a, I>,
    /// A byte per token id, not 0 where the token is a target.
    pub loss_mask: Option<&'a [u8]>,
}

/// What is filled: buffers with as many elements as the layout has tokens, or `None`.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// Token ids.
    pub ids: &'a mut [i32],
    /// Position of each token in its document.
    pub position_ids: Option<&'a mut [i32]>,
    /// The id where the token is a target, else [`IGNORE`]; always [`IGNORE`] for a document's first token, which
    /// nothing predicts.
    pub labels: Option<&'a mut [i32]>,
    /// Whether they were written before. It affects only the speed: memory fresh from the system is in the cache
    /// already, so large buffers are written past the cache only if they are reused.
    pub reused: bool,
}

/// Copies the documents that [`layout`] laid out.
///
/// # Errors
/// Buffers or a loss mask of another size; documents that do not fit the layout; an id of 2^31 or more.
pub fn gather<'b, I: TokenId>(
    source: &Source<'_, I>,
    sequences: &[u32],
    cu_seqlens: &[i32],
    pad_id: i32,
    buffers: Buffers<'b>,
    interrupt: &Interrupt,
) -> Result<()> {
    let edges: Vec<i64> = cu_seqlens.iter().map(|&edge| edge.into()).collect();
    Ragged::new("cu_seqlens", &*buffers.ids, &edges)?;
    equally_many("sequences + 1", sequences.len() + 1, "cu_seqlens", edges.len())?;
    let num_labels = buffers.labels.as_ref().map_or(0, |labels| labels.len());
    match source.loss_mask {
        Some(mask) => equally_many("loss_mask", mask.len(), "tokens", source.tokens.values().len())?,
        None => equally_many("labels without a loss mask", num_labels, "nothing", 0)?,
    }
    let documents = parallel::cut(&edges, GRAIN);
    let width = |range: &Range<usize>| to_index(edges[range.end]) - to_index(edges[range.start]);
    let num_tokens = buffers.ids.len();
    let is_large = buffers.reused && size_of_val(buffers.ids) >= nontemporal::MIN_BYTES;
    let past_cache = is_large.then(simd::level);
    let split = |name, values: Option<&'b mut [i32]>| match values {
        None => Ok(documents.iter().map(|_| None).collect::<Vec<_>>()),
        Some(values) => {
            equally_many(name, values.len(), "ids", num_tokens)?;
            Ok(parallel::split(values, &documents, width).into_iter().map(Some).collect())
        }
    };
    let position_ids = split("position_ids", buffers.position_ids)?;
    let labels = split("labels", buffers.labels)?;
    let ids = parallel::split(buffers.ids, &documents, width);
    let work = documents.iter().zip(ids).zip(position_ids.into_iter().zip(labels)).collect();
    parallel::try_map(work, interrupt, |((documents, mut ids), (mut position_ids, mut labels))| {
        for document in documents.clone() {
            let length = to_index(edges[document + 1]) - to_index(edges[document]);
            let range = source.document(sequences, document, length)?;
            let tokens = &source.tokens.values()[range.clone()];
            let (copy, padding) = take(&mut ids, length).split_at_mut(tokens.len());
            if past_cache.is_some() {
                let line = |index| nontemporal::at(tokens, index).map(TokenId::to_i32);
                nontemporal::fill(copy, past_cache, |index| tokens[index].to_i32(), line);
            } else {
                TokenId::copy(tokens, copy);
            }
            padding.fill(pad_id);
            if let Some(position_ids) = &mut position_ids {
                count_up(take(position_ids, length), past_cache);
            }
            if let Some(labels) = &mut labels {
                let mask = source.loss_mask.map_or(&[][..], |mask| &mask[range]);
                label(take(labels, length), tokens, mask, past_cache);
            }
        }
        Ok(())
    })?;
    Ok(())
}

impl<I: TokenId> Source<'_, I> {
    /// Which tokens a document of `length` tokens, padding included, is filled with.
    fn document(&self, sequences: &[u32], document: usize, length: usize) -> Result<Range<usize>> {
        let (sequence, len) = (sequences[document] as usize, self.tokens.len());
        let Some(tokens) = self.tokens.get(sequence) else {
            return Err(Error::BadIndex { name: "sequences", index: document, value: to_offset(sequence), len });
        };
        if tokens.len() > length {
            let (left, right) = ("a sequence", "its place in cu_seqlens");
            return Err(Error::UnequalLengths { left, left_len: tokens.len(), right, right_len: length });
        }
        let start = to_index(self.tokens.offsets()[sequence]);
        // All of them at once in vector code; only after that the first one.
        if tokens.iter().fold(false, |any, id| any | id.is_too_large()) {
            let at = tokens.iter().position(|id| id.is_too_large()).unwrap_or_default();
            let value = f64::from(tokens[at].to_i32().cast_unsigned());
            return Err(Error::BadValue { name: "tokens", index: start + at, value, must: "an id below 2147483648" });
        }
        Ok(start..start + tokens.len())
    }
}

/// Labels of one document; those of its first token and of its padding are [`IGNORE`].
fn label(labels: &mut [i32], tokens: &[impl TokenId], mask: &[u8], past_cache: Option<Level>) {
    let (labels, padding) = labels.split_at_mut(tokens.len());
    let label = |token, target| if target == 0 { IGNORE } else { token };
    let labels_at = |index| {
        let (tokens, mask) = (nontemporal::at(tokens, index), nontemporal::at(mask, index));
        std::array::from_fn(|next| label(tokens[next].to_i32(), mask[next]))
    };
    nontemporal::fill(labels, past_cache, |index| label(tokens[index].to_i32(), mask[index]), labels_at);
    padding.fill(IGNORE);
    if let Some(first) = labels.first_mut() {
        *first = IGNORE;
    }
}

fn count_up(position_ids: &mut [i32], past_cache: Option<Level>) {
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "below 2^31, as cu_seqlens is")]
    let position = |index: usize| index as i32;
    let count = std::array::from_fn(position);
    nontemporal::fill(position_ids, past_cache, position, |index| count.map(|next| next + position(index)));
}
