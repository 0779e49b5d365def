//! The one error type. Each message has the numbers that a person needs to find the fault.

/// What can be wrong with the data or the arguments of a call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Offsets without even the leading zero.
    #[error("{name} is empty; offsets of n rows have n + 1 elements, the first 0")]
    OffsetsEmpty {
        /// The argument.
        name: &'static str,
    },
    /// Offsets that do not begin at zero.
    #[error("{name}[0] is {value}; offsets start at 0")]
    OffsetsStart {
        /// The argument.
        name: &'static str,
        /// The value there.
        value: i64,
    },
    /// Offsets that go down.
    #[error("{name}[{index}] is {value}, less than the {before} before it; offsets never decrease")]
    OffsetsDecrease {
        /// The argument.
        name: &'static str,
        /// Where.
        index: usize,
        /// The value there.
        value: i64,
        /// The value before it.
        before: i64,
    },
    /// Offsets that end before or after the values.
    #[error("{name}[{index}] is {value}, but there are {len} values; the last offset is their number")]
    OffsetsEnd {
        /// The argument.
        name: &'static str,
        /// Where (the last).
        index: usize,
        /// The value there.
        value: i64,
        /// Number of values.
        len: usize,
    },
    /// Two columns that must be equally long are not.
    #[error("{left} has {left_len} elements and {right} {right_len}; they must be equally many")]
    UnequalLengths {
        /// The one argument.
        left: &'static str,
        /// Its length.
        left_len: usize,
        /// The other argument.
        right: &'static str,
        /// Its length.
        right_len: usize,
    },
    /// An argument out of its range.
    #[error("{name} is {value}; it must be {must}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What would be right.
        must: &'static str,
    },
    /// A sequence without tokens.
    #[error("lengths[{index}] is {value}; a sequence has at least 1 token")]
    LengthTooShort {
        /// Which sequence.
        index: usize,
        /// Its length.
        value: i64,
    },
    /// A sequence that fits into no row.
    #[error("lengths[{index}] is {value}, more than seq_len {seq_len}")]
    LengthTooLong {
        /// Which sequence.
        index: usize,
        /// Its length.
        value: i64,
        /// Tokens that a row can hold.
        seq_len: u32,
    },
    /// A sequence that fits into no row of the plan.
    #[error(
        "sequence {sequence} has {value} tokens, more than seq_len {seq_len}; is the plan made of these sequences?"
    )]
    SequenceTooLong {
        /// Which sequence.
        sequence: usize,
        /// Its tokens.
        value: i64,
        /// Tokens that a row can hold.
        seq_len: u32,
    },
    /// Sequences of one row that together do not fit into it.
    #[error("row {row} has {value} tokens, more than seq_len {seq_len}; is the plan made of these sequences?")]
    RowTooLong {
        /// Which row.
        row: i64,
        /// Its tokens, padding included.
        value: i64,
        /// Tokens that a row can hold.
        seq_len: u32,
    },
    /// A sequence of negative length.
    #[error("lengths[{index}] is {value}; a length is at least 0")]
    NegativeLength {
        /// Which sequence.
        index: usize,
        /// Its length.
        value: i64,
    },
    /// An index of something that does not exist.
    #[error("{name}[{index}] is {value}; it must be from 0 and below {len}")]
    BadIndex {
        /// The argument.
        name: &'static str,
        /// Where.
        index: usize,
        /// The value there.
        value: i64,
        /// How many there are.
        len: usize,
    },
    /// Text that is not UTF-8.
    #[error("text {text} is not UTF-8 at its byte {byte}")]
    NotUtf8 {
        /// Which text of the column.
        text: usize,
        /// The first bad byte, counted from the text's start.
        byte: usize,
    },
    /// Sentence ends that are not strictly increasing or not above 0.
    #[error("response {response}: sentence end {index} is {value}, after {before}; ends strictly increase from 0")]
    EndsNotIncreasing {
        /// Which response.
        response: usize,
        /// Which sentence of it.
        index: usize,
        /// The value there.
        value: i64,
        /// The end before it, 0 for the first.
        before: i64,
    },
    /// Sentence ends that do not end with the text.
    #[error("response {response}: the last sentence ends at byte {value}, the text has {len} bytes")]
    EndsNotTextLength {
        /// Which response.
        response: usize,
        /// The last end.
        value: i64,
        /// Length of the text.
        len: usize,
    },
    /// A token of negative length.
    #[error("response {response}, token {token}: its length is {value} bytes; lengths are at least 0")]
    NegativeTokenBytes {
        /// Which response.
        response: usize,
        /// Which token of it.
        token: usize,
        /// The value there.
        value: i64,
    },
    /// Tokens and text disagree about the number of bytes.
    #[error("response {response}: its tokens end at byte {token_bytes}, its text at {text_bytes}; they must agree")]
    TokenBytesMismatch {
        /// Which response.
        response: usize,
        /// Where the last token ends.
        token_bytes: i64,
        /// Length of the text.
        text_bytes: i64,
    },
    /// Tokens of a response that has no sentence.
    #[error("response {response}: {num_tokens} tokens, but no sentence that they could begin in")]
    NoSentence {
        /// Which response.
        response: usize,
        /// How many tokens it has.
        num_tokens: usize,
    },
    /// A response with too many ids to number them.
    #[error("response {response} has {len} ids; it must have fewer than 2147483648")]
    TooManyIds {
        /// Which response.
        response: usize,
        /// Its length.
        len: usize,
    },
    /// A value of a flat array that is not allowed there.
    #[error("{name}[{index}] is {value}; it must be {must}")]
    BadValue {
        /// The argument.
        name: &'static str,
        /// Where.
        index: usize,
        /// The value there.
        value: f64,
        /// What would be right.
        must: &'static str,
    },
    /// Text that is not TOML, or uses what is not supported.
    #[error("{line}:{column}: {message}")]
    Toml {
        /// The line, from 1.
        line: usize,
        /// The character of the line, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// An array that another thread wrote to.
    #[error("an array changed during the call; do not write to arrays that another thread is reading")]
    Changed,
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Result with the core's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Fails if two columns that belong together are not equally long.
pub(crate) fn equally_many(left: &'static str, left_len: usize, right: &'static str, right_len: usize) -> Result<()> {
    if left_len == right_len { Ok(()) } else { Err(Error::UnequalLengths { left, left_len, right, right_len }) }
}
