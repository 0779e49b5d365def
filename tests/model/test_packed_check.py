"""The check that packed documents have the log-probabilities of each one alone."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.tiny import random_row

from dasd_lite.config.train import Full
from dasd_lite.errors import TrainError
from dasd_lite.model import logprobs
from dasd_lite.model.packed_check import check_packing, comparison_row, documents_of
from dasd_lite.training.trainable import load_trainable


def test_the_comparison_row_is_the_beginning_of_a_few_documents():
    lengths = [600, 30, 2, 700, 9]
    ids = np.arange(sum(lengths))
    cut = comparison_row(np.split(ids, np.cumsum(lengths)[:-1]))
    assert cut.doc_lengths.tolist() == [512, 30, 2, 512]
    assert cut.ids.tolist() == [*range(512), *range(600, 632), *range(632, 1144)]


def test_documents_that_leak_are_refused(tiny, monkeypatch):
    of = logprobs.Documents.of
    # One document where there are several: what a wrong mask would do.
    monkeypatch.setattr(logprobs.Documents, "of", lambda lengths, device="cpu": of([sum(lengths)], device))
    model = load_trainable(tiny, Full(), device="cpu")
    with pytest.raises(TrainError, match="documents leak into each other"):
        check_packing(model, documents_of([random_row(20, 30, 9)]))


def test_weights_that_are_nan_are_refused(tiny):
    model = load_trainable(tiny, Full(), device="cpu")
    with torch.no_grad():
        model.base_model.norm.weight[0] = math.nan
    with pytest.raises(TrainError, match="not finite before the first step"):
        check_packing(model, documents_of([random_row(20, 30, 9)]))
