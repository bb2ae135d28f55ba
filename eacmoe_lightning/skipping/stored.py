"""Rules in the config of a compressed model: `save_pretrained` writes them, loading the model restores them."""

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
    """A model's rule as the entry `expert_skipping` of config.json; empty without a rule."""
    rule = current_rule(model)
    return {KEY: rule.to_dict()} if rule else {}


def read_rule(stored: dict[str, Any]) -> Rule:
    """The rule that `Rule.to_dict` described.

    Raises:
        ValueError: the rule is unknown, or the arguments are not those of the rule.
    """
    values = dict(stored)
    name = values.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"{KEY} in config.json names the rule {name!r}, which is not one of {', '.join(RULES)}")
    if values.get("decode"):
        values["decode"] = Demand(**values["decode"])
    try:
        return RULES[name](**values)
    except TypeError as error:
        raise ValueError(f"{KEY} in config.json does not describe a rule {name!r}: {error}") from error


def restore_rule(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Attaches the rule in a compressed directory's config to the model, if there is one."""
    if config.get(KEY):
        set_skipping(model, read_rule(config[KEY]))
