"""Weights as integer codes: the grid, GPTQ and its column loop, the lattice. Pure functions of tensors."""
