"""Models for the tests of costs: their configs, their shapes, and models without weights or with random ones."""

from dasd_lite.config.train import Full, Lora
from dasd_lite.costs.shape import shape_of

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


def empty_model(name, **options):
    """A model without weights, SMALL but for `options`, and its shape."""
    import torch
    import transformers

    from dasd_lite.model.attention import PACKED, register

    register()
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    config._attn_implementation = PACKED
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model, shape_of(config.to_dict())


def save_model(folder, **options):
    """Write a Qwen3 with random weights, SMALL but for `options`, to `folder`."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**(SMALL | options))
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
