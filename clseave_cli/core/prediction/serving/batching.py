"""Requests of many clients, computed together.

While one batch is computed, the next gathers: a lone request never waits for company, and under
load batches fill by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clseave_cli.core.prediction.inference import InferenceModel
from clseave_cli.core.prediction.pixels import Floats
from clseave_cli.processes import usable_cores

#: Image embeddings kept, so that asking again about a photo costs only the sentence.
_KEPT_IMAGES = 1024


class Busy(Exception):
    """More requests wait than may."""


@dataclass(frozen=True)
class Judgement:
    """The model's answer to one request.

    Attributes:
        probabilities: (C,) of the labels.
        truncated: whether the sentence was too long and was cut.
    """

    probabilities: Floats
    truncated: bool


@dataclass(frozen=True, eq=False)
class _Request:
    key: bytes
    picture: Floats  # (D,) its embedding where `embedded`, otherwise (3, height, width) pixels
    embedded: bool
    lang: str
    sentence: str
    answer: asyncio.Future[Judgement]


class Batcher:
    """Decodes and judges what `judge` is given, a batch at a time; `run` must be running.

    Everything but decoding and computing happens in the event loop's thread, so nothing is locked.
    """

    def __init__(self, model: InferenceModel, *, batch_size: int, max_waiting: int) -> None:
        self.model = model
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._num_inside = 0
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._embeddings: OrderedDict[bytes, Floats] = OrderedDict()
        # As many as there are cores: a decoded photo is large, and more would only take memory.
        self._decoding = ThreadPoolExecutor(usable_cores(), "decode")
        self._computing = ThreadPoolExecutor(1, "compute")

    async def judge(
        self, content: bytes, decode: Callable[[bytes], Floats], lang: str, sentence: str
    ) -> Judgement:
        """Judges one image and sentence.

        Args:
            content: the image file.
            decode: makes pixels of it; called in another thread, unless the image is known.
            lang: a language of the model.
            sentence: not empty.

        Raises:
            Busy: too many requests wait already.
            Exception: what `decode` raises.
        """
        if self._num_inside >= self._max_waiting:
            raise Busy
        self._num_inside += 1
        try:
            loop = asyncio.get_running_loop()
            key = hashlib.blake2b(content, digest_size=32).digest()
            known = self._embeddings.get(key)
            if known is None:
                picture = await loop.run_in_executor(self._decoding, decode, content)
            else:
                picture = known
            answer: asyncio.Future[Judgement] = loop.create_future()
            self._queue.put_nowait(
                _Request(key, picture, known is not None, lang, sentence, answer)
            )
            return await answer
        finally:
            self._num_inside -= 1

    async def run(self) -> None:
        """Computes batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [request for request in batch if not request.answer.done()]
            if not batch:
                continue
            try:
                judgements, new = await loop.run_in_executor(
                    self._computing, compute, self.model, batch
                )
            # Whatever went wrong belongs to the requests of this batch; the next may fare better.
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            self._keep(new)
            for request, judgement in zip(batch, judgements, strict=True):
                if not request.answer.done():
                    request.answer.set_result(judgement)

    def close(self) -> None:
        """Ends the threads."""
        self._decoding.shutdown(cancel_futures=True)
        self._computing.shutdown(cancel_futures=True)

    def _keep(self, new: dict[bytes, Floats]) -> None:
        self._embeddings.update(new)
        while len(self._embeddings) > _KEPT_IMAGES:
            self._embeddings.popitem(last=False)


def compute(
    model: InferenceModel, batch: list[_Request]
) -> tuple[list[Judgement], dict[bytes, Floats]]:
    """The answers to a batch, and the embeddings of images met for the first time."""
    pixels = {request.key: request.picture for request in batch if not request.embedded}
    new: dict[bytes, Floats] = {}
    if pixels:
        embedded = model.embed_images(np.stack(list(pixels.values())))
        # Copies, so that what is kept does not keep the whole batch.
        new = {key: vector.copy() for key, vector in zip(pixels, embedded, strict=True)}
    premises = np.stack([r.picture if r.embedded else new[r.key] for r in batch])
    hypotheses = np.empty_like(premises)
    truncated = np.zeros(len(batch), dtype=bool)
    for lang in dict.fromkeys(request.lang for request in batch):
        rows = [row for row, request in enumerate(batch) if request.lang == lang]
        hypotheses[rows], truncated[rows] = model.embed_sentences(
            lang, [batch[row].sentence for row in rows]
        )
    probabilities = model.probabilities(hypotheses, premises)
    judgements = [
        Judgement(row, bool(cut)) for row, cut in zip(probabilities, truncated, strict=True)
    ]
    return judgements, new
