"""The shape of a model, read from its config.json without torch.

Understood are Llama-like decoders: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, and what is built like them. Invariant:
numbers of parameters are exact for these, which tests check against transformers and peft; only adapters on experts
are not counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_lite.config.train import Lora
from dasd_lite.errors import ConfigError


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
            "gate_proj": (hidden, self.intermediate_size, dense),
            "up_proj": (hidden, self.intermediate_size, dense),
            "down_proj": (self.intermediate_size, hidden, dense),
        }
        return {name: sizes for name, sizes in linears.items() if sizes[2]}

    @property
    def linear_parameters(self) -> int:
        """Weights of `linears`, without biases."""
        return sum(rows * columns * number for rows, columns, number in self.linears.values())

    def _expert_parameters(self, per_layer: int) -> int:
        router = self.num_experts * self.hidden_size
        return self.num_moe_layers * (router + per_layer * 3 * self.hidden_size * self.moe_intermediate_size)

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
        return {name: sizes for name, sizes in self.linears.items() if name in wanted}

    def adapter_parameters(self, method: Lora) -> int:
        """Return the number of weights of a LoRA adapter: rank × (width in + width out) for each adapted layer."""
        return sum(method.rank * (rows + columns) * number for rows, columns, number in self.adapted(method).values())


def read_shape(folder: Path) -> ModelShape:
    """Read a model folder's config.json.

    Raises:
        ConfigError: It cannot be read, or is not of a Llama-like decoder.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        return shape_of(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except KeyError as error:
        raise ConfigError(f"{path}: this architecture is not supported: it has no {error}") from error


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Take the numbers from the content of a config.json; raises KeyError if one is missing."""
    kind, layers = str(config.get("model_type", "")), int(config["num_hidden_layers"])
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    types = config.get("layer_types") or []
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    # Mistral's window is in every layer; the others name the layers.
    sliding = (types.count("sliding_attention") if types else layers) if window else 0
    bias = bool(config.get("attention_bias", False))
    dense = set(config.get("mlp_only_layers") or [])
    step = int(config.get("decoder_sparse_step") or 1)
    sparse = [i for i in range(layers) if experts and i not in dense and (i + 1) % step == 0]
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind.startswith("qwen3"),
        qkv_bias=bias or kind.startswith("qwen2"),
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=int(window) if window else None,
        num_sliding_layers=sliding,
        num_experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 0) if experts else 0,
        moe_intermediate_size=int(config.get("moe_intermediate_size") or config["intermediate_size"]) if experts else 0,
        num_moe_layers=len(sparse),
    )
