"""Rules in the config of a compressed model: written by `save_pretrained`, put to work again by whatever loads it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from eacmoe_lightning.skipping.apply import current_rule, set_skipping
from eacmoe_lightning.skipping.baselines import EES, ODP, Truncation
from eacmoe_lightning.skipping.decode import Demand
from eacmoe_lightning.skipping.rules import PESF, Rule

KEY = "expert_skipping"  # in config.json
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (PESF, EES, ODP, Truncation)}


def stored_rule(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's config.json gets: its rule under `expert_skipping`, or nothing."""
    rule = current_rule(model)
    return {KEY: rule.to_dict()} if rule else {}


def read_rule(stored: dict[str, Any]) -> Rule:
    """The rule that `Rule.to_dict` described.

    Raises:
        ValueError: no such rule is known, or its arguments are not those of the rule.
    """
    values = dict(stored)
    name = values.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"{KEY} in config.json names the rule {name!r}; known are {', '.join(RULES)}")
    if values.get("decode"):
        values["decode"] = Demand(**values["decode"])
    try:
        return RULES[name](**values)
    except TypeError as error:
        raise ValueError(f"{KEY} in config.json does not describe a rule {name!r}: {error}") from error


def restore_rule(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Puts the rule of a compressed directory's config to work, if it names one."""
    if config.get(KEY):
        set_skipping(model, read_rule(config[KEY]))
