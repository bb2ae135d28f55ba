"""Calibrating a router: losses, the closed form, the joint stage, expert-shift. Pure functions of tensors."""
