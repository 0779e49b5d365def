"""All rows of users' files: read, with every fault, and with what was not read.

Input: paths, and how they are to be read. Output: `Row`s in order. Invariants: a fault ends nothing before the last
row, so that all of them are told at once; what is left out or not read is counted and told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dasd_lite.config.reading import Reading, parse_path
from dasd_lite.data.formats.containers import rows_of
from dasd_lite.data.formats.conversation import listed
from dasd_lite.data.formats.layout import KNOWN, getter, paths_of, recognize
from dasd_lite.data.formats.meaning import Meaning
from dasd_lite.data.formats.presets import PRESETS
from dasd_lite.data.formats.row import OWN_COLUMNS, OWN_FORMAT, TOKEN_COLUMNS, Fault, LeftOut, Row
from dasd_lite.data.formats.sources import Source, SourceFile, find
from dasd_lite.errors import DataError

_SHOWN_FAULTS = 20


class RowFiles:
    """The rows of files, to be read once: iterate, then call `finish`.

    Attributes:
        sources: What each path leads to.
        num_rows: Rows read so far, those that are left out included.
        left_out: Why answers or rows are left out → how many.
    """

    def __init__(
        self,
        paths: Sequence[str],
        reading: Reading,
        *,
        answers: bool,
        tokens: bool = False,
        system: str | None = None,
    ) -> None:
        """Find the files.

        Args:
            paths: Files, folders, patterns, places on the hub.
            reading: Format and map.
            answers: Read the answers too, not only the questions.
            tokens: Also read the columns with something for each token.
            system: System message for questions that have none.

        Raises:
            DataError: A path that leads to no file; a line for each.
        """
        self._reading, self._answers, self._tokens, self._system = reading, answers, tokens, system
        self.sources: list[Source] = []
        missing = []
        for path in paths:
            try:
                self.sources.append(find(path))
            except DataError as error:
                missing.append(str(error))
        if missing:
            raise DataError("\n".join(missing))
        self.num_rows = 0
        self.left_out: Counter[str] = Counter()
        self._faults: dict[str, list[str]] = {}
        self._num_faulty: Counter[str] = Counter()
        self._notes: list[str] = []
        self._file = ""
        self._not_loaded: list[str] = []

    @property
    def files(self) -> list[SourceFile]:
        """All files, in order."""
        return [file for source in self.sources for file in source.files]

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows of all files that can be read and are not left out."""
        for file in self.files:
            yield from self.rows(file)

    def fault(self, where: str, message: str) -> None:
        """Add a fault of a row that only its reader could see."""
        self._num_faulty[self._file] += 1
        shown = self._faults.setdefault(self._file, [])
        if len(shown) < _SHOWN_FAULTS:
            shown.append(f"{where}: {message}")

    def finish(self) -> list[str]:
        """Return notes on what was left out or not read, a line for each.

        Raises:
            DataError: Rows have faults: the first 20 of each file, and how many more there are.
        """
        total = self._num_faulty.total()
        lines = [line for shown in self._faults.values() for line in shown]
        if total > self._reading.max_faulty:
            lines = []
            for name, shown in self._faults.items():
                more = self._num_faulty[name] - len(shown)
                lines += shown + ([f"{name}: and {more:,} more rows that cannot be read"] if more else [])
            raise DataError("\n".join(lines))
        return [*(f"left out: {line}" for line in lines), *self._notes]

    def rows(self, file: SourceFile) -> Iterator[Row]:
        """Yield the rows of one of the files that can be read and are not left out."""
        self._file, self._not_loaded = file.name, []
        meaning = Meaning(self._reading, answers=self._answers, tokens=self._tokens, system=self._system)
        columns = self._reading.columns
        inner = {path: getter(path) for path in (paths_of(columns) if columns else ()) if len(parse_path(path)) > 1}
        try:
            for where, row in rows_of(file.path, file.name, self._wanted):
                self.num_rows += 1
                if isinstance(row, Fault):
                    self.fault(where, str(row))
                    continue
                try:
                    inner = {path: get for path, get in inner.items() if get(row) is None}
                    read = meaning.read(where, row)
                except Fault as fault:
                    self.fault(where, str(fault))
                except LeftOut:
                    pass
                else:
                    yield read
        except DataError as error:  # the file is damaged from here on
            self._fatal(str(error))
        finally:
            self._mapped_columns_exist(meaning, inner)
            self._note(file, meaning)

    def _wanted(self, names: Sequence[str]) -> list[str]:
        """Return the columns of a Parquet file that are read."""
        columns = self._reading.columns
        format_name = (
            recognize(names, answers=self._answers) if self._reading.format == "auto" else self._reading.format
        )
        preset = PRESETS.get(format_name)
        paths = [*(paths_of(columns) if columns else []), *(paths_of(preset.columns) if preset else [])]
        wanted = KNOWN | {str(parse_path(path)[0]) for path in paths}
        if format_name == OWN_FORMAT:
            wanted |= set(OWN_COLUMNS)
        if not self._tokens:
            wanted -= set(TOKEN_COLUMNS)
        self._not_loaded = [name for name in names if name not in wanted]
        return [name for name in names if name in wanted]

    def _fatal(self, message: str) -> None:
        """Add what is wrong with a whole file, which `max_faulty` does not excuse."""
        self._num_faulty[self._file] += self._reading.max_faulty + 1
        self._faults.setdefault(self._file, []).append(message)

    def _mapped_columns_exist(self, meaning: Meaning, without: Iterable[str]) -> None:
        """Report columns of the user's map that no row has, and paths `without` a value in any row."""
        columns = self._reading.columns
        tops = dict.fromkeys(str(parse_path(path)[0]) for path in paths_of(columns)) if columns else ()
        for top in tops if meaning.columns else ():
            if top not in meaning.columns:
                there = listed(sorted(meaning.columns))
                self._fatal(f"{self._file}: columns name {top!r}, which no row has; rows have {there}")
        for path in without if meaning.columns else ():
            if str(parse_path(path)[0]) in meaning.columns:
                self._fatal(f"{self._file}: columns name {path!r}, which no row has")

    def _note(self, file: SourceFile, meaning: Meaning) -> None:
        """Keep what is to be told of a file."""
        self.left_out += meaning.left_out
        read = meaning.num_rows
        if self._reading.format == "auto" and meaning.formats:
            self._notes.append(f"{file.name}: read as {', '.join(map(repr, meaning.formats))}")
        if unread := meaning.unread + Counter(dict.fromkeys(self._not_loaded, read)):
            each = [key if n == read else f"{key} ({n:,} rows)" for key, n in unread.items()]
            self._notes.append(f"{file.name}: not read: {listed(each)}, of {read:,} rows")
        for tag, number in (+meaning.rewritten).items():
            self._notes.append(f"{file.name}: {tag} became <think> or was removed in {number:,} answers")
        if number := meaning.num_continued:
            self._notes.append(f"{file.name}: earlier answers are part of the question in {number:,} rows")
        if meaning.num_solutions:
            self._notes.append(
                f"{file.name}: the reference is a solution in {meaning.num_solutions:,} rows; only the answer at its"
                " #### or in its \\boxed{…} is kept"
            )
        for reason, number in meaning.left_out.items():
            self._notes.append(f"{file.name}: {number:,} left out: {reason}")
