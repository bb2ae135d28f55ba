"""Skipping experts while a model runs: EAC-MoE's PESF in prefill and decode, and baselines to compare it with.

selection.py   the paper's rule as pure functions        tokens.py      the sequence of each token, and padding
rules.py       the interface of a rule, and PESF         decode.py      PESF after the prompt
baselines.py   truncation, EES and ODP                   stored.py      rules in a model's config.json
session.py     a rule attached to a model                report.py      what a rule skipped
memory.py      what a rule remembers of a cache
apply.py       `pesf`, `skipping`, `set_skipping`
"""

from eacmoe_lightning.skipping.apply import current_rule, pesf, set_skipping, skipping
from eacmoe_lightning.skipping.baselines import EES, ODP, Truncation
from eacmoe_lightning.skipping.decode import Demand
from eacmoe_lightning.skipping.rules import PESF, Rule

__all__ = ["EES", "ODP", "PESF", "Demand", "Rule", "Truncation", "current_rule", "pesf", "set_skipping", "skipping"]
