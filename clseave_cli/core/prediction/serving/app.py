"""The service's routes: the page, the judgement, health and OpenAPI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, File, Form, HTTPException, Response, UploadFile
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from clseave_cli.core.config import ServeConfig
from clseave_cli.core.prediction.inference import InferenceModel
from clseave_cli.core.prediction.pixels import Floats
from clseave_cli.core.prediction.serving.batching import Batcher, Busy
from clseave_cli.core.prediction.serving.limits import BodyLimit, open_photo
from clseave_cli.labels import LABELS, Label
from clseave_cli.version import __version__

#: Longest time a request may take to arrive.
_BODY_SECONDS = 30.0

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
    label: Label
    probabilities: dict[Label, float] = Field(description="of every label, adding up to 1")
    model: str = Field(description="name of the model that read the sentence")
    truncated: bool = Field(description="whether the sentence was too long and was cut")


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Health(BaseModel):
    """That the service answers, and in which languages."""

    status: str
    version: str
    languages: list[str]


_REFUSALS = {
    400: "the image is damaged or of no known format, or the form cannot be read",
    408: "the request did not arrive in time",
    413: "the upload or the image is too large",
    503: "too many requests wait; try again shortly",
}


def create_app(model: InferenceModel, config: ServeConfig) -> FastAPI:
    """The service around loaded models.

    Args:
        model: what judges.
        config: the limits.
    """
    batcher = Batcher(model, batch_size=config.batch_size, max_waiting=config.max_waiting)
    max_pixels = config.max_megapixels * 1e6
    languages = list(model.sources)

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
    app.add_middleware(
        BodyLimit,
        max_bytes=int(config.max_megabytes * 1e6),
        timeout_seconds=_BODY_SECONDS,
    )

    def decode(content: bytes) -> Floats:
        return model.prepare(open_photo(content, max_pixels))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Health:
        """Says that the service answers, and in which languages."""
        return Health(status="ok", version=__version__, languages=languages)

    @app.post(
        "/predict",
        responses={
            code: {"model": Problem, "description": meaning} for code, meaning in _REFUSALS.items()
        },
    )
    async def predict(
        response: Response,
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF or BMP")],
        hypothesis: Annotated[str, Form(description="the sentence")],
        lang: Annotated[str, Form(description="its language")] = languages[0],
    ) -> Judged:
        """Says whether an image entails, contradicts or leaves open a sentence."""
        _check(hypothesis, lang, languages, config.max_characters)
        try:
            judgement = await batcher.judge(await image.read(), decode, lang, hypothesis)
        except Busy:
            raise HTTPException(
                503, "too many requests wait; try again shortly.", {"Retry-After": "1"}
            ) from None
        response.headers["Cache-Control"] = "no-store"
        numbers = [float(value) for value in judgement.probabilities]
        return Judged(
            hypothesis=hypothesis,
            lang=lang,
            label=LABELS[int(judgement.probabilities.argmax())],
            probabilities=dict(zip(LABELS, numbers, strict=True)),
            model=model.sources[lang].rpartition("/")[2],
            truncated=judgement.truncated,
        )

    return app


def _check(hypothesis: str, lang: str, languages: list[str], max_characters: int) -> None:
    if lang not in languages:
        raise HTTPException(422, f"no model for this language; there are: {', '.join(languages)}.")
    if not hypothesis.strip():
        raise HTTPException(422, "the sentence is empty.")
    if len(hypothesis) > max_characters:
        raise HTTPException(422, f"the sentence is longer than {max_characters} characters.")
    try:
        hypothesis.encode()
    except UnicodeEncodeError:
        raise HTTPException(422, "the sentence is not valid Unicode.") from None


def _page() -> str:
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
