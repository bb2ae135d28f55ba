"""The compressed model at work: packed modules and their kernels."""
