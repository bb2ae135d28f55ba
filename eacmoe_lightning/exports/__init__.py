"""A compressed model in formats that other programs load: `python train.py export --help`."""

from eacmoe_lightning.exports.command import export

__all__ = ["export"]
