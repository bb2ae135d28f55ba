"""Quantized originals: each scheme's tensors on disk become ordinary weights under their ordinary keys."""
