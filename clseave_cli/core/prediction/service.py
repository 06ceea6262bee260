"""The HTTP service: its routes, what it refuses before it costs anything, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from clseave_cli.core.prediction.predictor import AUTO, VisualEntailment, problem_of
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing
from clseave_cli.labels import Answer, Label
from clseave_cli.version import __version__

#: Longest time a request may take to arrive.
_BODY_SECONDS = 30.0
#: Bodies of the largest size that may be in memory at one time.
_MOST_BODIES = 32
#: Sentences in one request.
_MOST_SENTENCES = 64
_SHUTDOWN_SECONDS = 10
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")

# The page brings all it needs; a browser shall fetch nothing else on its behalf.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Judged(BaseModel):
    """What the model says of one image and sentence."""

    hypothesis: str
    lang: str
    label: Answer = Field(description="the likeliest, or unsure: below the threshold set for it")
    probabilities: dict[Label, float] = Field(description="of every label, adding up to 1")
    model: str = Field(description="name of the model that read the sentence")
    truncated: bool = Field(description="whether the sentence was too long and was cut")
    warning: str | None = Field(description="why the sentence is probably not in that language")
    explanation: str | None = Field(
        None, description="with `explain`: a picture of where the model looked, as a data: URI"
    )


class Answers(BaseModel):
    """What the model says of each sentence, in their order."""

    results: list[Judged]


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


_Image = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF or BMP")]
_Lang = Annotated[str, Form(description="language of the sentence; auto: identified")]
_Explain = Annotated[bool, Form(description="answer with a picture of where the model looked")]
_REFUSALS = {
    400: "the image is damaged or of no known format, the form cannot be read, or the host is not "
    "an allowed one",
    408: "the request did not arrive in time",
    413: "the upload or the image is too large",
    422: "a field is missing, or the sentence or the language cannot be taken",
    500: "the model failed on this request",
    503: "too many requests wait, or the service is stopping; try again shortly",
}
#: Of each exception, the first that fits.
_STATUS: dict[type[Exception], int] = {Busy: 503, TooLarge: 413, DataError: 400, ClseaveError: 500}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": meaning} for code, meaning in _REFUSALS.items()
}


def create_app(model: InferenceModel, config: ServeConfig) -> FastAPI:
    """The service around loaded models.

    Args:
        model: what judges.
        config: the limits.

    Raises:
        ExtraMissing: languages are to be identified, and lingua is not installed.
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
        with contextlib.suppress(asyncio.CancelledError):
            await running
        batcher.close()

    # No /docs: FastAPI's page takes its scripts from elsewhere.
    app = FastAPI(
        title="clseave",
        summary="Does this photo entail that sentence, in any language?",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.batcher, app.state.statuses = batcher, Counter()
    app.add_middleware(
        BodyLimit,
        max_bytes=int(config.max_megabytes * 1e6),
        timeout_seconds=_BODY_SECONDS,
    )
    # A page elsewhere must not reach this service through a name that it lets point here.
    app.add_middleware(
        TrustedHostMiddleware,
        allowed_hosts=[*_LOOPBACK, *config.allowed_host],
        www_redirect=False,
    )
    for kind in _STATUS:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _bad_request)

    async def answer(
        image: UploadFile, hypotheses: list[str], lang: str, explain: bool
    ) -> list[Judged]:
        if lang not in languages and not (lang == AUTO and identifier):
            raise HTTPException(
                422, f"no model for this language; there are: {', '.join(languages)}."
            )
        for hypothesis in hypotheses:
            if problem := problem_of(hypothesis):
                raise HTTPException(422, problem)
            if len(hypothesis) > config.max_characters:
                raise HTTPException(
                    422, f"the hypothesis is longer than {config.max_characters} characters."
                )
        batcher.require_room(len(hypotheses))  # before the image is in memory
        content = await image.read()
        try:
            predictions = await batcher.judge(content, [(lang, each) for each in hypotheses])
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            raise Busy("the service is stopping.") from None
        judged = []
        for prediction in predictions:
            if isinstance(prediction, ClseaveError):
                raise prediction
            named = replace(prediction, model=Path(prediction.model).name)
            judged.append(Judged.model_validate(named, from_attributes=True))
            if explain and prediction.attention is not None:
                judged[-1].explanation = await batcher.explain(content, prediction)
        return judged

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> dict[str, str | bool | list[str]]:
        """Says that the service answers, in which languages, and whether it can identify them."""
        auto = identifier is not None
        return {"status": "ok", "version": __version__, "languages": languages, "auto": auto}

    @app.get("/ready", responses={503: _RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Says whether another request would be taken."""
        batcher.require_room()
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        """Counts for Prometheus, in its text format."""
        text = "# TYPE clseave_requests_total counter\n"
        for status, count in sorted(app.state.statuses.items()):
            text += f'clseave_requests_total{{status="{status}"}} {count}\n'
        for name, kind, value in (
            ("clseave_sentences_total", "counter", batcher.num_judged),
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
        """Says whether an image entails, contradicts or leaves open a sentence."""
        return (await answer(image, [hypothesis], lang, explain))[0]

    @app.post("/judge", responses=_RESPONSES, response_model_exclude_unset=True)
    async def judge(
        image: _Image,
        hypothesis: Annotated[list[str], Form(max_length=_MOST_SENTENCES)],
        lang: _Lang = default,
        explain: _Explain = False,
    ) -> Answers:
        """Says the same of several sentences about one image: repeat the field."""
        return Answers(results=await answer(image, hypothesis, lang, explain))

    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Answers an exception with its message."""
    status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    """What a form lacks, in words; FastAPI's answer would repeat the input, the image included."""
    assert isinstance(error, RequestValidationError)
    problems = (f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()[:5])
    return JSONResponse({"detail": "; ".join(problems)}, 422)


class BodyLimit:
    """Middleware: refuses a body that is too long (413), slow (408) or one too many (503); counts
    the statuses of what POST is answered.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._free_bytes = _MOST_BODIES * max_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received, finished = 0, False
        announced = int(dict(scope["headers"]).get(b"content-length", 0))
        deadline = asyncio.get_running_loop().time() + self._timeout_seconds

        async def counted() -> Message:
            nonlocal received, finished
            if finished:  # the server's word that the client is gone may take as long as it likes
                return await receive()
            self._refuse_if_longer(announced)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the request did not arrive within {self._timeout_seconds:g} seconds."
                ) from None
            except asyncio.CancelledError:
                raise HTTPException(503, "the service is stopping.") from None
            size = len(message.get("body", b""))
            received += size
            self._free_bytes -= size
            finished = not message.get("more_body", False)
            self._refuse_if_longer(received)
            if self._free_bytes < 0:
                raise HTTPException(503, "too many uploads at once.", {"Retry-After": "1"})
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] == "POST":
                scope["app"].state.statuses[message["status"]] += 1
            await send(message)

        try:
            await self._app(scope, counted, noted)
        finally:
            self._free_bytes += received

    def _refuse_if_longer(self, size: int) -> None:
        if size > self._max_bytes:
            raise HTTPException(
                413,
                f"the upload is larger than {self._max_bytes / 1e6:g} MB; scale the image down.",
            )


class _Connection(H11Protocol):
    """Gives way, while it is idle, where there are more connections than descriptors allow."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Closes the connection that has been idle longest, where there are too many."""
        super().connection_made(transport)
        self.opened = time.monotonic()
        there = [
            each
            for each in self.connections
            if isinstance(each, _Connection) and not each.transport.is_closing()
        ]
        # Of the other half of the descriptors, large uploads need one each.
        if len(there) > _num_descriptors() // 2:
            # This one is among them: it goes where all others are busy.
            idle = [each for each in there if each.cycle is None or each.cycle.response_complete]
            min(idle, key=lambda each: each.opened).transport.close()


def _num_descriptors() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(soft, 8192) if soft > 0 else 8192


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers what waits with 503, and what is being computed with its result."""
        self.config.app.state.batcher.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(app: FastAPI) -> uvicorn.Server:
    """What runs the service; SIGINT or SIGTERM stops it."""
    return _Server(
        uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            log_level="error",  # a request that is none deserves no line in a log
            access_log=False,
            server_header=False,
            # All of these are taken at one time, a moment before `_Connection` hears of them.
            backlog=max(1, _num_descriptors() // 16),
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )
