"""A size goes in, bits come out: sensitivities, measured once, and widths for every weight within a budget of bytes."""
