"""What a run will cost, said before it starts: `python train.py plan`, and the checks that `fit` itself makes."""

from eacmoe_lightning.planning import command

__all__ = ["command"]
