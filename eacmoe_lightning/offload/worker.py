"""A process that decodes experts: jobs come on stdin, answers go to stdout, weights go into shared memory.

SZ3's binding holds the GIL while it decodes, so threads of one process would wait for each other and hold up the model.
`python -c BOOT` starts a worker; it exits when its stdin closes.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

LENGTH = struct.Struct("<I")

# Importing the package imports transformers, which would cost every worker seconds and hundreds of MB. Empty modules
# stand in for the parent packages instead.
BOOT = """
import sys, types
for name, path in (("eacmoe_lightning", {package!r}), ("eacmoe_lightning.offload", {offload!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from eacmoe_lightning.offload.worker import main
main(*map(int, sys.argv[1:]))
"""


def command(*descriptors: int) -> list[str]:
    """The command that starts a worker; `descriptors` are the arguments of `main`."""
    here = Path(__file__).resolve().parent
    boot = BOOT.format(package=str(here.parent), offload=str(here))
    return [sys.executable, "-c", boot, *map(str, descriptors)]


def send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message.

    Raises:
        EOFError: the other side has closed the pipe.
    """
    return pickle.loads(_read(stream, LENGTH.unpack(_read(stream, LENGTH.size))[0]))


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("the pipe was closed")
    return data


def main(store_fd: int, store_bytes: int, arena_fd: int, arena_bytes: int) -> None:
    """Answers each job with the seconds it took, or with the message of its error."""
    import torch

    from eacmoe_lightning.offload.jobs import run
    from eacmoe_lightning.offload.memory import map_bytes
    from eacmoe_lightning.run.files import StoreError

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to stderr, not between the answers
    store = memoryview(mmap.mmap(store_fd, store_bytes, access=mmap.ACCESS_READ))
    arena = map_bytes(arena_fd, arena_bytes)
    try:
        send(answers, os.getpid())
        while True:
            job = receive(sys.stdin.buffer)
            try:
                send(answers, run(job, store, arena))
            except StoreError as error:
                send(answers, str(error))
    except (EOFError, BrokenPipeError):  # the parent process is gone
        os._exit(0)  # a regular exit would fail to flush the pipe
