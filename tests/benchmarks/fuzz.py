"""Runs commands on thousands of damaged inputs: no traceback, no hang, no gigabytes.

    python tests/benchmarks/fuzz.py [--inputs 10000] [--seed 0] [--only TARGET …]

It calls `main` with tiny models. `TARGETS` lists what is damaged: rows of `predict --input`, half
of them with a damaged image, the command line, model folders, data, images, options and
translations. Every command must end with exit code 0, or with 1 or 2 and one line, and every row
must get one line of JSON or one row of CSV. A command that takes longer than a minute hangs. Prints
the number of inputs, the peak memory and the failures.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_world
from PIL import Image

from clseave_cli import main as command
from clseave_cli.core.config import ExportConfig
from clseave_cli.core.data.rows import BadRow, DelimitedRows
from clseave_cli.core.prediction.export import export

_ROWS_PER_FILE = 50
_HANG_SECONDS = 60
_NASTY = (
    "", " ", "\0", "\ud83d", "\udcff", "\u202e", "\u2028", "\ufeff", "é\u0301", "👩‍👩‍👧‍👧", "[SEP]",
    "<|endoftext|>", "</s>", "a" * 5000, "漢" * 2000, "../../etc/passwd", "/dev/zero", "/dev/stdin",
    "C:\\x", "%s%n", "{}", "[bold]", "-1", "NaN", "1e999", "null", "\r\n", "\t", "𝕬", "ﷺ" * 300,
)  # fmt: skip


class Fuzzer:
    """Damages inputs at random."""

    def __init__(self, seed: int, world: Path) -> None:
        self.random = random.Random(seed)
        self.images = [path.read_bytes() for path in sorted((world / "images").iterdir())[:4]]
        for kind in ("JPEG", "GIF", "WEBP", "BMP"):
            for mode in ("RGB", "L"):
                content = io.BytesIO()
                Image.effect_noise((40, 30), 90).convert(mode).save(content, kind)
                self.images.append(content.getvalue())

    def text(self) -> str:
        """An ordinary, nasty or arbitrary string."""
        kind = self.random.random()
        if kind < 0.3:
            return "The square is red."
        if kind < 0.6:
            return self.random.choice(_NASTY) + self.random.choice(_NASTY)
        if kind < 0.7:
            return "".join(self.random.choices(string.printable, k=self.random.randrange(60)))
        points = (self.random.randrange(0x110000) for _ in range(self.random.randrange(40)))
        return "".join(map(chr, points))

    def value(self, depth: int = 0) -> object:
        """Any JSON value."""
        simple = [None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), self.text()]
        if depth < 3 and self.random.random() < 0.3:
            return [self.value(depth + 1) for _ in range(self.random.randrange(3))]
        if depth < 3 and self.random.random() < 0.3:
            return {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(3))}
        return self.random.choice(simple)

    def damage(self, content: bytes) -> bytes:
        """The bytes with changes, deletions and repetitions, or truncated."""
        changed = bytearray(content)
        for _ in range(self.random.choice((1, 1, 2, 5, 20))):
            place = self.random.randrange(len(changed) + 1)
            end = place + self.random.choice((1, 1, 2, 4, 50))
            match self.random.randrange(6):
                case 0 | 1:
                    changed[place:end] = self.random.randbytes(end - place)
                case 2:
                    del changed[place:end]
                case 3:
                    changed[place:place] = changed[place:end] * self.random.choice((1, 3, 100))
                case 4:
                    del changed[place:]
                case 5:
                    changed[place:end] = self.random.choice((b"\0", b"\xff", b'"', b"\n")) * 4
        return bytes(changed)

    def line(self, row: dict[str, object]) -> bytes:
        """A row as JSON: whole, with another value, or with damaged bytes."""
        if self.random.random() < 0.3:
            row = row | {self.random.choice(list(row)): self.value()}
        if self.random.random() < 0.05:
            row = dict(list(row.items())[1:])
        line = json.dumps(row, ensure_ascii=self.random.random() < 0.5)
        content = line.encode(errors="surrogatepass")
        return self.maybe(0.15, content).replace(b"\n", b" ")

    def maybe(self, share: float, content: bytes) -> bytes:
        """Damages a share of the contents."""
        return self.damage(content) if self.random.random() < share else content


class Run:
    """The fuzzing of one seed: inputs, exit codes and failures."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.folder = folder
        self.tried: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0
        self.world = tiny_world.write_world(folder / "world")
        self.runs, self.exported = folder / "runs", folder / "exported"
        sentences = tiny_world.sentences(self.world)
        clip = tiny_world.write_clip(folder / "clip", sentences)
        encoder = tiny_world.write_encoder(folder / "encoder", sentences)
        tiny_world.train_teacher(self.world, self.runs, clip, head="patches")
        tiny_world.quick_align(self.world, self.runs, self.runs, encoder, "de", epochs=2)
        export(ExportConfig(runs=self.runs, out=self.exported))
        self.fuzzer = Fuzzer(seed, self.world)

    def command(self, kind: str, num_inputs: int, arguments: list[object]) -> tuple[int, str]:
        """Runs `clseave` and records failures; returns exit code and stdout."""
        self.tried[kind] += num_inputs
        out, err = _Captured(), _Captured()
        sys.argv = ["clseave", *map(str, arguments)]
        code, begin = 0, time.perf_counter()
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                code = -1
                print(f"Traceback: {error!r}", file=err)
        faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        message = err.text()
        self.ended[f"{kind.split()[0]} exit {code}"] += 1
        lines = [line for line in message.splitlines() if line.startswith("clseave: ")]
        if (
            code not in (0, 1, 2)
            or any(word in message for word in ("Traceback", "internal error", "Warning"))
            or (code and len(lines) != 1 and "Usage:" not in message)
        ):
            self.failures.append(f"{kind}: exit {code}: {message[-600:]!r}\n    {arguments!r:.600}")
        return code, out.text()

    def predict_rows(self) -> None:
        """A file of rows, half of which name a damaged image."""
        fuzzer, folder = self.fuzzer, self.folder / "rows"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rows = []
        for number in range(_ROWS_PER_FILE):
            name: str = fuzzer.random.choice((str(self.world / "images/test0.png"), fuzzer.text()))
            if fuzzer.random.random() < 0.5:
                name = f"{number}.{fuzzer.random.choice(('png', 'jpg', 'x'))}"
                (folder / name).write_bytes(fuzzer.damage(fuzzer.random.choice(fuzzer.images)))
            rows.append({"image": name, "hypothesis": fuzzer.text()})
        is_csv = fuzzer.random.random() < 0.25
        if is_csv:
            cells = (f"{row['image']},{row['hypothesis']}\n" for row in rows)
            content = "".join(["image,hypothesis\n", *cells]).encode(errors="surrogatepass")
            content = fuzzer.maybe(0.5, content)
        else:
            content = b"\n".join(fuzzer.line(row) for row in rows)
        source = folder / f"pairs.{'csv' if is_csv else 'jsonl'}"
        target = folder / fuzzer.random.choice(("answers.jsonl", "answers"))
        source.write_bytes(content)
        lang = fuzzer.random.choice(("en", "de"))
        arguments = ["predict", "--input", source, "--output", target, "--runs", self.runs]
        kind = f"predict rows, {'CSV' if is_csv else 'JSONL'}"
        code, _ = self.command(kind, len(rows), [*arguments, "--lang", lang, "--json"])
        if code == 0:
            if is_csv and target.suffix == "":
                answers = list(DelimitedRows(target.open("rb"), "surrogateescape"))
                if any(isinstance(row, BadRow) for _, row, _ in answers):
                    self.failures.append(f"{kind}: a row of the answers is no CSV")
            else:
                answers = [json.loads(line) for line in target.read_bytes().split(b"\n")[:-1]]
            expected = sum(bool(line.strip()) for line in content.split(b"\n"))
            if not is_csv and len(answers) != expected:
                self.failures.append(f"{kind}: {len(answers)} answers to {expected} rows")
        elif not is_csv:
            self.failures.append(f"{kind}: refused as a whole")

    def predict_pair(self) -> None:
        """One pair on the command line."""
        fuzzer = self.fuzzer
        image = str(self.folder / "image.png")
        Path(image).write_bytes(fuzzer.damage(fuzzer.random.choice(fuzzer.images)))
        # No argument can hold a NUL, and `-x` would be a flag.
        words = [
            os.fsdecode(fuzzer.text().encode(errors="replace")).replace("\0", "").lstrip("-")
            for _ in range(2)
        ]
        image = fuzzer.random.choice((image, words[0], str(self.world / "images/test0.png")))
        more = fuzzer.random.choice(([], ["--json"], ["--lang", "de"], ["--lang", words[0]]))
        arguments = ["predict", "--runs", self.runs, *more, "--", image, words[1]]
        self.command("predict pair", 1, arguments)

    def copy(self, source: Path, name: str) -> Path:
        """A fresh copy of a folder, to be damaged."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(source, target)

    def damage_one(self, files: list[Path]) -> None:
        """Damages one of the files; JSON may get another value instead."""
        path = self.fuzzer.random.choice(sorted(files))
        content = path.read_bytes()
        if path.suffix == ".json" and self.fuzzer.random.random() < 0.5:
            document = json.loads(content)
            document[self.fuzzer.random.choice(list(document))] = self.fuzzer.value()
            path.write_bytes(json.dumps(document).encode(errors="surrogatepass"))
        else:
            path.write_bytes(self.fuzzer.damage(content))

    def model(self) -> None:
        """A damaged model folder, exported or not; half of them are sealed again."""
        exported = self.fuzzer.random.random() < 0.4
        runs = self.copy(self.exported if exported else self.runs, "damaged")
        self.damage_one([p for p in runs.rglob("*") if p.is_file() and "training" not in p.parts])
        if self.fuzzer.random.random() < 0.5:
            for path in [*runs.glob("config.json"), *runs.glob("*/config.json")]:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    tiny_world.reseal(path.parent, json.loads(path.read_bytes())["format"])
        image = self.world / "images" / "test0.png"
        arguments = ["predict", image, "Das ist rot.", "--lang", "de", "--runs", runs]
        self.command(f"{'exported' if exported else 'model'} folder", 1, arguments)

    def damaged_data(self, *splits: str) -> tuple[str, Path]:
        """A kind of damage, and a copy of the world with it."""
        fuzzer, data = self.fuzzer, self.copy(self.world, "data")
        kind = fuzzer.random.choice(("rows", "rows", "bytes", "csv", "image", "parquet"))
        split = fuzzer.random.choice(splits)
        path = data / f"snli_ve_{split}.jsonl"
        rows = tiny_world.read_jsonl(path)
        if kind == "rows":
            path.write_bytes(b"\n".join(fuzzer.line(row) for row in rows))
        elif kind == "bytes":
            self.damage_one(list(data.glob(f"*{split}*.jsonl")))
        elif kind == "csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            path.with_suffix(".csv").write_bytes(fuzzer.damage("\n".join(lines).encode()))
            path.unlink()
        elif kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
            self.damage_one([path.with_suffix(".parquet")])
            path.unlink()
        else:
            name = fuzzer.random.choice(sorted((data / "images").iterdir()))
            name.write_bytes(fuzzer.damage(fuzzer.random.choice(fuzzer.images)))
        return kind, data

    def evaluate(self) -> None:
        """Damaged data, images or options."""
        kind, data = self.damaged_data("test")
        options = self.folder / "options.toml"
        content = b"resamples = 5\nlang = ['en', 'de']\nsplit = 'test'\nskip-bad = true\n"
        options.write_bytes(self.fuzzer.maybe(0.2, content))
        arguments = ["evaluate", "--data", data, "--runs", self.runs, "--config", options]
        self.command(f"evaluate {kind}", 1, [*arguments, "--json"])

    def align(self) -> None:
        """Damaged training data, for one epoch."""
        kind, data = self.damaged_data("train", "dev")
        skip = self.fuzzer.random.choice(([], ["--skip-bad"]))
        out = self.folder / "align-de"
        for path in (out, out.with_name("align-de.partial")):
            shutil.rmtree(path, ignore_errors=True)
        quick = [f"--{key.replace('_', '-')}={value}" for key, value in tiny_world.QUICK.items()]
        arguments = ["align", "--lang", "de", "--data", data, "--runs", self.runs, "--out", out]
        arguments += ["--student", self.folder / "encoder", "--epochs", 1, *quick, *skip]
        self.command(f"align {kind}", 1, arguments)

    def published(self) -> None:
        """A file in a published layout."""
        fuzzer, names = self.fuzzer, [f"test{n}.png" for n in range(4)]
        documents: list[object] = [
            {"images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
             "annotations": [{"image_id": n, "caption": fuzzer.text()} for n in range(4)]},
            {n: {"filename": name, "caption": "Red.", "negative_caption": fuzzer.text()}
             for n, name in enumerate(names)},
            [{"filename": name, "sentence": fuzzer.text(), "label": "neutral"} for name in names],
            [{"image/key": "0", "en": {"caption": [fuzzer.text()]}, "id": fuzzer.value()}],
        ]  # fmt: skip
        content = json.dumps(fuzzer.random.choice(documents)).encode()
        path = self.folder / "published" / "test.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(fuzzer.maybe(0.7, content))
        arguments = ["evaluate", "--data", "test.json", "--images", self.world / "images"]
        with contextlib.chdir(path.parent):
            shutil.rmtree("data", ignore_errors=True)
            self.command("published", 1, [*arguments, "--runs", self.runs, "--resamples", 5])

    def translate(self) -> None:
        """Damaged rows, or a damaged file of translations."""
        kind, data = self.damaged_data("test")
        rows = tiny_world.read_jsonl(self.world / "snli_ve_test.jsonl")
        translations = self.folder / "translations.tsv"
        # One malformed text would have the whole file refused.
        texts = [self.fuzzer.text().encode(errors="replace").decode() for _ in rows]
        texts = [" ".join(text.replace('"', "").split()) or "Rouge." for text in texts]
        lines = [f"{row['pairID']}\t{text}" for row, text in zip(rows, texts, strict=True)]
        content = "\n".join(["pairID\ttranslation", *lines]).encode()
        translations.write_bytes(self.fuzzer.maybe(0.2, content))
        (self.folder / "memory.sqlite").unlink(missing_ok=True)
        suspect = self.fuzzer.random.choice(("keep", "drop", "retry"))
        arguments = ["translate", "--lang", "fr", "--data", data, "--split", "test"]
        arguments += ["--engine", "file", "--translations", translations]
        arguments += ["--memory", self.folder / "memory.sqlite"]
        self.command(f"translate {kind}", 1, [*arguments, "--on-suspect", suspect])


#: What is damaged, and the weight with which it is chosen.
TARGETS: dict[str, tuple[Callable[[Run], None], int]] = {
    "rows": (Run.predict_rows, 3),
    "pair": (Run.predict_pair, 8),
    "model": (Run.model, 4),
    "evaluate": (Run.evaluate, 5),
    "align": (Run.align, 3),
    "translate": (Run.translate, 5),
    "published": (Run.published, 5),
}


class _Captured(io.TextIOWrapper):
    """Captures stdout or stderr."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLSEAVE_CACHE"] = str(Path(folder, "cache"))
        run = Run(arguments.seed, Path(folder))
        targets, weights = zip(*(TARGETS[name] for name in arguments.only), strict=True)
        while run.tried.total() < arguments.inputs:
            run.fuzzer.random.choices(targets, weights)[0](run)
    for kind, count in sorted(run.tried.items()):
        print(f"{count:6} {kind}")
    for ending, count in sorted(run.ended.items()):
        print(f"{count:6} commands: {ending}")
    seconds = time.perf_counter() - begin
    print(
        f"seed {arguments.seed}: {run.tried.total()} inputs in {seconds:.0f} s, "
        f"the slowest command {run.slowest:.1f} s, at most "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, "
        f"{len(run.failures)} failures"
    )
    for failure in run.failures[:20]:
        print("  " + failure)
    sys.exit(bool(run.failures))


if __name__ == "__main__":
    main()
