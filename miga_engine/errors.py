"""Every error a caller can meet, under one base class.

A message is one sentence that names the thing, the value received and the remedy.
"""


def printable(value: object) -> str:
    """The text in one line, without what a terminal would obey: it may come out of a stranger's file."""
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else ascii(c)[1:-1] for c in str(value))


class MigaError(Exception):
    """Base class of all errors that miga_engine raises on purpose; the message is one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class ConfigError(MigaError, ValueError):
    """An option, prompt or size that cannot be used as given."""


class CheckpointError(MigaError, ValueError):
    """A weights file, folder, configuration or tokenizer that cannot be loaded as given."""


class OutputError(MigaError, OSError):
    """A video or side file that cannot be written."""


class DeviceError(MigaError, RuntimeError):
    """A device, data type or backend that is absent or refused."""


class SessionError(MigaError, ValueError):
    """A session file that cannot be read, or that belongs to another model, configuration or version."""


class NumericsError(MigaError, ArithmeticError):
    """A network gave NaN or infinity."""


class DriftError(MigaError, RuntimeError):
    """A video moved further from its beginning than was allowed."""
