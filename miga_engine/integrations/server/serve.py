"""The server as a process: what it needs is there, it listens, and it stops when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, OutputError
from miga_engine.integrations.server.settings import ServeOptions

if TYPE_CHECKING:
    import uvicorn

STOP_SECONDS = 3
"""For clients to take the rest when the server stops."""
MOST_CONNECTIONS = 1000
MOST_MESSAGE_BYTES = 2**16
"""Of a WebSocket's client."""


def require_server() -> None:
    """ConfigError unless the packages of a server are installed."""
    try:
        for name in ("starlette", "uvicorn", "websockets", "prometheus_client", "python_multipart"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'a server needs more packages ({error}): pip install "miga_engine[server]"') from error


def listening(options: ServeOptions) -> socket.socket:
    """A socket that listens where the options say; OutputError where that cannot be."""
    is_v6 = ":" in options.host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot listen at {options.host} port {options.port}: {reason}; choose another") from error


class Server:
    """Jobs, workers and routes of one engine, at one socket."""

    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        """Take the folder and the address; OutputError where they are taken. Nothing is made before `run`."""
        require_server()
        import uvicorn

        from miga_engine.integrations.server.app import App
        from miga_engine.integrations.server.jobs import Jobs
        from miga_engine.integrations.server.metrics import Metrics

        self.socket = listening(options)
        try:
            self.jobs = Jobs(options.folder, options.max_queue)
        except BaseException:
            self.socket.close()
            raise
        self._engine, self._options, self._metrics = engine, options, Metrics(self.jobs)
        app: Any = App(engine, self.jobs, self._metrics, options).asgi()
        config = uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, lifespan="off", server_header=False,
            proxy_headers=False, ws="websockets-sansio", ws_max_size=MOST_MESSAGE_BYTES,
            timeout_graceful_shutdown=STOP_SECONDS, limit_concurrency=MOST_CONNECTIONS,
        )  # fmt: skip
        self._server = _silent(uvicorn.Server)(config)

    @property
    def address(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until `stop`; every pass at hand is finished then, and every session saved."""
        from miga_engine.integrations.server.workers import Workers

        options = self._options
        engine = self._engine.shared() if options.shared else self._engine
        workers = Workers(engine, self.jobs, self._metrics, count=options.workers, save_every=options.save_every)
        try:
            asyncio.run(self._server.serve([self.socket]))
        finally:
            self.stop()
            workers.join()
            self.jobs.close()
            self.socket.close()

    def stop(self) -> None:
        """From any thread, or a signal's handler: let `run` end."""
        self.jobs.is_stopping = True
        self._server.should_exit = True
        self.jobs.stop()


def _silent(server: type[uvicorn.Server]) -> Callable[[uvicorn.Config], uvicorn.Server]:
    """uvicorn's server without its signal handlers, for they end the process by the signal."""

    class Silent(server):  # type: ignore[misc, valid-type]
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Silent


@contextlib.contextmanager
def stopped_by_signals(server: Server, numbers: list[int]) -> Iterator[None]:
    """The first of the signals stops the server, a second Ctrl-C the process at once."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server.stop()

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
