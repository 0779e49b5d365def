"""Options as keyword arguments: a table built in Python, with the errors of a recipe."""

import pytest

from dasd_lite.config.options import with_options
from dasd_lite.config.stages import SelectConfig
from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.errors import ConfigError


def test_options_replace_those_of_a_table():
    assert with_options(SelectConfig, None, {}, "select") == SelectConfig()
    base = SelectConfig(keep=3, beta=0.2)
    assert with_options(SelectConfig, base, {}, "select") is base
    assert with_options(SelectConfig, base, {"keep": 2}, "select") == SelectConfig(keep=2, beta=0.2)
    method = with_options(TrainConfig, None, {"method": Lora(rank=2), "epochs": 1}, "train").method
    assert method == Lora(rank=2)


@pytest.mark.parametrize(
    ("table", "name", "options", "line"),
    [
        (SelectConfig, "select", {"kep": 2}, "select.kep: unknown key; did you mean 'keep'?"),
        (SelectConfig, "select", {"keep": 0}, "select.keep = 0: should be greater than 0"),
        (TrainConfig, "train", {"method": "lora"}, "train.method = 'lora': should be a table of keys and values"),
        (
            TrainConfig,
            "train",
            {"method": {"kind": "lora", "rank": 0}},
            "train.method.rank = 0: should be greater than 0",
        ),
        (
            TrainConfig,
            "train",
            {"learning_rate": 1e-6},
            "train: min_learning_rate = 1e-05 is above learning_rate = 1e-06",
        ),
    ],
)
def test_a_wrong_option_is_one_line(table, name, options, line):
    with pytest.raises(ConfigError) as error:
        with_options(table, None, options, name)
    assert str(error.value) == line


def test_all_wrong_options_are_reported():
    with pytest.raises(ConfigError) as error:
        with_options(SelectConfig, None, {"keep": 0, "beta": 2.0}, "select")
    assert len(str(error.value).splitlines()) == 2
