"""``python -m nanecho``: `castore train`, under a name that torchrun takes.

torchrun --nproc-per-node 2 -m nanecho --shard
"""

from __future__ import annotations

import sys

from castore.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
