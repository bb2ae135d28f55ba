"""Calibrate, quantize and ship Mixture-of-Experts language models as a Lightning job (EAC-MoE, arXiv 2508.01625)."""

__version__ = "0.1.0"

from eacmoe_lightning.compressed import load

__all__ = ["load"]
