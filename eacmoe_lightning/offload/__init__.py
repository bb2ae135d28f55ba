"""Experts that rest compressed outside the accelerator's memory (MoE-Compression, arXiv 2509.07727)."""

from eacmoe_lightning.offload.model import Offload, offload_experts

__all__ = ["Offload", "offload_experts"]
