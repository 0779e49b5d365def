"""The manifest of a dataset folder, and the identity that it records.

An identity is the stage, its version, the options that can change the result, and the fingerprints of the inputs.
Invariant: two folders of the same identity hold the same data. manifest.json is written last, so a folder that has
one is finished; until then unfinished.json holds the identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dasd_lite.config.models import result_options
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError

SCHEMA_VERSION = 1
PACKAGES = ("dasd-lite", "numpy", "pyarrow", "tokenizers", "torch", "transformers", "peft", "bitsandbytes", "vllm")


@dataclass(frozen=True)
class Identity:
    """What decides the content of a folder: equal identities, equal data."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return digest(self.stage, self.version, self.config, self.inputs)

    def differences(self, manifest: Mapping[str, Any]) -> list[str]:
        """List what differs in a manifest, as phrases such as "temperature: 0.6 there, 1.0 now"."""
        old, new = _flat(manifest), _flat({"version": self.version, "config": self.config, "inputs": self.inputs})
        return [
            f"{key.removeprefix('config.')}: {old.get(key, 'not set')} there, {new.get(key, 'not set')} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] in ("version", "config", "inputs")
        ]


def identify(
    stage: str, version: int, config: BaseModel | Mapping[str, Any], inputs: Mapping[str, Path | str]
) -> Identity:
    """Build the identity of a stage's result. An input is a path, or a string that is its fingerprint."""
    options = result_options(config) if isinstance(config, BaseModel) else dict(config)
    return Identity(
        stage, version, options, {k: v if isinstance(v, str) else fingerprint(v) for k, v in inputs.items()}
    )


def fingerprint(path: Path) -> str:
    """Hash a path: a dataset by its manifest, a model folder or a file by its content."""
    if (path / "manifest.json").exists():
        return str(read_manifest(path)["fingerprint"])
    if path.name == "model" and (path.parent / "manifest.json").exists():  # written by train
        return digest("model", fingerprint(path.parent))
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; if a stage writes it, run that stage first")
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt")]
    return digest([(p.name, _hash_file(p)) for p in files if p.name != "README.txt"])


def _hash_file(path: Path) -> str:
    stat = path.stat()
    return _hash_content(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)  # reads many GB of weights once per run, not once per stage
def _hash_content(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key in value for k, v in _flat(value[key], f"{prefix}.{key}" if prefix else key).items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished folder."""
    path = folder / "manifest.json"
    if not path.exists():
        what = "is unfinished; run its stage again" if folder.is_dir() else "does not exist; run its stage first"
        raise DataError(f"{folder}: the folder {what}")
    manifest = read_state(path)
    if not isinstance(manifest.get("counts"), dict):
        raise DataError(f"{path}: damaged (no counts); remove {folder} and run its stage again")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        version = manifest.get("schema_version")
        raise DataError(f"{path}: schema_version is {version}; this version of dasd-lite reads {SCHEMA_VERSION}")
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """Read manifest.json or unfinished.json. Raises DataError if it is damaged."""
    state = _read_object(path)
    if not {"stage", "fingerprint", "inputs", "config"} <= state.keys():
        raise DataError(f"{path}: damaged (not a manifest of dasd-lite); remove {path.parent} and run its stage again")
    return state


def read_timing(folder: Path) -> dict[str, float]:
    """Read the seconds, tokens, and costs of a finished stage; empty if they were not recorded."""
    path = folder / "timing.json"
    return _read_object(path) if path.exists() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and run its stage again") from None
    return value


def new_state(identity: Identity, config: BaseModel | None) -> dict[str, Any]:
    """Return what unfinished.json and manifest.json have in common."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": identity.stage,
        "version": identity.version,
        "fingerprint": identity.fingerprint,
        "config": identity.config,
        "resolved": config.model_dump(mode="json") if config else identity.config,
        "inputs": identity.inputs,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def to_json(value: Any) -> str:
    """Return a value as indented JSON text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
