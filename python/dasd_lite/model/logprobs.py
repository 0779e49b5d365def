"""Log-probabilities, ranks and training terms of the tokens of packed documents, without full logits.

Input: a model loaded with packed attention, and one flat row of documents. Invariants: documents never see each other;
full logits [T, V] never exist, only those of one chunk of positions; log-probabilities are natural and float32, of the
model at temperature 1.

Shapes: T tokens of the row, N requested positions, C of them in one chunk, V vocabulary, E hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from dasd_lite.errors import MissingExtraError, TrainError
from dasd_lite.method.packing import Lengths
from dasd_lite.model import LOGIT_BYTES, logit_bytes
from dasd_lite.model.architecture import architecture_of
from dasd_lite.model.attention import PACKED, Documents, to_device
from dasd_lite.model.head_loss import head_loss
from dasd_lite.model.offload import offloading

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.utils.checkpoint import checkpoint
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    LanguageModel: TypeAlias = PreTrainedModel | PeftModel
    """As transformers loads it, or with an adapter around it."""

Ids: TypeAlias = npt.NDArray[np.integer[Any]]
Terms: TypeAlias = Callable[[Tensor, Tensor, slice], Tensor]
Result = TypeVar("Result")
_SCORED_BYTES = 128 << 20  # float32 logits of one chunk without a gradient; on a GPU as much again for a copy
_PLAIN_TOKENS = 512  # whose full logits fit on any machine
_CACHED_BYTES = 2 << 20  # on a CPU a chunk is processed in parts that stay in the cache, because it is read six times


def causal_model(model: LanguageModel) -> PreTrainedModel:
    """Return the transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def logits_of(causal: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states [C, E] to logits [C, V]: the output head, and its scale and cap."""
    head, architecture = causal.get_output_embeddings(), architecture_of(causal.config)
    scale, cap = architecture.logit_scale, architecture.logit_softcap

    def logits(hidden_CE: Tensor) -> Tensor:
        if hidden_CE.dtype == torch.float32:  # some models of 16 bits add up their layers in it
            hidden_CE = hidden_CE.to(head.weight.dtype)
        logits_CV: Tensor = head(hidden_CE)
        if scale != 1.0:
            logits_CV = logits_CV * scale
        return logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap

    return logits


def target_positions(loss_mask: npt.NDArray[np.bool_], doc_lengths: Lengths) -> npt.NDArray[np.int64]:
    """Return the positions that are trained on: in the mask, and not the first of their document; int64 [N]."""
    lengths = np.asarray(doc_lengths, dtype=np.int64)
    is_target = np.array(loss_mask, dtype=bool)
    is_target[np.cumsum(lengths) - lengths] = False  # nothing predicts a first token
    return np.flatnonzero(is_target)


def target_scores(
    model: LanguageModel, ids: Ids, doc_lengths: Lengths, chunk_tokens: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Compute the log-probability and rank of each token given those before it in its document, in one pass.

    Args:
        model: From load_model.
        ids: The documents one after another; [T].
        doc_lengths: Their lengths, which add up to T.
        chunk_tokens: Positions whose logits exist at the same time; None: as many as fit in 128 MiB of float32.

    Returns:
        Log-probabilities, NaN for first tokens; float32 [T]. Ranks: 1 + the number of tokens in the vocabulary with a
        strictly higher probability, 0 for first tokens; int64 [T].

    Raises:
        TrainError: The lengths do not add up.

    Source: ranks as in arXiv 2601.14249.
    """
    positions = target_positions(np.ones(len(ids), dtype=bool), doc_lengths)
    logprobs, ranks = np.full(len(ids), np.nan, dtype=np.float32), np.zeros(len(ids), dtype=np.int64)
    causal = causal_model(model)

    def run() -> None:
        hidden_NE, target_ids_N = _predictions(model, ids, positions, doc_lengths)
        logits = logits_of(causal)
        chunk = chunk_tokens or max(1, _SCORED_BYTES // (4 * num_embeddings(causal)))
        logprobs_N = torch.empty(len(positions), dtype=torch.float32, device=hidden_NE.device)
        ranks_N = torch.empty(len(positions), dtype=torch.int64, device=hidden_NE.device)
        for start in range(0, len(positions), chunk):
            at = slice(start, start + chunk)
            _score_chunk(logits(hidden_NE[at]), target_ids_N[at], logprobs_N[at], ranks_N[at])
        logprobs[positions], ranks[positions] = logprobs_N.cpu().numpy(), ranks_N.cpu().numpy()

    with _no_gradients(causal):
        _run(causal, run)
    return logprobs, ranks


def _score_chunk(logits_CV: Tensor, target_ids_C: Tensor, logprobs_C: Tensor, ranks_C: Tensor) -> None:
    """Fill in log-probabilities and ranks; overwrites the logits.

    Ranks are counted in the format of the logits: float32 would have the same order.
    """
    rows = len(logits_CV)
    if logits_CV.device.type == "cpu":
        rows = max(1, _CACHED_BYTES // (4 * logits_CV.shape[1]))
    parts = (x.split(rows) for x in (logits_CV, target_ids_C[:, None], logprobs_C, ranks_C))
    for logits, target_ids, logprobs, ranks in zip(*parts, strict=True):
        target = logits.gather(1, target_ids)
        shifted = logits.to(torch.float32, copy=True)
        top = shifted.amax(-1, keepdim=True)
        log_sum = shifted.sub_(top).exp_().sum(-1).log_()
        logprobs.copy_(target[:, 0]).sub_(top[:, 0]).sub_(log_sum)
        # In place: 7 × faster than a comparison that returns booleans, and their sum 10 ×. Exact up to 2^24 tokens.
        ranks.copy_(logits.gt_(target).sum(-1, dtype=torch.float32)).add_(1)


def target_logprobs(
    model: LanguageModel, ids: Ids, doc_lengths: Lengths, chunk_tokens: int | None = None
) -> npt.NDArray[np.float32]:
    """Return the log-probability of each token given those before it in its document; NaN for first tokens; [T]."""
    return target_scores(model, ids, doc_lengths, chunk_tokens)[0]


def plain_logprobs(model: LanguageModel, ids: Ids) -> npt.NDArray[np.float32]:
    """Compute what target_logprobs should return for one document, by the model's own attention.

    For checks. The logits of a short document are the model's own too; those of a long one would not fit.
    """
    causal = causal_model(model)
    packed = causal.config._attn_implementation
    causal.set_attn_implementation(architecture_of(causal.config).own_attention)
    try:
        with _no_gradients(causal):
            row = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(causal.get_input_embeddings().weight.device)
            if len(row) <= _PLAIN_TOKENS:
                parts = iter([causal(input_ids=row[None], use_cache=False).logits[0, :-1]])
            else:
                hidden = _decoder(causal)(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
                parts = map(logits_of(causal), hidden.split(_PLAIN_TOKENS))
            targets = row[1:].split(_PLAIN_TOKENS)
            pairs = zip(parts, targets, strict=True)
            negative = torch.cat([F.cross_entropy(part.float(), ids_C, reduction="none") for part, ids_C in pairs])
            logprobs = -negative.cpu().numpy()
    finally:
        causal.set_attn_implementation(packed)
    return np.concatenate([np.full(1, np.nan, dtype=np.float32), logprobs])


def num_embeddings(causal: PreTrainedModel) -> int:
    """Return V, the number of logits of a token."""
    return int(causal.get_output_embeddings().weight.shape[0])


def target_terms(
    model: LanguageModel,
    ids: Ids,
    positions: npt.NDArray[np.int64],
    doc_lengths: Lengths,
    terms: Terms,
    *,
    chunk_tokens: int | None = None,
    offload: bool = False,
    weights: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Compute `terms` from the logits of each target token, with their gradient.

    Args:
        model: From load_model.
        ids: The documents one after another; [T].
        positions: Which tokens are targets, never the first of a document; [N].
        doc_lengths: Lengths of the documents, which add up to T.
        terms: Takes logits [C, V], the target ids [C] and which of the N these are; returns [C] or [C, …].
        chunk_tokens: Positions whose logits exist at the same time; None: as many as fit in `logit_bytes` of float32.
            If there are more targets than that, logits are computed again in the backward pass instead of kept.
        offload: Keep what the decoder's backward pass needs in host memory.
        weights: If `terms` is −log p and the loss a weighted sum of them, these weights, up to a factor that all share;
            float32 [N]. Head and loss then take one pass, see head_loss.py. None: any other terms or loss.
        documents: Of `doc_lengths` on the model's device, if they are there already.

    Returns:
        [N] or [N, …].
    """
    causal = causal_model(model)

    def run() -> Tensor:
        with offloading() if offload else contextlib.nullcontext():
            hidden_NE, target_ids_N = _predictions(model, ids, positions, doc_lengths, documents)
        head, logits = causal.get_output_embeddings(), logits_of(causal)
        chunk = chunk_tokens or max(1, _logit_bytes(hidden_NE.device) // (4 * num_embeddings(causal)))
        if weights is not None and type(head) is torch.nn.Linear and len(positions):
            known = architecture_of(causal.config)
            scale, softcap = known.logit_scale, known.logit_softcap
            return head_loss(hidden_NE, head, target_ids_N, weights, chunk, scale=scale, softcap=softcap)

        def of_chunk(hidden_CE: Tensor, start: int) -> Tensor:
            at = slice(start, start + len(hidden_CE))
            return terms(logits(hidden_CE), target_ids_N[at], at)

        if len(positions) <= chunk:
            return of_chunk(hidden_NE, 0)
        parts = enumerate(hidden_NE.split(chunk))
        return torch.cat([checkpoint(of_chunk, part, i * chunk, use_reentrant=False) for i, part in parts])

    return _run(causal, run)


def _logit_bytes(device: torch.device) -> int:
    """Return the bytes of float32 logits that exist at the same time in training."""
    if device.type != "cuda":
        return LOGIT_BYTES
    free, memory = torch.cuda.mem_get_info(device)
    return logit_bytes(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), memory)


def negative_logprobs(logits_CV: Tensor, target_ids_C: Tensor) -> Tensor:
    """Return −log p of the target tokens, which most objectives build on; float32 [C]."""
    return F.cross_entropy(logits_CV.float(), target_ids_C, reduction="none")


def enable_run_inside(causal: PreTrainedModel) -> None:
    """Let `causal(run_inside=work)` call `work` within the model's forward pass.

    FSDP gathers the weights only while the model itself is called, and a loss is more than that.
    """
    forward = causal.forward

    def patched(*args: Any, run_inside: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return run_inside() if run_inside is not None else forward(*args, **kwargs)

    causal.forward = patched
    causal.runs_inside = True


def runs_inside(causal: PreTrainedModel) -> bool:
    """Return whether `enable_run_inside` was called: the weights are sharded, and FSDP casts them."""
    return hasattr(causal, "runs_inside")


def _run(causal: PreTrainedModel, work: Callable[[], Result]) -> Result:
    return causal(run_inside=work) if runs_inside(causal) else work()


def _no_gradients(causal: PreTrainedModel) -> torch.no_grad | torch.inference_mode:
    """Return the context of a forward pass; sharded weights touched in inference mode could not be trained later."""
    return torch.no_grad() if runs_inside(causal) else torch.inference_mode()


def _predictions(
    model: LanguageModel,
    ids: Ids,
    positions: npt.NDArray[np.int64],
    doc_lengths: Lengths,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict `positions` [N, E], and the ids there [N]."""
    causal = causal_model(model)
    if int(np.sum(doc_lengths)) != len(ids):
        raise TrainError(f"documents of {int(np.sum(doc_lengths))} tokens in a row of {len(ids)}")
    device = causal.get_input_embeddings().weight.device
    row = to_device(np.asarray(ids, dtype=np.int64), device)
    target_ids_N = row.index_select(0, to_device(positions, device))
    if causal.config._attn_implementation != PACKED:
        return _apart(causal, row, positions, np.asarray(doc_lengths, dtype=np.int64)), target_ids_N
    documents = documents or Documents.of(doc_lengths, device)
    output = _decoder(causal)(
        input_ids=row[None], position_ids=documents.position_ids, use_cache=False, documents=documents
    )
    at = to_device(positions - 1, device)
    return output.last_hidden_state[0].index_select(0, at), target_ids_N


def _apart(
    causal: PreTrainedModel, row: Tensor, positions: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Tensor:
    """Return the hidden states that predict `positions` [N, E], of documents that cannot share a row.

    Documents of about equal length are a batch, padded at their ends: no token sees later ones, nor does a state.
    """
    starts = np.cumsum(lengths) - lengths
    slots = np.empty(len(row), dtype=np.int64)  # of each token, in the batches one after another
    hidden, num_slots, batches = [], 0, _batches(lengths)
    num_idle = _most_of_all(len(batches)) - len(batches) if runs_inside(causal) else 0
    for batch in batches:
        width = int(lengths[batch].max())
        columns = np.minimum(np.arange(width), lengths[batch][:, None] - 1)  # padding repeats the last token
        ids_BL = row[torch.from_numpy(starts[batch][:, None] + columns).to(row.device)]
        hidden.append(_decoder(causal)(input_ids=ids_BL, use_cache=False).last_hidden_state.flatten(0, 1))
        for i in batch:
            slots[starts[i] : starts[i] + lengths[i]] = num_slots + np.arange(lengths[i])
            num_slots += width
    for _ in range(num_idle):  # all processes gather the weights of a layer together
        idle = _decoder(causal)(input_ids=row[None, :1], use_cache=False).last_hidden_state[0]
        hidden[0] = hidden[0] + 0 * idle  # a part of the loss, or its backward pass would not happen
    return torch.cat(hidden).index_select(0, torch.from_numpy(slots[positions - 1]).to(row.device))


def _most_of_all(number: int) -> int:
    """Return the largest of the numbers of all processes."""
    most = torch.tensor(number)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _batches(lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Group documents of about equal length, the longest first: at most a tenth of a batch is padding."""
    order = np.argsort(-lengths, kind="stable")
    ordered, batches, first = lengths[order], [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or 10 * ordered[i] < 9 * ordered[first]:
            batches.append(order[first:i])
            first = i
    return batches


def _decoder(causal: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its output head; some models of text alone name no such part (Llama 4)."""
    base: torch.nn.Module = causal.base_model if causal.base_model is not causal else causal.get_submodule("model")
    return base
