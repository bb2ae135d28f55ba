"""Processes that decode experts: the same results; their death and damaged records are reported."""

import os
import signal
import time

import pytest
import torch
from offloading import generate, same

from eacmoe_lightning.offload.cache import Entry
from eacmoe_lightning.offload.fetch import Processes
from eacmoe_lightning.offload.model import STORE, Offload
from eacmoe_lightning.offload.store import Key
from eacmoe_lightning.run.files import StoreError

pytestmark = pytest.mark.slow


def wait_for_worker(handle: Offload) -> int:
    assert isinstance(handle.fetcher, Processes)
    (worker,) = [worker for worker in handle.fetcher.workers if worker.process.returncode is None]
    deadline = time.monotonic() + 60
    while not worker.is_ready(60):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return worker.process.pid


def test_processes_decode_the_same_and_their_death_stops_nothing(offloaded, tokens):
    plain, _ = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=0)
    expected = generate(plain, tokens)
    model, handle = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=1)
    assert same(model, expected, tokens)  # while the worker is starting
    pid = wait_for_worker(handle)
    assert same(model, expected, tokens) and handle.counters.dead_workers == 0

    os.kill(pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker that decodes experts failed.*starts another worker"):
        assert same(model, expected, tokens)
    assert handle.counters.dead_workers == 1

    other = wait_for_worker(handle)
    assert other != pid
    handle.fetcher.timeout = 1.0
    os.kill(other, signal.SIGSTOP)  # alive, and silent
    start = time.monotonic()
    with pytest.warns(UserWarning, match="no answer within 1.0 s"):
        assert same(model, expected, tokens)
    assert handle.counters.dead_workers == 2 and time.monotonic() - start < 30

    for entries in (cache.entries for cache in handle.caches):
        assert all(isinstance(entry, Entry) for entry in entries.values())


def test_a_damaged_record_is_named_by_a_worker_process(offloaded, tmp_path):
    model, handle = offloaded("mixtral", 0.5, "sz3:mean:0.1", num_workers=1, directory=tmp_path)
    wait_for_worker(handle)
    offset, length = handle.store.places[Key(0, 0, "gate_up_proj")]
    with open(tmp_path / STORE, "r+b") as file:
        file.seek(offset + length - 1)
        file.write(b"x")
    with pytest.raises(StoreError, match="block 0, expert 0, gate_up_proj.*checksum"), torch.no_grad():
        model(torch.arange(512).view(4, 128))
