//! TOML text → values, each with the line that it is written on.
//!
//! The crate `toml` does the parsing. Added here: values in the order in which they are written, one-line errors with
//! line and column, and limits that keep hostile text cheap ([`MAX_BYTES`], [`MAX_DEPTH`]). The depth is checked on
//! the parser's events, before anything recursive exists.

use ::toml::Spanned;
use ::toml::de::{DeInteger, DeTable, DeValue};
use toml_parser::decoder::Encoding;
use toml_parser::parser::{EventReceiver, parse_document};
use toml_parser::{ErrorSink, Source, Span};

use crate::error::{Error, Result};

/// The longest text, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// The most keys and brackets that lead to a value. (With the indices that a header like `[a.b]` leaves out when `a` is
/// an array of tables, a value can be twice as deep.)
pub const MAX_DEPTH: usize = 64;

/// A value and where it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The line of its key, or of the value itself in an array; of a table or array that is written in several places,
    /// the first of them. Lines count from 1.
    pub line: usize,
    /// The value.
    pub value: Value,
}

/// A TOML value; dates and times are refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text.
    String(String),
    /// An integer; TOML asks for 64 bits only.
    Integer(i128),
    /// A number, infinity or NaN.
    Float(f64),
    /// True or false.
    Boolean(bool),
    /// An array, or an array of tables.
    Array(Vec<Node>),
    /// A table.
    Table(Table),
}

/// Keys and values in the order in which they are first written.
pub type Table = Vec<(String, Node)>;

/// Parses a document.
///
/// # Errors
/// [`Error::Toml`] with line and column: a syntax error, a duplicate key, a date or time, an integer of more than 128
/// bits, a value deeper than [`MAX_DEPTH`], a text longer than [`MAX_BYTES`].
pub fn parse(text: &str) -> Result<Table> {
    if text.len() > MAX_BYTES {
        let message = format!("the text has {} bytes; the most is {MAX_BYTES}", text.len());
        return Err(Error::Toml { line: 1, column: 1, message });
    }
    let text = text.replace("\r\n", "\n");
    let document = Document::new(&text);
    if let Some(start) = DepthGuard::first_too_deep(&text) {
        return Err(document.error(start, &format!("more than {MAX_DEPTH} keys and brackets inside each other")));
    }
    let table = DeTable::parse(&text).map_err(|error| document.syntax_error(&error))?;
    let (_, table) = document.table(table.get_ref())?;
    Ok(table)
}

struct Document<'t> {
    text: &'t str,
    /// Where each line starts.
    lines: Vec<usize>,
}

impl<'t> Document<'t> {
    fn new(text: &'t str) -> Self {
        let lines = [0].into_iter().chain(text.match_indices('\n').map(|(index, _)| index + 1)).collect();
        Self { text, lines }
    }

    fn line(&self, byte: usize) -> usize {
        self.lines.partition_point(|&start| start <= byte)
    }

    fn error(&self, byte: usize, message: &str) -> Error {
        let line = self.line(byte);
        let before = self.text.get(self.lines[line - 1]..byte).unwrap_or_default();
        Error::Toml { line, column: before.chars().count() + 1, message: message.replace(char::is_control, " ") }
    }

    fn syntax_error(&self, error: &::toml::de::Error) -> Error {
        let span = error.span().unwrap_or_default();
        let message = match error.message() {
            "duplicate key" => {
                let key = self.text.get(span.clone()).filter(|key| key.len() <= 80).unwrap_or_default();
                format!("duplicate key {key}")
            }
            message if message.starts_with("string values must be quoted") => {
                let what = if span.is_empty() { "the value is missing" } else { "not a value; text must be in quotes" };
                what.to_owned()
            }
            message => message.trim_end_matches(", expected nothing").to_owned(),
        };
        self.error(span.start, &message)
    }

    /// Also returns where the first of the table's keys is written.
    fn table(&self, table: &DeTable<'_>) -> Result<(usize, Table)> {
        let mut entries = table
            .iter()
            .map(|(key, value)| {
                let (start, value) = self.value(value)?;
                // A table may be written before its own header, in that of a table inside it.
                let start = start.min(key.span().start);
                Ok((start, key.get_ref().to_string(), value))
            })
            .collect::<Result<Vec<_>>>()?;
        entries.sort_by_key(|&(start, ..)| start);
        let first = entries.first().map_or(usize::MAX, |&(start, ..)| start);
        let node = |(start, key, value)| (key, Node { line: self.line(start), value });
        Ok((first, entries.into_iter().map(node).collect()))
    }

    /// Also returns where the value, or for a table the first of its keys, is written.
    fn value(&self, value: &Spanned<DeValue<'_>>) -> Result<(usize, Value)> {
        let span = value.span();
        let start = span.start;
        let value = match value.get_ref() {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Integer(number) => Value::Integer(self.integer(number, start)?),
            DeValue::Float(number) => {
                let number = number.as_str().parse();
                Value::Float(number.map_err(|_| self.error(start, "not a number"))?)
            }
            DeValue::Boolean(flag) => Value::Boolean(*flag),
            DeValue::Datetime(_) => {
                return Err(self.error(start, "dates and times are not supported; write text in quotes"));
            }
            DeValue::Array(elements) => {
                let node = |element| {
                    let (start, value) = self.value(element)?;
                    Ok(Node { line: self.line(start), value })
                };
                Value::Array(elements.iter().map(node).collect::<Result<_>>()?)
            }
            DeValue::Table(table) => {
                let (first, table) = self.table(table)?;
                return Ok((start.min(first), Value::Table(table)));
            }
        };
        Ok((start, value))
    }

    fn integer(&self, number: &DeInteger<'_>, start: usize) -> Result<i128> {
        i128::from_str_radix(number.as_str(), number.radix()).map_err(|error| {
            let too_large =
                matches!(error.kind(), std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow);
            let message = if too_large { "the integer has more than 128 bits" } else { "not an integer" };
            self.error(start, message)
        })
    }
}

/// Finds the first value that is too deep, from the parser's events.
struct DepthGuard {
    /// The tables and arrays that are open, the document first.
    open: Vec<Level>,
    /// Whether the next key continues a dotted one.
    dotted: bool,
    too_deep: Option<usize>,
}

#[derive(Clone, Copy, Default)]
struct Level {
    /// Keys and indices that lead here.
    depth: usize,
    /// Parts of the key that is being read; in an array 1, the index.
    parts: usize,
}

impl DepthGuard {
    fn first_too_deep(text: &str) -> Option<usize> {
        let mut guard = Self { open: vec![], dotted: false, too_deep: None };
        guard.header();
        parse_document(&Source::new(text).lex().into_vec(), &mut guard, &mut ());
        guard.too_deep
    }

    fn innermost(&mut self) -> &mut Level {
        self.open.last_mut().expect("the document is never closed")
    }

    fn header(&mut self) {
        self.open.clear();
        self.open.push(Level::default());
        self.dotted = false;
    }

    fn header_end(&mut self, indices: usize) {
        let level = self.innermost();
        *level = Level { depth: level.parts + indices, parts: 0 };
    }

    fn enter(&mut self, parts: usize, span: Span) -> bool {
        let around = *self.innermost();
        self.open.push(Level { depth: around.depth + around.parts, parts });
        self.is_allowed(span)
    }

    fn leave(&mut self) {
        if self.open.len() > 1 {
            self.open.pop();
        }
    }

    fn is_allowed(&mut self, span: Span) -> bool {
        let level = *self.innermost();
        let allowed = level.depth + level.parts <= MAX_DEPTH;
        if !allowed {
            self.too_deep.get_or_insert(span.start());
        }
        allowed
    }
}

impl EventReceiver for DepthGuard {
    fn std_table_open(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.header();
    }

    fn std_table_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.header_end(0);
    }

    fn array_table_open(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.header();
    }

    fn array_table_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.header_end(1);
    }

    fn inline_table_open(&mut self, span: Span, _: &mut dyn ErrorSink) -> bool {
        self.enter(0, span)
    }

    fn inline_table_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.leave();
    }

    fn array_open(&mut self, span: Span, _: &mut dyn ErrorSink) -> bool {
        self.enter(1, span)
    }

    fn array_close(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.leave();
    }

    fn simple_key(&mut self, span: Span, _: Option<Encoding>, _: &mut dyn ErrorSink) {
        let dotted = std::mem::take(&mut self.dotted);
        let level = self.innermost();
        level.parts = if dotted { level.parts + 1 } else { 1 };
        self.is_allowed(span);
    }

    fn key_sep(&mut self, _: Span, _: &mut dyn ErrorSink) {
        self.dotted = true;
    }
}
