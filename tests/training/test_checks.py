"""Whether rows and model belong together: the tokenizer, and the tokens that end an answer."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import QUICK, make_rows, write_rows

from dasd_lite.chat.chat import Chat
from dasd_lite.config.train import TrainConfig
from dasd_lite.data.hub import configured_stop_ids
from dasd_lite.errors import TrainError
from dasd_lite.stages.train import train


def test_rows_packed_with_another_tokenizer(demo, tmp_path):
    right = write_rows(tmp_path / "right", make_rows(8), tokenizer=Chat(demo / "student").fingerprint)
    config = TrainConfig(**QUICK | {"epochs": 1})
    train(right, demo / "student", config, out=tmp_path / "fits")
    wrong = write_rows(tmp_path / "wrong", make_rows(8), tokenizer=Chat(demo / "teacher").fingerprint)
    with pytest.raises(
        TrainError, match=f"^{wrong}: packed with a different tokenizer or chat template from .*student's"
    ):
        train(wrong, demo / "student", config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_embeddings_than_ids_are_a_note(demo, tmp_path, capsys):
    model = tmp_path / "padded"
    shutil.copytree(demo / "student", model)
    padded = transformers.AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(448)
    padded.save_pretrained(model)
    rows = write_rows(tmp_path / "rows", make_rows(8), tokenizer=Chat(model).fingerprint)
    train(rows, model, TrainConfig(**QUICK | {"epochs": 1}), out=tmp_path / "out")
    assert (
        "note: the model has 448 embeddings, its tokenizer 440 ids; the other 8 are padding" in capsys.readouterr().err
    )
    beyond = make_rows(8)
    beyond[5]["ids"][2] = 445
    rows = write_rows(tmp_path / "beyond", beyond, tokenizer=Chat(model).fingerprint)
    with pytest.raises(TrainError, match=r"row 5, document 0 .*token id 445, but the model has 440"):
        train(rows, model, TrainConfig(**QUICK), out=tmp_path / "out2")


def test_a_model_that_would_not_stop_where_its_data_end(tiny, tmp_path, capsys):
    rows = make_rows(8)
    for row in rows:
        row["ids"] = [5 if i % 7 == 3 else x for i, x in enumerate(row["ids"])]
        for end in np.cumsum(row["doc_lengths"]):
            row["ids"][end - 1] = 60
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 59}))
    train(write_rows(tmp_path / "rows", rows), model, TrainConfig(**QUICK), out=tmp_path / "out")
    assert "answers end with token 60, but the student stops at 59" in capsys.readouterr().err
    assert configured_stop_ids(tmp_path / "out" / "model") == {59, 60}


def test_an_unused_id_over_the_embeddings_is_a_note(demo, tmp_path, capsys):
    """As in gemma-3-1b-it, whose tokenizer has a token for images that its embeddings lack."""
    model = tmp_path / "student"
    shutil.copytree(demo / "student", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    image = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 440, "content": "<image_soft_token>", "special": True, **image})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    packed_with = Chat(model).fingerprint
    rows = write_rows(tmp_path / "rows", make_rows(8), tokenizer=packed_with)
    train(rows, model, TrainConfig(**QUICK | {"epochs": 1}), out=tmp_path / "out")
    note = "note: the tokenizer has 441 ids, the model 440 embeddings; no row may use the other 1"
    assert note in capsys.readouterr().err
    beyond = make_rows(8)
    beyond[5]["ids"][2] = 440
    rows = write_rows(tmp_path / "beyond", beyond, tokenizer=packed_with)
    with pytest.raises(TrainError, match=r"row 5, document 0 .*token id 440, but the model has 440"):
        train(rows, model, TrainConfig(**QUICK), out=tmp_path / "out2")
