"""Bytes of keys and values, against what an engine allocates and numbers worked out by hand."""

from dataclasses import replace

import pytest
from tests.costs.models import SHAPE_4B, save_model

from dasd_lite.costs.cache import answers_that_fit, cache_bytes, longest_that_fits, weight_bytes
from dasd_lite.costs.shape import LatentAttention, read_shape


def test_keys_and_values_of_a_4b_model():
    assert cache_bytes(SHAPE_4B, 1000) == 2 * 2 * 8 * 128 * 36 * 1000
    assert cache_bytes(SHAPE_4B, 1000, element_bytes=4, cards=2) == cache_bytes(SHAPE_4B, 1000)
    assert cache_bytes(SHAPE_4B, 1000, cards=16) == cache_bytes(SHAPE_4B, 1000, cards=8), "a head is not cut"


def test_windows_keep_no_more_than_they_see():
    mixed = replace(SHAPE_4B, sliding_window=512, num_sliding_layers=30)
    assert cache_bytes(mixed, 512) == cache_bytes(SHAPE_4B, 512)
    assert cache_bytes(mixed, 4096) == 2 * 2 * 1024 * (6 * 4096 + 30 * 512)


def test_deepseeks_attention_is_compressed_in_vllm_alone():
    latent = LatentAttention(q_rank=0, kv_rank=512, plain_size=128, rotary_size=64, value_size=128)
    shape = replace(SHAPE_4B, latent=latent)
    assert cache_bytes(shape, 10, vllm=True) == 2 * (512 + 64) * 36 * 10
    assert cache_bytes(shape, 10) == 2 * 32 * (192 + 128) * 36 * 10


@pytest.mark.parametrize("room", [0, 147_455, 147_456, 10**9, 10**12])
def test_the_longest_that_fits_is_the_last_that_does(room):
    found = longest_that_fits(SHAPE_4B, room, 131_072)
    assert cache_bytes(SHAPE_4B, found, vllm=True) <= room
    assert found == 131_072 or cache_bytes(SHAPE_4B, found + 1, vllm=True) > room


def test_an_answer_fits_always():
    assert answers_that_fit(SHAPE_4B, -1e9, 1000) == answers_that_fit(SHAPE_4B, 0, 1000) == 1
    assert answers_that_fit(SHAPE_4B, 24e9 - 8e9, 8192) == int(0.9 * 16e9 // (147_456 * 8192 + 24 * 151_936))


def test_weights_are_those_of_the_files_or_at_least_of_the_shape(tmp_path):
    folder = save_model(tmp_path)
    parameters = read_shape(folder).num_parameters
    assert weight_bytes(folder) == pytest.approx(2 * parameters, rel=0.01)
    assert weight_bytes(folder, 1) == parameters, "of an engine that reads them as another format"
    next(folder.glob("*.safetensors")).unlink()
    assert weight_bytes(folder, 4) == 4 * parameters
