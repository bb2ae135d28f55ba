"""Calibrate, quantize and ship Mixture-of-Experts language models as a Lightning job (EAC-MoE, arXiv 2508.01625)."""

from eacmoe_lightning.compressed import load
from eacmoe_lightning.version import __version__

__all__ = ["__version__", "load"]
