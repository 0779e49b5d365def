"""Where the code of a completion stands: in a block between two fences, lines with ``` or ~~~, after the thinking.

Input: a completion. Output: the code, or None. Only blocks that are closed count. Of those, the last that is marked as
Python is taken, else the last that is not marked as something else, such as output or bash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dasd_lite.data.formats.final_answer import conclusion

_FENCE = re.compile(
    r"(?P<before>(?:(?!```|~~~).)*)(?P<fence>`{3,}|~{3,})(?P<mark>[^`<]*)(?:<.*)?",  # "<": a token of the end
    re.DOTALL,
)
_LIST = re.compile(r"\s*(?:[-*+]|\d{1,3}[.)])\s+")
_NOT_IN_MARK = re.compile(r"[^\w+#-]+")
_NO_CODE = {
    *(
        "bash",
        "sh",
        "shell",
        "console",
        "terminal",
        "pycon",
        "output",
        "out",
        "stdout",
        "input",
        "stdin",
        "text",
        "txt",
    ),
    *("plain", "plaintext", "json", "yaml", "xml", "csv", "markdown", "md", "latex", "math", "log", "pseudocode"),
}

# Tags of thinking and the tokens of formats begin with one of these; in code they are replaced for a while by
# characters that stand in no text (Unicode's noncharacters).
_HIDDEN = str.maketrans("<[◁", "\ufdd0\ufdd1\ufdd2")
_SHOWN = str.maketrans("\ufdd0\ufdd1\ufdd2", "<[◁")


@dataclass(frozen=True)
class _Block:
    """A closed block: its mark in small letters ("" for none), the range of its whole lines, and its code."""

    mark: str
    begin: int
    end: int
    code: str


def extract(completion: str) -> str | None:
    """Return the code of a completion, or None."""
    text = conclusion(_without_tags_in_code(completion))
    if text is None:
        return None
    blocks = _blocks(text.translate(_SHOWN).split("\n"))
    possible = [block for block in blocks if block.code.strip() and block.mark not in _NO_CODE]
    python = [block for block in possible if block.mark.startswith("py")]
    chosen = (python or possible)[-1:]
    # half a character, as some tokenizers leave it, cannot be compiled or stored
    return chosen[0].code.encode("utf-8", "replace").decode() if chosen else None


def _without_tags_in_code(text: str) -> str:
    """Return a text of the same length without the tags that a program has in its strings.

    A tag inside of a closed block is text of the program if something stands before it on its line. At the beginning
    of a line it is a tag: a thinking may end within a block that it never closed, and there programs have none.
    """
    lines = text.split("\n")
    for block in _blocks(lines):
        for index in range(block.begin, block.end):
            line = lines[index]
            begin = len(line) - len(line.lstrip()) + 1
            lines[index] = line[:begin] + line[begin:].translate(_HIDDEN)
    return "\n".join(lines)


def _blocks(lines: list[str]) -> Iterator[_Block]:
    """Yield the closed blocks.

    A fence with a mark, as ```python, always begins a block, even if the one before was never closed. One without
    closes the block that is open, if it has the same sign and is not shorter, and else begins one. A fence may stand
    behind other words on its line, as in "Code: ```" or "print(1)```". One that is indented by four or more in a block
    is a part of it, as in Markdown: it stands in a comment of the program.
    """
    fence, mark, indent, begin = "", "", 0, 0
    for index, line in enumerate(lines):
        found = _FENCE.fullmatch(line)
        if found is None:
            continue
        before, signs, word = found["before"], found["fence"], found["mark"].strip()
        is_alone = not before.strip() or _LIST.fullmatch(before) is not None
        if (signs[0] == "~" and not is_alone) or (fence and is_alone and len(before) >= indent + 4):
            continue  # "~~~" is an operator, too
        if fence and not word:
            if signs.startswith(fence):
                code = lines[begin:index] if is_alone else [*lines[begin:index], before]
                yield _Block(mark, begin, index, _dedented(code, indent))
                fence = ""
        elif is_alone or not (fence or " " in word):
            fence, indent, begin = signs, len(before) if is_alone else 0, index + 1
            mark = _NOT_IN_MARK.split(word.lstrip("{. "))[0].lower()


def _dedented(lines: list[str], most: int) -> str:
    """Return code without the space before its first line, as far as its fence has it, too."""
    first = next((line for line in lines if line.strip()), "")
    indent = first[: len(first) - len(first.lstrip())][:most]
    return "\n".join(line.removeprefix(indent) for line in lines)
