"""Memory that worker processes can map through a file descriptor."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import BinaryIO

import torch
from torch import Tensor


def memory_file(name: str) -> BinaryIO:
    """An open file in memory, or an unnamed temporary file where the system has no files in memory."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create(name), "w+b")
    return tempfile.TemporaryFile("w+b")


class Arena:
    """Host memory that processes share.

    Args:
        nbytes: its size; the system allocates pages when they are first written.
    """

    def __init__(self, nbytes: int) -> None:
        self.file, self.nbytes = memory_file("eacmoe-experts"), nbytes
        os.ftruncate(self.file.fileno(), nbytes)
        self.bytes = map_bytes(self.file.fileno(), nbytes)


def map_bytes(fd: int, nbytes: int) -> Tensor:
    """uint8 [nbytes]: the memory of a file that is open for writing."""
    return torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
