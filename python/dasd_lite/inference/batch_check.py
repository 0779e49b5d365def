"""Check, before a model is sampled from, that an answer has the log-probabilities in a batch that it has alone.

Input: a model and the beginning of a prompt. Output: the gap between both. Invariant: an architecture that nobody has
tried cannot be silently wrong, whatever it does with padding, its cache, or rows that leave a batch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from dasd_lite.chat.spelling import TokenIds
from dasd_lite.inference import SamplingParams
from dasd_lite.inference.batch import Answer, Batch, Decoder, Job

_TOKENS = 32  # of the longer prompt; the shorter one has half of them
_LIMITS = (3, 5, 4)  # the padded rows stay when the other leaves
MOST_TOKENS = max(_LIMITS)
"""Behind the prompt."""
# Nats, on average over an answer. What goes wrong is 1 and more; rounding in 16 bits is up to 0.04 on average, more
# with experts, whose router may choose another one.
_EXACT, _ROUNDED = 1e-3, 0.2


def is_right(decoder: Decoder, prompt: TokenIds, size: int) -> bool:
    """Return whether greedy answers to three prompts of two lengths are those of a plain forward of each one alone.

    Args:
        decoder: The model.
        prompt: Some prompt; its beginning is read.
        size: Answers in a batch.

    Raises:
        TrainError: Logits are not finite.
    """
    import torch

    long = prompt[:_TOKENS]
    prompts = (long, long[len(long) // 2 :], long[len(long) // 2 :])
    jobs = [Job(i, ids, limit, 0) for i, (ids, limit) in enumerate(zip(prompts, _LIMITS, strict=True))]
    greedy = Batch(replace(decoder, end_ids=()), SamplingParams(temperature=0.0), size)
    gap = max(_gap(decoder, answer) for answer in greedy.run(deque(jobs)))
    right = torch.tensor([int(gap <= _tolerance(decoder))], device=decoder.model.device)
    return bool(right if decoder.broadcast is None else decoder.broadcast(right))  # all must decide the same


def _gap(decoder: Decoder, answer: Answer) -> float:
    """Return the mean difference of an answer's log-probabilities to those of a forward of the whole."""
    import torch

    ids = torch.from_numpy(np.concatenate([answer.job.prompt, answer.token_ids]).astype(np.int64))[None]
    ids = ids.to(decoder.model.device)
    with decoder.mode():
        logits = decoder.model(input_ids=ids, use_cache=False).logits[0, len(answer.job.prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, len(answer.job.prompt) :, None])
    return float(np.abs(logprobs[:, 0].cpu().numpy() - answer.logprobs).mean())


def _tolerance(decoder: Decoder) -> float:
    import torch

    is_rounded = torch.is_autocast_enabled(decoder.model.device.type) or any(
        p.dtype != torch.float32 for p in decoder.model.parameters()
    )
    return _ROUNDED if is_rounded else _EXACT
