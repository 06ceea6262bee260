"""What the service refuses before it costs anything: long bodies, slow bodies, huge images."""

from __future__ import annotations

import asyncio
import io

from fastapi import HTTPException
from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clseave_cli.core.data.images import FORMATS, open_image
from clseave_cli.errors import DataError


class BodyLimit:
    """Middleware: a body that is longer than allowed is refused (413), as is a slow one (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isascii() or not announced.isdigit():
            announced = "0"  # counted below
        if int(announced[:20]) > self._max_bytes:
            refusal = self._too_long()
            await JSONResponse({"detail": refusal.detail}, refusal.status_code)(
                scope, receive, send
            )
            return
        received, finished = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_seconds

        async def counted() -> Message:
            nonlocal received, finished
            if finished:  # the server's word that the client is gone may take as long as it likes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the request did not arrive within {self._timeout_seconds:g} seconds."
                ) from None
            received += len(message.get("body", b""))
            finished = not message.get("more_body", False)
            if received > self._max_bytes:
                raise self._too_long()
            return message

        await self._app(scope, counted, send)

    def _too_long(self) -> HTTPException:
        return HTTPException(
            413, f"the upload is larger than {self._max_bytes / 1e6:g} MB; scale the image down."
        )


def open_photo(content: bytes, max_pixels: float) -> Image.Image:
    """Decodes an uploaded image, unless its header announces too many pixels.

    Raises:
        HTTPException: 413 too many pixels, 400 damaged or of another format.
    """
    too_many = HTTPException(
        413, f"the image has more than {max_pixels / 1e6:g} megapixels; scale it down."
    )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            num_pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many from None
    # Pillow's parsers raise many kinds of errors on damaged headers; each means the same to us.
    except Exception:
        expected = ", ".join(FORMATS)
        raise HTTPException(
            400, f"the image is damaged or not an image; expected one of {expected}."
        ) from None
    if num_pixels > max_pixels:
        raise too_many
    try:
        return open_image(content)
    except DataError as error:
        raise HTTPException(400, str(error)) from None
