"""TODO."""

import signal
import threading
from types import FrameType

from fradique.runtime.device import Runtime

SIGPIPE = 13  # what ends a program whose output nobody reads any more; Windows has no name for it


class StopSignal:
    """SIGTERM, SIGHUP and Ctrl-C, remembered until the step is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for name in ("SIGTERM", "SIGINT", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
                    self.before[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @property
    def name(self) -> str:
        return "SIGPIPE" if self.number == SIGPIPE else signal.Signals(self.number).name

    def heard(self, runtime: Runtime) -> bool:
        """Whether any rank was told to stop; then all of them know."""
        told = int(runtime.max(self.number)[0])
        self.number = self.number or told  # one may have come while the ranks told each other
        return told != 0

    def forget(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
