"""How other programs gather the tokens of packed rows.

    python benchmarks/peers/gather.py FOLDER ROWS_AT_A_TIME

FOLDER has tokens.npy, offsets.npy (of the sequences), items.npy and rows.npy (the sequences of each row), and order.npy
(of the rows). numpy and Arrow gather all rows; the collators of the trainers, which visit every token in Python, a few.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from timing import best, measure

FOLDER = Path(sys.argv[1])
CHUNK = int(sys.argv[2])
TOKENS, OFFSETS, ITEMS, ROWS, ORDER = (
    np.load(FOLDER / f"{name}.npy") for name in ("tokens", "offsets", "items", "rows", "order")
)
SEQ_LEN = 65_536
SAMPLE = ORDER[:4]  # rows for the slow peers


def main() -> None:
    """Measure each peer."""
    measure(
        {
            "numpy: concatenate slices, fresh": numpy_fresh,
            "numpy: concatenate slices, touched": numpy_touched,
            "numpy: concatenate slices, 8 rows at a time": numpy_chunks,
            "numpy: slices, position ids and labels, fresh": numpy_columns,
            "Arrow: take of a list column": arrow_take,
            "TRL: packed dataset and its collator": trl,
            "LLaMA-Factory: PackedSupervisedDatasetProcessor": llama_factory,
            "axolotl: V2BatchSamplerDataCollatorForSeq2Seq": axolotl,
        }
    )


def items_of(rows: Any) -> list[int]:
    """The sequences of some rows, in order."""
    return [int(item) for row in rows for item in ITEMS[ROWS[row] : ROWS[row + 1]]]


def slices(rows: Any, column: Any = TOKENS) -> list[Any]:
    """The slices of a column for the sequences of some rows."""
    return [column[OFFSETS[item] : OFFSETS[item + 1]] for item in items_of(rows)]


def numpy_fresh() -> dict[str, Any]:
    """Gather all rows into new memory."""
    seconds, _ = best(lambda: np.concatenate(slices(ORDER)), times=3)
    return {"seconds": seconds, "num": len(TOKENS), "like": "at once, fresh"}


def numpy_touched() -> dict[str, Any]:
    """Gather all rows into memory that was written before."""
    out = np.ones_like(TOKENS)
    seconds, _ = best(lambda: np.concatenate(slices(ORDER), out=out), times=3)
    return {"seconds": seconds, "num": len(TOKENS), "like": "at once, touched"}


def numpy_chunks() -> dict[str, Any]:
    """Gather a few rows at a time into one buffer."""
    out = np.ones(CHUNK * SEQ_LEN, np.int32)

    def run() -> None:
        for at in range(0, len(ORDER), CHUNK):
            parts = slices(ORDER[at : at + CHUNK])
            np.concatenate(parts, out=out[: sum(map(len, parts))])

    seconds, _ = best(run, times=3)
    return {"seconds": seconds, "num": len(TOKENS), "like": "8 rows at a time"}


def numpy_columns() -> dict[str, Any]:
    """Write all columns that ours can write, each in the usual way."""
    mask = np.random.default_rng(2).random(len(TOKENS)) < 0.9

    def run() -> tuple[Any, Any, Any]:
        ids = np.concatenate(slices(ORDER))
        lengths = np.diff(OFFSETS)[items_of(ORDER)]
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(ids), dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
        return ids, positions, np.where(np.concatenate(slices(ORDER, mask)), ids, np.int32(-100))

    seconds, _ = best(run, times=2)
    return {"seconds": seconds, "num": len(TOKENS), "like": "at once, fresh, position ids and labels"}


def arrow_take() -> dict[str, Any]:
    """Use Arrow's `take` of a list column, which TRL packs with."""
    import pyarrow as pa

    column = pa.LargeListArray.from_arrays(pa.array(OFFSETS), pa.array(TOKENS))
    sequences = pa.array(items_of(ORDER))
    seconds, _ = best(lambda: column.take(sequences), times=3)
    return {"seconds": seconds, "num": len(TOKENS), "like": "at once, fresh"}


def examples(rows: Any, *, packed: bool) -> tuple[Any, int]:
    """A dataset as the trainers hold it, one example per row (`packed`) or per sequence, and its number of tokens."""
    import pyarrow as pa
    from datasets import Dataset

    items = items_of(rows)
    tokens = pa.array(np.concatenate(slices(rows)))
    lengths = np.diff(OFFSETS)[items]
    ends = np.cumsum(lengths)
    columns = {}
    if packed:
        nums = np.diff(ROWS)[rows]
        offsets = pa.array(np.concatenate(([0], ends[np.cumsum(nums) - 1])).astype(np.int32))
        of_rows = pa.array(np.concatenate(([0], np.cumsum(nums))).astype(np.int32))
        columns["seq_lengths"] = pa.ListArray.from_arrays(of_rows, pa.array(lengths))
    else:
        offsets = pa.array(np.concatenate(([0], ends)).astype(np.int32))
        positions = pa.array(np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]))
        columns["position_ids"] = pa.ListArray.from_arrays(offsets, positions)
    columns["input_ids"] = columns["labels"] = pa.ListArray.from_arrays(offsets, tokens)
    return Dataset(pa.table(columns)), len(tokens)


def trl() -> dict[str, Any]:
    """TRL: the packed dataset has one example per row; the collator adds position ids and boundaries."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    dataset, num = examples(SAMPLE, packed=True)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    seconds, _ = best(lambda: [collator([dataset[row]]) for row in range(len(SAMPLE))], times=3)
    return {"seconds": seconds, "num": num, "like": "8 rows at a time, position ids and labels"}


def llama_factory() -> dict[str, Any]:
    """LLaMA-Factory packs and joins a window of sequences; they are tokenized beforehand, so only this is timed."""
    from types import SimpleNamespace

    from llama_factory import PackedSupervisedDatasetProcessor

    tokenized = [part.tolist() for part in slices(SAMPLE)]

    class Tokenized(PackedSupervisedDatasetProcessor):
        def _encode_data_example(self, prompt: Any, **_: Any) -> tuple[list[int], list[int]]:
            return tokenized[prompt[0]], tokenized[prompt[0]]

    processor = Tokenized(
        template=None,
        tokenizer=SimpleNamespace(pad_token_id=0),
        processor=None,
        data_args=SimpleNamespace(cutoff_len=SEQ_LEN, neat_packing=True),
    )
    nothing = [None] * len(tokenized)
    texts = dict.fromkeys(("_system", "_tools", "_images", "_videos", "_audios"), nothing)
    batch = {"_prompt": [[at] for at in range(len(tokenized))], "_response": [[None]] * len(tokenized), **texts}
    seconds, packed = best(lambda: processor.preprocess_dataset(batch), times=3)
    assert len(packed["input_ids"]) >= len(SAMPLE)
    return {"seconds": seconds, "num": sum(map(len, tokenized)), "like": "at once, fresh, position ids and labels"}


def axolotl() -> dict[str, Any]:
    """axolotl: a row is a list of examples that the collator joins."""
    from axolotl.utils.collators.batching import V2BatchSamplerDataCollatorForSeq2Seq
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    dataset, num = examples(SAMPLE, packed=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
    collator = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer)
    ends = np.cumsum(np.diff(ROWS)[SAMPLE])
    starts = ends - np.diff(ROWS)[SAMPLE]

    def run() -> list[Any]:
        return [
            collator([[dataset[int(at)] for at in range(start, end)]]) for start, end in zip(starts, ends, strict=True)
        ]

    seconds, _ = best(run, times=3)
    return {"seconds": seconds, "num": num, "like": "8 rows at a time, position ids and labels"}


if __name__ == "__main__":
    main()
