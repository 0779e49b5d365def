"""What the documents say is what the code does."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dasd_lite.config.load import load_recipe
from dasd_lite.config.reading import FORMATS, Columns
from dasd_lite.data.formats.conversation import THINKING
from dasd_lite.data.formats.layout import COMPLETIONS, QUESTIONS, SYSTEMS
from dasd_lite.data.formats.presets import PRESETS
from dasd_lite.data.formats.row import TOKEN_COLUMNS
from dasd_lite.grading import open_grader
from dasd_lite.inference import Request, SamplingParams
from dasd_lite.method.selection import Candidates, score_candidates
from dasd_lite.run.pipeline import plan

ROOT = Path(__file__).parents[1]


def test_the_readme_s_recipe_is_one_and_has_at_most_twenty_lines(tmp_path: Path) -> None:
    recipe = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert recipe is not None
    assert len(recipe[1].splitlines()) <= 20
    (tmp_path / "run.toml").write_text(recipe[1])
    assert [phase.name for phase in load_recipe(tmp_path / "run.toml").phase] == ["low", "high", "mixed"]


def test_options_md_is_what_make_docs_writes() -> None:
    done = subprocess.run([sys.executable, "docs/make_options.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_is_in_the_readme_s_tree() -> None:
    tree = re.search(r"## The files\n\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    package, core = ROOT / "python" / "dasd_lite", ROOT / "rust" / "core" / "src"
    files = [path for path in package.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    rooms = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    assert not [path.name for path in files if not re.search(rf"\b{path.stem}\b", tree[1])]
    assert not [path.name for path in rooms if f"{path.name}/" not in tree[1]]
    assert not [path.name for path in core.glob("*.rs") if path.stem != "lib" and path.name not in tree[1]]


def test_the_page_about_data_has_every_format_and_every_column_that_is_known() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)`( \*)? \|", page.partition("## Formats by name")[2], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(FORMATS)
    assert {name for name, star in rows if star} == {name for name, preset in PRESETS.items() if preset.signature}
    for column in (*QUESTIONS, *COMPLETIONS, *THINKING, *SYSTEMS, *TOKEN_COLUMNS, *Columns.model_fields):
        assert f"`{column}`" in page, column


def test_no_file_names_a_package_registry() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|static\.crates\.io|registry\.npmjs")
    assert names
    found = [n for n in names if n != "tests/test_docs.py" and hosts.search((ROOT / n).read_text(errors="ignore"))]
    assert not found


def test_the_readme_s_excerpt_is_of_a_demo_with_todays_words() -> None:
    excerpt = (ROOT / "README.md").read_text()
    for line in ("rollouts of 400 prompts", "rejected: rank", "% full", "tokens/s", "Sentence classes", "since before"):
        assert line in excerpt, line
    steps = re.findall(r"^((?:base|low|high|mixed)/\w+) ", excerpt, re.MULTILINE)
    recipe = load_recipe(ROOT / "examples" / "demo.toml")
    assert steps == [step.name for step in plan(recipe)]


def test_the_code_of_the_extensions_page_is_what_it_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extensions.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    path = tmp_path / "page.py"
    path.write_text("\n".join(blocks))
    exec(compile(path.read_text(), path, "exec"), names)
    (tmp_path / "answers.json").write_text('{"2 + 2?": "4"}')
    numbers = np.array([30, 10, 20])
    candidates = Candidates(numbers, numbers, numbers, numbers, numbers, np.zeros(3, np.int64))
    assert score_candidates(names["about_a_page"], candidates).tolist() == [-470, -490, -480]
    grade = open_grader(names["last_line"])
    assert [grade(text, "4").verdict for text in ("so\n4", "5", "")] == ["right", "wrong", "no_answer"]
    request = Request(0, ({"role": "user", "content": "2 + 2?"},), 9, 0)
    (completion,) = names["Recorded"](tmp_path / "answers.json").complete([request], SamplingParams())
    assert completion.text == "4"
