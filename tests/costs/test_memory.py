"""Sizes and work of models, the memory of training held against what autograd keeps, and what makes it fit."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.rows import loss_sum
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dasd_lite.config.load import load_recipe
from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs import estimate as training_costs
from dasd_lite.costs import memory
from dasd_lite.costs.fit import sizes_that_fit, smallest_change
from dasd_lite.costs.flops import training_flops
from dasd_lite.costs.hardware import Gpu, Hardware, peak_flops
from dasd_lite.costs.memory import TrainingStep, predict
from dasd_lite.costs.shape import read_shape, shape_of
from dasd_lite.errors import ConfigError
from dasd_lite.model import logprobs
from dasd_lite.model.attention import PACKED, register
from dasd_lite.run import check
from dasd_lite.training import trainable

ROOT = Path(__file__).parents[2]
FULL, LORA, QLORA = Full(), Lora(kind="lora", rank=8, alpha=16), Lora(kind="qlora", rank=8, alpha=16)
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SHAPE_4B = shape_of(QWEN3_4B | {"model_type": "qwen3"})


# --- parameters and FLOPs -------------------------------------------------------------------------------

ARCHITECTURES = [
    ("Qwen3", {"tie_word_embeddings": True}),
    ("Qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("Qwen2", {}),
    ("Mistral", {}),
]


def empty_model(name, **options):
    """A model without weights, and its shape."""
    register()
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    config._attn_implementation = PACKED
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model, shape_of(config.to_dict())


@pytest.mark.parametrize(("name", "options"), ARCHITECTURES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_parameters_are_counted_to_the_last(name, options, targets):
    model, shape = empty_model(name, **options)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    method = Lora(kind="lora", rank=4, target_modules=targets)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.adapter_parameters(method) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_parameters_of_experts_are_counted_and_those_that_work():
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0]}
    model, shape = empty_model("Qwen3Moe", **options)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    idle = 3 * 6 * 3 * 256 * 128  # layers, experts that a token does not visit, their three matrices
    assert shape.matmul_parameters == shape.num_parameters - shape.vector_parameters - idle


def test_the_shape_of_qwen3_4b_is_the_published_one():
    assert SHAPE_4B.num_parameters == 4_022_468_096


def test_a_shape_is_read_from_a_nested_config_and_faults_are_told(tmp_path, demo):
    assert read_shape(demo / "student").hidden_size == 64
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "gpt2", "n_embd": 4}}')
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        read_shape(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape(tmp_path / "none")


def counted_flops(model, num_tokens):
    """What torch counts in a pass over a document, attention left out."""
    ids = np.zeros(num_tokens, dtype=np.int64)
    with FlopCounterMode(display=False) as counter:
        loss_sum(model, ids, np.ones(num_tokens, bool), [num_tokens]).backward()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_flops_are_those_that_torch_counts(tmp_path):
    saved(tmp_path, "Qwen3")
    shape, num_tokens = read_shape(tmp_path), 64
    attention = 6 * shape.num_layers * shape.q_size * num_tokens**2  # 3 passes, 2 products, 2 each, half of the pairs
    whole = trainable.load_trainable(tmp_path, FULL, device="cpu")
    ours = training_flops(shape, [num_tokens], FULL, num_targets=num_tokens - 1) - attention
    assert ours == counted_flops(whole, num_tokens)
    adapted = trainable.load_trainable(tmp_path, LORA, device="cpu")
    ours = training_flops(shape, [num_tokens], LORA, num_targets=num_tokens - 1) - attention
    assert ours == pytest.approx(counted_flops(adapted, num_tokens), rel=0.03)  # nothing needs the embedding's gradient


def test_documents_that_do_not_see_each_other_are_less_work():
    one, four = (training_flops(SHAPE_4B, lengths, FULL) for lengths in ([4096], [1024] * 4))
    assert one - four == 6 * 36 * 4096 * (4096**2 - 4 * 1024**2)
    windowed = shape_of(QWEN3_4B | {"model_type": "mistral", "sliding_window": 1024})
    assert training_flops(windowed, [1024], FULL) == pytest.approx(four / 4)
    assert four < training_flops(windowed, [4096], FULL) < one


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T400 4GB", None),
        ("some card", None),
    ],
)
def test_the_peak_is_known_by_the_name(name, peak):
    assert peak_flops(name) == peak


# --- what autograd keeps, and what is alive -------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being while it is on; `peak` is the most at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in given | self.sizes.keys():
                storage = tensor.untyped_storage()
                self.sizes[storage_of(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage_of(tensor))
        self.peak = max(self.peak, self.now)
        return found

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def kept_and_peak(model, dtype, doc_lengths):
    """Bytes that autograd keeps beside the weights, and the most that is alive beside weights and gradients."""
    num_tokens = sum(doc_lengths)
    ids, mask = np.zeros(num_tokens, dtype=np.int64), np.ones(num_tokens, bool)
    own = {storage_of(t) for t in (*model.parameters(), *model.buffers())}
    found = {}

    def loss():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return loss_sum(model, ids, mask, doc_lengths)

    def pack(tensor):
        if storage_of(tensor) not in own:
            found[storage_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first = loss()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    found.clear()
    first.backward()  # from here on there are gradients
    with Alive() as alive:
        loss().backward()
    return kept, alive.peak


def saved(folder, name="Qwen3", **options):
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def terms(shape, method, dtype, checkpointing, num_tokens, varlen=True):
    switch = "on" if checkpointing else "off"
    config = TrainConfig(method=method, dtype=dtype, gradient_checkpointing=switch, liger="off")
    return TrainingStep(shape, config, num_tokens, 1, Hardware(element_bytes=4, varlen=varlen, on_gpu=False))


@pytest.fixture
def logit_bytes(monkeypatch):
    """Sets the size of a chunk: a small test has several chunks, and one of 4B not hundreds."""

    def set_to(num_bytes):
        monkeypatch.setattr(logprobs, "LOGIT_BYTES", num_bytes)
        monkeypatch.setattr(memory, "LOGIT_BYTES", num_bytes)

    return set_to


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", [FULL, LORA, QLORA], ids=lambda m: m.kind)
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [("float32", [512]), ("float32", [200, 100, 190, 22]), ("bfloat16", [96])],  # bfloat16 is slow on a CPU
    ids=["float32", "packed", "bfloat16"],
)
def test_the_terms_are_what_autograd_keeps(tmp_path, logit_bytes, method, dtype, lengths, checkpointing):
    logit_bytes(4 * 1000 * 64)
    folder = saved(tmp_path)
    model = trainable.load_trainable(
        folder, method, dtype=dtype, device="cpu", gradient_checkpointing=checkpointing, liger="off"
    )
    kept, peak = kept_and_peak(model, getattr(torch, dtype), lengths)
    ours = terms(read_shape(folder), method, dtype, checkpointing, sum(lengths), varlen=len(lengths) == 1)
    assert ours.kept == pytest.approx(kept, rel=0.15 if checkpointing else 0.06)
    assert max(sum(parts) for parts in ours.candidates().values()) == pytest.approx(peak, rel=0.12)


def test_weights_in_four_bits_take_what_is_said(tmp_path):
    folder = saved(tmp_path, vocab_size=256, hidden_size=512, intermediate_size=1536)
    model = trainable.load_trainable(folder, QLORA, dtype="bfloat16", device="cpu")
    tensors = list(model.parameters())
    for state in [p.quant_state for p in tensors if hasattr(p, "quant_state")]:
        tensors += [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert terms(read_shape(folder), QLORA, "bfloat16", False, 1).weights == pytest.approx(held, rel=0.02)


def fake_model(method, dtype, checkpointing, fake, num_layers, name="Qwen3", **options):
    """A model of any size whose tensors have sizes and no content, made as load_trainable makes one."""
    torch.set_default_dtype(torch.float32 if method.kind == "full" else dtype)
    try:
        model, shape = empty_model(name, **(QWEN3_4B | {"num_hidden_layers": num_layers} | options))
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
        (FULL, "bfloat16", 16384, {"tie_word_embeddings": False}),
        (FULL, "float32", 8192, {}),
        (LORA, "bfloat16", 32768, {}),
        (LORA, "bfloat16", 2048, {}),
        (LORA, "bfloat16", 16384, {"name": "Llama"}),
        (LORA, "bfloat16", 32768, {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}),
    ],
    ids=lambda value: getattr(value, "kind", None) or str(value),
)
def test_the_peak_of_layers_of_4b_is_foretold(logit_bytes, method, dtype, num_tokens, options, checkpointing):
    logit_bytes(1 << 30)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, shape = fake_model(method, getattr(torch, dtype), checkpointing, fake, 4, **options)
    with fake:
        kept, peak = kept_and_peak(model, getattr(torch, dtype), [num_tokens])
    ours = terms(shape, method, dtype, checkpointing, num_tokens)
    assert ours.kept == pytest.approx(kept, rel=0.04)
    assert max(sum(parts) for parts in ours.candidates().values()) == pytest.approx(peak, rel=0.06)


def test_a_chunk_is_as_large_as_that_of_training():
    assert memory.LOGIT_BYTES == logprobs.LOGIT_BYTES


# --- predictions, and what makes them smaller -----------------------------------------------------------


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
    assert base.total - offloaded.total > 11e9  # 36 layers' inputs of 64K × 2,560 in 16 bits, but one
    assert offloaded.host >= 36 * 65536 * 2560 * 2
    liger = predict(SHAPE_4B, TrainConfig(), seq_len=65536, hardware=Hardware(liger=True))
    assert liger.total < base.total


@pytest.mark.parametrize(
    ("train", "seq_len", "card"),
    [
        (TrainConfig(), 65536, 141e9),
        (TrainConfig(method=Lora(kind="lora")), 16384, 24e9),
        (TrainConfig(method=Lora(kind="qlora"), offload_activations=True), 8192, 8e9),
    ],
    ids=["full, 64K, 141 GB", "lora, 16K, 24 GB", "qlora, 8K, 8 GB"],
)
def test_what_is_promised_for_cards_is_predicted(train, seq_len, card):
    assert predict(SHAPE_4B, train, seq_len=seq_len).total < card


def change(card_bytes, config=None, seq_len=65536, **options):
    return smallest_change(SHAPE_4B, config or TrainConfig(), seq_len=seq_len, gpu_bytes=card_bytes, **options)


def test_nothing_is_changed_where_it_fits():
    assert change(141e9).settings == {}


def test_the_smallest_change_is_found_and_no_more():
    assert change(80e9).settings == {"train.optimizer": '"adamw_8bit"'}
    assert change(60e9).settings == {"train.optimizer": '"adamw_8bit"', "train.offload_activations": "true"}
    assert change(40e9).settings == {"train.method": '{ kind = "lora", rank = 32 }'}
    two = TrainConfig(micro_batch_size=2, grad_accum_steps=4)
    assert change(100e9, two).settings == {"train.micro_batch_size": "1", "train.grad_accum_steps": "8"}
    kept = TrainConfig(method=Lora(kind="lora", rank=8, alpha=16), gradient_checkpointing="off")
    assert change(12e9, kept, 4096).settings == {"train.gradient_checkpointing": '"on"'}
    found = change(8e9)
    assert found.settings["pack.seq_len"] == str(found.seq_len)
    assert 'kind = "qlora"' in str(found)


def test_every_change_found_fits_and_a_smaller_card_never_needs_less():
    lengths = []
    for card_bytes in range(4 * 10**9, 100 * 10**9, 4 * 10**9):
        found = change(card_bytes)
        assert found is None or found.prediction.total <= card_bytes
        lengths.append(0 if found is None else found.seq_len)
    assert lengths == sorted(lengths)
    assert change(2e9) is None


def test_moments_in_8_bits_are_not_advised_to_several_processes():
    found = change(30e9, num_processes=8)
    assert found.settings == {"train.offload_activations": "true"}


def test_the_change_keeps_an_adapters_options():
    found = change(7e9, TrainConfig(method=Lora(kind="lora", rank=8, alpha=16)), 4096)
    assert found.settings["train.method"] == '{ kind = "qlora", rank = 8, alpha = 16.0 }'


# --- in check -------------------------------------------------------------------------------------------


def trainings(folder, card, monkeypatch):
    (folder / "config.json").write_text(json.dumps(QWEN3_4B | {"model_type": "qwen3"}))
    text = f'out = "run"\nstudent = {{ kind = "transformers", model = "{folder}" }}\npack.seq_len = 65536\n'
    text += 'prompts.path = "q.jsonl"\nteacher = { kind = "transformers", model = "t" }\n'
    text += '[[phase]]\nname = "low"\n[[phase]]\nname = "high"\n[[phase]]\nname = "last"\npack.seq_len = 8192\n'
    (folder / "run.toml").write_text(text)
    monkeypatch.setattr(training_costs, "visible_gpu", lambda: card)
    monkeypatch.setattr(training_costs, "has_liger", lambda: False)
    return training_costs.trainings_of(load_recipe(folder / "run.toml"))


def test_check_says_what_a_card_must_have(tmp_path, monkeypatch):
    found = trainings(tmp_path, None, monkeypatch)
    lines = [training_costs.memory_line(one) for one in found]
    assert [line.split(":")[0] for line in lines] == ["low, high/train", "last/train"]
    assert "on a card (weights 16.1 GB, gradients 16.1 GB, optimiser 32.2 GB, activations" in lines[0]
    assert lines[0].endswith("no card is seen here: fits cards from 141 GB on")
    assert list(training_costs.too_big(found)) == []
    assert training_costs.hours_line(found, 100) is None


def test_check_refuses_what_the_card_has_no_room_for(tmp_path, monkeypatch):
    card = Gpu("NVIDIA GeForce RTX 4090", 24 * 10**9, 1, Hardware())
    found = trainings(tmp_path, card, monkeypatch)
    faults = list(training_costs.too_big(found))
    assert len(faults) == 2
    assert faults[0].startswith("train: phase 'low', 'high' needs about 9")
    assert "the card (NVIDIA GeForce RTX 4090) has 24.0 GB; smallest change that fits: train." in faults[0]
    hours = training_costs.hours_line(found, 100)
    assert "at an assumed 40% of the 165 TFLOP/s of NVIDIA GeForce RTX 4090" in hours


def test_check_refuses_it_with_exit_code_2(tmp_path, monkeypatch, small_recipe):
    tiny = Gpu("a tiny card", 10**8, 1, Hardware())
    monkeypatch.setattr(training_costs, "visible_gpu", lambda: tiny)
    with pytest.raises(ConfigError, match=r"the card \(a tiny card\) has 100\.0 MB"):  # cli.py makes it exit code 2
        check.check(load_recipe(small_recipe(tmp_path)), "models")


def test_sizes_that_fit_are_those_of_cards():
    assert sizes_that_fit(predict(SHAPE_4B, TrainConfig(), seq_len=65536)) == [141]


def test_the_table_in_training_md_is_what_is_predicted():
    done = subprocess.run(
        [sys.executable, "docs/make_training_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
