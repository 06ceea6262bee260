"""Full-size training on one GPU: mBERT's `align` and ViT-B/16's `finetune-ve`.

    python tests/benchmarks/bench_gpu.py --bert-vocabulary FILE --clip-vocabulary DIR \\
        --sentences DIR [--quick]

Architectures are those of mBERT and CLIP ViT-B/16 with random weights, sentences real ones varied
until there are as many as SNLI-VE has, pictures noise of 500 × 375 pixels. Without `--steps` it
runs the thesis's nine epochs of `align` and six of `finetune-ve` on 529,527 pairs; with it so many
steps of each. `--shape small --device cpu --steps 3` is a dry run for a machine without GPU.

`--quick` takes 40,000 pairs and 1,200 photos, and within five minutes on one GPU says what there is
to say of the loop: pairs a second, milliseconds of a step on the host and in kernels, the share of
the time in which kernels run, captured steps against plain ones, a kill and its resumption, photos
a second against bare decoding, and sentence-transformers (where it is installed) in the same run.

To be reached on one H100 or H200: 20,000 pairs/s in `align`, 12,000 in `finetune-ve`, kernels
running 85 % of the time, 3,000 photos/s with 16 cores.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_full_size import write_bert, write_clip
from bench_training import (
    SMALL_BERT,
    parallel_pairs,
    sentence_transformers,
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

#: SNLI-VE's size: pairs and photos of the training split.
SNLI_VE_PAIRS, SNLI_VE_PHOTOS = 529_527, 29_783

#: Pairs in a batch.
FINETUNE_BATCH, ALIGN_BATCH = 64, 128


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
    "quick": Sizes(40_000, 1_200, 1_000, {}, {}),
    "small": Sizes(600, 6, 60, SMALL_BERT, {"num_hidden_layers": 2}),
}

#: Steps of `--quick`: in a window that is timed, all that are timed, and those profiled then; that
#: are compared with plain ones; and in the run that is killed: all of them, the one after which the
#: state is saved, the last one.
WINDOW, TIMED, PROFILED = 20, 240, 40
COMPARED = 200
RESUMED, SAVED_AT, KILLED_AT = 60, 30, 45
#: What `--shape small` makes of these.
DIVISOR = {"small": 5}


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


class Clock:
    """A `Progress` that adds up how long each piece of work took."""

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


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Prints how long a block took."""
    begin = time.perf_counter()
    yield
    print(f"{title:<12} {time.perf_counter() - begin:.1f} s", flush=True)


class Killed(BaseException):
    """What nothing in the package catches."""


@contextmanager
def steps_as(step: Callable[[Any, Any, Any], float]) -> Iterator[None]:
    """In the block, the loop makes its steps through a function of run, rows and parts."""
    plain = loop._Loop._step
    loop._Loop._step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop._Loop._step = plain  # type: ignore[method-assign]


@contextmanager
def plain_steps() -> Iterator[None]:
    """In the block, no step is captured."""
    recorder = loop._Loop._recorder
    loop._Loop._recorder = lambda run: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop._Loop._recorder = recorder  # type: ignore[method-assign]


def profile(
    title: str, batch: int, run: Callable[[int], object], on_gpu: bool, divisor: int
) -> None:
    """Prints what a step costs the host and the GPU, and how much of the time kernels run.

    Time is that of the median window: shapes of batches are captured in others.
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

    with steps_as(step):
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
    """Prints how far captured steps are from plain ones, and from those of autocast alone."""

    def metrics(name: str) -> tuple[Any, float]:
        lines = (run(name, COMPARED // divisor) / "training" / "metrics.jsonl").read_text()
        entries = [json.loads(line) for line in lines.splitlines()]
        dev = [entry["dev"]["mse"] for entry in entries if "dev" in entry]  # a collapse has none
        return np.array([entry["loss"] for entry in entries]), dev[-1] if dev else np.nan

    captured, dev = metrics("captured")
    with plain_steps():
        plain, plain_dev = metrics("plain")
    original = SentenceEncoder.trains_in_bfloat16
    SentenceEncoder.trains_in_bfloat16 = property(lambda encoder: False)  # type: ignore[assignment]
    try:
        _, autocast_dev = metrics("autocast")
    finally:
        SentenceEncoder.trains_in_bfloat16 = original  # type: ignore[method-assign]
    worst = np.abs(captured / plain - 1).max()
    print(f"captured     losses of {COMPARED // divisor} steps against plain ones: at most "
          f"{worst:.2e} apart; dev MSE {dev:.5f}, plain {plain_dev:.5f}, by autocast alone "
          f"{autocast_dev:.5f}", flush=True)  # fmt: skip


def kill_and_resume(run: Callable[..., Path], divisor: int) -> None:
    """Prints whether a killed and resumed run ends in the weights of a whole one."""
    plain = loop._Loop._step
    steps, saved_at, killed_at = (number // divisor for number in (RESUMED, SAVED_AT, KILLED_AT))

    def step(self: Any, rows: Any, parts: Any) -> float:
        if self.state.step == killed_at:
            raise Killed
        if self.state.step == saved_at:
            self.saved_at = -np.inf  # so that a state is due
        return plain(self, rows, parts)

    whole = run("whole", steps)
    with steps_as(step), suppress(Killed):
        run("killed", steps)
    resumed = run("killed", steps, resume=True)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    same = all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    print(f"resumed      killed after {killed_at} of {steps} steps, resumed from {saved_at}: "
          f"{'the same bits' if same else 'OTHER WEIGHTS'}", flush=True)  # fmt: skip


def decode(path: Path) -> None:
    """Decodes and resizes a photo, and no more."""
    with Image.open(path) as photo:
        photo.convert("RGB").resize((298, 224), Image.Resampling.BICUBIC)


def decoded_per_second(photos: list[Path]) -> float:
    """Photos a second that all cores decode, in processes: no lock is in their way."""
    with ProcessPoolExecutor(usable_cores(), get_context("fork")) as pool:
        list(pool.map(decode, photos[:64], chunksize=4))
        begin = time.perf_counter()
        list(pool.map(decode, photos, chunksize=16))
        return len(photos) / (time.perf_counter() - begin)


def peer(
    arguments: argparse.Namespace, out: Path, some: list[tuple[str, str]], ours: float
) -> None:
    """Prints the rate of sentence-transformers with the same student and batch."""
    if importlib.util.find_spec("sentence_transformers") is None:
        print("peer         sentence-transformers is not installed: not measured", flush=True)
        return
    given = argparse.Namespace(epochs=1, learning_rate=AlignConfig.learning_rate)
    vectors = torch.zeros(len(some), 512)
    precision = resolve_precision(arguments.precision, torch.device(arguments.device))
    rate, _ = sentence_transformers(
        precision, given, out, some, vectors, some[:64], vectors[:64], arguments.device
    )  # fmt: skip
    print(f"peer         sentence-transformers, {precision}: {rate:,.0f} pairs/s; align is "
          f"{ours / rate:.1f} times as fast", flush=True)  # fmt: skip


def main() -> None:
    """Makes models and data in a folder of its own, trains, prints."""
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
    """Models and data; returns the training pairs and the photos."""
    data = out / "data"
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
    return training, [data / "images" / name for name in photos]


def quick(arguments: argparse.Namespace, out: Path, sizes: Sizes) -> None:
    """The loop on one GPU, in five minutes."""
    divisor = DIVISOR.get(arguments.shape or "", 1)
    on_gpu = arguments.device != "cpu"
    with timed("making data"):
        training, photos = make_data(arguments, out, sizes)
    shared = {
        "data": str(out / "data"),
        "device": arguments.device,
        "precision": arguments.precision,
    }
    clock = Clock()

    def epochs(steps: int | None, batch: int) -> int:
        return 1 if steps is None else math.ceil(steps * batch / sizes.pairs)

    def finetuned(name: str, steps: int | None = None) -> TrainingResult:
        config = FinetuneConfig(
            head="pooled",
            **shared, clip=str(out / "clip"), runs=out, out=out / name, patience=None,
            max_steps=steps, epochs=epochs(steps, FINETUNE_BATCH),
        )  # fmt: skip
        result = finetune(config, clock).training
        assert result is not None
        return result

    def aligned(name: str, steps: int | None = None, resume: bool = False) -> Path:
        config = AlignConfig(
            **shared, lang=(arguments.lang,), student=str(out / "bert"), runs=out,
            teacher=out / "clip-ve", out=out / name, select="mse", max_steps=steps, resume=resume,
            epochs=epochs(steps, ALIGN_BATCH),
        )  # fmt: skip
        # Random weights may end as a collapse, which is refused; the steps were made all the same.
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
    profile(
        "finetune-ve",
        FINETUNE_BATCH,
        lambda steps: finetuned("profiled-ve", steps),
        on_gpu,
        divisor,
    )

    folder = aligned("student")
    summary = json.loads((folder / "training" / "summary.json").read_text())
    student = new_student(out / "bert", tower.embedding_dim)
    report("align", TrainingResult(**summary), student, [target for _, target in training])
    profile("align", ALIGN_BATCH, lambda steps: aligned("profiled", steps), on_gpu, divisor)
    compare(aligned, divisor)
    kill_and_resume(aligned, divisor)
    peer(arguments, out, training[: 60 // divisor * ALIGN_BATCH], summary["pairs_per_second"])


def run(arguments: argparse.Namespace, out: Path, sizes: Sizes) -> None:
    """Both stages, one after the other: the second one's teacher is the first one's model."""
    data, runs = out / "data", out / "runs"
    with timed("making data"):
        training, _ = make_data(arguments, out, sizes)
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
            head="pooled",
            **shared,
            clip=str(out / "clip"),
            epochs=arguments.finetune_epochs,
            patience=0,
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


if __name__ == "__main__":
    main()
