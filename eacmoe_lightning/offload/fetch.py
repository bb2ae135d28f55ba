"""Where experts are decoded: in the model's thread, in other threads of this process, or in worker processes.

All three take a task and return a future. Threads suit codecs whose libraries release the GIL (zstd); SZ3 needs
processes. A worker process that dies or does not answer costs a warning and some time, but does not stop generation:
this process decodes the expert, and another worker starts.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from eacmoe_lightning.offload import worker
from eacmoe_lightning.offload.codecs.record import RecordError
from eacmoe_lightning.offload.counters import Counters
from eacmoe_lightning.offload.jobs import Job, run
from eacmoe_lightning.offload.memory import Arena
from eacmoe_lightning.offload.store import ExpertStore

TIMEOUT = 120.0  # seconds that a worker may take to decode one expert, or to start
MAX_DEAD = 3  # workers that one thread replaces; after that it decodes experts itself

Decode = Callable[[Job], float]  # returns the seconds it took


class Fetcher:
    """Decodes in the thread that submits; nothing overlaps."""

    is_parallel = False

    def __init__(self, store: ExpertStore, arena: Arena, counters: Counters) -> None:
        self.store, self.arena, self.counters = store, arena, counters
        self.lock = threading.RLock()  # of all caches: one thread at a time runs the experts of a model

    def submit(self, task: Callable[[Decode], float]) -> Future[float]:
        """Runs `task(decode)`, which calls `decode(job)` and may do more in the same thread (copy to a device)."""
        future: Future[float] = Future()
        try:
            future.set_result(task(self.decode))
        except BaseException as error:
            future.set_exception(error)
        return future

    def decode(self, job: Job) -> float:
        return run(job, self.store.view, self.arena.bytes)

    def close(self) -> None:
        """Stops threads and processes."""


class Threads(Fetcher):
    """Decodes in threads of this process."""

    is_parallel = True

    def __init__(self, store: ExpertStore, arena: Arena, counters: Counters, num_workers: int) -> None:
        super().__init__(store, arena, counters)
        self.executor = ThreadPoolExecutor(num_workers, "eacmoe-fetch")

    def submit(self, task: Callable[[Decode], float]) -> Future[float]:
        try:
            return self.executor.submit(task, self.decode)
        except RuntimeError as error:
            raise RuntimeError("the model cannot fetch experts after `offload.close()`: load it again") from error

    def close(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)


class Processes(Threads):
    """Decodes in worker processes, one for each thread.

    Args:
        timeout: seconds that a process may take for one job, or to start.
    """

    def __init__(
        self, store: ExpertStore, arena: Arena, counters: Counters, num_workers: int, timeout: float = TIMEOUT
    ) -> None:
        super().__init__(store, arena, counters, num_workers)
        self.timeout, self.local = timeout, threading.local()  # `worker` and `dead` of each thread
        self.started: SimpleQueue[Worker] = SimpleQueue()  # workers that no thread has taken yet
        self.workers: list[Worker] = []
        for _ in range(num_workers):
            self._start()

    def _start(self) -> Worker:
        self.workers.append(Worker(self.store, self.arena))
        self.started.put(self.workers[-1])
        return self.workers[-1]

    def decode(self, job: Job) -> float:
        """Decodes in the thread's worker, or in this process while the worker starts or if it fails."""
        try:
            assigned = self._worker_of_thread()
            if assigned is None or not assigned.is_ready(self.timeout):
                return super().decode(job)
            answer = assigned.ask(job, self.timeout)
        except (OSError, EOFError, TimeoutError) as error:
            self._replace_worker(error)
            return super().decode(job)
        if isinstance(answer, str):
            raise RecordError(answer)
        return answer

    def _worker_of_thread(self) -> Worker | None:
        if not hasattr(self.local, "worker"):
            self.local.worker, self.local.dead = self.started.get(), 0
        return self.local.worker

    def _replace_worker(self, error: Exception) -> None:
        self.local.worker.close()
        self.local.dead += 1
        self.counters.dead_workers += 1
        self.local.worker = None
        if self.local.dead <= MAX_DEAD:
            try:
                self._start()
                self.local.worker = self.started.get()
            except OSError as failure:
                error = failure
        outcome = "starts another worker" if self.local.worker else "starts no other worker: decoding will be slower"
        warnings.warn(
            f"a worker that decodes experts failed ({error}); this process decodes its expert and {outcome}",
            stacklevel=2,
        )

    def close(self) -> None:
        super().close()
        for each in self.workers:
            each.close()


class Worker:
    """A process of `worker.py` and this side of its pipes; it takes some seconds to start."""

    def __init__(self, store: ExpertStore, arena: Arena) -> None:
        descriptors = store.file.fileno(), arena.file.fileno()
        self.process = subprocess.Popen(
            worker.command(descriptors[0], store.nbytes, descriptors[1], arena.nbytes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.started_at, self.pid = time.monotonic(), None

    def is_ready(self, timeout: float) -> bool:
        """Whether it takes jobs yet; does not wait.

        Raises:
            EOFError, TimeoutError: it died, or has not been ready for `timeout` seconds.
        """
        if self.pid is None and self._has_answered(0):
            self.pid = worker.receive(self.process.stdout)
        if self.pid is None and time.monotonic() - self.started_at > timeout:
            raise TimeoutError(f"it did not start within {timeout} s")
        return self.pid is not None

    def ask(self, job: Job, timeout: float) -> float | str:
        """Has a job decoded; returns the seconds it took, or the message of an error.

        Raises:
            OSError, EOFError, TimeoutError: the process is gone or takes too long.
        """
        worker.send(self.process.stdin, job)
        if not self._has_answered(timeout):
            raise TimeoutError(f"no answer within {timeout} s")
        return worker.receive(self.process.stdout)

    def _has_answered(self, timeout: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
