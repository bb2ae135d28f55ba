"""What MoE-Compression (arXiv 2509.07727, section 4) found, to be set beside a study of ours.

Moonlight (26 blocks of 64 experts, top-6), all experts of the blocks named, Gaussian noise N(0, alpha mean|w|);
accuracy on its questions, .86 without noise. The paper's conclusion: middle blocks are the most fragile, deep ones
robust or even helped.
"""

BASELINE = 0.86
GROUPS = {  # accuracy by alpha
    "shallow": {0.3: 0.86, 0.5: 0.81},
    "middle": {0.3: 0.81, 0.5: 0.69},
    "deep": {0.3: 0.91, 0.5: 0.92},
}
SINGLE_BLOCKS = {1: 0.33, 13: 0.38, 20: 0.61, 26: 0.85}  # accuracy at alpha 0.8, of 26 blocks counted from 1
NUM_BLOCKS = 26
CLAIM = ["middle", "shallow", "deep"]  # from fragile to robust, at 0.5


def depth_of(block: int) -> float:
    """The relative depth of a block counted from 1: 0 before the first, 1 behind the last."""
    return (block - 0.5) / NUM_BLOCKS
