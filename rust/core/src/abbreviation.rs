//! Does a full stop belong to its word? Abbreviations, initials, numbers of items.
//!
//! `A.` is an initial at the beginning of a sentence (as the letter of a list item is), after another initial, after a
//! capitalized word (`John F. Kennedy`) and after `by` and the like; elsewhere (`option C. Because`) it ends a sentence.
//! Letters here are those that have a capital form.

/// Whether the full stop between a sentence so far and the text `after`, where it goes on after white space, belongs to the
/// number of an item, an abbreviation or an initial.
pub(crate) fn is_abbreviation(sentence: &str, after: &str) -> bool {
    if (1..=3).contains(&sentence.len()) && sentence.bytes().all(|byte| byte.is_ascii_digit()) {
        return true;
    }
    let (num_letters, word) = last_letters(sentence.as_bytes());
    if num_letters > 1 {
        let before = &sentence[..sentence.len() - num_letters];
        return full_stop_of(word).is_some_and(|full_stop| is_border(before) && full_stop.belongs(after));
    }
    let Some(letter) = sentence.chars().next_back() else { return false };
    let before = &sentence[..sentence.len() - letter.len_utf8()];
    is_border(before) && is_letter(letter) && is_initial(sentence, before, letter, after)
}

/// Whether the full stop after a single letter, the end of the sentence so far, belongs to it.
fn is_initial(sentence: &str, before: &str, letter: char, after: &str) -> bool {
    let follows = after.chars().next();
    let first_word = &after[..after.bytes().take_while(u8::is_ascii_alphabetic).count()];
    let starts = STARTERS.binary_search(&first_word).is_ok();
    if before.ends_with('.') {
        return is_latin_abbreviation(sentence) || !starts; // e.g., U.S.
    }
    if follows.is_some_and(is_letter) && after.chars().nth(1) == Some('.') {
        return true; // J. R., z. B.
    }
    let is_second = ends_with_initial(before);
    if !letter.is_uppercase() {
        return is_second && follows.is_some_and(char::is_lowercase);
    }
    let is_white = |character: char| character.is_whitespace();
    let is_opener = |character| is_white(character) || OPENERS.contains(&character);
    if is_second || before.chars().all(is_opener) || !before.ends_with(is_white) {
        return !starts;
    }
    let before = before.trim_end();
    let previous = last_word(before.strip_suffix('.').unwrap_or(before));
    let Some(initial) = previous.chars().next().filter(|_| !is_one_of(&LABELS, previous)) else {
        return false; // after a comma, say
    };
    !starts && (initial.is_uppercase() || BEFORE_NAMES.contains(&previous))
}

/// What the full stop after a word of the tables does.
#[derive(Clone, Copy)]
enum FullStop {
    /// It never ends a sentence.
    Never,
    /// It ends one only before a capital letter.
    BeforeCapital,
    /// It ends one unless a digit follows: `No. 5`.
    UnlessDigit,
}

impl FullStop {
    /// Whether it belongs to its word and ends no sentence before this text.
    fn belongs(self, after: &str) -> bool {
        let follows = after.chars().next();
        match self {
            Self::Never => true,
            Self::BeforeCapital => !follows.is_some_and(char::is_uppercase),
            Self::UnlessDigit => follows.is_some_and(|follows| follows.is_ascii_digit()),
        }
    }
}

/// In lower case, at most 7 letters. `sol.` is missing: more often it ends a sentence.
const NEVER: [&str; 45] = [
    "approx", "assoc", "avda", "ca", "capt", "cf", "ch", "col", "cor", "dept", "dr", "dra", "eq", "eqn", "eqns", "eqs",
    "ex", "fig", "figs", "gen", "gov", "hr", "ineq", "lem", "lt", "mr", "mrs", "ms", "mt", "pp", "prof", "prop", "ref",
    "refs", "rev", "sec", "sen", "sgt", "sra", "st", "thm", "viz", "vol", "vs", "wrt",
];
const BEFORE_CAPITAL: [&str; 15] =
    ["al", "co", "corp", "est", "etc", "hrs", "inc", "jr", "lb", "lbs", "ltd", "min", "oz", "resp", "sr"];
const UNLESS_DIGIT: [&str; 14] =
    ["apr", "aug", "dec", "feb", "jan", "jul", "jun", "mar", "no", "nov", "nr", "oct", "sep", "sept"];

/// A hash table of these words as numbers (see [`last_letters`]): each is in the first free place from its own on. Nearly
/// every full stop asks for a word that is not there, and most of these find an empty place at once.
static WORDS: [Option<(u64, FullStop)>; 256] = {
    let mut table = [None; 256];
    enter(&mut table, &NEVER, FullStop::Never);
    enter(&mut table, &BEFORE_CAPITAL, FullStop::BeforeCapital);
    enter(&mut table, &UNLESS_DIGIT, FullStop::UnlessDigit);
    table
};

const fn enter(table: &mut [Option<(u64, FullStop)>; 256], words: &[&str], full_stop: FullStop) {
    let mut i = 0;
    while i < words.len() {
        let letters = words[i].as_bytes();
        assert!(letters.len() < 8, "a word is too long for its number");
        let (mut word, mut j) = (0, 0);
        while j < letters.len() {
            word = (word << 8) | letters[j] as u64;
            j += 1;
        }
        let mut at = place(word);
        while table[at].is_some() {
            at = (at + 1) % table.len();
        }
        table[at] = Some((word, full_stop));
        i += 1;
    }
}

/// Where the search for a word begins.
const fn place(word: u64) -> usize {
    (word.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as usize
}

fn full_stop_of(word: u64) -> Option<FullStop> {
    let mut at = place(word);
    while let Some((entry, full_stop)) = WORDS[at] {
        if entry == word {
            return Some(full_stop);
        }
        at = (at + 1) % WORDS.len();
    }
    None
}

/// The number of ASCII letters at the end of a text, at most 8, and these letters in lower case as a number, the last in
/// its lowest byte.
fn last_letters(text: &[u8]) -> (usize, u64) {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let last = text.last_chunk::<8>().copied().unwrap_or_else(|| {
        let mut last = [0; 8];
        last[8 - text.len()..].copy_from_slice(text);
        last
    });
    // All eight at once: the highest bit of each byte tells whether it is a letter.
    let bytes = u64::from_be_bytes(last);
    let lower = bytes | (0x20 * EACH);
    let low = lower & (0x7F * EACH);
    let from_a = low + (0x80 - u64::from(b'a')) * EACH;
    let after_z = low + (0x80 - u64::from(b'z') - 1) * EACH;
    let others = !(from_a & !after_z & !bytes) & (0x80 * EACH);
    let num_letters = others.trailing_zeros() / 8;
    let letters = lower & u64::MAX.checked_shr(64 - 8 * num_letters).unwrap_or(0);
    (num_letters as usize, letters)
}

/// Words before a capital letter that names a thing: `option C.`
const LABELS: [&str; 16] = [
    "answer", "case", "choice", "class", "figure", "group", "option", "part", "plan", "point", "question", "set",
    "step", "team", "type", "variable",
];

/// Words before an initial: `by J. Smith`.
const BEFORE_NAMES: [&str; 11] = [
    "author",
    "by",
    "composer",
    "inventor",
    "mathematician",
    "philosopher",
    "physicist",
    "poet",
    "president",
    "professor",
    "writer",
];

/// Words that begin a sentence rather than follow an initial or `U.S.`; sorted.
const STARTERS: [&str; 71] = [
    "A",
    "After",
    "All",
    "Also",
    "An",
    "And",
    "As",
    "At",
    "Because",
    "But",
    "By",
    "Each",
    "Finally",
    "First",
    "For",
    "From",
    "He",
    "Hence",
    "Her",
    "Here",
    "His",
    "How",
    "However",
    "I",
    "If",
    "In",
    "Is",
    "It",
    "Its",
    "Let",
    "My",
    "Next",
    "No",
    "Not",
    "Note",
    "Now",
    "Of",
    "On",
    "One",
    "Only",
    "Or",
    "Otherwise",
    "Our",
    "She",
    "Since",
    "So",
    "Suppose",
    "That",
    "The",
    "Their",
    "Then",
    "There",
    "Therefore",
    "These",
    "They",
    "This",
    "Those",
    "Thus",
    "To",
    "Wait",
    "We",
    "What",
    "When",
    "Where",
    "Which",
    "While",
    "Who",
    "Why",
    "With",
    "Yes",
    "You",
];

/// What may stand between white space and a word.
const OPENERS: [char; 10] = ['"', '\'', '“', '‘', '„', '«', '(', '[', '*', '_'];

/// Whether a word is in a table of lower-case words.
fn is_one_of(table: &[&str], word: &str) -> bool {
    table.iter().any(|entry| word.eq_ignore_ascii_case(entry))
}

/// Whether it has a capital form. Letters of scripts without capitals never make an initial.
fn is_letter(character: char) -> bool {
    character.is_uppercase() || character.is_lowercase()
}

/// The letters at the end of a text.
fn last_word(text: &str) -> &str {
    let ascii = text.bytes().rev().take_while(u8::is_ascii_alphabetic).count();
    let (before, word) = text.split_at(text.len() - ascii);
    if before.bytes().next_back().is_none_or(|byte| byte.is_ascii()) {
        return word;
    }
    &text[text.trim_end_matches(is_letter).len()..]
}

/// Whether a word can begin after this text.
fn is_border(before: &str) -> bool {
    match before.as_bytes().last() {
        Some(last) if last.is_ascii() => !last.is_ascii_alphanumeric(),
        _ => before.chars().next_back().is_none_or(|last| last.is_whitespace() || OPENERS.contains(&last)),
    }
}

/// Whether a text ends with a single letter, a full stop and one white space.
fn ends_with_initial(before: &str) -> bool {
    let mut before = before.chars();
    let is_white = before.next_back().is_some_and(char::is_whitespace);
    let is_dot = before.next_back() == Some('.');
    let is_initial = before.next_back().is_some_and(is_letter);
    is_white && is_dot && is_initial && is_border(before.as_str())
}

/// Whether a text ends with `e.g` or `i.e`.
fn is_latin_abbreviation(text: &str) -> bool {
    let Some((before, last)) = text.as_bytes().split_last_chunk::<3>() else { return false };
    let matches = [b"e.g", b"i.e"].into_iter().any(|abbreviation| last.eq_ignore_ascii_case(abbreviation));
    matches && !before.last().is_some_and(u8::is_ascii_alphabetic)
}
