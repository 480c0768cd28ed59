"""Object stores that others wrote, each started for the tests: SeaweedFS, rclone and Azurite's blobs by their keys."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BUCKET = "checkpoints"
KEY_ID, SECRET = "AKIAOFTHETESTS", "secret-of-the-tests"


def free_port() -> int:
    """Return a port that is free, as is the one ten thousand above, which SeaweedFS takes for its other interface."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


@dataclass
class S3Server:
    """A program that speaks S3 at ``port``. ``creates``: it can refuse to overwrite."""

    process: subprocess.Popen[bytes]
    port: int
    creates: bool

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def _start(command: Sequence[str], log: Path, port: int, creates: bool) -> S3Server:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", "/")
                connection.getresponse().read()
            return S3Server(process, port, creates)
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError(log.read_text())


def seaweedfs(programs: Path, folder: Path, *, volume_mb: int = 64) -> S3Server:
    """Start SeaweedFS, all its servers in one process, with a bucket that takes a hundred times ``volume_mb``."""
    settings = {
        "identities": [
            {
                "name": "tests",
                "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}],
                "actions": ["Admin", "Read", "Write", "List"],
            }
        ]
    }
    (folder / "s3.json").write_text(json.dumps(settings))
    (folder / "data").mkdir()
    port = free_port()
    options = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
    command = [
        str(programs / "weed"), "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-s3",
        f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}",
        f"-master.volumeSizeLimitMB={volume_mb}", "-volume.max=100", *options,
    ]  # fmt: skip
    server = _start(command, folder / "log", port, creates=True)
    _make_bucket(server)
    return server


def _make_bucket(server: S3Server) -> None:
    import boto3  # it comes with moto

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    for _ in range(100):
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except Exception:
            time.sleep(0.2)
    raise AssertionError("SeaweedFS takes no bucket")


def rclone(programs: Path, folder: Path) -> S3Server:
    """Start rclone's S3 server over a folder: one that knows neither conditions nor all ranges."""
    (folder / "served" / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [
        str(programs / "rclone"), "serve", "s3", "--auth-key", f"{KEY_ID},{SECRET}", "--addr", f"127.0.0.1:{port}",
        str(folder / "served"),
    ]  # fmt: skip
    return _start(command, folder / "log", port, creates=False)
