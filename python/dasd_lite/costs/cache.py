"""Keys and values: how many bytes an answer takes while it is written, and what fits beside the weights.

Input: a model's shape and the bytes that are free. Output: bytes, answers or tokens. Invariant: what the keys and
values of one answer take is exact; what else needs memory is in the share of it that they may fill.
"""

from __future__ import annotations

from pathlib import Path

from dasd_lite.costs.shape import ModelShape, read_shape
from dasd_lite.data.hub import read_json

SHARE = 0.9
"""Of the memory beside the weights; vLLM's default is as much of the whole."""
_DRAWING_BYTES = 24  # per id of the vocabulary and answer: its logit in several formats while a token is drawn


def cache_bytes(shape: ModelShape, tokens: int, *, element_bytes: int = 2, cards: int = 1, vllm: bool = False) -> int:
    """Return the bytes per card of the keys and values of one answer.

    Args:
        shape: The model's.
        tokens: Of prompt and answer.
        element_bytes: Of one number.
        cards: How many share the heads; one head is on several if there are more cards than heads.
        vllm: As vLLM keeps them, which has DeepSeek's attention compressed; transformers has it expanded.
    """
    latent = shape.latent
    if latent is None:
        each = 2 * -(-shape.num_kv_heads // cards) * shape.head_dim
    elif vllm:
        each = latent.kv_rank + latent.rotary_size
    else:
        each = shape.num_heads * (latent.plain_size + latent.rotary_size + latent.value_size)
    windowed = shape.num_sliding_layers * min(tokens, shape.sliding_window or tokens)
    return element_bytes * each * ((shape.num_layers - shape.num_sliding_layers) * tokens + windowed)


def answers_that_fit(shape: ModelShape, free: float, tokens: int, *, element_bytes: int = 2) -> int:
    """Return how many answers of `tokens` tokens transformers can write side by side in `free` bytes; at least 1."""
    each = cache_bytes(shape, tokens, element_bytes=element_bytes) + _DRAWING_BYTES * shape.vocab_size
    return max(1, int(SHARE * free // each))


def longest_that_fits(shape: ModelShape, room: float, most: int, *, element_bytes: int = 2, cards: int = 1) -> int:
    """Return the most tokens of one answer whose keys and values vLLM can keep in `room` bytes of a card.

    `most` is the longest that is asked for; 0 if not even one token fits.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(shape, middle, element_bytes=element_bytes, cards=cards, vllm=True) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def weight_bytes(folder: Path, element_bytes: int = 2) -> int:
    """Return the bytes of a model's weights, at least: of a quantized one by its files or, without them, with 4 bits.

    Raises:
        ConfigError: Its shape is not known.
    """
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parameters = read_shape(folder).num_parameters
    if not files and "quantization_config" in read_json(folder / "config.json"):
        return parameters // 2
    return min(files or element_bytes * parameters, element_bytes * parameters)
