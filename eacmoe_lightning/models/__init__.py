"""A causal LM with routed experts as blocks, whatever its architecture; loaded whole or one block at a time."""
