"""What a LoRA adapter changes: the same parts in every mixture of experts, as the recipe says."""

import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.model import zoo

from dasd_lite.config.train import Lora
from dasd_lite.errors import ConfigError
from dasd_lite.training.adapter import add_adapter, find_targets

FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**FEW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES = {
    **{name: zoo.ZOO[name] for name in ("qwen3_moe", "mixtral", "qwen2_moe", "qwen3_next", "granite_moe", "gpt_oss")},
    **{name: zoo.ZOO[name] for name in ("phimoe", "llama4", "deepseek_v3")},
    "olmoe": ("OlmoeConfig", {**zoo.BASE, "num_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("MiniMaxM2Config", {**zoo.HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeConfig", {**zoo.HEADS, **SHARED}),
    "deepseek_v2": ("DeepseekV2Config", {**zoo.HEADS, **zoo.MLA}),
    "dots1": ("Dots1Config", {**zoo.BASE, **SHARED, "n_shared_experts": 1, "layer_types": ["full_attention"] * 2}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {**zoo.BASE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    ),
    "hunyuan_moe": ("HunYuanMoEV1Config", {**zoo.HEADS, "num_experts": 4, "moe_topk": 2}),
}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}


def build(monkeypatch, name, **options):
    monkeypatch.setitem(zoo.ZOO, name, MIXTURES[name])
    return zoo.build(name, **(LATENT if name.startswith("deepseek") else {}), **options)


@pytest.mark.parametrize("experts", ["frozen", "adapted"])
@pytest.mark.parametrize("router", ["frozen", "adapted"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_router_of_every_mixture_are_what_the_recipe_says(monkeypatch, capsys, name, router, experts):
    model = build(monkeypatch, name)
    layers = {
        n.removesuffix(".weight")
        for n, _ in model.named_parameters()
        if n.endswith(("q_proj.weight", "q_b_proj.weight")) or ("shared" in n and n.endswith(".weight"))
    }
    adapted = add_adapter(model, Lora(rank=4, experts=experts, router=router))
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"attention and MLP layers, experts {experts}, router {router}: " in line
    trained = {n.replace(".base_layer", "") for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    assert any(".experts.lora_" in n for n in trained) == (experts == "adapted")
    routers = [n for n in trained if any(f".{part}.lora_" in n for part in ("gate", "router", "wg"))]
    assert bool(routers) == (router == "adapted")
    assert len(layers) >= 1
    assert {f"base_model.model.{n}.lora_A.default.weight" for n in layers} <= trained
    config = adapted.peft_config["default"]
    assert config.rank_pattern == {} and config.r == 4
    adapted.train()
    adapted(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    without = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_a_note_where_peft_reads_an_adapter_by_a_rule_of_its_own(monkeypatch, capsys, tmp_path):
    """Otherwise every reader gets the same model from it, experts and router included."""
    ids = torch.arange(3, 40)[None]
    for name, is_read in (("qwen3_moe", True), ("granite_moe", True), ("glm4_moe", False)):
        method = Lora(rank=4, experts="adapted", router="adapted")
        adapted = add_adapter(build(monkeypatch, name), method).eval()
        assert ("no other program should load this one" not in capsys.readouterr().err) == is_read
        with torch.no_grad():
            for n, p in adapted.named_parameters():
                if "lora_B" in n:
                    p.normal_(0, 0.1)
            expected = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path / name)
        ours = add_adapter(build(monkeypatch, name), method, tmp_path / name).eval()
        torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        if is_read:
            theirs = peft.PeftModel.from_pretrained(build(monkeypatch, name), tmp_path / name).eval()
            torch.testing.assert_close(theirs(input_ids=ids).logits, expected)


def test_an_adapter_is_continued_with_the_same_parts(monkeypatch, tmp_path):
    add_adapter(build(monkeypatch, "qwen3_moe"), Lora(rank=4)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"train.method.experts = 'adapted' and router = 'frozen', but the adapter to"
    ):
        add_adapter(build(monkeypatch, "qwen3_moe"), Lora(rank=4, experts="adapted"), tmp_path)


def test_what_a_model_does_not_have_is_refused():
    model = zoo.build("llama")
    for part in ("experts", "router"):
        with pytest.raises(ConfigError, match=rf"train.method.{part} = 'adapted': the student \(llama\) has no {part}"):
            find_targets(model, Lora(**{part: "adapted"}))
    with pytest.raises(ConfigError, match="no layer 'gate_up_proj'; it has down_proj"):
        find_targets(model, Lora(target_modules=["gate_up_proj"]))


@pytest.mark.parametrize(("name", "layers"), [("llama", 14), ("gpt2", 8), ("falcon_h1", 16)])
def test_layers_of_dense_models_without_those_whose_kernel_would_ignore_an_adapter(capsys, name, layers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = add_adapter(zoo.build(name), Lora(rank=4))
    assert f"note: LoRA: {layers} attention and MLP layers: " in capsys.readouterr().err
    assert not [n for n, _ in adapted.named_parameters() if "lora" in n and ("out_proj" in n or "lm_head" in n)]
