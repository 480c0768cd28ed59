"""That tests/mutants.py, which ``make torture`` runs, leaves no sync, no lock and no comparison of a hash out."""

from __future__ import annotations

import re

import pytest
from mutants import MUTANTS, ROOT, Mutant, changed

GUARDS = re.compile(r"(?<!def )\b_?(?:fs\.sync\(|sync_directory\b|lock\()|hash_bytes\(.*[!=]= ")
"""Calls that sync or lock, where a pool is given what syncs, and comparisons of a hash."""

LEFT_OUT = {
    "castore/storage/fs.py": "where they are defined, but for publish()",
    "castore/doctor.py": "it only tries whether syncs and locks work",
}


def places(mutant: Mutant) -> set[tuple[str, int]]:
    """Return the (file, line) of what a fault changes."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    begin = -1
    for _ in range(mutant.nth + 1):
        begin = text.index(mutant.old, begin + 1)
    first = text.count("\n", 0, begin) + 1
    return {(mutant.file, line) for line in range(first, first + mutant.old.count("\n") + 1)}


def test_each_sync_each_lock_and_each_comparison_is_taken_away_once() -> None:
    guarded = {
        (str(path.relative_to(ROOT)), number)
        for path in sorted((ROOT / "castore").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if GUARDS.search(line) and str(path.relative_to(ROOT)) not in LEFT_OUT
    }
    assert len(guarded) > 30
    assert guarded - set().union(*map(places, MUTANTS)) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_changes_the_source(mutant: Mutant) -> None:
    assert changed(mutant, ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")
