"""Packed attention: documents that do not see each other, how they are put side by side, sliding windows."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from tests.model.tiny import VOCAB, documents, full_logprobs, random_model, random_row

from dasd_lite.model import logprobs
from dasd_lite.model.attention import Documents
from dasd_lite.model.load import load_model


def test_a_neighbor_cannot_leak(packed_model):
    one, other = random_row(50, 61, 200, 55), random_row(50, 61, 200, 55)
    second = documents(one)[1]
    other.ids[second] = (one.ids[second] + 1) % VOCAB
    a, b = (logprobs.target_logprobs(packed_model, r.ids, r.doc_lengths) for r in (one, other))
    outside = np.ones(len(a), dtype=bool)
    outside[second] = False
    np.testing.assert_array_equal(a[outside], b[outside])  # to the bit
    assert (np.abs(a - b)[second][1:] > 1e-3).mean() > 0.9
    # A change affects the tokens after it, and none before it.
    later = random_row(50, 61, 200, 55)
    later.ids[second.start + 30] += 1
    later.ids[second.start + 30] %= VOCAB
    c = logprobs.target_logprobs(packed_model, later.ids, later.doc_lengths)
    np.testing.assert_array_equal(a[second][1:30], c[second][1:30])
    assert (a[second][31:] != c[second][31:]).all()


def test_plan_of_documents_covers_each_token_once():
    rng = np.random.default_rng(1)
    for case in range(60):
        lengths = rng.integers(1, [3, 30, 200, 3000][case % 4], rng.integers(1, 60))
        plan = Documents.of(lengths)
        num = int(lengths.sum())
        assert sum(n for n, _ in plan.groups) == len(lengths)
        assert plan.position_ids[0].tolist() == [i for n in lengths for i in range(n)]
        if plan.to_padded is None:
            assert sum(n * length for n, length in plan.groups) == num
            continue
        assert len(plan.to_padded) <= 2 * num
        assert plan.to_padded[plan.to_row].tolist() == list(range(num))
        document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        slot = 0
        for number, length in plan.groups:  # every padded line holds one document only
            for _ in range(number):
                assert len(set(document[plan.to_padded[slot : slot + length]].tolist())) == 1
                slot += length


def test_sliding_window_layers(tmp_path):
    folder = random_model(tmp_path / "m", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    model, plain = (load_model(folder, device="cpu", attention=a) for a in ("dasd_packed", "sdpa"))
    assert "sliding_attention" in model.config.layer_types
    data = random_row(60, 12, 45)
    packed = logprobs.target_logprobs(model, data.ids, data.doc_lengths)
    np.testing.assert_allclose(packed, full_logprobs(plain, data), atol=1e-5)


def test_a_model_with_another_attention_reads_one_document_at_a_time(packed_model, plain_model):
    ids, lengths = np.arange(60) % 90, [20, 3, 19, 18]
    apart = logprobs.target_logprobs(plain_model, ids, lengths)
    np.testing.assert_allclose(apart, logprobs.target_logprobs(packed_model, ids, lengths), atol=2e-6)
