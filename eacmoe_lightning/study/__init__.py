"""Which experts tolerate which errors: puts errors of known size into chosen experts and measures the model."""
