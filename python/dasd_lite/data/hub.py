"""Model folders and their JSON files.

Input: a path or the name of a model on the Hugging Face hub. Output: a local folder with config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dasd_lite.config.models import DEMO
from dasd_lite.errors import ConfigError

SIDE_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
"""Endings of what a model folder has beside its weights: configuration, tokenizer, templates, code."""
_OTHER_FORMATS = ("original/*", "onnx/*", "consolidated*")  # the same weights again, for other programs


def model_folder(name: str, *, weights: bool = False) -> Path:
    """Return the local folder of a model, downloading it from the hub if needed.

    Args:
        name: A folder, a model on the hub, such as Qwen/Qwen3-4B, or one of the demo's: demo:teacher, demo:student.
        weights: Download the weights as well, not only the configuration and the tokenizer.

    Raises:
        ConfigError: There is no such model, or the hub cannot be reached.
    """
    path = DEMO / name.removeprefix("demo:") if name.startswith("demo:") else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"model = {name!r}: not a model folder: it has no config.json")
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ConfigError(f"model = {name!r}: no such folder, and not the name of a hub model, like Qwen/Qwen3-4B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*(f"*{ending}" for ending in SIDE_FILES), *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=[*_OTHER_FORMATS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model = {name!r}: no such folder, and the hub download failed ({reason})") from error


def context_of_config(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a model reads, as vLLM counts them; None if its configuration has no limit.

    Linear and dynamic scaling of the rotary embedding come on top of max_position_embeddings, the other kinds are in
    it. Gemma 3 counts linear scaling in as well.

    Args:
        config: Content of a config.json, of transformers 4 or 5.
    """
    text = config.get("text_config") or config
    keys = ("model_max_length", "max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((int(text[key]) for key in keys if text.get(key)), None)
    if positions is None or "gemma3" in str(text.get("model_type")):
        return positions
    factors = [rope.get("factor") or 1.0 for rope in _ropes(text) if _rope_type(rope) in ("linear", "dynamic")]
    return int(positions * max(factors, default=1.0))


def context_hint(config: Mapping[str, Any]) -> str | None:
    """Return what to do where YaRN was added to a configuration and its max_position_embeddings was left as it was."""
    text = config.get("text_config") or config
    positions = int(text.get("max_position_embeddings") or 0)
    for rope in _ropes(text):
        original = int(rope.get("original_max_position_embeddings") or positions)
        extended = int(original * float(rope.get("factor") or 1.0))
        if _rope_type(rope) == "yarn" and 0 < positions <= original < extended:
            return (
                f"rope_scaling extends {original:,} positions × {rope['factor']:g}, but max_position_embeddings ="
                f" {positions}; set it to {extended} in config.json if it was left"
            )
    return None


def has_longrope(folder: Path) -> bool:
    """Return whether a model's rotary embedding has one set of factors for short contexts and another for long ones."""
    config = read_json(folder / "config.json")
    return any(_rope_type(rope) in ("longrope", "su") for rope in _ropes(config.get("text_config") or config))


def _ropes(text: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters of each rotary embedding; some models have one for each type of layer."""
    found = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return [each for each in found.values() if isinstance(each, dict)] or [found]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def configured_stop_ids(folder: Path) -> set[int]:
    """Return the tokens at which an engine stops a model by itself, as its configuration lists them.

    See `Chat.answer_end_ids` for the tokens at which we stop it.
    """
    return eos_ids(read_json(folder / "generation_config.json")) or eos_ids(read_json(folder / "config.json"))


def eos_ids(config: Mapping[str, Any]) -> set[int]:
    """Return the end tokens that a configuration lists; empty if it lists none."""
    ids = config.get("eos_token_id")
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder; a missing file is empty."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {str(value)[:40]!r} is not a JSON object")
    return value
