"""The three labels of visual entailment: names, order and ids."""

from __future__ import annotations

from typing import Literal

Label = Literal["entailment", "neutral", "contradiction"]

#: What a model answers: a label, or that it is not sure enough of one.
Answer = Literal["entailment", "neutral", "contradiction", "unsure"]

#: Label names by id: `LABELS[0]` is `entailment`. Logits follow this order everywhere.
LABELS: tuple[Label, ...] = ("entailment", "neutral", "contradiction")
LABEL_IDS: dict[str, int] = {name: index for index, name in enumerate(LABELS)}

#: Id of a row without a label (text-only data, or SNLI's `-`: no majority).
UNLABELLED = -1
