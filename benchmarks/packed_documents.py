"""Do documents in one window see each other if their position ids restart, and does what follows a document matter?

For a tiny random model of every causal MoE type of transformers, two documents in one window are compared with each of
them alone: once with position ids that start again at the second, from which transformers makes a mask for full
attention; once with the other document after the first, as the filling of `--data.separate` is.

    python benchmarks/packed_documents.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import architectures

LENGTHS = 40, 40  # tokens of the documents, more than the tiny models' attention windows and best tokens
SAME = 1e-3  # largest difference of logits, relative to the largest logit, that is rounding


@torch.no_grad()
def differences(model: PreTrainedModel, first: Tensor, second: Tensor) -> tuple[float, float]:
    """How far logits are from those of the documents [1, T] alone: of the second with positions that restart; of the
    first with the second after it."""
    alone = [model(input_ids=ids, use_cache=False).logits for ids in (first, second)]
    both = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in (first, second)]).unsqueeze(0)
    packed = model(input_ids=both, position_ids=positions, use_cache=False).logits[:, first.shape[1] :]
    followed = model(input_ids=both, use_cache=False).logits[:, : first.shape[1]]
    pairs = (packed, alone[1]), (followed, alone[0])
    return tuple(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def main() -> None:
    apart, seen, changed = [], [], []
    for name in architectures.ARCHITECTURES:
        generator = torch.Generator().manual_seed(0)
        documents = [torch.randint(5, 4000, (1, length), generator=generator) for length in LENGTHS]
        packed, followed = differences(architectures.build(name).eval(), *documents)
        (apart if packed < SAME else seen).append(name)
        changed += [name] if followed >= SAME else []
        print(f"{name:24s} positions restart {packed:.1e}   another document follows {followed:.1e}", flush=True)
    print(
        f"\n{len(apart)} of {len(apart) + len(seen)} types keep documents apart by position ids; not {', '.join(seen)}"
    )
    print(f"a later document changes an earlier one in {', '.join(changed) or 'none'}")


if __name__ == "__main__":
    main()
