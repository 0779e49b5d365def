//! Where sentences end: the promises on any text, and examples of each rule.

use dasd_lite_core::segment::{MATH_REACH, sentence_ends};
use dasd_lite_core::{Interrupt, Ragged};
use proptest::prelude::*;

fn ends(text: &str) -> Vec<usize> {
    let offsets = [0, i64::try_from(text.len()).unwrap()];
    let (ends, _) =
        sentence_ends(Ragged::new("offsets", text.as_bytes(), &offsets).unwrap(), &Interrupt::new()).unwrap();
    ends.into_iter().map(|end| usize::try_from(end).unwrap()).collect()
}

fn sentences(text: &str) -> Vec<&str> {
    let mut start = 0;
    ends(text).into_iter().map(|end| &text[std::mem::replace(&mut start, end)..end]).collect()
}

/// Texts of pieces that mean something to the rules.
fn texts() -> impl Strategy<Value = String> {
    let pieces = [
        "a",
        "Dr",
        "e.g",
        "B",
        "7",
        ".",
        ". ",
        "!",
        "?",
        "…",
        "。",
        "！",
        "？",
        "」",
        "\"",
        ")",
        "*",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u{3000}",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\",
        "```",
        "````",
        "\n```\n",
        "\n```py\n",
        "<think>",
        "</think>",
        "<",
        "1. ",
        "\n2) ",
        "é",
        "e\u{301}",
        "🎉",
        "👩‍👩‍👧",
        "中",
        "—",
        "、",
    ];
    prop_oneof![
        prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..60).prop_map(|pieces| pieces.concat()),
        any::<String>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn ends_keep_their_promises(text in texts()) {
        let ends = ends(&text);
        prop_assert!(ends.windows(2).all(|pair| pair[0] < pair[1]));
        prop_assert!(ends.iter().all(|&end| end > 0 && text.is_char_boundary(end)));
        prop_assert_eq!(ends.last().copied().unwrap_or(0), text.len());
        for sentence in sentences(&text).into_iter().skip(1) {
            prop_assert!(!sentence.starts_with(char::is_whitespace), "white space belongs to the sentence before");
        }
    }

    #[test]
    fn think_tags_stand_alone_outside_code(text in texts()) {
        let text = text.replace('`', "");
        for sentence in sentences(&text) {
            for tag in ["<think>", "</think>"] {
                if sentence.contains(tag) && !sentence.contains('\\') {
                    prop_assert_eq!(sentence.trim(), tag);
                }
            }
        }
    }

    #[test]
    fn a_column_is_its_texts(texts in prop::collection::vec(texts(), 0..5)) {
        let bytes = texts.concat().into_bytes();
        let mut offsets = vec![0];
        for text in &texts {
            offsets.push(offsets[offsets.len() - 1] + i64::try_from(text.len()).unwrap());
        }
        let column = Ragged::new("offsets", &bytes, &offsets).unwrap();
        let (values, offsets) = sentence_ends(column, &Interrupt::new()).unwrap();
        let ends_of = Ragged::new("ends", &values, &offsets).unwrap();
        for (text, ends_of) in texts.iter().zip(ends_of.iter()) {
            prop_assert!(ends(text).into_iter().eq(ends_of.iter().map(|&end| usize::try_from(end).unwrap())));
        }
    }
}

#[test]
fn rules_by_example() {
    // `|` stands for an end.
    for example in [
        "",
        "   ",
        "One. |Two! |Three? |Four… |Five… six ... 7 … + 8",
        "Pi is 3.14. |So?! |\"Yes.\" |(Really.) |**Bold.** |ok",
        "Option C. |Because John F. Kay and (J. Doe) met. |A. Doe, by J. R. R. Doe, Prof. K. Lee of the U.S. Army.",
        "In the U.S. |Then at 5 p.m. |He had a Ph.D. in i.e. Maths, etc. |No. 5 of Smith & Co. sells for 3 min. a day. |No. |So",
        "z. B. das, d. h. jenes. |и т. д. |Затем т. е. это. |Il dit « Non. » |Puis « oui. »",
        "'Why?' she asked. |“Stop!” |He did. |(Really?) and `a. b` or `c.` x. |Use `y`. |An open ` z. |End",
        "1. First. |2. Second. |In 2024. |Then",
        "सच है। |हाँ।|क्या؟ |نعم۔ |է։ |ነው። |တယ်။ |វា។ |「なぜ？」と彼。|終。",
        "Dr. Ng, e.g. J. Doe et al. (cf. Fig. 3, Eq. 4, i.e. this), vs. that, etc. and w.r.t. x. |Next.",
        "Heading\n\n|- item\n  |1. First. |Rest\n\t|2) second\r\n|end\n",
        "In 2024. |Then",
        "5! = 120 and n! is big. |Wow! |Yes! |7 is prime",
        "你好。|是吗？！|「对。」|好！",
        "So $x = 2.$ |Then $y = 3.$ and \\[z = 4.\\] |Done $a.$5",
        "Let $f(x. y) = 1. 2$ hold. |Now $$a. \n b$$ and \\(c. d\\) or \\[e. \\\\[2pt] f. \\] g. |Done",
        "It costs $5. |He has $10. |A stray $x. |No end",
        "An $open. \n\n|Closed$ far",
        "Escaped \\$a. |b\\$. |c",
        "<think>\n|Hm. |ok|</think>\n\n|Answer.",
        "a$b. |<think>|c$. |d",
        "Code:\n|```python\nx = 1. \n\n|y = 2\n```\n|Done.",
        "```\n\nx\n \t\n\n|y. z\n\n```\n|End",
        "  ```\na. b\n  ````  \n|c",
        "```\n|not closed. |x\n|</think>\n|```\n",
        "```a\n|b. |c",
        "🎉! |e\u{301}. |👩‍👩‍👧 x",
        "no.space and v1.2.3 or a.b",
    ] {
        let expected: Vec<&str> = example.split_inclusive('|').map(|part| part.trim_end_matches('|')).collect();
        let text = example.replace('|', "");
        let expected = if text.is_empty() { vec![] } else { expected };
        assert_eq!(sentences(&text), expected, "{text:?}");
    }
}

#[test]
fn a_formula_reaches_only_so_far() {
    let inside = |length: usize| format!("\\({}. x\\) b", "a".repeat(length));
    assert_eq!(sentences(&inside(100)).len(), 1);
    assert_eq!(sentences(&inside(MATH_REACH)).len(), 2);
}

#[test]
fn what_is_not_utf8_is_named() {
    let bytes = b"fineab\xFF";
    let column = Ragged::new("offsets", bytes, &[0, 4, 7]).unwrap();
    let error = sentence_ends(column, &Interrupt::new()).unwrap_err();
    assert_eq!(error.to_string(), "text 1 is not UTF-8 at its byte 2");
}

#[test]
fn time_is_linear() {
    // No clock is needed: if a failed search were repeated, each of these would take hours.
    for piece in
        ["$a ", "\\(", "\\[ ", "$$ x ", "```a\n", "````\n", "`````\n```a\n", "1", "a! \n", "<think", "\"'", ". ", "!"]
    {
        let text = piece.repeat((1 << 20) / piece.len());
        assert_eq!(ends(&text).last(), Some(&text.len()));
        ends(&(text + "\n</think>"));
    }
}
