"""Tokenized text kept in the store, so that the next session on the same data starts without tokenizing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import castore
from castore import errors
from nanecho import config, data
from nanecho.data import Corpus, Texts, Tokenizer, Tokens

RUN = "datasets"
_PART = "data"
_VERSION = 1  # raise it with any change to nanecho.data that gives other tokens for the same texts


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a corpus is from: the id of the prepared data ``reused``, or the ``reason`` it was tokenized now."""

    reused: str | None
    reason: str


def prepare(repo: castore.Repo, options: config.Data, block_size: int, started: str) -> tuple[Corpus, Origin]:
    """Return the corpus, equal whether reused or not, and its origin. A corpus that is tokenized now is kept.

    Prepared data that is older than ``retention.data_ttl``, damaged or gone is prepared again. Raise UsageError as
    ``data.load`` does.
    """
    texts = data.read(options)
    recorded = _recorded(texts, options)
    reasons: list[str] = []
    created = None
    for entry in repo.datasets(recorded):
        age = datetime.fromisoformat(started) - datetime.fromisoformat(entry.manifest.created)
        if age >= repo.policy.data_ttl:
            reasons.append(f"{entry.id[:12]} is older than data_ttl = {repo.config.retention.data_ttl}")
            break
        try:
            corpus = _restore(texts, options, repo.load(entry.id, [_PART])[_PART])
        except castore.CastoreError as error:
            reasons.append(f"{entry.id[:12]} is not usable: {error}")
            # saved with the same bytes and time, it becomes the same manifest, which then has its data again
            created = created or datetime.fromisoformat(entry.manifest.created)
        else:
            return data.checked(corpus, block_size), Origin(entry.id, "")
    corpus = data.checked(data.tokenize(texts, options), block_size)
    reasons = reasons or ["these texts were not split and tokenized like this before"]
    try:
        _keep(repo, corpus, recorded, created)
    except castore.CastoreError as error:
        reasons.append(f"not kept: {error}")
    return corpus, Origin(None, "; ".join(reasons))


def _recorded(texts: Texts, options: config.Data) -> dict[str, Any]:
    """Return everything that the tokens are a function of."""
    recorded = {
        "version": _VERSION,
        "source": texts.digest,
        "tokenizer": options.tokenizer,
        "val_fraction": options.val_fraction,
    }
    return recorded | ({"vocab_size": options.vocab_size} if options.tokenizer == "bpe" else {})


def _keep(repo: castore.Repo, corpus: Corpus, recorded: dict[str, Any], created: datetime | None) -> None:
    import torch

    train, val = torch.from_numpy(corpus.train), torch.from_numpy(corpus.val)
    info = {"val_digest": corpus.val_digest, "tokenizer_digest": corpus.tokenizer.digest, "bytes": corpus.bytes}
    repo.save(
        {_PART: {"train": train, "val": val, "tokenizer": corpus.tokenizer.definition}},
        kind="dataset",
        run=RUN,
        step=0,
        config=recorded,
        info=info | {"files": list(corpus.files), "tokens": [len(train), len(val)]},
        created=created,
    )


def _restore(texts: Texts, options: config.Data, state: Any) -> Corpus:
    """Return the corpus in a state that :func:`_keep` saved. Raise CorruptIndex for any other state."""
    match state:
        case {"train": train, "val": val, "tokenizer": str(definition)}:
            tokenizer = _tokenizer(options.tokenizer, definition)
            return data.assemble(texts, tokenizer, _tokens(train, tokenizer), _tokens(val, tokenizer))
    raise errors.CorruptIndex("it holds no tokens")


def _tokenizer(name: str, definition: str) -> Tokenizer:
    if name == "byte":
        return data.ByteTokenizer()
    try:
        return data.BPETokenizer(definition)
    except ImportError:
        raise data.bpe_missing() from None
    except Exception as error:  # the package raises nothing more precise
        raise errors.CorruptIndex(f"its tokenizer can't be read: {error}") from error


def _tokens(tensor: Any, tokenizer: Tokenizer) -> Tokens:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint16 or tensor.dim() != 1:
        raise errors.CorruptIndex("it holds no tokens")
    tokens: Tokens = tensor.numpy()
    if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
        raise errors.CorruptIndex("it holds tokens that its tokenizer doesn't have")
    return tokens
