"""Where the text of one model can be cut, so that another writes the rest.

Input: a text, a point in it, and the tokenizers of both models. Output: the place near the point before which every one
of them reads the tokens that it reads in the whole text. Anywhere else the second model would continue from tokens that
it would never have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dasd_lite.chat.chat import Chat
from dasd_lite.errors import DataError

# A token boundary in every tokenizer: before a space, or after a whole run of line breaks.
_SPACE = re.compile(r"(?=(?<!\s) )|(?<=\n)(?!\s*\n)")
# After a full stop of a script that writes no spaces, and what closes behind it: mostly one.
_STOP = re.compile(r"(?<=[。！？｡．])(?![\s。！？｡．”’」』）】》])|(?<=[。！？｡．][”’」』）】》])(?![\s”’」』）】》])")
_NEAR = 40  # characters; in text with spaces, a space is as near as that
_TRIES = 50  # other ends of tokens that are looked at; nearly always the first one will do


def place_to_cut(text: str, at: int, chats: Sequence[Chat]) -> int | None:
    """Return where to cut a text in its second half, near the character `at`; None if there is no place.

    It is the nearest space, line break, or full stop as `。`, if one is near. In text that has none there, it is the
    nearest character before which all of `chats` spell the beginning as they spell it in the whole text.
    """
    first = max(len(text) // 2, 1)
    spaces, stops = ({m.start() for m in border.finditer(text, first)} - {len(text)} for border in (_SPACE, _STOP))
    borders = sorted(spaces | stops, key=lambda place: (abs(place - at), place))
    near = [place for place in borders if abs(place - at) <= _NEAR]
    if near and near[0] in spaces:
        return near[0]
    ends = set.intersection(*(_token_ends(chat, text) for chat in chats))
    others = sorted((place for place in ends if first <= place < len(text)), key=lambda place: (abs(place - at), place))
    for place in (*near, *others[:_TRIES], *borders):
        if place in spaces or (place in ends and all(_is_boundary(chat, text, place) for chat in chats)):
            return place
    return None


def _token_ends(chat: Chat, text: str) -> set[int]:
    """Return the characters of a text before which a token ends; none if the model cannot write this text."""
    try:
        lengths = chat.token_bytes(chat.written_ids(text), text)
    except DataError:
        return set()
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = bytes_before[-1] - lengths.sum() + np.cumsum(lengths)  # no token spells a beginning that the template writes
    return set(np.flatnonzero(np.isin(bytes_before, ends)).tolist())


def _is_boundary(chat: Chat, text: str, place: int) -> bool:
    """Whether the tokens before `place` are those that the whole text begins with."""
    ids, first = chat.written_ids(text), chat.written_ids(text[:place])
    return bool(ids[: len(first)].tolist() == first.tolist())
