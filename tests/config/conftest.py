"""Fixtures that read the recipe of this folder with one piece replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.config.recipe import RECIPE

from dasd_lite.config.load import load_recipe
from dasd_lite.config.stages import RecipeConfig
from dasd_lite.errors import ConfigError


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RecipeConfig]:
    """`load("old", "new", "over=ride")` reads RECIPE with `old` replaced, or with `new` appended if `old` is empty."""

    def loaded(old: str = "", new: str = "", *overrides: str, text: str = RECIPE) -> RecipeConfig:
        assert not old or text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        (tmp_path / "run.toml").write_text(text.replace(old, new, 1) if old else text + new, encoding="utf-8")
        return load_recipe(tmp_path / "run.toml", overrides)

    return loaded


@pytest.fixture
def mistakes(load: Callable[..., RecipeConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """`mistakes(…)` returns the lines with which `load(…)` is refused, without the file's folder."""

    def refused(*args: str, **kwargs: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load(*args, **kwargs)
        return str(error.value).replace(f"{tmp_path}/", "").splitlines()

    return refused
