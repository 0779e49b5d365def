"""A model run by vLLM in this process: the fast way to sample many long answers.

Input: requests; ids come from Chat, so vLLM never sees text or a chat template. Invariants:
log-probabilities are of the raw model at temperature 1; an answer is a function of its request and
seed, so prefix caching, which makes log-probabilities depend on the order of requests, is off; what
ends a turn is what Chat says, not what vLLM reads out of the model folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.chat import Chat, Ids, model_folder
from dasd_lite.config import VllmModel
from dasd_lite.errors import ConfigError, DataError, MissingExtraError
from dasd_lite.sampler import Completion, Request, SamplingParams

_WINDOW = 1024
"""Requests that the engine holds: enough to fill its batches, few enough to keep memory flat."""


class VllmSampler:
    """A model in vLLM, in this process."""

    def __init__(self, config: VllmModel, folder: Path | None = None) -> None:
        """Load the model that `config` names, or the one in `folder`; raises ConfigError or MissingExtraError."""
        # In one process the engine can be stepped and freed here. The engine's own reports to its
        # authors and its log are off unless the user has asked for them.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import EngineArgs, LLMEngine
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise MissingExtraError("vllm", "vllm") from error
        model = model_folder(str(folder or config.model), weights=True)
        self.chat = Chat(model)
        arguments = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_model_len=config.max_model_len,
            enforce_eager=config.enforce_eager,
            trust_remote_code=config.trust_remote_code,
            enable_prefix_caching=False,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # the model's own defaults for sampling must not creep in
            disable_log_stats=True,
        )
        try:
            self._engine: Any = LLMEngine.from_engine_args(arguments)
        except ValueError as error:  # an option or a machine that does not suit the model: too little memory, mostly
            reason = " ".join(str(error).split())
            raise ConfigError(f"kind = 'vllm', model = {str(model)!r}: vLLM cannot start: {reason}") from error
        self.context = int(self._engine.model_config.max_model_len)

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once; completions come as they finish.

        A completion is also cut, as `length`, where the model's context ends. Raises DataError before anything is
        sampled when a prompt leaves no room for a single token.
        """
        for request in requests:
            self._check_fits(request, self._prompt(request))
        waiting = iter(requests)
        running: dict[str, Request] = {}
        try:
            while True:
                for request in islice(waiting, _WINDOW - len(running)):
                    name = str(request.position)
                    prompt = {"prompt_token_ids": self._prompt(request).tolist()}
                    self._engine.add_request(name, prompt, self._engine_params(request, params))
                    running[name] = request
                if not running:
                    return
                for output in self._engine.step():
                    if output.finished:
                        yield self._completion(running.pop(output.request_id), output.outputs[0])
        finally:
            if running:
                self._engine.abort_request(list(running))

    def close(self) -> None:
        """Free the model and its memory."""
        if self._engine is None:
            return
        import gc

        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        self._engine = None
        gc.collect()
        # The engine has opened torch.distributed; left open, neither another engine nor a training run could start.
        if torch.distributed.is_initialized():
            cleanup_dist_env_and_memory()

    def _prompt(self, request: Request) -> Ids:
        return self.chat.prompt_ids(request.messages, request.prefix)

    def _check_fits(self, request: Request, prompt: Ids) -> None:
        if len(prompt) >= self.context:
            raise DataError(
                f"request {request.position}: its prompt of {len(prompt)} tokens leaves no room for an answer in the"
                f" model's context of {self.context} (max_model_len): {request.messages[-1]['content'][:60]!r}"
            )

    def _engine_params(self, request: Request, params: SamplingParams) -> Any:
        from vllm import SamplingParams as EngineParams
        from vllm.sampling_params import RequestOutputKind

        return EngineParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=request.seed,
            max_tokens=request.max_tokens,
            logprobs=0,  # the sampled token's, no alternatives
            flat_logprobs=True,
            ignore_eos=True,  # vLLM's own notion of it; the ids that follow are the whole list
            stop_token_ids=list(self.chat.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        first = np.asarray(output.logprobs.start_indices, dtype=np.int64)  # of each position: the sampled token
        logprobs = np.asarray(output.logprobs.logprobs, dtype=np.float32)[first]
        if not np.array_equal(np.asarray(output.logprobs.token_ids)[first], ids):
            raise RuntimeError(f"vLLM gave log-probabilities of other tokens than the {len(ids)} that it sampled")
        text, token_bytes = self.chat.spell(ids.tolist(), continued=bool(request.prefix))
        return Completion(
            position=request.position,
            text=text,
            token_ids=ids,
            logprobs=logprobs,
            token_bytes=token_bytes,
            finish_reason=str(output.finish_reason),
        )
