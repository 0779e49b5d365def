"""Parameters of a model, from its config alone."""

import pytest

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.costs.models import SHAPE_4B, empty_model

from dasd_lite.config.train import Lora
from dasd_lite.costs.shape import read_shape
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
