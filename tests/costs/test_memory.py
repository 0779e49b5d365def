"""The memory of training that is predicted, against what autograd keeps and what is alive at the peak."""

import runpy
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.costs.models import FULL, LORA, QLORA, QWEN3_4B, SHAPE_4B, SMALL, save_model
from tests.rows import loss_sum
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.costs import memory
from dasd_lite.costs.hardware import Hardware
from dasd_lite.costs.memory import TrainingStep, predict
from dasd_lite.costs.shape import read_shape, shape_of
from dasd_lite.model import LOGIT_BYTES, logprobs
from dasd_lite.training import trainable

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from trace_step import trace_step


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on; `peak` is the most at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := storage_of(tensor)) not in given and key not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, key)
        self.peak = max(self.peak, self.now)
        return result

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def kept_and_peak(model, dtype, doc_lengths):
    """Bytes that autograd keeps beside the weights, and the most that is alive beside weights and gradients.

    Of one pass over documents in which every token is a target.
    """
    num_tokens = sum(doc_lengths)
    ids, mask = np.zeros(num_tokens, dtype=np.int64), np.ones(num_tokens, bool)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    own = {storage_of(t) for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with Alive() as alive:
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with saving, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_sum(model, ids, mask, doc_lengths)
        loss.backward()
    return sum(kept.values()), alive.peak


def step_of(shape, method, dtype, checkpointing, num_tokens, varlen=True):
    switch = "on" if checkpointing else "off"
    options = {"gradient_checkpointing": switch, "liger": "off", "one_pass_loss": False}  # as loss_sum does
    config = TrainConfig(method=method, dtype=dtype, **options)
    return TrainingStep(shape, config, num_tokens, 1, Hardware(element_bytes=4, varlen=varlen, on_gpu=False))


def peak_of(step):
    return max(sum(parts) for parts in step.candidates().values())


@pytest.fixture
def logit_bytes(monkeypatch):
    """Sets the size of a chunk of logits, so that a small model has several chunks, and one of 4B not hundreds."""

    def set_to(num_bytes):
        monkeypatch.setattr(logprobs, "LOGIT_BYTES", num_bytes)
        monkeypatch.setattr(memory, "LOGIT_BYTES", num_bytes)

    return set_to


# --- small models that compute ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", [FULL, LORA, pytest.param(QLORA, marks=pytest.mark.slow)], ids=lambda m: m.kind)
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [("float32", [256]), ("float32", [100, 50, 95, 11]), pytest.param("bfloat16", [96], marks=pytest.mark.slow)],
    ids=["float32", "packed", "bfloat16"],
)
def test_what_is_predicted_is_what_autograd_keeps(small, logit_bytes, method, dtype, lengths, checkpointing):
    logit_bytes(4 * 1000 * 32)
    options = {"dtype": dtype, "device": "cpu", "gradient_checkpointing": checkpointing, "liger": "off"}
    model = trainable.load_trainable(small, method, **options)
    kept, peak = kept_and_peak(model, getattr(torch, dtype), lengths)
    step = step_of(read_shape(small), method, dtype, checkpointing, sum(lengths), varlen=len(lengths) == 1)
    assert step.kept == pytest.approx(kept, rel=0.15 if checkpointing else 0.06)
    assert peak_of(step) == pytest.approx(peak, rel=0.12)


@pytest.mark.parametrize("experts", ["frozen", "adapted"])
def test_adapted_experts_are_kept_with_their_adapters_added(tmp_path, logit_bytes, experts):
    logit_bytes(4 * 1000 * 32)
    torch.manual_seed(0)
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "decoder_sparse_step": 1}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **options)).save_pretrained(tmp_path)
    method = LORA.model_copy(update={"experts": experts})
    for checkpointing in (False, True):
        choice = {"dtype": "float32", "device": "cpu", "gradient_checkpointing": checkpointing}
        kept, peak = kept_and_peak(trainable.load_trainable(tmp_path, method, **choice), torch.float32, [256])
        step = step_of(read_shape(tmp_path), method, "float32", checkpointing, 256)
        assert step.kept == pytest.approx(kept, rel=0.12)
        assert peak_of(step) == pytest.approx(peak, rel=0.1)


def test_weights_in_four_bits_take_the_bytes_that_are_predicted(tmp_path):
    save_model(tmp_path, vocab_size=256, hidden_size=512, intermediate_size=1536)
    model = trainable.load_trainable(tmp_path, QLORA, dtype="bfloat16", device="cpu")
    tensors = list(model.parameters())
    for state in [p.quant_state for p in tensors if hasattr(p, "quant_state")]:
        tensors += [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert step_of(read_shape(tmp_path), QLORA, "bfloat16", False, 1).weights == pytest.approx(held, rel=0.02)


# --- the product's step on a 4B model, with fake tensors ----------------------------------------------


def traced_over_predicted(method, seq_len, layers, liger="off", dtype="bfloat16", **choice):
    """The memory of a traced step, and the prediction divided by it."""
    checkpointing = choice.pop("checkpointing", True)
    config = TrainConfig(
        method=method, dtype=dtype, liger=liger, gradient_checkpointing="on" if checkpointing else "off"
    )
    shape = QWEN3_4B | {"num_hidden_layers": layers} | choice.pop("shape", {})
    varlen = choice.pop("varlen", True)
    kept = {"layers_kept": choice.get("layers_kept", 0), "keep_attention": choice.get("keeps_attention", False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors, about what they stand in for
        traced = trace_step(
            shape,
            config,
            [seq_len * 5 // 8, seq_len * 3 // 8],
            checkpointing=checkpointing,
            varlen=varlen,
            load=kept,
            logit_bytes=2 << 30 if seq_len > 16384 else LOGIT_BYTES,
        )
    known = shape_of(shape | {"model_type": "qwen3"})
    room = 1e12 if seq_len > 16384 else None  # larger chunks of logits are traced faster
    hardware = Hardware(liger=liger == "on", varlen=varlen, memory=room, free=room)
    step = TrainingStep(known, config, seq_len, 1, hardware, **choice)
    prediction = memory.predict_step(step)
    assert prediction.weights + prediction.gradients + prediction.optimizer == pytest.approx(
        traced.fixed_bytes, rel=0.003
    )
    return (prediction.total - prediction.overhead) / traced.total_bytes


LORA_32, QLORA_32 = Lora(kind="lora"), Lora(kind="qlora")


@pytest.mark.parametrize("method", [FULL, LORA_32, QLORA_32], ids=lambda method: method.kind)
@pytest.mark.parametrize("seq_len", [8192, pytest.param(65536, marks=pytest.mark.slow)])
def test_the_memory_of_a_step_is_predicted(method, seq_len):
    assert traced_over_predicted(method, seq_len, 2) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        (FULL, {"checkpointing": False}),
        (FULL, {"layers_kept": 1, "keeps_attention": True}),
        (LORA_32, {"layers_kept": 1}),
        pytest.param(FULL, {"shape": {"tie_word_embeddings": False}}, marks=pytest.mark.slow),
        (QLORA_32, {"varlen": False, "dtype": "float16"}),  # a T4
        (LORA_32, {"shape": {"num_attention_heads": 80, "num_key_value_heads": 8}}),  # attention is the peak
    ],
    ids=str,
)
def test_the_memory_of_other_steps_is_predicted(method, choice):
    assert traced_over_predicted(method, 16384, 2, **choice) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        (FULL, {}),
        (LORA_32, {"layers_kept": 1}),
        pytest.param(FULL, {"layers_kept": 1}, marks=pytest.mark.slow),
        pytest.param(FULL, {"checkpointing": False}, marks=pytest.mark.slow),
        pytest.param(LORA_32, {}, marks=pytest.mark.slow),
        pytest.param(LORA_32, {"checkpointing": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_memory_of_a_step_with_ligers_kernels_is_predicted(method, choice):
    pytest.importorskip("liger_kernel")
    assert traced_over_predicted(method, 16384, 2, "on", **choice) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA_32, QLORA_32], ids=lambda method: method.kind)
@pytest.mark.parametrize("choice", [{}, {"checkpointing": False}, {"layers_kept": 1}], ids=str)
@pytest.mark.parametrize("liger", ["off", "on"])
def test_the_memory_of_a_step_in_float16_is_predicted(method, choice, liger):
    if liger == "on":
        pytest.importorskip("liger_kernel")
    assert traced_over_predicted(method, 16384, 3, liger, "float16", varlen=False, **choice) == pytest.approx(
        1, abs=0.03
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", [FULL, LORA_32, QLORA_32], ids=lambda method: method.kind)
@pytest.mark.parametrize("seq_len", [8192, 16384, 32768, 65536])
@pytest.mark.parametrize("liger", ["off", "on"])
def test_the_memory_of_a_step_of_all_layers_is_predicted(method, seq_len, liger):
    if liger == "on":
        pytest.importorskip("liger_kernel")
    assert traced_over_predicted(method, seq_len, 36, liger) == pytest.approx(1, abs=0.03)


# --- the prediction -----------------------------------------------------------------------------------


def test_a_chunk_is_as_large_as_in_training():
    assert memory.LOGIT_BYTES == logprobs.LOGIT_BYTES


def test_parts_add_up_and_follow_the_options():
    base = predict(SHAPE_4B, TrainConfig(), seq_len=65536)
    assert base.total == pytest.approx(
        base.weights + base.gradients + base.optimizer + base.kept + base.layer + base.loss + base.overhead
    )
    assert base.weights == base.gradients == 4 * SHAPE_4B.num_parameters
    assert base.optimizer == 8 * SHAPE_4B.num_parameters
    assert base.host == 0
    eighth = predict(SHAPE_4B, TrainConfig(), seq_len=65536, num_processes=8)
    assert eighth.gradients == pytest.approx(base.gradients / 8)
    assert eighth.weights < base.weights / 4
    paged = predict(SHAPE_4B, TrainConfig(optimizer="paged_adamw_8bit"), seq_len=65536)
    assert paged.optimizer == 0
    assert paged.host == pytest.approx(2 * SHAPE_4B.num_parameters, rel=0.02)
    offloaded = predict(SHAPE_4B, TrainConfig(offload_activations=True), seq_len=65536)
    assert base.total - offloaded.total > 11e9  # the inputs of 36 layers, 64K × 2,560 in 16 bits, except one
    assert offloaded.host >= 36 * 65536 * 2560 * 2
    stored = 2 * SHAPE_4B.num_parameters
    assert stored < eighth.host < 1.3 * stored  # one process after the other reads the model
    small = predict(SHAPE_4B, TrainConfig(method=Lora(kind="qlora")), seq_len=8192)
    assert small.total < 8e9 and small.host == stored  # the exported model has no room beside the trained one
    large = predict(SHAPE_4B, TrainConfig(method=QLORA), seq_len=8192, hardware=Hardware(memory=85e9, free=85e9))
    assert large.host == 0
    liger = predict(SHAPE_4B, TrainConfig(), seq_len=65536, hardware=Hardware(liger=True))
    assert liger.total < base.total


@pytest.mark.parametrize(
    ("train", "seq_len", "gpu_bytes"),
    [
        (TrainConfig(), 65536, 141e9),
        (TrainConfig(method=Lora(kind="lora")), 16384, 24e9),
        (TrainConfig(method=Lora(kind="qlora"), offload_activations=True), 8192, 8e9),
    ],
    ids=["full, 64K, 141 GB", "lora, 16K, 24 GB", "qlora, 8K, 8 GB"],
)
def test_what_is_promised_for_gpus_is_predicted(train, seq_len, gpu_bytes):
    assert predict(SHAPE_4B, train, seq_len=seq_len).total < gpu_bytes


def test_the_table_in_training_md_is_what_is_predicted(monkeypatch):
    script = str(ROOT / "docs" / "make_training_table.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(script, run_name="__main__")  # exits when the table is not up to date
