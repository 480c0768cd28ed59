"""Azurite, an independent implementation of Azure's blob store, as the place where the stand-in's entries are.

It checks signatures by itself: the URLs here are signed with the account key that all Azurites share.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import subprocess
from datetime import UTC, datetime, timedelta
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ACCOUNT = "devstoreaccount1"
KEY = base64.b64decode("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==")
VERSION = "2019-12-12"  # the last before encryption scopes, which add a field to what is signed
CONTAINER = "actions-cache"


class Azurite:
    """A running Azurite that keeps everything in memory, with a container for the entries of one service."""

    def __init__(self, modules: Path) -> None:
        program = modules / "azurite" / "dist" / "src" / "blob" / "main.js"
        options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence"]
        self._process = subprocess.Popen(
            ["node", str(program), *options, "--skipApiVersionCheck", "--disableTelemetry", "--silent"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.base = self._listening()
        self._ask("PUT", f"{CONTAINER}?restype=container")

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def url(self, name: str, permissions: str, lifetime: float) -> str:
        """A URL with a shared access signature for one blob.

        https://learn.microsoft.com/rest/api/storageservices/create-service-sas gives the order of the fields.
        """
        expiry = _timestamp(lifetime)
        resource = f"/blob/{ACCOUNT}/{CONTAINER}/{name}"
        identifier = address = protocol = snapshot = ""
        overridden = [""] * 5  # headers of the answer
        fields = [permissions, "", expiry, resource, identifier, address, protocol, VERSION, "b", snapshot, *overridden]
        query = {"sp": permissions, "se": expiry, "sv": VERSION, "sr": "b", "sig": _sign("\n".join(fields))}
        return f"{self.base}/{CONTAINER}/{name}?{urlencode(query)}"

    def size(self, name: str) -> int | None:
        try:
            with self._ask("HEAD", f"{CONTAINER}/{name}") as response:
                return int(response.headers["Content-Length"])
        except HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            raise

    def read(self, name: str) -> bytes:
        with self._ask("GET", f"{CONTAINER}/{name}") as response:
            return bytes(response.read())

    def write(self, name: str, data: bytes) -> None:
        self._ask("PUT", f"{CONTAINER}/{name}", data, {"x-ms-blob-type": "BlockBlob"}).close()

    def delete(self, name: str) -> None:
        self._ask("DELETE", f"{CONTAINER}/{name}").close()

    def _ask(self, verb: str, path: str, data: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        """The answer to a request with a signature that permits everything in the account."""
        expiry = _timestamp(600)
        fields = {"sp": "rwdlac", "ss": "b", "srt": "sco", "st": "", "se": expiry, "sip": "", "spr": "", "sv": VERSION}
        signature = _sign("".join(f"{value}\n" for value in [ACCOUNT, *fields.values()]))
        query = urlencode({name: value for name, value in fields.items() if value} | {"sig": signature})
        url = f"{self.base}/{path}{'&' if '?' in path else '?'}{query}"
        response: HTTPResponse = urlopen(Request(url, data if verb == "PUT" else None, headers or {}, method=verb))
        return response

    def _listening(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := re.search(r"listens on (http://\S+)", line):
                return f"{match[1]}/{ACCOUNT}"
        raise RuntimeError("Azurite did not start")


def _timestamp(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _sign(text: str) -> str:
    return base64.b64encode(hmac.digest(KEY, text.encode(), hashlib.sha256)).decode()
