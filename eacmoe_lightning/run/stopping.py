"""SIGTERM, SIGINT and SIGHUP end a job at once: the exit code that schedulers expect, and a line on how to go on.

Whatever a job has finished is on disk already, so there is nothing to save first: a block may take hours, and a
scheduler kills a job that has not ended after some seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal has ended the job; the exit code is 128 + its number (SIGTERM 143, SIGINT 130, SIGHUP 129)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Stopping:
    """A context in which the first SIGTERM, SIGINT or SIGHUP raises `Stopped`, and a second one ends the process.

    A signal that the process ignores stays ignored, and a handler that somebody else has set runs first. Outside the
    main thread, where Python runs no handlers, the context does nothing.

    Args:
        message: what to write to stderr after "stopped by SIGTERM", or None to write nothing; called when the signal
            arrives.
        on_signal: called with the signal's number before `Stopped` is raised.
    """

    def __init__(self, message: Callable[[], str | None], on_signal: Callable[[int], None] | None = None) -> None:
        self.message, self.on_signal = message, on_signal
        self.received: int | None = None
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self._before = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}
        self.install()
        return self

    def install(self) -> None:
        """Sets the handlers again, after somebody else has set others."""
        for signum in self._before:
            signal.signal(signum, self._stop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self.received is not None and isinstance(error, SystemExit) and not isinstance(error, Stopped):
            raise Stopped(self.received) from error  # Lightning's exception for SIGTERM, whose exit code is 0

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
            return
        self.received = signum
        before = self._before[signum]
        if callable(before) and before is not signal.default_int_handler and not _is_ours(before):
            before(signum, frame)
        if (message := self.message()) is not None:  # not by print, which may be at work right now
            os.write(2, f"\nstopped by {signal.Signals(signum).name}{message}\n".encode())
        if self.on_signal is not None:
            self.on_signal(signum)
        raise Stopped(signum)


def _is_ours(handler: Callable) -> bool:
    return isinstance(getattr(handler, "__self__", None), Stopping)
