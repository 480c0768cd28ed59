"""Text files -> tokens for training and validation, and batches of them.

Everything here is a function of the *content* of the files: their names, order and folders don't matter. Validation
has files of its own, so a text is either trained on or evaluated, never both.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from castore import errors
from nanecho import config, seeding

Tokens = npt.NDArray[np.uint16]

_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
}
_PROBE_BYTES = 8192  # a zero byte among the first ones means that a file is not text: git's rule


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenized text. ``digest`` is of all of it, ``val_digest`` of the validation part; ``files``: train, val."""

    name: str
    digest: str
    val_digest: str
    files: tuple[int, int]
    bytes: int
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer


class Tokenizer(Protocol):
    """``digest`` is equal for tokenizers that give equal tokens; ``definition`` is enough to rebuild the tokenizer."""

    name: str
    vocab_size: int
    digest: str
    definition: str

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        """Return the tokens of all texts, each text followed by an end-of-text token."""
        ...


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a corpus, all and split, as digest -> content. ``name`` says where they are from."""

    name: str
    digest: str
    all: dict[str, bytes]
    train: dict[str, bytes]
    val: dict[str, bytes]


def load(options: config.Data, block_size: int) -> Corpus:
    """Read, split and tokenize. Raise UsageError when there is too little text for blocks of ``block_size``."""
    return checked(tokenize(read(options), options), block_size)


def read(options: config.Data) -> Texts:
    """Return the texts, split. Raise UsageError when there are none or one can't be read."""
    folder = Path(options.data_dir) if options.data_dir else None
    texts = _unique(_folder_files(folder) if folder else _standard_library())
    if not texts:
        raise errors.UsageError(f"{folder}: no text files in there")
    train, val = split(texts, options.val_fraction)
    name = str(folder) if folder else "the source of Python's standard library"
    return Texts(name, _digest(texts), texts, train, val)


def tokenize(texts: Texts, options: config.Data) -> Corpus:
    """Return the texts as tokens; a tokenizer that has to be learned is learned from the training texts."""
    train, val = list(texts.train.values()), list(texts.val.values())
    tokenizer = ByteTokenizer() if options.tokenizer == "byte" else train_bpe(train, options.vocab_size)
    return assemble(texts, tokenizer, tokenizer.encode(train), tokenizer.encode(val))


def assemble(texts: Texts, tokenizer: Tokenizer, train: Tokens, val: Tokens) -> Corpus:
    """Return the corpus of texts that are tokenized already."""
    return Corpus(
        name=texts.name,
        digest=texts.digest,
        val_digest=_digest(texts.val),
        files=(len(texts.train), len(texts.val)),
        bytes=sum(map(len, texts.all.values())),
        train=train,
        val=val,
        tokenizer=tokenizer,
    )


def checked(corpus: Corpus, block_size: int) -> Corpus:
    """Return the corpus. Raise UsageError if it is too short for blocks of ``block_size``."""
    for name, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= block_size:
            raise errors.UsageError(
                f"{corpus.name}: {len(tokens)} tokens for {name}, too few for a block of {block_size}: "
                "give more text or a smaller --block-size"
            )
    return corpus


# -- files -----------------------------------------------------------------------------------------------------------


def _folder_files(folder: Path) -> Iterator[bytes]:
    if not folder.is_dir():
        raise errors.UsageError(f"{folder} is not a folder: --data-dir takes one with text files in it")
    for path, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.isfile(os.path.join(path, name)):
                text = _read(Path(path, name))
                # a report written beside the texts must not turn them into other data
                if not _is_report(text):
                    yield text


def _is_report(text: bytes) -> bool:
    """Whether it is what `castore report` writes: a page, Markdown or JSON."""
    head = text[:_PROBE_BYTES]
    is_json = head.startswith(b"{") and b'"generator": "castore report"' in head
    return is_json or b'<meta name="generator" content="castore report">' in head or head.startswith(b"### castore: ")


def _standard_library() -> Iterator[bytes]:
    """Yield the .py files that are equal in every installation of this Python version."""
    for path, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                yield _read(Path(path, name))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _unreadable(error)
        raise


def _unreadable(error: OSError) -> None:
    # leaving it out silently would make another data set
    raise errors.UsageError(f"can't read {error.filename}: {error.strerror}") from error


def _unique(texts: Iterator[bytes]) -> dict[str, bytes]:
    """Return digest -> content, in order of digest, without empty and binary files."""
    by_digest = {hashlib.sha256(text).hexdigest(): text for text in texts if text and b"\0" not in text[:_PROBE_BYTES]}
    return dict(sorted(by_digest.items()))


def split(texts: dict[str, bytes], fraction: float) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return (training, validation): validation gets whole files, at most ``fraction`` of the bytes but at least one.

    A single file is cut in two at the end of a line.
    """
    if len(texts) == 1:
        ((digest, text),) = texts.items()
        cut = text.rfind(b"\n", 0, max(1, int(len(text) * (1 - fraction)))) + 1 or int(len(text) * (1 - fraction))
        return {f"{digest}:train": text[:cut]}, {f"{digest}:val": text[cut:]}
    room = fraction * sum(map(len, texts.values()))
    val = {}
    for digest, text in texts.items():
        if len(text) <= room:
            val[digest] = text
            room -= len(text)
    if not val:
        smallest = min(texts, key=lambda digest: (len(texts[digest]), digest))
        val[smallest] = texts[smallest]
    return {digest: text for digest, text in texts.items() if digest not in val}, val


def _digest(texts: dict[str, bytes]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# -- tokenizers ------------------------------------------------------------------------------------------------------

_END = "<|endoftext|>"


class ByteTokenizer:
    """A token for each byte, and one for the end of a text. Works on anything and needs no training.

    >>> ByteTokenizer().encode([b"ab"]).tolist()
    [97, 98, 256]
    """

    name = "byte"
    vocab_size = 257
    definition = "byte"
    digest = hashlib.sha256(b"byte").hexdigest()

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        tokens = np.full(sum(map(len, texts)) + len(texts), 256, dtype=np.uint16)
        at = 0
        for text in texts:
            tokens[at : at + len(text)] = np.frombuffer(text, dtype=np.uint8)
            at += len(text) + 1
        return tokens


class BPETokenizer:
    """Byte-level BPE by the package tokenizers."""

    name = "bpe"

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer as Library

        self.definition = definition
        self.digest = hashlib.sha256(definition.encode()).hexdigest()
        self._library = Library.from_str(definition)
        self.vocab_size: int = self._library.get_vocab_size()

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        end = self._library.token_to_id(_END)
        parts = []
        for encoding in self._library.encode_batch_fast(_decoded(texts)):
            parts += [np.array(encoding.ids, dtype=np.uint16), np.array([end], dtype=np.uint16)]
        return np.concatenate(parts)


def train_bpe(texts: Sequence[bytes], vocab_size: int) -> BPETokenizer:
    """Learn a tokenizer from ``texts``; equal texts give an equal one. Raise PackageMissing without tokenizers."""
    try:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise bpe_missing() from error
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_decoded(texts), trainer)
    return BPETokenizer(library.to_str())


def bpe_missing() -> errors.PackageMissing:
    """Return the error for a BPE tokenizer without the package tokenizers."""
    return errors.PackageMissing("--tokenizer bpe", "tokenizers", "bpe")


def _decoded(texts: Sequence[bytes]) -> list[str]:
    return [text.decode(errors="replace") for text in texts]


# -- batches ---------------------------------------------------------------------------------------------------------


def batch(tokens: Tokens, block_size: int, seed: int, step: int, rows: range) -> npt.NDArray[np.int64]:
    """Return sequences ``rows`` of step ``step``: (len(rows), block_size + 1); the last column is only predicted.

    A pure function of its arguments: there is no position in the data to save or to lose.
    """
    random = seeding.uniform(seeding.key("batch", seed, step), rows.start, rows.stop)
    starts = random % np.uint64(len(tokens) - block_size)
    return _windows(tokens, starts.astype(np.int64), block_size)


def evaluation_windows(tokens: Tokens, block_size: int, samples: int) -> npt.NDArray[np.int64]:
    """Return at most ``samples`` sequences, evenly spaced over ``tokens``: (samples, block_size + 1)."""
    last = len(tokens) - block_size - 1
    starts = np.unique(np.linspace(0, last, samples).astype(np.int64))
    return _windows(tokens, starts, block_size)


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.int64]:
    windows: Tokens = tokens[starts[:, None] + np.arange(block_size + 1)]
    return windows.astype(np.int64)
