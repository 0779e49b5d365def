"""A tiny model with packed attention, and the same one with its own."""

import pytest
from tests.model.tiny import random_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    pytest.importorskip("transformers")
    return random_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def packed_model(tiny):
    from dasd_lite.model.load import load_model

    return load_model(tiny, device="cpu")


@pytest.fixture(scope="module")
def plain_model(tiny):
    from dasd_lite.model.load import load_model

    return load_model(tiny, device="cpu", attention="sdpa")
