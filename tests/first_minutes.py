"""The first minutes of a new user, with what the README says and nothing else."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# a model of the size of a test, which the README leaves to `castore train --help`
SMALL = """
    --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-samples 4 --warmup-iters 2
""".split()  # noqa: SIM905


def build_wheel(folder: Path, python: str) -> Path:
    """Build the wheel of this checkout, from a copy of what git knows of it, and return its path."""
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, files)):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def play(program: Sequence[str], python: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Do what a new user does; fail where a command does not do what the README says of it."""

    def castore(text: str, *more: str, code: int = 0) -> str:
        words = text.split()
        assert re.search(rf"castore [^|\n]*\b{re.escape(words[0])}\b|`{re.escape(words[0])}`", README), text
        done = subprocess.run([*program, *words, *more], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == code, f"{text}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if code else done.stdout

    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text("".join(f"{j} bottles of beer number {i}\n" for j in range(40)))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    train = ("--data-dir", "texts", *SMALL)

    assert "--columns" in castore("log", "--colums", code=2)
    assert "fresh   starting at step 0" in castore("train --resume best --session-iters 4", *train)
    running = [*program, "train", "--session-iters", "0", "--max-iters", "1000000", "--save-every", "2", *train]
    process = subprocess.Popen(running, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("saved"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    step = json.loads(castore("log --json"))[0]["step"]
    assert f"resume  {json.loads(castore('log --json'))[0]['id'][:12]}, step {step:,}" in castore(
        "train --resume latest --session-iters 2", *train
    )

    assert castore("log --graph").startswith("* ")
    assert "score" in castore("show best")
    assert "model" in castore("ls best")
    assert castore("resolve best").startswith(("match", "no "))
    assert "raw" in castore("stats")
    assert "would be deleted" in castore("gc --keep 1 --dry-run")
    castore("tag best stable")
    castore("add texts")
    (folder / "texts" / "0.txt").write_text("edited")
    assert "castore add" in castore("checkout texts:latest", code=2)
    assert castore("find 0.txt").splitlines()[1].startswith("texts/0.txt")
    assert "wrote   report.html" in castore("report")
    assert (folder / "report.html").stat().st_size < 2_000_000
    castore(f"remote add shelf {folder.parent / 'shelf'}")
    castore("push")
    castore("status")
    castore("export best model.safetensors")
    castore("import model.safetensors --run imported")
    castore("verify")
    castore("doctor")

    name = json.loads(castore("log --json"))[-1]["id"]
    index = json.loads(next((folder / ".castore" / "manifests").rglob(f"*{name[:12]}.json")).read_text())
    damaged = folder / ".castore" / "objects" / index["parts"]["model"]["index"][:2] / index["parts"]["model"]["index"]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(data)
    assert castore("verify --repair")
    castore("verify")

    block = re.search(r"## In your own code\n\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    prelude = (
        "import torch\nmodel = torch.nn.Linear(2, 2)\noptimizer = torch.optim.AdamW(model.parameters())\n"
        "schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)\n"
    )
    code = prelude + block[1].replace("10_000", "20").replace("500 steps", "10 steps")
    subprocess.run([python, "-c", code], cwd=folder, env=environment, check=True)
    assert json.loads(castore("log --json --run mine"))[0]["step"] == 20
