"""A model run by vLLM in child processes: the fast way to sample many long answers and to score given ones.

Input: requests, or token ids to score. Chat encodes prompts and decodes answers here, while the engines (engine.py, in
the processes of pool.py) work, so vLLM never sees text or a chat template. Invariants: log-probabilities are the raw
model's at temperature 1; an answer depends only on its request and seed, so prefix caching, which makes
log-probabilities depend on the order of requests, is off; Chat decides which tokens end a turn, not the generation
config in the model folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.config.models import Vllm
from dasd_lite.costs.cards import usable_gpus
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import ConfigError, DataError, MissingExtraError
from dasd_lite.inference import Completion, Request, SamplingParams, TokenScores
from dasd_lite.inference.vllm.engine import EngineJob, EngineReply
from dasd_lite.inference.vllm.pool import Pool
from dasd_lite.model.architecture import read_architecture

_SCORING_LOGITS = 1 << 28
"""Logits that exist at once in scoring: 1 GiB in float32. vLLM computes those of a whole scheduler step."""
_AS_LONG_AS_FITS = -1
"""vLLM's `max_model_len` for the model's context, or as much of it as the memory holds of one sequence."""
_SCORING_SEQS = 64  # sequences in one step; they end with it, so a few fill it


class VllmSampler:
    """A model in one or more vLLM engines, each in its own process."""

    def __init__(self, config: Vllm, folder: Path | None = None, *, scoring: bool = False) -> None:
        """Load the model, at the first requests if how long they are decides how much memory each may need.

        Args:
            config: The model and the engines' options.
            folder: Tokenizer and weights to load in place of the model's own.
            scoring: Make steps small enough for the logits of whole prompts.

        Raises:
            ConfigError: vLLM rejects the options, or there are too few GPUs.
            MissingExtraError: vLLM is not installed.
            EngineError: An engine keeps crashing.
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
            "enforce_eager": config.enforce_eager,
            "trust_remote_code": config.trust_remote_code,
            "enable_prefix_caching": False,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # ignore the sampling defaults in the model folder
            "disable_log_stats": True,
        }
        if scoring:
            options |= {"max_num_batched_tokens": _scoring_tokens(self.chat.vocab_size), "max_num_seqs": _SCORING_SEQS}
        self._engine_options = options
        self._groups = gpu_groups(usable_gpus(), config.tensor_parallel_size, config.data_parallel_size)
        self._stall_s = config.stall_s
        self._pool: Pool | None = None
        self._closed = False
        self._keys = count()  # of jobs; never reused, so a reply to a dropped job is recognized
        self._fits_requests = config.max_model_len is None
        self.context = min(self.chat.context, config.max_model_len or self.chat.context)
        """Longest prompt plus answer in tokens."""
        original = read_architecture(model, trust_remote_code=config.trust_remote_code).original_positions
        # vLLM chooses a longrope's factors by the context that it serves, and by default the short ones.
        self._least = 1 if original is None else min(original + 1, self.context)
        if scoring or not self._fits_requests:
            whole = self.context if original is not None else _AS_LONG_AS_FITS
            self._start(config.max_model_len or whole)

    def _start(self, max_model_len: int) -> Pool:
        """Start the engines; end those that run already."""
        if self._pool is not None:
            self._pool.close()
        try:
            self._pool = Pool(
                self._engine_options | {"max_model_len": max_model_len}, self._groups, stall_s=self._stall_s
            )
        except ConfigError as error:
            raise ConfigError(f"kind = 'vllm', model = {self._engine_options['model']!r}: {error}") from error
        if max_model_len == _AS_LONG_AS_FITS:
            self.context = self._pool.context
        return self._pool

    def _engines(self, longest: int) -> Pool:
        """Return engines with room for `longest` tokens."""
        if self._closed:
            raise RuntimeError("the engines are closed")
        if self._pool is None or (self._fits_requests and longest > self._pool.context):
            return self._start(longest)
        return self._pool

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        A completion also ends, as `length`, at the end of the model's context. Raises DataError before anything is
        sampled if a prompt leaves no room for a single token, and EngineError as Pool.run does.
        """
        longest = 0
        for request in {(id(r.messages), r.prefix, r.max_tokens): r for r in requests}.values():
            longest = max(longest, self._check_fits(request) + request.max_tokens)
        pending: dict[int, Request] = {}
        prompt_tokens: dict[int, int] = {}

        def jobs() -> Iterator[EngineJob]:
            for key, request in zip(self._keys, requests, strict=False):
                prompt = self._prompt(request)
                pending[key], prompt_tokens[key] = request, len(prompt)
                yield EngineJob(key, prompt, self._options(request, params))

        for reply in self._engines(min(max(longest, self._least), self.context)).run(jobs()):
            request = pending.pop(reply.key)
            _check_accepted(reply, f"request {request.position}")
            yield self._completion(request, reply, prompt_tokens.pop(reply.key))

    def score(self, sequences: Iterable[tuple[int, TokenIds]]) -> Iterator[TokenScores]:
        """Score given sequences; they come as they finish, in any order.

        Open the sampler with `scoring` for this: otherwise the logits of a step may not fit into memory.

        Args:
            sequences: Position, which is returned with the scores, and token ids [T], T from 1 to the model's context.

        Yields:
            Position; log-probabilities float32 [T], NaN for the first token; None in place of ranks. vLLM counts the
            tokens that are at least as likely (v1/sample/ops/logprobs.py), so a token that ties with others gets the
            last of their ranks, not 1 + the number of tokens that are likelier.

        Raises:
            DataError: A sequence is empty, longer than the context, or has an id that the model does not have.
            EngineError: As Pool.run does.
        """
        pending: dict[int, tuple[int, TokenIds]] = {}

        def jobs() -> Iterator[EngineJob]:
            for key, (position, ids) in zip(self._keys, sequences, strict=False):
                pending[key] = position, ids
                yield self._scoring_job(key, position, ids)

        pool = self._pool or self._start(_AS_LONG_AS_FITS)
        for reply in pool.run(jobs()):
            position, ids = pending.pop(reply.key)
            _check_accepted(reply, f"sequence {position}")
            yield position, _scores(reply, ids), None

    def status(self) -> str:
        """Return how many engines there are, and how many answers they are generating."""
        return "vLLM is loading" if self._pool is None else self._pool.status()

    def close(self) -> None:
        """End the engines' processes, which frees all of their memory."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()

    def _prompt(self, request: Request) -> TokenIds:
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _check_fits(self, request: Request) -> int:
        """Return the tokens of the prompt; raises DataError if they leave no room for an answer."""
        prompt = self._prompt(request)
        if len(prompt) >= self.context:
            raise DataError(
                f"request {request.position}: the prompt of {len(prompt)} tokens leaves no room for an answer in the"
                f" model's context of {self.context} tokens (max_model_len): {request.messages[-1]['content'][:60]!r}"
            )
        return len(prompt)

    def _options(self, request: Request, params: SamplingParams) -> dict[str, Any]:
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "logprobs": 0,  # of the sampled token, without alternatives
            "stop_token_ids": list(self.chat.answer_end_ids),
        }

    def _scoring_job(self, key: int, position: int, ids: TokenIds) -> EngineJob:
        if not 0 < len(ids) <= self.context:
            raise DataError(
                f"sequence {position} has {len(ids)} tokens; a sequence must have 1 to {self.context}, the model's"
                " context (max_model_len)"
            )
        assert self._pool is not None
        if ids.min() < 0 or ids.max() >= self._pool.vocab_size:
            raise DataError(
                f"sequence {position} has token ids from {ids.min()} to {ids.max()}; the model has ids 0 to"
                f" {self._pool.vocab_size - 1}"
            )
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}
        if len(ids) == self.context > 1:  # vLLM needs room for an answer: allow only the last token in it
            options["allowed_token_ids"] = [int(ids[-1])]
            ids = ids[:-1]
        return EngineJob(key, ids, options)

    def _completion(self, request: Request, reply: EngineReply, prompt_tokens: int) -> Completion:
        text, token_bytes, finish_reason = self.chat.decode_answer(
            reply.ids.tolist(), reply.finish_reason, request.prefix
        )
        return Completion(
            position=request.position,
            text=text,
            token_ids=reply.ids,
            logprobs=reply.logprobs,
            token_bytes=token_bytes,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
        )


def _check_accepted(reply: EngineReply, name: str) -> None:
    if reply.error:
        raise DataError(f"{name}: vLLM rejects it: {reply.error}")


def _scores(reply: EngineReply, ids: TokenIds) -> npt.NDArray[np.float32]:
    """Return the log-probability of each of `ids`; the last may be the token that the engine had to generate."""
    logprobs = reply.prompt_logprobs
    if logprobs is not None and len(logprobs) == len(ids) - 1 and reply.ids.tolist() == [ids[-1]]:
        logprobs = np.append(logprobs, reply.logprobs)
    if logprobs is None or len(logprobs) != len(ids):
        raise RuntimeError(f"vLLM scored {0 if logprobs is None else len(logprobs)} tokens, not {len(ids)}")
    return logprobs


def _scoring_tokens(vocab_size: int) -> int:
    """Return the largest number of tokens per step, a power of two, whose logits stay within the limit."""
    most = max(_SCORING_LOGITS // vocab_size, 2 * _SCORING_SEQS)
    return int(min(1 << (most.bit_length() - 1), 8192))


def gpu_groups(visible: Sequence[str], tensor_parallel_size: int, data_parallel_size: int | None) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each engine; None keeps this process's.

    Without GPUs there is one engine, or `data_parallel_size` of them. Raises ConfigError if there are too few GPUs.
    """
    if not visible:
        return [None] * (data_parallel_size or 1)
    num = data_parallel_size or max(1, len(visible) // tensor_parallel_size)
    if num * tensor_parallel_size > len(visible):
        raise ConfigError(
            f"kind = 'vllm': data_parallel_size = {num} × tensor_parallel_size = {tensor_parallel_size} needs"
            f" {num * tensor_parallel_size} GPUs, but {len(visible)} are visible"
        )
    starts = range(0, num * tensor_parallel_size, tensor_parallel_size)
    return [",".join(visible[start : start + tensor_parallel_size]) for start in starts]
