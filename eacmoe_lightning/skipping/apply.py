"""The ways in: `with pesf(model, alpha=0.3): ...`, any rule with `skipping`, and one that stays with `set_skipping`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from eacmoe_lightning.skipping.decode import Demand
from eacmoe_lightning.skipping.report import SkipReport
from eacmoe_lightning.skipping.rules import PESF, Rule
from eacmoe_lightning.skipping.selection import Survivors
from eacmoe_lightning.skipping.session import Session

ATTRIBUTE = "_expert_skipping"  # where a model keeps its session


def current_session(model: PreTrainedModel) -> Session | None:
    """The session at work on a model, if there is one."""
    return getattr(model, ATTRIBUTE, None)


def current_rule(model: PreTrainedModel) -> Rule | None:
    """The rule at work on a model, if there is one."""
    session = current_session(model)
    return session.rule if session else None


def set_skipping(model: PreTrainedModel, rule: Rule | None) -> SkipReport | None:
    """Puts a rule to work on a model until another one, or None, takes its place.

    A compressed model keeps it: `save_pretrained` writes it into the config, `load` and `from_pretrained` restore it.

    Raises:
        ValueError: the model has no experts, or the rule does not fit it.
    """
    session = Session(model, rule) if rule is not None else None
    _replace(model, session)
    return session.report if session else None


@contextmanager
def skipping(model: PreTrainedModel, rule: Rule) -> Iterator[SkipReport]:
    """Skips experts by a rule while the block runs; a rule that was already at work rests meanwhile.

    Yields:
        What was skipped, counted as the model runs.

    Raises:
        ValueError: the model has no experts, or the rule does not fit it.
    """
    before, session = current_session(model), Session(model, rule)
    _replace(model, session)
    try:
        yield session.report
    finally:
        _replace(model, before)


@contextmanager
def resting(model: PreTrainedModel) -> Iterator[None]:
    """No rule is at work on a model while the block runs."""
    before = current_session(model)
    _replace(model, None)
    try:
        yield
    finally:
        _replace(model, before)


def pesf(
    model: PreTrainedModel,
    alpha: float = 0.3,
    survivors: Survivors = "keep",
    rescue: float | None = None,
    decode: Demand | bool = False,
):
    """Skips each sequence's rarely selected experts while the block runs (EAC-MoE's PESF).

    Works on any model that the adapter knows, compressed or not, in every experts implementation of transformers:

        with eacmoe_lightning.pesf(model, alpha=0.3) as report:
            model.generate(**inputs)
        print(report)

    Args:
        model: a causal LM of transformers.
        alpha, survivors, rescue: see `PESF`.
        decode: True, or a `Demand`, to go on skipping behind the prompt.

    Raises:
        ValueError: alpha is not in (0, 1], or the model has no experts.
    """
    return skipping(model, PESF(alpha, survivors, rescue, Demand() if decode is True else decode or None))


def _replace(model: PreTrainedModel, session: Session | None) -> None:
    before = current_session(model)
    if before is not None:
        before.detach()
    try:
        if session is not None:
            session.attach()
    except BaseException:
        session.detach()
        if before is not None:
            before.attach()
        raise
    setattr(model, ATTRIBUTE, session)
