"""Signals that ask a program to end, turned into a request that a loop honours after its step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """The signal that asked the program to end, if any: ``number`` is 0 until then."""

    number = 0

    @property
    def name(self) -> str:
        """The signal's name, such as ``SIGTERM``, or an empty string."""
        return signal.Signals(self.number).name if self.number else ""

    @property
    def exit_code(self) -> int:
        """The code to exit with, 128 and the number of the signal; 0 without one."""
        return 128 + self.number if self.number else 0


@contextlib.contextmanager
def stop_signals(tell: Callable[[str], None] | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGHUP into a request; a second one ends the program at once.

    A signal that whoever started the program has it ignore, as nohup does, stays ignored. ``tell`` is called with the
    signal's name, in the middle of whatever runs; by default a line goes to standard error. Works in the main thread.
    """
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.number:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
            os._exit(128 + number)  # not waiting for a save in the background: what it has not finished is not visible
        request.number = number
        (tell or _tell)(request.name)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell(name: str) -> None:
    # not print(): the signal may have come in the middle of one
    os.write(2, f"castore: {name}: finishing the step and saving; once more ends at once\n".encode())
