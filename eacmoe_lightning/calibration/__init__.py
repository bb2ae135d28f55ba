"""QESC, block by block (EAC-MoE, section 4): the recipe of bits, the two streams, the phases of a block."""
