"""Removing experts for good: which (`rule.py`, `scores.py`), how a model shrinks (`surgery.py`), and the command for
finished models (`command.py`); in a run `calibration.Calibration` does it."""
