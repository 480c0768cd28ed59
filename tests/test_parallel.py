from __future__ import annotations

import threading
import time

import pytest

from castore.parallel import map_ahead, map_all


def test_results_come_in_order_whichever_ends_first() -> None:
    assert map_all(lambda number: (time.sleep(0.01 * (5 - number)), number)[1], range(5), 3) == [0, 1, 2, 3, 4]


def test_items_are_taken_no_further_ahead_than_allowed() -> None:
    taken: list[int] = []

    def items() -> object:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: number, items(), 2, ahead=3)  # type: ignore[arg-type, var-annotated]
    next(results)
    assert len(taken) == 4


def test_the_first_error_is_raised_and_what_has_not_begun_is_dropped() -> None:
    done = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("one")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ValueError, match="one"):
        map_all(work, range(1000), 2)
    assert len(done) < 10


def test_a_caller_who_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    results = map_ahead(abs, range(100), 4)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
