"""The sampler in this process: each answer is what the model alone gives it, whatever shares its batch."""

import contextlib
import re
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.answers import (
    QUESTIONS,
    answers,
    assert_halving_keeps_answers,
    assert_logprobs_are_those_of_a_forward,
    assert_same,
    assert_two_at_once_sample_what_one_does,
    question,
)
from tests.model.zoo import LONGROPE, UNSAMPLED, ZOO, build, save

from dasd_lite.chat.chat import Chat
from dasd_lite.config.models import DEMO, Transformers
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.inference import Request, SamplingParams, local
from dasd_lite.inference.batch import Batch, Job
from dasd_lite.inference.local import TransformersSampler
from dasd_lite.inference.scorer import open_scorer
from dasd_lite.model import architecture, load
from dasd_lite.model.decode import BatchCache
from dasd_lite.model.logprobs import enable_run_inside


def requests(num=6):
    """Answers of different lengths to prompts of different lengths."""
    return [question(i, 6 + 7 * i) for i in range(num)]


def sharpened(name):
    """A model of the zoo whose attention scores are large enough for a cap on them, or a sink, to matter."""
    model = build(name)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if name == "gemma2" and ("q_proj" in key or "k_proj" in key):
                weight.mul_(6)
    return model


def plain(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


QUICK = ["gpt_oss", "gemma2", "gemma3", "granite", "cohere2", "opt", "llama4", "falcon", "qwen3_next", "falcon_h1"]
QUICK += ["lfm2", "mamba", "mamba2", "recurrent_gemma"]
RIGHT = [name for name in ZOO if name != "phi3_longrope" and name not in UNSAMPLED]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RIGHT]
)
def test_greedy_answers_are_those_of_the_model_alone(name, tmp_path, capsys):
    """Teacher-forced through eager attention: the same likeliest token, and its log-probability."""
    folder = save(sharpened(name), tmp_path / name)
    found, model, chat = answers(folder, requests()), plain(folder), Chat(folder)
    assert "one by one" not in capsys.readouterr().err, "it is right in batches"
    for request in requests():
        answer, prompt = found[request.position], chat.prompt_ids(request.messages, "")
        ids = torch.from_numpy(np.concatenate([prompt, answer.token_ids]))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        assert expected[:, : chat.vocab_size].argmax(-1).tolist() == answer.token_ids.tolist()
        np.testing.assert_allclose(answer.logprobs, expected.max(-1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral_window", "deepseek_v3"])
def test_answers_that_join_a_batch_are_those_that_each_has_alone(name, tmp_path, monkeypatch):
    """As on a GPU: windows of 16, prompts shorter and longer than what the batch has, and padding that is trimmed."""
    folder = save(build(name), tmp_path / name)
    sampler = TransformersSampler(Transformers(model=str(folder), batch_size=3))
    # Long prompts come last, when the batch is short, and the other way round.
    order = [0, 2, 0, 2, 2, 1, 0, 1, 1, 2, 0]
    jobs = [
        Job(i, sampler._chat.prompt_ids(({"role": "user", "content": QUESTIONS[q]},), ""), 5 + 9 * i % 40, i)
        for i, q in enumerate(order)
    ]
    rows_there = []  # when others joined
    join = Batch._join
    monkeypatch.setattr(Batch, "_join", lambda self, new: (rows_there.append(len(self._rows)), join(self, new))[1])

    def run(size, join_at):
        batch = Batch(replace(sampler._decoder, join_at=join_at), SamplingParams(), size)
        return {answer.job.index: answer for answer in batch.run(deque(jobs))}

    alone = run(1, 0.0)
    assert rows_there == [0] * len(jobs)
    assert_same(run(3, 0.7), alone)
    assert rows_there[len(jobs) :].count(2) > 2


def test_samples_of_one_prompt_differ_and_depend_on_their_seed_alone(tmp_path):
    asked = [Request(i, ({"role": "user", "content": QUESTIONS[i // 4]},), 30, i % 4) for i in range(8)]
    together = answers(DEMO / "student", asked, SamplingParams(), batch_size=8)
    assert len({tuple(answer.token_ids) for answer in together.values()}) > 4
    assert_same(answers(DEMO / "student", asked[::-1], SamplingParams(), batch_size=3), together)


def test_longrope_answers_do_not_depend_on_the_batch(tmp_path):
    """One of the batch crosses the original positions, which would give all of them other factors."""
    rope = {**LONGROPE, "original_max_position_embeddings": 44}
    model = build("phi3_longrope", rope_parameters=rope, original_max_position_embeddings=44)
    folder = save(model, tmp_path / "longrope")
    asked = [Request(i, ({"role": "user", "content": QUESTIONS[i % 3]},), 60 if i == 1 else 12, i) for i in range(8)]
    longest = len(Chat(folder).prompt_ids(asked[1].messages, ""))
    assert longest + 12 < 44 < longest + 60, "only this one crosses"
    assert_same(answers(folder, asked, batch_size=8), answers(folder, asked, batch_size=1))


@pytest.mark.parametrize("name", UNSAMPLED)
def test_what_cannot_be_sampled_is_refused_by_name(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{UNSAMPLED[name]}.*; use kind = 'vllm'"):
        answers(save(build(name), tmp_path / name), requests(1))


def test_where_answers_depend_on_each_other_they_are_sampled_one_by_one(tmp_path, monkeypatch, capsys):
    """As an architecture would be that nobody has tried."""
    folder = save(build("recurrent_gemma"), tmp_path / "model")
    alone = answers(folder, requests())
    assert "one by one" not in capsys.readouterr().err, "known before"
    monkeypatch.setattr(architecture, "_STATES_IN_MODULES", set())
    assert_same(answers(folder, requests()), alone)
    words = "answers are sampled one by one: in a batch those of recurrent_gemma depend on each other"
    assert capsys.readouterr().err.count(words) == 1


def test_padding_in_a_state_is_found_in_sixteen_bits_too(tmp_path, monkeypatch, capsys):
    """A mask that mamba reads wrongly after the prompt."""
    folder = save(build("mamba"), tmp_path / "model")
    made = BatchCache.__init__
    monkeypatch.setattr(
        BatchCache, "__init__", lambda self, model: (made(self, model), setattr(self, "attends", True))[0]
    )
    answers(folder, requests(), dtype="bfloat16")
    assert "answers are sampled one by one" in capsys.readouterr().err


def test_answers_that_are_not_the_model_s_are_refused(monkeypatch):
    forward = Batch._forward
    monkeypatch.setattr(Batch, "_forward", lambda *args: 2 * forward(*args))
    with pytest.raises(ConfigError, match=r"what transformers samples from qwen3 is not what .* itself computes; use"):
        answers(DEMO / "student", requests(4))


def test_a_model_that_cannot_be_run_is_one_clear_line(monkeypatch):
    def fails(*_):
        raise RuntimeError("mat1 and mat2 must have the same dtype\nbut do not")

    monkeypatch.setattr(Batch, "_forward", fails)
    with pytest.raises(
        ConfigError, match=r"cannot sample from qwen3 in float32 .*\(mat1 and mat2 .* dtype\); use kind"
    ):
        answers(DEMO / "student", requests(4))


def test_a_forward_that_is_wrapped_is_given_its_cache_all_the_same():
    """As that of weights that are sharded: the wrapper takes any argument, and would pass on a wrong one."""
    model = load.load_model(DEMO / "student", device="cpu", attention="sdpa")
    enable_run_inside(model)
    assert BatchCache(model).keyword == "past_key_values"


def test_float16_that_overflows_is_named(tmp_path):
    model = build("gemma3", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5e4)
    folder = save(model, tmp_path / "large")
    assert len(answers(folder, requests(2))) == 2
    with pytest.raises(TrainError, match=r"are not finite; float16 overflowed: set dtype = 'float32'"):
        answers(folder, requests(2), dtype="float16")


def test_weights_that_are_no_numbers_are_named(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(TrainError, match=r"15 prompt tokens and 0 of the answer are not finite; are its weights whole"):
        answers(save(model, tmp_path / "nan"), requests(1))


@pytest.fixture
def full(monkeypatch):
    """Memory that suffices for so many rows."""

    def suffices_for(rows, at=20):
        forward = Batch._forward

        def limited(self, ids, mask, positions, cache):
            if len(ids) > rows and self.length >= at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, ids, mask, positions, cache)

        monkeypatch.setattr(Batch, "_forward", limited)

    return suffices_for


def test_halving_keeps_the_answers_of_large_batches_too(full, capsys):
    @contextlib.contextmanager
    def limited():
        full(rows=200)
        yield

    assert_halving_keeps_answers(limited, "the memory", lambda: capsys.readouterr().err)


def test_sampled_logprobs_are_those_of_a_plain_forward():
    asked = [question(i, 64) for i in range(6)]
    found = answers(DEMO / "teacher", asked, SamplingParams(temperature=0.6))
    assert_logprobs_are_those_of_a_forward(found, asked, DEMO / "teacher", 1e-5, "cpu")


@pytest.mark.slow
def test_two_processes_at_once_sample_what_one_does(tmp_path):
    assert_two_at_once_sample_what_one_does(tmp_path)


def test_a_batch_that_does_not_fit_is_halved_and_the_answers_are_the_same(full, capsys):
    asked = [question(i, 40) for i in range(20)]
    expected = answers(DEMO / "student", asked, SamplingParams())
    full(rows=3)
    sampler = TransformersSampler(Transformers(model=str(DEMO / "student"), batch_size=16))
    assert_same({each.position: each for each in sampler.complete(asked, SamplingParams())}, expected)
    assert re.findall("batch (.*): the memory is full", capsys.readouterr().err) == ["16 → 4", "4 → 2"]
    assert_same({each.position: each for each in sampler.complete(asked, SamplingParams())}, expected)
    assert "batch" not in capsys.readouterr().err, "the smaller size is kept"


def test_what_does_not_fit_before_the_first_token_is_halved_too(monkeypatch, capsys):
    allocate = Batch._allocate

    def limited(self, num_slots, longest):
        if num_slots > 2:
            raise RuntimeError("CUDA error: out of memory")
        allocate(self, num_slots, longest)

    monkeypatch.setattr(Batch, "_allocate", limited)
    assert len(answers(DEMO / "student", requests(), batch_size=5)) == 6
    assert re.findall("batch (.*): the memory is full", capsys.readouterr().err) == ["5 → 2"]


def test_one_answer_that_does_not_fit_is_one_clear_line(full):
    full(rows=0)
    with pytest.raises(TrainError, match=r"is full with its weights \(0\.0 GB\) and a single answer.*lower max_tokens"):
        answers(DEMO / "student", requests(4))


def test_another_error_is_not_taken_for_full_memory(monkeypatch):
    monkeypatch.setattr(Batch, "_forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(DEMO / "student", requests(4))


def test_closing_gives_the_memory_back(monkeypatch):
    """The engine that comes next needs it."""
    freed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    config = Transformers(model=str(DEMO / "student"))
    monkeypatch.setattr(load, "pick_device", lambda device="auto": torch.device("cpu"))
    monkeypatch.setattr(load, "pick_dtype", lambda *_: torch.float32)
    for opened in (TransformersSampler(config), open_scorer(config)[0]):
        freed.clear()
        opened.close()
        assert freed == ["cache"]


def test_a_batch_starts_no_larger_than_what_fits_if_all_answers_are_long(monkeypatch, capsys):
    """256 floats a layer and token, 3 layers: 3,072 bytes, and 24 bytes for each of 440 ids."""
    asked = [question(i, 60) for i in range(8)]
    expected = answers(DEMO / "student", asked, SamplingParams())
    longest = 60 + max(len(Chat(DEMO / "student").prompt_ids(request.messages, "")) for request in asked)
    room = 3.5 * (longest * 3 * 2 * 64 * 4 + 24 * 440) / 0.9
    monkeypatch.setattr(local, "free_gpu_bytes", lambda device: room)
    batches = []
    allocate = Batch._allocate
    monkeypatch.setattr(Batch, "_allocate", lambda self, num, most: (batches.append(num), allocate(self, num, most))[1])
    sampler = TransformersSampler(Transformers(model=str(DEMO / "student"), batch_size=64))
    for _ in range(2):
        assert_same({each.position: each for each in sampler.complete(asked, SamplingParams())}, expected)
    noted = capsys.readouterr().err
    assert noted.count(f"batch 3, not 64: {longest} tokens each, more may not fit") == 1
    assert set(batches) == {3}
