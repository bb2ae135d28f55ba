"""Compares the compressed model with the original: perplexity, expert-shift and the report."""
