"""Measure what an edit of one byte in the middle of a large file costs: python bench/files.py [SIZE_IN_MB]

Adds a file of random bytes, changes one byte in its middle, adds it again, checks it out and compares.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from castore import Repo
from castore.trees import checkout
from castore.trees.add import add_tree


def timed(what: str, call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    new = f", {result.new_bytes / 1e6:.2f} MB new" if hasattr(result, "new_bytes") else ""
    print(f"{what:9} {time.perf_counter() - began:6.2f} s{new}, peak memory {peak:.0f} MB", flush=True)
    return result


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    size = int(sys.argv[1]) * 1_000_000 if len(sys.argv) > 1 else 1_000_000_000
    folder = Path(tempfile.mkdtemp(prefix="castore-bench-"))
    try:
        repo = Repo.init(folder)
        big = folder / "big"
        with open(big, "wb") as file:
            for start in range(0, size, 1_000_000):
                file.write(os.urandom(min(1_000_000, size - start)))
        timed("add", lambda: add_tree(repo, big))
        timed("add again", lambda: add_tree(repo, big))
        with open(big, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
        edited = timed("add edit", lambda: add_tree(repo, big))
        timed("checkout", lambda: checkout.check_out(repo, edited.id, folder / "out"))
        print("equal" if digest(big) == digest(folder / "out" / "big") else "DIFFERENT")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
