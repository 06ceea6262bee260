"""A few steps at full size: ViT-B/16 and mBERT architectures, random weights, real vocabularies.

    python tests/benchmarks/bench_full_size.py --clip-vocabulary DIR --bert-vocabulary FILE \\
        --pictures DIR --sentences DIR --out DIR

DIR of `--clip-vocabulary` holds CLIP's vocab.json and merges.txt; FILE is mBERT's vocab.txt.
`--pictures` is an SNLI-VE folder for `finetune-ve`, `--sentences` one of parallel text for `align`
(`--split`, `--lang`). Prints what each stage took, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig
from clseave_cli.core.finetuning import finetune


def write_clip(folder: Path, vocabulary: Path, **layers: int) -> None:
    """CLIP ViT-B/16 as its configuration defines it, or with fewer layers; random weights."""
    tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    config = CLIPConfig(
        text_config=layers, vision_config={"patch_size": 16, **layers}, projection_dim=512
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def write_bert(folder: Path, vocabulary: Path, **shape: Any) -> None:
    """mBERT (cased) with random weights, or a BERT of another shape with its vocabulary."""
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=False)
    config = BertConfig(vocab_size=len(tokenizer), **shape)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Runs the stages and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("clip-vocabulary", "bert-vocabulary", "pictures", "sentences", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--split", default="sick")
    parser.add_argument("--lang", default="nl")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    out = arguments.out
    os.environ.setdefault("CLSEAVE_CACHE", str(out / "cache"))

    def timed(name: str, work: object) -> None:
        begin = time.perf_counter()
        result = work()  # type: ignore[operator]
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        training = getattr(result, "training", None)
        rate = f" · {training.pairs_per_second:.1f} pairs/s" if training else ""
        print(f"{name:<28} {seconds:7.1f} s{rate} · peak {peak:.2f} GiB so far", flush=True)

    print(f"torch {torch.__version__} · transformers {transformers.__version__}")
    timed("write CLIP ViT-B/16", lambda: write_clip(out / "clip", arguments.clip_vocabulary))
    timed("write mBERT", lambda: write_bert(out / "mbert", arguments.bert_vocabulary))
    timed(
        f"finetune-ve, {arguments.steps} steps",
        lambda: finetune(
            FinetuneConfig(
                data=str(arguments.pictures),
                clip=str(out / "clip"),
                runs=out,
                max_steps=arguments.steps,
            )
        ),
    )
    timed(
        f"align {arguments.lang}, {arguments.steps} steps",
        lambda: align(
            AlignConfig(
                data=str(arguments.sentences),
                lang=(arguments.lang,),
                student=str(out / "mbert"),
                runs=out,
                train_split=arguments.split,
                max_steps=arguments.steps,
            )
        ),
    )


if __name__ == "__main__":
    main()
