"""The probe of the teacher's servers, as a table and as faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dasd_lite.config.models import EndpointModel
from dasd_lite.config.stages import Phase, RecipeConfig
from dasd_lite.console import err, out
from dasd_lite.data.prompts import read_prompts
from dasd_lite.data.records import Message
from dasd_lite.run.pipeline import ASKING

if TYPE_CHECKING:
    from dasd_lite.inference.endpoint.probe import ProbeResult, Requirements

_WIDE = 200  # a table is not broken to fit a narrow log


_COLUMNS = (
    *("answers", "logprobs", "raw", "bytes", "thinking", "seed", "n = 2", "noise", "context"),
    *("continues", "reads", "answers as"),
)


def probe_teacher(recipe: RecipeConfig, teacher: EndpointModel) -> list[str]:
    """Probe each of the teacher's servers, print what was found, and return what makes the run impossible."""
    from dasd_lite.inference.endpoint.probe import probe_servers

    if err().is_terminal:
        err().print(f"[dim]probing {len(teacher.base_urls)} server(s) …[/dim]", end="\r")
    found = probe_servers(teacher, _question(recipe), needs(recipe))
    _print(found)
    faults = [
        f"teacher: {item.remedy}" if item.name == "answers" else f"{server.base_url}: {item.found}: {item.remedy}"
        for server in found
        for item in server.items
        if item.fatal
    ]
    if not faults and not any(server.answers for server in found):
        reasons = "; ".join(f"{server.base_url}: {item.remedy}" for server in found for item in server.items)
        faults = [f"teacher: no server can be reached: {reasons}"]
    return faults


def needs(recipe: RecipeConfig) -> Requirements:
    """Return what the recipe asks of its teacher."""
    from dasd_lite.inference.endpoint.probe import Requirements

    asking = [phase for phase in recipe.phase if phase.source in ASKING]
    temperatures = [phase.sample.temperature if phase.source == "sample" else phase.mix.temperature for phase in asking]
    return Requirements(
        tempered=any(temperature != 1 for temperature in temperatures),
        thinking=any(phase.select.require_think for phase in asking),
        prefix=any(phase.source == "mix" for phase in asking),
        max_tokens=max([p.sample.max_tokens if p.source == "sample" else p.mix.max_tokens for p in asking], default=0),
        reading=any(teacher_scores(phase) for phase in recipe.phase),
    )


def teacher_scores(phase: Phase) -> bool:
    """Tell whether the teacher reads the phase's answers."""
    return phase.score.by == "teacher" and phase.is_scored


def _question(recipe: RecipeConfig) -> tuple[Message, ...]:
    """Return a real question: the recipe's first."""
    if recipe.prompts.path is not None:
        return read_prompts(recipe.prompts.path, limit=1, system=recipe.prompts.system)[0].messages
    return ({"role": "user", "content": "Is 97 a prime number?"},)


def _print(found: list[ProbeResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("endpoint", no_wrap=True)
    names = [name for name in _COLUMNS if any(item.name == name for server in found for item in server.items)]
    for name in names:
        table.add_column(name, no_wrap=True)
    for server in found:
        items = {item.name: item for item in server.items}
        cells = [_cell(items[name].found, items[name].fatal) if name in items else "–" for name in names]
        table.add_row(server.base_url, *cells)
    Console(width=max(out().width, _WIDE), highlight=False).print(table)
    if not any(server.answers for server in found):
        return  # the error says it all
    for server in found:
        for item in server.items:
            if item.remedy and not item.fatal:  # fatal ones are lines of the error
                line = f"note: {server.base_url}: {item.name}: {item.found}: {item.remedy}"
                out().print(line, markup=False, soft_wrap=True)


def _cell(text: str, fatal: bool) -> str:
    return f"[bold red]{text}[/bold red]" if fatal else text
