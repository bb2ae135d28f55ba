"""Results of MoE-Compression (arXiv 2509.07727, section 4), to compare a study with.

Moonlight (26 blocks of 64 experts, top-6), Gaussian noise N(0, alpha mean|w|) in all experts of the given blocks;
accuracy on the paper's questions, 0.86 without noise. The paper concludes that middle blocks are the most fragile, and
that deep blocks are robust or even improve.
"""

BASELINE = 0.86
GROUPS = {  # accuracy by alpha
    "shallow": {0.3: 0.86, 0.5: 0.81},
    "middle": {0.3: 0.81, 0.5: 0.69},
    "deep": {0.3: 0.91, 0.5: 0.92},
}
SINGLE_BLOCKS = {1: 0.33, 13: 0.38, 20: 0.61, 26: 0.85}  # accuracy at alpha 0.8, of 26 blocks counted from 1
NUM_BLOCKS = 26
CLAIM = ["middle", "shallow", "deep"]  # from fragile to robust, at alpha 0.5


def depth_of(block: int) -> float:
    """The relative depth of a block, counted from 1: 0 is before the first block, 1 after the last."""
    return (block - 0.5) / NUM_BLOCKS
