//! The longest stretch of back-to-back copies in a sequence, exactly.
//!
//! A sequence is halved again and again (Main and Lorentz 1984): a stretch lies inside a half, or it crosses the middle.
//! If it crosses the middle and holds three copies, one of them lies beside the middle on one side. For a copy of length
//! p that begins at the middle, the stretch goes as far to the right as the text from the middle on equals itself p ids
//! later, and as far to the left likewise. Z functions give these lengths for all p at once, in time that is linear in
//! the part; so the whole takes n log n, whatever the sequence. Copies that end at the middle are those of the sequence
//! read backward.

use crate::error::Result;
use crate::interrupt::Interrupt;

/// A stretch has at least this many copies: a list that is given twice is none.
const MIN_COPIES: usize = 3;

/// Finds stretches; keeps its buffers between calls.
pub(crate) struct StretchFinder<I> {
    backward: Vec<I>,
    lengths: Lengths,
}

/// How far a sequence equals itself from later places on.
#[derive(Default)]
struct Lengths {
    of_right: Vec<usize>,
    of_left: Vec<usize>,
    to_left: Vec<usize>,
}

impl<I> Default for StretchFinder<I> {
    fn default() -> Self {
        Self { backward: vec![], lengths: Lengths::default() }
    }
}

impl<I: Copy + Eq> StretchFinder<I> {
    /// The length of the longest stretch in `ids` if it is above `longest`; else `longest`.
    pub(crate) fn longer_than(&mut self, longest: usize, ids: &[I], interrupt: &Interrupt) -> Result<usize> {
        self.backward.clear();
        self.backward.extend(ids.iter().rev());
        search(&mut self.lengths, ids, &self.backward, longest, interrupt)
    }
}

/// Halves `forward`, of which `backward` is the reverse.
fn search<I: Copy + Eq>(
    lengths: &mut Lengths,
    forward: &[I],
    backward: &[I],
    longest: usize,
    interrupt: &Interrupt,
) -> Result<usize> {
    let (len, middle) = (forward.len(), forward.len() / 2);
    if len <= longest || len < MIN_COPIES {
        return Ok(longest);
    }
    let longest = crossing(lengths, forward, backward, middle, longest, interrupt)?;
    let longest = crossing(lengths, backward, forward, len - middle, longest, interrupt)?;
    let longest = search(lengths, &forward[..middle], &backward[len - middle..], longest, interrupt)?;
    search(lengths, &forward[middle..], &backward[..len - middle], longest, interrupt)
}

/// The longest stretch with a whole copy that begins at `middle`.
fn crossing<I: Copy + Eq>(
    Lengths { of_right, of_left, to_left }: &mut Lengths,
    forward: &[I],
    backward: &[I],
    middle: usize,
    longest: usize,
    interrupt: &Interrupt,
) -> Result<usize> {
    let (right, left) = (&forward[middle..], &backward[forward.len() - middle..]);
    // No copy is longer.
    let most = right.len().min(forward.len() / MIN_COPIES);
    z_function(of_right, right, most, interrupt)?;
    z_function(of_left, left, most, interrupt)?;
    // Place 0 is what lies before middle + most, backward; place most − p what lies before middle + p.
    prefixes(to_left, left, of_left, &backward[right.len() - most..], most, interrupt)?;
    let mut longest = longest;
    for period in 1..=most {
        let length = to_left[most - period] + period + of_right[period];
        if length > longest && length >= MIN_COPIES * period {
            longest = length;
        }
    }
    Ok(longest)
}

/// For each place up to `last`, how many ids from there on are those at the beginning; 0 beyond the end.
fn z_function<I: Copy + Eq>(lengths: &mut Vec<usize>, ids: &[I], last: usize, interrupt: &Interrupt) -> Result<()> {
    lengths.clear();
    lengths.push(ids.len());
    // The reach of the match that goes farthest, and where it began.
    let (mut end, mut start) = (0, 0);
    for at in 1..=last {
        interrupt.every(at)?;
        let mut length = if at < end { lengths[at - start].min(end - at) } else { 0 };
        if at + length >= end {
            while at + length < ids.len() && ids[at + length] == ids[length] {
                interrupt.every(length)?;
                length += 1;
            }
            (end, start) = (at + length, at);
        }
        lengths.push(length);
    }
    Ok(())
}

/// For each place of `text` before `last`, how many ids from there on are those at the beginning of `pattern`, of which
/// `own` is the Z function.
fn prefixes<I: Copy + Eq>(
    lengths: &mut Vec<usize>,
    pattern: &[I],
    own: &[usize],
    text: &[I],
    last: usize,
    interrupt: &Interrupt,
) -> Result<()> {
    lengths.clear();
    let (mut end, mut start) = (0, 0);
    for at in 0..last {
        interrupt.every(at)?;
        let mut length = if at < end { own[at - start].min(end - at) } else { 0 };
        if at + length >= end {
            while at + length < text.len() && length < pattern.len() && text[at + length] == pattern[length] {
                interrupt.every(length)?;
                length += 1;
            }
            (end, start) = (at + length, at);
        }
        lengths.push(length);
    }
    Ok(())
}
