"""`evaluate` at SNLI-VE's size: against the bare encoder, and what its baseline costs.

    python tests/benchmarks/bench_evaluate.py prepare --out DIR       once: data, models, caches
    python tests/benchmarks/bench_evaluate.py throughput --out DIR    evaluate against its encoder
    python tests/benchmarks/bench_evaluate.py classifier --rows 529527

The data are made up: 17,901 rows on 1,000 small pictures, sentences of 7.4 words on average from a
Markov chain over 20,000 words. The student is a BERT of 6 layers, 384 wide, with random weights.
The peer of `throughput` is that encoder alone: the same distinct sentences, tokenised and packed
into the same batches beforehand, forward passes and nothing else. The rate of `evaluate` counts the
whole call, from reading the files to the last interval, image features and the guesses of the
hypothesis-only classifier coming from their caches.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np

NUM_ROWS, NUM_IMAGES, NUM_TRAINING_ROWS = 17_901, 1_000, 529_527
_WORDS, _FOLLOWERS, _MEAN_WORDS = 20_000, 40, 7.4
_LABELS = ("entailment", "neutral", "contradiction")


def sentences(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences with Zipf's words, and labels that their words give away now and then."""
    chain = np.random.default_rng(0)
    frequency = 1 / np.arange(1, _WORDS + 1)
    frequency /= frequency.sum()
    followers = chain.choice(_WORDS, size=(_WORDS, _FOLLOWERS), p=frequency)
    lean = chain.normal(0, 0.5, size=(_WORDS, 3))
    names = np.array([f"w{chain.integers(10**6):x}" for _ in range(_WORDS)])

    generator = np.random.default_rng(seed)
    lengths = generator.poisson(_MEAN_WORDS - 2, size=count) + 2
    steps = np.minimum(generator.zipf(1.5, size=(count, int(lengths.max()))) - 1, _FOLLOWERS - 1)
    word = generator.choice(_WORDS, size=count, p=frequency)
    columns, evidence = [word], lean[word].copy()
    for position in range(1, steps.shape[1]):
        word = followers[word, steps[:, position]]
        columns.append(word)
        evidence += lean[word] * (lengths > position)[:, None]
    labels = (evidence + generator.gumbel(size=evidence.shape)).argmax(axis=1)
    table = names[np.stack(columns, axis=1)]
    texts = [" ".join(row[:length]) for row, length in zip(table, lengths.tolist(), strict=True)]
    return texts, labels


def write_rows(
    path: Path, name: str, num_images: int, texts: list[str], labels: np.ndarray
) -> None:
    with path.open("w") as stream:
        for number, (text, label) in enumerate(zip(texts, labels.tolist(), strict=True)):
            row = {
                "pairID": f"{name}{number}",
                "Flickr30K_ID": f"{name}{number % num_images}.png",
                "sentence2": text,
                "gold_label": _LABELS[label],
            }
            stream.write(json.dumps(row) + "\n")


def prepare(out: Path) -> None:
    """Data, an English model, a student, and full caches."""
    from PIL import Image

    from clseave_cli.core.evaluation.run import evaluate
    from clseave_cli.core.models.clip_ve import ClipVE
    from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder
    from clseave_cli.core.models.student import new_student, save_student

    data, runs = out / "data", out / "runs"
    (data / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        noise = pixels.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / "images" / f"test{number}.png")
    texts, labels = sentences(NUM_ROWS, seed=1)
    write_rows(data / "snli_ve_test.de.jsonl", "test", NUM_IMAGES, texts, labels)
    training, training_labels = sentences(NUM_TRAINING_ROWS, seed=2)
    write_rows(data / "snli_ve_train.de.jsonl", "train", 29_783, training, training_labels)
    shape = ClipShape(
        image_size=32, patch_size=16, width=64, num_layers=1, num_heads=2, embedding_dim=512,
        max_tokens=77, vocab_size=1000,
    )  # fmt: skip
    new_clip(out / "clip", texts[:500], shape)
    model = ClipVE.from_clip(out / "clip")
    (runs / "clip-ve").mkdir(parents=True)
    model.save(runs / "clip-ve")
    new_encoder(
        out / "encoder", training[:20_000], width=384, num_layers=6, num_heads=6,
        vocab_size=20_000, max_tokens=128,
    )  # fmt: skip
    (runs / "align-de").mkdir()
    save_student(
        new_student(out / "encoder", 512), runs / "align-de", languages=["de"],
        teacher=model.fingerprint,
    )  # fmt: skip
    # Fills the cache of image features, with a small split and no baseline.
    write_rows(data / "snli_ve_first.de.jsonl", "test", NUM_IMAGES, texts[:1000], labels[:1000])
    evaluate(_config(out, split="first", train_split="none"))


def _config(out: Path, **options: object) -> object:
    from clseave_cli.core.config import EvaluateConfig

    return EvaluateConfig(data=str(out / "data"), runs=(out / "runs",), lang=("de",), **options)  # type: ignore[arg-type]


def throughput(out: Path, rounds: int) -> None:
    """The whole of `evaluate` against forward passes over the same packed batches, in turns."""
    import torch

    from clseave_cli.core.data.records import Split, distinct, read_split
    from clseave_cli.core.evaluation import run as evaluation
    from clseave_cli.core.evaluation.baselines import Guesses, HypothesisOnly
    from clseave_cli.core.models.student import load_student
    from clseave_cli.core.training.precision import autocast

    config = _config(out)
    student = load_student(out / "runs" / "align-de")
    texts, _ = distinct(read_split(out / "data", "test", "de").hypotheses)
    tokens = student.tokenize(texts)
    size = config.batch_size  # type: ignore[attr-defined]
    batches = [
        student.pack(tokens, np.arange(start, min(start + size, len(tokens))))
        for start in range(0, len(tokens), size)
    ]
    precision = autocast("auto", student.device)

    def raw() -> float:
        begin = time.perf_counter()
        with torch.no_grad(), precision():
            for batch in batches:
                student(batch)
        return time.perf_counter() - begin

    # Learning is another benchmark; here the guesses are there already, as after one run.
    def known(_self: object, _lang: str, split: Split, _read: object) -> Guesses:
        return Guesses(0, np.zeros(len(split), dtype=np.int64))

    HypothesisOnly.guess = known  # type: ignore[method-assign]
    HypothesisOnly.require = lambda *_: None  # type: ignore[method-assign]
    times: dict[str, list[float]] = {"raw": [], "evaluate": []}
    for number in range(rounds):
        for side in ("raw", "evaluate") if number % 2 == 0 else ("evaluate", "raw"):
            if side == "raw":
                times[side].append(raw())
            else:
                begin = time.perf_counter()
                evaluation.evaluate(config)  # type: ignore[arg-type]
                times[side].append(time.perf_counter() - begin)
    best = {side: min(seconds) for side, seconds in times.items()}
    print(
        f"torch {torch.__version__} · {torch.get_num_threads()} threads · {precision.precision} · "
        f"{NUM_ROWS} rows, {len(texts)} distinct sentences, {len(batches)} batches"
    )
    for side, seconds in times.items():
        shown = ", ".join(f"{value:.1f}" for value in seconds)
        print(f"{side:<9} {shown} s · best {NUM_ROWS / best[side]:.0f} rows/s")
    print(f"evaluate at {100 * best['raw'] / best['evaluate']:.1f} % of the raw encoder's rate")


def classifier(num_rows: int) -> None:
    """How long the hypothesis-only classifier learns, and what it needs."""
    from clseave_cli.core.evaluation.baselines import predict_from_hypotheses

    training, labels = sentences(num_rows, seed=2)
    asked, gold = sentences(NUM_ROWS, seed=1)
    begin = time.perf_counter()
    guesses = predict_from_hypotheses(training, labels, asked)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{num_rows} rows ({len(set(training))} distinct): {seconds:.1f} s, peak {peak:.2f} GiB, "
        f"{100 * float((guesses == gold).mean()):.1f} % of {NUM_ROWS} rows right"
    )


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("prepare", "throughput", "classifier"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=NUM_TRAINING_ROWS)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.name == "classifier":
        classifier(arguments.rows)
        return
    os.environ["CLSEAVE_CACHE"] = str(arguments.out / "cache")
    if arguments.name == "prepare":
        prepare(arguments.out)
    else:
        throughput(arguments.out, arguments.rounds)


if __name__ == "__main__":
    main()
