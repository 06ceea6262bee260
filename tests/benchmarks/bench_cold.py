"""One prediction from a cold start: torch's path beside an exported folder, full-size shapes.

    python tests/benchmarks/bench_cold.py --runs RUNS --exported DIR [--exported DIR] --image FILE

Runs `clseave predict IMAGE … --lang LANG` in processes of their own, each path in turn, after one
unmeasured round that fills the page cache. Prints the median wall time and the peak memory: the
resident set's high-water mark, and how much of it is private (not pages of the model file that the
system may drop and other processes share).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

_CHILD = """
import sys
from clseave_cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon")}
kib["heavy"] = "torch" in sys.modules or "transformers" in sys.modules
import json
print(json.dumps(kib), file=sys.stderr)
"""


def predict(runs: Path, image: Path, lang: str) -> tuple[float, dict[str, int]]:
    """Seconds from start to exit, and what the process said of its memory."""
    command = ["predict", str(image), "Ein Hund läuft durch den Park.", "--lang", lang]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *command, "--runs", str(runs)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - begin
    return seconds, json.loads(done.stderr.splitlines()[-1])


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--exported", type=Path, action="append", required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--lang", default="de")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folders = [arguments.runs, *arguments.exported]
    seen: dict[Path, list[tuple[float, dict[str, int]]]] = {folder: [] for folder in folders}
    for number in range(arguments.rounds + 1):
        for folder in folders:
            outcome = predict(folder, arguments.image, arguments.lang)
            if number:
                seen[folder].append(outcome)
    peak_of_torch = seen[arguments.runs][0][1]["VmHWM"]
    for folder, outcomes in seen.items():
        times = sorted(seconds for seconds, _ in outcomes)
        peak = max(kib["VmHWM"] for _, kib in outcomes)
        print(
            f"{folder.name:<12} {statistics.median(times):.2f} s "
            f"({times[0]:.2f} – {times[-1]:.2f}) · peak {peak / 1024:.0f} MiB, "
            f"{100 * peak / peak_of_torch:.0f} % of torch's · "
            f"private {max(kib['RssAnon'] for _, kib in outcomes) / 1024:.0f} MiB · "
            f"torch or transformers imported: {bool(outcomes[0][1]['heavy'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
