from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castore import CastoreError, Repo
from castore.format import manifest, part_index
from castore.format.manifest import Entry
from nanecho import data, prepared
from nanecho.config import Data

NOW = manifest.timestamp(datetime.now(UTC))
TEXTS = {f"{i}.txt": (f"line {i} of text\n" * (20 + i)).encode() for i in range(12)}
BLOCK = 8
KINDS: list[dict[str, Any]] = [{}, {"tokenizer": "bpe", "vocab_size": 300}]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text)
    return folder


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that texts were tokenized or a tokenizer learned."""
    done: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            done.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(data, "tokenize")
    watch(data, "train_bpe")
    watch(data.ByteTokenizer, "encode")
    watch(data.BPETokenizer, "encode")
    return done


def prepare(repo: Repo, folder: Path, started: str = NOW, **options: Any) -> tuple[data.Corpus, prepared.Origin]:
    return prepared.prepare(repo, Data(data_dir=str(folder), **options), BLOCK, started)


def same(left: data.Corpus, right: data.Corpus) -> bool:
    plain = ("name", "digest", "val_digest", "files", "bytes")
    learned = ("name", "vocab_size", "digest", "definition")
    return (
        all(getattr(left, name) == getattr(right, name) for name in plain)
        and all(getattr(left.tokenizer, name) == getattr(right.tokenizer, name) for name in learned)
        and all(
            mine.dtype == theirs.dtype == np.uint16 and np.array_equal(mine, theirs)
            for mine, theirs in ((left.train, right.train), (left.val, right.val))
        )
    )


def datasets(repo: Repo) -> list[Entry]:
    return [entry for entry in repo.catalog.listing().entries if entry.manifest.kind == "dataset"]


@pytest.mark.parametrize("options", KINDS)
def test_the_second_session_gets_the_same_without_tokenizing(
    repo: Repo, texts: Path, work: list[str], options: dict[str, Any]
) -> None:
    first, origin = prepare(repo, texts, **options)
    assert origin.reused is None
    assert "not split and tokenized like this before" in origin.reason
    (entry,) = datasets(repo)
    assert (entry.manifest.run, entry.manifest.step, entry.manifest.config["source"]) == ("datasets", 0, first.digest)
    assert "encode" in work
    work.clear()
    again, origin = prepare(repo, texts, **options)
    assert origin == prepared.Origin(entry.id, "")
    assert work == []
    assert same(again, first)
    assert same(again, data.load(Data(data_dir=str(texts), **options), BLOCK))
    assert len(datasets(repo)) == 1
    text = [b"line 3 of text\n"]
    assert np.array_equal(again.tokenizer.encode(text), first.tokenizer.encode(text))


@pytest.mark.parametrize(
    "options",
    [{"val_fraction": 0.2}, {"tokenizer": "bpe", "vocab_size": 300}, {"tokenizer": "bpe", "vocab_size": 301}],
)
def test_another_split_or_tokenizer_is_prepared_for_itself(repo: Repo, texts: Path, options: dict[str, Any]) -> None:
    prepare(repo, texts)
    prepare(repo, texts, tokenizer="bpe", vocab_size=299)
    assert prepare(repo, texts, **options)[1].reused is None
    assert prepare(repo, texts, **options)[1].reused
    assert len(datasets(repo)) == 3


def test_another_source_is_prepared_for_itself_but_names_do_not_matter(repo: Repo, texts: Path) -> None:
    _, origin = prepare(repo, texts)
    assert origin.reused is None
    (texts / "0.txt").rename(texts / "renamed.md")
    assert prepare(repo, texts)[1].reused
    (texts / "renamed.md").write_bytes(TEXTS["0.txt"] + b"!")
    assert prepare(repo, texts)[1].reused is None
    # the vocabulary means nothing to bytes
    assert prepare(repo, texts, vocab_size=999)[1].reused


def test_after_data_ttl_it_is_prepared_again_and_said(repo: Repo, texts: Path, work: list[str]) -> None:
    prepare(repo, texts)
    (first,) = datasets(repo)
    work.clear()

    def later(hours: float) -> str:
        return manifest.timestamp(datetime.fromisoformat(first.manifest.created) + timedelta(hours=hours))

    assert prepare(repo, texts, later(167.9))[1].reused == first.id
    assert work == []
    _, origin = prepare(repo, texts, later(168))
    assert origin == prepared.Origin(None, f"{first.id[:12]} is older than data_ttl = 168h")
    assert "tokenize" in work
    assert len(datasets(repo)) == 2


def chunk_of(repo: Repo, entry: Entry) -> Path:
    return repo.store.path(part_index.decode(repo.store.read(entry.manifest.parts["data"].index)).chunks[0].id)


DAMAGE: dict[str, Callable[[Repo, Entry], Any]] = {
    "index gone": lambda repo, entry: os.unlink(repo.store.path(entry.manifest.parts["data"].index)),
    "chunk gone": lambda repo, entry: os.unlink(chunk_of(repo, entry)),
    "chunk damaged": lambda repo, entry: chunk_of(repo, entry).write_bytes(b"CSTO"),
    "index damaged": lambda repo, entry: repo.store.path(entry.manifest.parts["data"].index).write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("options", KINDS)
def test_what_is_damaged_or_gone_is_prepared_again_and_said(
    repo: Repo, texts: Path, damage: str, options: dict[str, Any]
) -> None:
    first, _ = prepare(repo, texts, **options)
    (entry,) = datasets(repo)
    DAMAGE[damage](repo, entry)
    again, origin = prepare(repo, texts, **options)
    assert same(again, first)
    assert origin.reused is None
    assert origin.reason.startswith(f"{entry.id[:12]} is not usable: ")
    # the data is back under the manifest that was there, so that history doesn't grow with every lost cache
    assert datasets(repo) == [entry]
    assert prepare(repo, texts, **options)[1].reused == entry.id


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"train": 3, "val": 4, "tokenizer": "byte"},
        {"train": np.zeros(50, np.uint16), "val": np.zeros(50, np.int64), "tokenizer": "byte"},
        {"train": np.full(50, 257, np.uint16), "val": np.zeros(50, np.uint16), "tokenizer": "byte"},
        {"train": np.zeros((5, 10), np.uint16), "val": np.zeros(50, np.uint16), "tokenizer": "byte"},
    ],
    ids=["empty", "numbers", "wrong type", "beyond the vocabulary", "two dimensions"],
)
def test_what_is_no_prepared_data_is_passed_over(repo: Repo, texts: Path, state: dict[str, Any]) -> None:
    import torch

    first, _ = prepare(repo, texts)
    (entry,) = datasets(repo)
    repo.catalog.forget(entry)
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()
    }
    repo.save({"data": tensors}, kind="dataset", run="datasets", step=0, config=entry.manifest.config)
    again, origin = prepare(repo, texts)
    assert same(again, first)
    assert "holds" in origin.reason


def test_a_tokenizer_that_is_none_is_passed_over(repo: Repo, texts: Path) -> None:
    import torch

    first, _ = prepare(repo, texts, tokenizer="bpe", vocab_size=300)
    (entry,) = datasets(repo)
    repo.catalog.forget(entry)
    tokens = torch.zeros(50, dtype=torch.uint16)
    for definition in ("{}", "nonsense", "\0"):
        state = {"train": tokens, "val": tokens, "tokenizer": definition}
        repo.save({"data": state}, kind="dataset", run="datasets", step=0, config=entry.manifest.config)
    again, origin = prepare(repo, texts, tokenizer="bpe", vocab_size=300)
    assert same(again, first)
    assert origin.reason.count("its tokenizer can't be read") == 3


def test_what_cannot_be_kept_is_used_and_said(repo: Repo, texts: Path) -> None:
    (repo.root / "manifests" / "datasets").write_text("in the way")
    corpus, origin = prepare(repo, texts)
    assert same(corpus, data.load(Data(data_dir=str(texts)), BLOCK))
    assert "; not kept: " in origin.reason
    assert datasets(repo) == []


def test_too_little_text_is_an_error_and_not_kept(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a").write_text("some text")
    with pytest.raises(CastoreError, match="too few"):
        prepare(repo, tmp_path / "few")
    assert datasets(repo) == []


def test_prepared_data_is_no_checkpoint(repo: Repo, texts: Path) -> None:
    prepare(repo, texts)
    (entry,) = datasets(repo)
    assert repo.checkpoints() == []
    assert repo.resolve("best").match is None
    with pytest.raises(CastoreError, match="is prepared data, not a checkpoint"):
        repo.resolve(entry.id)
