"""Scoring by student and teacher, with transformers, vLLM, and a server; answers that are too long to score."""

import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import Endpoint, Transformers, Vllm
from dasd_lite.config.stages import IngestConfig, RecipeConfig, SampleConfig, ScoreConfig, SelectConfig
from dasd_lite.data.dataset import batches
from dasd_lite.data.manifest import read_manifest, read_timing
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import ROLLOUT
from dasd_lite.errors import ConfigError, DataError, EndpointError
from dasd_lite.inference.scorer import context_of, open_scorer
from dasd_lite.model import load as student
from dasd_lite.run.pipeline import plan
from dasd_lite.stages import ingest, sample, score, select

BY_TEACHER = ScoreConfig(by="teacher")


def rows_of(folder, table):
    return [row for batch in batches(folder, table) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def models(demo):
    """The demo's student and teacher, in float32; they have different tokenizers."""
    return [Transformers(model=str(demo / name), dtype="float32") for name in ("student", "teacher")]


@pytest.fixture(scope="module")
def sampled(demo, models, tmp_path_factory):
    """24 answers of the teacher, some of them truncated."""
    out = tmp_path_factory.mktemp("sampled") / "sample"
    prompts = read_prompts(demo / "train.jsonl", limit=12)
    sample.sample(prompts, models[1], SampleConfig(num_samples=2, max_tokens=90), out=out, seed=0)
    return out


@pytest.fixture(scope="module")
def texts(sampled, tmp_path_factory):
    """The same answers as plain text."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [
        {"uid": f"{row['prompt_uid']}.{row['index']}", "messages": row["messages"]} | {"answer": row["answer"]}
        for row in rows_of(sampled, "rollouts")
    ]
    for line, row in zip(lines, rows_of(sampled, "rollouts"), strict=True):
        line["messages"] = [*row["messages"], {"role": "assistant", "content": row["completion"]}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ingest.ingest(config=IngestConfig(paths=[folder / "a.jsonl"]), out=folder / "ingest")
    return folder / "ingest"


@pytest.fixture(scope="module")
def scored(sampled, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "score"
    score.score(sampled, models[0], ScoreConfig(batch_tokens=300), out=out)
    return rows_of(out, "scores")


# --- the stage ------------------------------------------------------------------------------------------


def test_sums_cover_the_answer_and_its_end_token(scored, demo):
    plain = student.load_model(demo / "student", dtype="float32", attention="sdpa")
    for row in scored[:6]:
        ids, first = torch.tensor(row["ids"]), row["num_context_tokens"]
        with torch.inference_mode():
            logprobs = plain(input_ids=ids[None]).logits[0, first - 1 : -1].double().log_softmax(-1)
        values = logprobs.gather(1, ids[first:, None])
        ranks = 1 + (logprobs > values).sum(-1)
        assert row["surprisal_sum"] == pytest.approx(-values.sum().item(), abs=1e-3)
        assert row["rank_sum"] == pytest.approx(ranks.clamp(max=100).sum().item(), abs=2)
        assert row["student_mean_logprob"] == pytest.approx(values[:-1].mean().item(), abs=1e-4)


def test_small_batches_and_one_large_batch_give_the_same_scores(scored, sampled, models, tmp_path):
    score.score(sampled, models[0], ScoreConfig(batch_tokens=100_000, chunk_tokens=7), out=tmp_path / "score")
    for one, other in zip(rows_of(tmp_path / "score", "scores"), scored, strict=True):
        assert one["uid"] == other["uid"]
        np.testing.assert_allclose(one["p_student"], other["p_student"], atol=1e-5)
        assert one["surprisal_sum"] == pytest.approx(other["surprisal_sum"], abs=1e-3)


def test_the_teacher_scores_its_own_samples(scored, sampled, models, tmp_path, capsys):
    manifest = score.score(sampled, models[0], BY_TEACHER, out=tmp_path / "score", teacher=models[1]).manifest
    assert manifest["counts"] == {"rollouts": 24, "over_context": 0}
    rollouts = rows_of(sampled, "rollouts")
    for row, read in zip(rollouts, rows_of(tmp_path / "score" / "teacher", "readings"), strict=True):
        assert read["uid"] == row["uid"]
        assert (read["token_ids"], read["token_bytes"]) == (row["token_ids"], row["token_bytes"])
        np.testing.assert_allclose(read["logprobs"], row["logprobs"], atol=1e-4)
    for one, other in zip(rows_of(tmp_path / "score", "scores"), scored, strict=True):
        np.testing.assert_allclose(one["p_teacher"], other["p_teacher"], atol=1e-4)
        np.testing.assert_allclose(one["p_student"], other["p_student"], atol=1e-5)
        assert one["num_teacher_tokens"] == other["num_teacher_tokens"]
    timing = read_timing(tmp_path / "score")
    assert timing["sampling_noise_tokens"] == sum(len(row["logprobs"]) for row in rollouts)
    assert 0 < timing["sampling_noise_mean"] < timing["sampling_noise_largest"] < 1e-4
    assert "noise between sampling and scoring by the teacher" in capsys.readouterr().out


def test_the_teacher_scores_text_without_log_probabilities(scored, sampled, texts, models, tmp_path, capsys):
    score.score(texts, models[0], BY_TEACHER, out=tmp_path / "score", teacher=models[1])
    finished = [row["finish_reason"] == "stop" for row in rows_of(sampled, "rollouts")]
    assert 5 < sum(finished) < 24
    same_tokens = 0
    rollouts = rows_of(sampled, "rollouts")
    read = rows_of(tmp_path / "score" / "teacher", "readings")
    for one, other, row, reading in zip(rows_of(tmp_path / "score", "scores"), scored, rollouts, read, strict=True):
        assert one["sentence_ends"] == other["sentence_ends"]
        np.testing.assert_allclose(one["p_student"], other["p_student"], atol=1e-5)
        assert reading["token_bytes"][-1] == 0  # the end token spells nothing
        num_text_tokens = len(row["token_ids"]) - (row["finish_reason"] == "stop")
        if reading["token_ids"][:-1] == row["token_ids"][:num_text_tokens]:  # tokenized as sampled
            same_tokens += 1
            np.testing.assert_allclose(one["p_teacher"], other["p_teacher"], atol=1e-4)
    assert same_tokens > 12
    assert "noise" not in capsys.readouterr().out  # there are no earlier log-probabilities
    select.select(
        texts,
        models[0].model,
        SelectConfig(require_think=False, max_duplicate_lines=1.0, max_duplicate_sentences=1.0),
        out=tmp_path / "select",
        seq_len=512,
        seed=0,
        scores=tmp_path / "score",
    )


def test_a_teacher_other_than_the_one_that_sampled_is_refused(sampled, models, tmp_path):
    with pytest.raises(DataError, match=r"sampled from another teacher than .*student; score must use the same one"):
        score.score(sampled, models[0], BY_TEACHER, out=tmp_path / "score", teacher=models[0])
    with pytest.raises(ConfigError, match=r"no \[teacher\] table"):
        score.score(sampled, models[0], BY_TEACHER, out=tmp_path / "score")
    assert not (tmp_path / "score").exists()


def test_interrupted_scoring_by_the_teacher_resumes(sampled, models, tmp_path, monkeypatch):
    read, count = score._numbers, 0

    def stop(cell):
        nonlocal count
        count += 1
        if count == 45:
            raise KeyboardInterrupt
        return read(cell)

    monkeypatch.setattr(score, "_numbers", stop)
    small = ScoreConfig(by="teacher", batch_tokens=16)
    with pytest.raises(KeyboardInterrupt):
        score.score(sampled, models[0], small, out=tmp_path / "score", teacher=models[1])
    monkeypatch.undo()
    assert (tmp_path / "score" / "teacher" / "unfinished.json").exists()
    score.score(sampled, models[0], small, out=tmp_path / "score", teacher=models[1])
    assert [row["uid"] for row in rows_of(tmp_path / "score", "scores")] == [
        row["uid"] for row in rows_of(sampled, "rollouts")
    ]
    assert read_manifest(tmp_path / "score" / "teacher")["stage"] == "score.teacher"


def shortened(model, folder, context):
    shutil.copytree(model.model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    return model.model_copy(update={"model": str(folder)})


def test_answers_over_the_context_of_the_student_are_counted_and_rejected_by_select(sampled, models, tmp_path):
    lengths = sorted(len(row["ids"]) for row in rows_of_scores(sampled, models, tmp_path))
    small = shortened(models[0], tmp_path / "small", lengths[-5])
    over = sum(length > lengths[-5] for length in lengths)
    manifest = score.score(sampled, small, ScoreConfig(), out=tmp_path / "score").manifest
    assert manifest["counts"] == {"rollouts": 24, "over_context": over} and over > 0
    for row in rows_of(tmp_path / "score", "scores"):
        too_long = len(row["ids"]) > lengths[-5]
        assert too_long == (row["surprisal_sum"] is None) == (row["rank_sum"] is None)
        assert too_long == (row["student_mean_logprob"] is None)
        assert not too_long or np.isnan(row["p_student"]).all()
        assert np.isfinite(row["p_teacher"]).any()
    options = {"require_think": False, "max_duplicate_lines": 1.0, "max_duplicate_sentences": 1.0, "keep": 2}
    chosen = select.select(
        sampled,
        small.model,
        SelectConfig(**options),
        out=tmp_path / "select",
        seq_len=10_000,
        seed=0,
        scores=tmp_path / "score",
    ).manifest
    rejected = chosen["counts"]["rejected"]
    assert rejected.get("too long", 0) + rejected.get("truncated", 0) >= over


def rows_of_scores(sampled, models, folder):
    score.score(sampled, models[0], ScoreConfig(), out=folder / "all")
    return rows_of(folder / "all", "scores")


def test_an_answer_over_the_context_of_the_teacher_is_named(texts, models, tmp_path):
    small = shortened(models[1], tmp_path / "small", 60)
    with pytest.raises(
        DataError, match=r"rollout \S+ has \d+ tokens; with its prompt it exceeds the teacher's context"
    ) as error:
        score.score(texts, models[0], BY_TEACHER, out=tmp_path / "score", teacher=small)
    assert "\n" not in str(error.value)


def test_scoring_in_four_bits(scored, sampled, models, tmp_path):
    score.score(sampled, models[0], ScoreConfig(four_bit=True), out=tmp_path / "score")
    gaps = [
        np.abs(np.subtract(one["p_student"], other["p_student"]))
        for one, other in zip(rows_of(tmp_path / "score", "scores"), scored, strict=True)
    ]
    assert 1e-5 < np.nanmean(np.concatenate(gaps)) < 0.1  # the quantized weights differ, but not by much
    with pytest.raises(ValueError, match="four_bit = true needs engine = 'transformers'"):
        ScoreConfig(four_bit=True, engine="vllm")


# --- a server --------------------------------------------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """Answers /completions like vLLM, with the log-probabilities of the prompt's ids."""

    def log_message(self, *_):
        """Print nothing."""

    def do_GET(self):
        self.send({"data": [{"id": "teacher", "owned_by": "vllm", "max_model_len": 1024}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["echo"] and body["max_tokens"] == 1
        with self.server.lock:
            [(_, values, _)] = self.server.scorer.score([(0, np.array(body["prompt"], dtype=np.int32))])
        values = [None, *values[1:].tolist(), -1.0]
        if self.server.omits_prompt:
            values = values[-1:]
        logprobs = {"tokens": ["x"] * len(values), "token_logprobs": values}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}
        self.send({"model": "teacher", "choices": [choice], "usage": usage})

    def send(self, reply):
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def echo(models):
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = server.block_on_close = True
        server.lock, server.omits_prompt = threading.Lock(), False
        server.scorer, _ = open_scorer(models[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def endpoint(url, tokenizer):
    options = {"api_key_env": "NO_SUCH_KEY", "max_retries": 0, "concurrency": 2}
    return Endpoint(kind="endpoint", model="teacher", base_urls=[url], tokenizer=tokenizer, **options)


def test_a_teacher_behind_a_server_gives_the_same_scores_as_a_local_one(echo, texts, models, tmp_path):
    served = endpoint(f"http://127.0.0.1:{echo.server_port}/v1", models[1].model)
    for name, teacher in (("here", models[1]), ("served", served)):
        score.score(texts, models[0], BY_TEACHER, out=tmp_path / name, teacher=teacher)
    for one, other in zip(*(rows_of(tmp_path / name, "scores") for name in ("here", "served")), strict=True):
        np.testing.assert_allclose(one["p_teacher"], other["p_teacher"], atol=1e-5)
    inputs = [read_manifest(tmp_path / name)["inputs"]["teacher"] for name in ("here", "served")]
    assert inputs[0] != inputs[1]


def test_a_server_that_does_not_echo_is_named(echo, texts, models, tmp_path):
    echo.omits_prompt = True
    served = endpoint(f"http://127.0.0.1:{echo.server_port}/v1", models[1].model)
    with pytest.raises(EndpointError, match="'teacher' does not echo the prompt's log-probabilities"):
        score.score(texts, models[0], BY_TEACHER, out=tmp_path / "score", teacher=served)


def test_a_server_without_a_tokenizer_is_refused(texts, models, tmp_path):
    served = endpoint("http://127.0.0.1:1/v1", None)
    with pytest.raises(ConfigError, match=r"needs teacher\.tokenizer"):
        score.score(texts, models[0], BY_TEACHER, out=tmp_path / "score", teacher=served)


# --- vLLM ------------------------------------------------------------------------------------------------


def test_vllm_agrees_and_reports_the_noise(vllm_teacher, sampled, models, tmp_path, capsys):
    score.score(sampled, models[1], ScoreConfig(), out=tmp_path / "transformers")
    score.score(sampled, Vllm(**vllm_teacher), ScoreConfig(engine="vllm"), out=tmp_path / "score")
    scored = rows_of(tmp_path / "transformers", "scores")
    for one, other in zip(rows_of(tmp_path / "score", "scores"), scored, strict=True):
        assert one["ids"] == other["ids"]
        np.testing.assert_allclose(one["p_student"], other["p_student"], atol=1e-4)
        np.testing.assert_array_equal(one["p_teacher"], other["p_teacher"])
        assert one["surprisal_sum"] == pytest.approx(other["surprisal_sum"], abs=1e-2)
        assert one["rank_sum"] is None  # vLLM counts ties differently
    timing = read_timing(tmp_path / "score")
    assert 0 <= timing["engine_noise_mean"] <= timing["engine_noise_largest"] < 1e-4
    assert timing["engine_noise_sentence"] < 1e-4
    printed = capsys.readouterr()
    assert "noise between vLLM and transformers, 8 rollouts: |Δ log p| mean " in printed.out
    assert "warning" not in printed.err


def test_a_teacher_in_vllm_gives_the_same_scores_as_in_transformers(vllm_teacher, texts, models, tmp_path):
    for name, teacher in (("transformers", models[1]), ("vllm", Vllm(**vllm_teacher))):
        score.score(texts, models[0], BY_TEACHER, out=tmp_path / name, teacher=teacher)
    for one, other in zip(
        *(rows_of(tmp_path / n / "teacher", "readings") for n in ("transformers", "vllm")), strict=True
    ):
        assert one["token_ids"] == other["token_ids"]
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)


def test_noise_between_engines_above_the_limit_is_noted(sampled, models, capsys):
    folder = Path(models[0].model)
    by_student = score._StudentScorer(models[0], folder, ScoreConfig())
    by_student._model = Vllm(kind="vllm", model=models[0].model)  # as if vLLM had computed the scores below
    chat, context = by_student.chat, by_student.context
    items = list(
        by_student.remember_first(score._student_items(sampled, None, chat, context, set(), student_alone=False))
    )
    assert len(items) == 24
    for item in items:
        [(_, logprobs, ranks)] = by_student.scorer.score([(0, item.ids)])
        by_student.row(item, logprobs - np.float32(0.2), ranks)
    by_student.scorer.close()
    noise = by_student.noise_of_engines()
    assert noise["engine_noise_mean"] == pytest.approx(0.2, abs=1e-4)
    assert 0.05 < noise["engine_noise_sentence"] <= 1 - math.exp(-0.2) + 1e-4
    printed = capsys.readouterr()
    assert "noise between vLLM and transformers, 8 rollouts: |Δ log p| mean 0.2" in printed.out
    assert re.search(r"note: the engines differ by 0\.\d+ in the p of a sentence, over 0\.05", printed.err)


def recipe(demo, **more):
    phase = {"name": "given", "source": "ingest", "ingest": {"paths": ["a.jsonl"]}, "score": {"by": "teacher"}}
    return RecipeConfig(
        **{"out": "run", "student": {"kind": "transformers", "model": str(demo / "student")}, "phase": [phase]} | more
    )


def test_a_recipe_with_scores_by_the_teacher_needs_a_teacher_that_can_score(demo):
    served = {"kind": "endpoint", "model": "x", "base_urls": ["http://localhost:1/v1"]}
    with pytest.raises(ValueError, match=r"phase 'given': score\.by = 'teacher' .* no \[teacher\] table"):
        recipe(demo)
    with pytest.raises(ValueError, match=r"score\.by = 'teacher' needs teacher\.tokenizer"):
        recipe(demo, teacher=served)
    complete = recipe(demo, teacher=served | {"tokenizer": str(demo / "teacher")})
    [step] = [step for step in plan(complete) if step.stage == "score"]
    assert step.asks
    assert complete.phase[0].score.by == "teacher"


def test_the_context_is_that_of_the_model_or_of_its_engine(models):
    chat = Chat(Path(models[0].model))
    assert context_of(models[0], chat) == chat.context
    small = Vllm(kind="vllm", model=models[0].model, max_model_len=77)
    assert context_of(small, chat) == 77
    assert context_of(endpoint("http://localhost:1/v1", models[0].model), chat) == chat.context - 1


def test_a_scorer_takes_sequences_of_any_length_in_any_order(models):
    scorer, chat = open_scorer(models[0], batch_tokens=50)
    rng = np.random.default_rng(0)
    sequences = {7 * i: rng.integers(0, chat.vocab_size, n, dtype=np.int32) for i, n in enumerate([3, 90, 1, 20, 20])}
    scores = {position: (values, ranks) for position, values, ranks in scorer.score(sequences.items())}
    assert scores.keys() == sequences.keys()
    for position, (values, ranks) in scores.items():
        assert len(values) == len(ranks) == len(sequences[position])
        assert np.isnan(values[0]) and np.isfinite(values[1:]).all() and (ranks[1:] > 0).all()
    assert not list(scorer.score([]))
    scorer.close()


def test_every_column_that_score_reads_is_a_column_of_rollouts():
    assert set(score._COLUMNS) <= set(ROLLOUT.names)
