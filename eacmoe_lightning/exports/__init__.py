"""Writes a compressed model in formats that other programs load."""
