"""Calibrating a router: losses, the closed form, expert-shift. Pure functions of tensors."""
