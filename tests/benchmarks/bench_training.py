"""Training against named peers: same model, same data, same machine, same run.

    python tests/benchmarks/bench_training.py align --bert-vocabulary FILE --sentences DIR
    python tests/benchmarks/bench_training.py overhead --bert-vocabulary FILE --sentences DIR

`--bert-vocabulary` is mBERT's vocab.txt, `--sentences` a folder of parallel text (`--split`,
`--lang`). `align` needs sentence-transformers. Weights are random, and speed does not depend on
them. Random weights give every sentence the same embedding for long, so to compare what `align`
has learnt, give it `--student`, a folder with a trained BERT of that size (all-MiniLM-L6-v2).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_full_size import write_bert
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, Precision, TrainingConfig
from clseave_cli.core.data.records import distinct, join, read_split
from clseave_cli.core.features import sentence_embeddings
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.scratch import ClipShape, new_clip
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.device import autocast, resolve_precision
from clseave_cli.core.training.loop import Selection, Stage, batches, train

CPU = torch.device("cpu")
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

    def wanted(pairs: Pairs) -> Tensor:
        sentences, index = distinct([english for english, _ in pairs])
        exact = autocast("fp32", CPU)
        vectors = sentence_embeddings(
            teacher.text, sentences, autocast=exact, description="teacher"
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
    precision = resolve_precision(arguments.precision, CPU)
    print(
        f"clseave align                     {precision} {ours:6.1f} pairs/s · dev MSE "
        f"{result.training.dev['mse']:.4f} · everything {seconds:.0f} s · {peak:.2f} GiB",
        flush=True,
    )
    (rate, mse), peak = apart(
        sentence_transformers, precision, arguments, out, training, training_vectors, held_out,
        dev_vectors,
    )  # fmt: skip
    print(f"sentence-transformers             {precision} {rate:6.1f} pairs/s · dev MSE "
          f"{mse:.4f} · {peak:.2f} GiB · ratio {ours / rate:.2f}", flush=True)  # fmt: skip


def equal_student(encoder: Path, device: str) -> Any:
    """The same student from the same weights, as a model of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
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
    modules = [Transformer(str(encoder)), Pooling(width, "lasttoken"), norm, dense]
    return SentenceTransformer(modules=modules, device=device)


def sentence_transformers(
    precision: Precision,
    arguments: argparse.Namespace,
    out: Path,
    training: Pairs,
    vectors: Tensor,
    held_out: Pairs,
    dev_vectors: Tensor,
    device: str = "cpu",
) -> tuple[float, float]:
    """Pairs a second of that student in its trainer, and the dev MSE afterwards."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    student = equal_student(out / "bert", device)
    dataset = Dataset.from_dict(
        {"non_english": [target for _, target in training], "label": list(vectors.numpy())}
    )
    trainer = SentenceTransformerTrainer(
        model=student,
        train_dataset=dataset,
        loss=losses.MSELoss(student),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out / "peer"),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=AlignConfig.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=AlignConfig.weight_decay,
            warmup_steps=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            bf16=precision == "bf16",
        ),
    )
    rate = trainer.train().metrics["train_samples_per_second"]
    embeddings = student.encode([target for _, target in held_out], convert_to_tensor=True)
    return rate, functional.mse_loss(embeddings.cpu(), dev_vectors).item()


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


BENCHMARKS = {"align": bench_align, "overhead": bench_overhead}


def main() -> None:
    """Runs one benchmark in a folder of its own, which goes afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--bert-vocabulary", type=Path)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="Of align: a BERT that has learnt something.")
    parser.add_argument("--split", default="sick")
    parser.add_argument("--lang", default="nl")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__} · transformers {transformers.__version__} · "
          f"{torch.get_num_threads()} threads", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLSEAVE_CACHE"] = str(Path(folder) / "cache")
        BENCHMARKS[arguments.benchmark](arguments, Path(folder))


if __name__ == "__main__":
    main()
