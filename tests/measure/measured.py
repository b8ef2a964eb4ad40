"""A scene of the embedded world to measure, and the command that measures."""

from miga_engine.cli import main
from miga_engine.tiny import world

SCENE = world.Scene("plane", "yellow", "desert", "dusk", seed=4)


def miga(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])
