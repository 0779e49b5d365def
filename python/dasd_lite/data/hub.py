"""Model folders: on disk, or downloaded from the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dasd_lite.errors import ConfigError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def model_folder(name: str, *, weights: bool = False) -> Path:
    """Return the local folder of a model: `name` itself, or the hub's copy, downloaded when it is not there.

    Without `weights` only the small files are fetched. Raises ConfigError when there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"model = {name!r}: not a model folder, it has no config.json")
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ConfigError(f"model = {name!r}: no such folder (and no hub id, which looks like Qwen/Qwen3-4B)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_TOKENIZER_FILES, *(("*.safetensors", "*.index.json") if weights else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model = {name!r}: no such folder, and the hub has not given it ({reason})") from error


def engine_stop_ids(folder: Path) -> set[int]:
    """Return the tokens at which engines stop a model: its generation config names them, or else its config."""
    for name in ("generation_config.json", "config.json"):
        named = read_json(folder / name).get("eos_token_id")
        if named is not None:
            return set(named) if isinstance(named, list) else {named}
    return set()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder; empty where there is none."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {str(value)[:40]!r} is not an object of keys and values")
    return value
