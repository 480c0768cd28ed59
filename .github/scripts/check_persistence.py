"""Check from two sessions' summaries that the second continued exactly where the first ended.

    python check_persistence.py --first SESSION.json --second SESSION.json --report report.md

Standard library only. Prints the report, and exits with 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Session = Mapping[str, Any]

STEPS = 10  # of each session
SAME_LOSS = 1e-6  # a loss that was only written down and read again
SAME_TRAINING = 1e-3  # the same steps computed on two machines, whose processors may round differently


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    expected: str
    actual: object
    passed: bool


def equal(what: str, actual: object, expected: object) -> Check:
    return Check(what, json.dumps(expected), actual, type(actual) is type(expected) and actual == expected)


def close(what: str, actual: object, expected: object, tolerance: float) -> Check:
    numbers = [float(value) for value in (actual, expected) if isinstance(value, (int, float)) and math.isfinite(value)]
    near = len(numbers) == 2 and abs(numbers[0] - numbers[1]) <= tolerance
    return Check(what, f"{json.dumps(expected)}, within {tolerance:g}", actual, near)


def checks(first: Session, second: Session) -> Iterator[Check]:
    """Yield the checks of two sessions, the second of which resumed the first on another machine."""
    yield equal("first: begins at step", first.get("start_step"), 0)
    yield equal("first: ends at step", first.get("final_step"), STEPS)
    saved = first.get("checkpoints") or [None]
    yield Check("first: last checkpoint", "an id", saved[-1], isinstance(saved[-1], str) and len(saved[-1]) == 64)
    yield equal("second: resumed from the first's last checkpoint", second.get("resumed_from"), saved[-1])
    yield equal("second: no fresh start", second.get("fresh"), "")
    yield equal("second: resumed weights alone", second.get("weights_only"), False)
    yield equal("second: begins at step", second.get("start_step"), STEPS)
    yield equal("second: ends at step", second.get("final_step"), 2 * STEPS)
    yield equal("second: steps trained", second.get("steps"), STEPS)
    what = "second: loss at resume is the first's last"
    yield close(what, second.get("start_loss"), first.get("final_loss"), SAME_LOSS)
    yield Check("second: saved", "a checkpoint", second.get("checkpoints"), bool(second.get("checkpoints")))


def straight_checks(second: Session, straight: Session) -> Iterator[Check]:
    """Yield the checks that ten steps and ten more equal twenty without a break: not only numbers were carried over."""
    yield equal("without a break: begins at step", straight.get("start_step"), 0)
    yield equal("without a break: ends at step", straight.get("final_step"), 2 * STEPS)
    what = "second: last loss is that of training without a break"
    yield close(what, second.get("final_loss"), straight.get("final_loss"), SAME_TRAINING)


def report(results: list[Check]) -> str:
    """Return a table in Markdown: the failed checks, or all of them when none failed."""
    failed = [check for check in results if not check.passed]
    title = f"{len(failed)} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    head = [f"## Training persistence: {title}", "", "| check | expected | actual |", "|---|---|---|"]
    rows = [f"| {check.what} | {check.expected} | {json.dumps(check.actual)} |" for check in failed or results]
    return "\n".join([*head, *rows, ""])


def read(path: Path) -> dict[str, Any]:
    summary = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(summary, dict):
        raise ValueError("not a session's summary")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that a second session continued where the first ended.")
    parser.add_argument("--first", type=Path, required=True, help="summary of the first session")
    parser.add_argument("--second", type=Path, required=True, help="summary of the second session")
    parser.add_argument("--straight", type=Path, help="summary of one session of as many steps as both")
    parser.add_argument("--match", help="the id that castore ci restore found")
    parser.add_argument("--downloaded-bytes", help="how much it fetched: must be more than nothing")
    parser.add_argument("--report", type=Path, help="where to write the report, in Markdown")
    given = parser.parse_args()
    try:
        first, second = read(given.first), read(given.second)
        results = list(checks(first, second))
        if given.straight:
            results += straight_checks(second, read(given.straight))
    except (OSError, ValueError) as error:
        sys.exit(f"check_persistence: a summary can't be read: {error}")  # with code 1
    if given.match is not None:
        results.append(equal("restored: what the second session resumed", given.match, second.get("resumed_from")))
    if given.downloaded_bytes is not None:
        count = given.downloaded_bytes
        some = count.isdecimal() and int(count) > 0
        results.append(Check("restored: bytes from the cache", "more than 0", count, some))
    text = report(results)
    if given.report:
        given.report.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if all(check.passed for check in results) else 1


if __name__ == "__main__":
    sys.exit(main())
