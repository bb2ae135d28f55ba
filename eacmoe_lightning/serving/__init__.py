"""Compressed models in vLLM: `vllm serve runs/tiny/compressed`."""
