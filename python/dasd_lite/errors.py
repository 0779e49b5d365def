"""Errors that a user can cause or fix. Each is one clear line, and the command exits with code 2.

A message names the file, key, or row, the value there, and what would be right. Any exception that is not a
`DasdError` is a bug of ours and shows its traceback.
"""


class DasdError(Exception):
    """Base class of every error that the user can fix."""


class ConfigError(DasdError, ValueError):
    """A recipe that cannot be run as written. The message lists every mistake, one per line."""


class DataError(DasdError, ValueError):
    """A file, folder, or row that is not what a stage needs."""


class EndpointError(DasdError, ConnectionError):
    """A model server that does not answer, or not in the way that the method needs."""


class EngineError(DasdError, RuntimeError):
    """An engine process that keeps crashing. The message quotes the last lines of its log."""


class TrainError(DasdError, RuntimeError):
    """Training that must stop: no target tokens, a loss that is not a number, documents that leak into each other."""


class CheckpointError(DasdError, RuntimeError):
    """A checkpoint or folder that another configuration made."""


class MissingExtraError(DasdError, ImportError):
    """A package that only an optional part of dasd-lite installs. The message is the pip command."""

    def __init__(self, extra: str, package: str) -> None:
        """Name the extra to install and the missing package."""
        super().__init__(f"{package} is not installed; run: pip install 'dasd-lite[{extra}]'")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the message, not the arguments."""
        return remote_error, (type(self).__name__, str(self))


def remote_error(kind: str, message: str) -> DasdError:
    """Rebuild an error that another process reported by the name of its class and its message."""
    classes = {each.__name__: each for each in DasdError.__subclasses__()}
    error_class = classes.get(kind, DasdError)
    return error_class.__new__(error_class, message)  # without __init__: MissingExtraError takes no message
