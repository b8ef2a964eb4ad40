"""How a study is called: what ends it is one sentence on standard error."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from miga_engine.cli.terminal import say
from miga_engine.errors import ConfigError, MigaError


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see: {self.prog} --help)")


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None
) -> int:
    """The exit code: 0, or 2 where a MigaError ended it."""
    try:
        run(parser.parse_args(arguments))
    except MigaError as error:
        say(f"{parser.prog}: {error}")
        return 2
    return 0
