r"""The Rust core in plain Python, meant to be read; the tests compare the fast one with it.

Nothing here is clever: lists, sets and loops. Where the two differ, this one is right.
"""

import math
import re
from bisect import bisect_left, insort
from collections.abc import Sequence

# --- packing -----------------------------------------------------------------------------------


def best_fit_decreasing(lengths: Sequence[int], seq_len: int, alignment: int = 1) -> list[list[int]]:
    """Rows of indices: the longest first, each into the row whose remaining space is the smallest that suffices."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -_aligned(lengths[index], alignment)):
        length = _aligned(lengths[index], alignment)
        index_of_best = bisect_left(open_rows, (length, 0))
        if index_of_best < len(open_rows):
            space, row = open_rows.pop(index_of_best)
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(open_rows, (space - length, row))
    return rows


def fewest_rows(lengths: Sequence[int], seq_len: int, alignment: int = 1) -> int:
    """The fewest rows that any packing needs, by trying all: for a handful of sequences."""
    longest_first = sorted((_aligned(length, alignment) for length in lengths), reverse=True)
    fewest = len(longest_first)

    def place(number: int, spaces: list[int]) -> None:
        nonlocal fewest
        if len(spaces) >= fewest:
            return
        if number == len(longest_first):
            fewest = len(spaces)
            return
        length = longest_first[number]
        for row, space in enumerate(spaces):
            if space >= length and space not in spaces[:row]:  # rows with equal space are all the same
                place(number + 1, [*spaces[:row], space - length, *spaces[row + 1 :]])
        place(number + 1, [*spaces, seq_len - length])

    place(0, [])
    return fewest


def next_fit(lengths: Sequence[int], seq_len: int, alignment: int = 1) -> list[list[int]]:
    """Rows of indices in the given order: a new row as soon as the next one does not fit."""
    rows: list[list[int]] = []
    space = 0
    for index, length in enumerate(lengths):
        if not rows or _aligned(length, alignment) > space:
            rows.append([])
            space = seq_len
        rows[-1].append(index)
        space -= _aligned(length, alignment)
    return rows


def _aligned(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def row_cost(lengths: Sequence[int], cost: tuple[float, float]) -> float:
    """Work for a row of sequences of these lengths."""
    return sum(cost[0] * length + cost[1] * length**2 for length in lengths)


def gather(
    tokens: Sequence[int],
    offsets: Sequence[int],
    loss_mask: Sequence[bool],
    documents: Sequence[int],
    alignment: int,
    pad_id: int,
) -> list[tuple[int, int, int]]:
    """Id, position and label of each token of these sequences, one after the other."""
    columns = []
    for document in documents:
        start, end = offsets[document], offsets[document + 1]
        for position in range(_aligned(end - start, alignment)):
            if start + position < end:
                token = tokens[start + position]
                is_target = loss_mask[start + position] and position > 0
                columns.append((token, position, token if is_target else -100))
            else:
                columns.append((pad_id, position, -100))
    return columns


# --- sentences ---------------------------------------------------------------------------------

# As Unicode has it; Python's isspace() would take four control characters as well.
WHITE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence.
ABBREVIATIONS = words(
    "approx assoc avda ca capt cf ch col cor dept dr dra eq eqn eqns eqs ex fig figs gen gov hr ineq lem lt mr mrs"
    " ms mt pp prof prop ref refs rev sec sen sgt sra st thm viz vol vs wrt"
)
# The end only before a capital letter.
ENDING_ABBREVIATIONS = words("al co corp est etc hrs inc jr lb lbs ltd min oz resp sr")
# The end unless a digit follows.
NUMBERED = words("apr aug dec feb jan jul jun mar no nov nr oct sep sept")
# Words before a capital letter that names a thing: "option C."
LABELS = words("answer case choice class figure group option part plan point question set step team type variable")
# Words before an initial: "by J. Smith".
BEFORE_NAMES = words("author by composer inventor mathematician philosopher physicist poet president professor writer")
# Words that begin a sentence rather than follow an initial or "U.S."
STARTERS = words(
    "A After All Also An And As At Because But By Each Finally First For From He Hence Her Here His How However I If In"
    " Is It Its Let My Next No Not Note Now Of On One Only Or Otherwise Our She Since So Suppose That The Their Then"
    " There Therefore These They This Those Thus To Wait We What When Where Which While Who Why With Yes You"
)
THINK = re.compile("</?think>")
FENCE = re.compile("`{3,}")
LIST_NUMBER = re.compile(r"[0-9]{1,3}[.)](?=[ \t])")
TERMINATORS = re.compile("[.!?…]+")
# They end a sentence without white space behind them.
FREE = "。！？｡।॥؟۔։።፧။។៕"
FREE_TERMINATORS = re.compile(f"[{FREE}][{FREE}.!?…]*")
CLOSERS = re.compile("[\"'*_`)\\]}”’»」』）】》〉］｝]*([ \xa0\u202f]»)?")
FULL_WIDTH_CLOSERS = re.compile("[”’»」』）】》〉］｝]*([ \xa0\u202f]»)?")
EMPTY_LINE = re.compile(r"\n[ \t\r]*\n")
OPENERS = "\"'“‘„«([*_"
DIGITS = tuple("0123456789")
MATH_REACH = 4096


def sentence_ends(text: str) -> list[int]:
    """Byte offsets of the sentence ends."""
    ends: list[int] = []  # in characters
    at = start = _skip_white(text, 0)
    at_line_start = True
    while at < len(text):
        end: int | None = None
        if at_line_start:
            end = _fence_end(text, at)
            if end is not None:
                ends += _blank_lines(text, at, end)
            elif number := LIST_NUMBER.match(text, at):
                at = number.end()
        at_line_start = False
        if end is None:
            if text[at] == "\n":
                end = at + 1
            elif tag := THINK.match(text, at):
                if at > start:
                    ends.append(at)
                end = tag.end()
            elif formula := re.compile(r"\$\$?|\\\(|\\\[").match(text, at):
                closed = _formula_end(text, at, formula[0])
                at = closed or formula.end()
                if closed is None or not _ends_inside(text, closed - len(formula[0]), closed):
                    continue
                end = closed
            elif text[at] == "\\":
                at += 2 if text[at + 1 : at + 2].isascii() and text[at + 1 : at + 2] not in ("", "\n") else 1
                continue
            elif text[at] == "`":
                at = _code_end(text, at)
                continue
            elif run := FREE_TERMINATORS.match(text, at):
                end = _match_end(FULL_WIDTH_CLOSERS, text, run.end())
                if text[end - 1] in "」』" and text.startswith("と", end):
                    at = end
                    continue
            elif run := TERMINATORS.match(text, at):
                closed = _match_end(CLOSERS, text, run.end())
                if (closed < len(text) and text[closed] not in WHITE) or _is_spared(text, start, run, closed):
                    at = run.end()
                    continue
                end = closed
            else:
                at += 1
                continue
        at = start = _skip_white(text, end)
        ends.append(at)
        at_line_start = "\n" in text[end - 1 : at]
    if text and (not ends or ends[-1] < len(text)):
        ends.append(len(text))
    return [len(text[:end].encode()) for end in ends]


def _skip_white(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip(WHITE))


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


def _fence_end(text: str, at: int) -> int | None:
    """Where the closing line of the fence at `at` ends, if there are a fence and a closing line."""
    fence = FENCE.match(text, at)
    if fence is None:
        return None
    num_ticks = min(len(fence[0]), 8)
    position = text.find("\n", at)
    while position >= 0:
        line = text[position + 1 :].split("\n", 1)[0]
        body = line.lstrip(" \t")
        if THINK.match(body):
            return None
        closing = len(body) - len(body.lstrip("`"))
        if closing >= num_ticks and not body[closing:].strip(" \t\r"):
            return position + 1 + len(line) - len(body) + closing
        position = text.find("\n", position + 1)
    return None


def _blank_lines(text: str, start: int, end: int) -> list[int]:
    """Where code goes on after an empty line of a fenced block; a line of the fence belongs to the code next to it."""
    last = text.rfind("\n", start, end)
    code = _skip_white(text, text.find("\n", start, end))
    blanks = (_skip_white(text, blank.start()) for blank in EMPTY_LINE.finditer(text, code, end))
    return sorted({after for after in blanks if after <= last})


def _code_end(text: str, at: int) -> int:
    """Where inline code ends, if its closing mark is on the same line and near; else where its opening mark ends."""
    ticks = re.compile("`+").match(text, at)
    assert ticks is not None
    line = text[ticks.end() :].split("\n", 1)[0]
    reach = line.encode()[: MATH_REACH - len(ticks[0])].decode(errors="ignore")
    if len(ticks[0]) == 1 and (closing := re.search("`", reach)):
        return ticks.end() + closing.end()
    return ticks.end()


def _formula_end(text: str, at: int, opening: str) -> int | None:
    """Where the formula that opens at `at` ends, if its closing mark comes soon enough."""
    closing = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}[opening]
    inside = at + len(opening)
    if opening == "$" and (inside == len(text) or text[inside] in " \t\n\f\r"):
        return None
    while inside < len(text) and len(text[at:inside].encode()) < MATH_REACH:
        if EMPTY_LINE.match(text, inside) or THINK.match(text, inside):
            return None
        closes = text.startswith(closing, inside)
        if opening == "$" and closes:
            closes = text[inside - 1] not in " \t\n\f\r" and not re.match("[0-9$]", text[inside + 1 : inside + 2])
        if closes:
            return inside + len(closing)
        inside += 2 if text[inside] == "\\" else 1
    return None


def _ends_inside(text: str, closing: int, closed: int) -> bool:
    """Whether a sentence ends with a full stop inside a formula: "$x = 2.$ Then"."""
    after = text[_skip_white(text, closed) :]
    stop = text[:closing].rstrip(" ").endswith(".")
    return stop and text[closed : closed + 1] == " " and after[:1].isupper()


def _is_spared(text: str, start: int, run: re.Match[str], closed: int) -> bool:
    """Whether the sentence goes on behind a mark that white space follows."""
    after = text[_skip_white(text, closed) :]
    follows = after[:1]
    quoted = text[run.end() : closed].strip("*_")
    if quoted and follows.islower():
        return True
    if run[0] != "." and not run[0].strip(".…"):
        return follows != "" and (follows.islower() or follows in (*DIGITS, *"+-−=<>,;)"))
    if run[0] == "!":
        return _is_factorial(text[: run.start()], text[closed : len(text) - len(after)], follows)
    return run[0] == "." and _is_abbreviation(text[start : run.start()], after)


def _is_factorial(before: str, white: str, follows: str) -> bool:
    factor = re.search(r"([0-9]|(^|[\x00-\x7f])(?<![A-Za-z0-9'])[A-Za-z])\Z", before)
    return "\n" not in white and bool(factor) and follows != "" and not follows.isupper()


def _is_abbreviation(sentence: str, after: str) -> bool:
    """Whether a full stop behind the beginning of a sentence, and before the text `after`, is a part of its word."""
    if re.fullmatch("[0-9]{1,3}", sentence):  # the number of an item
        return True
    word = _last_word(sentence)
    before = sentence[: len(sentence) - len(word)]
    if not word or not _is_border(before):
        return False
    if len(word) > 1:
        name = word.lower()
        if name in NUMBERED:
            return after[:1] in DIGITS
        return name in ABBREVIATIONS or (name in ENDING_ABBREVIATIONS and not after[:1].isupper())
    first = re.match("[A-Za-z]*", after)
    assert first is not None
    starts = first[0] in STARTERS
    if before.endswith("."):  # U.S., p.m., e.g.
        return bool(re.search("(?<![A-Za-z])([eE][.][gG]|[iI][.][eE])\\Z", sentence)) or not starts
    if _is_letter(after[:1]) and after[1:2] == ".":  # J. R., z. B.
        return True
    is_second = _ends_with_initial(before)
    if not word.isupper():
        return is_second and after[:1].islower()
    if is_second or not before.strip(WHITE + OPENERS) or before[-1] not in WHITE:
        return not starts
    previous = _last_word(before.rstrip(WHITE).removesuffix("."))
    if previous.lower() in LABELS or not previous:  # behind a comma, say
        return False
    return not starts and (previous[0].isupper() or previous in BEFORE_NAMES)


def _is_letter(character: str) -> bool:
    return character.isupper() or character.islower()


def _last_word(text: str) -> str:
    """The letters at the end; those of scripts without capitals do not count."""
    start = len(text)
    while start and _is_letter(text[start - 1]):
        start -= 1
    return text[start:]


def _is_border(before: str) -> bool:
    """Whether a word can begin behind this text."""
    last = before[-1:]
    return not last or last in WHITE + OPENERS or (last.isascii() and not last.isalnum())


def _ends_with_initial(before: str) -> bool:
    """Whether the text ends with a single letter, a full stop and one white space."""
    return (
        before[-1:] in WHITE
        and before[-2:-1] == "."
        and _is_letter(before[-3:-2])
        and len(before) >= 3
        and _is_border(before[:-3])
    )


# --- statistics --------------------------------------------------------------------------------


WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def deciding_byte(raw: bytes, start: int, end: int) -> int:
    """The first byte of a token that is not white space, or its first byte; half a character is no white space."""
    text = raw[start:end].decode(errors="surrogateescape")
    visible = text.lstrip(WHITE_SPACE)
    return end - len(visible.encode(errors="surrogateescape")) if visible else start


def tokens_of_sentences(raw: bytes, first: int, token_bytes: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """The tokens of each sentence of one response, whose first token begins at byte `first`."""
    inside: list[list[int]] = [[] for _ in ends]
    at = first
    for token, num_bytes in enumerate(token_bytes):
        byte = deciding_byte(raw, at, at + num_bytes)
        sentence = next((index for index, end in enumerate(ends) if byte < end), len(ends) - 1)
        inside[sentence].append(token)
        at += num_bytes
    return inside


def classify(p_teacher: float, p_student: float, beta: float) -> int:
    """-1 none, 0 shared, 1 teacher, 2 student."""
    if math.isnan(p_teacher) or math.isnan(p_student):
        return -1
    if p_teacher - p_student > beta:
        return 1
    return 2 if p_student - p_teacher > beta else 0


def rank_within_prompts(score: Sequence[float], prompt_index: Sequence[int], keep: int) -> list[bool]:
    """A candidate is kept if fewer than `keep` of its prompt are better, or as good and earlier."""
    pairs = list(enumerate(zip(score, prompt_index, strict=True)))
    return [
        sum(prompt == other and (value > mine or (value == mine and i < me)) for i, (value, other) in pairs) < keep
        for me, (mine, prompt) in pairs
    ]


def rank_correlation(score: Sequence[float], other: Sequence[float], prompts: Sequence[int]) -> float:
    """Correlation of two columns of ranks within prompts; equal values share their ranks' mean."""

    def ranks(values: Sequence[float]) -> list[float]:
        own = [[v for v, p in zip(values, prompts, strict=True) if p == prompt] for prompt in prompts]
        return [
            sum((v < value) - (v > value) for v in same) / 2 for value, same in zip(values, own, strict=True)
        ]  # half of how many are below less how many are above: the rank less the mean rank

    one, two = ranks(score), ranks(other)
    size = math.sqrt(sum(a * a for a in one) * sum(b * b for b in two))
    return sum(a * b for a, b in zip(one, two, strict=True)) / size if size else math.nan


def could_flip(low: Sequence[float], high: Sequence[float], kept: Sequence[bool], prompts: Sequence[int]) -> float:
    """Share of the prompts, kept in part, in which some rejected candidate may be as good as some kept one."""
    flips = []
    for prompt in set(prompts):
        own = [i for i, other in enumerate(prompts) if other == prompt]
        pairs = [high[j] >= low[i] for i in own for j in own if kept[i] and not kept[j]]
        flips += [any(pairs)] if pairs else []
    return sum(flips) / len(flips) if flips else math.nan


def length_matched(counts: Sequence[int], tokens: Sequence[int], prompts: Sequence[int]) -> list[float]:
    """Counts less what the prompt's rate expects, over its square root, less one line in the relative length."""
    scores, lines = [], []
    for count, length, prompt in zip(counts, tokens, prompts, strict=True):
        own = [i for i, other in enumerate(prompts) if other == prompt]
        total_length = sum(tokens[i] for i in own)
        expected = sum(counts[i] for i in own) / total_length * length
        scores.append((count - expected) / math.sqrt(expected) if expected else 0.0)
        lines.append(math.sqrt(expected) * (length / (total_length / len(own)) - 1))
    spread = sum(line * line for line in lines)
    slope = sum(line * score for line, score in zip(lines, scores, strict=True)) / spread if spread else 0.0
    return [score - slope * line for line, score in zip(lines, scores, strict=True)]


def rank_surprisal_ratio(probabilities: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    """Of tokens that were chosen, each from the probabilities of all: ranks up to 100, over surprisals."""
    ranks = [min(1 + sum(p > row[token] for p in row), 100) for row, token in zip(probabilities, chosen, strict=True)]
    return sum(ranks) / sum(-math.log(row[token]) for row, token in zip(probabilities, chosen, strict=True))


# --- repetition --------------------------------------------------------------------------------


def repeated_ngrams(ids: Sequence[int], n: int) -> tuple[int, int]:
    """Positions whose n-gram began before, and the length of the longest stretch of copies, of 3n ids or more."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    longest = 0
    for period in range(1, len(ids) // 3 + 1):
        stretch = period  # up to here, each id is that of one period before
        for at in range(period, len(ids)):
            stretch = stretch + 1 if ids[at] == ids[at - period] else period
            if stretch >= 3 * max(period, n):
                longest = max(longest, stretch)
    return len(grams) - len(set(grams)), longest


def repeated_share(units: Sequence[bytes], num_bytes: int) -> float:
    """Bytes of units longer than 8 bytes that occurred before, as a share."""
    seen: set[bytes] = set()
    repeated = 0
    for unit in units:
        unit = unit.strip(b" \t\n\r\f")
        if len(unit) > 8 and unit in seen:
            repeated += len(unit)
        seen.add(unit)
    return repeated / num_bytes if num_bytes else 0.0
