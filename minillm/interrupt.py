"""Ctrl-C and SIGTERM in a loop that must not be cut in the middle of a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minillm.errors import Interrupted


class Request:
    """Which signal has come, if any."""

    signal: int | None = None


@contextmanager
def deferred_signals(told: str = "finishing this step first") -> Iterator[Request]:
    """While it is on, the first Ctrl-C or SIGTERM only notes itself, and `told` is shown; a second
    one stops at once.

    Outside the main thread, where Python takes no signals, it does nothing.
    """
    asked, kept = Request(), {}

    def note(number: int, frame) -> None:
        if asked.signal is not None:
            raise Interrupted(number, "stopped at once")
        asked.signal = number
        # not print: a handler may come in the middle of one
        os.write(2, f"\n{told} (again to stop at once)\n".encode())

    if threading.current_thread() is threading.main_thread():
        heard = [number for number in (signal.SIGINT, signal.SIGTERM)
                 if signal.getsignal(number) != signal.SIG_IGN]  # as of nohup, or a job behind
        kept = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
