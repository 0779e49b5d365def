"""Parameters of a model, from its config alone."""

import pytest

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.costs.models import SHAPE_4B, empty_model
from tests.training.test_adapter import LATENT, MIXTURES

from dasd_lite.config.train import Lora
from dasd_lite.costs.shape import read_shape, shape_of
from dasd_lite.errors import ConfigError

ARCHITECTURES = [
    ("Qwen3", {"tie_word_embeddings": True}),
    ("Qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("Qwen2", {}),
    ("Mistral", {}),
]


@pytest.mark.parametrize(("name", "options"), ARCHITECTURES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_parameters_are_counted_exactly(name, options, targets):
    model, shape = empty_model(name, **options)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    method = Lora(kind="lora", rank=4, target_modules=targets)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.adapter_parameters(method) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_all_parameters_of_experts_are_counted_and_those_that_a_token_visits():
    options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0]}
    model, shape = empty_model("Qwen3Moe", **options)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    idle = 3 * 6 * 3 * 256 * 128  # layers, experts that a token does not visit, their three matrices
    assert shape.matmul_parameters == shape.num_parameters - shape.vector_parameters - idle


LIKE_LLAMA = MIXTURES.keys() - {"qwen3_next", "gpt_oss"}
OTHER_VECTORS = {"phimoe": 5 * 64, "ernie4_5_moe": 4}  # biases of norms; of the choice of experts


@pytest.mark.parametrize("name", sorted(LIKE_LLAMA))
@pytest.mark.parametrize("parts", [{}, {"experts": "adapted"}, {"router": "adapted"}, {"target_modules": ["o_proj"]}])
def test_mixtures_and_adapters_on_their_parts_are_counted_exactly(name, parts):
    import torch
    import transformers

    from dasd_lite.training.adapter import add_adapter

    config_class, numbers = MIXTURES[name]
    config = getattr(transformers, config_class)(**{**numbers, **(LATENT if name.startswith("deepseek") else {})})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict())
    assert shape.num_parameters + OTHER_VECTORS.get(name, 0) == sum(p.numel() for p in model.parameters())
    method = Lora(rank=4, **parts)
    adapted = add_adapter(model, method)
    assert shape.adapter_parameters(method) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_adapters_on_the_experts_of_qwen3_30b():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768}
    config |= {"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False}
    shape, frozen, adapted = shape_of(config), Lora(rank=32), Lora(rank=32, experts="adapted")
    assert shape.num_parameters == 30_532_122_624
    on_experts = shape.adapter_parameters(adapted) - shape.adapter_parameters(frozen)
    assert on_experts == 128 * 48 * (2048 + 1536 + 768 + 2048) * 32 == 1_258_291_200


def test_the_shape_of_qwen3_4b_has_the_published_number_of_parameters():
    assert SHAPE_4B.num_parameters == 4_022_468_096


def test_a_config_is_read_or_refused_with_a_reason(tmp_path, demo):
    assert read_shape(demo / "student").hidden_size == 64
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "gpt2", "n_embd": 4}}')
    with pytest.raises(ConfigError, match=r"config\.json: this architecture is not supported: it has no 'num_hidden_l"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": null}')
    with pytest.raises(ConfigError, match=r"cannot be read \(int"):
        read_shape(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape(tmp_path / "missing")


def test_a_shape_is_exact_or_not_known(tmp_path):
    from tests.model.zoo import ZOO, build

    known = 0
    for name in ZOO:
        model = build(name)
        model.config.save_pretrained(tmp_path / name)
        try:
            shape = read_shape(tmp_path / name)
        except ConfigError as error:
            assert "this architecture is not supported" in str(error)
            continue
        known += 1
        assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01), name
    assert known > 25
