"""What `miga serve` is asked for beside the model, as a record of options."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from miga_engine.config import MAX_FRAME
from miga_engine.errors import ConfigError
from miga_engine.fields import Checked, option

MOST_JSON_BYTES = 2**20
"""Of a body that holds no picture."""

_MOST = 10**6


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Checked):
    """Where a server listens, where its jobs lie, and how much it takes on."""

    host: str = option("127.0.0.1", "address to listen at", group="server", metavar="ADDRESS")
    port: int = option(8000, "port to listen at, 0 for any that is free", most=65535, group="server")
    folder: str = option("miga-jobs", "where jobs lie; they are gone on with when a server comes back to it",
                         group="server", metavar="DIR")  # fmt: skip
    workers: int = option(1, "videos that are made at once, on one engine", least=1, most=64, group="server")
    shared: bool = option(
        False, "let the windows of videos that are made at once go through the network together (docs/sharing.md): "
        "faster where larger batches are, and frames then differ in their last bits", group="server", flags=("-s",),
    )  # fmt: skip
    max_queue: int = option(100, "jobs that may wait", least=0, most=_MOST, group="server")
    max_frames: int | None = option(
        None, "video frames of a job; given, no video is endless", shown="no limit", least=1, most=MAX_FRAME,
        unit="video frames", group="server",
    )  # fmt: skip
    max_pixels: int = option(1280 * 720, "pixels of a frame", least=1, most=2**28, unit="pixels", group="server")
    max_upload: int = option(2**24, "of a request that brings a picture", least=1, most=2**30, unit="bytes",
                             group="server")  # fmt: skip
    save_every: int = option(
        100, "video frames between two writings of a job's session file: what a kill can cost", least=1, most=_MOST,
        unit="video frames", group="server",
    )  # fmt: skip
    token: str | None = option(
        None, "what clients must send as `Authorization: Bearer TOKEN`; the environment's MIGA_TOKEN does not show in "
        "lists of processes", shown="MIGA_TOKEN, or none", group="server", metavar="TOKEN",
    )  # fmt: skip
    no_token: bool = option(False, "let everybody in who can reach the address", group="server", flags=("-N",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ConfigError("the token must be printable ASCII and not empty: choose another one")
        if self.token is not None and self.no_token:
            raise ConfigError("a token and no_token are both given: keep one of the two")
        if self.token is None and not self.no_token and not self.is_local:
            raise ConfigError(
                f"host is {self.host}, which others can reach: give a token (--token, or MIGA_TOKEN in the "
                "environment), or --no-token to let everybody in"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
