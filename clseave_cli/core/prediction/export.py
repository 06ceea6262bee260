"""`export`: writes the models as ONNX graphs that run without torch, and compares them with torch.

Legend: B images or sentences · T tokens · D embedding width · C labels · G cells along a side.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clseave_cli.core.config import ExportConfig
from clseave_cli.core.data.records import require_language
from clseave_cli.core.files import (
    Kind,
    atomic_folder,
    folder_bytes,
    locked_target,
    require_replaceable,
)
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.folder import seal, skip_other_versions
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.prediction import Floats, onnx_model
from clseave_cli.core.prediction.inference import InferenceModel
from clseave_cli.core.prediction.torch_model import TorchModel
from clseave_cli.errors import ExtraMissing, ModelError
from clseave_cli.progress import SILENT, Progress

#: Largest difference from torch's probabilities that is accepted.
TOLERANCE = {"fp32": 1e-3, "int8": 0.1}

_KIND = Kind(
    "an exported model",
    r"config\.json|README\.md",
    "config.json",
    lambda config: config.get("format") == onnx_model.FORMAT,
)
_OPSET = 18
_PROBE_SENTENCES = (
    "A dog runs.",
    "Two people in red shirts are sitting on a bench, and one of them reads a newspaper.",
    "Das Quadrat ist rot.",
    "犬が公園を走っている。",
    "word " * 600,  # longer than any encoder reads
)
_PROBE_SIZES = ((224, 224), (320, 200), (90, 333))


@dataclass(frozen=True)
class ExportResult:
    """The exported folder; `difference` is the largest from torch's probabilities on the probes."""

    folder: Path
    languages: tuple[str, ...]
    num_bytes: int
    difference: float


def export(config: ExportConfig, progress: Progress = SILENT) -> ExportResult:
    """Writes the models under `runs` as one folder of ONNX graphs.

    The folder appears only if its probabilities agree with torch's on a few probes.

    Raises:
        ClseaveError: a model is missing or of an unsupported kind, an extra is not installed, `out`
            holds something else, or the graphs differ from the models by more than `TOLERANCE`.
    """
    needed = ("onnx", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtraMissing(f"export needs {' and '.join(missing)}: pip install -e '.[onnx]'.")
    for lang in config.lang:
        require_language(lang)
    require_replaceable(config.out, _KIND, config)
    precision = "int8" if config.int8 else "fp32"
    with locked_target(config.out), atomic_folder(config.out) as folder:
        previous: dict[str, str] = {}
        with suppress(ModelError):  # missing, damaged, or of another version
            previous = onnx_model.read_manifest(config.out)["languages"]
        model = TorchModel(config.runs, config.lang or None, "cpu", "fp32")
        if not config.lang:
            skip_other_versions(model.sources, progress)
        manifest = _write(model, folder, config.int8, progress)
        exported = onnx_model.OnnxModel(folder, manifest, list(model.sources), lasting=False)
        difference = _difference(model, exported)
        if not difference <= TOLERANCE[precision]:
            raise ModelError(
                f"{config.out}: not written, because a probability differs from torch's by "
                f"{difference:.2g}, more than {TOLERANCE[precision]:g} for {precision}."
                + (" Export without --int8." if config.int8 else "")
            )
        manifest |= {"tolerance": TOLERANCE[precision], "difference": difference}
        seal(folder, onnx_model.FORMAT, manifest)
        require_replaceable(config.out, _KIND, config)
        num_bytes = folder_bytes(folder)
    if dropped := [lang for lang in previous if lang not in model.sources]:
        progress.note(f"{config.out}: replaced an export that also read {', '.join(dropped)}.")
    return ExportResult(config.out, tuple(model.sources), num_bytes, difference)


def _write(model: TorchModel, folder: Path, int8: bool, progress: Progress) -> dict[str, Any]:
    """Writes graphs and tokenizers; returns their part of the manifest."""
    clip_ve = model.clip_ve
    names = {lang: Path(source).name for lang, source in model.sources.items()}
    encoders = {name: model.encoder(lang) for lang, name in names.items()}
    settings: dict[str, dict[str, Any]] = {}
    if (preparation := model.preparation) is None:
        raise ModelError(
            "the image tower's preprocessing cannot be exported: expected resizing or cropping to "
            "one size, scaling by 1/255 and normalising, as CLIP's and SigLIP's do."
        )
    with progress.task("export", total=len(encoders) + 2, unit="graphs") as task:
        pixels = torch.zeros(2, 3, *preparation.crop)
        _write_graph(clip_ve.image, {"pixels": pixels}, folder / "image.onnx", int8)
        task.advance()
        inputs = {
            "hypothesis": torch.zeros(2, clip_ve.image.embedding_dim),
            "premise": torch.zeros(2, clip_ve.image.premise_width),
        }
        outputs = ["output", *([onnx_model.ATTENTION] if clip_ve.image.patch_grid else [])]
        head = folder / "head.onnx"
        _write_graph(_Probabilities(clip_ve), inputs, head, int8=False, outputs=outputs)
        task.advance()
        for name, encoder in encoders.items():
            (folder / name).mkdir()
            ids = torch.full((2, 5), encoder.terminal_id)
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
            inputs = {"input_ids": ids, "attention_mask": mask}
            _write_graph(_Padded(encoder), inputs, folder / name / "encoder.onnx", int8, "tokens")
            tokenizer = encoder.tokenizer.backend_tokenizer
            tokenizer.save(str(folder / name / "tokenizer.json"), pretty=False)
            keys = ("max_tokens", "terminal_id", "pad_id")
            settings[name] = {key: getattr(encoder, key) for key in keys}
            if encoder.filling:
                settings[name]["filling"] = dataclasses.asdict(encoder.filling)
            task.advance()
    fingerprints = {name: encoder.fingerprint for name, encoder in encoders.items()}
    return {
        "source_lang": clip_ve.source_lang,
        "languages": names,
        "encoders": settings,
        "preparation": dataclasses.asdict(preparation),
        "precision": "int8" if int8 else "fp32",
        "sources": fingerprints | {"clip-ve": clip_ve.fingerprint},
        "calibrations": {lang: dataclasses.asdict(model.calibrations[lang]) for lang in names},
    }


class _Padded(nn.Module):
    """A sentence encoder with one padded sentence a row, the usual form of ONNX models."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, D) embeddings of (B, T) ids; the mask is 1 on tokens and 0 on padding."""
        num_rows, width = input_ids.shape
        positions = torch.arange(width).expand(num_rows, width) * attention_mask
        rows = torch.arange(num_rows)
        segments = attention_mask * (rows[:, None] + 1) - 1
        terminals = rows * width + attention_mask.sum(1) - 1
        embedding: Tensor = self.encoder(PackedBatch(input_ids, positions, segments, terminals))
        return embedding


class _Probabilities(nn.Module):
    """The head with softmax, and with its attention if it reads patches."""

    def __init__(self, clip_ve: ClipVE) -> None:
        super().__init__()
        self.head = clip_ve.head

    def forward(self, hypothesis: Tensor, premise: Tensor) -> tuple[Tensor, ...]:
        """(B, C) probabilities, and (B, G, G) attention to the cells."""
        probabilities: Tensor = self.head(hypothesis, premise).softmax(dim=1)
        if not self.head.config.patch_grid:
            return (probabilities,)
        return probabilities, self.head.attention(hypothesis, premise)


def _write_graph(
    module: nn.Module,
    inputs: dict[str, Tensor],
    path: Path,
    int8: bool,
    second: str = "",
    outputs: Sequence[str] = ("output",),
) -> None:
    """Traces a module, and writes an optimised graph for any batch size, with weights in `.data`.

    `inputs` are examples by name; `second` names their second dimension if it varies, too.
    """
    axes = {0: "batch"}
    input_axes = axes | ({1: second} if second else {})
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder, "raw.onnx")
        with warnings.catch_warnings(), torch.no_grad():
            # The tracer warns about shape checks and its deprecation. Its successor (torch 2.13)
            # writes graphs that onnxruntime refuses: two outputs have the same name.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                str(raw),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=dict.fromkeys(inputs, input_axes) | dict.fromkeys(outputs, axes),
                opset_version=_OPSET,
                dynamo=False,
            )
        if int8:
            raw = _quantised(raw)
        _optimise(raw, path)


def _quantised(path: Path) -> Path:
    """Writes a graph with 8-bit weights in matrix products; embeddings keep their precision."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("int8.onnx")
    logging.disable(logging.WARNING)  # the quantiser logs advice on the root logger
    try:
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Signed weights overflow 16-bit sums on processors without VNNI.
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )
    finally:
        logging.disable(logging.NOTSET)
    return target


def _optimise(source: Path, target: Path) -> None:
    """Optimises a graph once, not at every start; its weights go to a file for memory mapping."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    for key, value in {
        "session.optimized_model_external_initializers_file_name": f"{target.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.disable_prepacking": "1",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _difference(reference: TorchModel, exported: InferenceModel) -> float:
    """The largest difference of a probability over all languages and probes."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size)
        for size in _PROBE_SIZES
    ]

    def probe(model: InferenceModel, lang: str) -> Floats:
        premises = model.embed_images(np.stack([model.prepare(each) for each in pictures]))
        hypotheses, _ = model.embed_sentences(lang, _PROBE_SENTENCES)
        return model.probabilities(
            lang,
            np.repeat(hypotheses, len(premises), axis=0),
            np.tile(premises, (len(hypotheses), 1)),
        )

    # NumPy's maximum propagates NaN; Python's does not.
    differences = [probe(reference, each) - probe(exported, each) for each in reference.sources]
    return float(np.abs(differences).max())
