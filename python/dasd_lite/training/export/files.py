"""What lies in an exported model folder beside its weights: configuration, tokenizer, templates, code.

Input: the folder of the model that training started from. Output: its files, with what training changed. Invariants:
every file of the source is there; config.json is the source's own, in the forms that transformers 5 and older readers
take, and transformers reads the same from it; the model stops where its training data end.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_lite.data.hub import SIDE_FILES, configured_stop_ids, eos_ids, read_json
from dasd_lite.model.architecture import read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)")
_EXPECTED_CHANGES = {"dtype", "eos_token_id", "tie_word_embeddings", "transformers_version", "architectures"}


def write_files(
    skeleton: PreTrainedModel,
    source: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    is_tied: bool,
    end_ids: Set[int] = frozenset(),
    trust_remote_code: bool = False,
) -> None:
    """Write everything but the weights into `folder`.

    Args:
        skeleton: The model without weights.
        source: Folder of the model that training started from.
        folder: Where to write; has no such file yet.
        dtype: Number format of the weights.
        is_tied: Whether the output head is the embedding.
        end_ids: Tokens that end its training data: a configuration that lacks one gets it.
        trust_remote_code: Run code that comes with the model.
    """
    for path in sorted(source.iterdir()):
        is_side_file = path.suffix in SIDE_FILES and path.is_file()
        if is_side_file and path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (templates := source / "additional_chat_templates").is_dir():
        shutil.copytree(templates, folder / templates.name)
    own = read_json(source / "config.json")
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)
    saved = read_json(folder / "config.json")
    if saved.get("model_type") != own.get("model_type") and "text_config" in own:
        saved = own | {"text_config": saved}  # the language model of a larger one, whose other weights are copied
    stops = {*configured_stop_ids(source), *end_ids}
    # A reader may choke on one of two forms of the same thing, so the first one that reads the same as the source.
    for form in (_in_both_forms(saved | own, saved), saved | own, saved):
        config = _changed(form, str(dtype).removeprefix("torch."), is_tied, end_ids, stops)
        _write_json(folder / "config.json", config)
        if _reads_same(source, folder, trust_remote_code=trust_remote_code):
            break
    generation = read_json(source / "generation_config.json")
    if not end_ids <= eos_ids(generation):
        _write_json(folder / "generation_config.json", generation | _stop(generation, end_ids, stops))
    _set_end_token(folder, end_ids)


def _changed(config: dict[str, Any], dtype: str, is_tied: bool, end_ids: Set[int], stops: Set[int]) -> dict[str, Any]:
    """Return a configuration with what training and export have changed."""
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    config |= {"dtype": dtype, "torch_dtype": dtype, **_stop(config, end_ids, stops)}
    if not is_tied:
        config["tie_word_embeddings"] = False
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = _changed(text, dtype, is_tied, end_ids if "eos_token_id" in text else set(), stops)
    return config


def _stop(config: dict[str, Any], end_ids: Set[int], stops: Set[int]) -> dict[str, Any]:
    """Return what to change in a configuration so that it names the end tokens."""
    if end_ids <= eos_ids(config):
        return {}
    return {"eos_token_id": min(stops) if len(stops) == 1 else sorted(stops)}


def _in_both_forms(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that readers of transformers 4 take as well: with rope_theta and rope_scaling.

    Without them they compute with a base of 10,000 and no scaling, and say nothing.
    """
    config, ropes = dict(config), saved.get("rope_parameters") or {}
    local = ropes.get("sliding_attention")
    rope = ropes.get("full_attention", ropes)
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        scaling = {n: v for n, v in rope.items() if n not in ("rope_theta", "partial_rotary_factor")}
        config.setdefault("rope_scaling", None if scaling.get("rope_type") == "default" else scaling)
    if isinstance(local, dict) and "rope_theta" in local and local["rope_theta"] != config.get("rope_theta"):
        config.setdefault("rope_local_base_freq", local["rope_theta"])
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _in_both_forms(config["text_config"], saved.get("text_config") or {})
    return config


def _reads_same(source: Path, folder: Path, *, trust_remote_code: bool) -> bool:
    """Return whether transformers reads the same from both configurations, but for what export changes."""
    own, new = (read_config(each, trust_remote_code=trust_remote_code).to_dict() for each in (source, folder))
    return _without_changes(own, new) == _without_changes(new, own)


def _without_changes(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return what both configurations say, without what export changes and what only older readers want."""
    kept = {n: v for n, v in config.items() if n in other and n not in _EXPECTED_CHANGES and not n.startswith("_")}
    for name, value in kept.items():
        if name.endswith("_config") and isinstance(value, dict) and isinstance(other[name], dict):
            kept[name] = _without_changes(value, other[name])
    return kept


def _set_end_token(folder: Path, end_ids: Set[int]) -> None:
    """Name the token that ends an answer in the tokenizer's files too, if it is one and another than theirs."""
    if len(end_ids) != 1:
        return
    (end,) = end_ids
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    text = next((text for text, number in ids.items() if number == end), None)
    if text is None:
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = read_json(folder / name)
        token = config.get("eos_token")
        is_named = token is not None or name == "tokenizer_config.json"
        if config and is_named and (token["content"] if isinstance(token, dict) else token) != text:
            config["eos_token"] = token | {"content": text} if isinstance(token, dict) else text
            _write_json(folder / name, config)


def _write_json(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_adapter(folder: Path, source: Path) -> None:
    """Sort what PEFT keeps in a set, so that the same run writes the same bytes, and name the base for others.

    A base from the hub is named by its id and commit, for whoever loads the adapter elsewhere. Any other folder, such
    as the model of an earlier phase, is named by its full path: readers look for another one in their own working
    directory.

    Args:
        folder: Of the adapter.
        source: The base's folder.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    for name in ("target_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name].sort()
    if found := _SNAPSHOT.search(source.absolute().as_posix()):
        config["base_model_name_or_path"] = f"{found['owner']}/{found['name']}"
        config["revision"] = found["commit"]
    else:
        config["base_model_name_or_path"] = str(source.absolute())
    _write_json(path, config)
