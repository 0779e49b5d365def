"""A tiny model, and rows that it learns: read by many tests, changed by none."""

import pytest
from tests.rows import make_model, make_rows, write_rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    pytest.importorskip("transformers")
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows", make_rows(16))
