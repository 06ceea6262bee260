"""The HTTP service: routes, limits on requests and connections, and shutdown."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from clseave_cli.core.config import ServeConfig
from clseave_cli.core.data.languages import LanguageIdentifier
from clseave_cli.core.prediction.batching import Batcher, Busy, TooLarge
from clseave_cli.core.prediction.inference import InferenceModel
from clseave_cli.core.prediction.predictor import AUTO, VisualEntailment, sentence_problem
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing
from clseave_cli.labels import Answer, Label
from clseave_cli.version import __version__

#: Time limit for the arrival of a request.
_BODY_SECONDS = 30.0
#: Memory for uploads, in uploads of the largest size.
_MOST_BODIES = 32
_MOST_SENTENCES = 64  # in one request
_SHUTDOWN_SECONDS = 10
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")

# The page is self-contained; the browser may load nothing else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Judged(BaseModel):
    """The answer for one image and sentence."""

    hypothesis: str
    lang: str
    label: Answer = Field(description="the most likely one, or unsure: below its threshold")
    probabilities: dict[Label, float] = Field(description="of every label, adding up to 1")
    model: str = Field(description="name of the model that read the sentence")
    truncated: bool = Field(description="whether the sentence was too long and was truncated")
    warning: str | None = Field(description="why the sentence is probably not in that language")
    explanation: str | None = Field(
        None, description="with `explain`: a heat map of the model's attention, as a data: URI"
    )


class Answers(BaseModel):
    """The answers for the sentences, in the same order."""

    results: list[Judged]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


_Image = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF or BMP")]
_Lang = Annotated[str, Form(description="language of the sentence; auto: identified")]
_Explain = Annotated[bool, Form(description="add a heat map of the model's attention")]
#: Status of each exception; the first match counts.
_STATUS: dict[type[Exception], int] = {Busy: 503, TooLarge: 413, DataError: 400, ClseaveError: 500}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "the image is damaged or of an unsupported format, the form cannot be read, or the "
        "host is not allowed",
        408: "the request did not arrive in time",
        413: "the upload or the image is too large",
        422: "a field is missing, or the sentence or the language is not accepted",
        500: "the model failed on this request",
        503: "too many requests are waiting, or the service is stopping; try again shortly",
    }.items()
}


def create_app(model: InferenceModel, config: ServeConfig) -> FastAPI:
    """The service of a loaded model, with the limits of a config.

    Raises:
        ExtraMissing: `config.lang` is `auto`, and lingua is not installed.
    """
    languages = list(model.sources)
    default = AUTO if config.lang == (AUTO,) else languages[0]
    identifier: LanguageIdentifier | None = None
    try:
        identifier = LanguageIdentifier(languages)
    except ExtraMissing:
        if default == AUTO:
            raise
    batcher = Batcher(
        VisualEntailment(model, default, identifier, unsure=True),
        batch_size=config.batch_size,
        max_waiting=config.max_waiting,
        max_pixels=config.max_megapixels * 1e6,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        batcher.close()

    # No /docs: FastAPI's page loads scripts from other sites.
    app = FastAPI(
        title="clseave",
        summary="Does this photo entail that sentence, in any language?",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.batcher, app.state.statuses = batcher, Counter()
    app.add_middleware(BodyLimit, max_bytes=int(config.max_megabytes * 1e6))
    # Against DNS rebinding: another site must not reach this service through its own host name.
    hosts = [*_LOOPBACK, *config.allowed_host]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    for kind in _STATUS:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _bad_request)

    async def answer(
        image: UploadFile, hypotheses: list[str], lang: str, explain: bool
    ) -> list[Judged]:
        if lang not in languages and not (lang == AUTO and identifier):
            raise HTTPException(
                422, f"no model for this language; available: {', '.join(languages)}."
            )
        for hypothesis in hypotheses:
            if problem := sentence_problem(hypothesis):
                raise HTTPException(422, problem)
            if len(hypothesis) > config.max_characters:
                raise HTTPException(
                    422, f"the hypothesis is longer than {config.max_characters} characters."
                )
        batcher.require_room(len(hypotheses))  # before reading the image into memory
        content = await image.read()
        try:
            predictions = await batcher.judge(content, [(lang, each) for each in hypotheses])
        except asyncio.CancelledError:  # the server stops, and its grace period is over
            raise Busy("the service is stopping.") from None
        answers = []
        for prediction in predictions:
            if isinstance(prediction, ClseaveError):
                raise prediction
            named = replace(prediction, model=Path(prediction.model).name)
            answers.append(Judged.model_validate(named, from_attributes=True))
            if explain and prediction.attention is not None:
                answers[-1].explanation = await batcher.explain(content, prediction)
        return answers

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> dict[str, str | bool | list[str]]:
        """Status, version, languages, and whether `auto` can identify them."""
        auto = identifier is not None
        return {"status": "ok", "version": __version__, "languages": languages, "auto": auto}

    @app.get("/ready", responses={503: _RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Answers 200 if another request would be accepted, otherwise 503."""
        batcher.require_room()
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        """Counts in Prometheus's text format."""
        text = "# TYPE clseave_requests_total counter\n"
        for status, count in sorted(app.state.statuses.items()):
            text += f'clseave_requests_total{{status="{status}"}} {count}\n'
        for name, kind, value in (
            ("clseave_sentences_total", "counter", batcher.num_computed),
            ("clseave_compute_seconds_total", "counter", batcher.seconds),
            ("clseave_waiting", "gauge", len(batcher.waiting)),
        ):
            text += f"# TYPE {name} {kind}\n{name} {value}\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.post("/predict", responses=_RESPONSES, response_model_exclude_unset=True)
    async def predict(
        image: _Image,
        hypothesis: Annotated[str, Form()],
        lang: _Lang = default,
        explain: _Explain = False,
    ) -> Judged:
        """Predicts whether an image entails, contradicts or leaves open a sentence."""
        return (await answer(image, [hypothesis], lang, explain))[0]

    @app.post("/judge", responses=_RESPONSES, response_model_exclude_unset=True)
    async def judge(
        image: _Image,
        hypothesis: Annotated[list[str], Form(max_length=_MOST_SENTENCES)],
        lang: _Lang = default,
        explain: _Explain = False,
    ) -> Answers:
        """Predicts the same for several sentences about one image: repeat `hypothesis`."""
        return Answers(results=await answer(image, hypothesis, lang, explain))

    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    """Describes the fields; FastAPI's answer would repeat the input, including the image."""
    assert isinstance(error, RequestValidationError)
    problems = (f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()[:5])
    return JSONResponse({"detail": "; ".join(problems)}, 422)


class BodyLimit:
    """Middleware that refuses a body that is too large (413) or slow (408) or exceeds the memory
    for all (503), and counts the statuses of answers to POST.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._free_bytes = _MOST_BODIES * max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received, finished = 0, False
        content_length = int(dict(scope["headers"]).get(b"content-length", 0))
        deadline = asyncio.get_running_loop().time() + _BODY_SECONDS

        async def limited_receive() -> Message:
            nonlocal received, finished
            if finished:  # the message that the client disconnected may come at any time
                return await receive()
            self._require_size(content_length)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the request did not arrive within {_BODY_SECONDS:g} seconds."
                ) from None
            except asyncio.CancelledError:
                raise HTTPException(503, "the service is stopping.") from None
            size = len(message.get("body", b""))
            received += size
            self._free_bytes -= size
            finished = not message.get("more_body", False)
            self._require_size(received)
            if self._free_bytes < 0:
                raise HTTPException(503, "too many uploads at once.", {"Retry-After": "1"})
            return message

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] == "POST":
                scope["app"].state.statuses[message["status"]] += 1
            await send(message)

        try:
            await self._app(scope, limited_receive, counting_send)
        finally:
            self._free_bytes += received

    def _require_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise HTTPException(
                413,
                f"the upload is larger than {self._max_bytes / 1e6:g} MB; scale the image down.",
            )


class _Connection(H11Protocol):
    """Closes the oldest idle connection when there are too many for the file descriptors."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened = time.monotonic()
        connections = [
            each
            for each in self.connections
            if isinstance(each, _Connection) and not each.transport.is_closing()
        ]
        # The other half of the descriptors is for large uploads, one each.
        if len(connections) > _num_descriptors() // 2:
            # This connection is idle, too: it closes if all others are busy.
            idle = [c for c in connections if c.cycle is None or c.cycle.response_complete]
            min(idle, key=lambda each: each.opened).transport.close()


def _num_descriptors() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(soft, 8192) if soft > 0 else 8192


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses waiting requests with 503, and answers those in the current batch."""
        self.config.app.state.batcher.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(app: FastAPI) -> uvicorn.Server:
    """The server of the service; SIGINT or SIGTERM stops it."""
    return _Server(
        uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            log_level="error",  # no lines about invalid requests
            access_log=False,
            server_header=False,
            # All of these are accepted at once, before `_Connection` can close any.
            backlog=max(1, _num_descriptors() // 16),
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )
