"""How well and how fast `check` judges: seeded contradictions, and the encoders alone.

    python tests/benchmarks/bench_check.py DEMO [--captions 300] [--min-confidence 0.7]

DEMO is a folder that `clseave demo` wrote. In each of its languages, of so many captions of test
pictures every third is contradicted by its picture. Prints precision and recall of the finding
`contradicts`, for the language given and for `--lang auto` (all languages in one table; needs the
extra langid), and the time of `check` beside that of the encoders over the same pairs.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from pathlib import Path

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.data.images import open_image
from clseave_cli.core.data.records import read_split
from clseave_cli.core.prediction.checking.findings import CheckResult, check
from clseave_cli.core.prediction.inference import load_model
from clseave_cli.labels import LABEL_IDS
from clseave_cli.processes import usable_cores

_LANGUAGES = ("en", "de", "nl", "ja", "zh", "ko")
