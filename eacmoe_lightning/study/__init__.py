"""Which experts tolerate what: errors of known size in chosen experts, and what they do to the model."""
