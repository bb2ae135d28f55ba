"""Models that are never in memory whole: their weights come from disk one decoder block at a time."""

from eacmoe_lightning.streaming.checkpoint import Checkpoint
from eacmoe_lightning.streaming.model import StreamedModel, Weights

__all__ = ["Checkpoint", "StreamedModel", "Weights"]
