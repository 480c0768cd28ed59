"""What is known of a checkpoint by name: values, orders and filters."""

from __future__ import annotations

import operator
from datetime import UTC, datetime
from typing import Any

import pytest
from builders import entry
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import UsageError
from castore.policy.fields import Facts, Filter, sort_by

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def facts(step: int = 0, tags: tuple[str, ...] = (), **fields: Any) -> Facts:
    """A checkpoint of a day ago with a metric, or several, and nested settings."""
    config = {"train": {"learning_rate": 0.5, "fused": True, "warmup": None}, "name": "a b"}
    fields = {"created": "2026-01-01T00:00:00.000000Z", "config": config, "metrics": {}, **fields}
    return Facts(entry=entry(step, **fields), data="full", now=NOW, tags=tags)


def test_values_are_found_by_name() -> None:
    one = facts(7, ("v1",), metrics={"val_loss": 2.0}, run="r")
    expected = {
        "run": "r", "step": 7, "val_loss": 2.0, "learning_rate": 0.5, "train.learning_rate": 0.5, "fused": "true",
        "name": "a b", "data": "full", "tags": ("v1",), "age": 86400.0, "rate": None, "parent": None,
        "warmup": None,
    }  # fmt: skip
    assert {name: one.value(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("val_loss<2", [3]),
        ("val_loss <= 2 and run=r", [2, 3]),
        ("step=1 or step>=3", [1, 3, 9]),
        ("step>0 and val_loss>=4 or step=3 and val_loss<9", [1, 3]),  # and binds tighter
        ("run!=r", [9]),
        ("run=*ther and val_loss!=1", [9]),
        ('name="a b" and step<2', [1]),
        ("tags=v* and age>20h and age<2d", [2]),
        ("tags!=v1 and step<3", [1]),
        ("fused=true and learning_rate>0.1 and data=full and step=1,000", []),
    ],
)
def test_a_filter_chooses(text: str, chosen: list[int]) -> None:
    given = [facts(step, ("v1",) if step == 2 else (), metrics={"val_loss": 4 / step}, run="r") for step in (1, 2, 3)]
    given.append(facts(9, metrics={}, run="another"))
    assert [one.entry.manifest.step for one in Filter.parse(text).choose(given)] == chosen


@pytest.mark.parametrize(
    "text", ["", "val_loss", "val_loss<", "<2", "step=1 and", "step=1 run=r", "step=1 & run=r", '"']
)
def test_what_is_no_filter_says_where(text: str) -> None:
    with pytest.raises(UsageError, match=r"can't be read at .*: write 'val_loss<2 and run=ci'"):
        Filter.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("val_los<2", "did you mean val_loss"),
        ("val_loss<abc", "'abc' is not a number"),
        ("size<1 parsec", "can't be read"),
        ("size<parsec", "size<parsec"),
        ("age<soon", "age<soon"),
        ("tags<v1", "compared with = or !="),
    ],
)
def test_what_can_not_be_compared_is_told(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Filter.parse(text).choose([facts(1, metrics={"val_loss": 1.0})])


COMPARE = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TERMS = st.tuples(st.sampled_from(["and", "or"]), st.sampled_from(sorted(COMPARE)), st.integers(0, 4))


@given(st.lists(TERMS, min_size=1, max_size=6), st.integers(0, 4))
def test_a_filter_says_what_python_would(terms: list[tuple[str, str, int]], step: int) -> None:
    text = " ".join(f"{join} step{compare}{value}" for join, compare, value in terms).split(" ", 1)[1]
    python = text.replace("!=", "~").replace("<=", "{").replace(">=", "}").replace("=", "==")
    python = python.replace("~", "!=").replace("{", "<=").replace("}", ">=")
    assert bool(Filter.parse(text).choose([facts(step)])) == eval(python, {"step": step})


def test_those_without_a_value_are_last_in_either_order() -> None:
    given = [facts(1), facts(2, metrics={"acc": 0.1}), facts(3, metrics={"acc": 0.3})]
    assert [one.entry.manifest.step for one in sort_by(given, "acc")] == [2, 3, 1]
    assert [one.entry.manifest.step for one in sort_by(given, "-acc")] == [3, 2, 1]
    with pytest.raises(UsageError, match="nothing here has a 'nonsense'"):
        sort_by(given, "nonsense")
