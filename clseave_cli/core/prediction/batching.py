"""Computes the requests of many clients in batches.

While one batch is computed, the next one collects: a lone request never waits for others, and
batches grow with the load.
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
    """Too many requests are waiting, or the service is stopping."""


class TooLarge(DataError):
    """An image has too many pixels."""


@dataclass(frozen=True, eq=False)
class _Question:
    image: bytes
    num_pixels: int
    lang: str
    sentence: str
    answer: asyncio.Future[Prediction | ClseaveError]


class Batcher:
    """Answers questions in batches while `run` is running.

    Only the model runs outside the event loop's thread, so no locks are needed.

    More than `max_waiting` unanswered questions are refused. `max_pixels` limits an image, and all
    images of a batch, which are decoded together.

    Attributes:
        waiting: questions that are not in a batch yet.
        num_computed: questions computed so far, in `seconds` of computing.
    """

    def __init__(
        self, model: VisualEntailment, *, batch_size: int, max_waiting: int, max_pixels: float
    ) -> None:
        self.waiting: deque[_Question] = deque()
        self.num_computed, self.seconds = 0, 0.0
        self._model = model
        self._stopping = False
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._max_pixels = max_pixels
        self._num_unanswered = 0
        self._arrived = asyncio.Event()
        self._computing = ThreadPoolExecutor(1, "compute")

    def require_room(self, num_questions: int = 1) -> None:
        """Raises `Busy` if there is no room for that many questions, or the service is stopping."""
        if self._stopping:
            raise Busy("the service is stopping.")
        if self._num_unanswered + num_questions > self._max_waiting:
            raise Busy("too many requests are waiting; try again shortly.")

    async def judge(
        self, content: bytes, questions: Sequence[tuple[str, str]]
    ) -> list[Prediction | ClseaveError]:
        """Answers questions, pairs of language (or `auto`) and sentence, about one image file.

        Raises:
            Busy: too many questions are waiting, or the service is stopping.
            DataError: the image is damaged, or too large (`TooLarge`).
            ModelError: the model failed, even on this question alone.
        """
        self.require_room(len(questions))
        self._num_unanswered += len(questions)
        try:
            num_pixels = await asyncio.to_thread(count_pixels, content, self._max_pixels)
            self.require_room(0)
            loop = asyncio.get_running_loop()
            answers: list[asyncio.Future[Prediction | ClseaveError]] = []
            for lang, sentence in questions:
                answers.append(loop.create_future())
                self.waiting.append(_Question(content, num_pixels, lang, sentence, answers[-1]))
                num_pixels = 0  # the image is decoded once
            self._arrived.set()
            return await asyncio.gather(*answers)
        finally:
            self._num_unanswered -= len(questions)

    async def run(self) -> None:
        """Computes batches until cancelled."""
        while True:
            await self._arrived.wait()
            batch: list[_Question] = []
            num_pixels = 0
            while self.waiting and len(batch) < self._batch_size:
                num_pixels += self.waiting[0].num_pixels
                # A file of a few bytes may decode to a gigabyte.
                if batch and num_pixels > self._max_pixels:
                    break
                batch.append(self.waiting.popleft())
            if not self.waiting:
                self._arrived.clear()
            if batch := [each for each in batch if not each.answer.done()]:
                start = time.perf_counter()
                await self._answer(batch)
                self.num_computed += len(batch)
                self.seconds += time.perf_counter() - start

    async def _answer(self, batch: list[_Question]) -> None:
        """Computes a batch; if that fails, each question alone, so that only faulty ones fail."""
        loop = asyncio.get_running_loop()
        pairs = [(each.image, each.sentence) for each in batch]
        languages = [each.lang for each in batch]
        try:
            predictions = await loop.run_in_executor(
                self._computing, self._model.predict, pairs, languages
            )
            for question, prediction in zip(batch, predictions, strict=True):
                if not question.answer.done():
                    question.answer.set_result(prediction)
        # No exception may end `run` or leave a question unanswered.
        except Exception as error:
            if len(batch) > 1:
                for question in batch:
                    await self._answer([question])
                return
            _LOG.error("a request failed: %.300r", error)
            if not batch[0].answer.done():
                batch[0].answer.set_exception(ModelError("the model failed on this request."))

    async def explain(self, content: bytes, prediction: Prediction) -> str:
        """The heat map of `VisualEntailment.explain` as a data: URI."""

        def draw() -> str:
            return png_uri(self._model.explain(content, prediction))

        # In the model's thread, so that photos are not decoded at the same time.
        return await asyncio.get_running_loop().run_in_executor(self._computing, draw)

    def stop(self) -> None:
        """Refuses waiting and new questions; the current batch is answered."""
        self._stopping = True
        for question in self.waiting:
            if not question.answer.done():
                question.answer.set_exception(Busy("the service is stopping."))

    def close(self) -> None:
        """Ends the model's thread."""
        self._computing.shutdown(cancel_futures=True)


def count_pixels(content: bytes, most: float) -> int:
    """The pixels in an image's header; raises `TooLarge` above `most`, `DataError` if damaged."""
    too_large = TooLarge(f"the image has more than {most / 1e6:g} megapixels; scale it down.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            num_pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large from None
    # Pillow's parsers raise many kinds of errors on damaged headers.
    except Exception:
        raise DataError(
            f"the image is damaged or not an image; expected one of {', '.join(FORMATS)}."
        ) from None
    if num_pixels > most:
        raise too_large
    return num_pixels
