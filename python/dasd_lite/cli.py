"""The `dasd-lite` command: 14 verbs, config loading, exit codes.

0: done, or nothing to do. 1: a defect, with its traceback. 2: something to mend, in one line each.
130: stopped by Ctrl-C; the same command goes on. Heavy packages are imported inside the commands,
so `--help` is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dasd_lite.errors import ConfigError, DasdError

if TYPE_CHECKING:
    from dasd_lite.config.stages import RecipeConfig

SITUATIONS = ("demo", "api-8gb", "t4", "lab", "paper")
_STAGES = {
    "sample": "Sample the teacher: k answers per prompt and temperature.",
    "ingest": "Take answers that exist already, in place of a teacher.",
    "score": "Score rollouts with the student: p per sentence of both models.",
    "select": "Filter rollouts and keep the best-ranked of each prompt.",
    "pack": "Pack what was kept into rows for training.",
    "train": "Train the student on the rows: full, LoRA or QLoRA.",
    "mix": "Let the student begin answers and the teacher end them.",
    "evaluate": "Measure accuracy on questions with answers.",
}


class _Commands(click.Group):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dasd-lite")
def app() -> None:
    """Distil a big reasoning teacher into a small student, by Distribution-Aligned Sequence Distillation.

    A recipe (run.toml) is a list of phases; a phase goes down the chain
    sample → score → select → pack → train → evaluate. Any key can be overridden behind the file:
    `dasd-lite run run.toml select.keep=2 low.train.epochs=1`.
    """


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
_force = click.option("--force", is_flag=True, help="Replace folders that were made with another configuration.")


@app.command()
@click.argument("situation", type=click.Choice(SITUATIONS))
def init(situation: str) -> None:
    """Write a commented run.toml for a SITUATION into this folder; never overwrites."""
    from dasd_lite.data.files import write_atomic

    target = Path("run.toml")
    if target.exists():
        raise ConfigError(f"{target}: is there already; move it away first")
    source = Path(__file__).parent / "recipes" / f"{situation}.toml"
    write_atomic(target, source.read_text(encoding="utf-8"))
    _next(f"{target} is written. Next: dasd-lite check {target}")


@app.command()
@_recipe
@_overrides
@click.option(
    "--until",
    type=click.Choice(["config", "models", "trial"]),
    default="models",
    show_default=True,
    help="Last rung: the file, the models and data it names, or 16 prompts through the whole chain.",
)
def check(recipe: Path, overrides: tuple[str, ...], until: str) -> None:
    """Look a recipe over before it costs anything; all faults of a rung at once."""
    from dasd_lite.run import check as checks

    config = _load(recipe, overrides)
    checks.check(config, until)
    _next(f"{recipe} is good. Next: dasd-lite run {_quoted(recipe, overrides)}")


@app.command()
@_recipe
@_overrides
@_force
def run(recipe: Path, overrides: tuple[str, ...], force: bool) -> None:
    """Run what is missing, in order; the same command goes on after anything."""
    from dasd_lite.run.trial import before_paying

    config = _load(recipe, overrides)
    before_paying(config)
    _run_all(config, force=force)


def _run_all(config: RecipeConfig, *, force: bool = False) -> None:
    from dasd_lite.report import page as report
    from dasd_lite.run import pipeline as recipes

    ran = recipes.run(config, force=force, announce=_announce)
    page = report.run(config.out, config.out / "report", quiet=not ran)
    last = config.phase[-1].name
    if not ran:
        _next("Nothing to do.")
    _next(f"Report: {page}\nThe student: {config.out / last / 'train' / 'model'}")


def _stage_command(stage: str, text: str) -> None:
    @app.command(name=stage, help=text, short_help=text)
    @_recipe
    @_overrides
    @click.option("--phase", help="Only this phase; without it, every phase that has this stage.")
    @_force
    def command(recipe: Path, overrides: tuple[str, ...], phase: str | None, force: bool) -> None:
        from dasd_lite.run import pipeline as recipes
        from dasd_lite.run.trial import before_paying

        config = _load(recipe, overrides)
        before_paying(config, only_stage=stage, only_phase=phase)
        if not recipes.run(config, only_stage=stage, only_phase=phase, force=force, announce=_announce):
            _next("Nothing to do.")
        made = [step.folder for step in recipes.plan(config) if step.stage == stage and phase in (None, step.phase)][-1]
        _next(f"Next: dasd-lite run {_quoted(recipe, overrides)}, or look: dasd-lite show {made}")


for _name, _text in _STAGES.items():
    _stage_command(_name, _text)


@app.command()
@_recipe
@_overrides
def report(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show what came of a run: tables here, and one HTML page with plots."""
    from dasd_lite.report import page as reports

    config = _load(recipe, overrides)
    _next(f"Report: {reports.run(config.out, config.out / 'report')}")


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("uid", required=False)
@click.option("--rejected", is_flag=True, help="Those that select rejected, with the reason.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="How many, when no uid is given."
)
def show(folder: Path, uid: str | None, rejected: bool, limit: int) -> None:
    """Look into a FOLDER: sentences coloured by class, trained and masked tokens."""
    from dasd_lite.report.show import show as shows

    shows.show(folder, uid, rejected=rejected, limit=limit)
    rejected_too = ", or what select left out: --rejected" if folder.name == "select" else ""
    _next(f"Next: one of them whole by its uid{rejected_too}")


@app.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@_overrides
@_force
def demo(out: Path, overrides: tuple[str, ...], force: bool) -> None:
    """Watch a tiny student learn from a tiny teacher, all stages, in a minute or two on two CPU cores."""
    source = Path(__file__).parent / "recipes" / "demo.toml"
    _run_all(_load(source, (f'out="{out}"', *overrides)), force=force)
    click.echo("Your own: dasd-lite init api-8gb (or t4, lab, paper) writes a run.toml to start from.")


def _load(path: Path, overrides: tuple[str, ...]) -> RecipeConfig:
    from dasd_lite.config.load import load_recipe

    return load_recipe(path, overrides)


def _announce(step: Any, manifest: dict[str, Any] | None) -> None:
    from dasd_lite.console import err, out
    from dasd_lite.report.summary import rejections, summary

    if manifest is None:
        if err().is_terminal:
            err().print(f"[dim]{step.name} …[/dim]", end="\r")
    else:
        out().print(f"{step.name:<16} {summary(step.folder, manifest)}", markup=False, soft_wrap=True)
        if (table := rejections(manifest)) is not None:
            out().print(table)


def _next(line: str) -> None:
    from dasd_lite.console import out

    out().print(line, markup=False, soft_wrap=True)


def _quoted(recipe: Path, overrides: tuple[str, ...]) -> str:
    import shlex

    return shlex.join([str(recipe), *overrides])


def main() -> None:
    """Run the command line, and turn what users can mend into one line each and exit code 2."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        click.echo("dasd-lite: stopped; the same command goes on from here", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DasdError as error:
        for line in str(error).splitlines():
            click.echo(f"dasd-lite: {line}", err=True)
        sys.exit(2)
