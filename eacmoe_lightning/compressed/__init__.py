"""The compressed model directory: its format, writing and loading it, and opening any model by path or name."""
