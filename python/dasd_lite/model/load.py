"""Load a causal language model, and read its limits without its weights.

Input: a model folder on disk. Output: a transformers model with packed attention. Invariant: no weight is left at a
random value.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_lite.config.models import Dtype
from dasd_lite.data.hub import context_of_config
from dasd_lite.errors import ConfigError, MissingExtraError
from dasd_lite.model.architecture import Architecture, architecture_of, read_config
from dasd_lite.model.attention import PACKED, register
from dasd_lite.model.memory import is_out_of_memory

try:
    import torch
    from safetensors import SafetensorError
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

# What transformers and the packages behind it raise for a folder that they cannot load.
_LIBRARY_ERRORS = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError, SafetensorError)

# It asks for a package of faster CPU kernels, even for LoRA, where nothing is in 4 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pick_device(device: str = "auto") -> torch.device:
    """Return the torch device; "auto" is the GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def bfloat16_conflict(device: torch.device | str | None = None) -> str | None:
    """Return why this GPU (None: the current one) cannot compute in bfloat16; None if it can."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return f"dtype = 'bfloat16': {torch.cuda.get_device_name(device)} does not support it; use 'auto' or 'float16'"


def pick_dtype(dtype: Dtype, device: torch.device | str) -> torch.dtype:
    """Return the number format that `dtype` stands for on this device.

    Raises:
        ConfigError: The GPU cannot compute in it.
    """
    no_bfloat16 = bfloat16_conflict(device) if torch.device(device).type == "cuda" else None
    if dtype == "bfloat16" and no_bfloat16:
        raise ConfigError(no_bfloat16)
    if dtype != "auto":
        return _dtype_named(dtype)
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.float16 if no_bfloat16 else torch.bfloat16


def load_model(
    folder: Path,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attention: str = PACKED,
    four_bit: bool = False,
    context: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a local folder, in eval mode.

    Args:
        folder: The model's.
        dtype: Format of the weights.
        device: Where to load it.
        trust_remote_code: Run code that comes with the model.
        attention: PACKED for logprobs.py, which is the model's own where documents cannot share a row; or the name of
            one that transformers knows.
        four_bit: Quantize the weights to NF4 with double quantization while they are read.
        context: Longest sequence that the model is served with, by which a longrope has its factors; None: the longest
            that it can read.

    Raises:
        ConfigError: The folder holds no such model, not all of its weights, or one that PACKED cannot compute.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("train", "transformers") from error
    register()
    target = pick_device(device)
    number_format = pick_dtype(dtype, target)
    options = {"quantization_config": _nf4(number_format)} if four_bit else {}
    config = read_config(folder, trust_remote_code=trust_remote_code)
    architecture = architecture_of(config)
    if four_bit and architecture.no_four_bit:
        raise ConfigError(f"{folder}: {architecture.no_four_bit}; use lora, or four_bit = false")
    if attention == PACKED:
        if architecture.refusal:
            raise ConfigError(f"{folder}: {architecture.refusal}; use another model")
        attention = PACKED if architecture.packs else architecture.own_attention
    with quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=number_format,
                device_map={"": target},
                trust_remote_code=trust_remote_code,
                attn_implementation=attention,
                local_files_only=True,
                **options,
            )
        except _LIBRARY_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{folder}: {architecture.kind} cannot be loaded as a language model: {_first_line(error)}"
            ) from error
    if missing := sorted(report["missing_keys"]):  # transformers initializes these at random
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{folder}: the weights of {missing[0]}{more} are missing; download the model again")
    if four_bit:
        _disable_repacking(model, folder)
    _fix_longrope(model, architecture, context)
    return model.eval()


def quantization_conflict(folder: Path, *, trust_remote_code: bool = False) -> str | None:
    """Return why a model whose files are quantized cannot be loaded on this machine; None if it can, or is not."""
    from transformers.quantizers import AutoHfQuantizer

    config = read_config(folder, trust_remote_code=trust_remote_code)
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    with quiet():
        try:
            if not found or not AutoHfQuantizer.supports_quant_method(found):
                return None
            quantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
            quantizer.validate_environment(device_map={"": pick_device()}, weights_only=True)
        except _LIBRARY_ERRORS as error:
            return f"its files are quantized, and transformers cannot load them here: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its kind if it has no words."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _fix_longrope(model: PreTrainedModel, architecture: Architecture, context: int | None) -> None:
    """Choose a longrope's factors once, as vLLM does, not by the longest document of each batch.

    They are the long ones if the model is served with more positions than it was first trained with. transformers
    looks at every batch instead, so an answer would depend on those beside it.
    """
    original = architecture.original_positions
    if original is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    served = context or model.config.get_text_config(decoder=True).max_position_embeddings
    for module in model.modules():
        if getattr(module, "rope_type", None) != "longrope":
            continue
        sequence = original + 1 if served > original else original
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=sequence)
        module.inv_freq = torch.nn.Buffer(frequencies, persistent=False)
        module.rope_type = "default"  # which transformers never updates


def _nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401 - transformers' own message would not name our extra
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise MissingExtraError("train", "bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _disable_repacking(model: torch.nn.Module, folder: Path) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place in a forward pass in eval mode; refuse if there are none.

    It does so on CPUs with AVX512-BF16, and every gradient afterwards is silently wrong (bitsandbytes 0.50.2: cosine
    0.416 with the right one).
    """
    import bitsandbytes as bnb

    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not layers:
        raise ConfigError(f"{folder}: none of its layers can be in 4 bits; use lora, or four_bit = false")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of transformers; errors are raised anyway."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


@dataclass(frozen=True)
class ModelSpec:
    """What a model can read.

    Attributes:
        vocab_size: Ids that have an embedding, padding included.
        max_positions: Longest document; None if there is no limit.
        hidden_size: Width of the residual stream.
    """

    vocab_size: int
    max_positions: int | None
    hidden_size: int


def model_spec(folder: Path, *, trust_remote_code: bool = False) -> ModelSpec:
    """Read a model's limits from its config, without its weights."""
    text = read_config(folder, trust_remote_code=trust_remote_code).get_text_config()
    return ModelSpec(int(text.vocab_size), context_of_config(text.to_dict()), int(text.hidden_size))


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the torch dtype in which a model folder stores its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _dtype_named(config.get("dtype") or config.get("torch_dtype") or "float32")


def _dtype_named(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_float32(model: torch.nn.Module) -> bool:
    """Return whether all weights are float32; 4-bit weights are not."""
    return all(p.dtype == torch.float32 for p in model.parameters())
