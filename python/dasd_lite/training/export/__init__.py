"""The result of training: a model folder that transformers and vLLM load, and the adapter.

Input: a trained model, and the folder of the model that it started from. Invariants: a folder appears complete or not
at all; its weights are what was trained, in the number formats of the source; a saved model that computes otherwise
than the trained one is set aside and is no success. The same path is tried on the untouched model before the first
step, so that what cannot be saved is known before it costs anything.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dasd_lite.config.models import Dtype
from dasd_lite.config.train import Full, Lora
from dasd_lite.console import note
from dasd_lite.data.files import sync_path
from dasd_lite.data.run_folder import export_trial
from dasd_lite.errors import DasdError, MissingExtraError, TrainError
from dasd_lite.model.load import load_model, quiet
from dasd_lite.model.logprobs import causal_model, runs_inside, target_logprobs
from dasd_lite.model.memory import is_out_of_memory
from dasd_lite.model.row import Row
from dasd_lite.training.checkpoint import saving
from dasd_lite.training.export.files import describe_adapter, write_files
from dasd_lite.training.export.weights import SourceWeights, WeightFiles, empty_model, whole_weights, without_change
from dasd_lite.training.ranks import Ranks

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from dasd_lite.model.logprobs import LanguageModel

_EXACT, _ROUNDED = 1e-3, 5e-2  # nats a token: computed in float32; in 16 bits
_MERGED = 0.3  # the same, where an adapter is merged and the sum rounded to 16 bits
_FREE_BYTES = 2 << 30  # of a GPU, beside the weights of the model that is read back
_QUANTIZED = 0.6  # mean |W - its 4 bits| / mean |W|: 0.09 for NF4, 0.34 in a narrow layer; 1.4 for a mixed-up weight


@dataclass(frozen=True)
class Gap:
    """How far the log-probabilities of the saved model are from those of the trained one, in nats a token.

    Attributes:
        mean: Over all tokens, of the absolute difference.
        maximum: The largest.
    """

    mean: float
    maximum: float


# --- before the first step ----------------------------------------------------------------------------


def try_export(
    model: LanguageModel,
    method: Full | Lora,
    source: Path,
    out: Path,
    *,
    ranks: Ranks | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Save the untouched model into a folder beside `out`, read it back, compare, and remove it.

    All processes have to call it. The disk needs the size of the model once more while it lasts. An adapter, which may
    be that of an earlier run, is merged with the factor 0, so that every weight has to be the base's.

    Args:
        model: Before the first step.
        method: How it will be trained.
        source: Folder of the model that training starts from.
        out: Folder of the training run; nothing is written there.
        ranks: The processes; only the first one writes.
        trust_remote_code: Run code that comes with the model.

    Raises:
        TrainError: The model cannot be saved, or is another one when it is read back.
    """
    ranks = ranks or Ranks()
    folder = export_trial(out)
    try:
        with without_change(model):
            _save(model, method, source, folder, ranks, frozenset(), trust_remote_code)
        dtype = causal_model(model).get_input_embeddings().weight.dtype
        ranks.from_first(lambda: _check_trial(source, folder / "model", method, dtype, trust_remote_code))
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _check_trial(source: Path, folder: Path, method: Full | Lora, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Compare a saved model with the source of the untouched one, whose weights are in `dtype`."""
    from transformers import AutoModelForCausalLM

    with _reported(source), quiet():
        _, report = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": "meta"},  # names and shapes
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
        before, after = SourceWeights(source), SourceWeights(folder)
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = {str(each) for each in report[fault]} - (before.names if fault == "unexpected_keys" else set())
            if names:
                what = fault.replace("_", " ")
                raise TrainError(f"{source}: saved and read back, the student has {what}: {min(names)}")
        four_bit = isinstance(method, Lora) and method.kind == "qlora"
        for name in sorted(after.names & before.names):
            one, other = before.read(name), after.read(name)
            if one.shape != other.shape or not _is_same(one, other, dtype, four_bit):
                raise TrainError(f"{source}: saved and read back, the student's weight {name} is not what it was")


def _is_same(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, four_bit: bool) -> bool:
    """Compare a weight with itself after it was loaded in `dtype`, perhaps in 4 bits, and saved."""
    if torch.equal(one, other) or torch.equal(one.to(dtype).to(one.dtype), other):
        return True
    difference, scale = float((one.float() - other.float()).abs().mean()), float(one.float().abs().mean())
    return four_bit and one.ndim == 2 and difference <= _QUANTIZED * scale


# --- after the last step ------------------------------------------------------------------------------


def export(
    model: LanguageModel,
    method: Full | Lora,
    source: Path,
    out: Path,
    comparison_row: Row,
    *,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
    end_ids: Set[int] = frozenset(),
    trust_remote_code: bool = False,
    context: int | None = None,
) -> Gap:
    """Save a trained model as `out`/model, and an adapter as `out`/adapter; all processes have to call it.

    The model is used up: on a GPU its memory is needed for the saved one, which is read back and compared.

    Args:
        model: As it was trained; not sharded, it has no weights afterwards.
        method: How.
        source: Folder of the model that training started from.
        out: Folder to write into.
        comparison_row: Row on which the saved model is compared with the trained one.
        ranks: The processes; only the first one saves.
        dtype: Format that the trained model computes in; None: that of its weights.
        end_ids: Tokens at which the saved model should stop too.
        trust_remote_code: Run code that comes with the model.
        context: Longest sequence that the model is served with; see load_model.

    Returns:
        The gap of merging and rounding.

    Raises:
        TrainError: The model cannot be saved, or the saved one computes otherwise; it is kept as `out`/model.rejected.
    """
    ranks = ranks or Ranks()
    causal = causal_model(model)
    device = causal.get_input_embeddings().weight.device
    model.eval()
    casts = dtype is not None and dtype != torch.float32 and not runs_inside(causal)
    orders = [comparison_row, _reversed(comparison_row)]
    autocast = torch.autocast(device.type, dtype if casts else torch.bfloat16, enabled=casts)
    with autocast:
        before, again = (_logprobs(model, row) for row in orders)
    temporary = out / "export.tmp"
    _save(model, method, source, temporary, ranks, end_ids, trust_remote_code)
    expected = before
    if isinstance(method, Full):  # what the number format of the source loses is no fault of the saved model
        _round(model, SourceWeights(source).main_dtype())
        with autocast:
            expected = _logprobs(model, comparison_row)
    if not runs_inside(causal):
        for p in model.parameters():
            p.data = p.data.new_empty(0)
        gc.collect()

    def publish() -> Gap:
        with _reported(source), saving(out):
            stored = SourceWeights(source).main_dtype()
            noise = float(np.nanmean(np.abs(before - _reversed_back(again, comparison_row))))
            computed = dtype or stored
            after = _read_back(
                temporary / "model", comparison_row, device, computed, stored, trust_remote_code, context
            )
            gap = Gap(float(np.nanmean(np.abs(after - before))), float(np.nanmax(np.abs(after - before))))
            # 4 × what the order of the same documents makes to the trained model: on a GPU in 16 bits up to 0.03 for a
            # healthy model, and its maximum over a few hundred tokens 0.1 to 0.5.
            allowed = max(_rounding(method, computed, stored), 4 * noise)
            off = float(np.nanmean(np.abs(after - expected)))
            ending = "" if off <= allowed else ".rejected"
            for path in sorted(temporary.iterdir()):
                _put(path, out / f"{path.name}{ending}")
            temporary.rmdir()
        if ending:
            raise TrainError(
                f"{out}: the saved model's log-probabilities are off by {off:.3g} nats a token from those of the"
                f" trained one (allowed: {allowed:.2g}), so it is not what was trained. It is kept as model.rejected,"
                " and the last checkpoint too, from which the same command exports again; please report it with the"
                " student's name"
            )
        if gap.mean > _ROUNDED:
            note(
                f"saving in {str(stored).removeprefix('torch.')}, the student's number format, moves log-probabilities"
                f" by {gap.mean:.2g} nats a token: small changes of weights are rounded away. More steps or a higher"
                " train.learning_rate survive it, and so does a student saved in float32"
            )
        for name in ("model.rejected", "adapter.rejected"):
            shutil.rmtree(out / name, ignore_errors=True)
        return gap

    return ranks.from_first(publish)


def _round(model: LanguageModel, stored: torch.dtype) -> None:
    """Round all weights to a number format, in place."""
    for p in model.parameters():
        p.data.copy_(p.data.to(stored))


def _rounding(method: Full | Lora, computed: torch.dtype, stored: torch.dtype) -> float:
    """Return how far a healthy saved model may be from the trained one, in nats a token on average."""
    if isinstance(method, Lora) and stored != torch.float32:
        return _MERGED
    return _EXACT if computed == torch.float32 else _ROUNDED


def _read_back(
    folder: Path,
    row: Row,
    device: torch.device,
    computed: torch.dtype,
    stored: torch.dtype,
    trust_remote_code: bool,
    context: int | None,
) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of a saved model, computed as in training.

    On the device that trained, if it has room, else on the CPU.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    weights = torch.float32 if computed == torch.float32 else stored  # computed in 16 bits, they may be out of range
    fits = False
    if device.type == "cuda":
        torch.cuda.empty_cache()
        fits = torch.cuda.mem_get_info(device)[0] > size * weights.itemsize / stored.itemsize + _FREE_BYTES
    model = load_model(
        folder,
        dtype=cast(Dtype, str(weights).removeprefix("torch.")),
        device=str(device) if fits else "cpu",
        trust_remote_code=trust_remote_code,
        context=context,
    )
    with torch.autocast(model.device.type, computed, enabled=weights != computed):
        return _logprobs(model, row)


def _logprobs(model: LanguageModel, row: Row) -> npt.NDArray[np.float32]:
    return target_logprobs(model, row.ids, row.doc_lengths)


def _reversed(row: Row) -> Row:
    """Return the same documents in the opposite order."""
    documents = np.split(row.ids, np.cumsum(row.doc_lengths)[:-1])
    return Row(np.concatenate(documents[::-1]), row.loss_mask, np.asarray(row.doc_lengths)[::-1].copy(), ())


def _reversed_back(logprobs: npt.NDArray[np.float32], row: Row) -> npt.NDArray[np.float32]:
    documents = np.split(logprobs, np.cumsum(np.asarray(row.doc_lengths)[::-1])[:-1])
    return np.concatenate(documents[::-1])


# --- writing ------------------------------------------------------------------------------------------


def _save(
    model: LanguageModel,
    method: Full | Lora,
    source: Path,
    folder: Path,
    ranks: Ranks,
    end_ids: Set[int],
    trust_remote_code: bool,
) -> None:
    """Write `folder`/model and perhaps `folder`/adapter; all processes have to call it."""
    files: WeightFiles | None = None

    def prepare() -> WeightFiles:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "model").mkdir(parents=True)
        if isinstance(method, Lora):
            model.save_pretrained(folder / "adapter")
            describe_adapter(folder / "adapter", source)
        causal = causal_model(model)
        skeleton, weights = empty_model(causal, source, trust_remote_code=trust_remote_code), SourceWeights(source)
        write_files(
            skeleton,
            source,
            folder / "model",
            weights.main_dtype(),
            is_tied=causal.get_output_embeddings().weight is causal.get_input_embeddings().weight,
            end_ids=end_ids,
            trust_remote_code=trust_remote_code,
        )
        return WeightFiles(model, skeleton, weights, folder / "model")

    # An error of the first process must not keep it from gathering weights with the others.
    failure: BaseException | None = None

    def attempt(work: Callable[[], object]) -> object:
        nonlocal failure
        if not ranks.is_first or failure is not None:
            return None
        try:
            with _reported(source), saving(folder.parent), quiet():
                return work()
        except DasdError as error:
            failure = error
            return None

    files = cast("WeightFiles | None", attempt(prepare))
    for name, whole in whole_weights(model):
        if files is not None:
            attempt(lambda files=files, name=name, whole=whole: files.add(name, whole))  # type: ignore[misc]
    if files is not None:
        attempt(files.finish)

    def report() -> None:
        if failure is not None:
            raise failure

    ranks.from_first(report)


@contextmanager
def _reported(source: Path) -> Iterator[None]:
    """Turn any exception of a library into one line."""
    try:
        yield
    except DasdError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise  # under any of its names; the run says what to change
        reason = (str(error).splitlines() or [""])[0]
        raise TrainError(f"{source}: the student cannot be saved: {type(error).__name__}: {reason}") from error


def _put(temporary: Path, folder: Path) -> None:
    """Rename a finished temporary folder, in place of an earlier one."""
    mode = next(temporary.glob("*config.json")).stat().st_mode
    for path in temporary.iterdir():
        if path.is_file():
            path.chmod(mode)  # safetensors makes its files readable by their owner only
        sync_path(path)
    sync_path(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_path(folder.parent)
