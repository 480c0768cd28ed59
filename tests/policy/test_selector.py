"""What a user types: the words for an order, the run before them, the first digits of an id."""

from __future__ import annotations

import pytest
from builders import manifest

from castore.errors import AmbiguousId, NotFound, UnknownId, UsageError
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Kind
from castore.policy.selector import Selector


def entry(digits: str, run: str = "a", kind: Kind = "checkpoint", step: int = 1) -> Entry:
    fields = {} if kind == "checkpoint" else {"kind": kind, "metrics": {}}
    return Entry(ObjectId(digits.ljust(64, "0")), manifest(step, run=run, **fields))


NEWEST_FIRST = [
    entry("f1", "tokens", "dataset"),
    entry("e1", "text", "files"),
    entry("d1", "b", step=2),
    entry("c1", "a"),
    entry("b1", "notes", "files"),
]


@pytest.mark.parametrize(
    ("text", "kind", "parsed"),
    [
        ("best", None, Selector("best", "", "checkpoint")),
        ("latest", None, Selector("latest", "", "checkpoint")),
        ("a.b-c:best", None, Selector("best", "a.b-c", "checkpoint")),
        (":latest", None, Selector("latest", "", "checkpoint")),
        ("text:latest", "files", Selector("latest", "text", "files")),
        ("best", "files", Selector("best", "", "files")),
        ("a:worst", None, Selector("a:worst")),
        ("Best", None, Selector("Best")),
        ("3F2a", "checkpoint", Selector("3F2a", "", "checkpoint")),
        ("", None, Selector("")),
    ],
)
def test_a_selector_is_taken_apart(text: str, kind: Kind | None, parsed: Selector) -> None:
    assert Selector.parse(text, kind) == parsed


def test_only_checkpoints_have_a_best() -> None:
    assert Selector.parse("best").is_relative
    assert Selector.parse("latest", "files").is_relative
    assert not Selector.parse("best", "files").is_relative
    assert not Selector.parse("3f2a").is_relative


def test_candidates_are_of_the_kind_and_run_in_the_order_given() -> None:
    def ids(text: str, kind: Kind | None = None) -> list[str]:
        return [candidate.id[:2] for candidate in Selector.parse(text, kind).candidates(NEWEST_FIRST)]

    assert ids("best") == ids("latest") == ["d1", "c1"]
    assert ids("a:best") == ["c1"]
    assert ids("latest", "files") == ["e1", "b1"]
    assert ids("notes:latest", "files") == ["b1"]
    assert Selector.parse("best").candidates([]) == []


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("c:best", None, "no checkpoint of run 'c'; runs: a, b"),
        ("a:latest", "files", "no files of run 'a'; runs: notes, text"),
    ],
)
def test_a_run_without_candidates_is_told_with_those_there_are(text: str, kind: Kind | None, reason: str) -> None:
    with pytest.raises(NotFound) as caught:
        Selector.parse(text, kind).candidates(NEWEST_FIRST)
    assert str(caught.value) == reason


def test_the_newest_is_the_first_candidate_and_none_says_how_to_make_one() -> None:
    assert Selector.parse("latest", "files").newest(NEWEST_FIRST).id.startswith("e1")
    with pytest.raises(NotFound, match="no files yet: `castore add PATH` adds some"):
        Selector.parse("latest", "files").newest(NEWEST_FIRST[2:4])
    with pytest.raises(NotFound, match="no prepared data yet"):
        Selector.parse("latest", "dataset").newest([])
    with pytest.raises(NotFound, match="no files of run 'x'; `castore add PATH`"):
        Selector.parse("x:latest", "files").newest([])


def test_one_match_is_chosen_and_several_are_named() -> None:
    match = entry("3f2a")
    assert Selector.parse("3f2a").choose([match], ()) is match
    with pytest.raises(AmbiguousId) as caught:
        Selector.parse("3f2a").choose([entry("3f2a1"), entry("3f2a0")], ())
    assert [digits[:5] for digits in caught.value.matches] == ["3f2a0", "3f2a1"]


@pytest.mark.parametrize(
    ("kind", "other", "reason"),
    [
        ("checkpoint", "dataset", "prepared data, not a checkpoint: `castore log --kind checkpoint`"),
        ("files", "checkpoint", "a checkpoint, not a tree of files: `castore log --kind files`"),
        ("dataset", "files", "a tree of files, not prepared data: `castore log --kind dataset`"),
    ],
)
def test_a_match_of_another_kind_is_told(kind: Kind, other: Kind, reason: str) -> None:
    with pytest.raises(NotFound, match=f"^3f0000000000 is {reason}"):
        Selector.parse("3f00", kind).choose([entry("3f", kind=other)], ())


@pytest.mark.parametrize("text", ["3", "3f", "3F2"])
def test_fewer_than_four_digits_name_nothing_even_if_only_one_id_begins_with_them(text: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' is too short for an id: give at least 4 digits"):
        Selector.parse(text).choose([entry("3f2a")], ())


def test_what_matches_nothing_suggests_what_looks_alike() -> None:
    known = ["3f2a91bb0000", "77aa77aa77aa"]
    with pytest.raises(UnknownId, match=r"no checkpoint '3F2a91cb'; did you mean 3f2a91bb\?") as caught:
        Selector.parse("3F2a91cb").choose([], known)
    assert caught.value.near == ("3f2a91bb",)
    with pytest.raises(UnknownId, match="`castore log` lists them"):
        Selector.parse("zzzz").choose([], known)
    with pytest.raises(NotFound, match=r"no files '3f2a91cb'; did you mean 3f2a91bb\?"):
        Selector.parse("3f2a91cb", "files").choose([], known)
    with pytest.raises(NotFound, match="no files 'best'; `castore log --kind files` lists them"):
        Selector.parse("best", "files").choose([], known)
