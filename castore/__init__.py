"""castore: a content-addressed store for training checkpoints.

    >>> import castore
    >>> repo = castore.Repo.init(".")
    >>> state = {"model": {"weights": [0.25, 0.5]}, "trainer": {"step": 500}}
    >>> saved = repo.save(state, run="ci", step=500, metrics={"val_loss": 2.31})
    >>> repo.load(repo.resolve("best").require().id) == state
    True

    >>> repo.checkpoints(run="ci")[0].id == repo.find("latest").id == saved.id
    True

In a training loop, :class:`castore.torch.Checkpointer` does all of it: it saves in the background, resumes, and stops
well. :mod:`castore.integrations` fits castore into transformers, Lightning and Accelerate, :mod:`castore.dcp` into
torch.distributed. On the command line ``castore --help`` lists what there is.

Importing castore imports neither torch nor NumPy; saving and loading tensors does.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from castore import errors, text
from castore.errors import CastoreError

if TYPE_CHECKING:
    from castore.format.manifest import Experiment, Manifest, Metric
    from castore.gc import GCPlan, collect_garbage
    from castore.parallel import processors
    from castore.policy.resolution import Match, Rejected, Resolution
    from castore.policy.scoring import score
    from castore.repo import Repo, SaveResult

__version__ = "0.1.0"

logging.getLogger("castore").addHandler(logging.NullHandler())  # silent unless the program asks

__all__ = [
    "CastoreError",
    "Experiment",
    "GCPlan",
    "Manifest",
    "Match",
    "Metric",
    "Rejected",
    "Repo",
    "Resolution",
    "SaveResult",
    "__version__",
    "collect_garbage",
    "errors",
    "processors",
    "score",
    "text",
]

# imported on first use, which saves a quarter of the time that `castore --help` takes
_MODULES = {
    "Experiment": "format.manifest",
    "GCPlan": "gc",
    "Manifest": "format.manifest",
    "Match": "policy.resolution",
    "Metric": "format.manifest",
    "Rejected": "policy.resolution",
    "Repo": "repo",
    "Resolution": "policy.resolution",
    "SaveResult": "repo",
    "collect_garbage": "gc",
    "processors": "parallel",
    "score": "policy.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"castore.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
