"""Weights as integer codes: the grid, GPTQ and its column loop, the lattice, packing. Pure functions of tensors."""
