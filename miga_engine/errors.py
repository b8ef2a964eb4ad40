"""Every error a caller can meet, under one base class.

A message is one sentence that names the thing, the value received and the remedy.
"""


class MigaError(Exception):
    """Base class of all errors that miga_engine raises on purpose."""


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
