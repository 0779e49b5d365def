"""How much memory and context vLLM's engines ask for; the engines themselves are in tests/pipeline/test_vllm.py."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.model.zoo import build, save

from dasd_lite.config.models import DEMO, Vllm
from dasd_lite.errors import DataError
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.inference.vllm import engine, sampler
from dasd_lite.inference.vllm.sampler import VllmSampler

QUESTION = ({"role": "user", "content": "How much is 2 + 3?"},)


class FakePool:
    """Engines that start with any options and have nothing to reply."""

    def __init__(self, options, groups, *, stall_s):
        self.started.append(options)
        self.context = 700 if options["max_model_len"] in (None, -1) else options["max_model_len"]
        self.vocab_size = 440

    def run(self, jobs):
        list(jobs)
        return iter(())

    def close(self):
        pass


@pytest.fixture
def started(monkeypatch):
    """The options of every engine that a sampler starts."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(sampler, "Pool", FakePool)
    monkeypatch.setattr(FakePool, "started", [], raising=False)
    return FakePool.started


def lengths(started):
    return [options["max_model_len"] for options in started]


def ask(opened, *max_tokens):
    requests = [Request(i, QUESTION, tokens, i) for i, tokens in enumerate(max_tokens)]
    list(opened.complete(requests, SamplingParams()))
    return len(opened.chat.prompt_ids(QUESTION, ""))


def test_an_engine_has_room_for_what_is_asked_and_no_more(started):
    opened = VllmSampler(Vllm(model=str(DEMO / "student")))
    assert not started, "how long the requests are is not known yet"
    prompt = ask(opened, 20, 90, 30)
    assert lengths(started) == [prompt + 90]
    ask(opened, 50)
    assert lengths(started) == [prompt + 90], "the same engine"
    ask(opened, 100_000)
    assert lengths(started) == [prompt + 90, opened.chat.context], "never more than the model's context"


def test_a_length_that_is_set_is_taken_at_once(started):
    opened = VllmSampler(Vllm(model=str(DEMO / "student"), max_model_len=100))
    ask(opened, 400)
    assert lengths(started) == [100]
    with pytest.raises(DataError, match="context of 10 tokens"):
        ask(VllmSampler(Vllm(model=str(DEMO / "student"), max_model_len=10)), 5)


def test_longrope_has_a_context_with_the_factors_that_training_has(started, tmp_path):
    """vLLM chooses them by its context, and by default the short ones."""
    folder = str(save(build("phi3_longrope"), tmp_path / "longrope"))
    ask(VllmSampler(Vllm(model=folder)), 20)
    ask(VllmSampler(Vllm(model=folder, max_model_len=600)), 20)
    VllmSampler(Vllm(model=folder), scoring=True)
    assert lengths(started) == [601, 600, 2048]


def test_a_scorer_takes_what_fits(started):
    opened = VllmSampler(Vllm(model=str(DEMO / "student")), scoring=True)
    assert lengths(started) == [-1] and opened.context == 700


@pytest.mark.parametrize(
    ("free", "share"), [([80, 80], 0.9), ([80, 40], 0.45), ([0, 80], 0.01)], ids=["idle", "half taken", "nothing free"]
)
def test_the_share_is_of_what_is_free_on_the_fullest_card(free, share, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device] * 10**9, 80 * 10**9))
    assert engine.share_of_memory() == pytest.approx(share)


def test_the_share_without_a_gpu_is_half_of_what_is_available(monkeypatch):
    """vLLM does not start if more is asked for than is free, and takes all that it may."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, share in ((64, 0.5), (16, 0.125), (0, 0.01)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda left=available: SimpleNamespace(available=left, total=64))
        assert engine.share_of_memory() == pytest.approx(share)
