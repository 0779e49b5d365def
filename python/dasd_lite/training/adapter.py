"""Which parts of a model a LoRA adapter changes, and the adapter itself.

Input: a transformers model and the options of the recipe. Output: the model with an adapter around it. Invariant: what
gets an adapter is decided here, by the same rule for every architecture: experts and router as the recipe says, and
the linear layers of the language model except its output head.

PEFT has a rule of its own for the experts of some architectures, by names that they had in transformers 4. It is
switched off here, because by it the same option freezes the experts of one architecture and trains those of another.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_lite.config.train import Lora
from dasd_lite.console import note
from dasd_lite.errors import ConfigError, MissingExtraError
from dasd_lite.model.architecture import read_config
from dasd_lite.training.requirements import layer_conflicts

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_of_all = re.compile(r"(?P<block>.+)\.experts\.[a-z_]+").fullmatch
"""A weight of all experts of a layer: one tensor, which is how transformers 5 keeps them."""
_of_one = re.compile(r"(?P<block>.+)\.experts\.\d+\..+").fullmatch
"""A layer of a single expert, as code that comes with a model may have it."""
_UNCALLED = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), ("out_proj",)),
}
"""Layers of a model type whose weights are taken without calling the layer, so that an adapter would do nothing."""
_SHARED = "shared"  # in the name of an expert that every token visits


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, by full names in the model.

    Attributes:
        layers: Linear layers that every token visits.
        experts: Weights of experts, or their layers where each has its own.
        routers: Weights of what chooses the experts, or their layers.
        is_mixture: Whether the model has experts at all.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    routers: tuple[str, ...]
    is_mixture: bool

    def describe(self, num_weights: int) -> str:
        """Say in one line what is trained: "LoRA: 192 attention and MLP layers, experts frozen, ...: 12.3M weights"."""
        count = f"{num_weights / 1e9:.2f}B" if num_weights >= 1e9 else f"{num_weights / 1e6:.1f}M"
        parts = [f"LoRA: {len(self.layers)} attention and MLP layers"]
        if self.is_mixture:
            parts += [f"experts {'adapted' if self.experts else 'frozen'}"]
            parts += [f"router {'adapted' if self.routers else 'frozen'}"]
        return f"{', '.join(parts)}: {count if num_weights >= 1e5 else f'{num_weights:,}'} weights"


def find_targets(model: PreTrainedModel, method: Lora) -> Targets:
    """Decide what of a model, which may be on the meta device, gets an adapter.

    Raises:
        ConfigError: The model has no such layers, experts or router.
    """
    kind, linear = model.config.model_type, _linear_layers(model)
    stacked = {name: match["block"] for name, p in model.named_parameters() if p.ndim == 3 and (match := _of_all(name))}
    single = {name: match["block"] for name in linear if (match := _of_one(name))}
    sizes = {block: model.get_parameter(name).shape[0] for name, block in stacked.items()}
    sizes |= {block: len(list(model.get_submodule(f"{block}.experts").children())) for block in single.values()}
    routers = dict.fromkeys(name for block, number in sizes.items() for name in _routers(model, block, number))
    if isinstance(method.target_modules, list):
        names = [name for name, _ in model.named_modules()]
        for fault in layer_conflicts(method.target_modules, names, f"the student ({kind})"):
            raise ConfigError(fault)
        chosen = [name for name in names if _is_named(name, method.target_modules)]
    else:
        chosen = list(linear)
    for part, choice, found in (("experts", method.experts, sizes), ("router", method.router, routers)):
        if choice == "adapted" and not found:
            raise ConfigError(
                f"train.method.{part} = 'adapted': the student ({kind}) has no {part} that can be adapted"
            )
    targets = Targets(
        layers=tuple(name for name in chosen if name not in single and name.removesuffix(".weight") not in routers),
        experts=(*single, *stacked) if method.experts == "adapted" else (),
        routers=tuple(_weight(model, name) for name in routers) if method.router == "adapted" else (),
        is_mixture=bool(sizes),
    )
    if not (targets.layers or targets.experts or targets.routers):
        raise ConfigError(f"train.method: nothing of the student ({kind}) would get an adapter")
    return targets


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the linear layers of the language model, without its output head and without a vision tower."""
    from transformers.pytorch_utils import Conv1D

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and name.rpartition(".")[2] not in _UNCALLED.get(model.config.model_type, ())
        and (not prefix or name.startswith(f"{prefix}."))
    }


def _routers(model: PreTrainedModel, block: str, num_experts: int) -> Iterator[str]:
    """Name the modules of a layer that give each expert a score."""
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        weight = getattr(module, "weight", None)
        inside = name.removeprefix(f"{block}.")
        if inside.startswith("experts") or _SHARED in inside or not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim == 2 and num_experts in (weight.shape[0], getattr(module, "out_features", 0)):
            yield name


def _weight(model: PreTrainedModel, router: str) -> str:
    """Return what PEFT is told to adapt a router: the layer if it is a plain one, else its weight.

    A router that is a linear layer by inheritance returns more than a product.
    """
    module = model.get_submodule(router)
    return router if type(module).__name__ in ("Linear", "Linear4bit") else f"{router}.weight"


def _is_named(name: str, suffixes: Collection[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def add_adapter(model: PreTrainedModel, method: Lora, adapter: Path | None = None) -> PeftModel:
    """Put a new adapter, or the one of the folder `adapter`, around a model."""
    try:
        from peft import PeftModel, get_peft_model
    except ImportError as error:
        raise MissingExtraError("train", "peft") from error
    targets = find_targets(model, method)
    lora = _lora_config(model, method, targets)
    if adapter is not None:
        _check_adapter(adapter, method, lora)
    with _by_our_rule():
        try:
            if adapter is None:
                adapted = get_peft_model(model, lora)
            else:
                adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"train.method: the student ({model.config.model_type}) takes no adapter: {reason}"
            ) from error
    if adapter is None:
        for line in _readers(lora, model, targets):
            note(line)
    note(targets.describe(sum(p.numel() for p in adapted.parameters() if p.requires_grad)))
    return adapted


def _lora_config(model: PreTrainedModel, method: Lora, targets: Targets) -> LoraConfig:
    """Say in PEFT's terms what gets an adapter."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    modules = {name for name, _ in model.named_modules()}
    weights = {name for name, _ in model.named_parameters()}
    chosen = {*targets.layers, *targets.experts, *targets.routers}
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=_shortest(chosen & modules, modules),
        target_parameters=_shortest(chosen & weights, weights, at_least=2) or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in chosen & modules),
        task_type="CAUSAL_LM",
    )


def reader_notes(folder: Path, methods: Iterable[Lora], *, trust_remote_code: bool = False) -> Iterator[str]:
    """Say of a model's adapters which other programs read them, before there are weights.

    Raises:
        ConfigError: The model has no such layers, experts or router, or there is no such model.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the library makes of a config.json
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{folder}: no model can be made of its config.json: {reason}") from error
    for method in methods:
        targets = find_targets(model, method)
        yield from _readers(_lora_config(model, method, targets), model, targets)


def _readers(lora: LoraConfig, model: PreTrainedModel, targets: Targets) -> Iterator[str]:
    """Say what other programs make of an adapter."""
    if targets.experts:
        yield (
            "adapters on experts are read by vLLM only with enable_mixed_moe_lora_format; the merged model is what"
            " others load"
        )
    if targets.routers:
        yield "adapters on routers have not been tried in vLLM; the merged model is what others load"
    if _reads_otherwise(lora, model):
        yield (
            f"PEFT reads adapters of {model.config.model_type} by other names, so no other program should load this"
            " one; give them the merged model"
        )


def _shortest(chosen: set[str], names: set[str], at_least: int = 1) -> list[str]:
    """Return ends of names, of `at_least` parts, that choose the same ones: readers expect q_proj, v_proj."""
    for parts in range(at_least, 4):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
        if {name for name in names if _is_named(name, ends)} == chosen:
            return ends
    return sorted(chosen)


def _reads_otherwise(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Return whether PEFT, left to its own rule, would put the adapter of this configuration elsewhere."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    own = copy.deepcopy(config)
    convert_peft_config_for_transformers(own, model=model, conversions=None)
    before, after = ({*each.target_modules, *(each.target_parameters or ())} for each in (config, own))
    return before != after


@contextlib.contextmanager
def _by_our_rule() -> Iterator[None]:
    """Keep PEFT from choosing other parts of a mixture of experts than it was told."""
    from peft.utils import transformers_weight_conversion as conversion

    def as_told(*_: object, **__: object) -> None:
        return None

    def as_saved(*_: object, adapter_state_dict: object, **__: object) -> object:
        return adapter_state_dict

    kept: dict[str, Callable[..., object]] = {}
    for name, ours in (
        ("convert_peft_config_for_transformers", as_told),
        ("convert_peft_adapter_state_dict_for_transformers", as_saved),
    ):
        kept[name] = getattr(conversion, name)
        setattr(conversion, name, ours)
    try:
        yield
    finally:
        for name, theirs in kept.items():
            setattr(conversion, name, theirs)


def _check_adapter(folder: Path, method: Lora, wanted: LoraConfig) -> None:
    """Refuse to continue with an adapter of another shape."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no adapter to start from ({error}); use train.method.start = 'merged'") from error
    targets = sorted(config.get("target_modules") or ())
    if isinstance(method.target_modules, list) and targets != sorted(set(wanted.target_modules or ())):
        raise ConfigError(
            f"train.method.target_modules = {method.target_modules}, but the adapter to start from has {targets}; make"
            " them equal, or use start = 'merged'"
        )
    adapted = sorted(config.get("target_parameters") or ())
    if adapted != sorted(wanted.target_parameters or ()):
        raise ConfigError(
            f"train.method.experts = {method.experts!r} and router = {method.router!r}, but the adapter to start from"
            f" has {', '.join(adapted) or 'neither'}; make them equal, or use start = 'merged'"
        )
    for key, name, number in (("r", "rank", method.rank), ("lora_alpha", "alpha", method.alpha)):
        if config.get(key) != number:
            raise ConfigError(
                f"train.method.{name} = {number}, but the adapter to start from has {config.get(key)}; make them equal,"
                " or use start = 'merged'"
            )
