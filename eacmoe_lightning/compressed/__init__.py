"""The compressed model directory: its format, writing it, loading it, and opening any model by its place."""
