"""Requests of many clients, computed together.

While one batch is computed, the next gathers: a lone request never waits for company, and under
load batches fill by themselves.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from clseave_cli.core.data.heat_map import png_uri
from clseave_cli.core.data.images import FORMATS
from clseave_cli.core.prediction.predictor import Prediction, VisualEntailment
from clseave_cli.errors import ClseaveError, DataError, ModelError

_LOG = logging.getLogger(__name__)


class Busy(Exception):
    """More requests wait than may, or the service is stopping."""


class TooLarge(DataError):
    """An image has more pixels than allowed."""


@dataclass(frozen=True, eq=False)
class _Question:
    image: bytes
    num_pixels: int
    lang: str
    sentence: str
    answer: asyncio.Future[Prediction | ClseaveError]


class Batcher:
    """Judges what `judge` is given, a batch at a time; `run` must be running.

    Everything but computing happens in the event loop's thread, so nothing is locked.

    Args:
        model: what judges.
        batch_size: most questions computed at once.
        max_waiting: most questions inside; more are turned away.
        max_pixels: of one image, and of all images of a batch: those that are decoded at one time.

    Attributes:
        waiting: the questions that are not being computed yet.
        num_judged: how many were computed, in so many `seconds`.
    """

    def __init__(
        self, model: VisualEntailment, *, batch_size: int, max_waiting: int, max_pixels: float
    ) -> None:
        self.waiting: deque[_Question] = deque()
        self.num_judged, self.seconds = 0, 0.0
        self._model = model
        self._stopping = False
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._max_pixels = max_pixels
        self._num_inside = 0
        self._arrived = asyncio.Event()
        self._computing = ThreadPoolExecutor(1, "compute")

    def require_room(self, num_questions: int = 1) -> None:
        """Refuses what would have to wait too long.

        Raises:
            Busy: too many questions wait already, or the service is stopping.
        """
        if self._stopping:
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
            ModelError: the model raised an exception, even on this request alone.
        """
        self.require_room(len(questions))
        self._num_inside += len(questions)
        try:
            num_pixels = await asyncio.to_thread(count_pixels, content, self._max_pixels)
            self.require_room(0)
            loop = asyncio.get_running_loop()
            answers: list[asyncio.Future[Prediction | ClseaveError]] = []
            for lang, sentence in questions:
                answers.append(loop.create_future())
                self.waiting.append(_Question(content, num_pixels, lang, sentence, answers[-1]))
                num_pixels = 0  # the same picture is not decoded again
            self._arrived.set()
            return await asyncio.gather(*answers)
        finally:
            self._num_inside -= len(questions)

    async def run(self) -> None:
        """Computes batches until cancelled."""
        while True:
            await self._arrived.wait()
            batch: list[_Question] = []
            num_pixels = 0
            while self.waiting and len(batch) < self._batch_size:
                num_pixels += self.waiting[0].num_pixels
                # A file of a few bytes may unpack to a gigabyte.
                if batch and num_pixels > self._max_pixels:
                    break
                batch.append(self.waiting.popleft())
            if not self.waiting:
                self._arrived.clear()
            if batch := [each for each in batch if not each.answer.done()]:
                start = time.perf_counter()
                await self._answer(batch)
                self.num_judged += len(batch)
                self.seconds += time.perf_counter() - start

    async def _answer(self, batch: list[_Question]) -> None:
        """Computes a batch; if that fails, each question alone, so that one spoils no other."""
        loop, judge = asyncio.get_running_loop(), self._model.predict
        pairs = [(each.image, each.sentence) for each in batch]
        languages = [each.lang for each in batch]
        try:
            predictions = await loop.run_in_executor(self._computing, judge, pairs, languages)
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
                batch[0].answer.set_exception(ModelError("the model failed on this request."))

    async def explain(self, content: bytes, prediction: Prediction) -> str:
        """The picture that `VisualEntailment.explain` draws, as a data: URI."""

        def draw() -> str:
            return png_uri(self._model.explain(content, prediction))

        # In the thread that computes, so that one photo is unpacked at a time.
        return await asyncio.get_running_loop().run_in_executor(self._computing, draw)

    def stop(self) -> None:
        """Turns away what waits and what comes; the batch in the making is answered."""
        self._stopping = True
        for question in self.waiting:
            if not question.answer.done():
                question.answer.set_exception(Busy("the service is stopping."))

    def close(self) -> None:
        """Ends the thread."""
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
