"""The student: load it, score and train on packed documents, save it.

Input: a model folder on disk. Invariants: documents of a row never see each other; full logits
[T, vocabulary] never exist, only those of one chunk of positions; log-probabilities are natural and
float32, of the model at temperature 1; a model folder appears whole or not at all.

Shapes: T tokens of a flat row of documents, C targets of one chunk, V vocabulary, E hidden size.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasd_lite.attention import PACKED, Documents, register
from dasd_lite.checkpoint import saving
from dasd_lite.config import Dtype, Full, Lora
from dasd_lite.dataset import sync_file, sync_folder
from dasd_lite.errors import ConfigError, MissingExtraError, TrainError
from dasd_lite.rows import Row

try:
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
except ImportError as error:
    raise MissingExtraError("train", "torch") from error

Ids = npt.NDArray[np.integer[Any]]
_SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what is beside the weights
LOGIT_BYTES = 256 << 20  # of one chunk's float32 logits; the loss needs about three times this


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


def causal_model(model: Any) -> Any:
    """Return the transformers model within an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


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


# --- log-probabilities and loss ---------------------------------------------------------------------


def target_positions(
    loss_mask: npt.NDArray[np.bool_], doc_lengths: Sequence[int] | npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Return the positions that are trained on: masked in, and not the first of their document."""
    lengths = np.asarray(doc_lengths, dtype=np.int64)
    wanted = np.array(loss_mask, dtype=bool)
    wanted[np.cumsum(lengths) - lengths] = False  # nothing predicts a first token
    return np.flatnonzero(wanted)


def target_logprobs(
    model: Any, ids: Ids, doc_lengths: Sequence[int] | npt.NDArray[Any], chunk_tokens: int = 1024
) -> npt.NDArray[np.float32]:
    """Return the log-probability [T] of each token given those before it in its document; NaN for first tokens."""
    positions = target_positions(np.ones(len(ids), dtype=bool), doc_lengths)
    found = np.full(len(ids), np.nan, dtype=np.float32)
    with torch.inference_mode():
        hidden, target_ids = _predictions(model, ids, positions, doc_lengths)
        head = causal_model(model).get_output_embeddings()
        parts = [
            -F.cross_entropy(head(h).float(), t, reduction="none")
            for h, t in zip(hidden.split(chunk_tokens), target_ids.split(chunk_tokens), strict=True)
        ]
        found[positions] = torch.cat(parts).cpu().numpy()
    return found


def plain_logprobs(model: Any, ids: Ids) -> npt.NDArray[np.float32]:
    """Return what target_logprobs should for one document, by way of the model's own attention and full logits.

    For checks: a short document only.
    """
    causal = causal_model(model)
    packed = causal.config._attn_implementation
    causal.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            row = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(causal.get_input_embeddings().weight.device)
            logits = causal(input_ids=row[None], use_cache=False).logits[0]
            found = -F.cross_entropy(logits[:-1].float(), row[1:], reduction="none").cpu().numpy()
    finally:
        causal.set_attn_implementation(packed)
    return np.concatenate([np.full(1, np.nan, dtype=np.float32), found])


def loss_sum(
    model: Any,
    ids: Ids,
    loss_mask: npt.NDArray[np.bool_],
    doc_lengths: Sequence[int] | npt.NDArray[Any],
    chunk_tokens: int | None = None,
) -> Any:
    """Return Σ −log p over the target tokens, a scalar with its gradient.

    With more targets than one chunk, a chunk's logits are computed again in the backward pass
    rather than kept. `chunk_tokens` is chosen by memory when not given.
    """
    positions = target_positions(loss_mask, doc_lengths)
    hidden, target_ids = _predictions(model, ids, positions, doc_lengths)
    head = causal_model(model).get_output_embeddings()
    chunk = chunk_tokens or max(1, LOGIT_BYTES // (4 * head.weight.shape[0]))
    if len(positions) <= chunk:
        return _chunk_loss(head, hidden, target_ids)
    parts = [
        checkpoint(_chunk_loss, head, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), target_ids.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


def _chunk_loss(head: Any, hidden_CE: Any, target_ids_C: Any) -> Any:
    return F.cross_entropy(head(hidden_CE).float(), target_ids_C, reduction="sum")


def _predictions(
    model: Any, ids: Ids, positions: npt.NDArray[np.int64], doc_lengths: Sequence[int] | npt.NDArray[Any]
) -> tuple[Any, Any]:
    """Return the hidden states that predict `positions`, and the ids that stand there."""
    causal = causal_model(model)
    if causal.config._attn_implementation != PACKED:
        # With any other attention the documents would leak into each other without a word.
        raise TrainError(f"the model was loaded with attention {causal.config._attn_implementation!r}, not {PACKED!r}")
    if int(np.sum(doc_lengths)) != len(ids):
        raise TrainError(f"documents of {int(np.sum(doc_lengths))} tokens in a row of {len(ids)}")
    device = causal.get_input_embeddings().weight.device
    row = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(device)
    documents = Documents.of(doc_lengths, device)
    output = causal.base_model(
        input_ids=row[None], position_ids=documents.position_ids, use_cache=False, documents=documents
    )
    at = torch.from_numpy(positions).to(device)
    return output.last_hidden_state[0].index_select(0, at - 1), row.index_select(0, at)


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
