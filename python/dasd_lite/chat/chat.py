"""Messages and text to token ids and byte lengths, and back. Only this room uses tokenizers and chat templates.

Input: a model folder with tokenizer.json and a chat template. Output: token ids, texts, and the byte length of each
token. Invariants: the byte lengths of the tokens of a text add up to its UTF-8 length, whatever the tokenizer, because
bytes are the ruler that teacher and student share; a training example ends with the token that ends a turn, and that
token is a target. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.chat import harmony
from dasd_lite.chat.spelling import ByteLengths, TokenIds, piece_reader, spell
from dasd_lite.data.hub import context_of_config, eos_ids, read_json
from dasd_lite.data.records import Message
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError

_MARKER = "x9Qz"


class Chat:
    """A model's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer and template from a model folder. Raises ConfigError naming the file that is wrong."""
        from tokenizers import Tokenizer

        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ConfigError(f"{folder}: has no tokenizer.json; the model needs a fast tokenizer")
        tokenizer_json = read_json(path)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package has no exception class
            raise ConfigError(f"{path}: cannot be read as a tokenizer: {error}") from error
        self._config = read_json(folder / "tokenizer_config.json")
        self._template = self._read_template()
        self._bytes_of_entry = piece_reader(tokenizer_json, path)
        self._channel_tokens = self._find_channel_tokens()
        self.eos_id = self._find_eos()
        self._check_round_trip()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of tokenizer and template. Models with equal fingerprints give equal ids to equal messages."""
        path = self.folder / "tokenizer.json"
        return digest(path.read_text(encoding="utf-8"), self._template, self.eos_id)

    @cached_property
    def answer_end_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer: the template's, harmony's, and those in generation_config.json.

        See `hub.configured_stop_ids` for the tokens at which an engine stops by itself.
        """
        harmony_ends = [token_id for token_id, name in self._channel_tokens.items() if name in ("return", "call")]
        return tuple(sorted({self.eos_id, *eos_ids(read_json(self.folder / "generation_config.json")), *harmony_ends}))

    @cached_property
    def vocab_size(self) -> int:
        """Largest id of the tokenizer plus one. The embedding may have more rows, as padding."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def context(self) -> int:
        """Maximum tokens of prompt and answer together, from config.json."""
        return context_of_config(read_json(self.folder / "config.json")) or 1 << 62

    @cached_property
    def think_prefix(self) -> str:
        """The beginning of the answer that the template already writes: `<think>` and white space, or ""."""
        match = re.search(r"<think>\s*$", self.render([{"role": "user", "content": _MARKER}]))
        return match.group() if match else ""

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as the model reads it, up to where the answer begins."""
        return self._render(messages, add_generation_prompt=True)

    def encode(self, text: str) -> TokenIds:
        """Return the ids of a text, without adding special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def prompt_ids(self, messages: Sequence[Message], prefix: str = "") -> TokenIds:
        """Return the ids to continue from: the conversation, and `prefix`, the beginning of the answer."""
        return np.concatenate([self.encode(self.render(messages)), self.written_ids(prefix)])

    def example(self, messages: Sequence[Message], completion: str) -> tuple[TokenIds, int]:
        """Return the ids of a training example, and how many of them are the prompt.

        The example is the prompt, the completion, and the token that ends a turn, which is a target as well.
        """
        prompt = self.encode(self.render(messages))
        return np.concatenate([prompt, self.target_ids(completion)]), len(prompt)

    def target_ids(self, completion: str) -> TokenIds:
        """Return the ids that the model should write: the completion without `think_prefix`, and the end token."""
        return np.append(self.written_ids(completion), np.int32(self.eos_id))

    def written_ids(self, completion: str) -> TokenIds:
        """Return the ids of an answer, or of its beginning, as the model writes it: without `think_prefix`."""
        return self.encode(self._as_model_writes(completion))

    def token_bytes(self, ids: npt.NDArray[np.integer[Any]], text: str) -> npt.NDArray[np.int32]:
        """Return the length in bytes of each token of an answer.

        Args:
            ids: The tokens that spell `text` after `think_prefix`.
            text: The answer.

        Returns:
            Lengths that add up to the length of the text without `think_prefix`, which no token spells.

        Raises:
            DataError: `ids` do not spell `text`.
        """
        if self._channel_tokens:
            answer = harmony.split_thinking(text)
            tags = (answer.opening, answer.closing)
            pieces, _ = harmony.Rewriter(self._channel_tokens, self.piece, tags).rewrite(ids.tolist())
            if b"".join(pieces) != text.encode():
                raise DataError(f"{self.folder}: {text[:40]!r} cannot be written in harmony channels and read back")
            return np.array([len(piece) for piece in pieces], dtype=np.int32)
        pieces = [self.piece(int(i)) for i in ids]
        if pieces and b"".join(pieces) != self._without_think_prefix(text).encode():
            return self._lengths_by_offset(ids, text)  # the tokenizer changes text
        return np.array([len(piece) for piece in pieces], dtype=np.int32)

    def _lengths_by_offset(self, ids: npt.NDArray[np.integer[Any]], text: str) -> npt.NDArray[np.int32]:
        """Return the byte length of each token by the positions that the tokenizer reports.

        For a tokenizer that normalizes text (Qwen's: NFC), so that its tokens spell another text. If a character
        consists of several tokens, the first has all of its bytes.
        """
        written = self._without_think_prefix(text)
        encoding = self._tokenizer.encode(written, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise DataError(
                f"{self.folder / 'tokenizer.json'}: the given tokens are not those of the text {text[:40]!r}"
            )
        bytes_before = np.cumsum([0, *(len(c.encode()) for c in written)])
        ends = np.maximum.accumulate(bytes_before[[end for _, end in encoding.offsets]])
        ends[-1] = bytes_before[-1]
        return np.diff(ends, prepend=0).astype(np.int32)

    def decode_answer(self, ids: Sequence[int], finish_reason: str, prefix: str = "") -> tuple[str, ByteLengths, str]:
        """Return the text of sampled tokens, the byte length of each, and the reason why the answer ended.

        Args:
            ids: The sampled tokens. End tokens spell nothing.
            finish_reason: The reason that the engine gave.
            prefix: The beginning of the answer that the tokens continue.

        Returns:
            The text after `prefix`; without a prefix it begins with `think_prefix`, which no token spells. Bytes that
            are not UTF-8 become U+FFFD, and the lengths are those of the returned text. Harmony channels become
            `<think>` and `</think>`; a tool call or a malformed header in them becomes the reason.
        """
        pieces = [b"" if i in self.answer_end_ids else self.piece(i) for i in ids]
        if self._channel_tokens:
            rewriter = harmony.Rewriter(self._channel_tokens, self.piece)
            rewritten, verdict = rewriter.rewrite(ids, prefix)
            if finish_reason == "stop" and not verdict and rewriter.in_header:
                verdict = "malformed"
            if verdict != "malformed":
                pieces = [b"" if i in self.answer_end_ids else piece for i, piece in zip(ids, rewritten, strict=True)]
            finish_reason = verdict or finish_reason
        text, lengths = spell(pieces)
        return (text if prefix else self.think_prefix + text), lengths, finish_reason

    def _as_model_writes(self, completion: str) -> str:
        """Return an answer, or its beginning, as the model writes it after a prompt."""
        return harmony.render(completion) if self._channel_tokens else self._without_think_prefix(completion)

    def _without_think_prefix(self, completion: str) -> str:
        if not self.think_prefix or not completion.startswith("<think>"):
            return completion
        return completion.removeprefix("<think>").removeprefix(self.think_prefix.removeprefix("<think>"))

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token spells. A special token spells its own name."""
        try:
            return self._piece_cache[token_id]
        except KeyError:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:  # padding of the embedding: it spells nothing
                piece = b""
            elif token_id in self._added:
                piece = token.encode()
            else:
                piece = self._bytes_of_entry(token)
            self._piece_cache[token_id] = piece
            return piece

    def vocabulary(self) -> list[bytes | None]:
        """Return the bytes that each token spells, by id; None for an id without a token."""
        entries: list[bytes | None] = [None] * self.vocab_size
        for token_id in self._tokenizer.get_vocab(with_added_tokens=True).values():
            entries[token_id] = self.piece(token_id)
        return entries

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The special tokens, which are no text: id → name."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token_id: token.content for token_id, token in added if token.special}

    @cached_property
    def _piece_cache(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def _read_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.exists() else self._config.get("chat_template")
        if isinstance(template, list):  # several templates with names
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if not isinstance(template, str):
            raise ConfigError(
                f"{self.folder}: the tokenizer has no chat template; use an instruction-tuned model"
                " or add a chat_template.jinja to the folder"
            )
        return template

    def _find_channel_tokens(self) -> dict[int, str]:
        """Return the special tokens of harmony, id → name; empty if the template has no channels."""
        if "<|channel|>" not in self._template:
            return {}
        tokens: dict[int, str] = {}
        for name in harmony.SPECIAL_TOKENS:
            token_id = self._tokenizer.token_to_id(f"<|{name}|>")
            if token_id is None:
                raise ConfigError(
                    f"{self.folder}: the chat template uses harmony channels, but the tokenizer has no <|{name}|>"
                )
            tokens[token_id] = name
        begun = self.render([{"role": "user", "content": _MARKER}]).rpartition(_MARKER)[2]
        if not begun.endswith("<|start|>assistant"):  # the model would write the header a second time
            raise ConfigError(
                f"{self.folder}: the chat template uses harmony channels, but its prompt ends with {begun[-60:]!r}"
                " instead of <|start|>assistant"
            )
        return tokens

    @property
    def uses_harmony(self) -> bool:
        """Whether the model writes in harmony channels."""
        return bool(self._channel_tokens)

    @cached_property
    def supports_thinking(self) -> bool:
        """Whether the template or the vocabulary has thinking."""
        return (
            bool(self._channel_tokens)
            or "think" in self._template
            or self._tokenizer.token_to_id("<think>") is not None
        )

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda _: "2026-01-01"  # prompts must not depend on today's date
        return environment.from_string(self._template)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := self._config.get(key)) is not None
        }
        try:
            return str(
                self._compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **special)
            )
        except TemplateError as error:
            roles = [m["role"] for m in messages]
            raise ConfigError(
                f"{self.folder}: the chat template does not accept messages with the roles {roles}: {error}"
            ) from error

    def _find_eos(self) -> int:
        """Return the token that ends an answer: the special token that the template writes after it."""
        turn = [{"role": "user", "content": _MARKER}, {"role": "assistant", "content": _MARKER}]
        after = self._render(turn, add_generation_prompt=False).rpartition(_MARKER)[2].lstrip()
        special = {content: token_id for token_id, content in self.special_tokens.items()}
        for content in sorted(special, key=len, reverse=True):
            if after.startswith(content):
                return special[content]
        eos = self._config.get("eos_token")
        name = eos["content"] if isinstance(eos, dict) else eos
        token_id = None if name is None else self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ConfigError(f"{self.folder}: neither the chat template nor eos_token defines how an answer ends")
        return int(token_id)

    def _check_round_trip(self) -> None:
        """Raise ConfigError if the pieces do not spell the text, since all byte positions would be wrong."""
        text = "1.5 → é漢🙂\n\tx <think>"
        spelled = b"".join(self.piece(int(i)) for i in self.encode(text))
        if spelled != text.encode():
            raise ConfigError(
                f"{self.folder / 'tokenizer.json'}: {text!r} is decoded as {spelled!r}; this tokenizer is not supported"
            )
