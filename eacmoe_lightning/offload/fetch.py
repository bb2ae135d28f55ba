"""Who decodes: nobody beside the model, threads of this process, or worker processes.

All take a job and give a future. Threads suit codecs whose libraries release Python's lock (zstd); SZ3 needs processes.
A worker process that dies or does not answer costs a warning and some time, never the generation: its job is done in
this process, and another worker is started.
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

TIMEOUT = 120.0  # seconds that a worker has for one expert, or for its start
MAX_DEAD = 3  # workers that one thread starts again; then it decodes by itself

Decode = Callable[[Job], float]  # the seconds that it took


class Fetcher:
    """Decodes in the thread that asks; nothing overlaps."""

    is_parallel = False

    def __init__(self, store: ExpertStore, arena: Arena, counters: Counters) -> None:
        self.store, self.arena, self.counters = store, arena, counters

    def submit(self, task: Callable[[Decode], float]) -> Future[float]:
        """Has `task(decode)` run, which calls `decode(job)` and may do more in the same thread (copy to a device)."""
        future: Future[float] = Future()
        try:
            future.set_result(task(self.decode))
        except BaseException as error:
            future.set_exception(error)
        return future

    def decode(self, job: Job) -> float:
        return run(job, self.store.view, self.arena.bytes)

    def close(self) -> None:
        """Ends threads and processes."""


class Threads(Fetcher):
    """Decodes in threads of this process."""

    is_parallel = True

    def __init__(self, store: ExpertStore, arena: Arena, counters: Counters, num_workers: int) -> None:
        super().__init__(store, arena, counters)
        self.executor = ThreadPoolExecutor(num_workers, "eacmoe-fetch")

    def submit(self, task: Callable[[Decode], float]) -> Future[float]:
        return self.executor.submit(task, self.decode)

    def close(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)


class Processes(Threads):
    """Decodes in processes, one behind each thread.

    Args:
        timeout: seconds that a process may take for one job.
    """

    def __init__(
        self, store: ExpertStore, arena: Arena, counters: Counters, num_workers: int, timeout: float = TIMEOUT
    ) -> None:
        super().__init__(store, arena, counters, num_workers)
        self.timeout, self.own = timeout, threading.local()
        self.started: SimpleQueue[Worker] = SimpleQueue()  # not yet taken by a thread
        self.workers: list[Worker] = []
        for _ in range(num_workers):
            self._start()

    def _start(self) -> Worker:
        self.workers.append(Worker(self.store, self.arena))
        self.started.put(self.workers[-1])
        return self.workers[-1]

    def decode(self, job: Job) -> float:
        """In the thread's process; in this one as long as that is starting, or when it fails."""
        try:
            own = self._own_worker()
            if own is None or not own.is_ready(self.timeout):
                return super().decode(job)
            answer = own.ask(job, self.timeout)
        except (OSError, EOFError, TimeoutError) as error:
            self._bury(error)
            return super().decode(job)
        if isinstance(answer, str):
            raise RecordError(answer)
        return answer

    def _own_worker(self) -> Worker | None:
        if not hasattr(self.own, "worker"):
            self.own.worker, self.own.dead = self.started.get(), 0
        return self.own.worker

    def _bury(self, error: Exception) -> None:
        self.own.worker.close()
        self.own.dead += 1
        self.counters.dead_workers += 1
        self.own.worker = None
        if self.own.dead <= MAX_DEAD:
            try:
                self._start()
                self.own.worker = self.started.get()
            except OSError as failure:
                error = failure
        more = "another is started" if self.own.worker else "no other is started: expect it to be slower"
        warnings.warn(
            f"a worker that decodes experts failed ({error}); its expert is decoded in this process, {more}",
            stacklevel=2,
        )

    def close(self) -> None:
        super().close()
        for each in self.workers:
            each.close()


class Worker:
    """A process of `worker.py` and the two ends of its pipes; it needs some seconds until it is ready."""

    def __init__(self, store: ExpertStore, arena: Arena) -> None:
        descriptors = store.file.fileno(), arena.file.fileno()
        self.process = subprocess.Popen(
            worker.command(descriptors[0], store.nbytes, descriptors[1], arena.nbytes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.since, self.pid = time.monotonic(), None

    def is_ready(self, timeout: float) -> bool:
        """Whether it takes jobs; does not wait.

        Raises:
            EOFError, TimeoutError: it died, or has not been ready for `timeout` seconds.
        """
        if self.pid is None and self._has_answered(0):
            self.pid = worker.receive(self.process.stdout)
        if self.pid is None and time.monotonic() - self.since > timeout:
            raise TimeoutError(f"it did not start within {timeout} s")
        return self.pid is not None

    def ask(self, job: Job, timeout: float) -> float | str:
        """Seconds, or the message of an error.

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
