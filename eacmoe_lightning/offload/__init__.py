"""Experts that rest compressed outside the accelerator's memory (MoE-Compression, arXiv 2509.07727)."""
