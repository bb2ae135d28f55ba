"""Skipping experts while a model runs: PESF of EAC-MoE in prefill and decode, and rules to measure it against.

selection.py   the paper's rule as pure functions        tokens.py   which token is whose, and which is padding
rules.py       what a rule is, and PESF                  decode.py   its continuation behind the prompt
session.py     a rule at work on a model                 report.py   what it skipped
apply.py       `pesf`, `skipping`, `set_skipping`
"""

from eacmoe_lightning.skipping.apply import current_rule, pesf, set_skipping, skipping
from eacmoe_lightning.skipping.baselines import EES, ODP, Truncation
from eacmoe_lightning.skipping.decode import Demand
from eacmoe_lightning.skipping.rules import PESF, Rule

__all__ = ["EES", "ODP", "PESF", "Demand", "Rule", "Truncation", "current_rule", "pesf", "set_skipping", "skipping"]
