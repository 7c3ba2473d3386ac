"""Stop signals: recorded when they arrive, handled after the current training step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from fradique.runtime.device import Runtime

# train.py records it when nobody reads its output. Windows does not define signal.SIGPIPE.
SIGPIPE = 13


class StopSignal:
    """Records SIGTERM, SIGHUP, Ctrl-C and Ctrl-Break until the current step is done.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        """Install the handlers in the main thread; Python allows it in no other thread."""
        self.number = 0  # of the last signal; 0: none
        self._previous: dict[int, Any] = {}  # signal number -> handler to restore
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)  # no SIGHUP on Windows, SIGBREAK only there
                # an ignored signal stays ignored: nohup makes a program ignore SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Raises KeyboardInterrupt at the second Ctrl-C."""
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def name(self) -> str:
        """The name of the last signal."""
        return "SIGPIPE" if self.number == SIGPIPE else signal.Signals(self.number).name

    def requested(self, runtime: Runtime) -> bool:
        """Whether any rank has received a signal; the same answer on all ranks."""
        number = int(runtime.max(self.number)[0])
        if number and not self.number:  # only another rank received a signal
            self.number = number
        return number != 0

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
