"""Every reasoning format becomes `<think>` … `</think>`, and every token keeps its bytes, as in golden files.

tests/golden/*.json list each token that the model wrote and the part of the text that it spells. Bytes that are not
valid text by themselves are written as "hex:" and hexadecimal digits.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat.test_chat import CHATML, byte_level, write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dasd_lite.chat import harmony
from dasd_lite.chat.chat import Chat
from dasd_lite.chat.cutting import place_to_cut
from dasd_lite.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden"
HARMONY = json.loads((GOLDEN / "harmony.json").read_text(encoding="utf-8"))
THINKING = json.loads((GOLDEN / "thinking.json").read_text(encoding="utf-8"))
SPECIAL_TOKENS = [f"<|{name}|>" for name in harmony.SPECIAL_TOKENS]
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
QUESTION = ({"role": "user", "content": "How much is 2+2?"},)


def raw(piece):
    return bytes.fromhex(piece[4:]) if piece.startswith("hex:") else piece.encode()


def tokenizer_of(cases, special):
    """Return a byte-level tokenizer whose entries are single bytes and the tokens of these cases."""
    letters = {b: c for c, b in _letters().items()}
    spelled = {raw(token) for case in cases for token, _ in case["tokens"]} - {s.encode() for s in special}
    entries = [*(bytes([b]) for b in range(256)), *sorted(s for s in spelled if len(s) > 1)]
    vocab = {"".join(letters[b] for b in entry): i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    return tokenizer, {entry: i for i, entry in enumerate(entries)}


def _letters():
    from dasd_lite.chat.spelling import byte_level_table

    return byte_level_table()


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    """A model with harmony channels, and the id of each token of the golden file."""
    tokenizer, ids = tokenizer_of(HARMONY, SPECIAL_TOKENS)
    folder = write_model(tmp_path_factory.mktemp("oss"), template=CHANNELS, tokenizer=tokenizer)
    ids |= {token.encode(): tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return Chat(folder), ids


@pytest.mark.parametrize("case", HARMONY, ids=lambda case: case["name"])
def test_harmony_channels_become_thinking_and_answer(channels, case):
    chat, ids = channels
    sampled = [ids[raw(token)] for token, _ in case["tokens"]]
    text, token_bytes, finish_reason = chat.decode_answer(sampled, case["ended"], case["prefix"])
    expected = b"".join(raw(spelled) for _, spelled in case["tokens"])
    assert text == case.get("text", expected.decode())
    assert token_bytes.tolist() == [len(raw(spelled)) for _, spelled in case["tokens"]]
    assert finish_reason == case["finish_reason"]


@pytest.mark.parametrize("case", THINKING, ids=lambda case: case["name"])
def test_thinking_that_the_model_or_the_template_opens(case, tmp_path):
    tokenizer, ids = tokenizer_of(THINKING, ["<|im_start|>", "<|im_end|>"])
    ids |= {b"<|im_end|>": tokenizer.token_to_id("<|im_end|>")}
    template = CHATML.replace("assistant\n' }}", "assistant\n" + case["opens"].replace("\n", "\\n") + "' }}")
    chat = Chat(write_model(tmp_path, template=template, tokenizer=tokenizer))
    text, token_bytes, finish_reason = chat.decode_answer([ids[raw(token)] for token, _ in case["tokens"]], "stop")
    assert text == case["text"]
    assert token_bytes.tolist() == [len(raw(spelled)) for _, spelled in case["tokens"]]
    assert finish_reason == "stop"


def test_a_harmony_model_gets_prompts_in_its_own_format(channels):
    chat, ids = channels
    assert {ids[b"<|return|>"], ids[b"<|call|>"]} <= set(chat.answer_end_ids)
    assert ids[b"<|end|>"] not in chat.answer_end_ids
    asked = b"".join(chat.piece(int(i)) for i in chat.prompt_ids(QUESTION, "<think>\nHm.\n</think>\n\nIt"))
    assert asked.decode() == (
        "<|start|>user<|message|>How much is 2+2?<|end|><|start|>assistant"
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It"
    )


@pytest.mark.parametrize(
    "completion",
    ["<think>\nHm. 漢🙂\n</think>\n\nIt is 4.", "<think> Hm.</think>\nAnswer: 4", "4", "<think>\n</think>\n\n"],
)
def test_given_answers_are_written_in_channels_and_keep_their_bytes(channels, completion):
    """The teacher scores answers that others wrote, whatever the white space around their tags."""
    chat, ids = channels
    target = chat.target_ids(completion)
    assert target[-1] == ids[b"<|return|>"]
    token_bytes = chat.token_bytes(target[:-1], completion)
    assert token_bytes.sum() == len(completion.encode())
    spelled = np.cumsum(token_bytes)
    message = [i for i, token_id in enumerate(target) if token_id == ids[b"<|message|>"]]
    answer = completion.split("</think>")[-1].lstrip("\n")
    assert spelled[message[-1]] == len(completion.encode()) - len(answer.encode())


def test_the_beginning_of_an_answer_is_cut_where_tokens_end_inside_channels(channels):
    chat, _ = channels
    for text in ("<think>\n" + "漢字" * 30, "<think>\nHm.\n</think>\n\n" + "漢字" * 30):
        place = place_to_cut(text, 55, [chat])
        assert place == 55, "each character has tokens of its own"
        first = chat.written_ids(text[:place])
        assert chat.written_ids(text)[: len(first)].tolist() == first.tolist()
    assert place_to_cut("<think>\n" + "漢字" * 30 + "<|channel|>", 55, [chat]) is None


def test_a_channel_tag_in_the_text_cannot_be_written_in_channels(channels):
    chat, _ = channels
    completion = "<think>\na\n</think>\n\nb<|channel|>c"
    with pytest.raises(DataError, match="cannot be written in harmony channels and read back"):
        chat.token_bytes(chat.target_ids(completion)[:-1], completion)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"uses harmony channels, but the tokenizer has no <\|channel\|>"):
        Chat(write_model(tmp_path, template=CHANNELS, tokenizer=byte_level()))


def test_a_template_that_opens_a_channel_is_refused(tmp_path):
    tokenizer, _ = tokenizer_of(HARMONY, SPECIAL_TOKENS)
    template = CHANNELS.replace("'<|start|>assistant' }}", "'<|start|>assistant<|channel|>final<|message|>' }}")
    with pytest.raises(ConfigError, match=r"its prompt ends with '.*final<\|message\|>' instead of <\|start"):
        Chat(write_model(tmp_path, template=template, tokenizer=tokenizer))


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=12)


@settings(max_examples=200, deadline=None)
@given(thoughts=st.lists(words, max_size=3), answer=words, cut=st.floats(0, 1), data=st.data())
def test_any_answer_is_rewritten_and_can_be_continued(channels, thoughts, answer, cut, data):
    """The bytes add up, no length is negative, and any prefix is continued to the same text."""
    chat, _ = channels
    thinking = "<|end|><|start|>assistant".join(f"<|channel|>analysis<|message|>{t}" for t in thoughts)
    written = f"{thinking}<|end|><|start|>assistant" if thoughts else ""
    ids = chat.encode(f"{written}<|channel|>final<|message|>{answer}<|return|>").tolist()
    text, token_bytes, finish_reason = chat.decode_answer(ids, "stop")
    expected = "<think>\n" + "\n\n".join(thoughts) + "\n</think>\n\n" + answer if thoughts else answer
    assert (text, finish_reason) == (expected, "stop")
    assert (token_bytes >= 0).all() and token_bytes.sum() == len(text.encode())
    first = int(cut * len(ids))
    begun, some_bytes, _ = chat.decode_answer(ids[:first], "length")
    assert some_bytes.sum() == len(begun.encode())
    if begun and "\ufffd" not in begun and chat.decode_answer(ids[:first], "stop")[2] == "stop":
        rest, rest_bytes, reason = chat.decode_answer(ids[first:], "stop", begun)
        if reason == "stop":  # a cut inside a header cannot be continued
            assert begun + rest == text
            assert rest_bytes.sum() == len(rest.encode())
