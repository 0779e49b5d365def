"""Log-probabilities and ranks of packed documents in one pass: against numpy on full logits, and their memory."""

import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dasd_lite.model import load as student
from dasd_lite.model import logprobs


def numpy_scores(logits, targets):
    """Log-probability and rank of each target from full logits, in float64."""
    wide = logits.double().numpy()
    chosen = wide[np.arange(len(targets)), targets]
    top = wide.max(-1)
    return chosen - top - np.log(np.exp(wide - top[:, None]).sum(-1)), 1 + (wide > chosen[:, None]).sum(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab", [7, 400, 200_000])
def test_a_chunk_is_scored_as_by_numpy(dtype, vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, vocab, generator=generator) * 5
    logits[0] = 1.5  # all tokens tie
    logits[1] = torch.round(logits[1])  # many do
    logits[2, 3] = 80.0
    logits = logits.to(getattr(torch, dtype))
    targets = torch.randint(vocab, (9,), generator=generator)
    targets[2] = 3
    expected, expected_ranks = numpy_scores(logits, targets.numpy())
    scores, ranks = torch.empty(9), torch.empty(9, dtype=torch.int64)
    logprobs._score_chunk(logits, targets, scores, ranks)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    assert ranks.tolist() == expected_ranks.tolist()
    assert ranks[0] == ranks[2] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_tokens", [3, None])
def test_packed_documents_have_the_scores_of_each_alone(demo, dtype, chunk_tokens):
    model = student.load_model(demo / "student", dtype=dtype)
    plain = student.load_model(demo / "student", dtype=dtype, attention="sdpa")
    rng = np.random.default_rng(0)
    lengths = [40, 1, 2, 70, 41]
    docs = [rng.integers(0, 300, n, dtype=np.int32) for n in lengths]
    scores, ranks = logprobs.target_scores(model, np.concatenate(docs), lengths, chunk_tokens)
    assert (scores.dtype, ranks.dtype) == (np.float32, np.int64)
    edges = np.cumsum(lengths)[:-1]
    for doc, values, doc_ranks in zip(docs, np.split(scores, edges), np.split(ranks, edges), strict=True):
        with torch.inference_mode():
            logits = plain(input_ids=torch.from_numpy(doc).long()[None]).logits[0, :-1]
        expected, expected_ranks = numpy_scores(logits.float(), doc[1:])
        assert math.isnan(values[0]) and doc_ranks[0] == 0
        if dtype == "float32":
            np.testing.assert_allclose(values[1:], expected, atol=1e-4)
            assert np.sum(doc_ranks[1:] != expected_ranks) <= 1  # near ties, rounded otherwise
        elif len(doc) > 1:
            assert np.mean(np.abs(values[1:] - expected)) < 0.1


MEMORY = """
import ctypes, sys
import numpy as np, torch, transformers
from dasd_lite.model import load as student, logprobs
dtype, folder, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = student.load_model(folder, dtype=dtype)
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
ids = np.random.default_rng(0).integers(0, 151936, num, dtype=np.int32)
logprobs.target_scores(model, ids[:64], [64])  # loads what the first call keeps
open("/proc/self/clear_refs", "w").write("5")  # reset the high-water mark
before = status("VmRSS")
scores, ranks = logprobs.target_scores(model, ids, [num // 2, num - num // 2])
print(status("VmHWM") - before)
assert np.isfinite(scores).sum() == num - 2 and ranks.max() <= 151936
"""


@pytest.mark.parametrize("num", [3072, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vocabulary_of_152k_takes_less_than_600_megabytes(tmp_path, dtype, num):
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEMORY, dtype, str(tmp_path), str(num)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 600, done.stdout  # full logits in float32: 1,780 and 4,748 MiB
