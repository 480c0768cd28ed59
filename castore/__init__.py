"""castore: a content-addressed store for training checkpoints.

    >>> repo = castore.Repo.init(path)
    >>> saved = repo.save({"model": model.state_dict()}, run="ci", step=500, metrics={"val_loss": 2.31})
    >>> state = repo.load(repo.resolve("best").require().id)

Importing castore imports neither torch nor NumPy; saving and loading tensors does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from castore import errors, words
from castore.errors import CastoreError

if TYPE_CHECKING:
    from castore.gc import Plan, collect
    from castore.manifest import Line, Manifest, Metric
    from castore.quality import score
    from castore.repo import Repo, Saved, processors
    from castore.resolve import Match, Rejected, Resolution

__version__ = "0.1.0"

__all__ = [
    "CastoreError",
    "Line",
    "Manifest",
    "Match",
    "Metric",
    "Plan",
    "Rejected",
    "Repo",
    "Resolution",
    "Saved",
    "__version__",
    "collect",
    "errors",
    "processors",
    "score",
    "words",
]

# imported when they are first used: a quarter of the time in which `castore --help` answers
_PLACES = {
    "Line": "manifest",
    "Manifest": "manifest",
    "Match": "resolve",
    "Metric": "manifest",
    "Plan": "gc",
    "Rejected": "resolve",
    "Repo": "repo",
    "Resolution": "resolve",
    "Saved": "repo",
    "collect": "gc",
    "processors": "repo",
    "score": "quality",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"castore.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
