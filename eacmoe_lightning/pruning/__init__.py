"""Removing experts for good: which (`rule.py`, `scores.py`) and how a model shrinks (`surgery.py`)."""
