"""What a stage shows while it works: a bar on a terminal, lines in a log, and nothing for short work."""

import io
import threading

import pytest
from rich.console import Console

from dasd_lite import console


class Screen(io.StringIO):
    """Standard error that can be waited for."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()

    def write(self, text):
        with self.changed:
            self.changed.notify_all()
            return super().write(text)

    def wait_for(self, text):
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.getvalue(), timeout=60), self.getvalue()


@pytest.fixture
def screen(monkeypatch):
    """Replace standard error: `screen(terminal=True)` returns what is written to it."""
    monkeypatch.setattr(console, "_BAR_AFTER", 0.01)
    monkeypatch.setattr(console, "_LINE_EVERY", 0.01)

    def replaced(*, terminal):
        written = Screen()
        shown = Console(file=written, force_terminal=terminal, width=120, highlight=False)
        monkeypatch.setattr(console, "err", lambda: shown)
        return written

    return replaced


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_how_much_how_fast_and_how_long(screen, terminal):
    written = screen(terminal=terminal)
    with console.progress("low: sample", 1200, "answers", done=200, status=lambda: "[2 servers]") as bar:
        written.wait_for("200/1,200 answers, [2 servers]")
        bar.advance(50)
        written.wait_for("250/1,200 answers, ")
        written.wait_for(" answers/s, ")
        written.wait_for(" left, [2 servers]")
        bar.advance(50, "loss 0.5")
        written.wait_for(" left, loss 0.5")
    assert "low: sample" in written.getvalue()
    assert ("━" in written.getvalue()) == terminal
    length = len(written.getvalue())
    bar.advance(1)
    assert len(written.getvalue()) == length, "nothing is shown after the end"


def test_a_bar_leaves_the_terminal_clean(screen):
    written = screen(terminal=True)
    with console.progress("low: pack", 10, "rows"):
        written.wait_for("0/10 rows")
    assert written.getvalue().endswith("\x1b[2K"), "the line of the bar is erased"


@pytest.mark.parametrize("terminal", [False, True])
def test_short_work_shows_nothing(screen, monkeypatch, terminal):
    monkeypatch.setattr(console, "_BAR_AFTER", 3600)
    monkeypatch.setattr(console, "_LINE_EVERY", 3600)
    written = screen(terminal=terminal)
    with console.progress("low: pack", 10, "rows") as bar:
        bar.advance(10)
    assert written.getvalue() == ""


def test_an_error_ends_the_progress(screen):
    written = screen(terminal=False)
    with pytest.raises(RuntimeError), console.progress("low: pack", 10, "rows"):
        written.wait_for("low: pack: 0/10 rows")
        raise RuntimeError
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_lines_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(console, "out", lambda: Console(width=20))
    monkeypatch.setattr(console, "err", lambda: Console(stderr=True, width=20))
    line = "runs/[bold]/low: [/] more than twenty columns"
    console.say(line)
    console.note(line)
    assert tuple(capsys.readouterr()) == (f"{line}\n", f"note: {line}\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (86400, "24 h 0 min")],
)
def test_durations_are_written_as_people_say_them(seconds, text):
    assert console.duration(seconds) == text


def test_work_without_a_phase_has_no_name_for_it():
    assert (console.label("low", "pack"), console.label("", "pack")) == ("low: pack", "pack")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (False, True)),
        ({"RANK": "1"}, (False, True)),  # left over in a shell: this process is the only one
        ({"RANK": "0", "WORLD_SIZE": "2"}, (True, True)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (True, False)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (False, True)),
    ],
)
def test_which_process_prints(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (console.is_rank(), console.is_first()) == expected
