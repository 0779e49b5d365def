"""Objectives: what they sum up, that weights of 1 change nothing, and that a new one is a file."""

import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import VOCAB, make_model, make_rows, write_rows

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.errors import TrainError
from dasd_lite.model.logprobs import negative_logprobs, target_terms
from dasd_lite.model.row import Row
from dasd_lite.stages import train
from dasd_lite.training import objectives, trainable
from dasd_lite.training.objectives import Targets
from dasd_lite.training.rows import open_rows

QUICK = {"epochs": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "micro_batch_size": 2, "grad_accum_steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def row(*lengths, weights=None):
    rng = np.random.default_rng(0)
    num = sum(lengths)
    return Row(rng.integers(0, VOCAB, num), rng.random(num) < 0.7, np.array(lengths), (), weights)


def gradient(tiny, objective, data, num_step, chunk_tokens=None):
    model = trainable.load_trainable(tiny, Full(), device="cpu")
    targets = Targets.of(data, num_step, "cpu")
    terms = target_terms(
        model, data.ids, targets.positions, data.doc_lengths, objective.terms, chunk_tokens=chunk_tokens
    )
    loss, metrics = objective.loss(terms, targets)
    loss.backward()
    return loss.item(), metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_weighted_is_the_sum_of_each_document_s_loss_times_its_weight(tiny):
    weights = np.array([0.5, 2.0, 0.25], dtype=np.float32)
    data = row(20, 9, 31, weights=weights)
    loss, metrics, found = gradient(tiny, objectives.load("weighted"), data, 40)
    edges = np.cumsum([0, 20, 9, 31])
    wanted, total = 0.0, 0.0
    for d, weight in enumerate(weights):
        span = slice(edges[d], edges[d + 1])
        alone = Row(data.ids[span], data.loss_mask[span], np.array([edges[d + 1] - edges[d]]), ())
        of_one, _, its = gradient(tiny, objectives.load("sft"), alone, 40)
        wanted, total = wanted + float(weight) * its, total + float(weight) * of_one
    assert loss == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(metrics["loss"]) / 40 == pytest.approx(loss, rel=1e-6)
    assert float(metrics["unweighted_loss"]) != pytest.approx(float(metrics["loss"]))


def train_on(rows, tiny, out, objective):
    from safetensors.torch import load_file

    train.run(rows, tiny, TrainConfig(**QUICK, objective=objective), out, seed=0)
    return load_file(out / "model" / "model.safetensors")


def test_weights_of_1_are_sft_to_the_bit_and_their_scale_does_not_count(tiny, tmp_path):
    plain = write_rows(tmp_path / "plain", make_rows(12))
    ones = write_rows(tmp_path / "ones", [{**r, "weights": [1.0] * 4} for r in make_rows(12)])
    fours = write_rows(tmp_path / "fours", [{**r, "weights": [4.0] * 4} for r in make_rows(12)])
    drawn = np.random.default_rng(0)
    mixed = write_rows(tmp_path / "mixed", [{**r, "weights": drawn.uniform(0.2, 3, 4).tolist()} for r in make_rows(12)])
    sft = train_on(plain, tiny, tmp_path / "sft", "sft")
    with pytest.raises(TrainError, match=r"objective = 'weighted', but .* rows have no weights"):
        train_on(plain, tiny, tmp_path / "none", "weighted")
    for folder in (ones, fours):
        found = train_on(folder, tiny, tmp_path / f"weighted-{folder.name}", "weighted")
        torch.testing.assert_close(found, sft, rtol=0, atol=0)
    torch.testing.assert_close(train_on(mixed, tiny, tmp_path / "unread", "sft"), sft, rtol=0, atol=0)
    different = train_on(mixed, tiny, tmp_path / "weighted", "weighted")
    assert max(float((different[name] - sft[name]).abs().max()) for name in sft) > 1e-4


def test_weights_have_mean_1_over_the_target_tokens(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{**r, "weights": rng.uniform(0.1, 5, 4).tolist()} for r in make_rows(9)]
    rows[3]["weights"] = None  # a row without: 1 for each of its documents
    table = open_rows(write_rows(tmp_path / "rows", rows), tmp_path / "m", vocab_size=VOCAB, max_positions=None)
    total = targets = 0.0
    for i in range(9):
        found = Targets.of(table[i], 1, "cpu")
        total += float(found.weights[found.document].double().sum())
        targets += len(found.positions)
    assert total / targets == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]])
def test_weights_that_are_none(tmp_path, weights):
    rows = make_rows(3)
    rows[2]["weights"] = weights
    folder = write_rows(tmp_path / "rows", rows)
    with pytest.raises(TrainError, match=r"row 2: weights .* for 4 documents"):
        open_rows(folder, tmp_path / "m", vocab_size=VOCAB, max_positions=None)


def test_weights_of_0(tmp_path):
    folder = write_rows(tmp_path / "rows", [{**r, "weights": [0.0] * 4} for r in make_rows(3)])
    with pytest.raises(TrainError, match="weights of all documents are 0"):
        open_rows(folder, tmp_path / "m", vocab_size=VOCAB, max_positions=None)


def pairs_loss(terms_N, targets):
    """−log sigmoid of the difference of two documents' log-probabilities: a preference pair."""
    sums = torch.zeros(len(targets.weights)).index_add(0, targets.document, -terms_N)
    loss = -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2]).sum()
    return loss / targets.num_step, {"loss": loss.detach()}


def top_k_terms(logits_CV, target_ids_C, at):
    """−log p of the target and the probability that the four likeliest tokens have together: two terms a token."""
    top = logits_CV.softmax(-1).topk(4).values.sum(-1)
    return torch.stack([negative_logprobs(logits_CV, target_ids_C, at), top], dim=-1)


def test_a_new_objective_is_a_module(tiny, monkeypatch):
    """Of whole answers in pairs, and of more than the target's probability: the same with the logits in chunks."""
    module = types.ModuleType("dasd_lite.training.objectives.pairs")
    module.terms, module.loss = negative_logprobs, pairs_loss
    monkeypatch.setitem(sys.modules, module.__name__, module)
    data = row(20, 19, 22, 24)
    whole, chunked = (gradient(tiny, objectives.load("pairs"), data, 2, chunk) for chunk in (None, 7))
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5) and whole[0] > 0
    torch.testing.assert_close(chunked[2], whole[2], rtol=1e-3, atol=1e-5)

    tail = types.ModuleType("dasd_lite.training.objectives.tail")
    tail.terms = top_k_terms
    tail.loss = lambda terms, targets: ((terms[:, 0] * (1 - terms[:, 1])).sum(), {"loss": terms[:, 0].detach().sum()})
    monkeypatch.setitem(sys.modules, tail.__name__, tail)
    whole, chunked = (gradient(tiny, objectives.load("tail"), data, 2, chunk) for chunk in (None, 7))
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(chunked[2], whole[2], rtol=1e-3, atol=1e-5)
