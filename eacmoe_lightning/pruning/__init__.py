"""Scores and the rule that decide which experts are removed for good. `calibration/blocks.py` applies the rule."""
