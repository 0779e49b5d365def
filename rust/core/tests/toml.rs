//! Values and lines of TOML documents, and what is refused.

use dasd_lite_core::toml::{MAX_BYTES, MAX_DEPTH, Node, Table, Value, parse};

fn get<'v>(table: &'v Table, key: &str) -> &'v Node {
    &table.iter().find(|(name, _)| name == key).unwrap_or_else(|| panic!("no key {key}")).1
}

fn table(node: &Node) -> &Table {
    let Value::Table(table) = &node.value else { panic!("not a table: {node:?}") };
    table
}

fn error(text: &str) -> String {
    let message = parse(text).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn keys_have_the_line_they_are_first_written_on() {
    let root =
        parse("# a = 0 \"\"\"\n\na = [1,\n 2]\n[d.e]\nx.y = 1\n[[g]]\n[g.h]\n[[g]]\n[d]\ni = {\n j = 1}\n").unwrap();
    let keys: Vec<&str> = root.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["a", "d", "g"]);
    let Value::Array(elements) = &get(&root, "a").value else { panic!("an array") };
    assert_eq!((get(&root, "a").line, elements[0].line, elements[1].line), (3, 3, 4));
    let d = get(&root, "d");
    assert_eq!((d.line, get(table(d), "e").line), (5, 5), "[d] comes after [d.e]");
    let x = get(table(get(table(d), "e")), "x");
    assert_eq!((x.line, get(table(x), "y").line), (6, 6));
    let Value::Array(elements) = &get(&root, "g").value else { panic!("an array of tables") };
    assert_eq!((get(&root, "g").line, elements[0].line, elements[1].line), (7, 7, 9));
    assert_eq!(get(table(&elements[0]), "h").line, 8);
    let i = get(table(d), "i");
    assert_eq!((i.line, get(table(i), "j").line), (11, 12));
}

#[test]
fn line_ends_of_windows_are_line_ends() {
    let root = parse("a = 1\r\nb = \"\"\"x\r\ny\"\"\"\r\nc = 2\r\n").unwrap();
    assert_eq!(get(&root, "b").value, Value::String("x\ny".to_owned()));
    assert_eq!(get(&root, "c").line, 4);
}

#[test]
fn numbers() {
    let root = parse("a = 0xFF_FF\nb = -18446744073709551615\nc = 1_0.5e1\nd = -inf\ne = 1e999\n").unwrap();
    assert_eq!(get(&root, "a").value, Value::Integer(0xFFFF));
    assert_eq!(get(&root, "b").value, Value::Integer(-18_446_744_073_709_551_615));
    assert_eq!(get(&root, "c").value, Value::Float(105.0));
    assert_eq!(get(&root, "d").value, Value::Float(f64::NEG_INFINITY));
    assert_eq!(get(&root, "e").value, Value::Float(f64::INFINITY));
}

#[test]
fn errors_name_line_and_column() {
    assert_eq!(error("a = 1\nout = \n"), "2:7: the value is missing");
    assert_eq!(error("ä = 1"), "1:1: invalid unquoted key, expected letters, numbers, `-`, `_`");
    assert_eq!(error("a = \"ä\" x"), "1:9: unexpected key or value, expected newline, `#`");
    assert_eq!(error("a = yes"), "1:5: not a value; text must be in quotes");
    assert_eq!(error("[a]\nb = 1\nb = 2"), "3:1: duplicate key b");
    assert_eq!(error("[a]\n[a]"), "2:2: duplicate key a");
    assert_eq!(error("a = [1,"), "1:8: unclosed array, expected `]`");
    assert_eq!(error("a = \"x"), "1:7: invalid basic string, expected `\"`");
    assert_eq!(error("a = 1\0"), "1:5: not a value; text must be in quotes");
    assert_eq!(error("a = 0x"), "1:5: not an integer");
    assert_eq!(error("a = 2020-01-01"), "1:5: dates and times are not supported; write text in quotes");
}

#[test]
fn hostile_text_is_one_line() {
    let deep = "more than 64 keys and brackets inside each other";
    let nested = |open: &str, close: &str, depth| format!("a = {}1{}", open.repeat(depth), close.repeat(depth));
    assert_eq!(error(&nested("[", "]", 5000)), format!("1:68: {deep}"));
    assert_eq!(error(&nested("{a=", "}", 5000)), format!("1:195: {deep}"));
    assert_eq!(error(&format!("a{} = 1", ".a".repeat(20_000))), format!("1:129: {deep}"));
    assert_eq!(error(&format!("\n[a{}]", ".a".repeat(20_000))), format!("2:130: {deep}"));
    assert_eq!(error(&format!("a = {}", "1".repeat(5000))), "1:5: the integer has more than 128 bits");
    assert_eq!(error(&" ".repeat(MAX_BYTES + 1)), "1:1: the text has 1048577 bytes; the most is 1048576");
    for depth in [1, MAX_DEPTH - 1, MAX_DEPTH] {
        assert_eq!(parse(&nested("[", "]", depth)).is_ok(), depth < MAX_DEPTH);
    }
    // As deep as headers can hide it: an index for each key.
    let header = |depth| format!("[[{}a]]\n", "a.".repeat(depth - 1));
    let text: String = (1..=MAX_DEPTH + 1).map(header).collect();
    assert_eq!(error(&text), format!("65:131: {deep}"));
    assert!(parse(text.rsplit_once("[[").unwrap().0).is_ok());
    for text in [
        "[".repeat(MAX_BYTES),
        "a={".repeat(MAX_BYTES / 3),
        "a=[1\n".repeat(MAX_BYTES / 5),
        "\0".repeat(MAX_BYTES),
        "]".repeat(MAX_BYTES),
        "a.".repeat(MAX_BYTES / 2),
    ] {
        error(&text);
    }
}
