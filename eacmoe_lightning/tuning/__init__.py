"""The weights that the block stage and the joint stage train, and the losses that they train them on."""
