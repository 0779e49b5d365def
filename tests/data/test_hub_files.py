"""Files of data sets and models on the hub, against a real HTTP server on loopback that answers as the hub does."""

import hashlib
import json
import os
from urllib.parse import unquote, urlsplit

import pytest
from tests.grown import grown
from tests.hub import HubHandler, serving

from dasd_lite.data.dataset import read_table
from dasd_lite.data.formats.sources import _matching
from dasd_lite.data.manifest import read_manifest
from dasd_lite.errors import DataError

OLD, NEW = "1" * 40, "2" * 40


def line(question, answer="a"):
    return json.dumps({"prompt": question, "output": answer}).encode() + b"\n"


FILES = {
    OLD: {"data/a.jsonl": line("old a")},
    NEW: {"README.md": b"# x", "data/a.jsonl": line("a"), "data/b.jsonl": line("b"), "data/deep/c.jsonl": line("c")},
}
REFS = {"main": NEW, "v1": OLD, "refs/convert/parquet": OLD, OLD: OLD, NEW: NEW}


class Hub(HubHandler):
    """Knows the data set ORG/SET, and ORG/GATED, which one may not read."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if "ORG/GATED" in path:
            return self.reply(403, X_Error_Code="GatedRepo")
        if "ORG/SET" not in path:
            return self.reply(404, X_Error_Code="RepoNotFound")
        what, _, rest = (path.partition("ORG/SET/")[2] or "revision/main").partition("/")
        commit = next(
            (REFS[ref] for ref in sorted(REFS, key=len, reverse=True) if (rest + "/").startswith(ref + "/")), None
        )
        if commit is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files = FILES[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, json.dumps({"id": "ORG/SET", "sha": commit, "siblings": siblings}).encode())
        if what == "tree":
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
            return self.reply(200, json.dumps(entries).encode())
        name = rest.partition("/")[2]
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.reply(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=commit)


@pytest.fixture
def hub():
    with serving(Hub, asked=[]) as server:
        yield server


@pytest.fixture
def ingest(hub, tmp_path, small_recipe, cli_process):
    """`ingest(place)` runs the stage in a process of its own, because the hub's address is read at its start."""

    def run(place, endpoint=None, offline="0", **tables):
        tables = {"prompts": None, "evaluate": None, **tables}
        phase = [{"name": "have", "source": "ingest", "ingest": {"paths": [place]}, "select.rule": "random"}]
        small_recipe(tmp_path, phase=phase, **tables)
        environment = {
            "HF_ENDPOINT": endpoint or f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": offline,
            "HF_HOME": str(tmp_path / "cache"),
        }
        return cli_process("ingest", "run.toml", "--force", cwd=tmp_path, **environment)

    return run


def questions(tmp_path):
    table = read_table(tmp_path / "run" / "have" / "ingest", "rollouts")
    return [messages[-1]["content"] for messages in table["messages"].to_pylist()]


def test_files_of_a_revision_and_the_commit_in_the_manifest(ingest, hub, tmp_path):
    done = ingest("hf://datasets/ORG/SET/data/*.jsonl")
    assert done.rc == 0, done.stderr
    assert questions(tmp_path) == ["a", "b"], "`*` stays in its folder"
    names = read_manifest(tmp_path / "run" / "have" / "ingest")["names"]
    assert names["paths"] == f"hf://datasets/ORG/SET@{NEW}/data/*.jsonl"
    assert ingest("hf://datasets/ORG/SET@refs/convert/parquet/data/a.jsonl").rc == 0
    assert questions(tmp_path) == ["old a"]
    asked = len(hub.asked)
    done = ingest(f"hf://datasets/ORG/SET@{OLD}/data/a.jsonl", endpoint="http://127.0.0.1:9", offline="1")
    assert done.rc == 0, done.stderr
    assert len(hub.asked) == asked, "a commit's file that is here needs no network"


def test_the_commit_of_questions_is_in_the_manifest(hub, tmp_path, small_recipe, cli_process):
    prompts = {"path": "hf://datasets/ORG/SET/data/*.jsonl"}
    small_recipe(tmp_path, prompts=prompts, evaluate=None, phase=[{"name": "low"}])
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    done = cli_process("sample", "run.toml", cwd=tmp_path, **environment)
    assert done.rc == 0, done.stderr
    counts = read_manifest(tmp_path / "run" / "low" / "sample")["counts"]
    assert counts["prompts_from"] == f"hf://datasets/ORG/SET@{NEW}/data/*.jsonl"


def test_a_folder_of_a_stage_on_the_hub_is_its_table(ingest, tmp_path, monkeypatch):
    folder = grown(tmp_path / "grown")
    for path in folder.iterdir():
        monkeypatch.setitem(FILES[NEW], f"runs/sample/{path.name}", path.read_bytes())
    done = ingest("hf://datasets/ORG/SET/runs/sample")
    assert done.rc == 0, done.stderr
    assert questions(tmp_path) == ["b", "c"]
    assert f"hf://datasets/ORG/SET@{NEW[:12]}/runs/sample: read as 'rollouts'" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hf://datasets/ORG/NONE/a.jsonl", "hf://datasets/ORG/NONE/a.jsonl: no such data set, or it is private"),
        ("hf://datasets/ORG/GATED/a.jsonl", "the data set is gated; accept its terms on the hub, then set HF_TOKEN"),
        ("hf://datasets/ORG/SET@v9/data/a.jsonl", "hf://datasets/ORG/SET@v9/data/a.jsonl: no such revision"),
        ("hf://datasets/ORG/SET/gone.jsonl", "hf://datasets/ORG/SET/gone.jsonl: no such file at this revision"),
        ("hf://datasets/ORG/SET/*.csv", f"hf://datasets/ORG/SET/*.csv: no file matches, at commit {NEW[:12]}"),
        ("hf://models/x", "hf://models/x: should look like hf://datasets/ORG/NAME@REVISION/path/*.parquet"),
    ],
)
def test_what_is_not_there_is_one_line(ingest, place, words):
    done = ingest(place)
    assert done.rc == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("dasd-lite: ingest.paths: ") and words in error


def test_a_hub_that_cannot_be_reached_is_one_line(ingest):
    done = ingest("hf://datasets/ORG/SET/data/a.jsonl", endpoint="http://127.0.0.1:9")
    assert (done.rc, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "the hub cannot be reached" in done.stderr


def test_patterns_of_a_data_set():
    files = ["README.md", "a.jsonl", "data/a.jsonl", "data/b.jsonl.zst", "data/deep/c.jsonl", "x/1.parquet"]
    for wanted, right in {
        "*.jsonl": ["a.jsonl"],
        "data/*.jsonl*": ["data/a.jsonl", "data/b.jsonl.zst"],
        "**/*.jsonl": ["a.jsonl", "data/a.jsonl", "data/deep/c.jsonl"],
        "data/**/*.jsonl": ["data/a.jsonl", "data/deep/c.jsonl"],
        "data/[ab].jsonl": ["data/a.jsonl"],
        "x": ["x/1.parquet"],
        "a.jsonl": ["a.jsonl"],
        "dat": [],
    }.items():
        assert _matching(files, wanted) == right, wanted
    with pytest.raises(DataError, match="has files that end in"):
        _matching(files, "")


# --- models -----------------------------------------------------------------------------------------------


class Models(HubHandler):
    """Knows the model me/tiny, whose files are `server.files`."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        files, commit = self.server.files, {"X_Repo_Commit": NEW}
        if path.startswith("/api/models/me/tiny/revision/"):
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, json.dumps({"id": "me/tiny", "sha": NEW, "siblings": siblings}).encode())
        if path.startswith("/api/models/me/tiny/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
            return self.reply(200, json.dumps(entries).encode())
        name = path.removeprefix(f"/me/tiny/resolve/{NEW}/").removeprefix("/me/tiny/resolve/main/")
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", **commit)
        self.server.asked.append(name)
        return self.reply(200, files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', **commit)


CODE = {
    "configuration_my.py": (
        b"from transformers import LlamaConfig\nclass MyConfig(LlamaConfig):\n    model_type = 'my'\n"
    ),
    "modeling_my.py": (
        b"from transformers import LlamaForCausalLM\nfrom .configuration_my import MyConfig\n"
        b"class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    ),
}
TRAIN_BY_HUB_ID = """
import json, sys
from pathlib import Path
from dasd_lite.data.hub import model_folder
from dasd_lite.stages.train import train
small = sorted(path.name for path in model_folder("me/tiny").iterdir())
trained = train(Path("rows"), model_folder("me/tiny", weights=True), out="run/low/train", trust_remote_code=True,
                max_steps=1, method={"kind": "lora", "rank": 4}, grad_accum_steps=1)
print(json.dumps([small, sorted(path.name for path in trained.path.iterdir())]))
"""


def test_a_model_with_code_of_its_own_is_trained_by_its_hub_id(tmp_path):
    import subprocess
    import sys

    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.rows import VOCAB, make_rows, write_rows

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} | CODE
    config = json.loads(files["config.json"]) | {"model_type": "my", "architectures": ["MyModel"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModelForCausalLM": "modeling_my.MyModel",
    }
    files["config.json"] = json.dumps(config).encode()
    others = ["tokenizer.json", "tokenizer.model", "special_tokens_map.json", "preprocessor_config.json", "merges.txt"]
    files |= dict.fromkeys([*others, "my.tiktoken"], b"{}")
    files |= {"consolidated.safetensors": b"x", "onnx/model.json": b"{}", "README.md": b"# x", "picture.png": b"x"}
    write_rows(tmp_path / "rows", make_rows(4))
    with serving(Models, asked=[], files=files) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", TRAIN_BY_HUB_ID]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, saved = json.loads(done.stdout.splitlines()[-1])
    beside = {*others, "my.tiktoken", *CODE, "config.json", "generation_config.json"}
    assert set(small) == beside
    assert set(saved) == {*beside, "model.safetensors"}
    assert not {"consolidated.safetensors", "onnx/model.json", "README.md", "picture.png"} & set(hub.asked)
    adapter = json.loads((tmp_path / "run" / "low" / "train" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", NEW)
