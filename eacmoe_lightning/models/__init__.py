"""A causal LM with routed experts as a sequence of blocks, for any architecture; loaded whole or block by block."""
