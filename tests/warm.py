"""The program in processes forked from one that has loaded torch already: to import it takes longer than most tests.

Each is a process of its own, with its own arguments, environment, folder, pipes, signals and exit status; only the
start of the interpreter is left out. ``python tests/warm.py FD`` is the process that forks.
"""

from __future__ import annotations

import array
import atexit
import functools
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS", "LD_", "MALLOC", "TORCH", "CUDA")
_LARGEST = 1 << 17


def at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that count at the start of an interpreter, and later no more."""
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


class WarmProcess(subprocess.Popen[str]):
    """``castore ARGUMENTS`` as a :class:`subprocess.Popen`, forked from the warm process."""

    _status: socket.socket

    def _execute_child(  # type: ignore[override]
        self, args: Any, _executable: Any, _preexec: Any, _close: Any, _pass: Any, cwd: Any, env: Any, _startup: Any,
        _flags: Any, _shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int,
        *_rest: Any,
    ) -> None:  # fmt: skip
        self._status, theirs = socket.socketpair()
        streams = [stream if stream >= 0 else at for at, stream in enumerate((p2cread, c2pwrite, errwrite))]
        request = json.dumps({"arguments": args[1:], "cwd": os.fspath(cwd), "environment": dict(env)}).encode()
        assert len(request) < _LARGEST
        rights = array.array("i", [*streams, theirs.fileno()])
        _server().sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        theirs.close()
        self.pid = int(self._status.recv(32))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        try:
            told = self._status.recv(32, socket.MSG_DONTWAIT if flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        self._status.close()
        return self.pid, int(told)

    def _internal_poll(self, *_arguments: Any, **_options: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,  # not a file, in which streams have a place
        stderr=subprocess.STDOUT,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.communicate()

    atexit.register(end)
    return ours


# -- the process that forks --------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request. Returns in those, with the request; ends with the tests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
        message, ancillary, *_ = requests.recvmsg(_LARGEST, space)
        if not message:
            os._exit(0)
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        if os.fork() == 0:
            requests.close()
            return _fork(json.loads(message), list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def _fork(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """Fork the process that was asked for and, in this one, say its pid, wait for it and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = descriptors
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        for standard in range(3):
            os.close(standard)
        told = socket.socket(fileno=status)
        told.send(str(pid).encode())
        told.send(str(os.waitpid(pid, 0)[1]).encode())
        os._exit(0)
    os.close(status)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return request


def become(request: Mapping[str, Any]) -> None:
    """Take on the arguments, the environment, the folder and the streams of a process that was asked for."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["castore", *request["arguments"]]
    for stream in (sys.stdout, sys.stderr):  # they write to what has their numbers now
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())


if __name__ == "__main__":
    for loaded in ("castore.dcp", "castore.torch", "nanecho.train", "castore.__main__"):
        importlib.import_module(loaded)
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
    sys.modules["castore.__main__"].main()
