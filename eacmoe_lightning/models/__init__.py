"""Models of transformers: how their weights are loaded, whatever its version."""
