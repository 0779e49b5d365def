"""The check that packed documents have the log-probabilities of each one alone."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.tiny import random_row
from tests.model.zoo import build, save
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dasd_lite.config.train import Full
from dasd_lite.errors import TrainError
from dasd_lite.model import logprobs
from dasd_lite.model.attention import PACKED
from dasd_lite.model.load import load_model
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "granite_hybrid", "falcon_h1", "lfm2"])
def test_a_state_that_runs_on_into_the_next_document_is_refused(name, dtype, tmp_path):
    folder = save(build(name), tmp_path / name, dtype)
    documents = [np.random.default_rng(i).integers(3, 440, n) for i, n in enumerate((150, 140, 120, 160))]
    model = load_model(folder, device="cpu", dtype=dtype)
    check_packing(model, documents)  # one document at a time
    model.set_attn_implementation(PACKED)  # side by side
    with pytest.raises(TrainError, match="documents leak into each other"):
        check_packing(model, documents)


def test_a_leak_behind_the_window_is_seen_in_the_longest_document(tmp_path, monkeypatch):
    folder = save(build("gemma3", sliding_window=520), tmp_path / "gemma3")
    documents = [np.random.default_rng(i).integers(3, 440, n) for i, n in enumerate((90, 50, 40, 30, 640))]
    model = load_model(folder, device="cpu")
    check_packing(model, documents)
    # A kernel that forgets the window: it shows only behind 520 tokens.
    attend = ALL_ATTENTION_FUNCTIONS[PACKED]
    without = lambda *arguments, **options: attend(*arguments, **{**options, "sliding_window": None})  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PACKED, without)
    with pytest.raises(TrainError, match=r"at token 5\d\d of document 4: the attention or the logits of gemma3_text"):
        check_packing(model, documents)


def test_logits_that_are_scaled_behind_the_head_are_noticed(tmp_path, monkeypatch):
    model = load_model(save(build("granite"), tmp_path / "granite"), device="cpu")
    check_packing(model, documents_of([random_row(20, 30, 9)]))
    monkeypatch.setattr(logprobs, "logits_of", lambda causal: causal.get_output_embeddings())
    with pytest.raises(TrainError, match="the attention or the logits of granite"):
        check_packing(model, documents_of([random_row(20, 30, 9)]))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "gemma3"])
def test_a_healthy_model_in_16_bits_is_not_refused(name, tmp_path):
    folder = save(build(name), tmp_path / name, "bfloat16")
    documents = [np.random.default_rng(i).integers(3, 440, n) for i, n in enumerate((300, 240, 120, 260))]
    check_packing(load_model(folder, device="cpu", dtype="bfloat16"), documents)


def test_float16_that_overflows_is_called_by_its_name(tmp_path):
    model = build("gemma3", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5e4)
    folder = save(model, tmp_path / "gemma3")
    check_packing(load_model(folder, device="cpu"), documents_of([random_row(20, 30, 9)]))
    with pytest.raises(TrainError, match="float16 overflowed; use dtype = 'float32'"):
        check_packing(load_model(folder, device="cpu", dtype="float16"), documents_of([random_row(20, 30, 9)]))


def test_weights_that_are_nan_are_refused(tiny):
    model = load_trainable(tiny, Full(), device="cpu")
    with torch.no_grad():
        model.base_model.norm.weight[0] = math.nan
    with pytest.raises(TrainError, match="not finite before the first step"):
        check_packing(model, documents_of([random_row(20, 30, 9)]))
