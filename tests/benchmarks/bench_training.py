"""Training against named peers: same model, same data, same machine, same run.

    python tests/benchmarks/bench_training.py align --bert-vocabulary FILE --sentences DIR
    python tests/benchmarks/bench_training.py finetune-ve --clip-vocabulary DIR --pictures DIR \\
        --sentences DIR
    python tests/benchmarks/bench_training.py overhead --bert-vocabulary FILE --sentences DIR
    python tests/benchmarks/bench_training.py scale --sentences DIR

`--bert-vocabulary` is mBERT's vocab.txt, `--clip-vocabulary` a folder with CLIP's vocab.json and
merges.txt, `--sentences` a folder of parallel text (`--split`, `--lang`), `--pictures` a folder of
images. `align` needs sentence-transformers. Weights are random: speed does not depend on them. But
random weights stay for long where every sentence has the same embedding, so to compare what `align`
has learnt, give it `--student`, a folder with a trained BERT of that size (all-MiniLM-L6-v2).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from bench_full_size import write_bert, write_clip
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig, Precision, TrainingConfig
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import Split, distinct, join, read_split
from clseave_cli.core.features import sentence_embeddings
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.packing import pack
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.loop import Selection, Stage, batches, learning_rate_factor, train
from clseave_cli.core.training.precision import autocast, resolve_precision
from clseave_cli.progress import SILENT

CPU = torch.device("cpu")
LABELS = ("entailment", "neutral", "contradiction")
SMALL_BERT: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    # 1 / sqrt(width): with BERT's 0.02 so narrow a model says nearly the same to every sentence.
    "initializer_range": 0.05,
}
Pairs = list[tuple[str, str]]


def parallel_pairs(arguments: argparse.Namespace) -> Pairs:
    """Distinct (English, translated) sentence pairs in random order."""
    english, target = (
        read_split(arguments.sentences, arguments.split, lang, labelled=False, with_images=False)
        for lang in ("en", arguments.lang)
    )
    parallel = join(target, english)
    pairs = list(dict.fromkeys(zip(parallel.sources, parallel.target.hypotheses, strict=True)))
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order]


def write_pairs(folder: Path, split: str, lang: str, pairs: Pairs) -> None:
    """A split of parallel text in SNLI-VE shape, without images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, sentences in (("", (e for e, _ in pairs)), (f".{lang}", (t for _, t in pairs))):
        with (folder / f"snli_ve_{split}{suffix}.jsonl").open("w", encoding="utf-8") as stream:
            for number, sentence in enumerate(sentences):
                row = {"pairID": f"{split}-{number}", "sentence2": sentence}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_teacher(folder: Path, english: list[str], width: int) -> None:
    """A small CLIP-VE with random weights whose embeddings differ clearly from each other."""
    clip = folder.with_name("clip")
    new_clip(clip, english, ClipShape(num_layers=2, embedding_dim=width, vocab_size=2000))
    teacher = ClipVE.from_clip(clip).eval()
    # Untrained, it says nearly the same to every sentence; what is common is taken away.
    projection = teacher.text.projection.weight
    *_, last = (m for m in teacher.text.backbone.modules() if isinstance(m, torch.nn.LayerNorm))
    with torch.no_grad():
        (embeddings,) = teacher.text.embed(teacher.text.tokenize(english[:256]))
        common = torch.linalg.lstsq(projection, embeddings.mean(dim=0)[:, None]).solution[:, 0]
        last.bias -= common
        projection *= 0.5 / embeddings.std(dim=0).mean()
    folder.mkdir(parents=True)
    teacher.save(folder)


def peak_gib() -> float:
    """Largest memory of this process so far, without what getrusage inherits at a fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) / 2**20


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function gives in a process of its own, and the largest memory of that, GiB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, *arguments).result()


def _with_peak(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    return function(*arguments), peak_gib()


# --- align ---


def bench_align(arguments: argparse.Namespace, out: Path) -> None:
    """`align` against sentence-transformers' MSE distillation."""
    pairs = parallel_pairs(arguments)
    held_out, training = pairs[:512], pairs[512 : 512 + arguments.pairs]
    # No dev sentence is trained on in other words.
    seen = {english for english, _ in held_out}
    training = [pair for pair in training if pair[0] not in seen]
    write_pairs(out / "data", "train", arguments.lang, training)
    write_pairs(out / "data", "dev", arguments.lang, held_out)
    write_teacher(out / "runs" / "clip-ve", [english for english, _ in training], 512)
    if arguments.student is not None:
        (out / "bert").symlink_to(arguments.student.resolve())
    else:
        write_bert(out / "bert", arguments.bert_vocabulary, **SMALL_BERT)
    teacher = ClipVE.from_folder(out / "runs" / "clip-ve")

    def wanted(some: Pairs) -> Tensor:
        sentences, index = distinct([english for english, _ in some])
        vectors = sentence_embeddings(
            teacher.text,
            sentences,
            autocast=autocast("fp32", CPU),
            description="teacher",
        )
        return vectors.rows(index)

    training_vectors, dev_vectors = wanted(training), wanted(held_out)
    print(f"{len(training)} pairs, {arguments.epochs} epochs, teacher variance "
          f"{dev_vectors.var(dim=0).mean():.3f}", flush=True)  # fmt: skip

    begin = time.perf_counter()
    result, peak = apart(
        align,
        AlignConfig(
            data=str(out / "data"),
            lang=(arguments.lang,),
            student=str(out / "bert"),
            runs=out / "runs",
            device="cpu",
            precision=arguments.precision,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            select="mse",
        ),
    )
    seconds = time.perf_counter() - begin
    assert result.training is not None
    ours = result.training.pairs_per_second
    own = resolve_precision(arguments.precision, CPU)
    print(
        f"clseave align                     {own} {ours:6.1f} pairs/s · dev MSE "
        f"{result.training.dev['mse']:.4f} · everything {seconds:.0f} s · {peak:.2f} GiB",
        flush=True,
    )
    # Its trainer computes in float32 unless told otherwise, and the recipe does not tell it.
    for title, recipe, precision in (
        ("equal", equal_student, own),
        ("as shipped", shipped_student, "fp32"),
    ):
        (rate, mse), peak = apart(
            sentence_transformers,
            *(recipe, precision, arguments, out, training, training_vectors, held_out, dev_vectors),
        )
        print(
            f"sentence-transformers, {title:<10} {precision} {rate:6.1f} pairs/s · "
            f"dev MSE {mse:.4f} · "
            f"{peak:.2f} GiB · ratio {ours / rate:.2f}",
            flush=True,
        )


def equal_student(encoder: Path, device: str) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """The same student from the same weights, trained on the same column with the same options."""
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    torch.manual_seed(AlignConfig.seed)
    reference = new_student(encoder, 512)
    width, embedding_dim = reference.projection.in_features, reference.embedding_dim
    norm = LayerNorm(width)
    norm.norm.load_state_dict(reference.norm.state_dict())
    dense = Dense(
        width,
        embedding_dim,
        bias=False,
        activation_function=None,
        init_weight=reference.projection.weight.detach().clone(),
    )
    student = SentenceTransformer(
        modules=[Transformer(str(encoder)), Pooling(width, "lasttoken"), norm, dense],
        device=device,
    )
    columns = {"non_english": 1}
    options = {
        "per_device_train_batch_size": AlignConfig.batch_size,
        "weight_decay": AlignConfig.weight_decay,
    }
    return student, columns, losses.MSELoss(student), options


def shipped_student(encoder: Path, device: str) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """The documented multilingual recipe: mean pooling, both languages, batches of 64."""
    from sentence_transformers import SentenceTransformer, losses

    student = SentenceTransformer(str(encoder), device=device)
    student.max_seq_length = 128
    columns = {"english": 0, "non_english": 1}
    options = {"per_device_train_batch_size": 64, "learning_rate": 2e-5, "num_train_epochs": 1}
    return student, columns, losses.MSELoss(student, projection_dim=512), options


def sentence_transformers(
    recipe: Any,
    precision: Precision,
    arguments: argparse.Namespace,
    out: Path,
    training: Pairs,
    vectors: Tensor,
    held_out: Pairs,
    dev_vectors: Tensor,
    device: str = "cpu",
) -> tuple[float, float]:
    """Pairs a second in its trainer, and the dev MSE afterwards."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    student, columns, loss, options = recipe(out / "bert", device)
    dataset = Dataset.from_dict(
        {name: [pair[side] for pair in training] for name, side in columns.items()}
        | {"label": list(vectors.numpy())}
    )
    trainer = SentenceTransformerTrainer(
        model=student,
        train_dataset=dataset,
        loss=loss,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out / "peer"),
            **{
                "num_train_epochs": arguments.epochs,
                "learning_rate": arguments.learning_rate,
                "warmup_steps": 0.1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": device == "cpu",
                "bf16": precision == "bf16",
            }
            | options,
        ),
    )
    metrics = trainer.train().metrics
    embeddings = student.encode([target for _, target in held_out], convert_to_tensor=True)
    if loss.projection is not None:
        with torch.no_grad():
            embeddings = loss.projection(embeddings)
    return metrics["train_samples_per_second"], functional.mse_loss(
        embeddings.cpu(), dev_vectors
    ).item()


# --- finetune-ve ---


class Clock:
    """A `Progress` that adds up how long each piece of work took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "", *, noted: bool = False
    ) -> Iterator[Any]:
        begin = time.perf_counter()
        with SILENT.task(description) as task:
            yield task
        self.seconds[description] = time.perf_counter() - begin

    def note(self, message: str) -> None:
        return


def write_photos(arguments: argparse.Namespace, data: Path) -> None:
    """`--images` pictures, each with `--hypotheses` sentences and labels; one more for dev."""
    hypotheses = itertools.cycle(dict.fromkeys(english for english, _ in parallel_pairs(arguments)))
    pictures = sorted(p for p in arguments.pictures.rglob("*") if p.suffix in (".jpg", ".png"))
    (data / "images").mkdir(parents=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    for number, picture in enumerate(pictures[: arguments.images + 1]):
        (data / "images" / picture.name).symlink_to(picture)
        rows["train" if number < arguments.images else "dev"] += [
            {
                "pairID": f"{number}-{place}",
                "Flickr30K_ID": picture.name,
                "sentence2": next(hypotheses),
                "gold_label": LABELS[place % 3],
            }
            for place in range(arguments.hypotheses)
        ]
    for split, own in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (data / f"snli_ve_{split}.jsonl").write_text(text, encoding="utf-8")


def bench_finetune(arguments: argparse.Namespace, out: Path) -> None:
    """`finetune-ve` against a loop that encodes each pair's image at every step."""
    if arguments.demo is not None:
        data, clip = arguments.demo / "data", arguments.demo / "runs" / "clip"
        options = FinetuneConfig.PRESETS["mini-ve"]
    else:
        data, clip = out / "data", out / "clip"
        write_clip(clip, arguments.clip_vocabulary)
        write_photos(arguments, data)
        options = {"learning_rate": 1e-5, "precision": arguments.precision}
    config = FinetuneConfig(
        head="pooled",  # as its peers
        data=str(data),
        clip=str(clip),
        runs=out / "runs",
        device="cpu",
        **options | {"epochs": arguments.epochs, "patience": None},
    )
    training, dev = (read_split(data, split) for split in ("train", "dev"))
    folder = ImageFolder.of(data, None)
    num_pairs = len(training) * config.epochs
    (trained, clock), peak = apart(_timed, config)
    features = clock["train: image features"]
    steps = sum(seconds for title, seconds in clock.items() if "epoch" in title)
    ours = num_pairs / (features + steps)
    print(
        f"clseave finetune-ve  {ours:7.2f} pairs/s: {features:.1f} s features of "
        f"{len(training.image_names)} images, {steps:.1f} s in {config.epochs} epochs of "
        f"{len(training)} pairs · {_figures(ClipVE.from_folder(trained), dev, folder)} · "
        f"{peak:.2f} GiB",
        flush=True,
    )
    (model, seconds), peak = apart(_plain_loop, config, folder, training)
    theirs = num_pairs / seconds
    print(
        f"plain loop           {theirs:7.2f} pairs/s: {seconds:.1f} s · "
        f"{_figures(model, dev, folder)} · {peak:.2f} GiB · ratio {ours / theirs:.1f}"
    )


def _timed(config: FinetuneConfig) -> tuple[Path, dict[str, float]]:
    """The folder of the model that `finetune-ve` trains, and the seconds of its parts."""
    clock = Clock()
    return finetune(config, clock).folder, clock.seconds


def _premises(model: ClipVE, split: Split, rows: Any, folder: ImageFolder) -> Tensor:
    """(B, D) image embeddings of some rows, decoded and encoded for each."""
    names = [split.image_names[split.image_index[row]] for row in rows]
    pictures = [open_image(folder.find(name, str(split.path))) for name in names]
    with torch.no_grad():
        return model.image(model.image.preprocess(pictures))


def _figures(model: ClipVE, dev: Split, folder: ImageFolder) -> str:
    """Loss and accuracy on dev."""
    model.eval()
    tokens = model.text.tokenize(dev.hypotheses)
    logits = []
    with torch.no_grad():
        for start in range(0, len(dev), 256):
            rows = np.arange(start, min(start + 256, len(dev)))
            hypotheses = model.text(model.text.pack(tokens, rows))
            logits.append(model(hypotheses, _premises(model, dev, rows, folder)))
    labels = torch.from_numpy(dev.labels.astype(np.int64))
    loss = functional.cross_entropy(torch.cat(logits), labels).item()
    accuracy = (torch.cat(logits).argmax(dim=1) == labels).float().mean().item()
    return f"dev loss {loss:.4f}, accuracy {accuracy:.2%} of {len(dev)}"


def _plain_loop(
    config: FinetuneConfig, folder: ImageFolder, training: Split
) -> tuple[ClipVE, float]:
    """The textbook loop: one padded sentence and one encoded image a pair.

    Returns:
        The model it trained, and the seconds.
    """
    torch.manual_seed(config.seed)
    model = ClipVE.from_clip(config.clip).train()
    model.text.packs = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    tokens = model.text.tokenize(training.hypotheses)
    labels = torch.from_numpy(training.labels.astype(np.int64))
    precision = autocast(config.precision, CPU)
    orders = [
        list(batches(len(training), config.batch_size, seed=config.seed, epoch=epoch))
        for epoch in range(config.epochs)
    ]
    total = sum(map(len, orders))
    begin = time.perf_counter()
    for step, batch in enumerate(itertools.chain.from_iterable(orders)):
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(
            step,
            total=total,
            warmup=round(config.warmup_fraction * total),
            schedule=config.schedule,
        )
        with precision():
            premises = _premises(model, training, batch, folder)
            padded = pack(tokens, batch, row_tokens=None, pad_id=model.text.pad_id)
            logits = model(model.text(padded), premises)
            loss = functional.cross_entropy(logits, labels[torch.from_numpy(batch)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, time.perf_counter() - begin


# --- the loop itself ---


def bench_overhead(arguments: argparse.Namespace, out: Path) -> None:
    """What a step costs in the loop beyond forward, backward and optimiser."""
    write_bert(out / "bert", arguments.bert_vocabulary, **SMALL_BERT)
    pairs = parallel_pairs(arguments)
    student = new_student(out / "bert", 512).train()
    size = TrainingConfig.batch_size
    tokens = student.tokenize([target for _, target in pairs[: arguments.steps * size]])
    vectors = torch.randn(len(tokens), 512)
    begins: list[float] = []

    def loss(batch: Any) -> Tensor:
        begins.append(time.perf_counter())
        sentences, rows = batch
        return functional.mse_loss(student(sentences).float(), vectors[rows])

    def prepare(rows: Any) -> Any:
        return student.pack(tokens, rows), torch.from_numpy(rows)

    stage = Stage(
        name="overhead",
        module=student,
        num_examples=len(tokens),
        prepare=prepare,
        loss=loss,
        evaluate=lambda: {"mse": 0.0},
        selection=Selection("mse", "lowest"),
    )
    config = TrainingConfig(epochs=1, precision="fp32")

    def bare() -> None:
        prepared = [prepare(rows) for rows in batches(len(tokens), size, seed=0, epoch=0)]
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
        for batch in prepared:
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    def loop() -> None:
        train(stage, config, device=CPU, folder=Path(tempfile.mkdtemp(dir=out)))

    def periods(work: Any) -> Any:
        begins.clear()
        student.train()
        work()
        return np.diff(begins)

    with reduced_vocabulary(student, tokens):
        periods(bare)  # warm
        measured: dict[str, list[Any]] = {"bare": [], "loop": []}
        for _ in range(arguments.repeats):
            measured["bare"].append(periods(bare))
            measured["loop"].append(periods(loop))
    # The same batches in the same order, so each step is compared with itself; the quickest of
    # its repeats is the one least disturbed.
    seconds = {name: np.min(steps, axis=0).sum() for name, steps in measured.items()}
    for name, total in seconds.items():
        print(f"{name}  {1000 * total / (arguments.steps - 1):7.1f} ms a step")
    print(f"overhead {seconds['loop'] / seconds['bare'] - 1:+.1%}")


def bench_scale(arguments: argparse.Namespace, out: Path) -> None:
    """Rate and memory of `align` as the number of pairs grows; each size in its own process."""
    for size in arguments.sizes:
        command = [sys.executable, __file__, "one-scale", "--sentences", str(arguments.sentences)]
        command += ["--split", arguments.split, "--lang", arguments.lang, "--pairs", str(size)]
        subprocess.run([*command, "--steps", str(arguments.steps)], check=True)


def bench_one_scale(arguments: argparse.Namespace, out: Path) -> None:
    """One size of `scale`."""
    real = parallel_pairs(arguments)
    pairs = [
        (f"{english} {lap % 10}", f"{target} {lap}")
        for lap, (english, target) in zip(
            itertools.chain.from_iterable(
                itertools.repeat(lap, len(real)) for lap in itertools.count()
            ),
            itertools.islice(itertools.cycle(real), arguments.pairs),
            strict=False,
        )
    ]
    write_pairs(out / "data", "train", arguments.lang, pairs)
    write_pairs(out / "data", "dev", arguments.lang, real[:200])
    write_teacher(out / "runs" / "clip-ve", [english for english, _ in real], 64)
    new_encoder(out / "encoder", [target for _, target in real], width=64, num_layers=1)
    begin = time.perf_counter()
    result = align(
        AlignConfig(
            data=str(out / "data"),
            lang=(arguments.lang,),
            student=str(out / "encoder"),
            runs=out / "runs",
            device="cpu",
            precision="fp32",
            epochs=1000,
            max_steps=arguments.steps,
            select="mse",
        )
    )
    assert result.training is not None
    rest = time.perf_counter() - begin - result.training.wall_seconds
    rate = result.training.pairs_per_second
    print(
        f"{arguments.pairs:>9,} pairs: {rate:7.0f} pairs/s, {1e6 / rate:6.1f} µs a pair · "
        f"preparation {rest:6.1f} s, {1e6 * rest / arguments.pairs:6.1f} µs a pair · "
        f"peak {peak_gib():.2f} GiB",
        flush=True,
    )


BENCHMARKS = SimpleNamespace(
    align=bench_align,
    finetune_ve=bench_finetune,
    overhead=bench_overhead,
    scale=bench_scale,
    one_scale=bench_one_scale,
)


def main() -> None:
    """Runs one benchmark in a folder of its own, which goes afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=[name.replace("_", "-") for name in vars(BENCHMARKS)])
    parser.add_argument("--bert-vocabulary", type=Path)
    parser.add_argument("--clip-vocabulary", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--student", type=Path, help="Of align: a BERT that has learnt something.")
    parser.add_argument("--split", default="sick")
    parser.add_argument("--lang", default="nl")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--hypotheses", type=int, default=18)
    parser.add_argument("--demo", type=Path, help="Of finetune-ve: train on a demo's folder.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    if arguments.benchmark != "scale":
        print(f"torch {torch.__version__} · transformers {transformers.__version__} · "
              f"{torch.get_num_threads()} threads", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLSEAVE_CACHE"] = str(Path(folder) / "cache")
        getattr(BENCHMARKS, arguments.benchmark.replace("-", "_"))(arguments, Path(folder))


if __name__ == "__main__":
    main()
