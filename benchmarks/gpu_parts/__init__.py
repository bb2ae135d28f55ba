"""The parts of `gpu.py`, each a module with `rows(options, device)`, which measures, and `line(row)`, which prints.

device.py  the GPU, or the CPU of a miniature run, and its clocks     wheels.py  what the GPU's machine lacks
kernels.py  experts.py  pesf.py  block.py  fit.py  memory.py          the parts
"""
