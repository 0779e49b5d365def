"""TRL's side of train_gpu.py: SFTTrainer on the same model and the same packed rows, at its best.

    python benchmarks/train_gpu_trl.py trl --folder FOLDER --case full-32k [--attention NAME] [--dry]

Padding-free rows; flash-attention 3 or 2 if installed, otherwise flex_attention, on a CPU sdpa; Liger's kernels if
installed; the fused AdamW; its loss without full logits, which is always on; checkpointing of whole layers (its
selective one only keeps what torch's own attention returns). The number formats are ours. Kernels from the hub need a
network: `--attention kernels-community/flash-attn2` asks for one. A step is timed between synchronizations right before
and after it, without what the Trainer does between steps; ours is timed by its own metrics, including the reading of
rows.
"""

from __future__ import annotations

import importlib.util
import resource
import time
from pathlib import Path
from typing import Any

from train_gpu_cases import (
    ALPHA,
    CASES,
    FASTER,
    LEARNING_RATE,
    NEEDED,
    RANK,
    WARMUP,
    Case,
    Result,
    require,
    run,
    seq_len_of,
)


def run_trl(args: Any) -> Result:
    """Train by TRL's SFTTrainer on the same packed rows."""
    case = CASES[args.case]
    require("torch", "transformers", "trl", "datasets", *NEEDED[case.method])
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTTrainer

    steps = WARMUP + args.steps
    table = pa.ipc.open_file(str(args.folder / f"rows-{args.case}-{steps}.arrow")).read_all()
    rows = [
        {
            "input_ids": row["ids"],
            "labels": [i if m else -100 for i, m in zip(row["ids"], row["loss_mask"], strict=True)],
            "seq_lengths": row["doc_lengths"],
        }
        for row in table.to_pylist()
    ]
    attention, note = their_attention(args)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(3)}, unk_token="0"))
    clock = make_clock()
    trainer = SFTTrainer(
        their_model(args.folder / "model", case, attention, args),
        args=their_config(args, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2"),
        callbacks=[clock],
        **their_adapter(case),
    )
    trainer.train()
    on_gpu = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # as in our metrics on a CPU
    return {
        "tokens": [len(row["input_ids"]) for row in rows],
        "seconds": clock.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "note": note,
    }


def their_attention(args: Any) -> tuple[str, str]:
    """Choose the fastest attention that is installed; return its name, and a note for the table."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if args.attention != "auto":
        name = args.attention
    elif not torch.cuda.is_available():
        name = "sdpa"
    elif is_flash_attn_3_available():
        name = "flash_attention_3"
    elif is_flash_attn_2_available():
        name = "flash_attention_2"
    else:
        name = "flex_attention"
    if name == "flex_attention":
        cast_for_flex()
    return name, ", ".join([name, *(name for name in FASTER[1:] if importlib.util.find_spec(name))])


def cast_for_flex() -> None:
    """Cast the inputs of flex_attention to 16 bits under autocast.

    Before torch 2.13 autocast does not, and Qwen3's norms of queries and keys are float32 under it: flex_attention
    would compute in float32, several times slower, or refuse values of another type.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    def forward(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
        return flex_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("flex_attention", forward)


def make_clock() -> Any:
    """Return a callback that times each step, between synchronisations."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *args: object, **options: object) -> None:
            self.began = now()

        def on_step_end(self, *args: object, **options: object) -> None:
            self.seconds.append(now() - self.began)

    return Clock()


def number_format(args: Any) -> Any:
    """Return the format of the computation that ours would choose."""
    import torch

    if args.dry:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def their_model(folder: Path, case: Case, attention: str, args: Any) -> Any:
    """Load the model in the same formats as ours: trained weights float32, frozen ones 16 bits or NF4."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if case.method == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_format(args),
        )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if case.method == "full" else number_format(args),
        attn_implementation=attention,
        device_map={"": "cuda" if torch.cuda.is_available() and not args.dry else "cpu"},
        **options,
    )


def their_adapter(case: Case) -> dict[str, Any]:
    """Return the same adapter as ours."""
    if case.method == "full":
        return {}
    from peft import LoraConfig

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"peft_config": lora}


def their_config(args: Any, steps: int) -> Any:
    """Return the options of SFTTrainer that match ours."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(args.folder / "out" / f"trl-{args.case}"),
        max_length=None,  # the rows are already packed
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=number_format(args) == torch.bfloat16,
        fp16=number_format(args) == torch.float16,
        use_cpu=args.dry,
        gradient_checkpointing=seq_len_of(args.case, dry=args.dry) > 4096,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=not args.dry and importlib.util.find_spec("liger_kernel") is not None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    run({"trl": run_trl})
