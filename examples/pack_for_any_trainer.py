"""The packer alone, for a trainer of your own (TRL, verl, a loop over flash-attention): numpy in, numpy out, no torch.

    python examples/pack_for_any_trainer.py

Three calls: which sequences share a row, which rank reads which row when, and the rows themselves.
"""

import tempfile
from pathlib import Path

import numpy as np

from dasd_lite.method.packing import balance_rows, gather_rows, pack_rows

# Token ids one behind the other in a file, as a tokenizer's output is best kept; 20,000 answers of about 2,000 tokens.
rng = np.random.default_rng(0)
lengths = rng.lognormal(np.log(1500), 0.8, 20_000).clip(16, 16_384).astype(np.int32)
offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
folder = tempfile.TemporaryDirectory()
file = Path(folder.name) / "ids.npy"
np.save(file, rng.integers(0, 150_000, offsets[-1], dtype=np.int32))
loss_mask = np.ones(offsets[-1], dtype=np.bool_)  # false on the tokens of prompts

# method="tight" finds fewer rows yet; alignment=2 * cp is for context parallelism over cp ranks.
plan = pack_rows(lengths, seq_len=16_384)
print(f"{len(lengths):,} sequences in {plan.num_rows:,} rows, {plan.fill:.2%} full")

# A layer of hidden size h costs about 6 h per token and 1 per pair of tokens that attend to each other.
order = balance_rows(plan, lengths, num_ranks=8, micro_steps=4, cost=(24_576, 1), seed=0)
print(f"{len(order.rows):,} micro-steps on 8 ranks; {len(order.left_over)} rows make no whole step in this epoch")

tokens = np.load(file, mmap_mode="r")  # nothing of it is read before it is needed
rank = 0
for step, row in enumerate(order.rows[:3, rank]):
    # labels are those of the tokens themselves: a model that predicts the next one shifts them, or you do.
    batch = gather_rows(tokens, offsets, plan, row, loss_mask=loss_mask)
    print(f"step {step}: {len(batch.ids):,} tokens, documents end at {batch.cu_seqlens[1:].tolist()}")
folder.cleanup()
