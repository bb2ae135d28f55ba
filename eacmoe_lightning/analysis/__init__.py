"""Which experts a model selects for which text: `python train.py analyze --help`."""

from eacmoe_lightning.analysis.command import analyze

__all__ = ["analyze"]
