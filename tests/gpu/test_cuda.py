"""What only a CUDA GPU can show: run `pytest tests/gpu` on a machine that has one; skipped elsewhere."""

import contextlib
import gc
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.answers import (
    answers,
    assert_halving_keeps_answers,
    assert_logprobs_are_those_of_a_forward,
    assert_two_at_once_sample_what_one_does,
    question,
)
from tests.rows import loss_sum

import dasd_lite
from dasd_lite.inference import SamplingParams

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DEMO = Path(dasd_lite.__file__).parent / "demo"
LENGTHS = [120, 7, 300, 64]


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 400, sum(LENGTHS), dtype=np.int32)


def test_packed_documents_score_on_the_gpu_as_on_the_cpu() -> None:
    from dasd_lite.model.load import load_model
    from dasd_lite.model.logprobs import target_logprobs

    on_cpu, on_gpu = (
        target_logprobs(load_model(DEMO / "student", dtype="float32", device=device), ids(), LENGTHS)
        for device in ("cpu", "cuda")
    )
    assert np.nanmax(np.abs(on_cpu - on_gpu)) < 1e-3


def test_gradients_of_packed_documents_are_those_of_each_alone() -> None:
    from dasd_lite.model.load import load_model

    def gradient(parts: list[tuple[np.ndarray, list[int]]]) -> torch.Tensor:
        model = load_model(DEMO / "student", dtype="float32", device="cuda")
        for tokens, lengths in parts:
            loss_sum(model, tokens, np.ones(len(tokens), dtype=bool), lengths).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together = gradient([(ids(), LENGTHS)])
    alone = gradient([(d, [len(d)]) for d in np.split(ids(), np.cumsum(LENGTHS)[:-1])])
    assert torch.nn.functional.cosine_similarity(together, alone, dim=0) > 0.9999


# --- sampling -----------------------------------------------------------------------------------------


def test_sampled_logprobs_are_those_of_a_plain_forward() -> None:
    asked = [question(i, 64) for i in range(16)]
    found = answers(DEMO / "teacher", asked, SamplingParams(temperature=0.6), batch_size=64, dtype="float32")
    assert_logprobs_are_those_of_a_forward(found, asked, DEMO / "teacher", 1e-3, "cuda")


def test_a_batch_that_fills_the_gpu_is_halved_and_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process may take 60 MB more; 512 rows would take about 150."""
    from dasd_lite.inference import local

    monkeypatch.setattr(local, "free_gpu_bytes", lambda device: None)  # which would keep the batch small from the start

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        gc.collect()
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_reserved() + 60e6) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    assert_halving_keeps_answers(limited, "the GPU", lambda: capsys.readouterr().err, atol=1e-3, others=0.1)


def test_a_batch_starts_no_larger_than_what_the_gpu_has_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors fill all but about 1 GB; 4,096 answers of 510 tokens would take 3.2."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    filled = torch.empty(max(0, int(free - 1e9)), dtype=torch.uint8, device="cuda")
    asked = [question(i, 450) for i in range(4096)]
    assert len(answers(DEMO / "student", asked, SamplingParams(), batch_size=4096, dtype="float32")) == len(asked)
    said = capsys.readouterr().err
    assert re.search(r"batch \d+, not 4096: \d+ tokens each, more may not fit", said), said
    assert "is full" not in said
    del filled
    torch.cuda.empty_cache()


def test_two_processes_sample_on_one_card(tmp_path: Path) -> None:
    assert_two_at_once_sample_what_one_does(tmp_path)


@pytest.mark.parametrize("held", [0.0, 0.4])
def test_vllm_after_training_in_one_process(vllm_installed: None, tmp_path: Path, held: float) -> None:
    """Training gave its memory back; and with `held` of the card in other hands, vLLM takes a share of the rest."""
    from dasd_lite.config.models import Vllm
    from dasd_lite.config.train import TrainConfig
    from dasd_lite.inference.vllm.sampler import VllmSampler
    from dasd_lite.stages.train import train

    rows = make_rows(tmp_path / "rows", LENGTHS)
    train(rows, DEMO / "teacher", TrainConfig(epochs=1, grad_accum_steps=2, learning_rate=1e-5), out=tmp_path / "out")
    other = torch.empty(int(held * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda")
    model = tmp_path / "out" / "model"
    sampler = VllmSampler(Vllm(model=str(model), dtype="float32", enforce_eager=True, tensor_parallel_size=1))
    asked = [question(i, 64) for i in range(16)]
    try:
        found = {each.position: each for each in sampler.complete(asked, SamplingParams(temperature=0.6))}
    finally:
        sampler.close()
    assert_logprobs_are_those_of_a_forward(found, asked, model, 1e-3, "cuda")
    del other
    torch.cuda.empty_cache()


# --- training ---------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 512}
WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 32000}


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = shape["hidden_size"] // shape["head_dim"]
    config = Qwen3Config(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(folder: Path, lengths: list[int], num_rows: int = 8) -> Path:
    """Documents that count by a step of their own: something to learn."""
    import pyarrow as pa

    from dasd_lite.data.manifest import identify
    from dasd_lite.data.records import ROW
    from dasd_lite.data.writer import ShardWriter

    rng = np.random.default_rng(0)
    rows = [
        {
            "ids": np.concatenate([(rng.integers(500) + rng.integers(1, 4) * np.arange(n)) % 500 for n in lengths]),
            "loss_mask": np.concatenate([np.arange(n) >= 3 for n in lengths]),
            "doc_lengths": lengths,
            "uids": [f"{r}.{d}" for d in range(len(lengths))],
        }
        for r in range(num_rows)
    ]
    with ShardWriter(folder, identify("pack", 1, {}, {"lengths": str(lengths)}), {"rows": ROW}) as writer:
        writer.write("rows", pa.Table.from_pylist(rows, schema=ROW))
        writer.publish({})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("small")
    return make_rows(base / "rows", LENGTHS), make_model(base / "model", SHAPE)


def steps(data: tuple[Path, Path], out: Path, **options: object) -> list[dict[str, float]]:
    """Train on one GPU in this process, whose functions a test may replace; return the metrics of each step."""
    from dasd_lite.config.train import TrainConfig
    from dasd_lite.stages import train as stage

    given = {"epochs": 1, "grad_accum_steps": 2, "learning_rate": 1e-3, "warmup_ratio": 0, "num_processes": 1}
    gc.collect()  # what earlier tests left
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "runs_in_children", lambda number: False)
        stage.train(*data, TrainConfig.model_validate(given | options), out=out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_packed_gradients_in_bfloat16_are_those_of_plain_attention_document_by_document(
    small: tuple[Path, Path],
) -> None:
    """The kernel for documents of any length, if there is one, against torch's own on each document alone."""
    from dasd_lite.model.load import load_model

    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")

    def gradient(attention: str) -> torch.Tensor:
        model = load_model(small[1], dtype="float32", device="cuda", attention=attention).train()
        with torch.autocast("cuda", torch.bfloat16):
            if attention == "sdpa":
                for document in np.split(ids(), np.cumsum(LENGTHS)[:-1]):
                    row = torch.from_numpy(document.astype(np.int64)).cuda()
                    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
                    torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
            else:
                loss_sum(model, ids(), np.ones(sum(LENGTHS), dtype=bool), LENGTHS).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    packed, plain = gradient("dasd_packed"), gradient("sdpa")
    assert torch.nn.functional.cosine_similarity(packed, plain, dim=0) > 0.999
    assert abs(float(packed.norm() / plain.norm()) - 1) < 0.02


def test_offloaded_activations_give_the_same_gradients_in_less_memory(tmp_path: Path) -> None:
    data = make_rows(tmp_path / "rows", [4096, 2048]), make_model(tmp_path / "model", SHAPE | {"num_hidden_layers": 8})
    kept, offloaded = (
        steps(data, tmp_path / str(offload), gradient_checkpointing="on", offload_activations=offload)
        for offload in (False, True)
    )
    for one, other in zip(kept, offloaded, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert offloaded[0]["grad_norm"] == pytest.approx(kept[0]["grad_norm"], rel=1e-2)
    assert offloaded[-1]["memory_bytes"] < kept[-1]["memory_bytes"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_checkpoint_restores_the_moments(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """At learning rates this high, the steps after lost moments would differ at once."""
    from dasd_lite.training import checkpoint

    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    options = {"optimizer": optimizer, "dtype": "float32", "checkpoint_every": 2, "learning_rate": 1e-2}
    reference = steps(small, tmp_path / "reference", **options)
    save = checkpoint.save

    def save_and_stop(*args: object, **arguments: object) -> None:
        save(*args, **arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            steps(small, tmp_path / "stopped", **options)
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == 2
    resumed = steps(small, tmp_path / "stopped", **options)
    assert len(resumed) == len(reference) == 4
    for one, other in zip(reference, resumed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_qlora_learns_on_the_gpu_and_exports(small: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from dasd_lite.model.load import load_model
    from dasd_lite.model.logprobs import target_logprobs

    method = {"kind": "qlora", "rank": 8}
    curve = steps(small, tmp_path / "out", method=method, epochs=8, learning_rate=5e-3)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    model = load_model(tmp_path / "out" / "model", device="cuda")
    assert np.isfinite(target_logprobs(model, ids(), LENGTHS)[1:120]).all()


def test_float16_with_scaled_losses_learns_what_float32_does(small: tuple[Path, Path], tmp_path: Path) -> None:
    full, half = (steps(small, tmp_path / dtype, dtype=dtype, epochs=8) for dtype in ("float32", "float16"))
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], abs=0.02)
    assert half[-1]["loss"] < half[0]["loss"] - 0.5
    # The scaler finds its scale by skipping steps, so float16 may be a few steps behind.
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_predicted_memory_is_within_a_tenth_of_what_the_gpu_gave(tmp_path: Path, method: str) -> None:
    from dasd_lite.config.train import TrainConfig
    from dasd_lite.costs.hardware import Hardware
    from dasd_lite.costs.memory import predict
    from dasd_lite.costs.shape import read_shape

    if method == "lora":
        pytest.importorskip("peft")
    data = make_rows(tmp_path / "rows", [6000, 2192], num_rows=3), make_model(tmp_path / "model", WIDE)
    options = {"method": {"kind": method}, "grad_accum_steps": 1}
    steps(data, tmp_path / "out", **options)
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # CUDA's own, if nobody else uses the GPU
    hardware = Hardware(
        varlen=torch.cuda.get_device_capability() >= (8, 0),
        liger=importlib.util.find_spec("liger_kernel") is not None,
    )
    predicted = predict(read_shape(data[1]), TrainConfig.model_validate(options), seq_len=8192, hardware=hardware)
    assert torch.cuda.max_memory_allocated() + context == pytest.approx(predicted.total, rel=0.1)


# --- what ended runs on a GPU -------------------------------------------------------------------------


def test_training_with_ligers_kernels_exports_and_leaves_transformers_as_it_was(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("liger_kernel")
    from transformers.models.qwen3 import modeling_qwen3

    from dasd_lite.model.load import load_model
    from dasd_lite.model.logprobs import target_logprobs

    before = dict(vars(modeling_qwen3))
    with_liger, plain = (steps(small, tmp_path / switch, liger=switch) for switch in ("on", "off"))
    assert with_liger[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2)
    assert {name: vars(modeling_qwen3)[name] for name in before} == before
    model = load_model(tmp_path / "on" / "model", device="cpu")
    assert np.isfinite(target_logprobs(model, ids(), LENGTHS)[1:120]).all()


def test_a_training_leaves_the_gpu_to_what_comes_after(small: tuple[Path, Path], tmp_path: Path) -> None:
    """A vLLM engine in this process wants nine tenths of the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    steps(small, tmp_path / "out")
    assert torch.cuda.memory_reserved() <= before + 2**20


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_float16_trains_as_on_a_gpu_without_bfloat16(small: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    if method != "full":
        pytest.importorskip("peft")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    curve = steps(small, tmp_path / "out", method={"kind": method}, dtype="float16", epochs=4, learning_rate=5e-3)
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("width", [12, 320])
def test_heads_that_kernels_do_not_take_train_all_the_same(tmp_path: Path, width: int) -> None:
    shape = SHAPE | {"hidden_size": 4 * width, "head_dim": width}
    data = make_rows(tmp_path / "rows", LENGTHS), make_model(tmp_path / "model", shape)
    assert np.isfinite([step["loss"] for step in steps(data, tmp_path / "out")]).all()
