"""Full-size training on one GPU: mBERT's `align` and ViT-B/16's `finetune-ve`.

    python tests/benchmarks/bench_gpu.py --bert-vocabulary FILE --clip-vocabulary DIR \\
        --sentences DIR [--quick]

The architectures are mBERT and CLIP ViT-B/16 with random weights. Real sentences are varied to
SNLI-VE's number, and pictures are noise of 500 × 375 pixels. By default it runs the thesis's nine
epochs of `align` and six of `finetune-ve` on 529,527 pairs, with `--steps` that many steps of each.
`--shape small --device cpu --steps 3` is a dry run without a GPU.

`--quick` takes 40,000 pairs and 1,200 photos, five minutes on one GPU. It prints throughput, the
time of a step on the host and in kernels, the share of the time in which kernels run, captured
steps against plain ones, a kill and its resumption, photos a second against bare decoding, and the
throughput of sentence-transformers if it is installed.

Goals on one H100 or H200: 20,000 pairs/s in `align`, 12,000 in `finetune-ve`, kernels running 85 %
of the time, 3,000 photos/s with 16 cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from bench_training import (
    SMALL_BERT,
    parallel_pairs,
    sentence_transformers,
    write_bert,
    write_clip,
    write_pairs,
)
from PIL import Image
from torch import nn

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.training import loop
from clseave_cli.core.training.device import resolve_precision
from clseave_cli.core.training.loop import TrainingResult
from clseave_cli.errors import TrainingError
from clseave_cli.labels import LABELS
from clseave_cli.processes import usable_cores
from clseave_cli.progress import SILENT

#: Dense bf16 peak of an H200 (SXM) in the vendor's data sheet, FLOP/s.
H200_PEAK = 989e12

#: Pairs in a batch.
FINETUNE_BATCH, ALIGN_BATCH = 64, 128


@dataclass(frozen=True)
class Sizes:
    """Numbers of pairs and photos, and changes to the shapes of the models."""

    pairs: int
    photos: int
    dev: int
    bert: dict[str, Any]
    clip: dict[str, int]


SIZES = {
    "full": Sizes(529_527, 29_783, 17_858, {}, {}),  # SNLI-VE's
    "quick": Sizes(40_000, 1_200, 1_000, {}, {}),
    "small": Sizes(600, 6, 60, SMALL_BERT, {"num_hidden_layers": 2}),
}

#: Steps of `--quick`: in a timed window, timed in all, and profiled after that.
WINDOW, TIMED, PROFILED = 20, 240, 40
#: Steps that are compared with plain ones.
COMPARED = 200
#: Of the run that is killed: all its steps, the last saved one, and the last one before the kill.
RESUMED, SAVED_AT, KILLED_AT = 60, 30, 45
#: Divides these numbers of steps.
DIVISOR = {"small": 5}


def varied(real: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` sentence pairs, nearly as long as the real ones and nearly all distinct."""
    endless = ((pair, lap) for lap in itertools.count() for pair in real)
    return [
        (f"{english} {lap}", f"{target} {lap}") if lap else (english, target)
        for (english, target), lap in itertools.islice(endless, count)
    ]


def write_photos(folder: Path, count: int) -> list[str]:
    """Writes JPEG files of Flickr30k's usual size: noise, smoothed so that they are no larger."""
    folder.mkdir(parents=True)

    def write(number: int) -> str:
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        photo = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        photo.save(folder / f"{number}.jpg", quality=90)
        return f"{number}.jpg"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(write, range(count)))


def write_entailment(folder: Path, split: str, hypotheses: list[str], photos: list[str]) -> None:
    """Writes a split with about 18 hypotheses a photo."""
    with (folder / f"snli_ve_{split}.jsonl").open("w", encoding="utf-8") as stream:
        for number, hypothesis in enumerate(hypotheses):
            row = {
                "pairID": f"{split}-{number}",
                "Flickr30K_ID": photos[number * len(photos) // len(hypotheses)],
                "sentence2": hypothesis,
                "gold_label": LABELS[number % 3],
            }
            stream.write(json.dumps(row) + "\n")


class Clock:
    """A `Progress` that records the time of each task."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, summary: bool = True
    ) -> Iterator[Any]:
        begin = time.perf_counter()
        with SILENT.task(description) as task:
            yield task
        self.seconds[description] = time.perf_counter() - begin

    def note(self, message: str) -> None:
        return


def matrix_weights(backbone: nn.Module) -> int:
    """The number of weights by which every token is multiplied, embedding tables excluded."""
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in backbone.parameters() if p.ndim > 1 and id(p) not in tables)


def report(title: str, training: TrainingResult, encoder: Any, sentences: list[str]) -> None:
    """Prints throughput, share of the tensor cores' peak and memory of a run."""
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


class Killed(BaseException):
    """Caught nowhere in the package."""


def profile(
    title: str, batch: int, run: Callable[[int], object], on_gpu: bool, divisor: int
) -> None:
    """Prints the time of a step on the host and in kernels, in the median window.

    Other windows include captures of new shapes of batches.
    """
    window, timed_steps, profiled = WINDOW // divisor, TIMED // divisor, PROFILED // divisor
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities = [torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities)
    plain = loop._Loop._step
    count, host, seconds = itertools.count(1), [0.0], [time.perf_counter()]

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def step(self: Any, rows: Any, parts: Any) -> float:
        number = next(count)
        if number == timed_steps + 1:
            profiler.start()
        started = time.perf_counter()
        result = plain(self, rows, parts)
        host[-1] += time.perf_counter() - started
        if number <= timed_steps and number % window == 0:
            wait()
            seconds.append(time.perf_counter())
            host.append(0.0)
        if number == timed_steps + profiled:
            wait()
            profiler.stop()
        return result

    with mock.patch.object(loop._Loop, "_step", step):
        run(timed_steps + profiled)
    whole = float(np.median(np.diff(seconds))) / window
    line = (
        f"{title:<12} {1e3 * whole:.2f} ms a step, {batch / whole:,.0f} pairs/s in the median "
        f"window of {window} steps · host {1e3 * float(np.median(host[:-1])) / window:.2f} ms"
    )
    if on_gpu:
        kernels = sum(e.self_device_time_total for e in profiler.key_averages()) / 1e6 / profiled
        line += f" · kernels {1e3 * kernels:.2f} ms, {kernels / whole:.0%} of the time"
    print(line, flush=True)


def compare(run: Callable[[str, int], Path], divisor: int) -> None:
    """Prints how much captured steps differ from plain ones and from those of autocast alone."""

    def metrics(name: str) -> tuple[Any, float]:
        lines = (run(name, COMPARED // divisor) / "training" / "metrics.jsonl").read_text()
        entries = [json.loads(line) for line in lines.splitlines()]
        dev = [entry["dev"]["mse"] for entry in entries if "dev" in entry]  # a collapse has none
        return np.array([entry["loss"] for entry in entries]), dev[-1] if dev else np.nan

    captured, dev = metrics("captured")
    with mock.patch.object(loop._Loop, "_recorder", lambda run: None):
        plain, plain_dev = metrics("plain")
    with mock.patch.object(SentenceEncoder, "trains_in_bfloat16", False):
        _, autocast_dev = metrics("autocast")
    worst = np.abs(captured / plain - 1).max()
    print(f"captured     losses of {COMPARED // divisor} steps against plain ones: at most "
          f"{worst:.2e} apart; dev MSE {dev:.5f}, plain {plain_dev:.5f}, by autocast alone "
          f"{autocast_dev:.5f}", flush=True)  # fmt: skip


def kill_and_resume(run: Callable[..., Path], divisor: int) -> None:
    """Prints whether a killed and resumed run ends with the weights of an undisturbed one."""
    plain = loop._Loop._step
    steps, saved_at, killed_at = (number // divisor for number in (RESUMED, SAVED_AT, KILLED_AT))

    def step(self: Any, rows: Any, parts: Any) -> float:
        if self.state.step == killed_at:
            raise Killed
        if self.state.step == saved_at:
            self.saved_at = -np.inf  # a checkpoint is due
        return plain(self, rows, parts)

    whole = run("whole", steps)
    with mock.patch.object(loop._Loop, "_step", step), suppress(Killed):
        run("killed", steps)
    resumed = run("killed", steps, resume=True)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    same = all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    print(f"resumed      killed after {killed_at} of {steps} steps, resumed from {saved_at}: "
          f"{'the same bits' if same else 'OTHER WEIGHTS'}", flush=True)  # fmt: skip


def decode(path: Path) -> None:
    with Image.open(path) as photo:
        photo.convert("RGB").resize((298, 224), Image.Resampling.BICUBIC)


def decoded_per_second(photos: list[Path]) -> float:
    """Photos a second that all cores decode and resize, in processes that share no lock."""
    with ProcessPoolExecutor(usable_cores(), get_context("fork")) as pool:
        list(pool.map(decode, photos[:64], chunksize=4))
        begin = time.perf_counter()
        list(pool.map(decode, photos, chunksize=16))
        return len(photos) / (time.perf_counter() - begin)


def peer(
    arguments: argparse.Namespace, out: Path, pairs: list[tuple[str, str]], ours: float
) -> None:
    """Prints the throughput of sentence-transformers with the same student and batch."""
    if importlib.util.find_spec("sentence_transformers") is None:
        print("peer         sentence-transformers is not installed: not measured", flush=True)
        return
    options = argparse.Namespace(epochs=1, learning_rate=AlignConfig.learning_rate)
    vectors = torch.zeros(len(pairs), 512)
    precision = resolve_precision(arguments.precision, torch.device(arguments.device))
    rate, _ = sentence_transformers(
        precision, options, out, pairs, vectors, pairs[:64], vectors[:64], arguments.device
    )
    print(f"peer         sentence-transformers, {precision}: {rate:,.0f} pairs/s; align is "
          f"{ours / rate:.1f} times as fast", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bert-vocabulary", "clip-vocabulary", "sentences"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--split", default="sick")
    parser.add_argument("--lang", default="nl")
    parser.add_argument("--shape", choices=list(SIZES))
    parser.add_argument("--quick", action="store_true")
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
        shape = arguments.shape or ("quick" if arguments.quick else "full")
        (quick if arguments.quick else run)(arguments, Path(folder), SIZES[shape])


def make_data(
    arguments: argparse.Namespace, out: Path, sizes: Sizes
) -> tuple[list[tuple[str, str]], list[Path]]:
    """Writes models and data; returns the training pairs and the photos."""
    begin, data = time.perf_counter(), out / "data"
    pairs = varied(parallel_pairs(arguments), sizes.pairs + sizes.dev)
    training, dev = pairs[sizes.dev :], pairs[: sizes.dev]
    photos = write_photos(data / "images", sizes.photos + max(2, sizes.photos // 30))
    write_clip(out / "clip", arguments.clip_vocabulary, **sizes.clip)
    write_bert(out / "bert", arguments.bert_vocabulary, **sizes.bert)
    first, others = photos[: sizes.photos], photos[sizes.photos :]
    for split, pairs, names in (("train", training, first), ("dev", dev, others)):
        write_pairs(data, split, arguments.lang, pairs)
        write_entailment(data, split, [english for english, _ in pairs], names)
    print(f"making data  {time.perf_counter() - begin:.1f} s", flush=True)
    return training, [data / "images" / name for name in photos]


def quick(arguments: argparse.Namespace, out: Path, sizes: Sizes) -> None:
    """Measures the loop on one GPU in five minutes."""
    divisor = DIVISOR.get(arguments.shape or "", 1)
    on_gpu = arguments.device != "cpu"
    training, photos = make_data(arguments, out, sizes)
    shared = {"data": str(out / "data"), "runs": out, "device": arguments.device,
              "precision": arguments.precision}  # fmt: skip
    clock = Clock()

    def epochs(steps: int | None, batch: int) -> int:
        return 1 if steps is None else math.ceil(steps * batch / sizes.pairs)

    def finetuned(name: str, steps: int | None = None) -> TrainingResult:
        config = FinetuneConfig(
            **shared, head="pooled", clip=str(out / "clip"), out=out / name, patience=None,
            max_steps=steps, epochs=epochs(steps, FINETUNE_BATCH),
        )  # fmt: skip
        result = finetune(config, clock).training
        assert result is not None
        return result

    def aligned(name: str, steps: int | None = None, resume: bool = False) -> Path:
        config = AlignConfig(
            **shared, lang=(arguments.lang,), student=str(out / "bert"), teacher=out / "clip-ve",
            out=out / name, select="mse", max_steps=steps, resume=resume,
            epochs=epochs(steps, ALIGN_BATCH),
        )  # fmt: skip
        # Random weights may collapse, which is refused after the last step.
        with suppress(TrainingError):
            align(config, clock)
            return out / name
        return out / f"{name}.partial"

    first = finetuned("clip-ve")
    features = clock.seconds["train: image features"]
    bare = decoded_per_second(photos[: sizes.photos])
    print(f"photos       {sizes.photos / features:,.0f} photos/s · decoding and resizing alone "
          f"{bare:,.0f} photos/s", flush=True)  # fmt: skip
    tower = backbones.load_clip_text(out / "clip-ve" / "text")
    report("finetune-ve", first, tower, [english for english, _ in training])
    profile("finetune-ve", FINETUNE_BATCH, partial(finetuned, "profiled-ve"), on_gpu, divisor)

    folder = aligned("student")
    summary = json.loads((folder / "training" / "summary.json").read_text())
    student = new_student(out / "bert", tower.embedding_dim)
    report("align", TrainingResult(**summary), student, [target for _, target in training])
    profile("align", ALIGN_BATCH, partial(aligned, "profiled"), on_gpu, divisor)
    compare(aligned, divisor)
    kill_and_resume(aligned, divisor)
    peer(arguments, out, training[: 60 // divisor * ALIGN_BATCH], summary["pairs_per_second"])


def run(arguments: argparse.Namespace, out: Path, sizes: Sizes) -> None:
    """Runs both stages; the model of the first is the teacher of the second."""
    training, _ = make_data(arguments, out, sizes)
    shared = {"data": str(out / "data"), "runs": out / "runs", "device": arguments.device,
              "precision": arguments.precision, "max_steps": arguments.steps}  # fmt: skip
    clock = Clock()
    config = FinetuneConfig(
        **shared, head="pooled", clip=str(out / "clip"), epochs=arguments.finetune_epochs,
        patience=0,
    )  # fmt: skip
    finetuned = finetune(config, clock).training
    features = clock.seconds["train: image features"]
    print(f"features     {sizes.photos} photos · {features:.1f} s · "
          f"{sizes.photos / features:,.0f} photos/s", flush=True)  # fmt: skip
    assert finetuned is not None
    teacher = backbones.load_clip_text(out / "runs" / "clip-ve" / "text")
    report("finetune-ve", finetuned, teacher, [english for english, _ in training])
    student_config = AlignConfig(
        **shared, lang=(arguments.lang,), student=str(out / "bert"), epochs=arguments.align_epochs,
        select="mse",
    )  # fmt: skip
    aligned = align(student_config, clock).training
    print(f"teacher      {clock.seconds['teacher embeddings']:.1f} s", flush=True)
    assert aligned is not None
    student = new_student(out / "bert", teacher.embedding_dim)
    report("align", aligned, student, [target for _, target in training])


if __name__ == "__main__":
    main()
