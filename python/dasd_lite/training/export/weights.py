"""The weights of a trained model, written one tensor at a time in the form of the model that training started from.

Input: the model where it was trained: whole, in shards, in 4 bits, with or without an adapter. Output: safetensors
files with the names, the shapes and the number formats of the source's. Invariants: a final weight exists by itself
only, so the host needs less than 1 GB over what is there anyway; a 4-bit weight is dequantized and its adapter added in
float32, from exactly the codes that were trained.

W is a weight, A and B are its adapter's: W + scale · B A.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from dasd_lite.data.hub import read_json
from dasd_lite.errors import MissingExtraError, TrainError
from dasd_lite.model.architecture import read_config
from dasd_lite.model.logprobs import causal_model
from dasd_lite.model.memory import is_out_of_memory
from dasd_lite.training.ranks import full_tensor

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dasd_lite.model.logprobs import LanguageModel

_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors names number formats."""
_PIECE = 1 << 24  # numbers that are converted and copied to the host at once


# --- the source ---------------------------------------------------------------------------------------


class SourceWeights:
    """The tensors in the files of a model folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the files that transformers would load: a whole one before parts, safetensors before others."""
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for name in ("model.safetensors", "pytorch_model.bin"):
            parts = read_json(folder / f"{name}.index.json").get("weight_map", {}).values()
            files = [name] if (folder / name).exists() else sorted({*parts})
            for path in (folder / file for file in files if (folder / file).exists()):
                with _readable(path):
                    self._open[path] = (
                        safe_open(path, framework="pt")
                        if path.suffix == ".safetensors"
                        else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                    )
                self._files |= dict.fromkeys(self._open[path].keys(), path)
            if self._files:
                return

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            TrainError: It cannot be read.
        """
        path = self._files[name]
        file = self._open[path]
        with _readable(path, name):
            tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the number format of a tensor; None if there is none of this name.

        Raises:
            TrainError: It is one in which no model is trained or saved, such as 8-bit floats.
        """
        if name not in self._files:
            return None
        path = self._files[name]
        file = self._open[path]
        stored = file[name].dtype if isinstance(file, dict) else file.get_slice(name).get_dtype()
        for dtype, spelled in _FORMATS.items():
            if stored in (dtype, spelled):
                return dtype
        raise TrainError(
            f"{path}: the tensor {name} has the number format {str(stored).removeprefix('torch.')}, which cannot be"
            " trained or saved; use a student whose weights have 16 or 32 bits"
        )

    def main_dtype(self) -> torch.dtype:
        """Return the number format of most tensors: that of the model."""
        dtypes = Counter(dtype for name in self._files if (dtype := self.dtype(name)) and dtype.is_floating_point)
        return dtypes.most_common(1)[0][0] if dtypes else torch.float32


@contextmanager
def _readable(path: Path, tensor: str = "") -> Iterator[None]:
    """Turn what goes wrong while a file or one of its tensors is read into one line."""
    try:
        yield
    except (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        what = f"the tensor {tensor}" if tensor else "it"
        raise TrainError(f"{path}: {what} cannot be read: {type(error).__name__}: {reason}") from error


# --- the trained model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """A weight of the trained model, and what of an adapter belongs to it."""

    weight: Tensor
    adapter: Any = None  # PEFT's layer
    is_turned: bool = False
    """Whether it is stored the other way round: bitsandbytes turns the weight of a Conv1D."""

    def final(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight to save; in `dtype` if there is an adapter to add, else as it was trained."""
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            whole = dequantize_4bit(whole, state)
        if self.adapter is not None:
            whole = _with_adapter(whole, self.adapter, dtype)
        return whole.t() if self.is_turned else whole


def _with_adapter(weight: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
    """Return W + scale · B A in `dtype`; of experts, [experts, …], one after another."""
    a, b = (getattr(layer, name)["default"].weight.detach().float() for name in ("lora_A", "lora_B"))
    scale = layer.scaling["default"]
    if weight.ndim == 2:
        change = b @ a
        change = change.t() if layer.fan_in_fan_out else change
        return torch.add(weight.float(), change, alpha=scale).to(dtype)
    number = weight.shape[0]
    a = a.reshape(number, -1, a.shape[-1])  # [experts, rank, in]
    b = b.reshape(b.shape[0], -1, number).permute(2, 0, 1)  # [experts, out, rank]
    merged = torch.empty_like(weight, dtype=dtype)
    for i in range(number):
        change = b[i] @ a[i]
        change = change if layer._did_swap_in_out_features else change.t()
        merged[i] = torch.add(weight[i].float(), change, alpha=scale)
    return merged


@contextmanager
def without_change(model: LanguageModel) -> Iterator[None]:
    """Let the adapters of a model add nothing, so that every merged weight is that of the base."""
    scalings = [module.scaling for module in causal_model(model).modules() if hasattr(module, "lora_A")]
    kept = [dict(scaling) for scaling in scalings]
    try:
        for scaling in scalings:
            scaling.update(dict.fromkeys(scaling, 0.0))
        yield
    finally:
        for scaling, values in zip(scalings, kept, strict=True):
            scaling.update(values)


def _trained_weights(model: LanguageModel, skeleton: PreTrainedModel) -> dict[str, _Trained]:
    """Return every weight and stored buffer by the name that it has without an adapter, a tied one once."""
    from transformers.pytorch_utils import Conv1D

    causal = causal_model(model)
    turned = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    adapters: dict[str, Any] = {}
    for name, module in causal.named_modules():
        if hasattr(module, "lora_A"):
            adapters[f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return {
        name: _Trained(weight, adapters.get(name), hasattr(weight, "quant_state") and name in turned)
        for name, weight in _plain_weights(causal).items()
    }


def _plain_weights(causal: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights and buffers that belong into a file, by their names without an adapter; a tied one once."""
    found: dict[str, Tensor] = {_plain(name): p for name, p in causal.named_parameters() if ".lora_" not in name}
    for path, module in causal.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[_plain(f"{path}.{name}")] = buffer
    return found


def _plain(name: str) -> str:
    """Return the name without the levels that adapters put in between."""
    return name.replace(".base_layer", "")


def empty_model(causal: PreTrainedModel, source: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model of a folder without weights, as it was before training, to ask it for names and shapes."""
    from transformers import AutoModelForCausalLM

    config = read_config(source, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    conversions = getattr(causal, "_weight_conversions", None)
    if conversions is not None:  # how the names and shapes in the files became those of the model
        empty._weight_conversions = conversions
    return empty


def whole_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Return the weights of a model one after another, gathered if they are sharded; all processes have to call it."""
    for name, weight in _plain_weights(causal_model(model)).items():
        yield name, full_tensor(weight.detach())


# --- the files ----------------------------------------------------------------------------------------


class WeightFiles:
    """The files of the final weights, written tensor by tensor.

    Tensors of the source that are no part of what was loaded, such as a vision tower beside a language model, or layers
    for speculative decoding, are copied.

    Args:
        model: As it was trained.
        skeleton: From `empty_model`.
        source: The tensors of the model that training started from.
        folder: Where to write.

    Raises:
        TrainError: The weights are not those of the source.
    """

    def __init__(self, model: LanguageModel, skeleton: PreTrainedModel, source: SourceWeights, folder: Path) -> None:
        """Lay out the files from names, shapes and formats alone, before the first weight."""
        from huggingface_hub import split_torch_state_dict_into_shards

        self._skeleton = skeleton
        self._source, self._trained = source, _trained_weights(model, skeleton)
        self._check_names()
        main = source.main_dtype()
        self._groups = self._grouped()
        self._pending: dict[str, Tensor] = {}
        layout: dict[str, Tensor] = {}
        self._formats: dict[str, torch.dtype] = {}
        """Number format of each weight while it is merged."""
        expected = skeleton.state_dict()
        for group in self._groups:
            saved = self._converted({name: expected[name] for name in group})
            for name, tensor in saved.items():
                own = main if tensor.dtype.is_floating_point else tensor.dtype
                layout[name] = torch.empty(tensor.shape, dtype=source.dtype(name) or own, device="meta")
            self._formats |= dict.fromkeys(group, next((layout[name].dtype for name in saved), main))
        self._copied = self._others(source, layout)
        layout |= {name: torch.empty_like(source.read(name), device="meta") for name in self._copied}
        split = split_torch_state_dict_into_shards(layout)
        self._places: dict[str, tuple[Path, int, Tensor]] = {}
        """File, first byte and form of each tensor."""
        for file, names in split.filename_to_tensors.items():
            self._create(folder / file, {name: layout[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _others(self, source: SourceWeights, layout: dict[str, Tensor]) -> list[str]:
        """Return the tensors of the source that belong to nothing that was loaded."""
        if layout.keys() - source.names:
            return []  # under other names: what is left cannot be told from what was loaded
        loaded = self._converted(dict(self._skeleton.state_dict()))
        return sorted(source.names - loaded.keys() - layout.keys())

    def _check_names(self) -> None:
        """Refuse to save what is not the whole model."""
        expected = self._skeleton.state_dict().keys()
        tied = set(getattr(self._skeleton, "all_tied_weights_keys", None) or ())
        if wrong := (self._trained.keys() - expected) | (expected - self._trained.keys() - tied):
            raise TrainError(f"the weight {min(wrong)} is not among those trained")

    def _grouped(self) -> list[list[str]]:
        """Return the weights that become tensors of the file together: one, or those of a layer."""
        conversions = getattr(self._skeleton, "_weight_conversions", None) or ()
        if all(len(each.target_patterns) == 1 for each in conversions):
            return [[name] for name in self._trained]
        groups: dict[str, list[str]] = {}
        for name in self._trained:
            layer = re.match(r".+?\.\d+\.", name)
            groups.setdefault(layer[0] if layer else name, []).append(name)
        return list(groups.values())

    def _converted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names and in the shapes of the source's files."""
        from transformers.core_model_loading import revert_weight_conversion

        converted: dict[str, Tensor] = revert_weight_conversion(self._skeleton, weights)
        return converted

    def _create(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write the header of a file of safetensors, and make the file as long as it will be."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in sorted(tensors.items(), key=lambda each: (-each[1].element_size(), each[0])):
            end = start + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            self._places[name] = (path, start, tensor)
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + start)
        for name in tensors:
            _, offset, tensor = self._places[name]
            self._places[name] = (path, 8 + len(text) + offset, tensor)

    def add(self, name: str, whole: Tensor) -> None:
        """Write what a weight becomes, as soon as everything that it is saved with is there.

        Args:
            name: Of the weight, in the order of `whole_weights`.
            whole: The weight as it was trained, without its adapter.
        """
        self._pending[name] = self._trained[name].final(whole, self._formats[name])
        if self._pending.keys() >= set(self._groups[0]):
            group = {name: self._pending.pop(name) for name in self._groups.pop(0)}
            for saved, tensor in self._converted(group).items():
                self._write(saved, tensor)

    def finish(self) -> None:
        """Write what is copied.

        Raises:
            TrainError: A weight was not added, so that the file has zeros in its place.
        """
        if self._groups:
            name = next(name for name in self._groups[0] if name not in self._pending)
            raise TrainError(f"the weight {name} was not saved, nor any after it")
        for name in self._copied:
            self._write(name, self._source.read(name))

    def _write(self, name: str, tensor: Tensor) -> None:
        path, offset, form = self._places[name]
        if tensor.shape != form.shape:
            raise TrainError(f"{name} would be saved as {list(tensor.shape)}, not {list(form.shape)}")
        flat = tensor.reshape(-1)
        with path.open("r+b") as file:
            file.seek(offset)
            for piece in flat.split(_PIECE):
                file.write(piece.to("cpu", form.dtype).view(torch.uint8).numpy().data)
