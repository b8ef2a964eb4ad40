"""Who may ask for what: the host a browser names, where its page comes from, the token, and how much is sent.

A page of another site that a browser on this machine shows can send requests here. It says where it comes from
(`Origin`, `Sec-Fetch-Site`), and is refused; where it has made its own name one of this machine (DNS rebinding), that
name (`Host`) is none that the server goes by.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from miga_engine.integrations.server.asked import RequestError
from miga_engine.integrations.server.settings import MOST_JSON_BYTES, ServeOptions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")
"""What is shown to those who have no token."""
PROTOCOL = "miga"
"""Of a WebSocket; beside it a browser, which can send no header, names `miga.bearer.` and the token in base64url."""
BODY_SECONDS = 60.0
"""For a part of a body to come."""

_BEARER = f"{PROTOCOL}.bearer."
_NAMES_ONCE = (b"host", b"origin", b"authorization", b"content-length", b"content-type")


class Guard:
    """An ASGI application before another one, to which nothing comes that may not."""

    def __init__(self, app: App, options: ServeOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        is_socket = scope["type"] == "websocket"
        try:
            headers = _once(scope["headers"])
            self._check_origin(headers, is_socket=is_socket)
            self._check_token(scope, headers)
            most = 0 if is_socket else self._most_bytes(headers)
        except RequestError as error:
            await (_refuse_socket(receive, send) if is_socket else answer(send, error))
            return
        if is_socket:
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, _Body(receive, most), watched)
        except RequestError as error:
            if not has_begun:
                await answer(send, error)

    def _check_origin(self, headers: dict[bytes, str], *, is_socket: bool) -> None:
        host = headers.get(b"host", "")
        if self._options.is_local and not self._is_own(host):
            raise RequestError("the request names another host than this machine: use http://127.0.0.1", 403)
        origin = headers.get(b"origin")
        if origin is not None and re.sub(r"^https?://", "", origin, count=1).lower() != host.lower():
            raise RequestError("the request comes from a page of another site: open the server's own", 403)
        site, mode = headers.get(b"sec-fetch-site", "none"), headers.get(b"sec-fetch-mode", "")
        if site not in ("none", "same-origin") and not (mode == "navigate" and not is_socket):
            raise RequestError("the request comes from a page of another site: open the server's own", 403)

    def _is_own(self, host: str) -> bool:
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
        name = found[1].strip("[]").lower() if found else ""
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name in ("localhost", self._options.host.lower())

    def _check_token(self, scope: Scope, headers: dict[bytes, str]) -> None:
        token = self._options.token
        if token is None or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = _token_of(scope.get("subprotocols", ()))
        if not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError("the token is missing or wrong: send Authorization: Bearer TOKEN", 401)

    def _most_bytes(self, headers: dict[bytes, str]) -> int:
        is_form = headers.get(b"content-type", "").startswith("multipart/form-data")
        most = self._options.max_upload if is_form else min(self._options.max_upload, MOST_JSON_BYTES)
        length = headers.get(b"content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > most:
            raise RequestError(f"the body has {length[:20]} bytes: send at most {most}", 413)
        return most


class _Body:
    """What is received of a body, as long as it is not too much, and does not stand still."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._left, self._has_all = receive, most, most, False

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._has_all:  # what is waited for now is the end of the connection
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError(f"the body has stood still for {BODY_SECONDS:g} seconds: send it again", 408) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise RequestError(f"the body has more than {self._most} bytes: send at most {self._most}", 413)
        self._has_all = not message.get("more_body", False)
        return message


def _once(headers: Any) -> dict[bytes, str]:
    """Headers by name; RequestError where one that decides something is there twice."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in found and name in _NAMES_ONCE:
            raise RequestError(f"the header {name.decode('latin-1')} is there twice: send it once")
        found[name] = value.decode("latin-1")
    return found


def _token_of(protocols: Any) -> str:
    for protocol in protocols:
        if protocol.startswith(_BEARER):
            text = protocol.removeprefix(_BEARER)
            try:
                return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
            except (binascii.Error, ValueError):
                return ""
    return ""


def error_body(error: RequestError) -> bytes:
    """A refusal as OpenAI's interface words it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return json.dumps({"error": {"message": str(error), "type": kind, "code": error.status}}).encode()


async def answer(send: Send, error: RequestError) -> None:
    """Send a refusal, and end the connection: what else comes of the request is not read."""
    body = error_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_socket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})
