"""The packer alone, for a trainer of your own (TRL, verl, a loop over flash-attention): numpy in, numpy out, no torch.

    python examples/pack_for_any_trainer.py

Three calls: which sequences share a row, which rank reads which row at which step, and the rows themselves.
"""

import tempfile
from pathlib import Path

import numpy as np

import dasd_lite as dl

# 20,000 tokenized answers of about 2,000 tokens, concatenated in one file.
rng = np.random.default_rng(0)
lengths = rng.lognormal(np.log(1500), 0.8, 20_000).clip(16, 16_384).astype(np.int32)
offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
folder = tempfile.TemporaryDirectory()
file = Path(folder.name) / "ids.npy"
np.save(file, rng.integers(0, 150_000, offsets[-1], dtype=np.int32))
loss_mask = np.ones(offsets[-1], dtype=np.bool_)  # set False for the tokens of prompts

# method="tight" needs even fewer rows; alignment=2 * cp is for context parallelism over cp ranks.
plan = dl.pack_rows(lengths, seq_len=16_384)
print(f"{len(lengths):,} sequences in {plan.num_rows:,} rows, {plan.fill:.2%} full")

# A layer of hidden size h costs about 6 h per token and 1 per pair of tokens that attend to each other.
order = dl.balance_rows(plan, lengths, num_ranks=8, micro_steps=4, cost=(24_576, 1), seed=0)
print(f"{len(order.rows):,} micro-steps on 8 ranks; {len(order.left_over)} rows left over, too few for another step")

tokens = np.load(file, mmap_mode="r")  # read from disk only where it is used
rank = 0
for step, row in enumerate(order.rows[:3, rank]):
    # labels are not shifted: the model shifts them to predict the next token, or you do.
    batch = dl.gather_rows(tokens, offsets, plan, row, loss_mask=loss_mask)
    print(f"step {step}: {len(batch.ids):,} tokens, documents end at {batch.cu_seqlens[1:].tolist()}")
folder.cleanup()
