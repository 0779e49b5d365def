"""What an architecture allows: documents in one row, its own attention, and what it does to its logits.

Input: a model's configuration. Output: an `Architecture`. Loads no weights and imports no torch by itself. Invariant:
whatever cannot be computed rightly has a `refusal`, before anything is spent.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PACKABLE = {"full_attention", "sliding_attention"}
"""Layers in which a document of a row can be kept from seeing the others by its attention alone."""
_OWN_ATTENTION = {"doge", "nemotron"}
"""Model types whose layers do not pass on to their attention what it needs to know, although they claim to."""
_BLOCKS = {"attention", "full_attention"}
"""Layers of `layers_block_type`, the name of older hybrids for `layer_types`, that are attention."""
_NO_FOUR_BIT = {
    "falcon": "falcon has linear layers of its own kind, which bitsandbytes leaves in 16 bits",
    "mamba": "mamba multiplies by its weights directly, so they cannot be in 4 bits",
}
_LOGIT_SCALES = (
    ("granite", "logits_scaling", True),
    ("minicpm3", "logits_scaling", True),
    ("hyperclovax", "logits_scaling", False),
    ("cohere", "logit_scale", False),
    ("falcon_h1", "lm_head_multiplier", False),
)
"""Beginning of a model type, its option, and whether logits are divided by it."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CACHES = ("past_key_values", "cache_params")
"""What the forward of a model calls the cache that it takes."""
_STATES_IN_MODULES = {"recurrent_gemma"}
"""Model types that keep their states in their layers, where rows of a batch can neither be padded nor taken out."""
_SINKS = {"gpt_oss", "mimo_v2_flash", "granite_swa", "granitemoe_swa"}
"""Model types whose attention has a learned sink in every head."""


@dataclass(frozen=True)
class Architecture:
    """What scoring, training and sampling need to know about a model.

    Attributes:
        kind: Its model_type.
        apart: Why documents cannot share a row, so each one is computed by itself; None if they can share one.
        refusal: Why it can be neither scored nor trained; None if it can.
        unsampled: Why answers cannot be sampled from it in this process; None if they can.
        no_four_bit: Why its weights cannot be in 4 bits; None if they can.
        batches: Whether answers of different lengths can be sampled together.
        own_attention: The attention of transformers that computes it rightly: "sdpa", or "eager" where only that does.
        unusual_attention: What its attention adds that only "eager" computes; None if it is usual.
        logit_scale: Factor between the output head and the logits.
        logit_softcap: C of C · tanh(logits / C), after the factor; None if there is none.
        original_positions: Positions up to which a longrope has its short factors; None without longrope.
        has_experts: Whether a router chooses which weights a token meets.
        horizon: Positions beyond which attention or rope change their behavior: the largest window, or
            `original_positions`; 0 if there is none.
    """

    kind: str
    apart: str | None = None
    refusal: str | None = None
    unsampled: str | None = None
    no_four_bit: str | None = None
    batches: bool = True
    own_attention: str = "sdpa"
    unusual_attention: str | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    original_positions: int | None = None
    has_experts: bool = False
    horizon: int = 0

    @property
    def packs(self) -> bool:
        """Whether documents may share a row."""
        return self.apart is None


def read_architecture(folder: Path, *, trust_remote_code: bool = False) -> Architecture:
    """Read the architecture of a model folder; raises ConfigError if it holds no causal language model."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if _class_of(config) is None and not brings_code:
        raise ConfigError(
            f"{folder}: {config.model_type} is no causal language model that this version of transformers loads"
        )
    return architecture_of(config)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model folder's configuration as transformers does."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtraError("train", "transformers") from error
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever the library makes of a config.json
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder}: cannot be loaded as a language model: {reason}") from error


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Say what the architecture of a configuration allows."""
    text = config.get_text_config(decoder=True)
    kind, model_class = text.model_type, _class_of(config)
    unusual = _unusual_attention(text)
    has_sdpa = getattr(model_class, "_supports_sdpa", True) and unusual is None
    ropes = _ropes(text)
    rope_fault = _rope_fault(text, ropes)
    original = _original_positions(text, ropes)
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return Architecture(
        kind=kind,
        apart=_apart(text, model_class),
        refusal=rope_fault or _unusual_fault(kind, unusual) or _rescaling_fault(text),
        unsampled=rope_fault or _cache_fault(config, kind, model_class),
        no_four_bit=_NO_FOUR_BIT.get(kind),
        batches=kind not in _STATES_IN_MODULES,
        own_attention="sdpa" if has_sdpa else "eager",
        unusual_attention=unusual,
        logit_scale=_logit_scale(text),
        logit_softcap=next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None)) is not None), None),
        original_positions=original,
        has_experts=any(getattr(text, name, None) for name in _EXPERTS),
        horizon=max((int(each) for each in (original, *windows) if isinstance(each, int)), default=0),
    )


def _class_of(config: PreTrainedConfig) -> type | None:
    """Return the class that transformers loads; None for code that comes with the model."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("train", "transformers") from error
    found: type | None = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return found


def _unusual_attention(text: PreTrainedConfig) -> str | None:
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return f"capped attention scores (attn_logit_softcapping = {text.attn_logit_softcapping:g})"
    if text.model_type in _SINKS:
        return "attention sinks"
    return None


def _apart(text: PreTrainedConfig, model_class: type | None) -> str | None:
    kinds = sorted(
        (set(getattr(text, "layer_types", None) or ()) - _PACKABLE)
        | (set(getattr(text, "layers_block_type", None) or ()) - _BLOCKS)
    )
    if kinds:
        return f"it has layers of type {', '.join(kinds)}"
    is_open = model_class is None or getattr(model_class, "_supports_attention_backend", False)
    if not is_open or text.model_type in _OWN_ATTENTION:
        return "its attention cannot be told where documents begin"
    return None


def cache_argument(model_class: type) -> str | None:
    """Return the name under which the forward of a model takes a cache; None if it takes none."""
    return next((name for name in _CACHES if name in _parameters(model_class)), None)


def _parameters(model_class: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]


def _cache_fault(config: PreTrainedConfig, kind: str, model_class: type | None) -> str | None:
    """Say why a model cannot continue from our cache; code that comes with a model is seen when it is loaded."""
    from transformers import AutoModel, DynamicCache

    base = AutoModel._model_mapping.get(type(config), None)
    for each in (model_class, base):
        if not isinstance(each, type):
            continue
        name = cache_argument(each)
        if name is None:
            return f"{kind} takes no cache by name, so every token would be drawn without its context"
        annotation = _parameters(each)[name].annotation
        caches = [
            one
            for one in typing.get_args(annotation) or (annotation,)
            if isinstance(one, type)
            and typing.get_origin(one) is None
            and one not in (type(None), inspect.Parameter.empty)
        ]
        if caches and not any(issubclass(DynamicCache, one) for one in caches):
            return f"{kind} has a cache of its own ({caches[0].__name__})"
    return None


def _unusual_fault(kind: str, unusual: str | None) -> str | None:
    if unusual is None:
        return None
    return f"{kind} has {unusual}, which the attention for scoring and training does not compute"


def _rescaling_fault(text: PreTrainedConfig) -> str | None:
    if text.model_type == "rwkv" and text.rescale_every:
        return (
            f"rwkv divides its weights in place wherever it is not trained (rescale_every = {text.rescale_every}); set"
            " rescale_every = 0 in its config.json"
        )
    return None


def _rope_fault(text: PreTrainedConfig, ropes: list[dict[str, Any]]) -> str | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, kinds = text.model_type, [str(rope.get("rope_type") or "default") for rope in ropes]
    if unknown := sorted(set(kinds) - {"default", *ROPE_INIT_FUNCTIONS}):
        return f"{kind} has rope_type = {unknown[0]!r}, which transformers does not know"
    if "dynamic" in kinds:
        return (
            f"{kind} has rope_type = 'dynamic', whose frequencies depend on the longest sequence of a batch; set"
            " rope_type = 'yarn' or 'linear' in its config.json"
        )
    if "longrope" in kinds and (kind == "phimoe" or text.rope_parameters not in ropes):  # one for each type of layer
        return f"{kind} computes its longrope by the longest sequence of a batch"
    return None


def _ropes(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of each rotary embedding; some models have one for each layer type."""
    found = getattr(text, "rope_parameters", None) or {}
    ropes = [each for each in found.values() if isinstance(each, dict) and "rope_type" in each]
    return ropes or [found]


def _original_positions(text: PreTrainedConfig, ropes: list[dict[str, Any]]) -> int | None:
    longest = [rope for rope in ropes if rope.get("rope_type") == "longrope"]
    if not longest:
        return None
    found = longest[0].get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", 0)
    return int(found or text.max_position_embeddings)


def _logit_scale(text: PreTrainedConfig) -> float:
    """Return what logits are multiplied by: a model type's own name says whether it multiplies or divides."""
    for start, name, divides in _LOGIT_SCALES:
        if text.model_type.startswith(start):
            factor = float(getattr(text, name, None) or 1.0)
            return 1.0 / factor if divides else factor
    return 1.0
