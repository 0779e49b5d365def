"""The real vLLM engine in child processes against transformers, on a tiny Qwen3 with random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dasd_lite.config.models import Vllm
from dasd_lite.errors import ConfigError, DataError, EngineError, MissingExtraError
from dasd_lite.inference import Completion, Request, SamplingParams
from dasd_lite.inference.backends import open_sampler
from dasd_lite.inference.vllm.sampler import VllmSampler, gpu_groups

CONTEXT, MAX_TOKENS, NUM = 256, 120, 24
PARAMS = SamplingParams(temperature=0.6)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 300 tokens, and a model of two layers with uneven probabilities."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    tokenizer.train_from_iterator(["one and two are three, and 漢字 is two words. "] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        eos_token_id=wrapped.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[wrapped.eos_token_id] *= 1.8  # sometimes likely: some answers end, some do not
    model.save_pretrained(folder)


def requests() -> list[Request]:
    """Make questions of different lengths; every third has a prefix."""
    return [
        Request(
            position=i,
            messages=({"role": "user", "content": "one and two " * (1 + i % 5)},),
            max_tokens=MAX_TOKENS,
            seed=(1 << 62) + i,
            prefix="three, " if i % 3 == 0 else "",
        )
        for i in range(NUM)
    ]


def by_position(done: list[Completion]) -> list[list[int]]:
    assert sorted(c.position for c in done) == list(range(len(done)))
    return [c.token_ids.tolist() for c in sorted(done, key=lambda c: c.position)]


def reference(folder: Path, sequences: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Return transformers' log-softmax of each token but the first of each sequence, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence).long()
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
        scores.append(logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy())
    return scores


def engines(parent: int) -> list[int]:
    """Return the engines that are children of a process, the oldest first."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            ppid = int(stat.read_text().rpartition(")")[2].split()[1])
            if ppid == parent and b"dasd_lite.inference.vllm.engine" in (stat.parent / "cmdline").read_bytes():
                pids.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return sorted(pids)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def options(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a Vllm table of the tiny model takes."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return {"kind": "vllm", "model": str(folder), "dtype": "float32", "enforce_eager": True, "data_parallel_size": 1}


@pytest.fixture(scope="module")
def folder(options: dict[str, Any]) -> Path:
    return Path(options["model"])


@pytest.fixture(scope="module")
def sampler(options: dict[str, Any]) -> Iterator[VllmSampler]:
    sampler = VllmSampler(Vllm(**options, max_model_len=CONTEXT))
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def sampled(sampler: VllmSampler) -> list[Completion]:
    """A completion of every request, in the order of arrival."""
    return list(sampler.complete(requests(), PARAMS))


@pytest.fixture(scope="module")
def others(sampler: VllmSampler) -> list[int]:
    """The engines of other fixtures than `pair`."""
    return engines(os.getpid())


@pytest.fixture(scope="module")
def pair(options: dict[str, Any], others: list[int]) -> Iterator[VllmSampler]:
    """Two engines."""
    sampler = VllmSampler(Vllm(**options | {"data_parallel_size": 2, "stall_s": 5.0, "max_model_len": CONTEXT}))
    yield sampler
    sampler.close()


def test_every_request_once_as_it_finishes(sampled: list[Completion]) -> None:
    order = [c.position for c in sampled]
    assert sorted(order) == list(range(NUM))
    assert order != list(range(NUM))
    lengths = [len(c.token_ids) for c in sampled]
    assert lengths == sorted(lengths)


def test_this_process_does_not_import_vllm(sampled: list[Completion]) -> None:
    assert "vllm" not in sys.modules


def test_logprobs_are_those_of_transformers_at_temperature_1(
    sampler: VllmSampler, sampled: list[Completion], folder: Path
) -> None:
    asked = requests()
    prompts = [sampler.chat.prompt_ids(asked[c.position].messages, asked[c.position].prefix) for c in sampled]
    sequences = [np.concatenate([prompt, c.token_ids]) for prompt, c in zip(prompts, sampled, strict=True)]
    for completion, prompt, wanted in zip(sampled, prompts, reference(folder, sequences), strict=True):
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, wanted[len(prompt) - 1 :], rtol=0, atol=1e-4)


def test_token_bytes_add_up(sampled: list[Completion]) -> None:
    for completion in sampled:
        assert len(completion.token_bytes) == len(completion.token_ids) == len(completion.logprobs)
        assert sum(completion.token_bytes) == len(completion.text.encode())


def test_stop_and_length(sampled: list[Completion]) -> None:
    assert {c.finish_reason for c in sampled} == {"stop", "length"}
    for completion in sampled:
        ends = [i for i, token in enumerate(completion.token_ids) if token == 0]  # <|im_end|>
        if completion.finish_reason == "stop":
            assert ends == [len(completion.token_ids) - 1]
            assert completion.token_bytes[-1] == 0
        else:
            assert not ends and len(completion.token_ids) == MAX_TOKENS
        assert "<|im_end|>" not in completion.text


def test_same_seed_same_tokens_in_any_order(sampler: VllmSampler, sampled: list[Completion]) -> None:
    reversed_order = list(sampler.complete(requests()[::-1], PARAMS))
    assert by_position(reversed_order) == by_position(sampled)
    assert len({tuple(ids) for ids in by_position(sampled)}) == NUM


@pytest.mark.parametrize("one", [SamplingParams(top_k=1), SamplingParams(min_p=1.0), SamplingParams(top_p=1e-6)])
def test_what_leaves_one_token_is_greedy(sampler: VllmSampler, one: SamplingParams) -> None:
    greedy = list(sampler.complete(requests(), SamplingParams(temperature=0.0)))
    assert by_position(list(sampler.complete(requests(), one))) == by_position(greedy)


def test_leaving_early_leaves_the_engine_usable(sampler: VllmSampler, sampled: list[Completion]) -> None:
    left: Any = sampler.complete(requests(), SamplingParams())
    next(left)
    with pytest.raises(RuntimeError, match="already running jobs"):
        next(sampler.complete(requests(), SamplingParams()))
    left.close()
    again = list(sampler.complete(requests()[:2], PARAMS))
    assert by_position(again) == by_position(sampled)[:2]


def test_a_prompt_over_the_context_is_named(sampler: VllmSampler) -> None:
    long = Request(7, ({"role": "user", "content": "one " * 300},), 5, seed=0)
    with pytest.raises(DataError, match=f"request 7: the prompt of .* the model's context of {CONTEXT} tokens"):
        next(sampler.complete([*requests()[:1], long], SamplingParams()))


def test_scores_are_those_of_transformers_in_any_order(sampler: VllmSampler, folder: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 282, size=num).astype(np.int32) for num in (1, 2, 40, 200, CONTEXT, 17, 90)]
    scores = {}
    for position, logprobs, ranks in sampler.score(enumerate(sequences)):
        assert ranks is None
        assert logprobs.dtype == np.float32
        scores[position] = logprobs
    for position, wanted in enumerate(reference(folder, sequences)):
        assert np.isnan(scores[position][0])
        np.testing.assert_allclose(scores[position][1:], wanted, rtol=0, atol=1e-4)
    for position, logprobs, _ in sampler.score(reversed(list(enumerate(sequences)))):
        np.testing.assert_allclose(logprobs, scores.pop(position), rtol=0, atol=1e-5)
    assert not scores


def test_what_cannot_be_scored_is_named(sampler: VllmSampler) -> None:
    with pytest.raises(DataError, match="sequence 3 has 0 tokens; a sequence must have 1 to 256, the model's context"):
        list(sampler.score([(3, np.zeros(0, dtype=np.int32))]))
    with pytest.raises(DataError, match="sequence 4 has 257 tokens"):
        list(sampler.score([(4, np.ones(CONTEXT + 1, dtype=np.int32))]))
    with pytest.raises(DataError, match="sequence 5 has token ids from 1 to 5000; the model has ids 0 to 281"):
        list(sampler.score([(5, np.array([1, 5000], dtype=np.int32))]))


def test_two_engines_give_the_same_answers(pair: VllmSampler, others: list[int], sampled: list[Completion]) -> None:
    assert len(engines(os.getpid())) == 2 + len(others)
    assert by_position(list(pair.complete(requests(), PARAMS))) == by_position(sampled)
    assert pair.status().startswith("2 vLLM engines, ")


@pytest.mark.parametrize(
    ("number", "how_it_ended"),
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "made no step for 5 s and was killed")],
)
def test_an_engine_that_dies_or_hangs_is_restarted(
    pair: VllmSampler,
    others: list[int],
    sampled: list[Completion],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    how_it_ended: str,
) -> None:
    running = pair.complete(requests(), PARAMS)
    done = [next(running)]
    os.kill(next(pid for pid in engines(os.getpid()) if pid not in others), number)
    assert by_position([*done, *running]) == by_position(sampled)
    notes = capsys.readouterr().err
    assert how_it_ended in notes and "restarting it and its " in notes


def test_scoring_in_small_steps_and_nothing_is_left_of_a_sampler_that_is_closed(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), engines(os.getpid())
    monkeypatch.setattr("dasd_lite.inference.vllm.sampler._SCORING_LOGITS", 0)  # the smallest steps: 128 tokens
    short = VllmSampler(Vllm(**options, max_model_len=200), scoring=True)
    assert len(engines(os.getpid())) == len(before[2]) + 1
    rng = np.random.default_rng(1)
    sequences = [rng.integers(1, 282, size=num).astype(np.int32) for num in (190, 3, 200, 120, 129, 128)]
    scores = {position: logprobs for position, logprobs, _ in short.score(enumerate(sequences))}
    for position, wanted in enumerate(reference(folder, sequences)):
        np.testing.assert_allclose(scores[position][1:], wanted, rtol=0, atol=1e-4)
    long = ({"role": "user", "content": "one and two " * 18},)  # one step: vLLM for CPUs fails after two and a seed
    done = [c for i in range(6) for c in short.complete([Request(i, long, 1000, seed=i)], PARAMS)]
    assert {c.prompt_tokens + len(c.token_ids) for c in done if c.finish_reason == "length"} == {200}
    short.close()
    short.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count(), engines(os.getpid())) == before
    with pytest.raises(RuntimeError, match="closed"):
        list(short.complete(requests()[:1], SamplingParams()))


def test_engines_end_with_a_parent_that_is_killed(options: dict[str, Any]) -> None:
    program = (
        "import json, sys; from dasd_lite.config.models import Vllm\n"
        "from dasd_lite.inference.vllm.sampler import VllmSampler\n"
        "from dasd_lite.inference import Request, SamplingParams\n"
        "sampler = VllmSampler(Vllm(**json.loads(sys.argv[1])))\n"
        "request = Request(0, ({'role': 'user', 'content': 'one'},), 200, seed=0)\n"
        "while True:\n list(sampler.complete([request], SamplingParams())); print('sampled', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, json.dumps(options)], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None and parent.stdout.readline()
        (child,) = engines(parent.pid)
        parent.kill()
    while not is_gone(child):  # or the test times out
        time.sleep(0.1)


def test_an_engine_that_keeps_failing_is_an_error_with_the_end_of_its_log(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('the card has fallen off the bus')\n")
    monkeypatch.syspath_prepend(tmp_path)  # engines import from the same places as their parent
    with pytest.raises(
        EngineError, match=r"3 times .* exited with code 1; .* the card has fallen off the bus$"
    ) as error:
        VllmSampler(Vllm(**options, max_model_len=CONTEXT))
    assert "\n" not in str(error.value)


def test_options_that_vllm_rejects_are_one_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="vLLM cannot start") as error:
        open_sampler(Vllm(**options, max_model_len=10 * CONTEXT))
    assert str(10 * CONTEXT) in str(error.value)
    assert "\n" not in str(error.value)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dasd-lite\[vllm\]'"):
        open_sampler(Vllm(kind="vllm", model="nowhere"))


def test_gpus_are_divided_among_engines() -> None:
    assert gpu_groups(["0", "1", "2", "3", "4"], 2, None) == ["0,1", "2,3"]
    assert gpu_groups(["GPU-a", "GPU-b"], 1, 1) == ["GPU-a"]
    assert gpu_groups([], 1, None) == [None]
    assert gpu_groups([], 1, 2) == [None, None]
    with pytest.raises(ConfigError, match=r"data_parallel_size = 3 × tensor_parallel_size = 2 .* 6 GPUs, but 4 are"):
        gpu_groups(["0", "1", "2", "3"], 2, 3)
    with pytest.raises(ConfigError, match="8 GPUs, but 4 are visible"):
        gpu_groups(["0", "1", "2", "3"], 8, None)
