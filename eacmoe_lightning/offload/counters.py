"""What offloading did: counts and times, as a dict or in TensorBoard."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Counters:
    """Totals since the start or the last `reset`.

    Attributes:
        hits: requested experts that were in the cache.
        late: requested experts whose prefetch was still running.
        misses: requested experts that had to be fetched.
        prefetches: experts fetched on a prediction.
        useless_prefetches: prefetched experts that were evicted before any request.
        evictions: experts evicted to make room for another.
        bytes_moved: compressed bytes that fetches read.
        bytes_saved: uncompressed bytes of the same experts, less `bytes_moved`.
        decode_seconds: time spent decoding, summed over workers.
        stall_seconds: time that the computation waited for experts.
        dead_workers: worker processes that died or did not answer in time.
        passes: times a block needed several passes because the cache could not hold its experts at once.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    prefetches: int = 0
    useless_prefetches: int = 0
    evictions: int = 0
    bytes_moved: int = 0
    bytes_saved: int = 0
    decode_seconds: float = 0.0
    stall_seconds: float = 0.0
    dead_workers: int = 0
    passes: int = 0

    @property
    def requests(self) -> int:
        return self.hits + self.late + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of requests that did not wait."""
        return self.hits / max(self.requests, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"requests": self.requests, "hit_rate": self.hit_rate}

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, field.default)

    def log(self, writer: Any, step: int, prefix: str = "offload") -> None:
        """Writes every counter to TensorBoard.

        Args:
            writer: a `SummaryWriter`, for example `trainer.logger.experiment`.
        """
        for name, value in self.to_dict().items():
            writer.add_scalar(f"{prefix}/{name}", value, step)
