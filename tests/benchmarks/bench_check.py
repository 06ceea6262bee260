"""Precision, recall and speed of `check`.

    python tests/benchmarks/bench_check.py DEMO [--captions 300] [--min-confidence 0.7]

DEMO is a folder that `clseave demo` wrote. A third of the captions contradict their test picture.
Prints precision and recall of the finding `contradicts` in each language, and in all of them with
`--lang auto` (needs the extra langid).

    python tests/benchmarks/bench_check.py DEMO --corpus DIR [--lang en]

Prints the processor time of `check` on the pages of a folder beside that of the encoders alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.data.images import open_image
from clseave_cli.core.prediction.checking import findings
from clseave_cli.core.prediction.checking.pictures import Locator
from clseave_cli.core.prediction.inference import InferenceModel, load_model

_LANGUAGES = ("en", "de", "nl", "ja", "zh", "ko")


def captions(demo: Path, lang: str, number: int) -> list[tuple[str, str, str]]:
    """(image, text, label) of test rows: a third contradictions, two thirds entailments."""
    suffix = "" if lang == "en" else f".{lang}"
    path = demo / "data" / f"snli_ve_test{suffix}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    chosen = []
    for label, count in (("contradiction", number // 3), ("entailment", number - number // 3)):
        chosen += [row for row in rows if row["gold_label"] == label][:count]
    return [
        (f"{Path(r['Flickr30K_ID']).stem}.png", r["sentence2"], r["gold_label"]) for r in chosen
    ]


def measure(demo: Path, table: Path, gold: Sequence[str], config: CheckConfig) -> str:
    """Precision and recall of `contradicts` over a table whose rows have these labels."""
    result = findings.check([table], config)
    flagged = [any(f.rule == "contradicts" for f in text.findings) for text in result.texts]
    wrong = [label == "contradiction" for label in gold]
    hits = sum(a and b for a, b in zip(flagged, wrong, strict=True))
    unsure = sum(text.verdict == "unsure" for text in result.texts)
    return (
        f"{len(gold)} captions, {sum(wrong)} contradicted: {sum(flagged)} flagged, precision "
        f"{hits / max(1, sum(flagged)):.1%}, recall {hits / sum(wrong):.1%}, {unsure} unsure"
    )


def encoders(model: InferenceModel, pairs: list[tuple[Path, str, str]]) -> float:
    """Processor seconds to encode every picture and text once and to classify the pairs."""
    start = time.process_time()
    paths = list(dict.fromkeys(path for path, _, _ in pairs))
    vectors = {}
    for first in range(0, len(paths), 32):
        batch = paths[first : first + 32]
        pixels = np.stack([model.prepare(open_image(path)) for path in batch])
        vectors |= dict(zip(batch, model.embed_images(pixels), strict=True))
    for lang in {lang for _, _, lang in pairs}:
        rows = [(path, text) for path, text, each in pairs if each == lang]
        for first in range(0, len(rows), 256):
            part = rows[first : first + 256]
            embeddings, _ = model.embed_sentences(lang, [text for _, text in part])
            model.probabilities(lang, embeddings, np.stack([vectors[path] for path, _ in part]))
    return time.process_time() - start


def compare(corpus: Path, config: CheckConfig) -> str:
    """The time of `check`, and of the encoders on the pairs that it classified."""
    load_model(config.runs, device=config.device, precision=config.precision)  # imports torch
    start = time.process_time()
    result = findings.check([corpus], config)
    seconds = time.process_time() - start
    classified = [text for text in result.texts if text.verdict]
    start = time.process_time()
    model = load_model(config.runs, device=config.device, precision=config.precision)
    pairs = []
    for text in classified:
        # Relative references are resolved beside their file, as in `check`.
        folder = (Path.cwd() / text.text.file).parent
        picture = Locator(corpus, False).web([text.text.picture.name], folder)
        if isinstance(picture.source, Path):
            pairs.append((picture.source, text.text.text, text.lang or ""))
    for lang in model.sources:
        model.embed_sentences(lang, ["."])
    loading = time.process_time() - start
    alone = encoders(model, pairs)
    pictures = len({path for path, _, _ in pairs})
    return (
        f"{len(result.texts)} texts, {len(classified)} judged, {pictures} different pictures: "
        f"check {seconds:.2f} s with loading; encoders {alone:.2f} s, loading {loading:.2f} s; "
        f"{seconds / (alone + loading):.2f} times; {result.summary()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--min-confidence", type=float, default=CheckConfig.min_confidence)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--lang", default="auto")
    arguments = parser.parse_args()
    settings = {"runs": arguments.demo / "runs", "device": "cpu", "precision": "fp32"}
    settings |= {"min_confidence": arguments.min_confidence}
    if arguments.corpus is not None:
        config = CheckConfig(lang=arguments.lang, **settings)
        print(compare(arguments.corpus, config))
        return
    images = arguments.demo / "data" / "images"
    with tempfile.TemporaryDirectory() as folder:
        together: list[tuple[str, str, str]] = []
        for lang in (*_LANGUAGES, "auto"):
            rows = (
                captions(arguments.demo, lang, arguments.captions) if lang != "auto" else together
            )
            together += rows if lang != "auto" else []
            table = Path(folder, f"{lang}.csv")
            with table.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([("image", "text"), *(row[:2] for row in rows)])
            config = CheckConfig(lang=lang, images=images, **settings)
            print(
                lang, measure(arguments.demo, table, [row[2] for row in rows], config), flush=True
            )


if __name__ == "__main__":
    main()
