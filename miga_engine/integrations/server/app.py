"""The routes: OpenAI's for videos, as vLLM-Omni and SGLang have them, and what an endless video needs beside them."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine._version import __version__
from miga_engine.config import MigaConfig, StreamOptions
from miga_engine.engine import Engine
from miga_engine.errors import MigaError
from miga_engine.files import open_own
from miga_engine.integrations.server import live
from miga_engine.integrations.server.asked import (
    FILES,
    Asked,
    RequestError,
    asked_of,
    model_name,
    read_form,
    read_json,
)
from miga_engine.integrations.server.content import growing, nothing, whole
from miga_engine.integrations.server.guard import Guard, error_body
from miga_engine.integrations.server.job import SOURCE, Job
from miga_engine.integrations.server.jobs import Draft, Jobs
from miga_engine.integrations.server.metrics import Metrics
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.options import form
from miga_engine.request import Request as VideoRequest
from miga_engine.runtime.session import load_session

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html")
MOST_FIELDS = 100
"""Of a form."""
MOST_LISTED = 100
"""Jobs in one answer."""


class App:
    """The application of one engine and its jobs."""

    def __init__(self, engine: Engine, jobs: Jobs, metrics: Metrics, options: ServeOptions) -> None:
        self._engine, self._jobs, self._metrics, self._options = engine, jobs, metrics, options
        self._model = model_name(engine)

    def asgi(self) -> Guard:
        """The application with its guard before it."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route, WebSocketRoute

        video = "/v1/videos/{id}"
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._measures),
            Route("/v1/models", self._models),
            Route("/v1/options", self._form),
            Route("/v1/videos", self._create, methods=["POST"]),
            Route("/v1/videos", self._list),
            Route(video, self._show),
            Route(video, self._delete, methods=["DELETE"]),
            Route(f"{video}/cancel", self._cancel, methods=["POST"]),
            Route(f"{video}/resume", self._resume, methods=["POST"]),
            Route(f"{video}/replay", self._replay, methods=["POST"]),
            Route(f"{video}/prompt", self._prompt, methods=["POST"]),
            Route(f"{video}/content", self._content),
            Route(f"{video}/session", self._session),
            Route(f"{video}/events", self._events),
            WebSocketRoute(f"{video}/live", self._live),
        ]

        def refuse(request: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                is_path = error.status_code in (404, 405)
                sentence = f"there is no {request.method} of this path: see docs/serve.md" if is_path else error.detail
                error = RequestError(sentence, error.status_code)
            if isinstance(error, OSError) and not isinstance(error, MigaError):
                error = RequestError(f"the server cannot keep a job: {error.strerror or error}", 507)
            if not isinstance(error, RequestError):
                error = RequestError(error, 503 if isinstance(error, OSError) else 400)
            return _json(error_body(error), error.status)

        handlers: dict[Any, Any] = {MigaError: refuse, HTTPException: refuse, OSError: refuse}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, self._options)

    async def _page(self, request: Request) -> Response:
        from starlette.responses import Response

        page, policy = _page_and_policy()
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff",
                   "referrer-policy": "no-referrer", "cache-control": "no-cache"}  # fmt: skip
        return Response(page, media_type="text/html", headers=headers)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "stopping" if self._jobs.is_stopping else "ok", "version": __version__,
                      "needs_token": self._options.token is not None})  # fmt: skip

    async def _measures(self, request: Request) -> Response:
        from starlette.responses import Response

        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        preset, bundle = self._engine.preset, self._engine.bundle
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "miga_engine", "width": preset.width,
                 "height": preset.height, "fps": str(preset.fps), "size_multiple": bundle.size_multiple,
                 "window_frames": bundle.num_video_frames(bundle.window_frames),
                 "frames_per_latent": bundle.num_video_frames(2) - bundle.num_video_frames(1),
                 "max_frames": self._options.max_frames}  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def _form(self, request: Request) -> Response:
        options = [option._asdict() for option in form([VideoRequest, MigaConfig, StreamOptions])]
        return _json({"object": "list", "data": [option for option in options if option["name"] not in FILES]})

    async def _create(self, request: Request) -> Response:
        given, picture = await self._body_of(request)
        job = await asyncio.to_thread(self._add, given, picture)
        return _json(job.view(self._model))

    def _add(self, given: dict[str, Any], picture: bytes | None) -> Job:
        with Draft(self._jobs, picture) as draft:
            asked = asked_of(given, self._engine, self._options, None if draft.image is None else str(draft.image))
            return self._jobs.add(asked, draft)

    async def _body_of(self, request: Request) -> tuple[dict[str, Any], bytes | None]:
        """The fields of a body of either kind, and the picture that was sent along."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return read_json(await request.body()), None
        if kind != "multipart/form-data":
            raise RequestError(
                f"the body is of type {reprlib.repr(kind)}: send application/json or multipart/form-data", 415
            )
        from starlette.datastructures import UploadFile

        async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=2**20) as sent:
            texts = [(name, value) for name, value in sent.multi_items() if isinstance(value, str)]
            picture = None
            for name, value in sent.multi_items():
                if isinstance(value, UploadFile):
                    if name != "input_reference":
                        raise RequestError(f"{reprlib.repr(name)} is a file: send a picture as input_reference alone")
                    picture = await value.read()
            return read_form(texts), picture

    async def _list(self, request: Request) -> Response:
        query = request.query_params
        limit = query.get("limit", "20")
        if not re.fullmatch("[0-9]{1,6}", limit) or not 1 <= int(limit) <= MOST_LISTED:
            raise RequestError(f"limit is {reprlib.repr(limit)}: give a number from 1 to {MOST_LISTED}")
        if (order := query.get("order", "desc")) not in ("asc", "desc"):
            raise RequestError(f"order is {reprlib.repr(order)}: give asc or desc")
        jobs = self._jobs.all()[:: 1 if order == "asc" else -1]
        if (after := query.get("after")) is not None:
            jobs = jobs[jobs.index(self._jobs.find(after)) + 1 :]
        shown = jobs[: int(limit)]
        ids: list[str | None] = [job.id for job in shown] or [None]
        return _json({"object": "list", "data": [job.view(self._model) for job in shown], "first_id": ids[0],
                      "last_id": ids[-1], "has_more": len(jobs) > len(shown)})  # fmt: skip

    def _job(self, request: Any) -> Job:
        return self._jobs.find(request.path_params["id"])

    async def _show(self, request: Request) -> Response:
        return _json(self._job(request).view(self._model))

    async def _delete(self, request: Request) -> Response:
        job = self._job(request)
        await asyncio.to_thread(self._jobs.delete, job)
        return _json({"id": job.id, "object": "video.deleted", "deleted": True})

    async def _cancel(self, request: Request) -> Response:
        job = self._job(request)
        await asyncio.to_thread(self._jobs.cancel, job)
        return _json(job.view(self._model))

    async def _resume(self, request: Request) -> Response:
        job = self._job(request)
        await asyncio.to_thread(self._jobs.go_on, job)
        return _json(job.view(self._model))

    async def _replay(self, request: Request) -> Response:
        job = self._job(request)
        return _json((await asyncio.to_thread(self._add_replay, job)).view(self._model))

    def _add_replay(self, job: Job) -> Job:
        record = job.record
        picture = None if record.image is None else (job.folder / record.image).read_bytes()
        try:
            with Draft(self._jobs, picture, job.session) as draft:
                until = load_session(draft.folder / SOURCE).state.numbers["num_frames_out"]
                if not until:
                    raise RequestError(f"the video is {job.status} and has no frames to replay: ask again later", 409)
                prompt = {int(frame): text for frame, text in record.prompt.items()}
                size = record.width, record.height, record.fps, until, record.seed
                return self._jobs.add(Asked(prompt, record.options, *size), draft, replay_of=job)
        except FileNotFoundError:
            raise RequestError("the video has not begun and cannot be replayed: ask again later", 409) from None

    async def _prompt(self, request: Request) -> Response:
        job = self._job(request)
        given, _ = await self._body_of(request)
        await asyncio.to_thread(job.steer, live.change_of(given))
        return _json({"object": "video.change", "id": job.id, **given}, 202)

    async def _content(self, request: Request) -> Response:
        from starlette.responses import FileResponse, StreamingResponse

        job = self._job(request)
        if job.is_ended:
            if not job.video.is_file():
                raise RequestError(f"the video is {job.status} and has no frames", 404)
            return FileResponse(job.video, media_type="video/mp4", filename=f"{job.id}.mp4",
                                content_disposition_type="inline", headers=_PRIVATE)  # fmt: skip
        video = nothing() if request.method == "HEAD" else growing(job, self._jobs)
        return StreamingResponse(video, media_type="video/mp4", headers=_PRIVATE)

    async def _session(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        job = self._job(request)
        try:
            file = open_own(job.session)
        except FileNotFoundError:
            raise RequestError("the video has no session file yet: ask again when it has begun", 404) from None
        headers = {"content-length": str(os.fstat(file.fileno()).st_size),
                   "content-disposition": f'attachment; filename="{job.id}.session.safetensors"'}  # fmt: skip
        return StreamingResponse(whole(file), media_type="application/octet-stream", headers=headers | _PRIVATE)

    async def _events(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        job = self._job(request)
        events = nothing() if request.method == "HEAD" else live.event_stream(job, self._jobs)
        return StreamingResponse(events, media_type="text/event-stream", headers=_PRIVATE)

    async def _live(self, socket: Any) -> None:
        try:
            job = self._job(socket)
        except RequestError:
            await socket.close(1008)
            return
        await live.serve(socket, job, self._jobs)


_PRIVATE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def _json(content: Any, status: int = 200) -> Response:
    from starlette.responses import JSONResponse, Response

    if isinstance(content, bytes):
        return Response(content, status, media_type="application/json")
    return JSONResponse(content, status)


@functools.cache
def _page_and_policy() -> tuple[str, str]:
    """The page, and the policy under which a browser runs its own script and nothing else."""
    page = PAGE.read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return page, (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "media-src 'self' blob:; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
