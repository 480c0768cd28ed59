"""castore: a content-addressed store for training checkpoints.

    >>> repo = castore.Repo.init(path)
    >>> saved = repo.save({"model": model.state_dict()}, run="ci", step=500, metrics={"val_loss": 2.31})
    >>> state = repo.load(repo.resolve("best").require().id)

Importing castore imports neither torch nor NumPy; saving and loading tensors does.
"""

from castore import errors, words
from castore.errors import CastoreError
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
