"""A model run by vLLM in child processes: the fast way to sample many long answers, and to score given ones.

Input: requests, or token ids to score; ids come from Chat, so vLLM never sees text or a chat template, and texts are
read and spelt here while the engines (vllm_engine.py, kept by vllm_pool.py) work. Invariants: log-probabilities are of
the raw model at temperature 1; an answer is a function of its request and seed, so prefix caching, which makes
log-probabilities depend on the order of requests, is off; what ends a turn is what Chat says, not what vLLM reads out
of the model folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import VllmModel
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import ConfigError, DataError, MissingExtraError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.vllm.engine import EngineJob, EngineReply
from dasd_lite.inference.vllm.pool import Pool

_SCORING_LOGITS = 1 << 28
"""Logits that exist at once in scoring: 1 GiB in float32. vLLM computes those of a whole step of the scheduler."""
_SCORING_SEQS = 64  # sequences in one step; they are over after it, so few fill it


class VllmSampler:
    """A model in vLLM: one engine or several, each in a process of its own."""

    def __init__(self, config: VllmModel, folder: Path | None = None, *, scoring: bool = False) -> None:
        """Load the model that `config` names, or the one in `folder`.

        With `scoring` the engines work in steps small enough for the logits of whole prompts. Raises ConfigError,
        MissingExtraError, or EngineError when engines end again and again.
        """
        if find_spec("vllm") is None:
            raise MissingExtraError("vllm", "vllm")
        model = model_folder(str(folder or config.model), weights=True)
        self.chat = Chat(model)
        options: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "max_model_len": config.max_model_len,
            "enforce_eager": config.enforce_eager,
            "trust_remote_code": config.trust_remote_code,
            "enable_prefix_caching": False,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # the model's own defaults for sampling must not creep in
            "disable_log_stats": True,
        }
        if scoring:
            options |= {"max_num_batched_tokens": _scoring_tokens(self.chat.vocab_size), "max_num_seqs": _SCORING_SEQS}
        groups = gpu_groups(visible_gpus(), config.tensor_parallel_size, config.data_parallel_size)
        try:
            self._pool = Pool(options, groups, stall_s=config.stall_s)
        except ConfigError as error:
            raise ConfigError(f"kind = 'vllm', model = {str(model)!r}: {error}") from error
        self.context = self._pool.context
        self._keys = count()  # of jobs; never used twice, so an answer to a dropped one is known

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        A completion is also cut, as `length`, where the model's context ends. Raises DataError before anything is
        sampled when a prompt leaves no room for a single token, and EngineError as Pool.run does.
        """
        for request in {(id(r.messages), r.prefix): r for r in requests}.values():
            self._check_fits(request)
        asked: dict[int, Request] = {}
        prompt_tokens: dict[int, int] = {}

        def jobs() -> Iterator[EngineJob]:
            for key, request in zip(self._keys, requests, strict=False):
                prompt = self._prompt(request)
                asked[key], prompt_tokens[key] = request, len(prompt)
                yield EngineJob(key, prompt, self._options(request, params))

        for answer in self._pool.run(jobs()):
            request = asked.pop(answer.key)
            _check_taken(answer, f"request {request.position}")
            yield self._completion(request, answer, prompt_tokens.pop(answer.key))

    def score(
        self, sequences: Iterable[tuple[int, TokenIds]]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64] | None]]:
        """Compute the log-probability of each token of given sequences; they come as they finish, in any order.

        Open the sampler with `scoring` for this: otherwise the logits of a step may not fit into memory.

        Args:
            sequences: Position, which is given back, and token ids [T], T from 1 to the model's context.

        Yields:
            Position, log-probabilities [T] of each token given those before it, NaN for the first, and None in place
            of the tokens' ranks: vLLM counts the tokens that are at least as likely (v1/sample/ops/logprobs.py), so a
            token that ties with others has the last of their ranks, not 1 + the number of those that are likelier.

        Raises:
            DataError: A sequence is empty, longer than the context, or has an id that the model does not have.
            EngineError: As Pool.run does.
        """
        asked: dict[int, tuple[int, TokenIds]] = {}

        def jobs() -> Iterator[EngineJob]:
            for key, (position, ids) in zip(self._keys, sequences, strict=False):
                asked[key] = position, ids
                yield self._scoring_job(key, position, ids)

        for answer in self._pool.run(jobs()):
            position, ids = asked.pop(answer.key)
            _check_taken(answer, f"sequence {position}")
            yield position, _scores(answer, ids), None

    def status(self) -> str:
        """Say how many engines there are and what they have to do."""
        return self._pool.status()

    def close(self) -> None:
        """End the engines, which frees all of their memory."""
        self._pool.close()

    def _prompt(self, request: Request) -> TokenIds:
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _check_fits(self, request: Request) -> None:
        prompt = self._prompt(request)
        if len(prompt) >= self.context:
            raise DataError(
                f"request {request.position}: its prompt of {len(prompt)} tokens leaves no room for an answer in the"
                f" model's context of {self.context} (max_model_len): {request.messages[-1]['content'][:60]!r}"
            )

    def _options(self, request: Request, params: SamplingParams) -> dict[str, Any]:
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "logprobs": 0,  # the sampled token's, no alternatives
            "stop_token_ids": list(self.chat.answer_end_ids),
        }

    def _scoring_job(self, key: int, position: int, ids: TokenIds) -> EngineJob:
        if not 0 < len(ids) <= self.context:
            raise DataError(
                f"sequence {position}: {len(ids)} tokens cannot be scored, 1 to the model's context of {self.context}"
                " (max_model_len) can"
            )
        if ids.min() < 0 or ids.max() >= self._pool.vocab_size:
            raise DataError(
                f"sequence {position}: token ids from {ids.min()} to {ids.max()}; the model has 0 to"
                f" {self._pool.vocab_size - 1}"
            )
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}
        if len(ids) == self.context > 1:  # vLLM wants room for an answer: the last token is the one that it may write
            options["allowed_token_ids"] = [int(ids[-1])]
            ids = ids[:-1]
        return EngineJob(key, ids, options)

    def _completion(self, request: Request, answer: EngineReply, prompt_tokens: int) -> Completion:
        text, token_bytes, finish_reason = self.chat.decode_answer(
            answer.ids.tolist(), answer.finish_reason, request.prefix
        )
        return Completion(
            position=request.position,
            text=text,
            token_ids=answer.ids,
            logprobs=answer.logprobs,
            token_bytes=token_bytes,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
        )


def _check_taken(answer: EngineReply, name: str) -> None:
    if answer.refusal:
        raise DataError(f"{name}: vLLM does not take it: {answer.refusal}")


def _scores(answer: EngineReply, ids: TokenIds) -> npt.NDArray[np.float32]:
    """Return the log-probability of each of `ids`, the last of which the engine may have been made to write."""
    found = answer.prompt_logprobs
    if found is not None and len(found) == len(ids) - 1 and answer.ids.tolist() == [ids[-1]]:
        found = np.append(found, answer.logprobs)
    if found is None or len(found) != len(ids):
        raise RuntimeError(f"vLLM has not scored {len(ids)} tokens but {0 if found is None else len(found)}")
    return found


def _scoring_tokens(vocab_size: int) -> int:
    """Return how many tokens a step may have for its logits to stay under their limit: a power of two."""
    most = max(_SCORING_LOGITS // vocab_size, 2 * _SCORING_SEQS)
    return int(min(1 << (most.bit_length() - 1), 8192))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def gpu_groups(visible: Sequence[str], tensor_parallel_size: int, data_parallel_size: int | None) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each engine, none to leave it as it is.

    Without GPUs there is one engine, or `data_parallel_size` of them. Raises ConfigError when the GPUs do not suffice.
    """
    if not visible:
        return [None] * (data_parallel_size or 1)
    num = data_parallel_size or max(1, len(visible) // tensor_parallel_size)
    if num * tensor_parallel_size > len(visible):
        raise ConfigError(
            f"kind = 'vllm': data_parallel_size = {num} × tensor_parallel_size = {tensor_parallel_size} makes"
            f" {num * tensor_parallel_size} GPUs, and {len(visible)} are visible"
        )
    starts = range(0, num * tensor_parallel_size, tensor_parallel_size)
    return [",".join(visible[start : start + tensor_parallel_size]) for start in starts]
