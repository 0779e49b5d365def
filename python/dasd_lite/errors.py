"""The errors a user can cause or meet; each is one clear line, and the command exits with 2.

A message names the file, key or row, the value found and what would be right. Anything that is
not a `DasdError` is a defect of ours and shows its traceback.
"""


class DasdError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(DasdError, ValueError):
    """A recipe that cannot be run as written; the message holds every fault found, one a line."""


class DataError(DasdError, ValueError):
    """A file, folder or row that is not what a stage needs."""


class EndpointError(DasdError, ConnectionError):
    """A model server that does not answer, or not as the method needs."""


class EngineError(DasdError, RuntimeError):
    """An inference engine in a process of its own that ends again and again; the message has its last words."""


class TrainError(DasdError, RuntimeError):
    """Training that must not go on: no target token, a loss that is not a number, leaking documents."""


class CheckpointError(DasdError, RuntimeError):
    """A checkpoint or folder made under another configuration."""


class MissingExtraError(DasdError, ImportError):
    """A stage that needs an optional part of the package; the message is the pip command."""

    def __init__(self, extra: str, package: str) -> None:
        """Name the extra to install and the package that was not found."""
        super().__init__(f"{package} is not installed; it comes with: pip install 'dasd-lite[{extra}]'")


def remote_error(kind: str, message: str) -> DasdError:
    """Return the error that another process named by its kind."""
    kinds = {
        kind.__name__: kind
        for kind in (ConfigError, DataError, EndpointError, EngineError, TrainError, CheckpointError)
    }
    return kinds.get(kind, ConfigError)(message)
