"""Let each bundle record in a folder name a cache entry that doesn't exist, as if the cache had evicted it.

python lose_bundles.py .castore/bundles
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from castore.format.bundle import decode_record, encode_record


def main(folder: Path) -> None:
    paths = sorted(folder.glob("*.json"))
    for path in paths:
        record = decode_record(path.read_bytes())
        lost = msgspec.structs.replace(record, key=f"gone-{record.key}"[:500])
        (folder / lost.file_name).write_bytes(encode_record(lost))
        path.unlink()
    if not paths:
        sys.exit(f"{folder} has no records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
