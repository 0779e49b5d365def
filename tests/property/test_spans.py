"""Which tokens belong to which sentence, for tokenizers of four kinds, on text that is hard to cut.

The reference walks over bytes in plain Python: a token belongs to the sentence of its first byte that is not white
space.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import dasd_lite
from dasd_lite.chat.chat import Chat
from dasd_lite.errors import DataError
from dasd_lite.method.divergence import Tokens, sentence_scores
from dasd_lite.method.sentences import sentence_ends

DEMO = Path(dasd_lite.__file__).parent / "demo"
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
KINDS = ("demo student", "demo teacher", "metaspace", "normalizing")
TEXTS = [
    "Family 👩‍👩‍👧‍👦 here. Flag 🇩🇪🇯🇵! Thumbs 👍🏽? Heart ❤️. End",
    "你好。我是学生！「好吗？」 然后3.14。OK. これはペンです。終わり",
    r"So $\frac{a.b}{c. d}$ is it. Then \[ x = 1. y! \] holds. But \(a. b\) too.",
    "e\u0301te\u0301. Å\u030a! n\u0303o. \u0915\u094d\u0937. Z\u0351\u036f\u0321algo\u0489.",
    "a\tb.\tc!\t\td?\t",
    "one.\r\ntwo\r\n\r\nthree. four\rfive.\r\n",
    "<think>\n1. First. 2. Second.\n</think>\n\nAnswer: 4.",
    "```python\nx = 1. y\r\n\tz! w\n```\nDone.  Next.\u00a0So.\u2003End.\u200b",
    "\ufeffBOM. \u202eRTL مرحبا. שלום! \u2066x\u2069.",
    " . . ! ",
    "é",
    "",
]
PIECES = st.sampled_from(
    [
        *("a", "word", " ", "  ", ". ", "! ", "?", "\n", "\n\n", "\r\n", "\t", "3.14", "</think>", "<think>", "```\n"),
        *("$", "$$", "\\(", "\\)", "\\[", "\\]", "\\frac{1.}{2}"),
        *("👩\u200d👩\u200d👧\u200d👦", "🇩🇪", "👍🏽", "🙂", "\u200d", "\ufe0f", "漢", "字。", "！", "「", "」"),
        *("e\u0301", "\u0301", "é", "n\u0303", "\u0915\u094d\u0937", "ﬁ", "\u00a0", "…", "»", "▁", "Å", "\u212b"),
    ]
)


def metaspace(folder: Path) -> Any:
    """Make a tokenizer like SentencePiece's: blanks are ▁, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["▁the", "▁word", "word", "▁so", "▁", "▁▁", ".", "!", "?", "。", "漢", "é", "</", "think", ">", "$", "👍"]
    pieces = [("<unk>", -20.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [(word, -float(i + 1)) for i, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def normalizing(folder: Path) -> Any:
    """Make a byte-level tokenizer that composes characters first, as Qwen's does."""
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    """A tokenizer of each kind."""
    from tokenizers import AddedToken

    chats = {"demo student": Chat(DEMO / "student"), "demo teacher": Chat(DEMO / "teacher")}
    for name, make in (("metaspace", metaspace), ("normalizing", normalizing)):
        folder = tmp_path_factory.mktemp("models") / name
        shutil.copytree(DEMO / "student", folder)
        tokenizer = make(folder)
        if name == "metaspace":
            tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
            (folder / "chat_template.jinja").write_text(TEMPLATE)
            (folder / "generation_config.json").unlink()
        tokenizer.save(str(folder / "tokenizer.json"))
        chats[name] = Chat(folder)
    return chats


def tokens_of(chat: Chat, text: str) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return the ids that spell a text, and the bytes of each."""
    ids = chat.target_ids(text)[:-1]
    return ids.tolist(), chat.token_bytes(ids, text)


def check(chat: Chat, text: str, seed: int = 0) -> None:
    """Compare token bytes, and the p of each sentence, with the reference."""
    ids, lengths = tokens_of(chat, text)
    raw = text.encode()
    first = len(raw) - int(lengths.sum())
    spelled = b"".join(chat.piece(i) for i in ids)
    if spelled == raw[first:]:  # not so when the tokenizer composes
        assert lengths.tolist() == [len(chat.piece(i)) for i in ids]
    assert first == 0 or (text.startswith("<think>") and raw[:first].strip() == b"<think>")
    ends = sentence_ends(text).tolist()
    if not ids:
        assert first == len(raw)
        return
    inside = reference.tokens_of_sentences(raw, first, lengths.tolist(), ends)
    logprobs = -np.random.default_rng(seed).random(len(ids), dtype=np.float32)
    tokens = Tokens(logprobs, lengths)
    row = sentence_scores(text, tokens, None)
    spelling = int(np.flatnonzero(lengths)[-1]) + 1
    for sentence, members in enumerate(inside):
        values = [float(logprobs[token]) for token in members if token < spelling]
        expected = math.exp(math.fsum(values) / len(values)) if values else math.nan
        np.testing.assert_allclose(row["p_teacher"][sentence], expected, atol=1e-6, equal_nan=True)
    assert np.isnan(row["p_student"]).all()
    assert row["num_teacher_tokens"] == sum(len([t for t in members if t < spelling]) for members in inside)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sentence_has_its_tokens(chats: dict[str, Chat], kind: str, text: str) -> None:
    check(chats[kind], text)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PIECES, max_size=25).map("".join), kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
def test_of_any_text(chats: dict[str, Chat], text: str, kind: str, seed: int) -> None:
    check(chats[kind], text, seed)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40).filter(lambda t: "<" not in t), kind=st.sampled_from(KINDS))
def test_of_any_characters(chats: dict[str, Chat], text: str, kind: str) -> None:
    check(chats[kind], text)


def test_the_kinds_cut_otherwise(chats: dict[str, Chat]) -> None:
    text = "Cafe\u0301 👩‍👩‍👧. The word 漢字。\tSo\r\n"
    spelled = {kind: [chat.piece(i) for i in tokens_of(chat, text)[0]] for kind, chat in chats.items()}
    assert len({tuple(pieces) for pieces in spelled.values()}) == 4
    for kind, pieces in spelled.items():
        assert (b"".join(pieces) == text.encode()) == (kind != "normalizing")
        assert sum(tokens_of(chats[kind], text)[1]) == len(text.encode())


def test_tokens_of_another_text_are_refused(chats: dict[str, Chat]) -> None:
    _, lengths = tokens_of(chats["metaspace"], "One. Two.")
    tokens = Tokens(np.zeros(len(lengths), dtype=np.float32), lengths)
    with pytest.raises(DataError, match="its tokens have 9 bytes, its text 11; the tokens must spell the text"):
        sentence_scores("One. Two..!", tokens, None)
