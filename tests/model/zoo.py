"""Tiny random models of many architectures, and how each one can be trained.

PACKED: documents share a row. APART: one document at a time. REFUSED: neither scored nor trained, with a word of the
reason. UNSAMPLED: what of these is not sampled from in this process. None has dropout or noise. A model of this file is
saved with the demo student's tokenizer, so that it runs through every stage.
"""

import shutil

from dasd_lite.config.models import DEMO

BASE = {
    "vocab_size": 440,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS = {**BASE, "head_dim": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
STATES = {
    "vocab_size": 440,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
RWKV = {
    "vocab_size": 440,
    "hidden_size": 64,
    "attention_hidden_size": 64,
    "num_hidden_layers": 2,
    "context_length": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 8 * i for i in range(8)],
    "original_max_position_embeddings": 600,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

PACKED = {
    "llama": ("LlamaConfig", {**HEADS, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {**HEADS, "tie_word_embeddings": True}),
    "mistral_window": ("MistralConfig", {**HEADS, "sliding_window": 16}),
    "mixtral": ("MixtralConfig", {**HEADS, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen2_moe": ("Qwen2MoeConfig", {**BASE, **MOE, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3Config", {**HEADS, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADS, **MOE, "decoder_sparse_step": 1}),
    "gemma": ("GemmaConfig", HEADS),
    "gemma3": ("Gemma3TextConfig", {**HEADS, **WINDOW, "query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", BASE),
    "phi3": ("Phi3Config", BASE),
    "phi3_longrope": (
        "Phi3Config",
        {
            **BASE,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 600,
            "max_position_embeddings": 2048,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    ),
    "glm": ("GlmConfig", HEADS),
    "glm4": ("Glm4Config", HEADS),
    "smollm3": ("SmolLM3Config", {**BASE, "no_rope_layers": [1, 0], "use_sliding_window": False}),
    "olmo2": ("Olmo2Config", BASE),
    "olmo3": ("Olmo3Config", {**BASE, **WINDOW}),
    "starcoder2": ("Starcoder2Config", BASE),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 440,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 1024,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", BASE),
    "opt": ("OPTConfig", {**BASE, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "exaone4": ("Exaone4Config", {**BASE, **WINDOW}),
    "ernie4_5": ("Ernie4_5Config", HEADS),
    "seed_oss": ("SeedOssConfig", {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "helium": ("HeliumConfig", HEADS),
    "arcee": ("ArceeConfig", HEADS),
    "apertus": ("ApertusConfig", BASE),
    "deepseek_v3": ("DeepseekV3Config", {**BASE, **MLA}),
    "granite": ("GraniteConfig", {**BASE, **GRANITE}),
    "granite_moe": ("GraniteMoeConfig", {**BASE, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", {**BASE, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**HEADS, **WINDOW, "logit_scale": 0.25}),
}
APART = {
    "qwen3_next": ("Qwen3NextConfig", {**HEADS, **MOE, **LINEAR, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("Qwen3_5TextConfig", {**HEADS, **LINEAR}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **BASE,
            "logits_scaling": 1.0,
            "num_local_experts": 0,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "shared_intermediate_size": 64,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**BASE, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "lfm2": ("Lfm2Config", {**BASE, "layer_types": ["conv", "full_attention"]}),
    "stablelm": ("StableLmConfig", BASE),
    "nemotron": ("NemotronConfig", BASE),
    "falcon": ("FalconConfig", {**BASE, "new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "mamba": ("MambaConfig", STATES),
    "falcon_mamba": ("FalconMambaConfig", STATES),
    "mamba2": ("Mamba2Config", {**STATES, "num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        # A cap that is felt.
        {**BASE, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16, "logits_soft_cap": 4.0},
    ),
    "rwkv": ("RwkvConfig", {**RWKV, "rescale_every": 0}),
    "minimax": (
        "MiniMaxConfig",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
    ),
    "doge": ("DogeConfig", BASE),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEADS,
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
        },
    ),
}
REFUSED = {
    "gemma2": ("Gemma2Config", {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16}, "attn_logit_softcapping"),
    "gpt_oss": (
        "GptOssConfig",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        "sinks",
    ),
    "llama_dynamic": ("LlamaConfig", {**HEADS, "rope_parameters": DYNAMIC}, "dynamic"),
    "rwkv_rescaled": ("RwkvConfig", {**RWKV, "rescale_every": 1}, "rescale_every = 0"),
}
UNSAMPLED = {
    "rwkv": "takes no cache by name",
    "rwkv_rescaled": "takes no cache by name",
    "minimax": "a cache of its own",
    "llama_dynamic": "dynamic",
}
"""What is not sampled from in this process, with a word of the reason."""
ZOO = {**PACKED, **APART, **{name: entry[:2] for name, entry in REFUSED.items()}}


def build(name, **options):
    """A model of the zoo at random, its weights far from uniform, in eval mode."""
    import torch
    import transformers

    config_class, numbers = ZOO[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**numbers, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "conv" not in name:
                p.normal_(0, 0.15)
    return model.eval()


def save(model, folder, dtype="float32"):
    """A model folder that every stage takes, with the demo student's tokenizer."""
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / "student" / name, folder / name)
    return folder
