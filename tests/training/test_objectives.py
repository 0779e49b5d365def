"""Objectives: what they add up, that weights of 1 change nothing, and that one from outside the package is as good."""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import VOCAB, make_model, make_rows, open_rows, write_kept, write_rows

from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.errors import CheckpointError, ConfigError, DasdError, TrainError
from dasd_lite.model.logprobs import negative_logprobs, target_terms
from dasd_lite.model.row import Row
from dasd_lite.stages.pack import pack
from dasd_lite.stages.train import train
from dasd_lite.training import objectives, trainable
from dasd_lite.training.objectives.objective import Targets

QUICK = {"epochs": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "micro_batch_size": 2, "grad_accum_steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def row(*lengths, weights=None):
    rng = np.random.default_rng(0)
    num = sum(lengths)
    documents = {} if weights is None else {"weight": weights}
    return Row(rng.integers(0, VOCAB, num), rng.random(num) < 0.7, np.array(lengths), (), {}, documents)


def gradient(tiny, objective, data, num_step, chunk_tokens=None):
    model = trainable.load_trainable(tiny, Full(), device="cpu")
    targets, objective = Targets.of(data, num_step, "cpu"), objectives.open_objective(objective)
    terms = target_terms(
        model, data.ids, targets.positions, data.doc_lengths, objective.terms(targets), chunk_tokens=chunk_tokens
    )
    loss, metrics = objective.loss(terms, targets)
    loss.backward()
    return loss.item(), metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


# --- weights ------------------------------------------------------------------------------------------


def test_weighted_is_the_sum_of_each_document_s_loss_times_its_weight(tiny):
    weights = np.array([0.5, 2.0, 0.25], dtype=np.float32)
    data = row(20, 9, 31, weights=weights)
    loss, metrics, whole = gradient(tiny, "weighted", data, 40)
    edges = np.cumsum([0, 20, 9, 31])
    wanted, total = 0.0, 0.0
    for d, weight in enumerate(weights):
        span = slice(edges[d], edges[d + 1])
        alone = Row(data.ids[span], data.loss_mask[span], np.array([edges[d + 1] - edges[d]]), ())
        of_one, _, its = gradient(tiny, "sft", alone, 40)
        wanted, total = wanted + float(weight) * its, total + float(weight) * of_one
    assert loss == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-6)
    assert float(metrics["loss"]) / 40 == pytest.approx(loss, rel=1e-6)
    assert float(metrics["unweighted_loss"]) != pytest.approx(float(metrics["loss"]))


def train_on(rows, tiny, out, objective):
    from safetensors.torch import load_file

    train(rows, tiny, TrainConfig(**QUICK, objective=objective), out=out)
    return load_file(out / "model" / "model.safetensors")


def test_weights_of_1_are_sft_to_the_bit_and_their_scale_does_not_count(tiny, tmp_path):
    plain = write_rows(tmp_path / "plain", make_rows(12))
    ones = write_rows(tmp_path / "ones", [{**r, "weights": [1.0] * 4} for r in make_rows(12)])
    fours = write_rows(tmp_path / "fours", [{**r, "weights": [4.0] * 4} for r in make_rows(12)])
    drawn = np.random.default_rng(0)
    mixed = write_rows(tmp_path / "mixed", [{**r, "weights": drawn.uniform(0.2, 3, 4).tolist()} for r in make_rows(12)])
    sft = train_on(plain, tiny, tmp_path / "sft", "sft")
    with pytest.raises(TrainError) as error:
        train_on(plain, tiny, tmp_path / "none", "weighted")
    assert str(error.value) == (
        f"{plain}: the objective needs the column 'weight', but the rows have no weights; set select.weighting and run"
        " `dasd-lite select` and `dasd-lite pack` again with --force"
    )
    for folder in (ones, fours):
        weighted = train_on(folder, tiny, tmp_path / f"weighted-{folder.name}", "weighted")
        torch.testing.assert_close(weighted, sft, rtol=0, atol=0)
    torch.testing.assert_close(train_on(mixed, tiny, tmp_path / "unread", "sft"), sft, rtol=0, atol=0)
    different = train_on(mixed, tiny, tmp_path / "weighted", "weighted")
    assert max(float((different[name] - sft[name]).abs().max()) for name in sft) > 1e-4


def test_weights_have_mean_1_over_the_target_tokens(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{**r, "weights": rng.uniform(0.1, 5, 4).tolist()} for r in make_rows(9)]
    rows[3]["weights"] = None  # a row without: 1 for each of its documents
    table = open_rows(write_rows(tmp_path / "rows", rows), tmp_path / "m", needs=["weight"])
    total = num_targets = 0.0
    for i in range(9):
        targets = Targets.of(table[i], 1, "cpu")
        total += float(targets.documents["weight"][targets.document].double().sum())
        num_targets += len(targets.positions)
    assert total / num_targets == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]])
def test_weights_that_are_not_one_number_per_document(tmp_path, weights):
    rows = make_rows(3)
    rows[2]["weights"] = weights
    folder = write_rows(tmp_path / "rows", rows)
    with pytest.raises(TrainError, match=r"row 2: weights .* for 4 documents; each document needs one finite number"):
        open_rows(folder, tmp_path / "m", needs=["weight"])
    assert "weight" not in open_rows(folder, tmp_path / "m")[2].documents  # not needed, not read


def test_weights_of_0(tmp_path):
    folder = write_rows(tmp_path / "rows", [{**r, "weights": [0.0] * 4} for r in make_rows(3)])
    with pytest.raises(TrainError, match="weights of all documents are 0, so nothing would be learned"):
        open_rows(folder, tmp_path / "m", needs=["weight"])


# --- an objective from outside the package, with columns and groups ---------------------------------------

GROUPED = '''
"""Importance-weighted policy gradient with the advantage over the mean of a prompt's answers, and a top-2 term."""

import torch
from dasd_lite.model.logprobs import negative_logprobs


class GroupRelative:
    needs = ("reward", "old_logprobs", "top_ids", "teacher_logprobs")
    groups = True

    def per_token(self, logits_CV, target_ids_C, tokens):
        logprobs = -negative_logprobs(logits_CV, target_ids_C)
        ratio = (logprobs - tokens["old_logprobs"]).exp()
        top = logits_CV.float().log_softmax(-1).gather(1, tokens["top_ids"]).exp().sum(-1)
        return torch.stack([ratio, top, logprobs - tokens["teacher_logprobs"]], dim=-1)

    def loss(self, per_token_NT, targets):
        rewards, prompt = targets.documents["reward"], targets.prompt
        zeros = torch.zeros(int(prompt.max()) + 1)
        means = zeros.index_add(0, prompt, rewards) / zeros.index_add(0, prompt, torch.ones_like(rewards))
        advantage = (rewards - means[prompt])[targets.document]
        ratio, top, gap = per_token_NT.unbind(-1)
        total = (-advantage * ratio + 0.5 * (1 - top) + 0.1 * gap**2).sum()
        return total / targets.num_step, {"loss": total.detach(), "top": top.detach().sum()}
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Write modules to a folder that is no part of the package."""
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    written = []

    def write(name, code):
        (folder / f"{name}.py").write_text(code)
        sys.modules.pop(name, None)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def grouped_rollouts(folder):
    """Kept rollouts of seven prompts, their side table and the rollouts they come from."""
    from dasd_lite.data.manifest import identify
    from dasd_lite.data.records import ROLLOUT
    from dasd_lite.data.writer import ShardWriter

    rng = np.random.default_rng(0)
    kept, columns, rollouts = [], [], []
    for p in range(7):
        for i in range(int(rng.integers(2, 4))):
            ids, context = rng.integers(0, VOCAB, int(rng.integers(8, 20))).tolist(), int(rng.integers(2, 6))
            n, uid = len(ids) - context, f"{p}.{i}"
            kept.append({"uid": uid, "prompt_uid": f"q{p}", "ids": ids, "num_context_tokens": context})
            logprobs, old = (np.float32(-rng.random(n)).tolist() for _ in range(2))
            columns.append(
                {
                    "uid": uid,
                    "reward": float(i),
                    "old_logprobs": old,
                    "top_ids": rng.integers(0, VOCAB, (n, 2)).tolist(),
                }
            )
            rollouts.append({"uid": uid, "token_ids": ids[context:], "logprobs": logprobs})
    rng.shuffle(kept)
    with ShardWriter(folder / "sample", identify("sample", 1, {}, {}), {"rollouts": ROLLOUT}) as writer:
        writer.write("rollouts", pa.Table.from_pylist(rollouts, schema=ROLLOUT))
        writer.publish({})
    pq.write_table(pa.Table.from_pylist(columns[::-1]), folder / "columns.parquet")
    return write_kept(folder / "select", kept), kept, columns, rollouts


def by_hand(tiny, kept, columns, rollouts):
    """Loss and gradient of GroupRelative over all rollouts, by plain torch on the full logits of each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    columns, rollouts = ({row["uid"]: row for row in rows} for rows in (columns, rollouts))
    total, num_targets = 0.0, 0
    for prompt in {row["prompt_uid"] for row in kept}:
        answers = [row for row in kept if row["prompt_uid"] == prompt]
        mean = np.mean([columns[row["uid"]]["reward"] for row in answers])
        for answer in answers:
            ids, context, given = torch.tensor(answer["ids"]), answer["num_context_tokens"], columns[answer["uid"]]
            logprobs = model(ids[None]).logits[0].float().log_softmax(-1)[context - 1 : -1]
            of_targets = logprobs.gather(1, ids[context:, None])[:, 0]
            ratio = (of_targets - torch.tensor(given["old_logprobs"])).exp()
            top = logprobs.gather(1, torch.tensor(given["top_ids"])).exp().sum(-1)
            gap = of_targets - torch.tensor(rollouts[answer["uid"]]["logprobs"])
            total += (-(given["reward"] - mean) * ratio + 0.5 * (1 - top) + 0.1 * gap**2).sum()
            num_targets += len(ids) - context
    loss = total / num_targets
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(), num_targets


@pytest.mark.parametrize("joined", [True, False])
def test_columns_and_groups_reach_an_objective_outside_the_package(tiny, tmp_path, outside, joined, monkeypatch):
    from dasd_lite.model import logprobs

    name = f"{outside('grouped', GROUPED)}:GroupRelative"
    monkeypatch.setattr(logprobs, "LOGIT_BYTES", 4 * VOCAB * 7)  # chunks of 7 positions
    select, kept, columns, rollouts = grouped_rollouts(tmp_path)
    rows = pack(
        select,
        out=tmp_path / "pack",
        rollouts=tmp_path / "sample",
        objective=name,
        seq_len=60,
        columns=tmp_path / "columns.parquet",
    )
    assert rows.counts["rows"] >= 4
    sizes = [rows.counts["rows"], 1]  # all rows in one step, side by side or one after another
    options = QUICK | dict(zip(("micro_batch_size", "grad_accum_steps"), sizes[:: 1 if joined else -1], strict=True))
    out = tmp_path / "train"
    trained = train(rows, tiny, out=out, objective=name, max_steps=2, **options)
    (first, second) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    loss, grad_norm, num_targets = by_hand(tiny, kept, columns, rollouts)
    assert first["loss"] == pytest.approx(loss, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
    assert first["target_tokens"] == num_targets == second["target_tokens"]
    assert second["loss"] != first["loss"] and 0 < first["top"] < 1

    # The recipe's way of naming it is the same training run; other code is not.
    assert train(rows, tiny, TrainConfig(**options, objective=name), out=out, max_steps=2) == trained
    outside("grouped", GROUPED.replace("0.1 *", "0.2 *"))
    with pytest.raises(CheckpointError, match="objective has changed"):
        train(rows, tiny, out=out, objective=name, max_steps=2, **options)


def test_the_objective_in_the_documentation(tiny, tmp_path, outside):
    blocks = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8").split("```")
    (code,) = (block.removeprefix("python\n") for block in blocks if "class GroupRelative" in block)
    name, columns = f"{outside('grouped', code)}:GroupRelative", tmp_path / "columns.parquet"
    select, kept, given, _ = grouped_rollouts(tmp_path)
    rows = pack(select, out=tmp_path / "pack", objective=name, seq_len=60, columns=columns)
    options = {"micro_batch_size": 1, "grad_accum_steps": rows.counts["rows"], "max_steps": 1}
    done = train(rows, tiny, out=tmp_path / "train", objective=name, **options)
    model, total, num_targets = transformers.AutoModelForCausalLM.from_pretrained(tiny), 0.0, 0
    given = {row["uid"]: row for row in given}
    for answer in kept:
        rewards = [given[row["uid"]]["reward"] for row in kept if row["prompt_uid"] == answer["prompt_uid"]]
        ids, context, row = torch.tensor(answer["ids"]), answer["num_context_tokens"], given[answer["uid"]]
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)[context - 1 : -1].gather(1, ids[context:, None])[:, 0]
        ratios = (logprobs - torch.tensor(row["old_logprobs"])).exp()
        total -= (row["reward"] - np.mean(rewards)) * float(ratios.sum())
        num_targets += len(ids) - context
    assert done.counts["first_step_loss"] == pytest.approx(total / num_targets, rel=1e-4)


def test_rows_that_lack_what_the_objective_needs_are_refused(tiny, tmp_path, outside):
    select, *_ = grouped_rollouts(tmp_path)
    outside("grouped", GROUPED)
    plain = pack(select, out=tmp_path / "plain", seq_len=60)
    with pytest.raises(TrainError) as error:
        train(plain, tiny, out=tmp_path / "train", objective="grouped:GroupRelative")
    assert str(error.value) == (
        f"{tmp_path / 'plain'}: the objective needs the column 'reward', which the rows lack; run `dasd-lite pack`"
        " again with --force"
    )
    outside("groups", GROUPED.replace('needs = ("reward"', 'needs = (); other = ("reward"'))
    with pytest.raises(TrainError, match="needs all answers of a prompt in one row, and these rows were packed"):
        train(plain, tiny, out=tmp_path / "train", objective="groups:GroupRelative")
    assert not (tmp_path / "train").exists()


def write_columns(folder, **changes):
    """Rows with a reward and a prompt per document and an old log-probability per target token; changed in row 1."""
    rows = make_rows(3)
    for r, data in enumerate(rows):
        data |= {"doc:reward": [1.0, 2.0, 3.0, 4.0], "doc:prompt": [3 * r, 3 * r + 1, 3 * r + 1, 3 * r + 2]}
        data["token:old"] = [-0.5] * sum(data["loss_mask"])
    rows[1] |= {name.replace("_", ":"): value for name, value in changes.items()}
    fields = [("doc:reward", pa.list_(pa.float32())), ("doc:prompt", pa.list_(pa.int64()))]
    return write_rows(folder, rows, extra=[*fields, ("token:old", pa.large_list(pa.float32()))])


def test_columns_of_rows_are_read_back(tmp_path):
    folder = write_columns(tmp_path / "rows")
    table = open_rows(folder, tmp_path / "m", needs=["old", "reward"], groups=True)
    joined = Row.join([table[1], table[2]])
    targets = Targets.of(joined, 1, "cpu")
    assert targets.num_documents == 8 and targets.documents["reward"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert targets.prompt.tolist() == [0, 1, 1, 2, 3, 4, 4, 5]
    assert targets.tokens["old"].tolist() == [-0.5] * joined.num_targets
    assert targets.tokens["old"].dtype == targets.documents["reward"].dtype == torch.float32
    bare = Targets.of(open_rows(folder, tmp_path / "m")[1], 1, "cpu")
    assert (bare.tokens, bare.documents, bare.prompt) == ({}, {}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_reward": [1.0]}, r"row 1: column 'doc:reward' has 1 values for 4 documents; they must be equally many"),
        ({"doc_reward": None}, r"row 1: column 'doc:reward' has 0 values for 4 documents"),
        ({"doc_reward": [1.0, None, 1.0, 1.0]}, r"row 1: column 'doc:reward' has nan; it must be finite"),
        ({"token_old": [-0.5]}, r"row 1: column 'token:old' has 1 values for \d+ target tokens; they must be equally"),
        ({"doc_prompt": [3, 4, 4, 2]}, r"but prompt 2 is in rows 0 and 1; run `dasd-lite pack` again with --force"),
    ],
)
def test_columns_of_rows_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder = write_columns(tmp_path / "rows", **changes)
    with pytest.raises(TrainError, match=message) as error:
        open_rows(folder, tmp_path / "m", needs=["old", "reward"], groups=True)
    assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)


# --- what objectives may be, and what is refused ----------------------------------------------------------


def pairs_loss(per_token_N, targets):
    """−log sigmoid of the difference of two documents' log-probabilities: a preference pair."""
    sums = torch.zeros(targets.num_documents).index_add(0, targets.document, -per_token_N)
    loss = -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2]).sum()
    return loss / targets.num_step, {"loss": loss.detach()}


class Pairs:
    """An objective of whole answers."""

    @staticmethod
    def per_token(logits_CV, target_ids_C, tokens):
        return negative_logprobs(logits_CV, target_ids_C)

    @staticmethod
    def loss(per_token_N, targets):
        return pairs_loss(per_token_N, targets)


class Tail:
    """−log p of the target and the probability of the likeliest tokens together: two terms a token."""

    def __init__(self, num=4):
        self.num = num

    def per_token(self, logits_CV, target_ids_C, tokens):
        top = logits_CV.softmax(-1).topk(self.num).values.sum(-1)
        return torch.stack([negative_logprobs(logits_CV, target_ids_C), top], dim=-1)

    def loss(self, per_token_N, targets):
        return (per_token_N[:, 0] * (1 - per_token_N[:, 1])).sum(), {"loss": per_token_N[:, 0].detach().sum()}


@pytest.mark.parametrize("objective", [Pairs, Pairs(), Tail, Tail(3)])
def test_an_objective_is_the_same_with_the_logits_in_chunks(tiny, objective):
    data = row(20, 19, 22, 24)
    whole, chunked = (gradient(tiny, objective, data, 2, chunk) for chunk in (None, 7))
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5) and whole[0] > 0
    torch.testing.assert_close(chunked[2], whole[2], rtol=1e-3, atol=1e-5)


def test_an_objective_is_a_module_a_class_or_an_object(outside):
    outside("plain", "needs = ['a', 'b']\ndef per_token(logits, ids, tokens): ...\ndef loss(per_token, targets): ...")
    module = objectives.open_objective(importlib.import_module("plain"))
    assert (module.name, module.needs, module.groups) == ("plain", ("a", "b"), False)
    outside("grouped", GROUPED)
    by_name = objectives.open_objective("grouped:GroupRelative")
    assert (by_name.name, by_name.groups, len(by_name.needs)) == ("grouped:GroupRelative", True, 4)
    assert objectives.open_objective(importlib.import_module("grouped").GroupRelative).code == by_name.code
    assert objectives.open_objective(by_name) is by_name
    assert objectives.open_objective("sft").code is None
    # What an object was made with changes what it trains.
    three, four = objectives.open_objective(Tail(3)), objectives.open_objective(Tail(4))
    assert three.code != four.code and four.code == objectives.open_objective(Tail()).code
    assert three.name == f"{__name__}:Tail"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "unknown",
            None,
            r"train.objective = 'unknown': it must be sft, weighted, or code of your own as package.module:",
        ),
        (
            "nowhere:Loss",
            None,
            r"train.objective = 'nowhere:Loss': the objective cannot be imported \(ModuleNotFoundErr",
        ),
        ("mine:Loss", "x = 1", r"train.objective = 'mine:Loss': module 'mine' has no attribute 'Loss'"),
        ("mine:Loss", "class Loss: pass", r"mine:Loss has no function per_token\(logits_CV, target_ids_C, tokens\)"),
        (
            "mine:Loss",
            "class Loss:\n def __init__(self, beta): pass",
            r"mine:Loss\(beta\) cannot be a class of an objective; i",
        ),
        (
            "mine:Loss",
            "def Loss(a, b): pass",
            r"mine:Loss has no function per_token\(logits_CV, target_ids_C, tokens\)",
        ),
        (
            "mine:Loss",
            "class Loss:\n def per_token(self, logits): pass\n def loss(self, a, b): pass",
            r"mine:Loss.per_token\(logits\) cannot be a function per_token; it is called with \(logits_CV, tar",
        ),
        (
            "mine:Loss",
            "class Loss:\n def per_token(self, a, b, c): pass\n def loss(self, a): pass",
            r"mine:Loss.loss\(a\) cannot be a function loss; it is called with \(per_token_N, targets\)",
        ),
        (
            "mine:Loss",
            "class Loss:\n needs = 'reward'\n def per_token(self, a, b, c): pass\n def loss(self, a, b): pass",
            r"mine:Loss has needs = 'reward'; it must be a list of column names",
        ),
        (
            "mine:Loss",
            "class Loss:\n groups = 2\n def per_token(self, a, b, c): pass\n def loss(self, a, b): pass",
            r"mine:Loss has groups = 2; it must be True or False",
        ),
    ],
)
def test_what_is_no_objective_is_refused_when_it_is_loaded(outside, name, code, message):
    if code is not None:
        outside("mine", code)
    with pytest.raises(ConfigError, match=message) as error:
        objectives.open_objective(name)
    assert "\n" not in str(error.value)


def sums(per_token_N, targets):
    return per_token_N.sum() / targets.num_step, {"loss": per_token_N.detach().sum()}


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"per_token": lambda x, ids, t: x}, None),
        (
            {"per_token": lambda x, ids, t: x[1:]},
            r"per_token returned a tensor of shape \[\d+, 61\] and float32; it must",
        ),
        (
            {"per_token": lambda x, ids, t: x.sum()},
            r"per_token returned a tensor of shape \[\] and float32; it must be",
        ),
        (
            {"per_token": lambda x, ids, t: [0.0]},
            r"per_token returned a list; it must be a tensor of shape \[\d+\] or \[",
        ),
        (
            {"loss": lambda x, t: x.sum()},
            r"loss returned a tensor of shape \[\] and float32; it must be \(loss, metrics\)",
        ),
        (
            {"loss": lambda x, t: (x, {"loss": 0.0})},
            r"its loss is a tensor of shape \[\d+\] and float32; it must be a ten",
        ),
        (
            {"loss": lambda x, t: (x.sum().detach(), {"loss": 0.0})},
            r"its loss is a tensor of shape \[\] and float32 without",
        ),
        (
            {"loss": lambda x, t: (0.5, {"loss": 0.0})},
            r"its loss is a float; it must be a tensor of shape \[\] with a grad",
        ),
        (
            {"loss": lambda x, t: (x.sum() / t.num_step, {"loss": 0.0, "step": 1.0})},
            "its metric 'step' has the name of a figure of every step",
        ),
        ({"loss": lambda x, t: t.documents["reward"]}, r"failed: KeyError: 'reward' \(\S+test_objectives\.py:\d+\)"),
        ({"loss": lambda x, t: (x.sum(), {})}, r"its metrics are \[\]; they must be a mapping that has 'loss'"),
        ({"loss": lambda x, t: (x.sum(), {"kl": 0.0})}, r"its metrics are \['kl'\]; they must be a mapping that has"),
        ({"loss": lambda x, t: (x.sum(), [0.0])}, r"its metrics are a list; they must be a mapping that has"),
        (
            {"loss": lambda x, t: (x.sum(), {"loss": 0.0, "kl": x})},
            r"its metric 'kl' is a tensor of shape \[\d+\] and floa",
        ),
    ],
)
def test_what_an_objective_returns_is_checked(tiny, tmp_path, functions, message):
    objective = types.SimpleNamespace(
        **{"per_token": lambda x, ids, t: negative_logprobs(x, ids), "loss": sums} | functions
    )
    rows = write_rows(tmp_path / "rows", make_rows(4))
    options = QUICK | {"epochs": 1}
    if message is None:
        assert train(rows, tiny, out=tmp_path / "out", objective=objective, **options).counts["steps"] == 1
        return
    with pytest.raises(DasdError, match=f"objective types:SimpleNamespace:? {message}") as error:
        train(rows, tiny, out=tmp_path / "out", objective=objective, **options)
    assert "\n" not in str(error.value)
