"""The real vLLM engine against transformers, on a tiny Qwen3 with random weights.

The engine changes the environment, torch's threads and the logging of the process that it runs in, so
this file runs itself as a program in a process of its own; the tests look at what it wrote.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dasd_lite
from dasd_lite.config import VllmModel
from dasd_lite.errors import ConfigError, DataError, MissingExtraError
from dasd_lite.sampler import Completion, Request, SamplingParams, open_sampler

CONTEXT, MAX_TOKENS, NUM = 256, 120, 24
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 300 tokens, and a model of two layers whose guesses are uneven."""
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
        model.lm_head.weight[wrapped.eos_token_id] *= 1.8  # now and then it is likely: some answers end, some do not
    model.save_pretrained(folder)


def requests() -> list[Request]:
    """Make questions of different lengths; every third has its answer begun."""
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


def reference(folder: Path, done: list[Completion]) -> dict[int, list[float]]:
    """Return transformers' log-softmax of the sampled ids, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from dasd_lite.chat import Chat

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat, found = Chat(folder), {}
    for completion in done:
        request = requests()[completion.position]
        prompt = chat.prompt_ids(request.messages, request.prefix)
        ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, len(ids) - 1)
        found[completion.position] = logprobs[rows, ids[len(prompt) :]].tolist()
    return found


def as_json(done: list[Completion]) -> list[dict[str, Any]]:
    return [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(completion).items()}
        for completion in sorted(done, key=lambda c: c.position)
    ]


def main(folder: Path) -> None:
    """Sample in every way that the tests ask about; write what came out."""
    make_model(folder)
    options: dict[str, Any] = {"kind": "vllm", "model": str(folder), "dtype": "float32", "enforce_eager": True}
    wanted = requests()
    found: dict[str, Any] = {}
    sampler = open_sampler(VllmModel(**options))
    try:
        done = list(sampler.complete(wanted, SamplingParams(temperature=0.6)))
        found["order"] = [c.position for c in done]
        found["sampled"] = as_json(done)
        found["reversed"] = as_json(list(sampler.complete(wanted[::-1], SamplingParams(temperature=0.6))))
        found["top_k_1"] = as_json(list(sampler.complete(wanted, SamplingParams(top_k=1))))
        found["greedy"] = as_json(list(sampler.complete(wanted, SamplingParams(temperature=0.0))))
        left = sampler.complete(wanted, SamplingParams())
        found["first"] = next(left).position
        left.close()  # type: ignore[attr-defined]
        found["after leaving"] = as_json(list(sampler.complete(wanted[:2], SamplingParams(temperature=0.6))))
        long = Request(7, ({"role": "user", "content": "one " * 300},), 5, seed=0)
        try:
            list(sampler.complete([*wanted[:1], long], SamplingParams()))
        except DataError as error:
            found["too long"] = str(error)
    finally:
        sampler.close()
    again = open_sampler(VllmModel(**options, max_model_len=64), folder)
    found["short context"] = as_json(list(again.complete(wanted[:1], SamplingParams())))
    again.close()
    try:
        open_sampler(VllmModel(**options, max_model_len=10 * CONTEXT))
    except ConfigError as error:
        found["too much"] = str(error)
    found["reference"] = reference(folder, done)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("vllm") is None:  # importing it here is what must not happen
        pytest.skip("vllm is not installed")
    folder = tmp_path_factory.mktemp("model")
    environment = os.environ | {
        "PYTHONPATH": str(Path(dasd_lite.__path__[0]).parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # or the first token costs 20 s
    }
    run = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_every_request_once_as_it_finishes(found: dict[str, Any]) -> None:
    assert sorted(found["order"]) == list(range(NUM))
    assert found["order"] != list(range(NUM))
    lengths = [len(found["sampled"][i]["token_ids"]) for i in found["order"]]
    assert lengths == sorted(lengths)


def test_logprobs_are_those_of_transformers_at_temperature_1(found: dict[str, Any]) -> None:
    for completion in found["sampled"]:
        np.testing.assert_allclose(
            completion["logprobs"], found["reference"][str(completion["position"])], rtol=0, atol=1e-4
        )


def test_token_bytes_add_up(found: dict[str, Any]) -> None:
    for completion in found["sampled"]:
        assert len(completion["token_bytes"]) == len(completion["token_ids"]) == len(completion["logprobs"])
        assert sum(completion["token_bytes"]) == len(completion["text"].encode())


def test_stop_and_length(found: dict[str, Any]) -> None:
    reasons = [c["finish_reason"] for c in found["sampled"]]
    assert set(reasons) == {"stop", "length"}
    for completion in found["sampled"]:
        ends = [i for i, token in enumerate(completion["token_ids"]) if token == 0]  # <|im_end|>
        if completion["finish_reason"] == "stop":
            assert ends == [len(completion["token_ids"]) - 1]
            assert completion["token_bytes"][-1] == 0
        else:
            assert not ends and len(completion["token_ids"]) == MAX_TOKENS
        assert "<|im_end|>" not in completion["text"]


def test_same_seed_same_tokens_in_any_order(found: dict[str, Any]) -> None:
    assert [c["token_ids"] for c in found["reversed"]] == [c["token_ids"] for c in found["sampled"]]
    assert len({tuple(c["token_ids"]) for c in found["sampled"]}) == NUM


def test_top_k(found: dict[str, Any]) -> None:
    assert [c["token_ids"] for c in found["top_k_1"]] == [c["token_ids"] for c in found["greedy"]]


def test_leaving_early_leaves_nothing_behind(found: dict[str, Any]) -> None:
    assert [c["token_ids"] for c in found["after leaving"]] == [c["token_ids"] for c in found["sampled"][:2]]


def test_a_prompt_that_is_too_long_is_named(found: dict[str, Any]) -> None:
    assert f"leaves no room for an answer in the model's context of {CONTEXT}" in found["too long"]
    assert "request 7: its prompt of" in found["too long"]


def test_a_second_engine_after_the_first_and_a_short_context(found: dict[str, Any]) -> None:
    (completion,) = found["short context"]
    assert completion["finish_reason"] == "length"
    assert 0 < len(completion["token_ids"]) < 64


def test_what_the_engine_refuses_is_one_error(found: dict[str, Any]) -> None:
    assert "vLLM cannot start" in found["too much"]
    assert str(10 * CONTEXT) in found["too much"]
    assert "\n" not in found["too much"]


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dasd-lite\[vllm\]'"):
        open_sampler(VllmModel(kind="vllm", model="nowhere"))
