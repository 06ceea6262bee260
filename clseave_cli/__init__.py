"""clseave: cross-lingual visual entailment.

Given a photo and a sentence in any language: does the photo entail it, contradict it, or leave it
open? The command line is `clseave`; from Python, start with `VisualEntailment`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clseave_cli.version import __version__

if TYPE_CHECKING:
    from clseave_cli.core.prediction.predictor import Prediction, VisualEntailment

__all__ = ["Prediction", "VisualEntailment", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must not pull torch in.
    if name in ("Prediction", "VisualEntailment"):
        from clseave_cli.core.prediction import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
