"""The manifest of a dataset folder, and the identity that it records.

An identity is the stage, its version, the options that can change the result, and the fingerprints of the inputs.
Invariant: two folders of the same identity hold the same data. manifest.json is written last, so a folder that has
one is finished; until then unfinished.json holds the identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dasd_lite.config.models import result_options
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError

SCHEMA_VERSION = 1
_HASH = re.compile("[0-9a-f]{32}")  # says nothing to people
PACKAGES = ("dasd-lite", "numpy", "pyarrow", "tokenizers", "torch", "transformers", "peft", "bitsandbytes", "vllm")


@dataclass(frozen=True)
class Identity:
    """What decides the content of a folder: equal identities, equal data.

    Attributes:
        stage: The stage that writes the folder.
        version: Version of the stage's results.
        config: Options that can change the result.
        inputs: Fingerprint of each input.
        names: What people call an input that they brought, such as its path. Not part of the identity.
        folders: Inputs that are folders of other stages. When one of them is made again, so is this folder.
        grows: Keys, such as "config.num_samples", that decide which rows are asked for but not what a row holds. When
            only these change, the folder keeps its rows and gets those that are missing.
    """

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    folders: Mapping[str, Path] = field(default_factory=dict, compare=False)
    grows: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return digest(self.stage, self.version, self.config, self.inputs)

    def changed(self, manifest: Mapping[str, Any]) -> set[str]:
        """Return the keys that differ in a manifest, such as "config.temperature" and "inputs.prompts"."""
        old, new = self._old_and_new(manifest)
        return {
            key
            for key in old.keys() | new.keys()
            if old.get(key) != new.get(key) and key.split(".")[0] in ("version", "config", "inputs")
        }

    def differences(self, manifest: Mapping[str, Any], but: Container[str] = ()) -> list[str]:
        """List what differs in a manifest, as phrases such as "temperature: 0.6 there, 1.0 now", but for some keys."""
        return [self._difference(manifest, key) for key in sorted(self.changed(manifest)) if key not in but]

    def _old_and_new(self, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return _flat(manifest), _flat({"version": self.version, "config": self.config, "inputs": self.inputs})

    def _difference(self, manifest: Mapping[str, Any], key: str) -> str:
        old, new = (values.get(key, "not set") for values in self._old_and_new(manifest))
        kind, _, name = key.partition(".")
        if kind == "version":
            return f"written by another version of dasd-lite, {self.stage} version {old} there, {new} now"
        if kind == "config":
            return f"{name}: {old} there, {new} now"
        before, now = manifest.get("names", {}).get(name), self.names.get(name)
        if "not set" in (old, new) or (before != now and None not in (before, now)):
            return f"{name}: {before or old} there, {now or new} now"
        if now or before:
            return f"{name}: {now or before} has changed"
        return f"{name} has changed" if _HASH.fullmatch(str(new)) else f"{name}: {old} there, {new} now"


def identify(
    stage: str,
    version: int,
    config: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    *,
    names: Mapping[str, str] | None = None,
    brought: Container[str] = (),
    grows: Iterable[str] = (),
) -> Identity:
    """Build the identity of a stage's result.

    Args:
        stage: Its name.
        version: Version of its results.
        config: Its options.
        inputs: Each a path, or a string that is its fingerprint.
        names: What people call inputs that are no paths.
        brought: Inputs that the user chooses, such as a model, even if a stage wrote them.
        grows: As in `Identity`.
    """
    options = result_options(config) if isinstance(config, BaseModel) else dict(config)
    paths = {name: value for name, value in inputs.items() if isinstance(value, Path)}
    folders = {name: path for name, path in paths.items() if name not in brought and _written_by_stage(path)}
    places = {name: str(path) for name, path in paths.items() if name not in folders}
    return Identity(
        stage,
        version,
        options,
        {name: value if isinstance(value, str) else fingerprint(value) for name, value in inputs.items()},
        names=places | dict(names or {}),
        folders=folders,
        grows=frozenset(grows),
    )


def _written_by_stage(path: Path) -> bool:
    """Return whether a path is the folder of a stage, or the model or adapter inside the folder of train."""
    return any((folder / "manifest.json").exists() for folder in (path, path.parent))


def fingerprint(path: Path) -> str:
    """Hash a path: a dataset by its manifest, a model folder or a file by its content."""
    if (path / "manifest.json").exists():
        manifest = read_manifest(path)
        return str(manifest.get("content", manifest["fingerprint"]))
    if path.name == "model" and (path.parent / "manifest.json").exists():  # written by train
        return digest("model", fingerprint(path.parent))
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; if a stage writes it, run that stage first")
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt")]
    return digest([(p.name, hash_file(p)) for p in files if p.name != "README.txt"])


def hash_file(path: Path) -> str:
    """Hash the content of a file."""
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


def was_begun(folder: Path) -> bool:
    """Return whether a stage writes or wrote this folder; others may have a manifest.json of another kind."""
    for path in (folder / "manifest.json", folder / "unfinished.json"):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(state, dict) and {"stage", "fingerprint", "schema_version"} <= state.keys():
                return True
    return False


def read_state(path: Path) -> dict[str, Any]:
    """Read manifest.json or unfinished.json. Raises DataError if it is damaged."""
    state = _read_object(path)
    if not {"stage", "fingerprint", "inputs", "config"} <= state.keys():
        raise DataError(f"{path}: damaged (not a manifest of dasd-lite); remove {path.parent} and run its stage again")
    return state


def state_file(folder: Path) -> Path | None:
    """Return the manifest of a folder, or what an unfinished one has instead; None if no stage began it."""
    return next((path for path in (folder / "manifest.json", folder / "unfinished.json") if path.exists()), None)


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
        "names": dict(identity.names),
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
