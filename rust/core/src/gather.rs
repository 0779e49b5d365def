//! Rows of a plan → token ids, position ids and labels, document after document.
//!
//! First [`layout`] says where each document goes, then [`gather`] fills buffers of the caller, so that they can be
//! used again. Documents are copied whole; with an alignment each is padded to a multiple of it.

use std::ops::Range;

use crate::error::{Error, Result, equally_many};
use crate::interrupt::Interrupt;
use crate::parallel::{self, GRAIN, take};
use crate::ragged::{Ragged, place, to_offset};
use crate::stream;

/// The label of a token that is no target.
pub const IGNORE: i32 = -100;

/// Where the documents of some rows go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Which sequence each document is.
    pub sequences: Vec<u32>,
    /// Document `d` takes the places `cu_seqlens[d]..cu_seqlens[d + 1]`, padding included.
    pub cu_seqlens: Vec<i32>,
    /// Row `r` takes the places `row_offsets[r]..row_offsets[r + 1]`.
    pub row_offsets: Vec<i64>,
}

/// Lays out the documents of `rows`; `items` has the indices of the sequences of each row of the plan, `offsets` where
/// each sequence begins and ends among the tokens.
///
/// # Errors
/// A row or a sequence that there is not; a row longer than `seq_len`; 2^31 places or more.
pub fn layout(
    offsets: &[i64],
    items: Ragged<'_, u32>,
    rows: &[i64],
    seq_len: u32,
    alignment: u32,
    interrupt: &Interrupt,
) -> Result<Layout> {
    let num_sequences = offsets.len().saturating_sub(1);
    let mut found = Layout { sequences: vec![], cu_seqlens: vec![0], row_offsets: vec![0] };
    let mut end = 0_i64;
    for (index, &row) in rows.iter().enumerate() {
        interrupt.check()?;
        let number = usize::try_from(row).ok().filter(|&number| number < items.len());
        let number = number.ok_or(Error::BadIndex { name: "rows", index, value: row, len: items.len() })?;
        let start = end;
        for (item, &sequence) in (place(items.offsets()[number])..).zip(&items[number]) {
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
            found.sequences.push(sequence);
            found.cu_seqlens.push(edge);
        }
        if end - start > i64::from(seq_len) {
            return Err(Error::RowTooLong { row, value: end - start, seq_len });
        }
        found.row_offsets.push(end);
    }
    Ok(found)
}

/// What is read.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Token ids of each sequence.
    pub tokens: Ragged<'a, i32>,
    /// Which tokens are targets, beside the ids: those where it is not 0.
    pub loss_mask: Option<&'a [u8]>,
    /// Whether the ids are to be checked for being below 2^31, that is at least 0 here.
    pub check: bool,
}

/// What is filled: buffers with as many places as the layout, or `None`.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// Token ids.
    pub ids: &'a mut [i32],
    /// Place of each token in its document.
    pub position_ids: Option<&'a mut [i32]>,
    /// The id where it is a target, else [`IGNORE`]; never a document's first token, which nothing predicts.
    pub labels: Option<&'a mut [i32]>,
    /// Whether they were written before: fresh memory lies in the cache anyway when the system hands it out.
    pub reused: bool,
}

/// Copies the documents that [`layout`] laid out.
///
/// # Errors
/// Buffers or a loss mask of another size; documents that do not fit their places; an id of 2^31 or more.
pub fn gather<'b>(
    source: &Source<'_>,
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
    let width = |range: &Range<usize>| place(edges[range.end]) - place(edges[range.start]);
    let num_places = buffers.ids.len();
    let past_cache = buffers.reused && size_of_val(buffers.ids) >= stream::MIN_BYTES;
    let split = |name, values: Option<&'b mut [i32]>| match values {
        None => Ok(documents.iter().map(|_| None).collect::<Vec<_>>()),
        Some(values) => {
            equally_many(name, values.len(), "ids", num_places)?;
            Ok(parallel::split(values, &documents, width).into_iter().map(Some).collect())
        }
    };
    let position_ids = split("position_ids", buffers.position_ids)?;
    let labels = split("labels", buffers.labels)?;
    let ids = parallel::split(buffers.ids, &documents, width);
    let work = documents.iter().zip(ids).zip(position_ids.into_iter().zip(labels)).collect();
    parallel::try_map(work, interrupt, |((documents, mut ids), (mut position_ids, mut labels))| {
        for document in documents.clone() {
            let length = place(edges[document + 1]) - place(edges[document]);
            let found = source.document(sequences, document, length)?;
            let tokens = &source.tokens.values()[found.clone()];
            let (copy, padding) = take(&mut ids, length).split_at_mut(tokens.len());
            if past_cache {
                stream::fill(copy, true, |place| tokens[place], |place| stream::at(tokens, place));
            } else {
                copy.copy_from_slice(tokens);
            }
            padding.fill(pad_id);
            if let Some(position_ids) = &mut position_ids {
                count_up(take(position_ids, length), past_cache);
            }
            if let Some(labels) = &mut labels {
                let mask = source.loss_mask.map_or(&[][..], |mask| &mask[found]);
                label(take(labels, length), tokens, mask, past_cache);
            }
        }
        Ok(())
    })?;
    Ok(())
}

impl Source<'_> {
    /// Where the tokens of a document lie, which is to get `length` places.
    fn document(&self, sequences: &[u32], document: usize, length: usize) -> Result<Range<usize>> {
        let (sequence, len) = (sequences[document] as usize, self.tokens.len());
        let Some(tokens) = self.tokens.get(sequence) else {
            return Err(Error::BadIndex { name: "sequences", index: document, value: to_offset(sequence), len });
        };
        if tokens.len() > length {
            let (left, right) = ("a sequence", "its place in cu_seqlens");
            return Err(Error::UnequalLengths { left, left_len: tokens.len(), right, right_len: length });
        }
        let start = place(self.tokens.offsets()[sequence]);
        if self.check && tokens.iter().fold(0, |bits, id| bits | id) < 0 {
            let at = tokens.iter().position(|&id| id < 0).unwrap_or_default();
            let value = f64::from(tokens[at].cast_unsigned());
            return Err(Error::BadValue { name: "tokens", index: start + at, value, must: "an id below 2147483648" });
        }
        Ok(start..start + tokens.len())
    }
}

/// Labels of one document; those of its first token and of its padding are [`IGNORE`].
fn label(labels: &mut [i32], tokens: &[i32], mask: &[u8], past_cache: bool) {
    let (labels, padding) = labels.split_at_mut(tokens.len());
    let label = |token, target| if target == 0 { IGNORE } else { token };
    let labels_at = |place| {
        let (tokens, mask) = (stream::at(tokens, place), stream::at(mask, place));
        std::array::from_fn(|next| label(tokens[next], mask[next]))
    };
    stream::fill(labels, past_cache, |place| label(tokens[place], mask[place]), labels_at);
    padding.fill(IGNORE);
    if let Some(first) = labels.first_mut() {
        *first = IGNORE;
    }
}

fn count_up(position_ids: &mut [i32], past_cache: bool) {
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "below 2^31, as cu_seqlens is")]
    let position = |place: usize| place as i32;
    let count = std::array::from_fn(position);
    stream::fill(position_ids, past_cache, position, |place| count.map(|next| next + position(place)));
}
