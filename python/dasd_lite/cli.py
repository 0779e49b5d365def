"""The `dasd-lite` command: verbs, config loading, exit codes.

0: done, or nothing to do. 1: a defect, with its traceback. 2: something to fix, one line for each. 130: stopped by
Ctrl-C; run the same command to resume. Heavy packages are imported inside the commands, so `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dasd_lite.config.chain import STAGES
from dasd_lite.errors import ConfigError, DasdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dasd_lite.config.stages import RecipeConfig
    from dasd_lite.run.step import Step

SITUATIONS = ("demo", "api-8gb", "t4", "lab", "paper")


class _Commands(click.Group):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dasd-lite")
def app() -> None:
    """Distill a big reasoning model into a small one, by Distribution-Aligned Sequence Distillation.

    A recipe (run.toml) is a list of phases; each phase goes down the chain
    sample → score → select → pack → train → evaluate. Override any key after the file name:
    `dasd-lite run run.toml select.keep=2 low.train.epochs=1`.
    """


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[TABLE.KEY=VALUE]...")
_force = click.option("--force", is_flag=True, help="Set folders aside that were made with other options.")
_yes = click.option("--yes", is_flag=True, help="Agree to set answers aside that were paid for, or to remove them.")
_reuse = click.option(
    "--reuse",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Folder of another run, whose answers and scores are taken over where they are the same.",
)


@app.command()
@click.argument("situation", type=click.Choice(SITUATIONS))
def init(situation: str) -> None:
    """Write a commented run.toml for a SITUATION into this folder; never overwrites one."""
    from dasd_lite.data.files import write_atomic

    target = Path("run.toml")
    if target.exists():
        raise ConfigError(f"{target}: already exists; move it away first")
    source = Path(__file__).parent / "recipes" / f"{situation}.toml"
    write_atomic(target, source.read_text(encoding="utf-8"))
    _say(f"Wrote {target}. Next: dasd-lite check {target}")


@app.command()
@_recipe
@_overrides
@click.option(
    "--until",
    type=click.Choice(["config", "models", "trial"]),
    default="models",
    show_default=True,
    help="How far to check: the file, the models and data that it names, or a few prompts through the whole chain.",
)
@_reuse
def check(recipe: Path, overrides: tuple[str, ...], until: str, reuse: tuple[Path, ...]) -> None:
    """Check a recipe before it costs anything; reports all faults of a level at once."""
    from dasd_lite.run.check import check_recipe

    check_recipe(_load(recipe, overrides, reuse), until)
    _say(f"{recipe} is good. Next: dasd-lite run {_quoted(recipe, overrides)}")


@app.command()
@_recipe
@_overrides
@_reuse
@_force
@_yes
def run(recipe: Path, overrides: tuple[str, ...], reuse: tuple[Path, ...], force: bool, yes: bool) -> None:
    """Run what is missing, in order; run the same command again to resume."""
    _run_all(_load(recipe, overrides, reuse), force=force, yes=yes)


def _run_all(config: RecipeConfig, *, force: bool = False, yes: bool = False) -> None:
    from dasd_lite.data.run_folder import RunFolder
    from dasd_lite.report.page import write_report
    from dasd_lite.run.recipe import run_resolved

    ran = run_resolved(config, force=force, allow=_allow(yes), announce=_announce).ran
    page = write_report(config.out, quiet=not ran)
    if not ran:
        _say("Nothing to do.")
    _say(f"Report: {page}\nStudent: {RunFolder(config.out).model(config.phase[-1].name)}")


def _stage_command(stage: str, text: str) -> None:
    @app.command(name=stage, help=text, short_help=text)
    @_recipe
    @_overrides
    @click.option("--phase", help="Only this phase; without it, every phase that has this stage.")
    @_reuse
    @_force
    @_yes
    def command(
        recipe: Path,
        overrides: tuple[str, ...],
        phase: str | None,
        reuse: tuple[Path, ...],
        force: bool,
        yes: bool,
        finish: bool = False,
    ) -> None:
        from dasd_lite.run.recipe import run_resolved

        outcome = run_resolved(
            _load(recipe, overrides, reuse),
            only_stage=stage,
            only_phase=phase,
            force=force,
            finish=finish,
            allow=_allow(yes),
            announce=_announce,
        )
        if not outcome.ran:
            _say("Nothing to do.")
        folder = outcome.steps[-1].path
        _say(f"Next: dasd-lite run {_quoted(recipe, overrides)}, or see the results: dasd-lite show {folder}")

    if stage == "sample":
        finish_help = "Ask for nothing more: go on with the answers that are there."
        click.option("--finish", is_flag=True, help=finish_help)(command)


for _name, _text in STAGES.items():
    _stage_command(_name, _text)


@app.command()
@_recipe
@_overrides
def report(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show the results of a run, a recipe or its folder: tables here, and one HTML page with plots."""
    from dasd_lite.report.page import write_report

    run = recipe if recipe.is_dir() and not overrides else _load(recipe, overrides).out
    _say(f"Report: {write_report(run)}")


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("uid", required=False)
@click.option("--rejected", is_flag=True, help="Rollouts that select rejected, with the reason.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="How many, when no uid is given."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Compare an evaluate FOLDER with another one, on the questions that both have.",
)
def show(folder: Path, uid: str | None, rejected: bool, limit: int, against: Path | None) -> None:
    """Look into a stage FOLDER: sentences colored by class, trained and masked tokens."""
    from dasd_lite.report.show.show import show as show_folder

    if against is not None:
        from dasd_lite.report.compare import show_comparison

        if uid is not None or rejected:
            raise ConfigError("--against compares whole evaluations; leave uid and --rejected out")
        show_comparison(folder, against)
        return
    show_folder(folder, uid, rejected=rejected, limit=limit)
    also = ", or --rejected for what select rejected" if folder.name == "select" else ""
    _say(f"Next: pass a uid to see one rollout in full{also}")


@app.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["inspect"]), required=True, help="The tool that will read it.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: RUN/inspect]")
def export(run_folder: Path, to: str, out: Path | None) -> None:
    """Write the evaluations of a RUN, a folder or its recipe, for another tool: logs that `inspect view` opens."""
    from dasd_lite.report.inspect_log import export_evaluations

    run_folder = _load(run_folder, ()).out if run_folder.is_file() else run_folder
    files = export_evaluations(run_folder, run_folder / to if out is None else out)
    for file in files:
        _say(f"Wrote {file}")
    _say(f"Next: inspect view --log-dir {files[0].parent}")


@app.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@_yes
def clean(run_folder: Path, yes: bool) -> None:
    """Remove what --force and new inputs have set aside in the folder of a RUN, and what kills left behind."""
    from dasd_lite.run.existing import remove_replaced, replaced_folders

    lines = replaced_folders(run_folder)
    for line in lines.values():
        _say(line)
    if lines and not _allow(yes)(f"{len(lines)} folders will be removed for good"):
        raise ConfigError("nothing was removed; add --yes to agree")
    remove_replaced(run_folder, lines)
    _say(f"Removed {len(lines)} folders." if lines else "Nothing to remove.")


@app.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@_overrides
@_force
def demo(out: Path, overrides: tuple[str, ...], force: bool) -> None:
    """Watch a tiny student learn from a tiny teacher: all stages, in a minute or two on two CPU cores."""
    source = Path(__file__).parent / "recipes" / "demo.toml"
    _run_all(_load(source, (f'out="{out}"', *overrides)), force=force)
    _say("Your own: dasd-lite init api-8gb (or t4, lab, paper) writes a run.toml to start from.")


def _load(path: Path, overrides: tuple[str, ...], reuse: tuple[Path, ...] = ()) -> RecipeConfig:
    from dasd_lite.config.load import load_recipe

    recipe = load_recipe(path, overrides)
    return recipe.model_copy(update={"reuse": [*recipe.reuse, *reuse]})


def _allow(yes: bool) -> Callable[[str], bool]:
    """Return a function that asks whether to do something, on a terminal; elsewhere only --yes agrees."""

    def allow(what: str) -> bool:
        on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        return yes or (on_terminal and click.confirm(f"{what}. Go on?", err=True))

    return allow


def _announce(step: Step, manifest: dict[str, Any] | None) -> None:
    from dasd_lite.console import err, out, say
    from dasd_lite.report.summary import rejections, summary, warnings

    if manifest is None:
        if err().is_terminal:
            err().print(f"[dim]{step.name} …[/dim]", end="\r")
    else:
        say(f"{step.name:<16} {summary(step.path)}")
        if (table := rejections(manifest)) is not None:
            out().print(table)
        for warning in warnings(manifest):
            say(warning)


def _say(line: str) -> None:
    from dasd_lite.console import say

    say(line)


def _quoted(recipe: Path, overrides: tuple[str, ...]) -> str:
    import shlex

    return shlex.join([str(recipe), *overrides])


def main() -> None:
    """Run the command line; turn what users can fix into one line each and exit code 2."""
    # Idle OpenMP threads should sleep soon: where another process needs the cores, spinning ones slow small models down
    # several times. GNU's OpenMP, which comes with torch, reads this when torch is imported. Measured on two cores:
    # 1000 keeps 90 % of the speed of long spinning on free cores, and has nearly twice its speed on shared ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        click.echo("dasd-lite: stopped; run the same command to resume", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except DasdError as error:
        for line in str(error).splitlines():
            click.echo(f"dasd-lite: {line}", err=True)
        sys.exit(2)
