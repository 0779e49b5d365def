"""A model made trainable: unknown layers, which weights decay, and gradients over 4-bit weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tests.model.tiny import LORA, QLORA, random_model, random_row
from tests.rows import QUICK, loss_sum, make_model

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.data.metrics import read_metrics
from dasd_lite.errors import ConfigError
from dasd_lite.model import logprobs
from dasd_lite.model.load import load_model
from dasd_lite.stages.train import train
from dasd_lite.training.optimizer import make_optimizer
from dasd_lite.training.trainable import load_trainable


def test_unknown_target_module_names_those_that_exist(tiny):
    method = Lora(kind="lora", target_modules=["q_proj", "qkv_proj"])
    with pytest.raises(ConfigError, match=r"target_modules.*no layer 'qkv_proj'; it has down_proj, .*q_proj"):
        load_trainable(tiny, method, device="cpu")


def test_a_note_names_an_architecture_without_kernels_of_liger(tiny, monkeypatch, capsys):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr("dasd_lite.training.trainable.liger_conflict", lambda **options: None)
    monkeypatch.setattr("liger_kernel.transformers.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    load_trainable(tiny, Full(), device="cpu", liger="on")
    assert "note: liger-kernel has no kernels for qwen3, so training is slower" in capsys.readouterr().err


def test_only_matrices_decay(tiny):
    config = TrainConfig(weight_decay=0.3)
    optimizer = make_optimizer(load_trainable(tiny, config.method, device="cpu"), config)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.3}


def test_adapters_take_16_bit_inputs_as_they_are(tmp_path):
    """Results equal those by way of float32 to the bit, and less is kept for the backward pass."""
    random, data = random_model(tmp_path / "random"), random_row(40, 50)

    def step(*, cast):
        torch.manual_seed(1)
        model = load_trainable(random, LORA, device="cpu", dtype="bfloat16")
        adapted = [m for m in model.modules() if getattr(m, "cast_input_dtype_enabled", None) is False]
        assert len(adapted) == 7 * model.config.num_hidden_layers
        for module in adapted:
            module.cast_input_dtype_enabled = cast
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_sum(model, data.ids, data.loss_mask, data.doc_lengths)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        return loss, gradients, sum(kept.values())

    (loss, gradient, kept), (detour_loss, detour_gradient, detour_kept) = step(cast=False), step(cast=True)
    assert torch.equal(loss, detour_loss)
    assert torch.equal(gradient, detour_gradient)
    assert kept < 0.97 * detour_kept


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize(
    ("method", "dtype", "tolerance", "device"),
    [
        (LORA, "float32", 1e-6, "cpu"),
        (QLORA, "float32", 1e-6, "cpu"),
        (LORA, "bfloat16", 0.02, "cpu"),
        pytest.param(LORA, "float16", 0.02, "cuda", marks=GPU),
        pytest.param(QLORA, "float16", 0.02, "cuda", marks=GPU),
    ],
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_adapters_that_add_in_place_do_what_pefts_do(tmp_path, method, dtype, tolerance, device, recomputed):
    data, found = random_row(40, 50), []
    random = random_model(tmp_path / "random")
    for in_place in (True, False):
        torch.manual_seed(1)
        model = load_trainable(random, method, device=device, dtype=dtype, gradient_checkpointing=recomputed)
        changed = [module for module in model.modules() if "forward" in vars(module) and hasattr(module, "lora_A")]
        assert len(changed) == 7 * model.config.num_hidden_layers
        for module in changed:
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.05)  # 0 in a new adapter
            if not in_place:
                del vars(module)["forward"]
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = loss_sum(model, data.ids, data.loss_mask, data.doc_lengths)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
        with model.disable_adapter():
            plain = logprobs.target_logprobs(model, data.ids, data.doc_lengths)
        base = load_model(random, device=device, dtype=dtype, four_bit=method.kind == "qlora")
        wanted = logprobs.target_logprobs(base, data.ids, data.doc_lengths)
        np.testing.assert_allclose(plain, wanted, atol=0 if device == "cpu" else 1e-3)
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


def test_in_float16_a_residual_stream_beyond_its_range_is_computed_and_trained(tmp_path, packed):
    """On a T4; the loss is scaled there, so that small gradients are not 0."""
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    curves = []
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        train(packed, folder, TrainConfig(**QUICK | {"warmup_ratio": 0.0}, dtype=dtype), out=out)
        curves.append([line["loss"] for line in read_metrics(out / "metrics.jsonl")])
    (first, *_, last), (half_first, *_, half_last) = curves
    assert half_first == pytest.approx(first, abs=0.02)
    assert last < first - 0.3 and half_last == pytest.approx(last, abs=0.3)


def test_qlora_gradient_is_right_after_an_eval_forward(tmp_path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights in eval mode, and later gradients are wrong."""
    random = random_model(tmp_path / "random")
    data = random_row(40, 50)

    def gradient(model):
        loss_sum(model, data.ids, data.loss_mask, data.doc_lengths).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def build(method):
        torch.manual_seed(1)
        return load_trainable(random, method, device="cpu")

    fresh, used = build(QLORA), build(QLORA)
    used.eval()
    logprobs.target_logprobs(used, data.ids, data.doc_lengths)
    used.train()
    expected = gradient(fresh)
    torch.testing.assert_close(gradient(used), expected, rtol=0, atol=0)
    dequantized = build(LORA)
    base = load_model(random, device="cpu", four_bit=True).dequantize().state_dict()
    own = logprobs.causal_model(dequantized).state_dict()
    for name, weight in base.items():
        own[name.replace("_proj.weight", "_proj.base_layer.weight")].copy_(weight)
    assert float(torch.cosine_similarity(gradient(dequantized), expected, dim=0)) > 0.9999
