"""Text sources, token windows, and batches of them."""
