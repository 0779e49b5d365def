"""Write the table of GPUs into docs/training.md, from what costs/memory.py and costs/flops.py predict.

    python docs/make_training_table.py [--check]

The table is between two comments; the rest of the file is not touched. `--check` writes nothing and fails if the table
is not up to date; a test runs it.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from dasd_lite.config.stages import PackConfig
from dasd_lite.config.train import TrainConfig
from dasd_lite.costs.flops import training_hours
from dasd_lite.costs.hardware import Hardware, assumed_mfu, peak_flops
from dasd_lite.costs.memory import predict
from dasd_lite.costs.shape import ModelShape, shape_of

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_DOC_LENGTH = 8192  # tokens of a document, if the row is that long


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    """Return the shape of a Qwen3 according to its config.json; all have 8 key heads and heads of 128."""
    return shape_of(
        {
            "model_type": "qwen3",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        }
    )


MODELS = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
}


@dataclass(frozen=True)
class Row:
    """A GPU, a student and options that fit.

    Attributes:
        gpu: Name and memory, for the table.
        device: As torch names it, for its peak.
    """

    gpu: str
    device: str
    model: str
    train: str
    seq_len: int
    num_processes: int = 1
    varlen: bool = True


_QLORA = 'method = { kind = "qlora", rank = 16 }'
_LORA = 'method = { kind = "lora", rank = 32 }'
_8BIT = 'optimizer = "adamw_8bit"'
_PAGED = 'optimizer = "paged_adamw_8bit"'
_OFFLOAD = "offload_activations = true"
ROWS = (
    Row("8 GB", "", "Qwen3-4B", f"{_QLORA}, {_OFFLOAD}", 8192),
    Row("8 GB", "", "Qwen3-0.6B", f'{_LORA}, gradient_checkpointing = "on"', 4096),
    Row("RTX 3060, 12 GB", "NVIDIA GeForce RTX 3060", "Qwen3-4B", f"{_QLORA}, {_OFFLOAD}", 16384),
    Row("RTX 3060, 12 GB", "NVIDIA GeForce RTX 3060", "Qwen3-0.6B", f"{_PAGED}, {_OFFLOAD}", 8192),
    Row("T4, 16 GB", "Tesla T4", "Qwen3-4B", f"{_QLORA}, {_OFFLOAD}", 16384, varlen=False),
    Row("T4, 16 GB", "Tesla T4", "Qwen3-1.7B", _LORA, 16384, varlen=False),
    Row("RTX 4090, 24 GB", "NVIDIA GeForce RTX 4090", "Qwen3-4B", _LORA, 16384),
    Row("RTX 4090, 24 GB", "NVIDIA GeForce RTX 4090", "Qwen3-4B", f"{_LORA}, {_OFFLOAD}", 32768),
    Row("RTX 4090, 24 GB", "NVIDIA GeForce RTX 4090", "Qwen3-1.7B", f"{_8BIT}, {_OFFLOAD}", 8192),
    Row("L40S, 48 GB", "NVIDIA L40S", "Qwen3-4B", _LORA, 65536),
    Row("L40S, 48 GB", "NVIDIA L40S", "Qwen3-4B", f"{_PAGED}, {_OFFLOAD}", 32768),
    Row("A100, 80 GB", "NVIDIA A100-SXM4-80GB", "Qwen3-4B", _8BIT, 65536),
    Row("A100, 80 GB", "NVIDIA A100-SXM4-80GB", "Qwen3-1.7B", "", 65536),
    Row("H200, 141 GB", "NVIDIA H200", "Qwen3-4B", "", 65536),
    Row("8 × H100, 80 GB each", "NVIDIA H100 80GB HBM3", "Qwen3-4B", "", 65536, num_processes=8),
)


def main() -> None:
    """Write the table, or compare it with what would be written."""
    target = Path(__file__).parent / "training.md"
    text = target.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{table()}{END}{after}"
    if "--check" in sys.argv:
        if text != wanted:
            sys.exit(f"{target} is not up to date; run: python docs/make_training_table.py")
    else:
        target.write_text(wanted, encoding="utf-8")


def table() -> str:
    """Return the table; every figure is predicted."""
    head = (
        "your GPU",
        "student",
        "`pack.seq_len` and `train`",
        "GB",
        "GB of host memory",
        "h per 10M tokens",
        "measured",
    )
    lines = [head, ("---",) * len(head), *(_cells(row) for row in ROWS)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    config = TrainConfig.model_validate(tomllib.loads(f"train = {{ {row.train} }}")["train"])
    seq_len = PackConfig(seq_len=row.seq_len).seq_len
    shape = MODELS[row.model]
    prediction = predict(
        shape,
        config,
        seq_len=seq_len,
        num_processes=row.num_processes,
        hardware=Hardware(is_float16=not row.varlen, varlen=row.varlen),
    )
    peak = peak_flops(row.device)
    length = min(_DOC_LENGTH, seq_len)
    hours = (
        training_hours(shape, config, length, 10e6, assumed_mfu(row.device) * peak, row.num_processes) if peak else None
    )
    options = f"`{{ {row.train} }}`" if row.train else "defaults (all weights, AdamW in 32 bits)"
    return (
        row.gpu,
        row.model,
        f"{seq_len}, {options}",
        f"{prediction.total / 1e9:.1f}" + (" each" if row.num_processes > 1 else ""),
        f"{prediction.host / 1e9:.1f}" if prediction.host else "–",
        f"{hours:.2g}" if hours else "?",
        "not yet",
    )


if __name__ == "__main__":
    main()
