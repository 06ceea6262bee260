"""Writes findings in every output format, and as a page to review."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from clseave_cli.core.files import atomic_file
from clseave_cli.core.prediction.checking.findings import RULES, Checked, CheckResult
from clseave_cli.errors import UsageError
from clseave_cli.version import __version__

#: Characters that control a terminal or its text direction, or that XML does not allow.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufffe\uffff]"
)
_MARK = "<!-- clseave check: report -->"
#: Nobody reviews more findings by hand.
_MOST_ON_PAGE = 2000


def render(result: CheckResult, format: str) -> str:
    """The output of `--format`."""
    return {
        "text": _text, "json": _json, "jsonl": _json_lines, "junit": _junit, "sarif": _sarif,
        "github": _github,
    }[format](result)  # fmt: skip


def summary_line(result: CheckResult) -> str:
    counts: Any = result.summary()
    parts = [f"{counts['texts']} text{'s' if counts['texts'] != 1 else ''}"]
    parts += [f"{number} {name}" for name, number in counts["verdicts"].items()]
    parts += [
        f"{number} {name}"
        for name, number in counts["findings"].items()
        if name not in ("contradicts", "unsure")
    ]
    skipped = ", ".join(f"{number} {reason}" for reason, number in counts["skipped"].items())
    if skipped:
        parts.append(f"not judged: {skipped}")
    if counts["accepted"]:
        parts.append(f"{counts['accepted']} accepted before")
    return " · ".join(parts)


def _visible(text: str) -> str:
    return _CONTROLS.sub("�", text)


def _short(text: str, length: int) -> str:
    text = _visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _by_file(texts: list[Checked]) -> Iterator[tuple[str, list[Checked]]]:
    for file, group in groupby(texts, key=lambda checked: checked.text.file):
        yield file, list(group)


def _text(result: CheckResult) -> str:
    lines = []
    for file, group in _by_file(result.flagged):
        lines.append(_visible(file))
        for checked in group:
            place = _short(str(checked.text.place), 24)
            image = _short(checked.text.picture.name.rpartition("/")[2], 28)
            for finding in checked.findings:
                message = _visible(finding.message)
                if checked.text.text:
                    message = f'"{_short(checked.text.text, 90)}" · {message}'
                lines.append(f"{place:>6}  {finding.rule:<11}  {image:<28}  {message}")
        lines.append("")
    return "\n".join([*lines, summary_line(result)]) + "\n"


def _json(result: CheckResult) -> str:
    document = {"summary": result.summary(), "texts": [c.to_json() for c in result.texts]}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _json_lines(result: CheckResult) -> str:
    rows = (json.dumps(checked.to_json(), ensure_ascii=False) for checked in result.texts)
    return "".join(f"{row}\n" for row in rows)


def _junit(result: CheckResult) -> str:
    suites = ElementTree.Element("testsuites", name="clseave check")
    for file, group in _by_file(result.texts):
        failures = sum(bool(checked.findings) for checked in group)
        suite = ElementTree.SubElement(
            suites, "testsuite", name=_visible(file), tests=str(len(group)), failures=str(failures)
        )
        for checked in group:
            name = f"{checked.text.place} {checked.text.picture.name}"
            case = ElementTree.SubElement(
                suite, "testcase", classname=_visible(file), name=_visible(name)
            )
            for finding in checked.findings:
                failure = ElementTree.SubElement(
                    case, "failure", type=finding.rule, message=_visible(finding.message)
                )
                failure.text = _visible(checked.text.text)
            if checked.skipped and not checked.findings:
                ElementTree.SubElement(case, "skipped", message=_visible(checked.skipped))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _sarif(result: CheckResult) -> str:
    results = []
    for checked in result.flagged:
        place: dict[str, Any] = {"artifactLocation": {"uri": quote(checked.text.file)}}
        if isinstance(checked.text.place, int):
            place["region"] = {"startLine": checked.text.place}
        for finding in checked.findings:
            results.append(
                {
                    "ruleId": finding.rule,
                    "level": finding.level,
                    "message": {"text": _sentence(checked, finding.message)},
                    "locations": [{"physicalLocation": place}],
                    "partialFingerprints": {"clseave/v1": finding.fingerprint},
                }
            )
    rules = [{"id": rule, "shortDescription": {"text": text}} for rule, (_, text) in RULES.items()]
    driver = {"name": "clseave", "version": __version__, "rules": rules}
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _sentence(checked: Checked, message: str) -> str:
    text = f" “{checked.text.text}”" if checked.text.text else ""
    return _visible(f"{checked.text.picture.name or checked.text.file}:{text} {message}.")


def _github(result: CheckResult) -> str:
    """Workflow commands, which GitHub shows as annotations of lines."""

    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    lines = []
    for checked in result.flagged:
        file = escaped(checked.text.file).replace(":", "%3A").replace(",", "%2C")
        line = checked.text.place
        properties = f"file={file}" + (f",line={line}" if isinstance(line, int) else "")
        for finding in checked.findings:
            message = escaped(_sentence(checked, finding.message))
            lines.append(
                f"::{finding.level} {properties},title=clseave {finding.rule}::{message}\n"
            )
    return "".join(lines)


def report_target(folder: Path) -> Path:
    """The page of a report; raises `UsageError` if the folder has another `index.html`."""
    target = folder / "index.html"
    if target.exists() and _MARK.encode() not in target.read_bytes()[:200]:
        raise UsageError(
            f"--report {folder}: its index.html is not a report; choose another folder."
        )
    return target


def write_report(target: Path, result: CheckResult) -> None:
    """Writes a self-contained page to review the findings, the worst first."""
    flagged = sorted(result.flagged, key=lambda checked: checked.rank)
    entries = []
    for checked in flagged[:_MOST_ON_PAGE]:
        picture = base64.b64encode(checked.thumbnail).decode()
        entries.append(checked.to_json() | {"thumbnail": picture})
    data = json.dumps(
        {"entries": entries, "summary": summary_line(result), "total": len(flagged)},
        ensure_ascii=False,
    )
    # No string may close the script or open a comment.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    with atomic_file(target) as stream:
        stream.write(page.replace("/*DATA*/null", data).encode("utf-8", "replace"))
