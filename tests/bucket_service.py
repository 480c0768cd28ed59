"""An S3 service for tests: moto behind a proxy that counts requests and can do harm to some."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from moto.server import ThreadedMotoServer

Harm = Literal["", "503", "403", "expired", "cut", "reset", "slow", "wrong", "no ranges", "no create"]
SECRET = "wJalrXUtnFEMI-PLANTED-SECRET"
KEY_ID = "AKIAPLANTEDKEYID"


@dataclass(frozen=True)
class Request:
    """A request that reached the proxy; ``name`` is the path below the bucket."""

    method: str
    name: str
    sent: int = 0


def harmless(_: Request) -> Harm:
    return ""


@dataclass
class BucketService:
    """moto and its proxy. ``harm`` is asked what to do to each request; ``requests`` lists all there were."""

    bucket: str = "checkpoints"
    harm: Callable[[Request], Harm] = harmless
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._address = self._moto.get_host_and_port()
        connection = http.client.HTTPConnection(*self._address)
        connection.request("PUT", f"/{self.bucket}", headers={"Content-Length": "0"})
        assert connection.getresponse().status == 200
        connection.close()
        service = self

        class Handler(_Handler):
            pass

        Handler.service = service
        self._proxy = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def url(self, prefix: str = "") -> str:
        """Return the URL of a folder of its own in the bucket."""
        return f"s3://{self.bucket}/{prefix or uuid.uuid4().hex}"

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    @contextlib.contextmanager
    def harming(self, *harms: Harm, when: Callable[[Request], bool] | None = None) -> Iterator[None]:
        """Do these harms in turn, over and over, to the requests for which ``when`` is true, or all."""
        turns = itertools.cycle(harms)
        self.harm = lambda request: next(turns) if when is None or when(request) else ""
        try:
            yield
        finally:
            self.harm = harmless

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request on to moto; return (status, headers, body)."""
        connection = http.client.HTTPConnection(*self._address)
        connection.request(method, path, body=body or None, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        found = dict(answer.getheaders())
        connection.close()
        return answer.status, found, data


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Clients hang up, above all those that were harmed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: BucketService

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = self.path.partition("?")[0].removeprefix(f"/{self.service.bucket}").lstrip("/")
        request = Request(self.command, name, len(body))
        self.service.requests.append(request)
        harm = self.service.harm(request)
        if harm in ("503", "403", "expired"):
            code = {"503": "SlowDown", "403": "AccessDenied", "expired": "ExpiredToken"}[harm]
            text = f"<Error><Code>{code}</Code><Message>key {KEY_ID} {SECRET}</Message></Error>".encode()
            self._answer(503 if harm == "503" else 400 if harm == "expired" else 403, {}, text)
            return
        if harm == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if harm == "slow":
            time.sleep(0.3)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        headers["Host"] = self.headers["Host"]
        if harm == "no ranges":
            headers.pop("Range", None)
            headers.pop("range", None)
        if harm == "no create":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        status, found, data = self.service.forward(self.command, self.path, headers, body)
        if harm == "wrong" and self.command == "GET":
            data = bytes(byte ^ 0x5A for byte in data)
        self._answer(status, found, data, cut=harm == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length", headers.get("content-length")) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
            self.connection.close()
