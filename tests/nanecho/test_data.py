from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore import CastoreError, Repo
from castore.report.as_json import report_as_json
from castore.report.collect import collect_report
from castore.report.html import report_as_html
from castore.report.markdown import report_as_markdown
from nanecho import config, data, seeding
from nanecho.config import Data


def folder(path: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text)
    return path


TEXTS = {f"{i}.txt": (f"line {i} of text\n" * (20 + i)).encode() for i in range(12)}


def loaded(path: Path, **options: object) -> data.Corpus:
    return data.load(Data(data_dir=str(path), **options), 8)  # type: ignore[arg-type]


def test_the_digest_is_of_the_content_and_not_of_names_or_folders(tmp_path: Path) -> None:
    first = loaded(folder(tmp_path / "a", TEXTS))
    renamed = loaded(folder(tmp_path / "b", {f"deep/{name}.md": text for name, text in TEXTS.items()}))
    changed = loaded(folder(tmp_path / "c", TEXTS | {"0.txt": TEXTS["0.txt"] + b"!"}))
    assert (first.digest, first.val_digest) == (renamed.digest, renamed.val_digest)
    assert np.array_equal(first.train, renamed.train)
    assert changed.digest != first.digest


def test_no_text_is_both_learned_and_asked_about(tmp_path: Path) -> None:
    corpus = loaded(folder(tmp_path, TEXTS | {"copy.txt": TEXTS["3.txt"]}), val_fraction=0.3)
    learned, asked = (
        set(re.findall(rb"line (\d+) ", bytes(part[part < 256].astype(np.uint8))))
        for part in (corpus.train, corpus.val)
    )
    assert not learned & asked
    assert len(learned | asked) == 12
    assert corpus.files[1] >= 1
    assert 0 < len(corpus.val) <= 0.3 * (len(corpus.train) + len(corpus.val)) + 12


def test_a_single_file_is_cut_without_overlap(tmp_path: Path) -> None:
    text = b"".join(b"%d\n" % i for i in range(500))
    corpus = loaded(folder(tmp_path, {"all.txt": text}))
    assert bytes(corpus.train[:-1].astype(np.uint8)) + bytes(corpus.val[:-1].astype(np.uint8)) == text
    assert corpus.train[-2] == ord("\n")


@given(st.dictionaries(st.text(max_size=4), st.binary(min_size=1, max_size=60), min_size=1), st.floats(0.01, 0.99))
def test_a_split_loses_and_repeats_nothing(texts: dict[str, bytes], fraction: float) -> None:
    train, val = data.split(texts, fraction)
    assert sorted(b"".join([*train.values(), *val.values()])) == sorted(b"".join(texts.values()))
    assert val
    assert not train.keys() & val.keys()


def test_binary_hidden_and_empty_files_are_left_out(tmp_path: Path) -> None:
    plain = loaded(folder(tmp_path / "a", TEXTS))
    more = {"x.bin": b"ab\0cd", "empty": b"", ".hidden": b"secret", ".git/config": b"[core]"}
    assert loaded(folder(tmp_path / "b", TEXTS | more)).digest == plain.digest


@pytest.mark.parametrize(
    ("texts", "says"),
    [({}, "no text files"), ({"a": b"x" * 50, "b": b"y"}, "too few"), ({"a": b"x"}, "too few")],
)
def test_too_little_text_is_an_error_that_says_so(tmp_path: Path, texts: dict[str, bytes], says: str) -> None:
    with pytest.raises(CastoreError, match=says):
        loaded(folder(tmp_path, texts))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CastoreError, match="is not a folder"):
        loaded(tmp_path / "nowhere")


def test_without_a_folder_it_is_the_standard_library() -> None:
    corpus = data.load(Data(), 128)
    assert corpus.bytes > 5_000_000
    assert corpus.files[1] > 10
    assert len(corpus.train) + len(corpus.val) == corpus.bytes + sum(corpus.files)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_bpe_is_learned_alike_every_time_and_gives_the_text_back(tmp_path: Path) -> None:
    path = folder(tmp_path, {name: text + "naïve ☃ \U0001f600\n".encode() for name, text in TEXTS.items()})
    first, second = (loaded(path, tokenizer="bpe", vocab_size=300) for _ in range(2))
    assert first.tokenizer.digest == second.tokenizer.digest
    assert np.array_equal(first.train, second.train)
    assert first.tokenizer.vocab_size <= 300
    assert first.tokenizer.digest != loaded(path).tokenizer.digest
    assert len(first.train) < len(loaded(path).train)
    again = data.BPETokenizer(first.tokenizer.definition)
    assert again.digest == first.tokenizer.digest
    assert np.array_equal(again.encode([b"line 3 of text\n"]), first.tokenizer.encode([b"line 3 of text\n"]))


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first = data.batch(tokens, 8, 1, 5, range(4))
    assert np.array_equal(first, data.batch(tokens, 8, 1, 5, range(4)))
    assert not np.array_equal(first, data.batch(tokens, 8, 1, 6, range(4)))
    assert not np.array_equal(first, data.batch(tokens, 8, 2, 5, range(4)))
    assert np.array_equal(first[2:], data.batch(tokens, 8, 1, 5, range(2, 4)))


def test_a_row_is_a_run_of_text_with_the_token_to_predict_one_further() -> None:
    rows = data.batch(np.arange(1000, dtype=np.uint16), 8, 1, 5, range(100))
    assert rows.shape == (100, 9)
    assert np.array_equal(rows[:, 1:], rows[:, :-1] + 1)


@given(st.integers(9, 40), st.integers(0, 9))
def test_every_start_is_drawn_and_none_beyond_the_end(length: int, seed: int) -> None:
    rows = data.batch(np.arange(length, dtype=np.uint16), 8, seed, 0, range(1000))
    assert set(rows[:, 0]) == set(range(length - 8))


def test_evaluation_windows_span_the_text_and_never_change() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    windows = data.evaluation_windows(tokens, 8, 5)
    assert (windows[0, 0], windows[-1, -1]) == (0, 999)
    assert np.array_equal(windows, data.evaluation_windows(tokens, 8, 5))
    assert len(data.evaluation_windows(tokens[:9], 8, 5)) == 1


def test_random_numbers_are_the_same_for_ever() -> None:
    # SplitMix64 as published: the first outputs for seed 1234567
    assert seeding.uniform(1234567, 0, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert seeding.uniform(1234567, 1, 3).tolist() == seeding.uniform(1234567, 0, 3).tolist()[1:]
    assert seeding.key("batch", 1, 23) != seeding.key("batch", 12, 3)


def test_a_pipe_is_passed_over_and_not_waited_for(tmp_path: Path) -> None:
    path = folder(tmp_path, TEXTS)
    os.mkfifo(path / "pipe")
    assert loaded(path).files[0] > 0


def test_a_report_among_the_texts_does_not_make_them_other_texts(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text)
    options = config.make({"data_dir": str(tmp_path)}).data
    before = data.read(options).digest
    repo = Repo.init(tmp_path)
    found = collect_report(repo, datetime.now(UTC))
    (tmp_path / "report.html").write_text(report_as_html(found))
    (tmp_path / "report.md").write_text(report_as_markdown(found))
    (tmp_path / "report.json").write_text(json.dumps(report_as_json(found), indent=2))
    (tmp_path / "one-line.json").write_text(json.dumps(report_as_json(found)))
    assert data.read(options).digest == before
    (tmp_path / "more.txt").write_text("one text more")
    assert data.read(options).digest != before
