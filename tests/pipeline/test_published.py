"""examples/published.toml on a look-alike of the published data, from its files to a trained student."""

import math
from itertools import pairwise
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
from tests.published import CASES, Published, write_published

from dasd_lite.chat.chat import Chat
from dasd_lite.data.dataset import read_table
from dasd_lite.data.manifest import read_manifest

EXAMPLE = Path(__file__).parents[2] / "examples" / "published.toml"
ALIGNED = {Published.uuid(case) for case in CASES if case.becomes == "aligned"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, cli) -> tuple[Path, Published]:
    folder = tmp_path_factory.mktemp("published")
    published = write_published(folder)
    copy(EXAMPLE, folder / "run.toml")
    small = ["pack.seq_len=512", "train.grad_accum_steps=1", "train.micro_batch_size=1", "train.method.rank=4"]
    options = [
        "out=run",
        "student.model=demo:student",
        f"ingest.paths=['{published.sft}']",
        f"ingest.logprobs=['{published.logprobs}']",
        f"ingest.tokenizer={published.tokenizer}",
        *small,
    ]
    ended = cli("run", "run.toml", *options, cwd=folder)
    assert ended.rc == 0, ended.stderr
    assert f"{len(CASES) - len(ALIGNED)} are left out" in " ".join(ended.stderr.split())
    assert f"{len(ALIGNED)} with log-probabilities" in ended.stdout
    checked = cli("check", "run.toml", *options, "--until", "models", cwd=folder)
    assert checked.rc == 0, checked.stderr
    return folder / "run" / "stage1", published


def test_every_stage_passes_its_answers_on(run):
    stage1, _ = run
    ingested, scores = (
        read_table(stage1 / stage, table) for stage, table in (("ingest", "rollouts"), ("score", "scores"))
    )
    assert set(ingested["uid"].to_pylist()) == set(scores["uid"].to_pylist()) == ALIGNED
    counts = read_manifest(stage1 / "select")["counts"]
    # "never closed" has no answer; two answers are to one question, of which one is kept.
    assert (counts["rollouts"], counts["kept"]) == (len(ALIGNED), len(ALIGNED) - 2)
    assert read_manifest(stage1 / "pack")["counts"]["rollouts"] == counts["kept"]
    assert (stage1 / "train" / "model" / "model.safetensors").exists()


def test_p_of_the_teacher_by_hand(run):
    """exp of the mean log-probability of the tokens ` Wait`, `,`, ` is`, ` it`, ` `, `7`, `?`, as the set has them."""
    stage1, published = run
    (case,) = (case for case in CASES if case.name == "channels")
    uuid = published.uuid(case)
    chat, given = Chat(published.tokenizer), published.rows[uuid]
    pieces = [chat.piece(i).decode() for i in given["token_ids"]]
    first, after = pieces.index(" Wait"), pieces.index(" Yes")
    assert pieces[first:after] == [" Wait", ",", " is", " it", " ", "7", "?"]
    expected = math.exp(sum(given["logprobs"][first:after]) / (after - first))

    (row,) = (row for row in read_table(stage1 / "score", "scores").to_pylist() if row["uid"] == uuid)
    raw = case.output.encode()
    sentences = [raw[a:b].decode() for a, b in pairwise([0, *row["sentence_ends"]])]
    assert [s.strip() for s in sentences] == [
        *("<think>", "We need 3+4.", "Wait, is it 7?", "Yes, 7.", "</think>", "The sum is 7."),
    ]
    assert row["p_teacher"][2] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(row["p_teacher"][0]), "no token of the set has the <think>"
    final = pieces.index("The")
    answer = given["logprobs"][final:-1]
    assert row["p_teacher"][5] == pytest.approx(math.exp(sum(answer) / len(answer)), rel=1e-6), "the end is no part"
    message = given["logprobs"][final - 1]
    assert row["p_teacher"][4] == pytest.approx(math.exp(message), rel=1e-6), "<|message|> stands for </think>"
    spelling = len(given["logprobs"]) - 1
    assert row["teacher_mean_logprob"] == pytest.approx(sum(given["logprobs"][:-1]) / spelling)
