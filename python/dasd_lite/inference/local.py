"""Sample with transformers in this process: a batch that finished answers leave and waiting requests join.

Input: requests; output: completions as they finish. Invariant: the tokens of a request depend only on its seed and its
own logits, so batch size, order and restarts change an answer by rounding at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_lite.chat.chat import Chat
from dasd_lite.chat.spelling import TokenIds
from dasd_lite.console import note
from dasd_lite.costs.cache import answers_that_fit
from dasd_lite.costs.shape import shape_of
from dasd_lite.data.hub import model_folder
from dasd_lite.errors import ConfigError, DasdError, DataError, TrainError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.batch import Answer, Batch, Decoder, Job
from dasd_lite.inference.batch_check import MOST_TOKENS, is_right
from dasd_lite.model.architecture import architecture_of, cache_argument, read_config
from dasd_lite.model.decode import decoding_attention
from dasd_lite.model.load import load_model
from dasd_lite.model.memory import free_gpu, free_gpu_bytes, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dasd_lite.config.models import Transformers

_JOIN_AT = 0.5
"""Share of a batch still generating at which waiting answers join it on a GPU, where a step takes as long for few rows
as for many. On a CPU the attention to as many positions as the longest row has costs more (20 % in the demo). What has
recurrent states cannot be shifted to where the others are."""
_LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError)
"""What a model of transformers raises if it cannot be run as we do."""
_WINDOW = 16  # batches whose prompts are sorted by length together: little padding, and results stay nearly in order


class TransformersSampler:
    """Batched generation with a Hugging Face model."""

    def __init__(
        self,
        config: Transformers,
        folder: Path | None = None,
        model: PreTrainedModel | None = None,
        broadcast: Callable[[Tensor], Tensor] | None = None,
        *,
        four_bit: bool = False,
    ) -> None:
        """Load the model, unless one is given.

        Args:
            config: The model, its dtype and the batch size.
            folder: Tokenizer and weights to load in place of the model's own.
            model: A loaded model to sample from as it is.
            broadcast: Replaces the drawn tokens int64 [B] by those of the first process, if several processes share
                the weights.
            four_bit: Load the weights in 4 bits (NF4).

        Raises:
            ConfigError: The folder holds no such model, or one that cannot be sampled from here.
        """
        import torch

        path = folder or model_folder(config.model, weights=True)
        trust = config.trust_remote_code
        architecture = architecture_of(model.config if model else read_config(path, trust_remote_code=trust))
        if architecture.unsampled:
            raise ConfigError(f"{path}: {architecture.unsampled}; use kind = 'vllm'")
        attention = decoding_attention(architecture)
        self._chat = Chat(path)
        loaded = model or load_model(
            path,
            dtype=config.dtype,
            trust_remote_code=trust,
            attention=attention,
            four_bit=four_bit,
            context=config.max_model_len,
        )
        if cache_argument(type(loaded)) is None:  # code that came with the model
            raise ConfigError(f"{path}: {architecture.kind} takes no cache by name; use kind = 'vllm'")
        self._context = min(self._chat.context, config.max_model_len or self._chat.context)
        self._decoder: Decoder | None = Decoder(
            model=loaded,
            name=config.model,
            end_ids=self._chat.answer_end_ids,
            vocab_size=self._chat.vocab_size,
            join_at=_JOIN_AT if architecture.packs and loaded.device.type == "cuda" else 0.0,
            # Tensors created in inference mode could not be used in training afterwards.
            mode=torch.inference_mode if model is None else torch.no_grad,
            broadcast=broadcast,
        )
        self._batch_size = self._noted = config.batch_size if architecture.batches else 1
        self._is_checked = False
        self._is_in_training = model is not None

    def status(self) -> str:
        """No status to report."""
        return ""

    def close(self) -> None:
        """Free the model and its GPU memory, which another engine may need next."""
        self._decoder = None
        free_gpu()

    def complete(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Sample every request once.

        Raises:
            DataError: A prompt leaves no room in the context.
            ConfigError: What the model answers in a batch, or from its cache, is not what it answers by itself.
            TrainError: Logits are not finite, or memory does not suffice for a single answer.
        """
        decoder = self._decoder
        assert decoder is not None, "closed"
        waiting = self._jobs(requests, decoder.name)
        batch_size = self._batch_that_fits(decoder, waiting)
        first_size = 0  # before memory ran out; 0 if it did not
        while waiting:
            batch = Batch(decoder, params, batch_size)
            try:
                if not self._is_checked and self._batch_that_is_right(decoder, waiting[0].prompt, batch_size) == 1:
                    batch_size = self._batch_size = 1
                    batch = Batch(decoder, params, batch_size)
                self._is_checked = True
                for answer in batch.run(waiting):
                    if first_size:
                        note(f"{decoder.name}: batch {first_size} → {batch_size}: {_place(decoder)} is full")
                        first_size = 0
                    yield self._completion(requests[answer.job.index], answer)
            except Exception as error:
                # Processes that share the weights have to draw the same tokens, so none can begin again alone.
                if not is_out_of_memory(error) or decoder.broadcast is not None:
                    raise
                unfinished = batch.unfinished()
                size = min(batch_size, len(unfinished) or len(waiting))
                if size == 1:
                    if self._is_in_training:  # which can do without its snapshots
                        raise
                    raise TrainError(_too_little(decoder, batch)) from None
            else:
                return
            waiting.extendleft(reversed(unfinished))  # begun again, since answers do not depend on the batch
            first_size = first_size or batch_size
            batch_size = self._batch_size = size // 2
            del batch
            free_gpu()

    def _batch_that_is_right(self, decoder: Decoder, prompt: TokenIds, size: int) -> int:
        """Return `size`, or 1 if an answer depends on those beside it."""
        kind = decoder.model.config.model_type
        try:
            beginning = prompt[: max(1, self._context - MOST_TOKENS)]
            right = next((each for each in sorted({size, 1}, reverse=True) if is_right(decoder, beginning, each)), 0)
        except _LIBRARY_ERRORS as error:
            if isinstance(error, DasdError) or is_out_of_memory(error):
                raise
            dtype, reason = str(decoder.model.dtype).removeprefix("torch."), (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"{decoder.name}: transformers cannot sample from {kind} in {dtype} on this machine ({reason}); use"
                " kind = 'vllm', or try dtype = 'float32'"
            ) from error
        if not right:
            raise ConfigError(
                f"{decoder.name}: what transformers samples from {kind} is not what the model itself computes; use"
                " kind = 'vllm'"
            )
        if right < size:
            note(f"{decoder.name}: answers are sampled one by one: in a batch those of {kind} depend on each other")
        return right

    def _batch_that_fits(self, decoder: Decoder, jobs: Sequence[Job]) -> int:
        """Return the batch size that fits if every answer takes its longest: a halving begins answers again."""
        free = free_gpu_bytes(decoder.model.device)
        # Processes that share the weights need batches of the same size, and may not have the same memory free.
        if free is None or not jobs or decoder.broadcast is not None:
            return self._batch_size
        longest = max(len(job.prompt) + job.limit for job in jobs)
        try:
            shape = shape_of(decoder.model.config.get_text_config().to_dict())
        except KeyError:  # not Llama-like
            return self._batch_size
        fits = answers_that_fit(shape, free, longest, element_bytes=decoder.model.dtype.itemsize)
        if fits >= min(self._batch_size, len(jobs)):
            return self._batch_size
        if fits != self._noted:
            note(f"{decoder.name}: batch {fits}, not {self._batch_size}: {longest:,} tokens each, more may not fit")
            self._noted = fits
        return fits

    def _jobs(self, requests: Sequence[Request], name: str) -> deque[Job]:
        """Return a job for each request, within a window in order of the prompts' lengths."""
        prompts: dict[tuple[int, str], TokenIds] = {}
        for request in requests:  # all before the first token: no error after hours of sampling
            key = id(request.messages), request.prefix
            if key not in prompts:
                prompts[key] = self._prompt_ids(request, name)
        jobs = deque[Job]()
        size = self._batch_size * _WINDOW
        for start in range(0, len(requests), size):
            window = []
            for index in range(start, min(start + size, len(requests))):
                request = requests[index]
                prompt = prompts[id(request.messages), request.prefix]
                limit = min(request.max_tokens, self._context - len(prompt))
                window.append(Job(index, prompt, limit, request.seed))
            jobs.extend(sorted(window, key=lambda job: len(job.prompt)))
        return jobs

    def _prompt_ids(self, request: Request, name: str) -> TokenIds:
        ids = self._chat.prompt_ids(request.messages, request.prefix)
        if len(ids) >= self._context:
            raise DataError(
                f"prompt {request.messages[-1]['content'][:40]!r}: its {len(ids)} tokens exceed the context of"
                f" {name}, {self._context} tokens; shorten or remove the prompt"
            )
        return ids

    def _completion(self, request: Request, answer: Answer) -> Completion:
        ending = "stop" if answer.ended else "length"
        text, token_bytes, finish_reason = self._chat.decode_answer(answer.token_ids.tolist(), ending, request.prefix)
        return Completion(
            position=request.position,
            text=text,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            token_bytes=token_bytes,
            finish_reason=finish_reason,
            prompt_tokens=len(answer.job.prompt),
        )


def _place(decoder: Decoder) -> str:
    return "the GPU" if decoder.model.device.type == "cuda" else "the memory"


def _too_little(decoder: Decoder, batch: Batch) -> str:
    weights = decoder.model.get_memory_footprint() / 1e9
    return (
        f"{decoder.name}: {_place(decoder)} is full with its weights ({weights:.1f} GB) and a single answer, at"
        f" {batch.length:,} tokens; lower max_tokens, set evaluate.four_bit = true or a smaller dtype, or use"
        " kind = 'vllm'"
    )
