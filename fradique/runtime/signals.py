"""Stop signals: remembered until the current training step is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from fradique.runtime.device import Runtime

SIGPIPE = 13  # ends a program whose output nobody reads; Windows does not define it


class StopSignal:
    """SIGTERM, SIGHUP and Ctrl-C, remembered until the step is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Install the handlers, if this is the main thread: only it may."""
        self.number = 0  # of the signal that came; 0: none yet
        self._previous: dict[int, Any] = {}  # signal -> handler to restore
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP on purpose
                    self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def name(self) -> str:
        """The name of the signal that came."""
        return "SIGPIPE" if self.number == SIGPIPE else signal.Signals(self.number).name

    def requested(self, runtime: Runtime) -> bool:
        """Whether any rank received a signal; the same answer on all ranks."""
        number = int(runtime.max(self.number)[0])
        self.number = self.number or number  # one may have come during the all-reduce
        return number != 0

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
