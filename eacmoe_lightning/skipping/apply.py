"""Entry points: `with pesf(model, alpha=0.3): ...`, `skipping` for any rule, `set_skipping` for a rule that stays."""

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
    """The session attached to a model; None without a rule."""
    return getattr(model, ATTRIBUTE, None)


def current_rule(model: PreTrainedModel) -> Rule | None:
    """The rule that a model skips experts by; None without one."""
    session = current_session(model)
    return session.rule if session else None


def set_skipping(model: PreTrainedModel, rule: Rule | None) -> SkipReport | None:
    """Attaches a rule to a model, in place of the rule that it had; None removes it.

    The rule is saved with a compressed model: `save_pretrained` writes it into the config, `load` and
    `from_pretrained` restore it.

    Returns:
        What is skipped, counted as the model runs; None without a rule.

    Raises:
        ValueError: the model has no experts, or the rule does not fit it.
    """
    session = Session(model, rule) if rule is not None else None
    _replace(model, session)
    return session.report if session else None


@contextmanager
def skipping(model: PreTrainedModel, rule: Rule) -> Iterator[SkipReport]:
    """Skips experts by a rule inside the `with` block; a rule that the model already had is suspended meanwhile.

    Yields:
        What is skipped, counted as the model runs.

    Raises:
        ValueError: the model has no experts, or the rule does not fit it.
    """
    previous, session = current_session(model), Session(model, rule)
    _replace(model, session)
    try:
        yield session.report
    finally:
        _replace(model, previous)


@contextmanager
def resting(model: PreTrainedModel) -> Iterator[None]:
    """Suspends a model's rule inside the `with` block."""
    previous = current_session(model)
    _replace(model, None)
    try:
        yield
    finally:
        _replace(model, previous)


def pesf(
    model: PreTrainedModel,
    alpha: float = 0.3,
    survivors: Survivors = "keep",
    rescue: float | None = None,
    decode: Demand | bool = False,
):
    """Skips each sequence's rarely selected experts inside the `with` block (EAC-MoE's PESF).

    Works on every model with routed experts, compressed or not, in every experts implementation of transformers:

        with eacmoe_lightning.pesf(model, alpha=0.3) as report:
            model.generate(**inputs)
        print(report)

    Args:
        model: a causal LM of transformers.
        alpha, survivors, rescue: see `PESF`.
        decode: True, or a `Demand`, to keep skipping after the prompt.

    Raises:
        ValueError: alpha is not in (0, 1], or the model has no experts.
    """
    return skipping(model, PESF(alpha, survivors, rescue, Demand() if decode is True else decode or None))


def _replace(model: PreTrainedModel, session: Session | None) -> None:
    """Attaches a session in place of the model's present one, which comes back if attaching fails."""
    previous = current_session(model)
    if previous is not None:
        previous.detach()
    try:
        if session is not None:
            session.attach()
    except BaseException:
        session.detach()
        if previous is not None:
            previous.attach()
        raise
    setattr(model, ATTRIBUTE, session)
