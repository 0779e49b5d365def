"""The probe of the teacher's servers: what a recipe requires, the table of findings, and those that end a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dasd_lite.config.chain import ASKING
from dasd_lite.config.models import Endpoint
from dasd_lite.config.stages import Phase
from dasd_lite.console import err, out, say_note
from dasd_lite.data.prompts import Prompts
from dasd_lite.data.records import Message

if TYPE_CHECKING:
    from dasd_lite.inference.endpoint.probe import ProbeResult, Requirements

_WIDTH = 200  # columns: a table is not broken to fit a narrow log
_COLUMNS = (
    *("answers", "logprobs", "raw", "bytes", "thinking", "seed", "n = 2", "noise", "context"),
    *("continues", "scores", "answers as"),
)
_ANY_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "Is 97 a prime number?"},)


def probe_teacher(teacher: Endpoint, phases: Sequence[Phase], prompts: Prompts | None) -> list[str]:
    """Probe each of the teacher's servers with the first prompt, print a table, and return the fatal findings.

    It costs a few hundred tokens per server.
    """
    from dasd_lite.inference.endpoint.probe import probe_servers

    if err().is_terminal:
        err().print(f"[dim]probing {len(teacher.base_urls)} server(s) …[/dim]", end="\r")
    question = prompts[0].messages if prompts is not None else _ANY_QUESTION
    results = probe_servers(teacher, question, requirements_of(phases))
    _print(results)
    faults = [
        f"teacher: {item.remedy}" if item.name == "answers" else f"{server.base_url}: {item.value}: {item.remedy}"
        for server in results
        for item in server.items
        if item.fatal
    ]
    if not faults and not any(server.answers for server in results):
        reasons = "; ".join(f"{server.base_url}: {item.remedy}" for server in results for item in server.items)
        faults = [f"teacher: no server can be reached: {reasons}"]
    return faults


def requirements_of(phases: Sequence[Phase]) -> Requirements:
    """Return what the phases require of their teacher."""
    from dasd_lite.inference.endpoint.probe import Requirements

    asking = [phase for phase in phases if phase.source in ASKING]
    sampling = [phase.sample if phase.source == "sample" else phase.mix for phase in asking]
    return Requirements(
        tempered=any(options.temperature != 1 for options in sampling),
        thinking=any(phase.select.require_think for phase in asking),
        prefix=any(phase.source == "mix" for phase in asking),
        max_tokens=max([options.max_tokens for options in sampling], default=0),
        scoring=any(phase.is_scored_by_teacher for phase in phases),
    )


def _print(results: Sequence[ProbeResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("endpoint", no_wrap=True)
    names = [name for name in _COLUMNS if any(item.name == name for server in results for item in server.items)]
    for name in names:
        table.add_column(name, no_wrap=True)
    for server in results:
        items = {item.name: item for item in server.items}
        cells = [_cell(items[name].value, items[name].fatal) if name in items else "–" for name in names]
        table.add_row(server.base_url, *cells)
    Console(width=max(out().width, _WIDTH), highlight=False).print(table)
    if not any(server.answers for server in results):
        return  # the error lists it all
    for server in results:
        for item in server.items:
            if item.remedy and not item.fatal:  # the error lists the fatal ones
                say_note(f"{server.base_url}: {item.name}: {item.value}: {item.remedy}")


def _cell(text: str, fatal: bool) -> str:
    return f"[bold red]{text}[/bold red]" if fatal else text
