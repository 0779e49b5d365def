"""The recipes that ship: each is one that `check` accepts, and what `init` writes is what examples/ shows."""

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner

from dasd_lite import cli
from dasd_lite.config.load import load_recipe
from dasd_lite.run.check import unread_settings

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.toml"))


def test_there_is_one_for_each_situation():
    assert {path.stem for path in RECIPES} >= set(cli.SITUATIONS)
    assert len(cli.SITUATIONS) == 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_check_accepts_every_example(path):
    done = CliRunner().invoke(cli.app, ["check", str(path), "--until", "config"])
    assert done.exit_code == 0, done.output
    assert f"{path} is good" in done.output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_example_sets_what_nothing_reads(path):
    assert list(unread_settings(load_recipe(path))) == []


@pytest.mark.parametrize("situation", cli.SITUATIONS)
def test_init_writes_the_example_and_never_over_a_file(situation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["init", situation])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run.toml").read_bytes() == (EXAMPLES / f"{situation}.toml").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    load_recipe(Path("run.toml"))
    (tmp_path / "run.toml").write_text("mine")
    again = CliRunner().invoke(cli.app, ["init", situation])
    assert "run.toml: already exists" in str(again.exception)
    assert (tmp_path / "run.toml").read_text() == "mine"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_scripts_are_python_and_say_what_they_do(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
