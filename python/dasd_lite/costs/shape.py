"""The shape of a model, read from its config.json without torch.

Understood are Llama-like decoders: Llama, Mistral, Qwen2, Qwen3, what is built like them, their mixtures of experts,
and the attention of DeepSeek. Invariant: numbers of parameters, and of adapters on all parts, are exact for these,
which tests check against transformers and peft.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.config.train import Lora
from dasd_lite.errors import ConfigError

_QK_NORM = ("qwen3", "dots1", "hunyuan")
"""Beginnings of model types that normalize queries and keys per head."""
_WIDE_QK_NORM = ("olmoe", "minimax_m2")
"""Model types that normalize all queries of a token together, and all keys."""


@dataclass(frozen=True)
class LatentAttention:
    """The widths of multi-head latent attention (arXiv 2405.04434): queries and keys through a narrow layer."""

    q_rank: int
    """Of queries; 0: they come from the hidden states."""
    kv_rank: int
    plain_size: int
    """Of a head's query and key, without positions."""
    rotary_size: int
    """Of a head's query and of the key that all heads share, with positions."""
    value_size: int

    def linears(self, hidden: int, heads: int, layers: int) -> dict[str, tuple[int, int, int]]:
        """Linear layers by name: width in, width out, number in the model."""
        query = heads * (self.plain_size + self.rotary_size)
        queries = {"q_proj": (hidden, query, layers)}
        if self.q_rank:
            queries = {"q_a_proj": (hidden, self.q_rank, layers), "q_b_proj": (self.q_rank, query, layers)}
        return queries | {
            "kv_a_proj_with_mqa": (hidden, self.kv_rank + self.rotary_size, layers),
            "kv_b_proj": (self.kv_rank, heads * (self.plain_size + self.value_size), layers),
            "o_proj": (heads * self.value_size, hidden, layers),
        }


@dataclass(frozen=True)
class ModelShape:
    """The numbers in a config.json that sizes follow from."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """Whether the output head is the embedding."""
    qk_norm: bool = False
    """Whether queries and keys are normalized per head (Qwen3)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    num_moe_layers: int = 0
    shared_intermediate_size: int = 0
    """Width of the experts that every token visits."""
    has_shared_gate: bool = False
    """Whether their output is weighted by a gate (Qwen2-MoE)."""
    latent: LatentAttention | None = None
    """DeepSeek's attention, in place of queries, keys and values from the hidden states."""
    extra_norm_parameters: int = 0
    """Weights of norms, per layer, beyond those of Llama."""

    @property
    def q_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width between the MLP's matrices, in the widest layer; of experts, those that a token visits together."""
        dense = self.intermediate_size if self.num_moe_layers < self.num_layers else 0
        return max(dense, self.experts_per_token * self.moe_intermediate_size)

    @property
    def linears(self) -> dict[str, tuple[int, int, int]]:
        """Linear layers by name, without experts and output head: width in, width out, number in the model.

        Experts are one tensor per layer in transformers 5, which stays in 16 bits when linear layers become 4-bit.
        """
        hidden, layers, dense = self.hidden_size, self.num_layers, self.num_layers - self.num_moe_layers
        linears = {
            "q_proj": (hidden, self.q_size, layers),
            "k_proj": (hidden, self.kv_size, layers),
            "v_proj": (hidden, self.kv_size, layers),
            "o_proj": (self.q_size, hidden, layers),
        }
        if self.latent is not None:
            linears = self.latent.linears(hidden, self.num_heads, layers)
        linears |= _mlp("", hidden, self.intermediate_size, dense)
        if self.shared_intermediate_size:
            linears |= _mlp("shared.", hidden, self.shared_intermediate_size, self.num_moe_layers)
            linears["shared_expert_gate"] = (hidden, 1, self.num_moe_layers * self.has_shared_gate)
        return {name: sizes for name, sizes in linears.items() if sizes[2]}

    @property
    def linear_parameters(self) -> int:
        """Weights of `linears`, without biases."""
        return sum(rows * columns * number for rows, columns, number in self.linears.values())

    def _expert_parameters(self, per_layer: int) -> int:
        router = self.num_experts * self.hidden_size
        return self.num_moe_layers * (router + per_layer * 3 * self.hidden_size * self.moe_intermediate_size)

    @property
    def layer_expert_parameters(self) -> int:
        """Weights of all experts of one layer."""
        return self.num_experts * 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, its own or the embedding's."""
        return self.vocab_size * self.hidden_size

    @property
    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with, including the output head; of experts, those that it visits."""
        return self.linear_parameters + self._expert_parameters(self.experts_per_token) + self.head_parameters

    @property
    def vector_parameters(self) -> int:
        """Norms and biases."""
        norms = self.num_layers * (2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)) + self.hidden_size
        biases = self.qkv_bias * (self.q_size + 2 * self.kv_size) + self.o_bias * self.hidden_size
        dense = self.num_layers - self.num_moe_layers
        norms += self.num_layers * self.extra_norm_parameters
        mlp_biases = self.mlp_bias * dense * (2 * self.intermediate_size + self.hidden_size)
        return norms + self.num_layers * biases + mlp_biases

    @property
    def matrix_parameters(self) -> int:
        """All weights except norms and biases; a tied head counts once."""
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return self.linear_parameters + self._expert_parameters(self.num_experts) + embeddings

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.matrix_parameters + self.vector_parameters

    def adapted(self, method: Lora) -> dict[str, tuple[int, int, int]]:
        """Return the `linears` that get an adapter; `target_modules` may name them by their path."""
        if method.target_modules == "all-linear":
            return self.linears
        wanted = {name.rsplit(".", 1)[-1] for name in method.target_modules}
        return {name: sizes for name, sizes in self.linears.items() if name.rsplit(".", 1)[-1] in wanted}

    def adapter_parameters(self, method: Lora, experts: int | None = None) -> int:
        """Return the number of weights of a LoRA adapter: rank × (width in + width out) for each adapted matrix.

        A layer's experts have one matrix each for gate and up together, and one for down. `experts` is how many of them
        count; None: all.
        """
        widths = sum((rows + columns) * number for rows, columns, number in self.adapted(method).values())
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        if method.experts == "adapted":
            number = self.num_experts if experts is None else experts
            widths += self.num_moe_layers * number * ((hidden + 2 * inner) + (inner + hidden))
        if method.router == "adapted":
            widths += self.num_moe_layers * (hidden + self.num_experts)
        return method.rank * widths


def _mlp(prefix: str, hidden: int, inner: int, number: int) -> dict[str, tuple[int, int, int]]:
    return {
        f"{prefix}gate_proj": (hidden, inner, number),
        f"{prefix}up_proj": (hidden, inner, number),
        f"{prefix}down_proj": (inner, hidden, number),
    }


def read_shape(folder: Path) -> ModelShape:
    """Read a model folder's config.json.

    Raises:
        ConfigError: It cannot be read, or is not of a Llama-like decoder.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        _check_is_like_llama(config)
        return shape_of(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except KeyError as error:
        raise ConfigError(f"{path}: this architecture is not supported: it has no {error}") from error


_OTHER_MLP = {
    "apertus",
    "arcee",
    "doge",
    "falcon",
    "gpt_neox",
    "nemotron",
    "opt",
    "phi",
    "recurrent_gemma",
    "starcoder2",
}
"""Model types whose MLP has two matrices, not three, or another attention; predictions would be off by 6 to 40 %."""
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def _check_is_like_llama(config: dict[str, Any]) -> None:
    """Raise a KeyError, as for a number that is missing, where sizes follow from more than `shape_of` reads."""
    kind = str(config.get("model_type"))
    layers = {*(config.get("layer_types") or ()), *(config.get("layers_block_type") or ())} - _ATTENTION
    if kind in _OTHER_MLP or layers or kind == "falcon_h1":
        raise KeyError(f"shape like Llama's ({kind})")


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Take the numbers from the content of a config.json; raises KeyError if one is missing."""
    kind, layers = str(config.get("model_type", "")), int(config["num_hidden_layers"])
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    types = config.get("layer_types") or []
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    # Mistral's window is in every layer; the others name the layers.
    sliding = (types.count("sliding_attention") if types else layers) if window else 0
    bias = bool(config.get("attention_bias", False))
    num_moe_layers = len(_moe_layers(config, layers)) if experts else 0
    inner = _first(config, "moe_intermediate_size", "intermediate_size") if experts else 0
    shared = _first(config, "shared_expert_intermediate_size")
    shared = shared or inner * _first(config, "n_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if kind.startswith(("hunyuan", "llama4")):
        shared = inner
    latent = None
    if config.get("kv_lora_rank"):
        latent = LatentAttention(
            q_rank=int(config.get("q_lora_rank") or 0),
            kv_rank=int(config["kv_lora_rank"]),
            plain_size=int(config["qk_nope_head_dim"]),
            rotary_size=int(config["qk_rope_head_dim"]),
            value_size=int(config["v_head_dim"]),
        )
    kv_heads, head_dim = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
    extra = latent.q_rank + latent.kv_rank if latent is not None else 0
    extra += (heads + kv_heads) * head_dim if kind in _WIDE_QK_NORM else 0
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=_first(config, "intermediate_size_mlp") or int(config["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind.startswith(_QK_NORM),
        qkv_bias=bias or kind.startswith("qwen2"),
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=int(window) if window else None,
        num_sliding_layers=sliding,
        num_experts=experts,
        experts_per_token=_first(config, "num_experts_per_tok", "moe_k", "moe_topk") if experts else 0,
        moe_intermediate_size=inner,
        num_moe_layers=num_moe_layers,
        shared_intermediate_size=shared if num_moe_layers else 0,
        has_shared_gate=kind.startswith(("qwen2_moe", "qwen3_next", "qwen3_5_moe")),
        latent=latent,
        extra_norm_parameters=extra,
    )


def _first(config: dict[str, Any], *keys: str) -> int:
    """Return the first of these numbers that is there, or 0; a list has one for each layer, and the first counts."""
    found = next((config[key] for key in keys if config.get(key)), 0)
    return int(found[0] if isinstance(found, list) else found)


def _moe_layers(config: dict[str, Any], layers: int) -> list[int]:
    """Return which layers of a mixture have experts; the others have one MLP."""
    if config.get("moe_layers"):
        return [int(i) for i in config["moe_layers"]]
    if types := config.get("mlp_layer_types"):
        return [i for i, kind in enumerate(types) if kind == "sparse"]
    dense = set(config.get("mlp_only_layers") or [])
    step = _first(config, "decoder_sparse_step", "moe_layer_interval") or 1
    start, end = _first(config, "first_k_dense_replace", "moe_layer_start_index"), config.get("moe_layer_end_index", -1)
    last = layers - 1 if end in (None, -1) else int(end)
    return [i for i in range(start, last + 1) if i not in dense and (i + 1) % step == 0]
