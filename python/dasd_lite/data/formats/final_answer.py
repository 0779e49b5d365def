r"""A text → the final answer that it states.

Input: a completion, or the text of a reference answer. Output: the answer alone, or None if the text states none.
Invariants: nothing inside of the thinking counts; the time is linear in the length of the text.

An answer is looked for behind the thinking, in this order, and of each kind the last one counts: a box, `<answer>`,
`####`, words such as "The answer is" or "Answer:", and last a conclusion that is nothing but a number or formula.
docs/evaluation.md has examples.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

_MAX_ANSWER = 2_000  # characters of an answer that no brackets enclose
_MAX_MARKS = 200  # of "The answer is" and the like, without an answer behind them
_NEAR = 30  # characters around a box that show whether it is a part of a formula
_BEGIN = 200  # characters that show whether brackets enclose an answer
_MAX_REFERENCE = 500  # a longer text without any mark is a proof or an essay, not an answer

# --- behind the thinking

_TAG = re.compile(
    r"<(?P<closes>/)?\|?(?P<slash>/)?(?P<edge>begin_of_|start_|end_of_|end_)?"
    r"(?P<name>(?:(?:seed|mm):|longcat_|inner_)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|cot|scratchpad|analysis"
    r"|monologue|working_out))\s*\|?\s*>"
    r"|(?P<opening>\[think\]|◁think▷|<\|channel>thought|<unused94>thought|<\|inner_prefix\|>)"
    r"|(?P<closing>\[/think\]|◁/think▷|<channel\|>|<unused95>|<\|inner_suffix\|>)",
    re.IGNORECASE,
)
_OPENED_BY = {
    **{"[/think]": "[think]", "◁/think▷": "◁think▷", "<channel|>": "<|channel>thought"},
    **{"<unused95>": "<unused94>thought", "<|inner_suffix|>": "<|inner_prefix|>"},
}
_CHANNEL, _MESSAGE, _FINAL = "<|channel|>", "<|message|>", "assistantfinal"
_ENDS = re.compile(r"<\|[a-z_]{3,20}\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>")


def conclusion(text: str) -> str | None:
    """Return what follows the thinking of a completion; None if a thinking is still open at the end.

    A text without any thinking is a conclusion as a whole.
    """
    if _CHANNEL in text:  # gpt-oss
        name, found, rest = text.rpartition(_CHANNEL)[2].partition(_MESSAGE)
        return _ENDS.split(rest, maxsplit=1)[0] if found and name.strip().startswith("final") else None
    _, found, rest = text.rpartition(_FINAL)
    if found or text.startswith("analysis"):  # the same without its special tokens
        return rest if found else None
    begin = 0
    is_open: list[str] = []  # names, the outermost first; one that is opened again stays where it is
    for match in _TAG.finditer(text):
        is_closing = match["closing"] or match["closes"] or match["slash"] or (match["edge"] or "").startswith("end")
        name = (match["name"] or match["opening"] or match["closing"]).lower()
        name = _OPENED_BY.get(name, name)
        if not is_closing:
            is_open += [name] if name not in is_open else []
            continue
        if name in is_open:  # and what was opened inside of it
            del is_open[is_open.index(name) :]
        begin = match.end()
    return None if is_open else text[begin:]


# --- boxes

_BOX_TOKEN = re.compile(r"\\{1,3}(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,3}|\\\\|\\[{}]|[{}]")
_BARE = re.compile(
    r"[-+−]?\s?(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\\[A-Za-z]+(?:\{[^{}\n]{0,100}\}){0,2}|[A-Za-z](?![A-Za-z]))"
)
_BOX_COMMAND = re.compile(r"\\+(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_SCALES = "hundred|thousand|million|billion|trillion|dozen|lakh|crore"
_BETWEEN = re.compile(
    r"[\s$,;.]*(?:\\text\s?\{)?\s?(?:and|or|,|;)[\s$,;.}]*(?:[A-Za-z]\w?\s*=\s*)?"
    r"|[\s$,;.]*(?P<label>\([a-z]\)|[A-Za-z]\w?\s*=)[\s$]*"
)
_LABEL = re.compile(r"(?P<label>\([a-z]\)|(?<![A-Za-z])[A-Za-z]\w?\s*=)[\s$]*$")
# A box with these around it is a part of a formula: -\boxed{3}, \frac{\boxed{3}}{4}, n>\boxed{5}, \boxed{5}\times 10^3.
_BEFORE = re.compile(
    r"(?:(?:^|[^\s\-])[-−]|=\s*[-−]\s?|\d|(?:(?<![<\w/])\w{1,3}|[)}\]])\s?[+/^<>≤≥]\s?\{?|boxed\{[^{}]{1,20}\}\s?:\s?"
    r"|\\(?:[dt]?frac|sqrt|times|cdot|pm|mp|geq?|leq?|gt|lt|neq?|ln|log|sin|cos|tan)\s*\{?\s*)\Z"
)
_AFTER = re.compile(
    r"\d|[\^!](?!\s|$)|\s*\\(?:times|cdot|pm|pi|sqrt|frac|cdots)(?![A-Za-z])|[A-Za-z](?![A-Za-z])"
    r"|[-+/](?=[\d\\(]|[a-z](?![a-z]))|\s*[+:]\s*\d|,\s?[-\d\\][^$()\n]{0,30}\)|[\s$]*(?:and|or)\s+\$?[-−]?\d|[\s$]*\?"
    rf"|[\s$]*(?:{_SCALES})(?![A-Za-z])"
)
_DENIED = re.compile(r"(?:\bnot|n['’]t|\bnever|\\neq?|≠)(?:\s+(?:be|equal(?:\s+to)?))?[\s$:]*$")


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` or `\fbox{…}` that closes and has something in it.

    Boxes that only commas, "and", "or" or labels such as "(b)" separate are one answer, a list. Works without braces,
    as TeX does: `\boxed 5`. A box that is a part of a formula is returned with its command and what is around it.
    """
    return _last_box(text)[0]


def _last_box(text: str) -> tuple[str | None, int]:
    """Return the answer in the last boxes, and where they end."""
    answers: list[str] = []
    start = last = 0
    for begin, end, *content in reversed(list(_boxes(text))):
        if not _is_answer(text[content[0] : min(content[1], content[0] + _BEGIN)]):
            continue
        before = text[max(0, begin - _NEAR) : begin]
        if answers:
            between = _BETWEEN.fullmatch(text, end, start) if end <= start <= end + _BEGIN else None
            label = _LABEL.search(before) if between and between["label"] else None
            if between is None or (between["label"] and (label is None or label["label"] == between["label"])):
                break
        elif _DENIED.search(before):
            continue
        else:
            last = end
            if _BEFORE.search(before) or _AFTER.match(text, end):
                return text[max(0, begin - _NEAR) : end + _NEAR], end
        start = begin
        answer = _BOX_COMMAND.sub("", text[content[0] : content[1]]).strip()
        answers.append(answer[1:-1] if re.fullmatch(r"\{[^{}]*\}", answer) else answer)
    return ", ".join(reversed(answers)) or None, last


def _boxes(text: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield begin and end of each box and of its content, in the order in which they end, in one pass."""
    braces: list[tuple[int, int] | None] = []  # of every open brace: whether it is a box's, and where that begins
    command: tuple[int, int] | None = None
    for match in _BOX_TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            is_box = command is not None and command[1] == match.start()
            braces.append((command[0], match.end()) if command is not None and is_box else None)
        elif token == "}":
            if braces and (box := braces.pop()) is not None:
                yield box[0], match.end(), box[1], match.start()
        elif "box" in token:
            command = match.span()
            if not text.startswith("{", match.end()) and (bare := _BARE.match(text, match.end())):
                yield match.start(), bare.end(), *bare.span()


_FILLER = re.compile(
    r"\\(?:boxed|fbox|[lc]?dots|square|q?quad|text|math(?:rm|bf)|textbf|cdot|underline|phantom|hspace)(?![A-Za-z])"
    r"|\b(?:(?:your|the|my)\s)?(?:final\s)?answer(?:\shere)?\b",
    re.IGNORECASE,
)


def _is_answer(text: str) -> bool:
    """Return whether a text is more than dots, blanks, or "your answer here"."""
    plain = _FILLER.sub("", text)
    return r"\{" in text or any(char.isalnum() or char in "<>=+∅∞√°" for char in plain)


# --- tags and ####

_ANSWER_TAGS = [("<answer>", "</answer>"), ("<final_answer>", "</final_answer>"), ("[ANSWER]", "[/ANSWER]")]
_HASHES = "####"
_HASH_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(?P<answer>[^\n]*)$", re.MULTILINE)
_PLAIN = re.compile(r"[-+−$€£]{0,2}\d[\d,./]*\d?\s?%?")


def _tagged(text: str) -> tuple[str | None, int]:
    """Return what the last `<answer>` encloses, and where it ends; its closing tag may have been a stop string."""
    for opening, closing in _ANSWER_TAGS:
        end = len(text)
        while (begin := text.rfind(opening, 0, end)) >= 0:
            inside = text[begin + len(opening) : end].partition(closing)[0]
            if _is_answer(inside[:_MAX_ANSWER]):
                return _by_words(inside) or _tidy(inside.strip()), begin + len(opening) + len(inside)
            end = begin
    return None, 0


def marked(text: str) -> str | None:
    r"""Return what is behind `####` on the last line of a text, or else in its last `\boxed{…}`."""
    return after_hashes(text) if ends_in_hashes(text) else last_box(text)


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####` of a text."""
    _, mark, answer = text.rpartition(_HASHES)
    return (answer.strip() or None) if mark else None


def ends_in_hashes(text: str) -> bool:
    """Return whether the last line of a text is `#### …`, so that it is a solution and no answer."""
    last = text.strip().rpartition("\n")[2]
    return last.startswith(_HASHES) and after_hashes(last) is not None


def _hashed(text: str) -> str | None:
    """Return what follows `####` on the last line, or on another one if it is a bare number and no heading."""
    if ends_in_hashes(text):
        answer = after_hashes(text) or ""
        return (_by_words(answer) or _tidy(answer)) if _is_answer(answer) else None
    answers = [line["answer"].strip() for line in _HASH_LINE.finditer(text)]
    answers.append((after_hashes(text) or "")[:_BEGIN])  # behind a sentence
    return next((answer for answer in reversed(answers) if _PLAIN.fullmatch(answer)), None)


# --- words

_ENGLISH = r"(?:(?:final|correct|right|exact|desired|required)[ \t]+(?:answer|option|choice|result|value)|answer)s?"
_WORDS = (  # languages that put spaces between words
    r"(?:réponse|respuesta|resposta|risposta)(?:[ \t]+(?:finale?|correcte|correct[ao]|corret[ao]|corretta))?"
    r"|antwort|endergebnis|(?:eind)?antwoord|svar(?:et)?|vastaus|válasz|răspuns(?:ul)?|απάντηση|cevap|yanıt"
    r"|(?:итоговый[ \t]+|окончательный[ \t]+)?ответ|відповідь|отговор|одговор|odpowiedź|odpověď|odpoveď"
    r"|jawaban(?:nya|[ \t]+akhir)?"
    r"|đáp[ \t]án|đáp[ \t]số|câu[ \t]trả[ \t]lời|(?:अंतिम[ \t]+)?उत्तर|উত্তর|답|정답|최종[ \t]*답"
    r"|(?:الإجابة|الجواب|جواب|پاسخ)(?:[ \t]النهائية|[ \t]النهائي)?|תשובה|התשובה"
)
_CHARACTERS = (
    r"(?:最终|最終|正确|正確|所求)?答案|最終的な答え|答え|解答|正解|คำตอบ|정답|최종[ \t]*답|답"  # and those that do not
)
_COPULA = (
    r"(?<!\w)(?:is|are|was|equals|(?:would|must|should|will)[ \t]+be|comes[ \t]+(?:out[ \t]+)?to|est|ist|lautet|es|é|è"
    r"|adalah|jest|je|равен|равна|равно|är|er|on|este|είναι|là|هي|هو|است|है|dır|bằng)(?!\w)"
)
_LETTER = r"[^\W\d_]"
_MARK = re.compile(
    rf"(?:(?<!{_LETTER})(?:(?P<english>{_ENGLISH})|{_WORDS})(?!{_LETTER})|(?P<characters>{_CHARACTERS}))"
    r"(?P<bold>[*_]{0,3})"
    r"(?:[ \t](?:to|for|of)(?:[ \t][^\s.:=?]{1,20}){1,12}?)?(?:[ \t]?\([^()\n]{1,40}\))?[ \t]{0,4}[*_]{0,3}[ \t]{0,4}"
    rf"(?:(?P<sign>[:：=＝→]|(?<=答案)】|[—–]|-(?=\s))|(?P<copula>{_COPULA}|是|为|為|等于|は|が|은|는|คือ)"
    r"|(?P<line>(?=[ \t]{0,20}(?:\n|$))))",
    re.IGNORECASE,
)
_BEFORE_HEADING = re.compile(r"[#*_>\s\d.]*(?:(?:the|my|your)\s+)?", re.IGNORECASE)
_NO_STATEMENT = re.compile(
    r"\b(?:this|that|an|any|each|no|if|whether|what|where|every|another|check|verify|wrong|incorrect"
    r"|expected|suppose|assume|first|second|initial|supposing|assuming|imagine|previous|earlier|claimed|original)\s+(?:that\s+)?(?:the\s+)?$",
    re.IGNORECASE,
)
_ADVERBS = re.compile(
    r"(?:not[ \t]+[\w.,]{1,20}[ \t]+but(?=[ \t]+[*$\d])|that(?=[ \t]+there[ \t]+(?:is|are)\b)"
    r"|(?:therefore|thus|simply|just|indeed|hence|exactly|then|clearly|approximately|about|roughly|option|choice|also"
    r"|given[ \t]+by|equal[ \t]+to)(?![\w-])[,:]?[ \t]*)+",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"(?:correct|right|wrong|helpful|consistent|reasonable|not|because|only|unique|clear|unclear|now|likely|probably|in|as"
    r"|that|this|below|above|what|how|when|if|whether|to|useful|of|valid|plausible|at|on|from|shown|your|[a-z]+ed"
    r"|given|found|written|known|the[ \t]+same|a[ \t]+(?:bit|little))(?![\w-])",
)  # case counts: "Correct" and "In" may be an answer
_POINT = r"\n[ \t]{0,8}(?:[*-]|\d{1,2}[.)]|\([a-z]\))[ \t]+"
_POINTS = re.compile(rf"(?:{_POINT}[^\n]{{1,200}}){{2,20}}")
_SKIP = re.compile(r"[\s*_`:：=＝\"“”«「『}]*")


def _by_words(text: str) -> str | None:
    """Return the answer behind the last "The answer is", "Answer:" and the like that is followed by one."""
    for mark in reversed(deque(_MARK.finditer(text), _MAX_MARKS)):
        if (answer := _behind(text, mark)) is not None:
            return answer
    return None


def _behind(text: str, mark: re.Match[str]) -> str | None:
    line = text.rfind("\n", max(0, mark.start() - 200), mark.start()) + 1 or max(0, mark.start() - 200)
    if mark["line"] is not None and not _BEFORE_HEADING.fullmatch(text, line, mark.start()):
        return None
    is_sentence = mark["english"] is not None and mark["copula"] is not None
    if is_sentence and _NO_STATEMENT.search(text, line, mark.start()):
        return None
    if (mark["copula"] or "").lower().startswith("would") and re.search(r"(?i)\bif\b", text[line : mark.start()]):
        return None
    begin = _SKIP.match(text, mark.end()).end()  # type: ignore[union-attr]  # it matches ""
    if adverbs := _ADVERBS.match(text, begin):
        begin = _SKIP.match(text, adverbs.end()).end()  # type: ignore[union-attr]
    if is_sentence and _REMARK.match(text, begin):
        return None
    quote = text[mark.end() : begin][:_MAX_ANSWER] + mark["bold"]
    line = text.rfind("\n", mark.end(), begin)
    is_far = line >= 0
    points = _POINTS.match(text, line) if is_far else None
    lines = re.split(_POINT, points[0])[1:] if points else []
    rest = text[begin : begin + _MAX_ANSWER]
    answer = ", ".join(map(_first_statement, lines)) or _told(rest) or _first_statement(rest, quote)
    return answer if _is_answer(answer) and not (is_far and len(answer.split()) > 8) else None


# --- where an answer ends

_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$((?:[^$\\]|\\.)+?)\$|\\\((.+?)\\\)", re.DOTALL)
_MORE_MATH = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or|;)\s*(?=\$|\\\()")
_MATHY = re.compile(r"[-+−±]?\s?[$€£\\√]?[\d({\[\\.πx½¼¾]|[A-Za-z](?![A-Za-z'’])")
_SENTENCE_END = re.compile(r"(?<![A-Z. ])(?<!\bsq)\.(?=[\s*\"”’]|$)|(?<=[A-Za-z])[!?](?=\s|$)|!(?=\s+[A-Z])|[。！？；]")
_PROSE = re.compile(
    r"(?:,|(?<!\s))\s+\(?(?:because|since|as|which|where|so|therefore|hence|thus|by|after|due|given|i\.e\.|that|but|from"
    r"|(?:when |if )?rounded|is|are|was|would|per the|and (?:that|this|it|so|we|the))\b"
    r"|,\s+(?:I\s|(?!and\b|or\b)[a-z]{2,})|\s\((?!or |and )[A-Za-z]{2}|\s[—–]\s|\s-\s[A-Za-z]{2}|，\s?[因所即]"
    r"|です|になり|となり|입니다|이다|[，、]\s?(?=[^\W\d_])"
)


# Natalia sold 72 clips: a sentence with one number or formula, and nothing that turns it into another.
_TOLD_VERBS = (
    r"[a-z]{2,}ed|[a-z]+[a-rt-z]s|is|are|was|were|be|have|had|get|got|need|sold|made|spent|paid|won|left|bought|took|ate"
    r"|exactly|total|\s="
)
_TOLD_BEFORE = re.compile(rf"[A-Z][^\\\d\n{{}}^]{{1,120}}?\b(?:{_TOLD_VERBS}):?\s+[*_]{{0,2}}(?=[$\d\\−-])")
_QUANTITY = re.compile(
    r"\$[^$\n]{1,200}\$|\\\(.{1,200}?\\\)|\\\[.{1,200}?\\\]|\d+(?:[,./]\d+)*"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w*teen|twenty)\b"
)
_TURNED = re.compile(
    r"\b(?:not|no|never|neither|nor|half|twice|double|triple|times|than|less|least|most|if|unless|when|minus|plus|as|or"
    r"|either|except|without|between|about|approximately|claims?|guess\w*|suppose\w*|assum\w*|first|next|because|since|far|now|yet|still"
    r"|which|but|however|cannot|can'?t|before|maybe|perhaps|longer|candidate|wrong|incorrect|fails?|cases?|undefined)\b"
    r"|n['’]t\b|\?",
    re.IGNORECASE,
)
_LONE_LETTER = re.compile(r"\$([A-Za-z])\$|\\\(([A-Za-z])\\\)")
_GOES_ON = re.compile(
    rf"\s*(?:,?\s*(?:and|or)\s+[\d*_`$\\(-]|[,;]\s*[\d*$\\(-]|[+*/^=<>!](?=\s*[\w$\\])|-\s*[\d$]|\d"
    rf"|(?:{_SCALES}|times|mod|if)(?![A-Za-z]))"
)


def _first_statement(text: str, quote: str = "") -> str:
    """Return the answer with which a text begins; `quote` is the markup before it, which ends it as well."""
    answers, begin = [], 0
    if math := _MATH.match(text):
        inside, end = _inside(math), math.end()
        is_price = text[0] == "$" and re.match(r"[\d.,]+\s+[a-z]{2}", inside) is not None
        if not is_price and ("\n" not in inside.strip() or text[0] == "\\" or text.startswith("$$")):
            answers, begin = [_tidy(inside)], end
            while (more := _MORE_MATH.match(text, begin)) and (math := _MATH.match(text, more.end())):
                answers.append(_tidy(_inside(math)))
                begin = math.end()
    line = text[begin:].partition("\n")[0]
    for mark in ("**", "__", "`"):
        if mark in quote:
            first, _, rest = line.partition(mark)
            line = line.replace(mark, "") if _GOES_ON.match(rest) else first
    end = len(line)
    if found := _SENTENCE_END.search(line):
        end = found.start()
    if (answers or _MATHY.match(line)) and (found := _PROSE.search(line, 0 if answers else 1, end)):
        end = found.start()
    if answers:  # what follows a formula may belong to it: $5$ thousand
        rest = line[:end].strip("*_`") if re.match(r"\s*[\w\\%°!^+\-/=<>(*]", line[:end]) else ""
        return ", ".join(answers) + rest.rstrip(" \t,;:.")
    return _tidy(line[:end])


def _told(text: str) -> str:
    """Return the number or formula in a sentence, and what follows it there, if the text has no other; or else ""."""
    text = _LONE_LETTER.sub(r"\1\2", text[:1].upper() + text[1:])
    found = None if _TURNED.search(text) else _TOLD_BEFORE.match(text)
    if found is None or len(_QUANTITY.findall(text)) != 1 or re.search(r"\b(?:is|are|was|were)\b", text[found.end() :]):
        return ""
    return _first_statement(text[found.end() :], found[0])


def _inside(math: re.Match[str]) -> str:
    return next(group for group in math.groups() if group is not None)


_ORNAMENTS = (
    "".join(map(chr, [*range(0x2600, 0x27C0), *range(0x25A0, 0x2600), *range(0x1F300, 0x1FB00)])) + "∎\ufe0f \t\r\n"
)


def _tidy(text: str) -> str:
    """Remove markup and punctuation around an answer."""
    text = _ENDS.split(text, maxsplit=1)[0].strip(" \t\r\n*`“”«»")
    text = text.rstrip(_ORNAMENTS) or text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # x' keeps its prime
        text = text[1:-1]
    text = text.removesuffix("。").rstrip(",;:").strip()
    while text.endswith(".") and not text.endswith("..."):
        text = text[:-1].rstrip(" *`")
    if text.startswith("_") and text.endswith("_"):
        text = text.strip("_")
    if (math := _MATH.fullmatch(text)) and "$" not in _inside(math):
        text = _inside(math).strip().removesuffix(".")
    return text


# --- the whole

_CONCLUDES = re.compile(
    r"(?:(?:and|so)\s)?(?:(?:hence|therefore|thus|so)\b|∴)[,:]?\s*(?:we\s(?:get|have|find)[,:]?\s*)?(?:that\s)?",
    re.IGNORECASE,
)
# What may stand before a number that is all of a conclusion: a quote, "=", "Result:", {"answer":
_BEFORE_BARE = re.compile(
    r"[>=*\s]+(?:(?:result|solution|a)[*]{0,2}\s?:[*\s]*)?|(?:result|solution|a)\s?:[*\s]*|\{\s?\"(?:final_)?answer\"\s?:\s?\"?",
    re.IGNORECASE,
)
_BOLD_IN_SENTENCE = re.compile(r"[A-Z][^.!?*\n]{1,100}\*\*[^*\n]{1,60}\*\*[^.!?*\n]{0,60}[.!]?")
_LATEX_WORD = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")


def final_answer(completion: str) -> str | None:
    """Return the answer that a completion states behind its thinking, or None."""
    return final_answers(completion)[0]


def final_answers(completion: str) -> tuple[str | None, str | None]:
    """Return the answer of a completion, and what words behind its box or tag say that it is, if there are any."""
    text = conclusion(completion)
    if text is None or not text.strip():
        return None, None
    answer, later = _stated(text)
    return answer or _bare(text), later


def stated(text: str) -> str | None:
    """Return the answer that a text marks as its answer: by a box, a tag, `####` or words."""
    return _stated(text)[0]


def _stated(text: str) -> tuple[str | None, str | None]:
    answer, end = _last_box(text)
    if answer is not None:
        return answer, _by_words(text[end:])
    answer, end = _tagged(text)
    later = _by_words(text[end:]) if answer is not None else None
    answer = answer or _hashed(text) or _by_words(text) or _concluded(text) or None
    return (None, None) if answer is None or _BOX_COMMAND.search(answer) else (answer, later)  # a box that never closes


_NO_ANSWERS = frozenset(
    ("nan", "null", "n/a", "tbd", "todo", "proof", "-", "see solution", "see above", "see explanation", "it depends")
)


def reference_answer(text: str) -> str | None:
    """Return the answer in a reference, which may be a whole solution; an unmarked short text is an answer itself."""
    text = text.strip()
    answer = stated(text)
    if answer is None:
        is_answer = len(text) <= _MAX_REFERENCE and _is_answer(_BOX_COMMAND.sub("", text))
        answer = _tidy(text) if is_answer and not text.startswith(_HASHES) else None
    return None if answer is None or answer.lower() in _NO_ANSWERS else answer


def _concluded(text: str) -> str | None:
    """Return the equation in a last line such as "Hence x = 5.", or the one number in "Thus she sold 72 clips."."""
    line = text.strip().rpartition("\n")[2][:_MAX_ANSWER]
    found = _CONCLUDES.match(line)
    if found is None:
        return None
    rest = line[found.end() :]
    if told := _told(rest):
        return told
    answer = _first_statement(rest)
    return (
        answer if re.search(r"=|\\in(?![A-Za-z])", answer) and not _WORD.search(_LATEX_WORD.sub("", answer)) else None
    )


def _bare(text: str) -> str | None:
    """Return a conclusion that is nothing but a number or a formula."""
    text = text[: _MAX_ANSWER + 1].strip()
    if _BOLD_IN_SENTENCE.fullmatch(text) and (told := _told(text)):
        return told
    if before := _BEFORE_BARE.match(text):
        text = text[before.end() :].rstrip('"} \n' if "{" in before[0] else None)
    text = _tidy(text)
    is_formula = (
        len(text) <= _BEGIN
        and "boxed" not in text
        and "\n" not in text
        and _MATHY.match(text)
        and any(c.isdigit() for c in text)
    )
    return text if is_formula and not _WORD.search(_LATEX_WORD.sub("", text)) else None
