"""`miga serve`."""

from __future__ import annotations

import argparse
import os

from miga_engine.cli.settings import load_engine
from miga_engine.cli.terminal import say
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.options import picked

TOKEN = "MIGA_TOKEN"
"""The environment's name for the token."""


def serve(options: argparse.Namespace) -> int:
    """The command: load, listen, and make videos until it is told to stop."""
    settings = vars(options)
    asked = picked(settings, ServeOptions)
    if "token" not in asked and not asked.get("no_token") and os.environ.get(TOKEN):
        asked["token"] = os.environ[TOKEN]
    serving = ServeOptions(**asked)
    from miga_engine.cli.render import stop_signals
    from miga_engine.integrations.server.serve import Server, require_server, stopped_by_signals

    require_server()
    server = Server(load_engine(settings), serving)
    waiting = server.jobs.count()["queued"]
    say(f"miga: serving at {server.address}, jobs in {serving.folder}" + (f", {waiting} to go on with" * bool(waiting)))
    with stopped_by_signals(server, stop_signals()):
        server.run()
    say("miga: stopped; a server that comes back to the folder goes on")
    return 0
