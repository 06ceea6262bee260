"""The models as `clseave export` writes them, computed by onnxruntime, without torch.

Legend: B images or sentences · T tokens · D embedding width · E width of a premise · G cells along
a side of a photo · C labels (3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from clseave_cli.core.data.images import Preparation
from clseave_cli.core.data.records import require_language
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.models.folder import peek, unsealed
from clseave_cli.core.models.tokens import Filling, TokenTable, require_usable, tokenize
from clseave_cli.core.prediction import Floats
from clseave_cli.errors import ClseaveError, ExtraMissing, ModelError

FORMAT = "onnx"
#: The second output of a head that sees patches.
ATTENTION = "attention"

# Tokens computed at once, padding included, unless a single sentence has more. Memory grows with
# them, and one long sentence would pad all that stand beside it to its length.
_MOST_TOKENS = 8192
#: The longest side of an image tower's input that an exported folder may ask for.
_LONGEST_SIDE = 4096
_NAME = re.compile(r"[\w+-][\w.+-]*")


def is_exported(folder: Path) -> bool:
    """Whether a folder is one that `clseave export` wrote, damaged or not."""
    return (folder / "head.onnx").is_file()


def own_language(folder: Path) -> str:
    """The language CLIP-VE itself reads, exported or not.

    Raises:
        ModelError: no exported folder, a damaged one, or one of an earlier version.
    """
    config = read_manifest(folder)
    if "source_lang" in config:
        return str(config["source_lang"])
    # Earlier versions named it only where it was exported.
    for lang, encoder in config["languages"].items():
        if encoder == "clip-ve":
            return str(lang)
    raise ModelError(
        f"{folder}: exported by an earlier version, without CLIP-VE's own language and its name; "
        "give --lang, or export it again."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `config.json` says, once it is certain that it names nothing outside the folder.

    Raises:
        ModelError: damaged, of another version, or not as `clseave export` writes it.
    """
    path = folder / "config.json"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ModelError(f"{path}: not a regular file; export it again.")
    config = peek(folder, FORMAT)
    try:
        named = config["languages"]
        for lang in (*named, config.get("source_lang", "en")):
            require_language(lang)
        encoders = {name: config["encoders"][name] for name in named.values()}
        sound = bool(encoders) and all(map(_NAME.fullmatch, encoders))
        for settings in encoders.values():
            Filling(**settings.get("filling", {"token_id": 0, "side": "right"}))
            numbers = [settings[key] for key in ("max_tokens", "terminal_id", "pad_id")]
            sound &= all(isinstance(each, int) and 0 <= each < 2**31 for each in numbers)
            sound &= numbers[0] > 0 and len(settings.keys() - {"filling"}) == len(numbers)
        for calibration in config.get("calibrations", {}).values():
            Calibration(**calibration)
        pixels = Preparation(**config["preparation"])
        sides, (height, width) = (*pixels.resize, *pixels.crop), pixels.crop
        sound &= all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in sides)
        # Tried on a small picture: whatever else may be wrong with the numbers shows.
        sound = sound and pixels(Image.new("RGB", (2, 2))).shape == (3, height, width)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ClseaveError):
        sound = False
    if not sound:
        raise ModelError(f"{path}: damaged, not as it was written; export it again.")
    files = [f"{name}/{each}" for name in encoders for each in ("encoder.onnx", "tokenizer.json")]
    for name in ("image.onnx", "head.onnx", *files):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing or not a file; export it again.")
    return config


class OnnxModel:
    """An exported folder, as an `InferenceModel`.

    Attributes:
        sources: the folder of the encoder that reads each language.
        calibrations: temperature and thresholds of each language.
        preparation: how a photo is cut for the image tower.
        config: what `config.json` says.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], languages: Sequence[str], lasting: bool
    ) -> None:
        """Opens the graphs, and of the encoders the first; `from_folder` reads the manifest."""
        self.config = config
        self._folder = folder
        self._lasting = lasting
        self._encoder_of = {lang: config["languages"][lang] for lang in languages}
        self.sources = {lang: str(folder / name) for lang, name in self._encoder_of.items()}
        there = config.get("calibrations", {})  # earlier versions exported none
        self.calibrations = {lang: Calibration(**there.get(lang, {})) for lang in languages}
        self.preparation = Preparation(**config["preparation"])
        first = self._encoder_of[languages[0]]
        # Side by side, and while the photo is decoded and encoded: opening them is a large part of
        # the time of a single prediction.
        self._pool = ThreadPoolExecutor()
        self._image: Future[Any] | None = self._pool.submit(self._open_image)
        self._encoders = {first: self._pool.submit(self._open_encoder, first)}
        self._head = self._pool.submit(_session, folder / "head.onnx", lasting)
        if lasting:  # what cannot be opened is told now, not to the first who asks
            for opened in (self._image, self._encoders[first], self._head):
                opened.result()

    @classmethod
    def from_folder(
        cls, folder: Path, languages: Sequence[str] | None = None, *, lasting: bool = True
    ) -> OnnxModel:
        """Opens an exported folder; further sentence encoders when they are needed.

        Args:
            folder: what `clseave export` wrote.
            languages: that will be asked for; None: all there are.
            lasting: as for `load_model`; otherwise only the manifest is compared with its digest.

        Raises:
            ModelError: damaged, of another version, or without one of the languages.
            ExtraMissing: onnxruntime is not installed.
        """
        manifest = read_manifest(folder)
        with unsealed(folder, FORMAT) if lasting else nullcontext(manifest) as config:
            for lang in languages or ():
                if lang not in config["languages"]:
                    known = ", ".join(config["languages"])
                    raise ModelError(
                        f"{folder}: no model for {lang}; languages there: {known}. "
                        f"`clseave export` puts in every language there is a model for."
                    )
            wanted = config["languages"] if languages is None else languages
            return cls(folder, config, list(wanted), lasting)

    def prepare(self, image: Image.Image) -> Floats:
        """(3, height, width) pixels of a decoded RGB image. May be called from any thread."""
        return self.preparation(image)

    def embed_images(self, pixels: Floats) -> Floats:
        """(B, E) premises of (B, 3, height, width) pixels."""
        session = self._image.result() if self._image else self._open_image()
        if not self._lasting:  # its weights would stand in memory beside the sentence encoder's
            self._image = None
        return _run(session, pixels=pixels)

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(B, D) embeddings of B sentences, and (B,) which of them were cut at the limit."""
        name = self._encoder_of[lang]
        if name not in self._encoders:
            self._encoders[name] = self._pool.submit(self._open_encoder, name)
        return self._encoders[name].result()(sentences)

    def _open_image(self) -> Any:
        return _session(self._folder / "image.onnx", self._lasting)

    def _open_encoder(self, name: str) -> _Encoder:
        settings = self.config["encoders"][name]
        return _Encoder(self._folder / name, self._lasting, **settings)

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        """(B, C) calibrated probabilities, from (B, D) sentence embeddings and premises."""
        probabilities = _run(self._head.result(), hypothesis=hypotheses, premise=premises)
        return self.calibrations[lang].apply(probabilities)

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        """(B, G, G) shares of the cells of the photos; None: the head sees no cells."""
        head = self._head.result()
        if ATTENTION not in [output.name for output in head.get_outputs()]:
            return None
        return _run(head, ATTENTION, hypothesis=hypotheses, premise=premises)


class _Encoder:
    """A sentence encoder and its tokenizer."""

    def __init__(
        self,
        folder: Path,
        lasting: bool,
        *,
        max_tokens: int,
        terminal_id: int,
        pad_id: int,
        filling: dict[str, Any] | None = None,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: cannot be loaded ({error}).") from None
        require_usable(self._tokenizer, folder)
        self._session = _session(folder / "encoder.onnx", lasting)
        self._max_tokens, self._terminal_id, self._pad_id = max_tokens, terminal_id, pad_id
        self._filling = None if filling is None else Filling(**filling)

    def __call__(self, sentences: Sequence[str]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        tokens = tokenize(
            self._tokenizer,
            sentences,
            max_tokens=self._max_tokens,
            terminal_id=self._terminal_id,
            filling=self._filling,
        )
        lengths = np.diff(tokens.offsets)
        longest_first = np.argsort(-lengths, kind="stable")
        parts, start = [], 0
        while start < len(longest_first):
            end = start + max(1, _MOST_TOKENS // int(lengths[longest_first[start]]))
            parts.append(self._embed(tokens, longest_first[start:end]))
            start = end
        together = np.concatenate(parts)
        embeddings = np.empty_like(together)
        embeddings[longest_first] = together
        return embeddings, tokens.truncated

    def _embed(self, tokens: TokenTable, sentences: npt.NDArray[np.intp]) -> Floats:
        """(B, D) embeddings of some tokenised sentences, padded to the longest of them."""
        lengths = tokens.lengths(sentences)
        within = np.arange(lengths.max())
        mask = within < lengths[:, None]  # (B, T)
        places = tokens.offsets[sentences, None] + within
        input_ids = np.full(mask.shape, self._pad_id, dtype=np.int64)
        input_ids[mask] = tokens.ids[places[mask]]
        return _run(self._session, input_ids=input_ids, attention_mask=mask.astype(np.int64))


def _session(path: Path, lasting: bool) -> Any:
    """Opens a graph as it is: the export has optimised it already."""
    try:
        import onnxruntime
    except ImportError:
        raise ExtraMissing(
            "an exported model needs onnxruntime: pip install -e '.[onnx]'."
        ) from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not lasting:
        # The weights are used as they lie in the file, which is mapped into memory.
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Threads that wait busily for more work would take the other session's processor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # onnxruntime's errors share no base class of its own.
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{path}: cannot be loaded ({reason}); export it again.") from None


def _run(session: Any, name: str = "output", **inputs: npt.NDArray[Any]) -> Floats:
    output: Floats = session.run([name], inputs)[0]
    return output
