"""What offloading did: counts and seconds, as a dict or in TensorBoard."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Counters:
    """Since the start, or since `reset`.

    Attributes:
        hits: experts that were in the cache when a block asked for them.
        late: experts whose prefetch had begun and was waited for.
        misses: experts whose fetch began when they were asked for.
        prefetches: experts fetched on a prediction.
        useless_prefetches: of these, evicted without having been asked for.
        evictions: experts that gave their slot to another.
        bytes_moved: compressed bytes that fetches read.
        bytes_saved: what the same experts would have been uncompressed, less `bytes_moved`.
        decode_seconds: summed over workers.
        stall_seconds: that computing waited for experts.
        dead_workers: worker processes that died or did not answer in time.
        passes: blocks that ran in several passes, for the cache did not hold their experts at once.
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
