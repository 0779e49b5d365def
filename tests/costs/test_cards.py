"""Which of the visible GPUs are used."""

import json
import subprocess

import pytest

from dasd_lite.costs import cards
from dasd_lite.costs.cards import usable_gpus, visible_gpus


@pytest.fixture
def driver(monkeypatch):
    """Cards that the driver has, in GB, and the variable with which it was asked for them."""
    asked = []

    def has(*sizes):
        def run(command, env, **_):
            asked.append(env["CUDA_VISIBLE_DEVICES"])
            output = json.dumps([("A card", size * 10**9) for size in sizes])
            return subprocess.CompletedProcess(command, 0, f"a warning\n{output}\n", "")

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    cards._cards.cache_clear()
    yield has
    cards._cards.cache_clear()


def test_visible_gpus_are_those_of_the_variable(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f")
    assert visible_gpus() == ["3", "GPU-8f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


def test_a_display_card_is_left_out_and_said_once(driver, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,5")
    asked = driver(24, 2, 12)
    assert usable_gpus() == usable_gpus() == ["2", "5"]
    assert asked == ["2,0,5"], "asked once"
    notes = capsys.readouterr().err
    assert notes.count("GPU 0 (A card, 2 GB) is not used") == 1 and "GPU 5" not in notes


def test_one_card_is_used_whatever_its_size(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert usable_gpus() == ["1"] and driver(2) == [], "nobody was asked"


def test_a_driver_that_sees_other_cards_decides_nothing(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    driver(24, 2)
    assert usable_gpus() == ["0", "1", "2"]
