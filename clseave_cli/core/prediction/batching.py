"""Requests of many clients, computed together.

While one batch is computed, the next gathers: a lone request never waits for company, and under
load batches fill by themselves.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from PIL import Image

from clseave_cli.core.data.images import FORMATS
from clseave_cli.core.prediction import Floats
from clseave_cli.core.prediction.predictor import Photo, Prediction, VisualEntailment
from clseave_cli.errors import ClseaveError, DataError
from clseave_cli.processes import usable_cores

#: A picture is small if so many of them have no more pixels than one is allowed.
_SMALL = 8
_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """More requests wait than may, or the service is stopping."""


class Failed(ClseaveError):
    """The model could not compute this request, even alone."""


class TooLarge(DataError):
    """An image has more pixels than allowed."""


@dataclass(frozen=True, eq=False)
class _Question:
    photo: Photo
    picture: Floats | DataError  # (3, height, width) pixels, or its (D,) embedding
    lang: str
    sentence: str
    answer: asyncio.Future[Prediction | ClseaveError]


class Batcher:
    """Decodes and judges what `judge` is given, a batch at a time; `run` must be running.

    Everything but decoding and computing happens in the event loop's thread, so nothing is locked.

    Args:
        model: what judges.
        batch_size: most questions computed at once.
        max_waiting: most questions inside; more are turned away.
        max_pixels: of one image, and of all images that are being decoded at one time.
    """

    def __init__(
        self, model: VisualEntailment, *, batch_size: int, max_waiting: int, max_pixels: float
    ) -> None:
        self.model = model
        self.stopping = False
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._max_pixels = self._free_pixels = max_pixels
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()
        self._num_inside = 0
        self._queue: asyncio.Queue[_Question] = asyncio.Queue()
        self._decoding = ThreadPoolExecutor(usable_cores(), "decode")
        self._computing = ThreadPoolExecutor(1, "compute")

    def require_room(self, num_questions: int = 1) -> None:
        """Refuses what would have to wait too long.

        Raises:
            Busy: too many questions wait already, or the service is stopping.
        """
        if self.stopping:
            raise Busy("the service is stopping.")
        if self._num_inside + num_questions > self._max_waiting:
            raise Busy("too many requests wait; try again shortly.")

    async def judge(
        self, content: bytes, questions: Sequence[tuple[str, str]]
    ) -> list[Prediction | ClseaveError]:
        """Judges one image and a few sentences.

        Args:
            content: the image file.
            questions: language (one of the model's, or `auto`) and sentence.

        Raises:
            Busy: too many questions wait already, or the service is stopping.
            DataError: the image is damaged, or too large (`TooLarge`).
            Failed: the model raised an exception.
        """
        self.require_room(len(questions))
        self._num_inside += len(questions)
        try:
            photo = Photo.of(content)
            picture = self.model.known(photo)
            if picture is None:
                picture = await self._decode(photo, content)
            self.require_room(0)
            loop = asyncio.get_running_loop()
            answers: list[asyncio.Future[Prediction | ClseaveError]] = []
            for lang, sentence in questions:
                answers.append(loop.create_future())
                self._queue.put_nowait(_Question(photo, picture, lang, sentence, answers[-1]))
            return await asyncio.gather(*answers)
        finally:
            self._num_inside -= len(questions)

    async def _decode(self, photo: Photo, content: bytes) -> Floats:
        """(3, height, width) pixels."""
        run = asyncio.get_running_loop().run_in_executor
        num_pixels = await run(self._decoding, count_pixels, content, self._max_pixels)
        async with self._memory_for(num_pixels):
            self.require_room(0)
            return await run(self._decoding, self.model.prepare, photo)

    @asynccontextmanager
    async def _memory_for(self, num_pixels: int) -> AsyncIterator[None]:
        """Waits until so many pixels may be decoded besides the others; first come, first served.

        A file of a few bytes may unpack to a gigabyte, so all that are unpacked at one time share
        one limit. Small pictures pass by: there are no more of them at a time than threads.
        """
        if _SMALL * num_pixels <= self._max_pixels:
            yield
            return
        async with self._turn:
            while num_pixels > self._free_pixels:
                self._freed.clear()
                await self._freed.wait()
            self._free_pixels -= num_pixels
        try:
            yield
        finally:
            self._free_pixels += num_pixels
            self._freed.set()

    async def run(self) -> None:
        """Computes batches until cancelled."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._answer([each for each in batch if not each.answer.done()])

    async def _answer(self, batch: list[_Question]) -> None:
        """Computes a batch; if that fails, each question alone, so that one spoils no other."""
        loop = asyncio.get_running_loop()
        try:
            if batch:
                predictions = await loop.run_in_executor(self._computing, self._compute, batch)
                for question, prediction in zip(batch, predictions, strict=True):
                    if not question.answer.done():
                        question.answer.set_result(prediction)
        # Whatever the model raises must neither end `run` nor leave anyone without an answer.
        except Exception as error:
            if len(batch) > 1:
                for question in batch:
                    await self._answer([question])
                return
            _LOG.error("a request failed: %.300r", error)
            if not batch[0].answer.done():
                batch[0].answer.set_exception(Failed("the model failed on this request."))

    def _compute(self, batch: list[_Question]) -> list[Prediction | ClseaveError]:
        pictures = {each.photo.key: each.picture for each in batch}
        # An earlier batch may have encoded a picture since it was decoded.
        pictures |= {
            each.photo.key: vector
            for each in batch
            if (vector := self.model.known(each.photo)) is not None
        }
        vectors = self.model.embed(pictures)
        return self.model.judge([(each.photo, each.sentence, each.lang) for each in batch], vectors)

    def stop(self) -> None:
        """Turns away what waits and what comes; the batch in the making is answered."""
        self.stopping = True
        while not self._queue.empty():
            waiting = self._queue.get_nowait()
            if not waiting.answer.done():
                waiting.answer.set_exception(Busy("the service is stopping."))

    def close(self) -> None:
        """Ends the threads."""
        self._decoding.shutdown(cancel_futures=True)
        self._computing.shutdown(cancel_futures=True)


def count_pixels(content: bytes, most: float) -> int:
    """The number of pixels that an image's header announces; nothing is unpacked.

    Raises:
        TooLarge: more than `most`.
        DataError: damaged or of another format.
    """
    too_large = TooLarge(f"the image has more than {most / 1e6:g} megapixels; scale it down.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            num_pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large from None
    # Pillow's parsers raise many kinds of errors on damaged headers; each means the same to us.
    except Exception:
        raise DataError(
            f"the image is damaged or not an image; expected one of {', '.join(FORMATS)}."
        ) from None
    if num_pixels > most:
        raise too_large
    return num_pixels
