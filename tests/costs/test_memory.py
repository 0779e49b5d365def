"""The memory of training that is predicted, against what autograd keeps and what is alive at the peak."""

import runpy
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.costs.models import FULL, LORA, QLORA, QWEN3_4B, SHAPE_4B, empty_model, save_model
from tests.rows import loss_sum
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.costs import memory
from dasd_lite.costs.hardware import Hardware
from dasd_lite.costs.memory import TrainingStep, predict
from dasd_lite.costs.shape import read_shape
from dasd_lite.model import logprobs
from dasd_lite.training import trainable

ROOT = Path(__file__).parents[2]


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
    config = TrainConfig(method=method, dtype=dtype, gradient_checkpointing=switch, liger="off")
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
@pytest.mark.parametrize("method", [FULL, LORA, QLORA], ids=lambda m: m.kind)
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [("float32", [256]), ("float32", [100, 50, 95, 11]), ("bfloat16", [96])],  # bfloat16 is slow on a CPU
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


def test_weights_in_four_bits_take_the_bytes_that_are_predicted(tmp_path):
    save_model(tmp_path, vocab_size=256, hidden_size=512, intermediate_size=1536)
    model = trainable.load_trainable(tmp_path, QLORA, dtype="bfloat16", device="cpu")
    tensors = list(model.parameters())
    for state in [p.quant_state for p in tensors if hasattr(p, "quant_state")]:
        tensors += [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert step_of(read_shape(tmp_path), QLORA, "bfloat16", False, 1).weights == pytest.approx(held, rel=0.02)


# --- layers of 4B, with fake tensors ------------------------------------------------------------------


def fake_model(method, dtype, checkpointing, fake, name="Qwen3", **options):
    """Four layers of a 4B model, as load_trainable makes them; their tensors have sizes and no content."""
    torch.set_default_dtype(torch.float32 if method.kind == "full" else dtype)
    try:
        model, shape = empty_model(name, **(QWEN3_4B | {"num_hidden_layers": 4} | options))
    finally:
        torch.set_default_dtype(torch.float32)
    if method.kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=method.rank, target_modules="all-linear"))
    causal = logprobs.causal_model(model)
    if checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    causal.get_input_embeddings().register_forward_hook(trainable._narrow)
    made = {}
    with fake:
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None and p not in made:
                    made[p] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[key] = None if p is None else made[p]
            for key, buffer in module._buffers.items():
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model.train(), shape


@pytest.mark.filterwarnings("ignore")  # of fake tensors, about what they stand in for
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("method", "dtype", "num_tokens", "options"),
    [
        (FULL, "bfloat16", 32768, {}),
        (FULL, "bfloat16", 2048, {}),
        (FULL, "bfloat16", 1024, {}),  # the gradients of the embedding are the peak
        (FULL, "bfloat16", 16384, {"tie_word_embeddings": False}),
        (FULL, "float32", 8192, {}),
        (LORA, "bfloat16", 32768, {}),
        (LORA, "bfloat16", 2048, {}),
        (LORA, "bfloat16", 16384, {"name": "Llama"}),
        (LORA, "bfloat16", 32768, {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}),
    ],
    ids=lambda value: getattr(value, "kind", None) or str(value),
)
def test_the_peak_of_layers_of_4b_is_predicted(logit_bytes, method, dtype, num_tokens, options, checkpointing):
    logit_bytes(1 << (30 if num_tokens >= 2048 else 28))  # less than all tokens: a single chunk is kept as it is
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, shape = fake_model(method, getattr(torch, dtype), checkpointing, fake, **options)
    with fake:
        kept, peak = kept_and_peak(model, getattr(torch, dtype), [num_tokens])
    step = step_of(shape, method, dtype, checkpointing, num_tokens)
    assert step.kept == pytest.approx(kept, rel=0.04)
    assert peak_of(step) == pytest.approx(peak, rel=0.06)


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
