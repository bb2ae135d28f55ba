"""What compression did: original beside compressed, perplexity, expert-shift, and the report."""
