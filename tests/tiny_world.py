"""A world of coloured squares and models to match, small enough to train within a test."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: Part of every caption, which no model may read.
CAPTION = "xylophone caption"

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "white": (250, 250, 250),
}
#: For each language a sentence about the square, one about something else, and the colours' names.
_SENTENCES = {
    "en": ("The square is {}.", "A dog waits outside.", "red green blue white"),
    "de": ("Das Quadrat ist {}.", "Draußen wartet ein Hund.", "rot grün blau weiß"),
    "nl": ("Het vierkant is {}.", "Buiten wacht een hond.", "rood groen blauw wit"),
    "zh": ("方块是{}的。", "一只狗在外面等着。", "红色 绿色 蓝色 白色"),
}

_TOWER = {"width": 32, "num_layers": 1, "num_heads": 2}
CLIP_SHAPE = _TOWER | {"image_size": 32, "patch_size": 16, "embedding_dim": 16, "max_tokens": 32,
                       "vocab_size": 600}  # fmt: skip
ENCODER_SHAPE = _TOWER | {"vocab_size": 300, "max_tokens": 48}

#: Options that make a stage quick.
QUICK = {"device": "cpu", "precision": "fp32", "batch_size": 8, "learning_rate": 2e-3}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit_row(path: Path, line: int, **changes: object) -> None:
    """Changes keys of one row of a JSONL file (line counted from 1); None removes the key."""
    rows = read_jsonl(path)
    rows[line - 1] |= changes
    rows[line - 1] = {key: value for key, value in rows[line - 1].items() if value is not None}
    write_jsonl(path, rows)


def write_world(
    folder: Path, images_per_split: int = 4, languages: Sequence[str] = ("en", "de", "nl")
) -> Path:
    """An SNLI-VE folder; every image has three rows, and train has twice the images."""
    random = np.random.default_rng(7)
    (folder / "images").mkdir(parents=True)
    for number, split in enumerate(("train", "train2", "dev", "test")):
        rows: list[tuple[str, str, int | None]] = []
        for image in range(images_per_split):
            colour, other = image % 4, (image + 1 + number) % 4
            if other == colour:
                other = (image + 1) % 4
            noise = random.integers(-20, 20, (32, 32, 3))
            pixels = np.clip(list(COLOURS.values())[colour] + noise, 0, 255).astype(np.uint8)
            name = f"{split}{image}.png"
            Image.fromarray(pixels).save(folder / "images" / name)
            rows += [(name, "entailment", colour), (name, "contradiction", other)]
            rows.append((name, "neutral", None))
        for lang in languages:
            suffix = "" if lang == "en" else f".{lang}"
            path = folder / f"snli_ve_{split.rstrip('2')}{suffix}.jsonl"
            about_square, about_dog, words = _SENTENCES.get(lang, _SENTENCES["en"])
            lines = [
                {
                    "pairID": f"{image}#{label[0]}",
                    "Flickr30K_ID": image,
                    "sentence1": f"{CAPTION} of {image}",
                    "sentence2": about_dog
                    if colour is None
                    else about_square.format(words.split()[colour]),
                    "gold_label": label,
                }
                for image, label, colour in rows
            ]
            if split == "train2":
                lines = read_jsonl(path) + lines
            if lang == "de":
                lines.reverse()  # languages are joined by pairID, never by line
            write_jsonl(path, lines)
    return folder


def sentences(folder: Path) -> list[str]:
    """All training sentences, every language."""
    return [
        row["sentence2"]
        for path in sorted(folder.glob("snli_ve_train*.jsonl"))
        for row in read_jsonl(path)
    ]


def png(width: int, height: int, rows: bytes = bytes(1000)) -> bytes:
    """A PNG whose header may promise more pixels than `rows` holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(rows, 9)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def write_clip(folder: Path, sentences: list[str], **shape: int) -> Path:
    """A tiny untrained CLIP; `shape` replaces parts of CLIP_SHAPE."""
    from clseave_cli.core.models.scratch import ClipShape, new_clip

    new_clip(folder, sentences, ClipShape(**CLIP_SHAPE | shape))
    enlarge_weights(folder, 3.0)
    return folder


def write_encoder(folder: Path, sentences: list[str], **shape: int) -> Path:
    """A tiny untrained BERT; `shape` replaces parts of ENCODER_SHAPE."""
    from clseave_cli.core.models.scratch import new_encoder

    new_encoder(folder, sentences, **ENCODER_SHAPE | shape)
    return folder


def labelled_pairs(
    data: Path, lang: str = "en", split: str = "test"
) -> tuple[list[tuple[Path, str]], list[str]]:
    """(image, sentence) of every row of a split, and the labels."""
    rows = read_jsonl(data / f"snli_ve_{split}{'' if lang == 'en' else f'.{lang}'}.jsonl")
    pairs = [(data / "images" / row["Flickr30K_ID"], row["sentence2"]) for row in rows]
    return pairs, [row["gold_label"] for row in rows]


def quick_finetune(data: Path, runs: Path, clip: Path, **options: Any) -> Any:
    """`finetune-ve` for two epochs; `options` may hold `progress`."""
    from clseave_cli.core.config import FinetuneConfig
    from clseave_cli.core.finetuning import finetune
    from clseave_cli.progress import SILENT

    progress = options.pop("progress", SILENT)
    shared = {"data": str(data), "runs": runs, "clip": str(clip), "epochs": 2, **QUICK}
    return finetune(FinetuneConfig(**(shared | options)), progress)


def train_teacher(data: Path, runs: Path, clip: Path, head: str = "pooled") -> None:
    """A quick CLIP-VE in `runs`."""
    quick_finetune(data, runs, clip, head=head)


def enlarge_weights(folder: Path, factor: float) -> None:
    """Enlarges random weights, so that different sentences get clearly different embeddings."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if value.ndim > 1 and not name.endswith("projection.weight"):
            tensors[name] = factor * value
    save_file(tensors, path, {"format": "pt"})


def quick_align(
    data: Path, runs: Path, trained: Path, encoder: Path, *languages: str, **options: Any
) -> Any:
    """`align` for an epoch against the teacher in `trained`; `options` may hold `progress`."""
    from clseave_cli.core.alignment import align
    from clseave_cli.core.config import AlignConfig
    from clseave_cli.progress import SILENT

    progress = options.pop("progress", SILENT)
    defaults = {"epochs": 1, "teacher": trained / "clip-ve", **QUICK}
    shared = {"data": str(data), "runs": runs, "lang": languages, "student": str(encoder)}
    return align(AlignConfig(**shared, **(defaults | options)), progress)


def stage_command(stage: str, data: Path, trained: Path, model: Path, *more: object) -> list[str]:
    """The command line of a stage that starts from a model; `align` trains on de and nl."""
    options = {
        "finetune-ve": ("--clip", model, "--patience", 9),
        "align": ("--student", model, "--teacher", trained / "clip-ve", "--lang", "de", "--lang",
                  "nl"),
        "pretrain": ("--clip", model),
    }[stage]  # fmt: skip
    shared = ("--data", data, "--device", "cpu", "--precision", "fp32")
    return [*map(str, (stage, *options, *shared, *more))]


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def metrics_of(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl without times."""
    return [
        {key: value for key, value in record.items() if key != "pairs_per_second"}
        for record in read_jsonl(folder / "metrics.jsonl")
    ]


def model_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a model folder's files without its card and its training record."""
    return {
        name: content
        for name, content in tree(folder).items()
        if not name.startswith("training/") and name != "README.md"
    }


def write_captions(world: Path, folder: Path, *languages: str) -> Path:
    """Captions of the world's photos, for `pretrain`, in English and other languages."""
    folder.mkdir()
    for split in ("train", "dev"):
        for suffix in ("", *(f".{lang}" for lang in languages)):
            rows = read_jsonl(world / f"snli_ve_{split}{suffix}.jsonl")
            captions = [{"image": r["Flickr30K_ID"], "caption": r["sentence2"]} for r in rows]
            write_jsonl(folder / f"captions_{split}{suffix}.jsonl", captions)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file of a model folder."""
    return {name: data for name, data in tree(folder).items() if name.endswith(".safetensors")}


def reseal(folder: Path, format_name: str, *, without: Sequence[str] = (), **changes: Any) -> None:
    """Seals a model folder again after its files, or keys of its config, were changed."""
    from clseave_cli.core.models.folder import seal

    config = json.loads((folder / "config.json").read_bytes()) | changes
    (folder / "config.json").unlink()
    (folder / "calibration.json").unlink(missing_ok=True)  # belongs to the model as it was
    for key in ("format", "format_version", "files", "fingerprint", "clseave_version", *without):
        config.pop(key, None)
    seal(folder, format_name, config)


def flip_byte(path: Path, place: float = 0.5) -> None:
    """Flips one bit of a file, at a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * place), len(content) - 1)] ^= 0x04
    path.write_bytes(content)


def record(patch: Any, owner: object, name: str, entry: Callable[..., Any]) -> list[Any]:
    """Replaces a function so that every call appends `entry` of its arguments to the list."""
    original, entries = getattr(owner, name), []

    def recording(*arguments, **more):
        entries.append(entry(*arguments, **more))
        return original(*arguments, **more)

    patch.setattr(owner, name, recording)
    return entries


@contextmanager
def interrupted_at(owner: object, name: str, number: int) -> Iterator[None]:
    """Ends the block, which must raise it, by Ctrl-C at a call (from 1) of a function."""
    import pytest

    calls = itertools.count(1)

    def interrupt(*_arguments, **_more):
        if next(calls) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        record(patch, owner, name, interrupt)
        yield


class Notes:
    """A `Progress` that records its notes."""

    def __init__(self) -> None:
        from clseave_cli.progress import SILENT

        self.lines: list[str] = []
        self.task = SILENT.task

    def note(self, message: str) -> None:
        self.lines.append(message)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def warm_processes() -> multiprocessing.context.ForkServerContext:
    """Processes forked from a server that has only loaded the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["clseave_cli.core.finetuning", "clseave_cli.core.alignment", "clseave_cli.main"]
    )
    return context


def slow_steps() -> None:
    """Makes every optimiser step of this process long enough to be interrupted."""
    import torch

    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing written
    step = torch.optim.AdamW.step

    def slow(*arguments, **more):
        time.sleep(0.03)
        return step(*arguments, **more)

    torch.optim.AdamW.step = slow


class Killed(BaseException):
    """Caught nowhere in the package."""


@contextmanager
def killed_at_step(number: int) -> Iterator[None]:
    """Ends a training in the block at an optimiser step (from 1), as a kill would."""
    import torch

    step, calls = torch.optim.AdamW.step, itertools.count(1)

    def dying(*arguments, **more):
        if next(calls) == number:
            raise Killed
        return step(*arguments, **more)

    torch.optim.AdamW.step = dying
    try:
        with suppress(Killed):
            yield
            raise AssertionError("the training ended before the step")
    finally:
        torch.optim.AdamW.step = step


def full_disk(*_arguments: object, **_more: object) -> None:
    """Replaces a function that writes, as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_files() -> None:
    """Limits the files of this process to 30 kB, as a full disk would."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def killed_while_saving() -> None:
    """Kills this process when it has written most of its first state."""
    from clseave_cli.core.training import checkpoint

    checkpoint.write_json = _kill_myself


def killed_while_publishing() -> None:
    """Kills this process when it has written most of its model."""
    from clseave_cli.core.training import run

    run.shutil.copyfile = _kill_myself


def _kill_myself(*_arguments) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class CommandProcess:
    """`clseave …` in a separate process that starts quickly, as it has torch already."""

    def __init__(
        self, *arguments: str, folder: Path, before: Callable[[], None] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self.process = warm_processes().Process(
            target=_command,
            args=(arguments, self._out, self._err, os.environ["CLSEAVE_CACHE"], before),
        )
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds or the process has ended."""
        deadline = time.monotonic() + 60
        while not condition() and self.alive:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.005)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def stderr(self) -> str:
        return self._err.read_text() if self._err.exists() else ""


def _command(
    arguments: tuple[str, ...], out: Path, err: Path, cache: str, before: Callable[[], None] | None
) -> None:
    from clseave_cli.main import main

    os.environ["CLSEAVE_CACHE"] = cache
    sys.argv = ["clseave", *arguments]
    with out.open("w") as sys.stdout, err.open("w", buffering=1) as sys.stderr:
        if before is not None:
            before()
        main()


def _join(rank: int, count: int, port: int) -> None:
    """Makes this process one of several, as `torchrun` would."""
    slow_steps()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def start_team(*arguments: str, folder: Path, count: int = 2) -> list[CommandProcess]:
    """`clseave …` in several processes that train together."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        CommandProcess(
            *arguments,
            folder=folder / f"process{rank}",
            before=functools.partial(_join, rank, count, port),
        )
        for rank in range(count)
    ]
