"""Reasoning-like text from templates, to test sentence splitters; the same seed gives the same text."""

from __future__ import annotations

import random

_WORDS = (
    "the a we so then number sum product value equation function case answer term side let take check prove note that "
    "is are of in for with from which must can if since because hence step remaining positive integer prime factor "
    "divides equals gives implies both each every first second third total length area triangle circle expected"
)
WORDS = _WORDS.split()
FORMULAS = (
    r"$x^2 + y^2 = z^2$",
    r"\(f(x) = 3.5x - 1.\)",
    r"$$\sum_{i=1}^{n} i = \frac{n(n+1)}{2}.$$",
    r"\[a_n = 2a_{n-1} + 1\]",
    r"$\sqrt{2} \approx 1.41421$",
    r"$p \mid ab. $",
    r"\(k!\)",
    r"$\Pr[X > 0.05]$",
)
ASIDES = ("e.g. ", "i.e. ", "cf. Eq. 3, ", "Dr. Gauss said, ", "as in Fig. 2, ", "vs. the other, ", "by J. R. Smith, ")
OPENERS = ("Wait, ", "Hmm. ", "OK, so ", "Alternatively, ", "Therefore, ", "Let me check: ", "", "", "", "")
CHINESE = (
    "所以答案是四十二。",
    "让我们再检查一遍！",
    "这样对吗？",
    "因此，当 $n = 3$ 时，结论成立。",
    "したがって、これは正しい。",
)
CODE = "```python\ndef total(n):\n    # Adds. Slowly!\n    return sum(i * 1.5 for i in range(n))\n\ntotal({0})\n```\n"


def reasoning(num_bytes: int, seed: int = 0) -> list[bytes]:
    """Texts of 5 to 60 KB, about `num_bytes` bytes of UTF-8 in total.

    Paragraphs are drawn from a pool of 4 MB: 100 MB take seconds, and the pool is too large for a branch predictor.
    """
    rng = random.Random(seed)
    pool, size = [], 0
    while size < min(4_000_000, num_bytes):
        pool.append(_paragraph(rng).encode())
        size += len(pool[-1])
    texts, size = [], 0
    while size < num_bytes:
        target = min(int(rng.lognormvariate(9.8, 0.7)), 60_000) + 5_000
        parts, length = [b"<think>\n"], 0
        while length < target:
            parts.append(pool[rng.randrange(len(pool))])
            length += len(parts[-1])
        parts.append(b"</think>\nThe answer is 42.")
        texts.append(b"".join(parts))
        size += len(texts[-1])
    return texts


def _paragraph(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.04:
        return CODE.format(rng.randrange(2, 5_000))
    if kind < 0.14:
        return "".join(f"{at}. {_sentence(rng)}\n" for at in range(1, rng.randrange(3, 7)))
    if kind < 0.18:
        return "".join(rng.choices(CHINESE, k=rng.randrange(2, 6))) + "\n\n"
    return " ".join(_sentence(rng) for _ in range(rng.randrange(1, 8))) + "\n\n"


def _sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randrange(4, 24))
    for _ in range(2):
        at, kind = rng.randrange(len(words)), rng.random()
        if kind < 0.35:
            words[at] = rng.choice(FORMULAS)
        elif kind < 0.6:
            words[at] = f"{rng.random() * 100:.2f}"
        elif kind < 0.7:
            words[at] = rng.choice(ASIDES) + words[at]
        elif kind < 0.75:
            words[at] = f'"{words[at].title()}!"'
    text = rng.choice(OPENERS) + " ".join(words)
    return text[0].upper() + text[1:] + rng.choices((".", "?", "!", "…", ":"), (80, 8, 4, 3, 5))[0]


if __name__ == "__main__":
    print(reasoning(3_000)[0].decode())
