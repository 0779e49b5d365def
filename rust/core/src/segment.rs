//! Text → sentence ends, as byte offsets.
//!
//! The ends of a text strictly increase, the last is the text's length, none lies inside a character, and an empty text
//! has none. A sentence ends
//!
//! * after a line break, so that headings, list items and the lines of a proof are sentences;
//! * after `.`, `!`, `?` or `…` with any closing quotes and brackets, where white space or the end of the text follows;
//!   but not after an abbreviation, an initial, the number of a list item (`2. Let …`) or a factorial (`5! = 120`), not
//!   where an ellipsis runs on (`1, 2, ... and`), and not after a quotation within a sentence (`"Why?" she asked`). A
//!   decimal point has no white space after it;
//! * after the full stops of scripts that write none like ours (`。`, `।`, `۔`, `។` and so on; see [`FREE`]), whatever
//!   follows;
//! * around `<think>` and `</think>`: each tag is a sentence by itself, because how probable a model finds the tag says
//!   nothing about the sentences next to it;
//! * around a block of code between lines of at least three backticks, and inside it after each empty line. A fence that
//!   is not closed before the next think tag is a sequence of ordinary lines.
//!
//! Nothing ends inside code between two backticks on a line, or inside mathematics: `$…$`, `$$…$$`, `\(…\)`, `\[…\]`; a
//! formula that closes with a full stop may end a sentence. The closing mark must come within [`MATH_REACH`] bytes and
//! before an empty line, else the opening one is an ordinary character; a single `$` opens only before a non-blank and
//! closes only after a non-blank and not before a digit ("costs $5 and $10" has no formula). White space belongs to the
//! sentence before it; at the start of the text, to the first.
//!
//! Time is linear: a failed search is not repeated over the same bytes.

use std::ops::Range;

use crate::abbreviation::is_abbreviation;
use crate::error::{Error, Result};
use crate::interrupt::{INTERVAL, Interrupt};
use crate::parallel::{self, GRAIN};
use crate::ragged::{Ragged, to_offset};

/// The most bytes between the opening and the closing mark of a formula.
pub const MATH_REACH: usize = 4096;

/// Sentence ends of each text of a column: all ends, and the offsets of each text's ends among them.
///
/// # Errors
/// A text that is not UTF-8.
pub fn sentence_ends(texts: Ragged<'_, u8>, interrupt: &Interrupt) -> Result<(Vec<i64>, Vec<i64>)> {
    let parts = parallel::try_map(parallel::cut(texts.offsets(), 4 * GRAIN), interrupt, |range| {
        let (mut ends, mut counts) = (vec![], Vec::with_capacity(range.len()));
        let mut copy = vec![];
        for index in range {
            // A copy, since another thread may write to the column: a `str` has to stay UTF-8.
            copy.clear();
            copy.extend_from_slice(&texts[index]);
            let text = std::str::from_utf8(&copy)
                .map_err(|error| Error::NotUtf8 { text: index, byte: error.valid_up_to() })?;
            let before = ends.len();
            Scanner::new(text, &mut ends, interrupt).run()?;
            counts.push(ends.len() - before);
        }
        Ok((ends, counts))
    })?;
    let mut offsets = Vec::with_capacity(texts.len() + 1);
    let mut end = 0;
    offsets.push(0);
    for count in parts.iter().flat_map(|(_, counts)| counts) {
        end += to_offset(*count);
        offsets.push(end);
    }
    let ends: Vec<Vec<i64>> = parts.into_iter().map(|(ends, _)| ends).collect();
    Ok((ends.concat(), offsets))
}

struct Scanner<'t, 'e> {
    interrupt: &'e Interrupt,
    text: &'t str,
    bytes: &'t [u8],
    ends: &'e mut Vec<i64>,
    /// Number of elements of `ends` before this text.
    first_end: usize,
    at: usize,
    /// The first byte of the current sentence that is not white space at the start of the text.
    start: usize,
    /// Whether only white space lies between the last line break and `at`.
    at_line_start: bool,
    /// For each kind of formula: there is no closing mark between the last opening mark and this byte.
    searched: [usize; 4],
    /// A fence of at least this many backticks is known to be unclosed if it opens before this byte.
    unclosed_fence: (usize, usize),
}

/// Kinds of formula: indices of `Scanner::searched`.
const DOLLAR: usize = 0;
const DOLLARS: usize = 1;
const ROUND: usize = 2;
const SQUARE: usize = 3;

/// Longer runs of backticks count as this many.
const MAX_FENCE: usize = 8;

/// Marks of one byte that the scanner has to examine.
const NOTABLE: &[u8] = b".!?\n\\$<`";

/// All marks: bit `i` of `MARKS[k][byte]` tells whether `byte` can be byte `k` of mark `i`. The marks are those of
/// [`FREE`], then `…`, and at the highest bit all of [`NOTABLE`]. Three look-ups recognize any of them; the first is
/// enough to skip most bytes.
static MARKS: [[u32; 256]; 3] = {
    let mut marks = [[0; 256]; 3];
    let mut i = 0;
    while i < FREE.len() {
        enter(&mut marks, FREE[i].as_bytes(), 1 << i);
        i += 1;
    }
    enter(&mut marks, "…".as_bytes(), 1 << FREE.len());
    i = 0;
    while i < NOTABLE.len() {
        enter(&mut marks, &[NOTABLE[i]], 1 << 31);
        i += 1;
    }
    marks
};

/// The bits of [`FREE`].
const IS_FREE: u32 = (1 << FREE.len()) - 1;

const fn enter(marks: &mut [[u32; 256]; 3], mark: &[u8], bit: u32) {
    let mut k = 0;
    while k < marks.len() {
        let mut byte = 0;
        while byte < 256 {
            // Whatever byte follows a short mark.
            if k >= mark.len() || mark[k] as usize == byte {
                marks[k][byte] |= bit;
            }
            byte += 1;
        }
        k += 1;
    }
}

/// The bit of the mark that these bytes are or begin with, or 0.
fn mark_of(first: u8, second: u8, third: u8) -> u32 {
    MARKS[0][usize::from(first)] & MARKS[1][usize::from(second)] & MARKS[2][usize::from(third)]
}

/// The bit of the mark at the start of the bytes, or 0.
fn mark_at(bytes: &[u8]) -> u32 {
    match *bytes {
        [] => 0,
        [first] => mark_of(first, 0, 0),
        [first, second] => mark_of(first, second, 0),
        [first, second, third, ..] => mark_of(first, second, third),
    }
}

/// Where the first mark is that begins from `at` on and before `stop`.
fn find_mark(bytes: &[u8], mut at: usize, stop: usize) -> Option<usize> {
    let first = |byte: u8| MARKS[0][usize::from(byte)];
    // Four bytes with one branch, as a rule.
    while at + 4 <= stop
        && let Some(&[a, b, c, d, e, f]) = bytes[at..].first_chunk()
        && (first(a) | first(b) | first(c) | first(d) == 0
            || mark_of(a, b, c) | mark_of(b, c, d) | mark_of(c, d, e) | mark_of(d, e, f) == 0)
    {
        at += 4;
    }
    (at..stop).find(|&at| first(bytes[at]) != 0 && mark_at(&bytes[at..]) != 0)
}

impl<'t, 'e> Scanner<'t, 'e> {
    fn new(text: &'t str, ends: &'e mut Vec<i64>, interrupt: &'e Interrupt) -> Self {
        let (start, _) = skip_white(text, 0);
        Self {
            interrupt,
            text,
            bytes: text.as_bytes(),
            first_end: ends.len(),
            ends,
            at: start,
            start,
            at_line_start: true,
            searched: [0; 4],
            unclosed_fence: (usize::MAX, 0),
        }
    }

    fn run(mut self) -> Result<()> {
        let len = self.bytes.len();
        while self.at < len {
            self.interrupt.check()?;
            if std::mem::take(&mut self.at_line_start) && self.take_line_start()? {
                continue;
            }
            let stop = len.min(self.at + INTERVAL);
            let mark = find_mark(self.bytes, self.at, stop);
            self.at = mark.unwrap_or(stop);
            if mark.is_some() {
                self.take_mark();
            }
        }
        let last = self.ends[self.first_end..].last().copied().unwrap_or(0);
        if last < to_offset(len) {
            self.ends.push(to_offset(len));
        }
        Ok(())
    }

    /// Ends the sentence after `at` and the white space that follows.
    fn end_sentence(&mut self, at: usize) {
        let (next, line_break) = skip_white(self.text, at);
        self.ends.push(to_offset(next));
        (self.at, self.start) = (next, next);
        self.at_line_start = line_break || self.bytes[at - 1] == b'\n';
    }

    /// Handles a fence or the number of a list item; returns whether there was a fence.
    fn take_line_start(&mut self) -> Result<bool> {
        let line = &self.bytes[self.at..];
        let ticks = line.iter().take_while(|&&byte| byte == b'`').count();
        if ticks >= 3
            && let Some(end) = self.take_fence(ticks.min(MAX_FENCE))?
        {
            self.end_sentence(end);
            return Ok(true);
        }
        let digits = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if (1..=3).contains(&digits) && matches!(line.get(digits..digits + 2), Some([b'.' | b')', b' ' | b'\t'])) {
            self.at += digits + 1;
        }
        Ok(false)
    }

    /// Where the fence that opens at `at` is closed. Ends a sentence after each empty line before that; the lines of the
    /// fence belong to the code next to them.
    fn take_fence(&mut self, ticks: usize) -> Result<Option<usize>> {
        let (unclosed, until) = self.unclosed_fence;
        if ticks >= unclosed && self.at < until {
            return Ok(None);
        }
        let first = self.ends.len();
        let mut from = self.at;
        // Where the code starts, then where its last sentence starts: white space before that is done with.
        let mut start = 0;
        while let Some(length) = memchr::memchr(b'\n', &self.bytes[from..]) {
            self.interrupt.check()?;
            from += length + 1;
            if start == 0 {
                start = skip_white(self.text, from).0;
            }
            let line = &self.bytes[from..];
            let line = &line[line.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count()..];
            if starts_with_think_tag(line).is_some() {
                break;
            }
            let closing = line.iter().take_while(|&&byte| byte == b'`').count();
            let blank = line[closing..].iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r')).count();
            let ends_line = line.get(closing + blank).is_none_or(|&byte| byte == b'\n');
            if closing >= ticks && ends_line {
                if self.ends.len() > first && start >= from {
                    self.ends.pop(); // after the last empty line there is only the closing one
                }
                return Ok(Some(self.bytes.len() - line.len() + closing));
            }
            if closing == 0 && ends_line && from > start {
                start = skip_white(self.text, from).0;
                self.ends.push(to_offset(start));
            }
        }
        self.ends.truncate(first);
        self.unclosed_fence = (ticks, from.max(self.at + 1));
        Ok(None)
    }

    fn take_mark(&mut self) {
        let rest = &self.bytes[self.at..];
        match rest[0] {
            b'\n' => self.end_sentence(self.at + 1),
            b'<' => self.take_think_tag(),
            b'`' => self.take_code(),
            b'$' if rest.starts_with(b"$$") => self.take_math(DOLLARS, 2),
            b'$' => self.take_math(DOLLAR, 1),
            b'\\' => match rest.get(1) {
                Some(b'(') => self.take_math(ROUND, 2),
                Some(b'[') => self.take_math(SQUARE, 2),
                Some(byte) if byte.is_ascii() && *byte != b'\n' => self.at += 2,
                _ => self.at += 1,
            },
            b'.' | b'!' | b'?' => self.take_terminators(),
            _ if mark_at(rest) & IS_FREE != 0 => self.take_free_terminators(),
            _ => self.take_terminators(), // …
        }
    }

    fn take_think_tag(&mut self) {
        let Some(length) = starts_with_think_tag(&self.bytes[self.at..]) else {
            self.at += 1;
            return;
        };
        if self.at > self.start {
            self.ends.push(to_offset(self.at));
        }
        self.end_sentence(self.at + length);
    }

    /// Skips code between two backticks, or the backticks if there are several or nothing closes them.
    fn take_code(&mut self) {
        let ticks = self.bytes[self.at..].iter().take_while(|&&byte| byte == b'`').count();
        let inside = self.at + ticks;
        let reach = &self.bytes[inside..self.bytes.len().min(self.at + MATH_REACH).max(inside)];
        let closing = reach.iter().position(|byte| matches!(byte, b'`' | b'\n'));
        self.at = match closing {
            Some(length) if ticks == 1 && reach[length] == b'`' => inside + length + 1,
            _ => inside,
        };
    }

    /// Skips a formula, or its opening mark if nothing closes it. A full stop at its end ends the sentence.
    fn take_math(&mut self, kind: usize, mark: usize) {
        let open = self.at;
        self.at += mark;
        let blank_follows = self.bytes.get(self.at).is_none_or(u8::is_ascii_whitespace);
        if kind == DOLLAR && blank_follows {
            return;
        }
        let stop = self.bytes.len().min(open + MATH_REACH);
        let mut from = self.searched[kind].max(self.at);
        while from < stop {
            let Some(length) =
                self.bytes[from..stop].iter().position(|byte| matches!(byte, b'\n' | b'<' | b'\\' | b'$'))
            else {
                from = stop;
                break;
            };
            from += length;
            let rest = &self.bytes[from..];
            if is_blank_line(rest) || starts_with_think_tag(rest).is_some() {
                break;
            }
            let length = match (kind, rest) {
                (ROUND, [b'\\', b')', ..]) | (SQUARE, [b'\\', b']', ..]) | (DOLLARS, [b'$', b'$', ..]) => 2,
                (_, [b'\\', ..]) => {
                    from += 2;
                    continue;
                }
                (DOLLAR, [b'$', after @ ..])
                    if !self.bytes[from - 1].is_ascii_whitespace()
                        && !after.first().is_some_and(|byte| byte.is_ascii_digit() || *byte == b'$') =>
                {
                    1
                }
                _ => {
                    from += 1;
                    continue;
                }
            };
            self.at = from + length;
            if self.ends_inside(from) {
                self.end_sentence(self.at);
            }
            return;
        }
        self.searched[kind] = from;
    }

    /// Whether a full stop before the closing mark at `closing` ends a sentence, as in `$x = 2.$ Then`.
    fn ends_inside(&self, closing: usize) -> bool {
        let inside = self.bytes[..closing].iter().rev().find(|&&byte| byte != b' ');
        let (next, _) = skip_white(self.text, self.at);
        inside == Some(&b'.')
            && self.bytes.get(self.at) == Some(&b' ')
            && self.char_at(next).is_some_and(char::is_uppercase)
    }

    fn char_at(&self, at: usize) -> Option<char> {
        self.text[at..].chars().next()
    }

    /// Handles a run of `.`, `!`, `?`, `…`.
    fn take_terminators(&mut self) {
        let first = self.at;
        let mut end = first;
        while let Some(length) = terminator(&self.bytes[end..]) {
            end += length;
        }
        let closed = self.skip_closers(end, true);
        let (next, line_break) = skip_white(self.text, closed);
        let ends = next > closed || next == self.bytes.len();
        if ends && !self.is_spared(first..end, closed, next, line_break) {
            self.end_sentence(closed);
        } else {
            self.at = end;
        }
    }

    /// Handles a run that begins with one of [`FREE`].
    fn take_free_terminators(&mut self) {
        let mut end = self.at;
        while let Some(length) = free_terminator(&self.bytes[end..]).or_else(|| terminator(&self.bytes[end..])) {
            end += length;
        }
        let closed = self.skip_closers(end, false);
        let is_quoted = self.text[..closed].ends_with(['」', '』']);
        if is_quoted && self.text[closed..].starts_with('と') {
            self.at = closed;
        } else {
            self.end_sentence(closed);
        }
    }

    /// Whether the sentence goes on after the marks in `run`, the closing quotes up to `closed` and the white space up to
    /// `next`.
    fn is_spared(&self, run: Range<usize>, closed: usize, next: usize, line_break: bool) -> bool {
        let follows = self.char_at(next);
        let is_quoted = self.bytes[run.end..closed].iter().any(|byte| !matches!(byte, b'*' | b'_'));
        if is_quoted && follows.is_some_and(char::is_lowercase) {
            return true;
        }
        match &self.bytes[run.clone()] {
            b"." => is_abbreviation(&self.text[self.start.min(run.start)..run.start], &self.text[next..]),
            b"!" => !line_break && self.is_factorial(run.start, next),
            _ => {
                let is_ellipsis = self.text[run].chars().all(|mark| matches!(mark, '.' | '…'));
                let goes_on = |follows: char| {
                    let is_sign = matches!(follows, '0'..='9' | '+' | '-' | '−' | '=' | '<' | '>' | ',' | ';' | ')');
                    is_sign || follows.is_lowercase()
                };
                is_ellipsis && follows.is_some_and(goes_on)
            }
        }
    }

    fn skip_closers(&self, mut at: usize, ascii_as_well: bool) -> usize {
        while let Some(&byte) = self.bytes.get(at) {
            let closes = match byte {
                b'"' | b'\'' | b'*' | b'_' | b'`' | b')' | b']' | b'}' => ascii_as_well,
                0xC2 | 0xE2 | 0xE3 | 0xEF => matches!(
                    self.char_at(at),
                    Some('”' | '’' | '»' | '」' | '』' | '）' | '】' | '》' | '〉' | '］' | '｝')
                ),
                _ => false,
            };
            if !closes {
                break;
            }
            at += utf8_len(byte);
        }
        // As French writes it: after a space, which may be narrow and must not break the line.
        match &self.bytes[at..] {
            [b' ', 0xC2, 0xBB, ..] => at + 3,
            [0xC2, 0xA0, 0xC2, 0xBB, ..] => at + 4,
            [0xE2, 0x80, 0xAF, 0xC2, 0xBB, ..] => at + 5,
            _ => at,
        }
    }

    /// Whether the `!` at `mark` follows a number or a single letter, and no new sentence begins at `next`.
    fn is_factorial(&self, mark: usize, next: usize) -> bool {
        let factor = match &self.bytes[..mark] {
            [.., digit] if digit.is_ascii_digit() => true,
            [letter] => letter.is_ascii_alphabetic(),
            [.., before, letter] => {
                letter.is_ascii_alphabetic() && before.is_ascii() && !before.is_ascii_alphanumeric() && *before != b'\''
            }
            [] => false,
        };
        factor && self.text[next..].chars().next().is_some_and(|next| !next.is_uppercase())
    }
}

/// Full stops and question marks of scripts that write them otherwise; white space need not follow them.
pub const FREE: [&str; 14] = ["。", "！", "？", "｡", "।", "॥", "؟", "۔", "։", "።", "፧", "။", "។", "៕"];

/// Whether the bytes begin with a line break and an empty line.
fn is_blank_line(bytes: &[u8]) -> bool {
    bytes[0] == b'\n' && bytes[1..].iter().find(|byte| !matches!(byte, b' ' | b'\t' | b'\r')) == Some(&b'\n')
}

/// Length of one of `.`, `!`, `?`, `…` at the start of the bytes.
fn terminator(bytes: &[u8]) -> Option<usize> {
    match bytes {
        [b'.' | b'!' | b'?', ..] => Some(1),
        _ if bytes.starts_with("…".as_bytes()) => Some(3),
        _ => None,
    }
}

/// Length of one of [`FREE`] at the start of the bytes.
fn free_terminator(bytes: &[u8]) -> Option<usize> {
    let mark = mark_at(bytes) & IS_FREE;
    (mark != 0).then(|| utf8_len(bytes[0]))
}

/// Length of the character that begins with a byte.
fn utf8_len(first: u8) -> usize {
    match first {
        0..0xC0 => 1,
        0xC0..0xE0 => 2,
        0xE0..0xF0 => 3,
        _ => 4,
    }
}

/// Where the white space that begins at `at` ends, and whether it contains a line break.
fn skip_white(text: &str, at: usize) -> (usize, bool) {
    let (mut next, mut line_break) = (at, false);
    while let Some(&byte) = text.as_bytes().get(next) {
        let is_white = match byte {
            b'\t'..=b'\r' | b' ' => true,
            // Other white space begins with one of these.
            0xC2 | 0xE1 | 0xE2 | 0xE3 => text[next..].chars().next().is_some_and(char::is_whitespace),
            _ => false,
        };
        if !is_white {
            break;
        }
        line_break |= byte == b'\n';
        next += utf8_len(byte);
    }
    (next, line_break)
}

fn starts_with_think_tag(bytes: &[u8]) -> Option<usize> {
    [b"<think>".as_slice(), b"</think>"].into_iter().find(|tag| bytes.starts_with(tag)).map(<[u8]>::len)
}
