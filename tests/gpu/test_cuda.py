"""What only a CUDA GPU can show: `pytest tests/gpu` on a machine that has one; skipped elsewhere."""

from pathlib import Path

import numpy as np
import pytest

import dasd_lite

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DEMO = Path(dasd_lite.__file__).parent / "demo"
LENGTHS = [120, 7, 300, 64]


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 400, sum(LENGTHS), dtype=np.int32)


def test_packed_documents_score_on_the_gpu_as_on_the_cpu() -> None:
    from dasd_lite.student import load_model, target_logprobs

    found = [
        target_logprobs(load_model(DEMO / "student", dtype="float32", device=device), ids(), LENGTHS)
        for device in ("cpu", "cuda")
    ]
    assert np.nanmax(np.abs(found[0] - found[1])) < 1e-3


def test_gradients_of_packed_documents_are_those_of_each_alone() -> None:
    from dasd_lite.student import load_model, loss_sum

    def gradient(parts: list[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
        model = load_model(DEMO / "student", dtype="float32", device="cuda")
        for tokens, lengths in parts:
            loss_sum(model, tokens, np.ones(len(tokens), dtype=bool), lengths).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together = gradient([(ids(), LENGTHS)])
    alone = gradient([(d, [len(d)]) for d in np.split(ids(), np.cumsum(LENGTHS)[:-1])])
    assert torch.nn.functional.cosine_similarity(together, alone, dim=0) > 0.9999


def test_sampled_logprobs_are_those_of_a_plain_forward() -> None:
    from dasd_lite.config import TransformersModel
    from dasd_lite.prompts import read_prompts
    from dasd_lite.sampler import Request, SamplingParams
    from dasd_lite.sampler.transformers import TransformersSampler
    from dasd_lite.student import load_model, target_logprobs

    prompts = read_prompts(DEMO / "validation.jsonl", limit=16)
    sampler = TransformersSampler(TransformersModel(model=str(DEMO / "teacher"), dtype="float32"))
    model = load_model(DEMO / "teacher", dtype="float32", device="cuda")
    requests = [Request(i, p.messages, 64, i) for i, p in enumerate(prompts)]
    for done in sampler.complete(requests, SamplingParams(temperature=0.6)):
        prompt = sampler._chat.prompt_ids(prompts[done.position].messages)
        whole = np.concatenate([prompt, done.token_ids])
        expected = target_logprobs(model, whole, [len(whole)])[len(prompt) :]
        assert np.abs(expected - done.logprobs).max() < 1e-3
