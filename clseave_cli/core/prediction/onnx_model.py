"""Exported models in onnxruntime, without torch, as an `InferenceModel`.

Legend: B sentences · T tokens · D embedding width.
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
#: Second output of a head that reads patches.
ATTENTION = "attention"

# Most tokens in a batch, with padding, unless a single sentence has more: memory grows with them,
# and one long sentence pads its whole batch.
_MOST_TOKENS = 8192
#: Longest side of the image tower's input that a manifest may set.
_LONGEST_SIDE = 4096
_NAME = re.compile(r"[\w+-][\w.+-]*")


def is_exported(folder: Path) -> bool:
    """Whether `clseave export` wrote a folder, damaged or not."""
    return (folder / "head.onnx").is_file()


def source_language(folder: Path) -> str:
    """CLIP-VE's language, even if its encoder was not exported."""
    config = read_manifest(folder)
    if "source_lang" in config:
        return str(config["source_lang"])
    # Earlier versions named it only if it was exported.
    for lang, encoder in config["languages"].items():
        if encoder == "clip-ve":
            return str(lang)
    raise ModelError(
        f"{folder}: exported by an earlier version that does not name CLIP-VE's language; "
        "give --lang, or export it again."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The valid `config.json`, with names inside the folder; otherwise raises `ModelError`."""
    path = folder / "config.json"
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise ModelError(f"{path}: not a regular file; export it again.")
    config = peek(folder, FORMAT)
    try:
        languages = config["languages"]
        for lang in (*languages, config.get("source_lang", "en")):
            require_language(lang)
        encoders = {name: config["encoders"][name] for name in languages.values()}
        is_valid = bool(encoders) and all(map(_NAME.fullmatch, encoders))
        for settings in encoders.values():
            Filling(**settings.get("filling", {"token_id": 0, "side": "right"}))
            numbers = [settings[key] for key in ("max_tokens", "terminal_id", "pad_id")]
            is_valid &= all(isinstance(each, int) and 0 <= each < 2**31 for each in numbers)
            is_valid &= numbers[0] > 0 and len(settings.keys() - {"filling"}) == len(numbers)
        for calibration in config.get("calibrations", {}).values():
            Calibration(**calibration)
        pixels = Preparation(**config["preparation"])
        sides, (height, width) = (*pixels.resize, *pixels.crop), pixels.crop
        is_valid &= all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in sides)
        # A trial on a small picture reveals any other fault of the numbers.
        is_valid = is_valid and pixels(Image.new("RGB", (2, 2))).shape == (3, height, width)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ClseaveError):
        is_valid = False
    if not is_valid:
        raise ModelError(f"{path}: damaged; export it again.")
    files = [f"{name}/{each}" for name in encoders for each in ("encoder.onnx", "tokenizer.json")]
    for name in ("image.onnx", "head.onnx", *files):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: missing or not a file; export it again.")
    return config


class OnnxModel:
    """An exported folder."""

    def __init__(
        self, folder: Path, config: dict[str, Any], languages: Sequence[str], lasting: bool
    ) -> None:
        """Opens image tower, head and first encoder; `from_folder` verifies the folder first."""
        self._config = config
        self._folder = folder
        self._lasting = lasting
        self._encoder_of = {lang: config["languages"][lang] for lang in languages}
        self.sources = {lang: str(folder / name) for lang, name in self._encoder_of.items()}
        calibrations = config.get("calibrations", {})  # earlier versions exported none
        self.calibrations = {lang: Calibration(**calibrations.get(lang, {})) for lang in languages}
        self.preparation = Preparation(**config["preparation"])
        first = self._encoder_of[languages[0]]
        # In parallel, and while the photo is decoded: opening graphs takes much of the time of a
        # single prediction.
        self._pool = ThreadPoolExecutor()
        self._image: Future[Any] | None = self._pool.submit(self._open_image)
        self._encoders = {first: self._pool.submit(self._open_encoder, first)}
        self._head = self._pool.submit(_session, folder / "head.onnx", lasting)
        if lasting:  # report damage now, not with the first request
            for opened in (self._image, self._encoders[first], self._head):
                opened.result()

    @classmethod
    def from_folder(
        cls, folder: Path, languages: Sequence[str] | None = None, *, lasting: bool = True
    ) -> OnnxModel:
        """Opens an exported folder; encoders after the first are opened when they are needed.

        Args are those of `load_model`.

        Raises:
            ModelError: it is damaged, from another version, or lacks one of the languages.
            ExtraMissing: onnxruntime is not installed.
        """
        manifest = read_manifest(folder)
        with unsealed(folder, FORMAT) if lasting else nullcontext(manifest) as config:
            for lang in languages or ():
                if lang not in config["languages"]:
                    available = ", ".join(config["languages"])
                    raise ModelError(
                        f"{folder}: no model for {lang}; available: {available}. "
                        "`clseave export` includes every language that has a model."
                    )
            return cls(folder, config, list(languages or config["languages"]), lasting)

    def prepare(self, image: Image.Image) -> Floats:
        return self.preparation(image)

    def embed_images(self, pixels: Floats) -> Floats:
        session = (self._image or self._pool.submit(self._open_image)).result()
        if not self._lasting:  # release its weights before the sentence encoder needs memory
            self._image = None
        return _run(session, pixels=pixels)

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        name = self._encoder_of[lang]
        if name not in self._encoders:
            self._encoders[name] = self._pool.submit(self._open_encoder, name)
        return self._encoders[name].result()(sentences)

    def _open_image(self) -> Any:
        return _session(self._folder / "image.onnx", self._lasting)

    def _open_encoder(self, name: str) -> _Encoder:
        return _Encoder(self._folder / name, self._lasting, self._config["encoders"][name])

    def probabilities(self, lang: str, hypotheses: Floats, premises: Floats) -> Floats:
        probabilities = _run(self._head.result(), hypothesis=hypotheses, premise=premises)
        return self.calibrations[lang].apply(probabilities)

    def attention(self, hypotheses: Floats, premises: Floats) -> Floats | None:
        head = self._head.result()
        if ATTENTION not in [output.name for output in head.get_outputs()]:
            return None
        return _run(head, ATTENTION, hypothesis=hypotheses, premise=premises)


class _Encoder:
    """A sentence encoder and its tokenizer."""

    def __init__(self, folder: Path, lasting: bool, settings: dict[str, Any]) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{folder / 'tokenizer.json'}: cannot be loaded ({error}).") from None
        require_usable(self._tokenizer, folder)
        self._session = _session(folder / "encoder.onnx", lasting)
        self._settings = settings
        self._filling = Filling(**settings["filling"]) if "filling" in settings else None

    def __call__(self, sentences: Sequence[str]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        tokens = tokenize(
            self._tokenizer,
            sentences,
            max_tokens=self._settings["max_tokens"],
            terminal_id=self._settings["terminal_id"],
            filling=self._filling,
        )
        lengths = np.diff(tokens.offsets)
        longest_first = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(longest_first):
            end = start + max(1, _MOST_TOKENS // int(lengths[longest_first[start]]))
            batches.append(self._embed(tokens, longest_first[start:end]))
            start = end
        embeddings = np.concatenate(batches)
        return embeddings[np.argsort(longest_first)], tokens.truncated

    def _embed(self, tokens: TokenTable, sentences: npt.NDArray[np.intp]) -> Floats:
        """(B, D) embeddings of tokenised sentences, padded to the longest."""
        lengths = tokens.lengths(sentences)
        within = np.arange(lengths.max())
        mask = within < lengths[:, None]  # (B, T)
        indices = tokens.offsets[sentences, None] + within
        input_ids = np.full(mask.shape, self._settings["pad_id"], dtype=np.int64)
        input_ids[mask] = tokens.ids[indices[mask]]
        return _run(self._session, input_ids=input_ids, attention_mask=mask.astype(np.int64))


def _session(path: Path, lasting: bool) -> Any:
    """Opens a graph that `export` has already optimised."""
    try:
        import onnxruntime
    except ImportError:
        raise ExtraMissing(
            "an exported model needs onnxruntime: pip install -e '.[onnx]'."
        ) from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not lasting:
        # Use the weights of the memory-mapped file without a copy.
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Threads that spin while idle would slow down the other sessions.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # onnxruntime's errors share no base class.
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{path}: cannot be loaded ({reason}); export it again.") from None


def _run(session: Any, name: str = "output", **inputs: npt.NDArray[Any]) -> Floats:
    output: Floats = session.run([name], inputs)[0]
    return output
