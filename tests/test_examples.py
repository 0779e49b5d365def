"""The examples: `check` accepts every recipe, and `init` writes the same recipes as in examples/."""

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner

from dasd_lite import cli
from dasd_lite.config.load import load_recipe
from dasd_lite.run.check import unread_settings

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.toml"))


def test_every_situation_has_an_example():
    assert {path.stem for path in RECIPES} >= set(cli.SITUATIONS)
    assert len(cli.SITUATIONS) == 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_check_accepts_every_example(path):
    result = CliRunner().invoke(cli.app, ["check", str(path), "--until", "config"])
    assert result.exit_code == 0, result.output
    assert f"{path} is good" in result.output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_example_sets_an_option_without_effect(path):
    assert list(unread_settings(load_recipe(path))) == []


@pytest.mark.parametrize("situation", cli.SITUATIONS)
def test_init_writes_the_example_and_never_overwrites_a_file(situation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["init", situation])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.toml").read_bytes() == (EXAMPLES / f"{situation}.toml").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    load_recipe(Path("run.toml"))
    (tmp_path / "run.toml").write_text("mine")
    again = CliRunner().invoke(cli.app, ["init", situation])
    assert "run.toml: already exists" in str(again.exception)
    assert (tmp_path / "run.toml").read_text() == "mine"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_scripts_are_valid_python_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
