"""Full-size training on one GPU: mBERT's `align` and ViT-B/16's `finetune-ve`.

    python tests/benchmarks/bench_gpu.py --bert-vocabulary FILE --clip-vocabulary DIR \\
        --sentences DIR

Architectures are those of mBERT and CLIP ViT-B/16 with random weights, sentences real ones varied
until there are as many as SNLI-VE has, pictures noise of 500 × 375 pixels. Without `--steps` it
runs the thesis's nine epochs of `align` and six of `finetune-ve` on 529,527 pairs; with it so many
steps of each. Last come bare steps of the student, as it is, compiled, and compiled into CUDA
graphs: if either pays there, `align` should have it. `--shape small --device cpu --steps 3` is a
dry run for a machine without GPU.

Written for one H200 and not run on one yet. To be reached there: 20,000 pairs/s and four minutes
in `align`, one minute for the features and five for the six epochs in `finetune-ve`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_full_size import write_bert, write_clip
from bench_training import LABELS, SMALL_BERT, Clock, parallel_pairs, write_pairs
from PIL import Image
from torch import nn
from torch.nn import functional

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.loop import TrainingResult
from clseave_cli.core.training.precision import autocast, resolve_device

#: Dense bf16 peak of an H200 (SXM) in the vendor's data sheet, FLOP/s.
H200_PEAK = 989e12

#: SNLI-VE's size: pairs and photos of the training split.
SNLI_VE_PAIRS, SNLI_VE_PHOTOS = 529_527, 29_783

#: Bare steps of the student: sentences a step, and how many steps come first and do not count.
BATCH_SIZE, WARM_UP = 128, 5


@dataclass(frozen=True)
class Sizes:
    """How much is made and trained on."""

    pairs: int
    photos: int
    dev: int
    bert: dict[str, Any]
    clip: dict[str, int]


SIZES = {
    "full": Sizes(SNLI_VE_PAIRS, SNLI_VE_PHOTOS, 17_858, {}, {}),
    "small": Sizes(
        600,
        6,
        60,
        SMALL_BERT,
        {"num_hidden_layers": 2},
    ),
}


def varied(real: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` sentence pairs, nearly as long as the real ones and nearly all distinct."""
    laps = itertools.count()
    endless = ((pair, lap) for lap in laps for pair in real)
    return [
        (f"{english} {lap}", f"{target} {lap}") if lap else (english, target)
        for (english, target), lap in itertools.islice(endless, count)
    ]


def write_photos(folder: Path, count: int) -> list[str]:
    """JPEG files of Flickr30k's usual size; noise, smoothed so that they are no larger."""
    folder.mkdir(parents=True)

    def write(number: int) -> str:
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=90
        )
        return f"{number}.jpg"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(write, range(count)))


def write_entailment(folder: Path, split: str, hypotheses: list[str], photos: list[str]) -> None:
    """A split with about 18 hypotheses a photo."""
    with (folder / f"snli_ve_{split}.jsonl").open("w", encoding="utf-8") as stream:
        for number, hypothesis in enumerate(hypotheses):
            row = {
                "pairID": f"{split}-{number}",
                "Flickr30K_ID": photos[number * len(photos) // len(hypotheses)],
                "sentence2": hypothesis,
                "gold_label": LABELS[number % 3],
            }
            stream.write(json.dumps(row) + "\n")


def matrix_weights(backbone: nn.Module) -> int:
    """Weights that every token is multiplied with: all matrices but the embedding tables."""
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in backbone.parameters() if p.ndim > 1 and id(p) not in tables)


def report(title: str, training: TrainingResult, encoder: Any, sentences: list[str]) -> None:
    """Prints rate, share of the tensor cores and memory of a run."""
    tokens = len(encoder.tokenize(sentences[:20_000]).ids) / len(sentences[:20_000])
    # Forward and backward: six operations a weight and token (Kaplan et al. 2020, section 2.1).
    rate = training.pairs_per_second * tokens * 6 * matrix_weights(encoder.backbone)
    print(
        f"{title:<12} {training.steps} steps · {training.pairs_per_second:,.0f} pairs/s · "
        f"{tokens:.1f} tokens a sentence · {rate / 1e12:.1f} TFLOP/s, "
        f"{rate / H200_PEAK:.1%} of an H200's bf16 peak · {training.wall_seconds:.0f} s · peak "
        f"{training.peak_memory_bytes / 2**30:.1f} GiB",
        flush=True,
    )


def bare_steps(
    folder: Path, embedding_dim: int, sentences: list[str], device: torch.device, steps: int
) -> None:
    """Prints the rate of forward, backward and optimiser alone, eager and compiled.

    Every batch has the same shape, so that there is one to compile for.
    """
    modes = {"eager": None, "compiled": "default"}
    if device.type == "cuda":
        modes["compiled, CUDA graphs"] = "reduce-overhead"
    for title, mode in modes.items():
        torch.manual_seed(0)
        torch.compiler.reset()
        student = new_student(folder, embedding_dim).to(device).train()
        student.verify_packing()
        tokens = student.tokenize(sentences[: BATCH_SIZE * (WARM_UP + steps)])
        parts = np.array_split(np.arange(len(tokens)), WARM_UP + steps)
        with reduced_vocabulary(student, tokens):
            batches = [student.pack(tokens, part).to(device) for part in parts]
            rows, width = np.max([batch.input_ids.shape for batch in batches], axis=0).tolist()
            batches = [with_shape(batch, rows, width) for batch in batches]
            if mode is not None:
                student.backbone.compile(mode=mode)
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
            first = train_on(student, optimizer, batches[:WARM_UP])
            seconds = train_on(student, optimizer, batches[WARM_UP:])
        print(
            f"bare steps   {title:<22} {sum(map(len, parts[WARM_UP:])) / seconds:,.0f} pairs/s · "
            f"first {WARM_UP} steps {first:.1f} s",
            flush=True,
        )


def train_on(
    student: SentenceEncoder, optimizer: torch.optim.Optimizer, batches: list[PackedBatch]
) -> float:
    """One step on each batch; returns the seconds."""
    with_autocast = autocast("auto", student.device)
    begin = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        with with_autocast():
            embeddings = student(batch).float()
        functional.mse_loss(embeddings, torch.zeros_like(embeddings)).backward()
        optimizer.step()
    if student.device.type == "cuda":
        torch.cuda.synchronize(student.device)
    return time.perf_counter() - begin


def with_shape(batch: PackedBatch, rows: int, width: int) -> PackedBatch:
    """A batch with unused places beside and below, so that it has that many rows and tokens."""
    before, narrow = batch.input_ids.shape

    def larger(part: torch.Tensor, value: int) -> torch.Tensor:
        return functional.pad(part, (0, width - narrow, 0, rows - before), value=value)

    return replace(
        batch,
        input_ids=larger(batch.input_ids, 0),
        positions=larger(batch.positions, 0),
        segments=larger(batch.segments, -1),
        terminals=batch.terminals // narrow * width + batch.terminals % narrow,
        groups=(),
    )


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Prints how long a block took."""
    begin = time.perf_counter()
    yield
    print(f"{title:<12} {time.perf_counter() - begin:.1f} s", flush=True)


def main() -> None:
    """Makes models and data in a folder of its own, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bert-vocabulary", "clip-vocabulary", "sentences"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--split", default="sick")
    parser.add_argument("--lang", default="nl")
    parser.add_argument("--shape", choices=list(SIZES), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--align-epochs", type=int, default=9)
    parser.add_argument("--finetune-epochs", type=int, default=6)
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__} · transformers {transformers.__version__} · {where}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLSEAVE_CACHE"] = str(Path(folder) / "cache")
        run(arguments, Path(folder), SIZES[arguments.shape])


def run(arguments: argparse.Namespace, out: Path, sizes: Sizes) -> None:
    """Both stages, one after the other: the second one's teacher is the first one's model."""
    data, runs = out / "data", out / "runs"
    with timed("making data"):
        pairs = varied(parallel_pairs(arguments), sizes.pairs + sizes.dev)
        training, dev = pairs[sizes.dev :], pairs[: sizes.dev]
        photos = write_photos(data / "images", sizes.photos + max(2, sizes.photos // 30))
        write_clip(out / "clip", arguments.clip_vocabulary, **sizes.clip)
        write_bert(out / "bert", arguments.bert_vocabulary, **sizes.bert)
        for split, own, seen in (
            ("train", training, photos[: sizes.photos]),
            ("dev", dev, photos[sizes.photos :]),
        ):
            write_pairs(data, split, arguments.lang, own)
            write_entailment(data, split, [english for english, _ in own], seen)
    shared = {
        "data": str(data),
        "runs": runs,
        "device": arguments.device,
        "precision": arguments.precision,
        "max_steps": arguments.steps,
    }
    clock = Clock()
    finetuned = finetune(
        FinetuneConfig(
            **shared, clip=str(out / "clip"), epochs=arguments.finetune_epochs, patience=0
        ),
        clock,
    )
    features = clock.seconds["train: image features"]
    print(f"features     {sizes.photos} photos · {features:.1f} s · "
          f"{sizes.photos / features:,.0f} photos/s", flush=True)  # fmt: skip
    assert finetuned.training is not None
    teacher = backbones.load_clip_text(runs / "clip-ve" / "text")
    report("finetune-ve", finetuned.training, teacher, [english for english, _ in training])
    clock = Clock()
    aligned = align(
        AlignConfig(
            **shared,
            lang=(arguments.lang,),
            student=str(out / "bert"),
            epochs=arguments.align_epochs,
            select="mse",
        ),
        clock,
    )
    print(f"teacher      {clock.seconds['teacher embeddings']:.1f} s", flush=True)
    assert aligned.training is not None
    student = new_student(out / "bert", teacher.embedding_dim)
    targets = [target for _, target in training]
    report("align", aligned.training, student, targets)
    device = resolve_device(arguments.device)
    bare_steps(out / "bert", teacher.embedding_dim, targets, device, arguments.steps or 50)


if __name__ == "__main__":
    main()
