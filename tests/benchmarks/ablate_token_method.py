"""What each fault of the thesis's token method costs, on the mini-VE world.

    python tests/benchmarks/ablate_token_method.py --demo DIR --out DIR [--lang de] [--seed 0 …]

DIR is what `clseave demo --out DIR` left; of it the data, runs/clip-ve and runs/encoder are read.
Trains the faithful method, the faithful one with one fault removed, the repaired one, the repaired
one with one fault put back, the sentence method and both losses together, and prints accuracy on
test, its ratio to English and the share of the most frequent answer as a Markdown table. What is
finished is not trained again.

The students start from an encoder 1.5 times as wide as the teacher, as mBERT is as wide as CLIP, so
that padding and autoencoder have something to do.

That encoder is untrained, and an untrained encoder aligns words by chance. So the words are aligned
by IBM Model 1 (Brown et al. 1993), in both directions, and the links handed to `align` as Pharaoh
files, as those of any other aligner would be. One row says what the untrained encoder's own links
do. A language without spaces needs the extra `segment`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clseave_cli.core.alignment import align
from clseave_cli.core.alignment.autoencoding import autoencode
from clseave_cli.core.alignment.links import Links
from clseave_cli.core.alignment.words import split_words
from clseave_cli.core.config import AlignConfig, AutoencodeConfig, EvaluateConfig
from clseave_cli.core.data.mini_ve.grammar import LANGUAGES
from clseave_cli.core.data.records import ENGLISH, join, read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.models.scratch import new_encoder

_ROUNDS = 10

FAITHFUL: dict[str, Any] = {
    "method": "token",
    "code": "relu",
    "terminal_pair": False,
    "sentence_token": "pooler",
    "token_target": "encoder",
    "token_reader": "code",
    "pretrained_code": True,
    "select": "mse",
}
REPAIRED: dict[str, Any] = {
    "method": "token",
    "code": "linear",
    "terminal_pair": True,
    "sentence_token": "terminal",
    "token_target": "normalised",
    "token_reader": "projection",
    "pretrained_code": False,
    "select": "accuracy",
}
FAULTS = {
    "ReLU code": "code",
    "no terminal pair": "terminal_pair",
    "read at the pooling layer": "sentence_token",
    "code straight to the head": "token_reader",
    "states before the last normalisation": "token_target",
    "code from the autoencoder": "pretrained_code",
    "chosen by dev error": "select",
}


def variants() -> dict[str, dict[str, Any]]:
    """What is trained, by the name of its row."""
    rows = {"token, faithful": FAITHFUL}
    for fault, option in FAULTS.items():
        rows[f"faithful without: {fault}"] = FAITHFUL | {option: REPAIRED[option]}
    rows["faithful, read at [CLS] itself"] = FAITHFUL | {"sentence_token": "cls"}
    # The other two readers of the thesis's section 4.1.
    rows["faithful, read by padded weights"] = FAITHFUL | {"token_reader": "padded"}
    rows["faithful, read through the decoder"] = FAITHFUL | {"token_reader": "decoder"}
    rows["token, repaired"] = REPAIRED
    for fault, option in FAULTS.items():
        rows[f"repaired with: {fault}"] = REPAIRED | {option: FAITHFUL[option]}
    rows["repaired, read by padded weights"] = REPAIRED | {"token_reader": "padded"}
    rows["repaired, read through the decoder"] = REPAIRED | {
        "token_reader": "decoder",
        "pretrained_code": True,
    }
    # Without pairs of terminal tokens the untrained encoder's links are all there is to learn from.
    rows["faithful, words aligned by chance"] = FAITHFUL | {"alignments": None}
    rows["repaired, words aligned by chance"] = REPAIRED | {"alignments": None}
    rows["sentence"] = {"method": "sentence", "alignments": None}
    rows["sentence+token"] = REPAIRED | {"method": "sentence+token"}
    return rows


def ibm_model_1(sources: Sequence[list[int]], targets: Sequence[list[int]]) -> np.ndarray:
    """(pairs × words of source × words of target, flattened) each word's share in explaining one.

    Expectation maximisation of t(target word | source word), without a null word.
    """
    both = list(zip(sources, targets, strict=True))
    pair = np.repeat(np.arange(len(both)), [len(s) * len(t) for s, t in both])
    source = np.concatenate([np.repeat(s, len(t)) for s, t in both])
    target = np.concatenate([np.tile(t, len(s)) for s, t in both])
    place = np.concatenate([np.tile(np.arange(len(t)), len(s)) for s, t in both])
    _, together = np.unique(source << 32 | target, return_inverse=True)
    _, explained = np.unique(pair << 32 | place, return_inverse=True)
    probability = np.ones(together.max() + 1)
    for _ in range(_ROUNDS):
        share = probability[together]
        share /= np.bincount(explained, share)[explained]
        of_source = np.bincount(source, share)
        counts = np.bincount(together, share)
        first = np.unique(together, return_index=True)[1]
        probability = counts / of_source[source[first]]
    share = probability[together]
    return share / np.bincount(explained, share)[explained]


def statistical_links(sources: list[list[str]], targets: list[list[str]]) -> Links:
    """Words that explain each other best in both directions."""
    numbered = []
    for side in (sources, targets):
        known: dict[str, int] = {}
        numbered.append([[known.setdefault(word, len(known)) for word in words] for words in side])
    forward, backward = ibm_model_1(*numbered), ibm_model_1(*reversed(numbered))
    words, offsets, start = [], [0], 0
    for source, target in zip(*numbered, strict=True):
        size = len(source) * len(target)
        there = forward[start : start + size].reshape(len(source), len(target))
        back = backward[start : start + size].reshape(len(target), len(source)).T
        start += size
        best = np.zeros(there.shape, dtype=bool)
        best[there.argmax(axis=0), np.arange(len(target))] = True
        mutual = np.zeros(there.shape, dtype=bool)
        mutual[np.arange(len(source)), back.argmax(axis=1)] = True
        words.append(np.argwhere(best & mutual))
        offsets.append(offsets[-1] + len(words[-1]))
    flat = np.concatenate(words)
    return Links(flat, np.ones(len(flat), dtype=bool), np.array(offsets))


def write_links(data: Path, lang: str, path: Path) -> None:
    """A Pharaoh file for the training split of a language."""
    text = join(read_split(data, "train", lang), read_split(data, "train", ENGLISH))
    sides = []
    for sentences, code in ((text.sources, ENGLISH), (text.target.hypotheses, lang)):
        words = split_words(sentences, code)
        # A full stop written onto a word would make another word of it.
        sides.append([[w.strip(".。,") or w for w in words.of(i)] for i in range(len(words))])
    lines = [""] * text.target.num_lines
    for line, links in zip(text.target.lines, statistical_links(*sides).lines(), strict=True):
        lines[line - 1] = links
    path.write_text("".join(f"{line}\n" for line in lines))


def prepare(demo: Path, out: Path, languages: tuple[str, ...], seed: int) -> None:
    """The encoder, word links of every language and both autoencoders, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "encoder").exists():
        splits = [read_split(demo / "data", "train", lang).hypotheses for lang in LANGUAGES]
        new_encoder(out / "encoder", itertools.chain(*splits), width=192, num_heads=6, seed=seed)
    for lang in languages:
        if not (out / f"{lang}.links").exists():
            write_links(demo / "data", lang, out / f"{lang}.links")
    for code in ("relu", "linear"):
        config = AutoencodeConfig(
            data=str(demo / "data"), runs=demo / "runs", lang=languages,
            student=str(out / "encoder"), out=out / f"autoencoder-{code}", code=code,
            seed=seed, device="cpu", resume=True, **AutoencodeConfig.PRESETS["mini-ve"],
        )  # fmt: skip
        autoencode(config)


def train_and_measure(
    demo: Path, out: Path, lang: str, seed: int, name: str, options: dict[str, Any]
) -> dict[str, float]:
    """One student's accuracy on test and share of the most frequent answer; English's accuracy."""
    runs = out / lang / re.sub("[:,]", "", name).replace(" ", "-")
    finished = runs / "result.json"
    if finished.is_file():
        return json.loads(finished.read_text())
    runs.mkdir(parents=True, exist_ok=True)
    if not (runs / "clip-ve").exists():
        (runs / "clip-ve").symlink_to((demo / "runs" / "clip-ve").resolve())
    config = AlignConfig(
        data=str(demo / "data"),
        runs=runs,
        lang=(lang,),
        student=str(out / "encoder"),
        seed=seed,
        device="cpu",
        resume=True,
        **AlignConfig.PRESETS["mini-ve"]
        | {"alignments": out / "{lang}.links"}
        | {"autoencoder": out / f"autoencoder-{options.get('code')}"}
        | options,
    )
    begin = time.monotonic()
    align(config)
    seconds = time.monotonic() - begin
    measured = evaluate(
        EvaluateConfig(
            data=str(demo / "data"), runs=(runs,), lang=("en", lang), resamples=10, device="cpu"
        )
    )
    english, found = measured.results
    result = {
        "accuracy": found.accuracy,
        "english": english.accuracy,
        "most_frequent": found.most_frequent,
        "seconds": seconds,
    }
    finished.write_text(json.dumps(result))
    print(f"{name}, {lang}, seed {seed}: {result}", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, nargs="+", required=True, help="one for each seed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lang", nargs="+", default=["de"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="names of rows")
    given = parser.parse_args()
    demos = given.demo if len(given.demo) > 1 else given.demo * len(given.seed)
    languages = tuple(given.lang)
    runs = [(d, given.out / f"seed{s}", s) for d, s in zip(demos, given.seed, strict=True)]
    for demo, out, seed in runs:
        prepare(demo, out, languages, seed)
    print(f"| | {' | '.join(languages)} | ratio to English | most frequent answer | seconds |")
    print("|---|" + "---|" * (len(languages) + 3))
    for name, options in variants().items():
        if given.only and name not in given.only:
            continue
        found = {
            lang: [
                train_and_measure(demo, out, lang, seed, name, options) for demo, out, seed in runs
            ]
            for lang in languages
        }
        every = [result for results in found.values() for result in results]
        ratios = [result["accuracy"] / result["english"] for result in every]
        cells = [spread([result["accuracy"] for result in found[lang]]) for lang in languages]
        seconds = statistics.mean(result["seconds"] for result in every)
        cells += [spread(ratios), spread([result["most_frequent"] for result in every])]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def spread(values: list[float]) -> str:
    """The values in percent, the lowest and the highest where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f}–{100 * max(values):.1f})"


if __name__ == "__main__":
    main()
