"""`predict` at full size with random weights: time of one cold answer, throughput of many.

    python tests/benchmarks/bench_predict.py cold --clip-vocabulary DIR --bert-vocabulary FILE \\
        --pictures DIR --out DIR [--exported DIR …]
    python tests/benchmarks/bench_predict.py batch …the same

The models are ViT-B/16 and mBERT, made once and kept in `--out`. DIR of `--clip-vocabulary` holds
CLIP's vocab.json and merges.txt, FILE is mBERT's vocab.txt, `--pictures` an SNLI-VE folder.

`cold`: processes that start, answer one question and end, with torch and with each exported folder,
in turn with bare processes that import torch and the two model classes and map the weights. The
first of each is dropped.
`batch`: `predict --input --output`, and the same modules on prepared tensors, in turn in a process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

LANG = "de"

_BARE = """
import sys, torch
from safetensors import safe_open
from transformers import CLIPVisionModelWithProjection, {text}
for path in sys.argv[1:]:
    with safe_open(path, "pt") as file:
        weights = [file.get_tensor(name) for name in file.keys()]
"""
_PREDICT = """
import sys
from clseave_cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""
_MEMORY = """
fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
peak, private = (int(fields[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon"))
print(f"peak {peak} MiB, private {private} MiB", file=sys.stderr)
"""


def models(arguments: argparse.Namespace) -> Path:
    """A CLIP-VE and a student of full size with random weights; made if they are missing."""
    runs = arguments.out / "runs"
    if (runs / f"align-{LANG}").is_dir():
        return runs
    from bench_training import write_bert, write_clip

    from clseave_cli.core.files import atomic_folder
    from clseave_cli.core.models.clip_ve import ClipVE
    from clseave_cli.core.models.student import new_student, save_student

    clip, mbert = arguments.out / "clip", arguments.out / "mbert"
    write_clip(clip, arguments.clip_vocabulary)
    write_bert(mbert, arguments.bert_vocabulary)
    teacher = ClipVE.from_clip(clip)
    with atomic_folder(runs / "clip-ve") as aside:
        teacher.save(aside)
    student = new_student(mbert, teacher.text.embedding_dim)
    with atomic_folder(runs / f"align-{LANG}") as aside:
        save_student(student, aside, languages=[LANG], teacher=teacher.fingerprint)
    return runs


def rows(arguments: argparse.Namespace, num_images: int, num_sentences: int) -> list[dict]:
    """Pairs from `--pictures`: each of `num_images` with `num_sentences` sentences."""
    from clseave_cli.core.data.images import ImageFolder
    from clseave_cli.core.data.records import read_split

    split, folder = read_split(arguments.pictures, "test"), ImageFolder.of(arguments.pictures, None)
    images = [folder.find(name, str(split.path)) for name in split.image_names[:num_images]]
    sentences = itertools.cycle(split.hypotheses)
    return [
        {"image": str(image), "hypothesis": next(sentences)}
        for image in images
        for _ in range(num_sentences)
    ]


def cold(arguments: argparse.Namespace) -> None:
    """Prints the seconds from start to exit, and peak and private memory."""
    runs = models(arguments)
    (row,) = rows(arguments, 1, 1)
    image = runs / "clip-ve" / "image" / "model.safetensors"
    for lang, text, weights in (
        (LANG, "BertModel", runs / f"align-{LANG}" / "encoder" / "model.safetensors"),
        ("en", "CLIPTextModelWithProjection", runs / "clip-ve" / "text" / "model.safetensors"),
    ):
        question = ["predict", row["image"], row["hypothesis"], "--lang", lang, "--json", "--runs"]
        commands = {"bare": [_BARE.format(text=text), image, weights]} | {
            folder.name: [_PREDICT, *question, folder] for folder in (runs, *arguments.exported)
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, str] = {}
        for repeat in range(arguments.repeats + 1):
            for name, command in commands.items():
                begin = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", command[0] + _MEMORY, *map(str, command[1:])],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                if repeat:
                    seconds[name].append(time.perf_counter() - begin)
                memory[name] = done.stderr.splitlines()[-1]
        for name, values in seconds.items():
            print(
                f"{lang} {name:<12} {statistics.median(values):6.2f} s "
                f"({min(values):.2f} to {max(values):.2f}, {arguments.repeats} runs; "
                f"{statistics.median(values) / statistics.median(seconds['bare']):.2f} of bare) · "
                f"{memory[name]}",
                flush=True,
            )


def batch(arguments: argparse.Namespace) -> None:
    """Prints pairs a second of `predict` and of the modules alone."""
    import torch
    import transformers

    from clseave_cli.core.config import PredictConfig
    from clseave_cli.core.data.images import open_image
    from clseave_cli.core.models.clip_ve import ClipVE
    from clseave_cli.core.models.student import load_student
    from clseave_cli.core.prediction.predictor import predict_file

    runs = models(arguments)
    print(f"torch {torch.__version__} · transformers {transformers.__version__}")
    student = load_student(runs / f"align-{LANG}")
    model = ClipVE.from_folder(runs / "clip-ve", text=student)
    for num_images, num_sentences in ((arguments.images, 18), (2 * arguments.images, 1)):
        pairs = rows(arguments, num_images, num_sentences)
        names = list(dict.fromkeys(pair["image"] for pair in pairs))
        sentences = [pair["hypothesis"] for pair in pairs]
        index = torch.tensor([names.index(pair["image"]) for pair in pairs])
        pixels = torch.cat([model.image.preprocess([open_image(Path(name))]) for name in names])
        tokens = student.tokenize(sentences)

        @torch.no_grad()
        def modules(pixels=pixels, tokens=tokens, index=index) -> None:
            images = torch.cat([model.image(part) for part in pixels.split(32)])
            model(torch.cat(list(student.embed(tokens, 256))), images[index]).softmax(1).tolist()

        with tempfile.TemporaryDirectory() as folder:
            files = (Path(folder, f"{name}.jsonl") for name in ("pairs", "answers", "empty"))
            source, target, empty = files
            source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            empty.touch()
            config = PredictConfig(runs=runs, lang=LANG, device="cpu", precision="fp32")
            work = {
                "modules": modules,
                "predict": partial(predict_file, config, source, target),
                "load": partial(predict_file, config, empty, target),
            }
            best = dict.fromkeys(work, float("inf"))
            for _ in range(arguments.repeats):
                for name, run in work.items():
                    begin = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - begin)
        best["predict"] -= best["load"]  # the modules are loaded already
        print(f"{len(pairs)} pairs on {len(names)} images:")
        for name in ("modules", "predict"):
            rate, share = len(pairs) / best[name], best["modules"] / best[name]
            print(f"  {name:<8} {rate:7.2f} pairs/s · {100 * share:5.1f} % of the modules alone")
        print(f"  loading  {best['load']:7.2f} s, not counted", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=("cold", "batch"))
    for name in ("clip-vocabulary", "bert-vocabulary", "pictures", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--exported", type=Path, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    {"cold": cold, "batch": batch}[arguments.benchmark](arguments)


if __name__ == "__main__":
    main()
