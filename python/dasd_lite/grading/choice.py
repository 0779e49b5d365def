r"""The grader for multiple choice: which option a completion states.

Read is only what follows the thinking, in this order: the last `\boxed{…}`, the last statement behind "answer" or "the
correct option", a last line with nothing but an option. An option is stated by its letter, by letter and text (if they
contradict each other the letter counts, because it is what the question asks for), or by its text where no other option
has the same. A letter counts only as a letter: not as a part of a word or formula, and not the article "A".

Several options ("A and C") are a wrong answer. A completion that states none has no answer; a last box that holds
something else cannot be parsed. No text is searched more than a fixed number of times.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

from dasd_lite.data.formats.final_answer import conclusion
from dasd_lite.data.references import LETTERS, kind_of, read_choices
from dasd_lite.grading.grade import Grade

_MOST_STATEMENTS = 500  # behind "answer", from the end; no completion that means one has more
_WINDOW = 600  # characters behind "answer" that are looked at


@dataclass(frozen=True)
class _Key:
    """What is graded against: the letters that options may have, the right one, and the options if they are known."""

    letters: str
    right: str
    options: tuple[str, ...] = ()

    @cached_property
    def texts(self) -> list[str]:
        """The options in the form in which they are compared."""
        return [_text_key(option) for option in self.options]

    def of_text(self, text: str) -> str:
        """Return the letter of the only option that has this text, or ""."""
        wanted = _text_key(text) if self.options else ""
        return self.letters[self.texts.index(wanted)] if wanted and self.texts.count(wanted) == 1 else ""


def grade(completion: str, reference: str) -> Grade:
    """Grade a completion by the option that it states.

    Args:
        completion: The answer of a model.
        reference: `Choices.encode()`, or the right letter alone.
    """
    key = _read_key(reference)
    if isinstance(key, str):
        return Grade("unparseable", None, f"the reference {key}")
    if (said := conclusion(completion)) is None:
        return Grade("no_answer", None)
    stated, box = _stated(_normal(said), key)
    if len(stated) > 1:
        return Grade("wrong", ", ".join(stated), "states several options")
    if stated:
        return Grade("right" if stated == key.right else "wrong", stated)
    return Grade("unparseable", box[:200], "states no option") if box else Grade("no_answer", None)


def fault(reference: str) -> str | None:
    """Return why a reference cannot be graded against, for "answer = '…': "; None if it can."""
    key = _read_key(reference)
    return key if isinstance(key, str) else None


def vote(extracted: str, reference: str) -> str:
    """Return the text of the option of a letter: the same in every order of the options, as a majority needs it."""
    options = read_choices(reference).options if kind_of(reference) == "choice" else ()
    at = LETTERS.find(extracted) if len(extracted) == 1 else -1
    return options[at] if 0 <= at < len(options) else extracted


def _read_key(reference: str) -> _Key | str:
    """Return what a reference means, or what is wrong with it."""
    if kind_of(reference) == "choice":
        try:
            choices = read_choices(reference)
            letters, right, options = LETTERS[: len(choices.options)], choices.letter, choices.options
            well_formed = right in letters and all(isinstance(option, str) for option in options)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            well_formed = False
        return (
            _Key(letters, right, options) if well_formed else "is no list of options with the letter of the right one"
        )
    match = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", _plain(_normal(reference)))
    if match is None:
        return "is not the letter of an option"
    right = match[1].upper()
    return _Key(LETTERS[: max(10, LETTERS.index(right) + 1)], right)


# --- what is read -----------------------------------------------------------------------------------------

def _normal(text: str) -> str:
    """Return a text without full-width letters and signs, and without runs of white space."""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


_FONTS = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|operatorname)\b\s*"
)
_SPACING = re.compile(r"\\(?:quad|qquad)\b ?|\\[,;: ]|~")
_MARKUP = re.compile(
    rf"{_FONTS}|\\(?:left|right|displaystyle|bf|rm|big|Big)\b ?|\\[()\[\]!{{}}]|\*{{2,3}}|__|[$`{{}}#]"
)


def _plain(text: str) -> str:
    """Return a text without the markup that may stand around a letter."""
    return _MARKUP.sub("", _SPACING.sub(" ", text)).strip()


_IN_FONT = re.compile(_FONTS + r"\{([^{}]*)\}")
_FORM = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)\b|\\[()\[\],;:! ]|\*\*|[$`~\s]")


def _text_key(text: str) -> str:
    """Return the form in which texts of options are compared: without white space and marks of LaTeX and Markdown."""
    text = unicodedata.normalize("NFKC", text)
    text = _FORM.sub("", re.sub(r"\{(\w)\}", r"\1", _IN_FONT.sub(r"\1", text))).strip(".,;:'\"").removesuffix(r"\\")
    is_prose = len(text) > 3 and not any(each.isdigit() for each in text)  # but mg is not Mg
    return text.casefold() if is_prose else text


# --- the option that a text states ------------------------------------------------------------------------


def _stated(text: str, key: _Key) -> tuple[str, str]:
    """Return the letter or letters that a conclusion states, "" for none, and the content of its last box."""
    at, box = _last_box(text)
    if box and (letters := _in_box(box, key)):
        return letters, box
    by_text = key.of_text(box) if box else ""
    for position, letters in _behind_markers(text, key):
        return (by_text if at > position and by_text else letters), box
    return by_text or _on_last_line(text, key), box


_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_NO_ANSWER = re.compile(
    r"[\W_]*(?:(?:your |final |the )*(?:answer|letter|choice|option)(?: here)?)?[\W_]*", re.IGNORECASE
)


def _last_box(text: str) -> tuple[int, str]:
    """Return position and content of the last box that closes and holds more than a placeholder."""
    opened: list[tuple[int, bool]] = []
    found = (-1, "")
    for match in _BRACE.finditer(text):
        token = match[0]
        if token == "}" and opened:
            begin, is_box = opened.pop()
            is_short = match.start() - begin <= _WINDOW  # and boxes in boxes take no time
            content = text[begin : match.start()].strip() if is_box and is_short else ""
            if content and not _NO_ANSWER.fullmatch(_plain(content)):
                found = (begin, content)
        elif token.endswith("{") and token != r"\{":
            opened.append((match.end(), token != "{"))
    return found


_WORDS = r"and/or|and|or|then|to|through|plus|as well as|along with|und|oder|et|ou|y|o|e|и|или|和|或|及|与|と|또는"
_QUOTED = (
    ("(", ")"),
    ("[", "]"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("「", "」"),
    ("【", "】"),
    ("<", ">"),
)
_LETTER = re.compile(
    "|".join(rf"{re.escape(a)}\s?(?P<q{i}>[A-Za-z])\s?{re.escape(b)}" for i, (a, b) in enumerate(_QUOTED))
    + r"|(?P<plain>[A-Z])(?![A-Za-zÀ-ɏ0-9_'’^])|(?P<small>[a-z])(?=\)|[.:]?\s*$)"
)
_JOIN = re.compile(
    rf"[).]?\s*(?P<list>[,;–—-]\s*)?(?P<sure>[/&+]\s*|(?:{_WORDS})\s+(?:(?:also|maybe|perhaps|possibly|even|either)\s+)?)?"
    r"(?:(?:option|choice)s?\s+)?",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"(?:(?:the|both|either)\s+)?(?:(?:correct|right|best)\s+)?(?:(?:option|choice|letter)s?\b\s*[:#]?\s*)?",
    re.IGNORECASE,
)
_ENDS = re.compile(r"\s*(?:$|\n|[).\]:;,!|<。、，；](?!\w)|\[/|[-–—](?=\s)|\s[-–—]\s)")
_DOUBT = re.compile(r"\s*(?:\?|(?:if|unless|when|only|or not|is (?:not|wrong|incorrect|false)|isn't)\b)", re.IGNORECASE)
_REASON = re.compile(r"\s(?:because|since|as|is|due|given|for|from|by|based|which|with)\b", re.IGNORECASE)
_FORMULA = re.compile(r"\s*[=<>≈±×·+*/^∝→]|\s-\d|\s*-\w")


def _in_box(box: str, key: _Key) -> str:
    """Return the letter or letters that a box states by letter, or ""."""
    plain = _plain(box)
    if re.fullmatch(r"[A-Z]{2,}", plain) and list(plain) == sorted(set(plain)) and not key.of_text(plain):
        return plain if set(plain) <= set(key.letters) else ""
    return _letters(plain, key, loose=False, box=True)


def _letters(text: str, key: _Key, *, loose: bool, box: bool = False) -> str:
    """Return the letter or letters that a statement begins with, or "".

    Args:
        text: The statement, without markup.
        key: The letters that are possible.
        loose: A letter may be followed by any word, not only by an end or its option's text.
        box: The text is all of a statement, not the rest of a line.
    """
    start = _OPTION.match(text)
    begin = start.end() if start else 0
    first = _LETTER.match(text, begin)
    letter = _letter(first, key)
    if first is None or not letter:
        return ""
    if len(text) > len(first[0]) and key.of_text(text):
        return ""  # all of it is the text of an option, as "A dog" or "C. elegans"
    several, end = _list(text, first, key)
    if several:
        return several
    rest = text[end:]
    if not box and _DOUBT.match(rest):
        return ""
    own = key.options and key.of_text(rest.lstrip(" ).:,;-–—]")) == letter
    is_apart = not first["plain"] and not first["small"] and not _FORMULA.match(rest)  # in brackets
    if own or is_apart or _ENDS.match(rest):
        return letter
    if not loose or _FORMULA.match(rest):
        return ""
    is_word = letter in "AI" and first["plain"] and begin == 0 and not _REASON.match(rest)
    return "" if is_word else letter


def _letter(match: re.Match[str] | None, key: _Key) -> str:
    """Return the letter of a match of `_LETTER`, or "" if no option has it."""
    letter = next((group for group in match.groups() if group), "").upper() if match else ""
    return letter if letter in key.letters else ""


def _list(text: str, first: re.Match[str], key: _Key) -> tuple[str, int]:
    """Return the letters of a list such as "A, B and D", "" for a single letter, and where the single letter ends."""
    found, at, sure = [_letter(first, key)], first.end(), False
    while (join := _JOIN.match(text, at)) is not None and (join.end() > at or text[at - 1] == ")"):
        following = _LETTER.match(text, join.end())
        if following is None or not (letter := _letter(following, key)):
            break
        found.append(letter)
        sure = sure or join["sure"] is not None
        at = following.end()
    is_list = len(set(found)) > 1 and (sure or re.fullmatch(r"[\s.)\]]*(?:\n.*)?", text[at:], re.DOTALL) is not None)
    return ("".join(sorted(set(found))) if is_list else ""), first.end()


# --- behind "answer" --------------------------------------------------------------------------------------

_NOUN = r"answers?|options?|choices?|letter|alternative"
_ADVERBS = r"therefore|thus|hence|then|clearly|definitely|most likely|likely|indeed|simply|actually|obviously"
_MARKER = re.compile(
    rf"(?<![\w/\\])(?:(?:correct|right|best|final|my|chosen|selected) (?:{_NOUN})|final_answer"
    r"|answers?(?! (?:choices|options))|antwort|lösung|réponse|respuesta|opción correcta|resposta|risposta|ответ"
    r"|правильный вариант|odpowiedź"
    r"|odpověď|svar|svaret|antwoord|vastaus|cevap|jawaban|đáp án|उत्तर|الإجابة|الجواب)(?!\w)"
    r"|答案|正确选项|正確選項|故选|故選|应选|應選|所以选|因此选|答え|解答|正解|정답|답",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    r"(?:^|[.!?:]\s|\n|\b(?i:so|thus|hence|therefore|that|option|choice|answer|letter),?\s)"
    r"(?P<letter>[(\[]?[A-Z][)\]]?)\s(?:is|would be|must be) (?:clearly |definitely )?(?:the|my) "
    rf"(?:correct |right |best |final |only correct )?(?:{_NOUN})(?!\s?\?|\s(?:if|only|unless|to (?!the|this)))",
)
_DOUBTED = re.compile(r"(?:\bnot|n't|\bwhether|\bif|\bunless|\bdoubt|\bis it)\b[^.\n]*$", re.IGNORECASE)
_NEGATED = re.compile(
    r"(?:incorrect|wrong|false|not (?:the|an?|my))\s*(?:correct |right |final |best )?$|n't (?:the|an?)\s*$",
    re.IGNORECASE,
)
# Every part may be missing, so it always matches and never goes back.
_GLUE = re.compile(
    r"(?P<close>[\s\"'*_|)\]>]*)(?:\((?:letter|option|choice)\))?(?:correcta|correta|corretta|correcte)?"
    r"(?:\s*(?:to|of|for|in) (?:the|this|your) (?:above |given )?(?:multiple[- ]choice )?(?:question|problem))?"
    r"(?P<copula>[\s*_|]*(?:[:=>→]|[-–—](?=\s)|(?:is|are|was|would be|should be|must be|will be|has to be|ist|lautet"
    r"|est|es|sería|é|è|это|adalah|là|je|är|on|هو|هي)(?!\w)|(?:应该|應該|应|應)?[是为為选選]|は|が|은|는|가))*"
    rf"[\s*_|:=>]*(?:(?:{_ADVERBS}|given by|found to be)[,:]?\s)?[\s*_]*"
    r"(?:(?:the|la|le|die|der|das|el|il|a(?= (?:alternativa|opção|letra)))\s)?(?:(?:correct|right|best) )?"
    rf"(?:(?:{_NOUN}|opción|opção|opzione|alternativa|letra|lettre|antwort|réponse|вариант|选项|選項|選択肢|보기)"
    r"\s*[:#]?\s*)?[\s*_:]*",
    re.IGNORECASE,
)


def _behind_markers(text: str, key: _Key) -> list[tuple[int, str]]:
    """Return position and letters of the last statement that is marked as the answer, as a list of one or none."""
    marks = [(match.start(), match) for match in _MARKER.finditer(text)]
    marks += [(match.start("letter"), match) for match in _BEFORE.finditer(text)]
    for position, match in sorted(marks, key=lambda mark: mark[0])[: -_MOST_STATEMENTS - 1 : -1]:
        if match.re is _BEFORE:
            letters = match["letter"].strip("()[]")
            is_doubted = _DOUBTED.search(text, max(0, position - 60), position)
            letters = letters if letters in key.letters and not is_doubted else ""
        elif _NEGATED.search(text, max(0, position - 40), position):
            continue
        else:
            letters = _behind(_plain(text[match.end() : match.end() + _WINDOW]), key)
        if letters:
            return [(position, letters)]
    return []


def _behind(text: str, key: _Key) -> str:
    """Return the letter or letters that a text behind "answer" states, or ""."""
    glue = _GLUE.match(text)
    assert glue is not None, "all of it is optional"
    statement = text[glue.end() :].split("\n")[0]
    is_said = glue["copula"] is not None and "\n" not in glue[0].partition(glue["copula"])[2]
    letters = _letters(statement, key, loose=is_said)
    if letters == "A" and _is_enumeration(text[glue.end() :], key):
        return ""
    if letters or not (glue["copula"] or "\n" in glue[0] or ">" in glue[0]):
        return letters
    sentences = (statement, statement.partition(". ")[0], statement.partition("<")[0], statement.partition("[/")[0])
    return next((letter for each in sentences if (letter := key.of_text(each))), "")


def _is_enumeration(text: str, key: _Key) -> bool:
    """Return whether a text that begins with option A goes on with option B, so that it lists them."""
    second = re.search(r"(?P<line>\n)?(?<!\w)\(?B[).:]", text)
    if second is None or not key.options:
        return second is not None and second["line"] is not None
    return _text_key(text[second.end() : second.end() + _WINDOW]).startswith(key.texts[1])


def _on_last_line(text: str, key: _Key) -> str:
    """Return the letter of an option that is all of the last line, or ""."""
    before, _, line = text.rpartition("\n")
    if re.match(r"\(?[A-Za-z][).:]", _plain(before.rpartition("\n")[2][:_WINDOW])):
        return ""  # a list of the options
    line = _plain(line[:_WINDOW])
    letters = re.fullmatch(r"(?:option |choice )?[(\[]?([A-Z])[)\]]?[.:)]?", line, re.IGNORECASE)
    if letters and letters[1].upper() in key.letters and (letters[1].isupper() or len(line) > 1):
        return letters[1].upper()
    if by_text := key.of_text(line):
        return by_text
    first = _LETTER.match(line)
    letter = _letter(first, key)
    is_own = first is not None and letter and key.of_text(line[first.end() :].lstrip(" ).:,;-–—]")) == letter
    return letter if is_own else ""
