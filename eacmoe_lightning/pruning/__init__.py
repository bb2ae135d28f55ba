"""Which experts are removed for good: scores and the rule. The block loop applies it (`calibration/blocks.py`)."""
