"""The fuzzing of tests/fuzz.py, led by coverage: atheris goes on from inputs that reach code that none did before.

    make fuzz                                        # all decoders: 10 minutes
    python tests/guided_fuzz.py --seconds 60 index   # this one alone; needs atheris

An input that fails is written to tests/corpus and named.
"""

# ruff: noqa: T201 - a program, too

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def lead(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one decoder in this process, which ends with 0 if nothing fails."""
    import atheris

    with atheris.instrument_imports(include=["castore"]):
        import fuzz

    target = fuzz.targets(folder)[name]
    seeds, kept = folder / "seeds", fuzz.CORPUS / name.replace(" ", "-")
    seeds.mkdir()
    kept.mkdir(exist_ok=True)
    for number, data in enumerate([*target.seeds, *fuzz.corpus(name)]):
        (seeds / str(number)).write_bytes(data)

    def decode(data: bytes) -> None:
        if (error := fuzz.failure(target, data)) is not None:
            raise error

    options = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=2048", f"-artifact_prefix={kept}/"]
    atheris.Setup([sys.argv[0], str(seeds), *options, "-print_final_stats=1"], decode)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each decoder in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="DECODER")
    parser.add_argument("--seconds", type=int, default=30, help="for each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # before castore is imported
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.here:
            lead(given.names[0], given.seconds, Path(folder))
            return 0
        import fuzz

        names = given.names or list(fuzz.targets(Path(folder)))
    failed = total = 0
    for name in names:
        arguments = [sys.executable, __file__, "--here", "--seconds", str(given.seconds), name]
        ended = subprocess.run(arguments, capture_output=True, text=True, errors="replace", check=False)
        said = ended.stdout + ended.stderr
        runs = int(found[1]) if (found := re.search(r"number_of_executed_units: (\d+)", said)) else 0
        print(f"{name:13} {runs:>12,}", flush=True)
        if ended.returncode:
            failed += 1
            print(said[-3000:])
        total += runs
    print(f"{'in all':13} {total:>12,} inputs, {failed or 'no'} decoders failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
