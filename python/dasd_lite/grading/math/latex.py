r"""LaTeX and Unicode → plainer LaTeX of the same meaning, and its brackets.

Input: a formula as a model or an author wrote it, such as `\left(\tfrac12,\,3\right)`. Output: `(\frac{1}{2}, 3)`.
Invariant: linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_COMMANDS = {
    **{"×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne"},
    **{"∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset", "±": "pm", "∓": "mp", "∖": "setminus", "≈": "approx"},
    **{"θ": "theta", "α": "alpha", "β": "beta", "λ": "lambda", "φ": "phi"},
}
_SIGNS = {
    **{sign: rf"\{command} " for sign, command in _COMMANDS.items()},
    **{"−": "-", "–": "-", "‐": "-", "÷": "/", "⁄": "/", "∕": "/", "，": ",", "、": ",", "；": ";"},
    **{"°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}"},
}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _ascii(text: str) -> str:
    """Spell the signs of Unicode as LaTeX does."""
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(
        r"√\s*(\d+|[A-Za-z]|\([^()]*\)|\{[^{}]*\})", lambda match: rf"\sqrt{{{match[1].strip('(){}')}}}", text
    )
    return _NOT_ASCII.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    sign = match[0]
    if sign in _SIGNS:
        return _SIGNS[sign]
    if unicodedata.category(sign) == "Nd":
        return str(unicodedata.decimal(sign))
    plain = unicodedata.normalize("NFKC", sign)
    if "⁄" in plain:  # a vulgar fraction
        above, _, below = plain.partition("⁄")
        return rf" \frac{{{above}}}{{{below}}}"
    return plain


_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degrees?(?![A-Za-z])"
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|mbox|hbox|emph|operatorname|underline"
    r"|boxed|fbox|ensuremath|(?:text)?color\{\w+\})\s*\{([^{}]*)\}"
)
_MONEY = {r"(?:\\\$|\$(?=[^$]*$))": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees"}
# Pairs of a pattern and its replacement, in order.
_GROUP_MARK = re.compile(r"(?<=\d)(?:\{,\}|\\[,!; ]|\{\\[,!; ]\}|~|,\\!|\\!,)+(?=\d{3}(?!\d))")  # 1{,}234
_GROUPS = re.compile(r"(?<![\d.,\\])\d{1,3}(?: \d{3})+(?![\d.,])")  # 1 234 567
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        *((rf"^(-?){sign}\s*(.*)$", rf"\1\2 {name}") for sign, name in _MONEY.items()),
        (r"\\\$", ""),
        (r"\$|\\[()]|\\[\[\]]|€|£|¥|₹", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|q?quad|bf|rm|it|small|[lL]arge)(?![A-Za-z])", " "),
        (r"\\[hv]space\*?\{[^{}]*\}", " "),
        (r"\\[,;:! ]|~|&(?=\s*=)", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d|[A-Za-z])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d|[A-Za-z])", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\\(leq|leqslant|le)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(geq|geqslant|ge)(?![A-Za-z])|>=|=>", r"\\ge "),
        (r"\\neq?(?![A-Za-z])\s*|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"^\s*(?:x\s?\\in\s)?\s*[Aa]ll\s+real\s+numbers\s*$", r"\\mathbb{R}"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[lr]?[vV]ert(?![A-Za-z])", "|"),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\varnothing|\\O(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:infin|inf)(?![A-Za-z])|(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])(pi|sqrt|sin|cos|tan|log|ln)(?=[\s(^*/\d)]|$)", r"\\\1"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\?%|\\percent(?![A-Za-z])", " % "),
        (r"([\^_])\{(\w)\}", r"\1\2"),
        (r"\*\*", "^"),
        (r"^\s*(?:\\(?:approx|therefore)(?![A-Za-z])|(?i:(?:the\s)?(?:final\s)?answer(?:\sis)?\s?(?:[:=]|\s)))\s*", ""),
        (r"\s+", " "),
    ]
]


_ROW = "\x01"  # stands for two backslashes meanwhile; to a pattern it must not be white space


def plain(text: str) -> str:
    """Remove from LaTeX what does not change its meaning."""
    text = _ascii(text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=\s*[A-Za-z]\s?=)", ", ", text)  # lines
    if "\\\\" in text:  # doubly escaped commands, or the rows of a matrix
        text = text.replace("\\\\", _ROW if "\\begin" in text else "\\")
    text = _GROUP_MARK.sub("", text)
    if _TRIG.search(text):
        text = re.sub(rf"(?<![\d.])(\d{{1,30}}(?:\.\d{{1,30}})?)\s*(?:{_DEGREES})", r"{(\\frac{\1\\pi}{180})}", text)
    text = re.sub(_DEGREES, " degrees ", text)
    for _ in range(4):
        text, number = _WRAPPER.subn(r" \1 ", text)
        if not number:
            break
    text = _GROUPS.sub(lambda match: match[0].replace(" ", ""), text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return stripped(text.replace(_ROW, r" \\ "))


def stripped(text: str) -> str:
    """Remove white space and punctuation around a text."""
    text = text.strip(" ,;").rstrip(" ,;\\")
    return text.removesuffix(".").rstrip() if not text.endswith("..") else text


_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|\\.|[()\[\]{},;]| (?:and|or) |.", re.DOTALL)


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split a text at separators outside of all brackets."""
    parts, depth, begin = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[-1] in _OPEN and len(token) <= 2:
            depth += 1
        elif token[-1] in _CLOSE and len(token) <= 2:
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append(text[begin : match.start()])
            begin = match.end()
    return [*parts, text[begin:]]


def brackets_of(text: str) -> str | None:
    """Return the brackets around a whole text, such as "()" or "[)"; None if the first does not close at the end."""
    if not text or (text[0] not in _OPEN and not text.startswith(r"\{")):
        return None
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if len(token) <= 2 and token[-1] in _OPEN:
            depth += 1
        elif len(token) <= 2 and token[-1] in _CLOSE:
            depth -= 1
            if depth == 0:
                is_set = text.startswith("\\")
                return ("\\{}" if is_set else text[0] + token[-1]) if match.end() == len(text) else None
    return None
