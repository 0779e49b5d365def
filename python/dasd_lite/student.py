"""The student: load it, make it trainable, save it.

Input: a model folder on disk. Invariant: a model folder appears whole or not at all. What it says about packed
documents, their log-probabilities and their loss, is in logprobs.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.attention import PACKED, register
from dasd_lite.checkpoint import saving
from dasd_lite.config import Dtype, Full, Lora
from dasd_lite.dataset import sync_file, sync_folder
from dasd_lite.errors import ConfigError, MissingExtraError
from dasd_lite.logprobs import causal_model as causal_model
from dasd_lite.logprobs import loss_sum as loss_sum
from dasd_lite.logprobs import plain_logprobs as plain_logprobs
from dasd_lite.logprobs import target_logprobs as target_logprobs
from dasd_lite.logprobs import target_positions as target_positions
from dasd_lite.rows import Row

try:
    import torch
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

_SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what is beside the weights


# It asks for a package of faster CPU kernels, for LoRA too, where nothing is in 4 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# --- loading ----------------------------------------------------------------------------------------


def pick_device(device: str = "auto") -> Any:
    """Return the device that "auto" stands for: the GPU when there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def pick_dtype(dtype: Dtype, device: Any) -> Any:
    """Return the number format that "auto" stands for on this device."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_model(
    folder: Path,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attention: str = PACKED,
    four_bit: bool = False,
) -> Any:
    """Load a causal language model from a local folder, in eval mode.

    `attention` is PACKED for the functions below, "sdpa" for `generate`. `four_bit` quantises the
    weights to NF4 with double quantisation while they are read. Raises ConfigError with the reason
    when the folder holds no such model.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("train", "transformers") from error
    register()
    target = pick_device(device)
    number_format = pick_dtype(dtype, target)
    options: dict[str, Any] = {"quantization_config": _nf4(number_format)} if four_bit else {}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=number_format,
                device_map={"": target},
                trust_remote_code=trust_remote_code,
                attn_implementation=attention,
                local_files_only=True,
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{folder}: cannot be loaded as a language model: {str(error).splitlines()[0]}"
            ) from error
    if four_bit:
        _disable_repacking(model)
    return model.eval()


def _nf4(compute_dtype: Any) -> Any:
    try:
        import bitsandbytes  # noqa: F401 - transformers' own message does not name our extra
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise MissingExtraError("train", "bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _disable_repacking(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at an eval-mode forward.

    It does so on CPUs with AVX512-BF16, and every gradient after it is wrong without a word
    (bitsandbytes 0.50.2: cosine 0.416 to the right one).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and advice: what matters is raised."""
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
    """What a model can read."""

    vocab_size: int
    """Ids that it has an embedding for, padding included."""
    max_positions: int | None


def model_spec(folder: Path, *, trust_remote_code: bool = False) -> ModelSpec:
    """Read a model's limits from its config, without its weights."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtraError("train", "transformers") from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: cannot be loaded as a language model: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    return ModelSpec(int(text.vocab_size), getattr(text, "max_position_embeddings", None))


def is_float32(model: Any) -> bool:
    """Tell whether all weights are float32; 4-bit ones are not."""
    return all(p.dtype == torch.float32 for p in model.parameters())


# --- training: adapters and saving ------------------------------------------------------------------


def load_trainable(
    folder: Path,
    method: Full | Lora,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model to train by `method`, in train mode.

    What is trained is float32 whatever `dtype` says; weights that stay as they are take `dtype`, and
    with kind "qlora" 4 bits. The adapter's start is drawn from torch's generator.
    """
    is_lora = isinstance(method, Lora)
    four_bit = isinstance(method, Lora) and method.kind == "qlora"
    model = load_model(
        folder,
        dtype=dtype if is_lora else "float32",
        device=device,
        trust_remote_code=trust_remote_code,
        four_bit=four_bit,
    )
    if isinstance(method, Lora):
        model = _add_adapter(model, folder, method, four_bit=four_bit)
    if gradient_checkpointing:
        causal_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _add_adapter(model: Any, folder: Path, method: Lora, *, four_bit: bool) -> Any:
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise MissingExtraError("train", "peft") from error
    if isinstance(method.target_modules, list):
        names = [name for name, _ in model.named_modules()]
        for target in method.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                layers = sorted({name.rsplit(".", 1)[-1] for name in names if name.endswith("_proj")})
                raise ConfigError(
                    f"train.method.target_modules: {folder} has no layer {target!r}; it has {', '.join(layers)}"
                )
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def save_model(model: Any, folder: Path, tokenizer_from: Path) -> None:
    """Write a model folder: safetensors, config, and the tokenizer's files of `tokenizer_from`; whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(folder.parent), quiet():
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        for path in sorted(tokenizer_from.iterdir()):
            if path.suffix in _SIDE_FILES and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        _put(temporary, folder)


def _put(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name, in place of an earlier one."""
    for path in temporary.iterdir():
        sync_file(path)
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


def stored_dtype(folder: Path) -> Any:
    """Return the number format that a model folder's weights are stored in."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def export(model: Any, method: Full | Lora, source: Path, out: Path, probe: Row, **options: Any) -> float:
    """Save a trained model as `out`/model, and an adapter as `out`/adapter; return the gap of merging.

    The gap is the largest difference of a log-probability on the row `probe`, in nats, between the
    model as trained and as saved: what merging and rounding to the source's number format cost.
    A 4-bit model is dequantised before the adapter is merged, for merging into 4 bits rounds it away.
    `options` go to load_model.
    """
    model.eval()
    before = target_logprobs(model, probe.ids, probe.doc_lengths)
    if isinstance(method, Lora):
        from peft import PeftModel

        temporary = out / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with saving(out), quiet():
            model.save_pretrained(temporary)
            _put(temporary, out / "adapter")
        four_bit = method.kind == "qlora"
        # On the CPU in float32, so that nothing is rounded and a small card need not hold the whole model.
        base = load_model(source, dtype="float32", device="cpu", four_bit=four_bit, **options)
        with quiet():
            base = base.dequantize() if four_bit else base
            model = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().eval()
    model = model.to(stored_dtype(source))
    after = target_logprobs(model, probe.ids, probe.doc_lengths)
    save_model(model, out / "model", source)
    return float(np.nanmax(np.abs(after - before)))
