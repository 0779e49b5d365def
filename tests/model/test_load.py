"""Folders that hold no model, or not all of one."""

import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from dasd_lite.errors import ConfigError
from dasd_lite.model.load import load_model, model_spec


def test_no_model_in_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded as a language model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        model_spec(tmp_path)


def test_model_without_weights_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(tmp_path / "m")
