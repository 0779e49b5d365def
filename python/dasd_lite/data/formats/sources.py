"""Where users' files are: a file, a folder, a pattern, or a place on the Hugging Face hub → files on this disk.

Input: a path as a recipe has it. Output: files in a fixed order, and what identifies their content. Invariant: a path
that leads to no file is an error, and files of the hub are those of one commit, which the identity names. The folder of
a stage is one source of rows: its table, not its files, which may have rows that the table has no longer.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from dasd_lite.data.formats.containers import kind_of
from dasd_lite.data.manifest import fingerprint, read_manifest, was_begun
from dasd_lite.data.seeds import digest
from dasd_lite.errors import DataError

HUB = "hf://"
_PLACE = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[\w-]+|[^/]+))?(?:/(?P<path>.*))?"
)
_PATTERN = re.compile(r"[*?\[]")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or the folder of a stage, and what errors and notes call it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Source:
    """What a path of a recipe leads to; files of the hub have `identity`, the path with its commit."""

    files: tuple[SourceFile, ...]
    identity: str = ""

    @property
    def fingerprint(self) -> str:
        """Hash of the content of the files, or the commit that they are of."""
        if self.identity:
            return self.identity
        hashes = [fingerprint(file.path) for file in self.files]
        return (
            hashes[0]
            if len(hashes) == 1
            else digest([[f.path.name, h] for f, h in zip(self.files, hashes, strict=True)])
        )


def find(place: str) -> Source:
    """Return the files at a place: a file, a folder, a pattern, or `hf://datasets/ORG/NAME@REVISION/path`.

    Raises:
        DataError: There is no such file, or the hub cannot be reached.
    """
    if place.startswith(HUB):
        return _on_hub(place)
    if not place:
        raise DataError("the path is empty; name a file, a folder, or a pattern")
    path = Path(place).expanduser()
    if path.is_file():
        return Source((SourceFile(path, str(path)),))
    if path.is_dir() and was_begun(path):
        found = [_with_rollouts(path)]
    elif path.is_dir():
        found = _data_files(path, [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()])
    elif _PATTERN.search(place):
        found = sorted(match for match in map(Path, glob(str(path), recursive=True)) if match.is_file())
        if not found:
            raise DataError(f"{place}: no file matches")
    else:
        raise DataError(f"{place}: no such file")
    return Source(tuple(SourceFile(each, str(each)) for each in found))


def _with_rollouts(folder: Path) -> Path:
    """Return the folder of a stage if it has rollouts."""
    if "rollouts" not in (tables := read_manifest(folder)["tables"]):
        raise DataError(f"{folder}: has {', '.join(tables) or 'no tables'}; name the folder of sample, ingest or mix")
    return folder


def _data_files(folder: Path, names: list[str]) -> list[Path]:
    """Return the files of a folder with rows: those of one kind."""
    names = sorted(n for n in names if kind_of(Path(n))[0] and not any(part.startswith(".") for part in Path(n).parts))
    kinds = {"".join(Path(name).suffixes[-2:]) if kind_of(Path(name))[1] else Path(name).suffix for name in names}
    if not names:
        raise DataError(f"{folder}: no file ends in .jsonl, .json, .csv or .parquet")
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: has files that end in {', '.join(sorted(kinds))}; name one kind, as {folder}/*{min(kinds)}"
        )
    return [folder / name for name in names]


def _on_hub(place: str) -> Source:
    """Find and download files of a data set on the hub; a commit and a file that are here already need no network."""
    match = _PLACE.fullmatch(place)
    if match is None:
        raise DataError(f"{place}: should look like hf://datasets/ORG/NAME@REVISION/path/*.parquet")
    name, revision, wanted = match["name"], match["revision"], match["path"] or ""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    is_file = kind_of(Path(wanted))[0] != "" and not _PATTERN.search(wanted)
    try:
        is_commit = revision is not None and _COMMIT.fullmatch(revision)
        commit = str(revision if is_commit else api.dataset_info(name, revision=revision).sha)
        files = [wanted] if is_file else api.list_repo_files(name, revision=commit, repo_type="dataset")

        def download(file: str) -> Path:
            return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))

        stage = [] if is_file else _of_stage(files, wanted)
        folder = next(iter([download(file).parent for file in stage]), None)
        if folder is not None and was_begun(folder):
            found = [(_with_rollouts(folder), wanted)]
        else:
            files = files if is_file else _matching(files, wanted)
            found = [(download(file), file) for file in files]
        if not found:
            raise DataError(f"{place}: no file matches, at commit {commit[:12]}")
    except Exception as error:
        if isinstance(error, DataError) or not is_of_hub(error):
            raise
        raise DataError(f"{place}: {hub_problem(error)}") from error
    at = f"{HUB}datasets/{name}@{commit[:12]}"
    return Source(
        tuple(SourceFile(path, f"{at}/{file}") for path, file in found), f"{HUB}datasets/{name}@{commit}/{wanted}"
    )


def is_of_hub(error: Exception) -> bool:
    """Return whether the network or the hub failed; which client raises what depends on huggingface_hub's version."""
    rooms = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, OSError) or bool(rooms & {"huggingface_hub", "httpx", "httpx2", "requests"})


def hub_problem(error: Exception) -> str:
    """Say what a failure of the hub means."""
    known = {
        "GatedRepoError": "the data set is gated; accept its terms on the hub, then set HF_TOKEN",
        "RepositoryNotFoundError": "no such data set, or it is private and HF_TOKEN is not set",
        "RevisionNotFoundError": "no such revision",
        "EntryNotFoundError": "no such file at this revision",
        "LocalEntryNotFoundError": "not downloaded yet, and the hub cannot be reached",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; name a commit of 40 digits and a file that has been downloaded",
    }
    kinds = [each.__name__ for each in type(error).__mro__]
    first = next(iter(str(error).splitlines()), kinds[0])
    return next((known[kind] for kind in kinds if kind in known), f"the hub cannot be reached: {first}")


def _of_stage(files: list[str], folder: str) -> list[str]:
    """Return manifest and rollouts of a folder of the hub, if it may be one that a stage wrote."""
    below = folder.rstrip("/") + "/" if folder else ""
    names = [file.removeprefix(below) for file in files if file.startswith(below)]
    shards = [name for name in names if re.fullmatch(r"rollouts[-.][^/]*\.parquet", name)]
    return [f"{below}{name}" for name in ("manifest.json", *shards)] if "manifest.json" in names and shards else []


def _matching(files: list[str], wanted: str) -> list[str]:
    """Return the files at a path, below a folder, or that match a pattern; `*` does not cross folders, `**` does."""
    if _PATTERN.search(wanted):
        expression = "/".join(
            ".*"
            if part == "**"
            else fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
            for part in wanted.split("/")
        ).replace(".*/", "(?:.*/)?")
        return sorted(file for file in files if re.fullmatch(expression, file))
    if wanted in files:
        return [wanted]
    below = wanted.rstrip("/") + "/" if wanted else ""
    inside = [file for file in files if file.startswith(below)]
    return [path.as_posix() for path in _data_files(Path(), inside)] if inside else []
