"""Starting from a student of another language, with little text, on the mini-VE world.

    python tests/benchmarks/bench_transfer.py --demo DIR --out DIR [--limit 100 300] [--seed 0]

DIR is what `clseave demo --out DIR` left with the same seed. For each language and number of
sentences it trains a student from scratch, with an auxiliary language, from the demo's student of
another language without and with its word vectors, and with each translator, and prints accuracy
on test as Markdown tables. What is finished is not trained again.

The demo's encoder is untrained and aligns words by chance, so the words are aligned by IBM Model 1
in the sentences that are trained on: as a lexicon file, and as links in place of the aligner's.
Japanese, Chinese and Korean need the extra `segment`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from ablate_token_method import statistical_links

from clseave_cli.core.alignment import align, transfer
from clseave_cli.core.alignment.corpus import limited
from clseave_cli.core.alignment.words import Words, split_words
from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.data.records import ENGLISH, join, read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.progress import SILENT

#: The language of the student that each starts from.
START = {"de": "nl", "nl": "de", "ja": "ko", "ko": "ja", "zh": "ja"}


class StatisticalAligner:
    """IBM Model 1 in place of an encoder's aligner."""

    digest = "IBM Model 1"

    def align(self, source: Words, target: Words, pairs: Any, **_: Any) -> Any:
        both = zip((source, target), pairs, strict=True)
        return statistical_links(*([bare(side, i) for i in rows] for side, rows in both))


def bare(words: Words, sentence: int) -> list[str]:
    """A full stop written onto a word would make another word of it."""
    return [word.strip(".。,") or word for word in words.of(sentence)]


def write_lexicon(data: Path, lang: str, limit: int, seed: int, path: Path) -> None:
    """Word pairs, the most frequent first, from the sentences that `--limit` takes."""
    training = join(read_split(data, "train", lang), read_split(data, "train", ENGLISH))
    target = limited(training, limit, seed, SILENT).target
    text = join(target, read_split(data, "train", START[lang]), START[lang])
    both = zip(*dict.fromkeys(zip(text.sources, target.hypotheses, strict=True)), strict=True)
    words = [split_words(side, code) for side, code in zip(both, (START[lang], lang), strict=True)]
    sides = [[bare(side, i) for i in range(len(side))] for side in words]
    links = statistical_links(*sides)
    counts = Counter(
        (sides[0][pair][i], sides[1][pair][j])
        for pair, (i, j) in zip(links.pairs, links.words, strict=True)
    )
    path.write_text(
        "".join(f"{source}\t{target}\n" for (source, target), _ in counts.most_common())
    )


def variants(runs: Path, lang: str, lexicon: Path, epochs: int) -> dict[str, dict[str, Any]]:
    """What is trained, by the name of its row."""
    begun = {"init_from": runs / f"align-{START[lang]}"}
    fitted = begun | {"translator": "lexicon", "translator_epochs": max(1, epochs // 4)}
    return {
        "from scratch": {},
        "auxiliary language": {"auxiliary": (START[lang],)},
        "all for one": begun,
        "the same, word vectors kept": begun | {"keep_embeddings": True},
        "translator, random": fitted | {"translator": "random"},
        "translator, lexicon file": fitted | {"lexicon": lexicon},
        "translator, linked words": fitted,
        "translator, words linked by chance": fitted,
    }


def measure(given: argparse.Namespace, lang: str, limit: int, name: str) -> float | None:
    """The accuracy of a student on test; None where it is not asked for."""
    if given.only and name not in given.only:
        return None
    data, runs = given.demo / "data", given.demo / "runs"
    out = given.out / f"{limit}-{lang}-{name}-{given.epochs}-{given.seed}".replace(" ", "-")
    result = out.with_suffix(".json")
    if not result.is_file():
        lexicon = given.out / f"{limit}-{lang}-{given.seed}.tsv"
        write_lexicon(data, lang, limit, given.seed, lexicon)
        options = AlignConfig.PRESETS["mini-ve"] | {"epochs": given.epochs}
        config = AlignConfig(
            data=str(data), runs=out, teacher=runs / "clip-ve", student=str(runs / "encoder"),
            lang=(lang,), limit=limit, seed=given.seed, device="cpu",
            **options | variants(runs, lang, lexicon, given.epochs)[name],
        )  # fmt: skip
        aligner = transfer.load_aligner
        if name == "translator, linked words":
            aligner = lambda *_: StatisticalAligner()  # noqa: E731
        with mock.patch.object(transfer, "load_aligner", aligner):
            align(config)
        (measured,) = evaluate(
            EvaluateConfig(
                data=str(data), runs=(runs,), students=out, lang=(lang,), resamples=10,
                device="cpu", precision="fp32",
            )
        ).results  # fmt: skip
        shutil.rmtree(out)
        result.write_text(json.dumps(measured.accuracy))
    return float(json.loads(result.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lang", nargs="+", default=list(START))
    parser.add_argument("--limit", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of rows")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for limit in given.limit:
        print(f"\n| {limit} sentences | {' | '.join(given.lang)} | gain |", flush=True)
        print("|---|" + "---|" * (len(given.lang) + 1))
        scratch = [measure(given, lang, limit, "from scratch") for lang in given.lang]
        for name in variants(Path(), given.lang[0], Path(), given.epochs):
            row = [measure(given, lang, limit, name) for lang in given.lang]
            gains = [a - b for a, b in zip(row, scratch, strict=True) if a is not None and b]
            if gains:
                cells = " | ".join(f"{100 * accuracy:.1f}" for accuracy in row)
                print(f"| {name} | {cells} | {100 * statistics.mean(gains):+.1f} |", flush=True)


if __name__ == "__main__":
    main()
