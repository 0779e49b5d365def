"""Messages and text ↔ token ids and byte lengths: the one place that touches tokenizers and chat templates.

Input: a model folder with tokenizer.json and a chat template. Invariants: ids come from here and from
nowhere else; the byte lengths of a text's tokens add up to its UTF-8 length, whatever the tokenizer,
because bytes are the ruler that teacher and student share; a training example ends with the token
that ends a turn, and that token is a target. Runs without torch and transformers.
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
from dasd_lite.chat.spelling import Ids, Lengths, piece_reader, spell
from dasd_lite.data.hub import read_json
from dasd_lite.data.records import Message
from dasd_lite.data.seeds import digest
from dasd_lite.errors import ConfigError, DataError

_PROBE = "x9Qz"


class Chat:
    """A model's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer and template from a model folder; raises ConfigError naming the file at fault."""
        from tokenizers import Tokenizer

        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ConfigError(f"{folder}: no tokenizer.json; the model needs a fast tokenizer")
        pieces = read_json(path)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package has no kind of its own
            raise ConfigError(f"{path}: not a tokenizer: {error}") from error
        self._config = read_json(folder / "tokenizer_config.json")
        self._template = self._read_template()
        self._pieces = piece_reader(pieces)
        self._marks = self._find_marks()
        self.eos_id = self._find_eos()
        self._check_round_trip()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of tokenizer and template: ids of equal fingerprints mean the same."""
        path = self.folder / "tokenizer.json"
        return digest(path.read_text(encoding="utf-8"), self._template, self.eos_id)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the template's, and those that the model's generation config names."""
        named = read_json(self.folder / "generation_config.json").get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        ends = [token_id for token_id, mark in self._marks.items() if mark in ("return", "call")]
        return tuple(sorted({self.eos_id, *ids, *ends}))

    @cached_property
    def vocab_size(self) -> int:
        """One over the largest id that the tokenizer knows; embeddings may have more rows (padding)."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def context(self) -> int:
        """Longest prompt plus answer in tokens that the model's config names."""
        config = read_json(self.folder / "config.json")
        return int(
            config.get("max_position_embeddings")
            or (config.get("text_config") or {}).get("max_position_embeddings")
            or 1 << 62
        )

    @cached_property
    def think_prefix(self) -> str:
        """What the template writes of the answer by itself: `<think>` and white space, or nothing."""
        found = re.search(r"<think>\s*$", self.render([{"role": "user", "content": _PROBE}]))
        return found.group() if found else ""

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation as the model reads it, up to where the answer begins."""
        return self._render(messages, add_generation_prompt=True)

    def encode(self, text: str) -> Ids:
        """Turn text into ids, adding nothing."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def prompt_ids(self, messages: Sequence[Message], prefix: str = "") -> Ids:
        """Return the ids to continue from: the conversation, and what of the answer is there already."""
        return np.concatenate([self.encode(self.render(messages)), self.encode(self._as_written(prefix))])

    def example(self, messages: Sequence[Message], completion: str) -> tuple[Ids, int]:
        """Return the ids of a training example and how many of them are the question.

        The example is prompt, completion and the token that ends a turn, and that token is a target.
        """
        prompt = self.encode(self.render(messages))
        return np.concatenate([prompt, self.target_ids(completion)]), len(prompt)

    def target_ids(self, completion: str) -> Ids:
        """Return the ids that the model is to write: the completion without the opener, and the end token."""
        return np.append(self.encode(self._as_written(completion)), np.int32(self.eos_id))

    def token_bytes(self, ids: npt.NDArray[np.integer[Any]], text: str) -> npt.NDArray[np.int32]:
        """Return the length in bytes of each token of `text`, which `ids` spell after the opener.

        The lengths add up to the text's without the opener, which no token of the model's spells.
        """
        if self._marks:
            tags = harmony.parts(text)
            pieces, _ = harmony.Rewriter(self._marks, self.piece, (tags.opening, tags.closing)).rewrite(ids.tolist())
            if b"".join(pieces) != text.encode():
                raise DataError(f"{self.folder}: {text[:40]!r} cannot be written in harmony channels and read again")
            return np.array([len(piece) for piece in pieces], dtype=np.int32)
        pieces = [self.piece(int(i)) for i in ids]
        if pieces and b"".join(pieces) != self._after_opener(text).encode():
            return self._bytes_by_place(ids, text)  # a tokenizer that changes text
        return np.array([len(piece) for piece in pieces], dtype=np.int32)

    def _bytes_by_place(self, ids: npt.NDArray[np.integer[Any]], text: str) -> npt.NDArray[np.int32]:
        """Return the bytes of each token by where the tokenizer says that it lies in the text.

        So a text is measured that the tokenizer normalises (Qwen's: NFC) and that its tokens spell otherwise. Of a
        character in several tokens the first has all bytes.
        """
        said = self._after_opener(text)
        encoding = self._tokenizer.encode(said, add_special_tokens=False)
        if encoding.ids != ids.tolist():
            raise DataError(
                f"{self.folder / 'tokenizer.json'}: the tokens given for {text[:40]!r} are not those of this text"
            )
        bytes_before = np.cumsum([0, *(len(c.encode()) for c in said)])
        ends = np.maximum.accumulate(bytes_before[[end for _, end in encoding.offsets]])
        ends[-1] = bytes_before[-1]
        return np.diff(ends, prepend=0).astype(np.int32)

    def read(self, ids: Sequence[int], finish_reason: str, prefix: str = "") -> tuple[str, Lengths, str]:
        """Return the text of sampled ids behind `prefix`, each token's bytes of it, and why it ended.

        End tokens spell nothing. The opener stands before the text, and no token has its bytes; not so behind a prefix.
        Bytes that are no UTF-8 become U+FFFD, and the lengths are those of the text as returned. Harmony's channels are
        rewritten; a tool call or a malformed header in them becomes the reason.
        """
        pieces = [b"" if i in self.stop_ids else self.piece(i) for i in ids]
        if self._marks:
            rewriter = harmony.Rewriter(self._marks, self.piece)
            found, verdict = rewriter.rewrite(ids, prefix)
            if finish_reason == "stop" and not verdict and rewriter.in_header:
                verdict = "malformed"
            if verdict != "malformed":
                pieces = [b"" if i in self.stop_ids else piece for i, piece in zip(ids, found, strict=True)]
            finish_reason = verdict or finish_reason
        text, lengths = spell(pieces)
        return (text if prefix else self.think_prefix + text), lengths, finish_reason

    def _as_written(self, completion: str) -> str:
        """Return an answer, or its beginning, as the model writes it behind a prompt."""
        return harmony.write(completion) if self._marks else self._after_opener(completion)

    def _after_opener(self, completion: str) -> str:
        if not self.think_prefix or not completion.startswith("<think>"):
            return completion
        return completion.removeprefix("<think>").removeprefix(self.think_prefix.removeprefix("<think>"))

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token spells; an end token spells its own name."""
        try:
            return self._piece_cache[token_id]
        except KeyError:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:  # a row of the embedding beyond the tokenizer: it spells nothing
                piece = b""
            elif token_id in self._added:
                piece = token.encode()
            else:
                piece = self._pieces(token)
            self._piece_cache[token_id] = piece
            return piece

    @cached_property
    def _piece_cache(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def _read_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.exists() else self._config.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if not isinstance(template, str):
            raise ConfigError(
                f"{self.folder}: the tokenizer has no chat template; use an instruction-tuned model,"
                " or put a chat_template.jinja into the folder"
            )
        return template

    def _find_marks(self) -> dict[int, str]:
        """Return the ids of harmony's special tokens, none for a template without channels."""
        if "<|channel|>" not in self._template:
            return {}
        found: dict[int, str] = {}
        for mark in harmony.MARKS:
            token_id = self._tokenizer.token_to_id(f"<|{mark}|>")
            if token_id is None:
                raise ConfigError(f"{self.folder}: its template has harmony channels, its tokenizer no <|{mark}|>")
            found[token_id] = mark
        begun = self.render([{"role": "user", "content": _PROBE}]).rpartition(_PROBE)[2]
        if not begun.endswith("<|start|>assistant"):  # a header that the template begins would be there twice
            raise ConfigError(
                f"{self.folder}: its template has harmony channels and begins an answer with {begun[-60:]!r};"
                " it should end with <|start|>assistant"
            )
        return found

    @property
    def writes_channels(self) -> bool:
        """Tell whether the model writes in harmony's channels."""
        return bool(self._marks)

    @cached_property
    def thinks(self) -> bool:
        """Tell whether template or vocabulary know of a thinking part."""
        return bool(self._marks) or "think" in self._template or self._tokenizer.token_to_id("<think>") is not None

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
        environment.globals["strftime_now"] = lambda _: "2026-01-01"  # a prompt must not depend on the day it is read
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
                f"{self.folder}: its chat template does not take messages of roles {roles}: {error}"
            ) from error

    def _find_eos(self) -> int:
        """Find the token that ends an answer: the first special one that the template writes behind it."""
        turn = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        after = self._render(turn, add_generation_prompt=False).rpartition(_PROBE)[2].lstrip()
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        for content in sorted(special, key=len, reverse=True):
            if after.startswith(content):
                return int(special[content])
        eos = self._config.get("eos_token")
        name = eos["content"] if isinstance(eos, dict) else eos
        token_id = None if name is None else self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ConfigError(f"{self.folder}: neither its chat template nor its eos_token says how an answer ends")
        return int(token_id)

    def _check_round_trip(self) -> None:
        """Refuse a tokenizer whose pieces do not spell the text: spans would be wrong without a word."""
        text = "1.5 → é漢🙂\n\tx <think>"
        found = b"".join(self.piece(int(i)) for i in self.encode(text))
        if found != text.encode():
            raise ConfigError(
                f"{self.folder / 'tokenizer.json'}: {text!r} comes back as {found!r}; this kind is not supported"
            )
