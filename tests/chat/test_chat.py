"""Ids and bytes: text survives encoding, and a training example is what the chat template writes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dasd_lite.chat.chat import Chat
from dasd_lite.data.hub import context_hint, context_of_config, model_folder
from dasd_lite.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
CORPUS = [
    "The dial shows 7.\n\nSo up 3 is 0. ",
    "<think> Start at 9. Wait, no. </think>\nAnswer: 5",
    "é漢字🙂 naïve",
] * 9
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")
NASTY = [
    "",
    " ",
    "plain text.",
    "  leading and trailing  ",
    "é e\u0301 ñ n\u0303 Å A\u030a",
    "漢字かな交じり文。",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈",
    "a\r\nb\rc\n\n\td",
    "\u2028\u00a0\u3000\ufeff",
    "\x00\x01\x7f",
    "ﬁ ² Ⅷ",
    "עברית العربية हिन्दी",
    "x" * 500,
    "\ufffd",
]
QUESTION = ({"role": "user", "content": "What does it show?\n漢🙂"},)
ANSWERS = [answer for answer in NASTY if answer.strip()] + ["<think> Up 3. </think>\nAnswer: 5"]


def write_model(folder, *, template=CHATML, tokenizer=None, config=None, generation=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **(config or {})}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    return folder


def byte_level(normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def sentencepiece():
    """Return a tokenizer like Gemma's: a space is ▁, and unknown characters become bytes."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *(f"<0x{b:02X}>" for b in range(256))])}
    for letter in "▁abcdefghijklmnopqrstuvwxyzTAWS.:0123456789\n":
        vocab[letter] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory, demo):
    base = tmp_path_factory.mktemp("models")
    return {
        "teacher": Chat(demo / "teacher"),
        "student": Chat(demo / "student"),
        "byte level": Chat(write_model(base / "bytes")),
        "sentencepiece": Chat(write_model(base / "pieces", tokenizer=sentencepiece())),
        "opens think": Chat(write_model(base / "opens", template=THINKING)),
        "normalizes": Chat(write_model(base / "nfc", tokenizer=byte_level(normalizers.NFC()))),
    }


FAITHFUL = ("teacher", "student", "byte level", "sentencepiece")
ALL = (*FAITHFUL, "opens think", "normalizes")
anything = st.text(st.characters(codec="utf-8"), max_size=40)


# --- text → ids → text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAITHFUL)
@pytest.mark.parametrize("text", NASTY)
def test_text_survives_encoding_and_decoding(chats, name, text):
    chat = chats[name]
    ids = chat.encode(text)
    decoded, lengths, _ = chat.decode_answer(ids.tolist(), "stop")
    assert decoded == text
    assert lengths.sum() == len(text.encode())
    assert lengths.tolist() == chat.token_bytes(ids, text).tolist()


@settings(max_examples=150, deadline=None)
@given(text=anything | st.text(st.sampled_from("a \n\r\t.e\u0301é漢🙂<>"), max_size=30))
def test_any_text_survives(chats, text):
    text = text.replace("▁", "_")  # SentencePiece writes this for a space, so it has no way to write it
    for name in FAITHFUL:
        chat = chats[name]
        ids = chat.encode(text)
        decoded, lengths, _ = chat.decode_answer(ids.tolist(), "stop")
        assert decoded == text, name
        assert lengths.sum() == len(text.encode()), name


@settings(max_examples=150, deadline=None)
@given(text=anything)
def test_token_bytes_add_up_to_the_text_for_every_tokenizer(chats, text):
    for name in ALL:
        chat = chats[name]
        for completion in (text, f"<think>{text}", f"<think>\n{text}"):
            lengths = chat.token_bytes(chat.target_ids(completion)[:-1], completion)
            assert (lengths >= 0).all(), name
            if len(lengths):  # no token spells what the template writes
                written = (
                    len("<think>") + completion.startswith("<think>\n")
                    if chat.think_prefix and completion[:7] == "<think>"
                    else 0
                )
                assert lengths.sum() == len(completion.encode()) - written, name


def test_a_text_that_the_tokenizer_normalizes_is_measured_by_offsets(chats):
    chat = chats["normalizes"]
    text = "cafe\u0301 so. e\u0301"  # NFC makes é, of 2 bytes, of these 3
    ids = chat.target_ids(text)[:-1]
    assert "".join(chat.decode_answer(ids.tolist(), "stop")[0]) == "café so. é"
    edges = np.cumsum(chat.token_bytes(ids, text))
    assert edges[-1] == len(text.encode())
    texts = [chat.decode_answer(ids[: i + 1].tolist(), "stop")[0] for i in range(len(ids))]
    for edge, decoded in zip(edges, texts, strict=True):
        if decoded.endswith("so"):
            assert text.encode()[:edge].decode() == "cafe\u0301 so"
    with pytest.raises(DataError, match=r"tokenizer\.json: the given tokens are not those of the text 'cafe.*'"):
        chat.token_bytes(ids[::-1], text)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=24))
def test_invalid_utf8_becomes_the_replacement_character(chats, raw):
    """A model may sample any bytes; the lengths are those of the returned text."""
    chat = chats["byte level"]
    ids = [int(chat.encode(chr(b))[0]) if b < 128 else byte_id(chat, b) for b in raw]
    text, lengths, _ = chat.decode_answer(ids, "stop")
    assert text == raw.decode(errors="replace")
    assert lengths.sum() == len(text.encode())
    assert (lengths >= 0).all()
    starts = np.cumsum(lengths) - lengths
    for start, byte in zip(starts, raw, strict=True):
        if byte < 128:
            assert text.encode()[start] == byte, "a complete character is at the position of its token"


def byte_id(chat, byte):
    tokenizer = Tokenizer.from_file(str(chat.folder / "tokenizer.json"))
    letters = {
        b: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0] for b in range(33, 127)
    }
    table = dict(zip(range(256), byte_letters(), strict=True))
    assert all(table[b] == letter for b, letter in letters.items())
    return tokenizer.token_to_id(table[byte])


def byte_letters():
    """Return GPT-2's table: printable bytes are themselves, the others are the characters from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def test_ids_beyond_the_tokenizer_spell_nothing(chats):
    for name in ALL:
        chat = chats[name]
        text, lengths, _ = chat.decode_answer([chat.vocab_size + 5, *chat.encode("a").tolist()], "stop")
        assert text == chat.think_prefix + "a"
        assert lengths.sum() == 1


# --- what is trained on ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_end_token_is_a_target_exactly_once(chats, name, answer):
    chat = chats[name]
    ids, num_context = chat.example(QUESTION, answer)
    targets = ids[num_context:]
    assert targets[-1] == chat.eos_id
    assert (targets == chat.eos_id).sum() == 1
    assert ids[:num_context].tolist() == chat.prompt_ids(QUESTION).tolist()
    assert targets.tolist() == chat.target_ids(answer).tolist()


@pytest.mark.parametrize("name", ["teacher", "student", "byte level"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_and_target_are_the_ids_of_the_rendered_conversation(chats, name, answer):
    """transformers renders and tokenizes the whole conversation; ours is the same, up to the end token."""
    transformers = pytest.importorskip("transformers")
    chat = chats[name]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(chat.folder)
    turns = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
    ids, num_context = chat.example(turns, answer)
    assert ids[:num_context].tolist() == prompt
    assert ids.tolist() == whole[: len(ids)]
    assert theirs.decode(whole[len(ids) :]).strip() == ""


def test_the_begin_token_occurs_once(chats, tmp_path):
    """The template writes a begin token, and the tokenizer would add another."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>"])
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer.encode("a").ids[0] == bos
    chat = Chat(
        write_model(
            tmp_path / "m", template="{{ bos_token }}" + CHATML, tokenizer=tokenizer, config={"bos_token": "<s>"}
        )
    )
    ids, _ = chat.example(QUESTION, "x")
    assert ids[0] == bos
    assert (ids == bos).sum() == 1
    student = chats["student"]
    start = student.encode("<s>")
    assert len(start) == 1
    assert student.prompt_ids(QUESTION)[0] == start[0]
    assert (student.example(QUESTION, "x")[0] == start[0]).sum() == 1


def test_a_template_that_opens_the_thinking(chats):
    chat, plain = chats["opens think"], chats["byte level"]
    assert (chat.think_prefix, plain.think_prefix) == ("<think>\n", "")
    assert chat.render(QUESTION).endswith("<think>\n")
    completion = "<think>\nUp 3.\n</think>\nAnswer: 5"
    ids, num_context = chat.example(QUESTION, completion)
    text, lengths, _ = chat.decode_answer(ids[num_context:].tolist(), "stop")
    assert text == completion, "<think> is part of the text …"
    assert lengths.sum() == len(completion.encode()) - len("<think>\n"), "… that no token spells …"
    whole = chat.render(QUESTION) + completion.removeprefix("<think>\n") + "<|im_end|>"
    assert ids.tolist() == chat.encode(whole).tolist(), "… and once in the ids"
    assert chat.token_bytes(ids[num_context:-1], completion).sum() == len(completion) - len("<think>\n")
    assert chat.decode_answer(chat.encode(" Up 3.").tolist(), "stop", "x")[0] == " Up 3.", "no second <think>"
    # The same answer without the line break, and one that does not think, stay as they are.
    assert chat.decode_answer(chat.target_ids("<think> Up").tolist(), "stop")[0] == "<think>\n Up"
    assert chat.decode_answer(chat.target_ids("5").tolist(), "stop")[0] == "<think>\n5"


def test_a_continued_prefix_has_one_think_tag(chats):
    for name in ("opens think", "byte level"):
        chat = chats[name]
        ids = chat.prompt_ids(QUESTION, "<think>\nUp 3.").tolist()
        think = int(chat.encode("<think>")[0])
        assert ids.count(think) == 1, name
        assert ids[-len(chat.encode("Up 3.")) :] == chat.encode("Up 3.").tolist()


def test_the_end_token_is_the_one_that_the_template_writes(tmp_path):
    config = {"eos_token": {"content": "<pad>"}}
    chat = Chat(write_model(tmp_path / "m", config=config, generation={"eos_token_id": [2, 7]}))
    assert chat.decode_answer([chat.eos_id], "stop")[0] == ""
    assert chat.encode("<|im_end|>").tolist() == [chat.eos_id]
    assert chat.answer_end_ids == tuple(sorted({chat.eos_id, 2, 7}))


@pytest.mark.parametrize(
    ("generation", "added"), [(None, set()), ({}, set()), ({"eos_token_id": None}, set()), ({"eos_token_id": 0}, {0})]
)
def test_answer_end_ids_for_every_kind_of_generation_config(tmp_path, generation, added):
    chat = Chat(write_model(tmp_path / "m", generation=generation))
    assert set(chat.answer_end_ids) == {chat.eos_id} | added


def test_eos_token_ends_an_answer_if_the_template_writes_no_end(tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    chat = Chat(write_model(tmp_path / "m", template=template, config={"eos_token": "<pad>"}))
    assert chat.encode("<pad>").tolist() == [chat.eos_id]
    with pytest.raises(ConfigError, match="neither the chat template nor eos_token defines how an answer ends"):
        Chat(write_model(tmp_path / "n", template=template, config={"eos_token": None}))


def test_fingerprints_differ_for_tokenizers_and_templates(tmp_path, chats):
    same = Chat(write_model(tmp_path / "same"))
    template = Chat(write_model(tmp_path / "template", template=CHATML + " "))
    assert same.fingerprint == chats["byte level"].fingerprint
    assert len({chats[name].fingerprint for name in ALL} | {template.fingerprint}) == 7


# --- what is refused ----------------------------------------------------------------------------------


def refusal(folder, error=ConfigError):
    with pytest.raises(error) as caught:
        Chat(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    text = refusal(write_model(tmp_path / "m", template=None))
    assert "no chat template" in text
    assert "chat_template.jinja" in text
    named = {"chat_template": [{"name": "tools", "template": CHATML}]}
    assert "no chat template" in refusal(write_model(tmp_path / "n", template=None, config=named))
    named["chat_template"].append({"name": "default", "template": CHATML})
    assert Chat(write_model(tmp_path / "o", template=None, config=named)).eos_id == 1


def test_missing_or_damaged_tokenizers_are_refused(tmp_path):
    folder = write_model(tmp_path / "m")
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json; the model needs a fast tokenizer" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(whole[:-40])
    assert "tokenizer.json" in refusal(folder)
    assert "not JSON" in refusal(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "cannot be read as a tokenizer" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: '[]' is not a JSON object" in refusal(folder)


def test_tokenizers_whose_pieces_do_not_spell_the_text_are_refused(tmp_path):
    vocab = {token: i for i, token in enumerate([*SPECIAL, "[UNK]", "a"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json: the decoder \(missing\) is not supported; use a model with byte-level"
    ):
        Chat(write_model(tmp_path / "m", tokenizer=tokenizer))
    lower = byte_level(normalizers.Replace("→", "->"))
    assert "is decoded as" in refusal(write_model(tmp_path / "n", tokenizer=lower))


def test_a_template_that_refuses_a_system_prompt(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    chat = Chat(write_model(tmp_path / "m", template=template))
    with pytest.raises(
        ConfigError, match=r"m: the chat template does not accept .* \['system', 'user'\]: no system here"
    ):
        chat.render([{"role": "system", "content": "x"}, *QUESTION])


def test_templates_cannot_access_python(tmp_path):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML
    with pytest.raises(ConfigError, match="chat template"):
        Chat(write_model(tmp_path / "m", template=template))


def test_paths_that_are_not_model_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model = '.*empty': not a model folder: it has no config\.json"):
        model_folder(str(tmp_path / "empty"))
    with pytest.raises(
        ConfigError, match=r"model = '.*gone': no such folder, and not the name of a hub model, like Qwen/"
    ):
        model_folder(str(tmp_path / "gone"))
    assert model_folder(str(write_model(tmp_path / "m"))) == tmp_path / "m"


ORIGINAL = {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "context", "hint"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 256, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 256, None),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 128, None),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 64, None),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}, 64, "set it to 256 in config.json"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 64, "extends 64 positions × 4, but max_pos"),
        ({"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}, 256, None),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, 64, None),
        ({"rope_scaling": None}, 64, None),
        ({"max_position_embeddings": None, "n_positions": 32}, 32, None),
        ({"max_position_embeddings": None}, None, None),
    ],
)
def test_the_context_is_what_vllm_counts(rope, context, hint):
    for config in ({"max_position_embeddings": 64, **rope}, {"text_config": {"max_position_embeddings": 64, **rope}}):
        assert context_of_config(config) == context
        assert (context_hint(config) is None) == (hint is None)
        assert hint is None or hint in context_hint(config)
