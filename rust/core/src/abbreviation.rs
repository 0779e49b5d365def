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
    let word = last_word(sentence);
    let before = &sentence[..sentence.len() - word.len()];
    if word.is_empty() || !is_border(before) {
        return false;
    }
    let follows = after.chars().next();
    let mut letters = word.chars();
    let (Some(letter), None) = (letters.next(), letters.next()) else {
        let Some(key) = key(word.as_bytes()) else { return false };
        return if NUMBERED.contains(&key) {
            follows.is_some_and(|follows| follows.is_ascii_digit())
        } else {
            let ends = || follows.is_some_and(char::is_uppercase);
            ABBREVIATIONS.contains(&key) || (ENDING_ABBREVIATIONS.contains(&key) && !ends())
        };
    };
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

/// Words whose full stop never ends a sentence, in lower case. `sol.` is missing: more often it ends one.
const ABBREVIATIONS: [u64; 45] = keys([
    "approx", "assoc", "avda", "ca", "capt", "cf", "ch", "col", "cor", "dept", "dr", "dra", "eq", "eqn", "eqns", "eqs",
    "ex", "fig", "figs", "gen", "gov", "hr", "ineq", "lem", "lt", "mr", "mrs", "ms", "mt", "pp", "prof", "prop", "ref",
    "refs", "rev", "sec", "sen", "sgt", "sra", "st", "thm", "viz", "vol", "vs", "wrt",
]);

/// Words whose full stop ends a sentence only before a capital letter.
const ENDING_ABBREVIATIONS: [u64; 15] =
    keys(["al", "co", "corp", "est", "etc", "hrs", "inc", "jr", "lb", "lbs", "ltd", "min", "oz", "resp", "sr"]);

/// Words whose full stop ends a sentence unless a digit follows: `No. 5`.
const NUMBERED: [u64; 14] =
    keys(["apr", "aug", "dec", "feb", "jan", "jul", "jun", "mar", "no", "nov", "nr", "oct", "sep", "sept"]);

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

/// A word of at most 8 letters as a number, without regard to case, so that tables are searched quickly.
const fn key(word: &[u8]) -> Option<u64> {
    if word.len() > 8 {
        return None;
    }
    let (mut key, mut i) = (0, 0);
    while i < word.len() {
        key = (key << 8) | word[i].to_ascii_lowercase() as u64;
        i += 1;
    }
    Some(key)
}

const fn keys<const N: usize>(words: [&str; N]) -> [u64; N] {
    let (mut keys, mut i) = ([0; N], 0);
    while i < N {
        keys[i] = key(words[i].as_bytes()).expect("a short word");
        i += 1;
    }
    keys
}

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
    let can_precede = |last: char| {
        last.is_whitespace() || OPENERS.contains(&last) || (last.is_ascii() && !last.is_ascii_alphanumeric())
    };
    before.chars().next_back().is_none_or(can_precede)
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
