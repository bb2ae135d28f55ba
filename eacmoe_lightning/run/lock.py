"""One job at a time works in a run directory.

The lock is the operating system's (flock), so a killed process leaves none behind. It holds on one machine, and between
machines where the file system passes locks on (NFS does; Lustre only if mounted with `flock`). Jobs on other machines
cannot be seen where it does not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

log = logging.getLogger(__name__)
LOCK = "run.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock on a run directory; the file `run.lock` in it says who holds it.

    Args:
        directory: the run directory; `take` creates it.
        option: the option that named it, for the message.
    """

    def __init__(self, directory: Path, option: str = "--trainer.default_root_dir") -> None:
        self.path, self.option = directory / LOCK, option
        self._file: int | None = None
        self._is_new = False  # the directory was made for the lock

    def __enter__(self) -> RunLock:
        self.take()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def refuse_if_taken(self) -> None:
        """Raises ValueError if another process holds the lock; creates nothing."""
        if self._file is None and self.path.exists():
            self.take()
            self.release()

    def take(self) -> None:
        """Takes the lock, and keeps it until `release` or the end of the process. A second call changes nothing.

        Raises:
            ValueError: another process holds it.
        """
        if self._file is not None:
            return
        self._is_new = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(file, 1000).decode(errors="replace")
                os.close(file)
                raise ValueError(_refusal(self.path.parent, self.option, holder)) from error
            except OSError as error:
                os.close(file)
                if error.errno not in UNSUPPORTED:
                    raise
                log.warning("%s: this file system has no locks (%s): do not start a second job there", self.path, error)
                return
            if self._is_current(file):
                break
            os.close(file)  # its last holder has removed the file that we had opened
        self._file = file
        os.truncate(file, 0)
        os.write(file, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
            if self._is_new and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


def _refusal(directory: Path, option: str, holder: str) -> str:
    try:
        who = "process {process} on {machine}".format(**json.loads(holder))
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{who} is at work in {directory} ({option}): wait until it has ended, or pass another directory. Nothing was "
        "changed"
    )
