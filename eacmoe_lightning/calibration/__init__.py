"""QESC, block by block (EAC-MoE, section 4): the bits of every weight, the two streams, the phases of a block."""
