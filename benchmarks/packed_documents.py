"""Do documents in one window see each other if their position ids restart, and does what follows a document matter?

For a tiny random model of every causal MoE type of transformers, a window of two documents is compared

- with its second document alone, if position ids start again there, from which transformers makes a mask for full
  attention: what `--data.documents packed` packs short samples by;
- with a window that is filled after the first document instead, as `--data.documents separate` does.

Beside it stands what the check says that a run makes before it starts (`models/documents.py`).

    python benchmarks/packed_documents.py [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import architectures

from eacmoe_lightning.models.documents import DocumentsAlone
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.self_check import check_parts

LENGTHS = 40, 40  # tokens of the documents, more than the tiny models' attention windows and best tokens
SAME = 1e-3  # largest difference of logits, relative to the largest logit, that is rounding


@torch.no_grad()
def differences(model: PreTrainedModel, first: Tensor, second: Tensor) -> tuple[float, float]:
    """How far the logits of the second document [1, T] with positions that restart are from those of it alone, and
    those of the first document from those of the first with a filling in the second's place."""
    both, start = torch.cat([first, second], 1), first.shape[1]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in (first, second)]).unsqueeze(0)
    filled = torch.cat([first, torch.zeros_like(second)], 1)
    packed = model(input_ids=both, position_ids=positions, use_cache=False).logits[:, start:]
    pairs = [(packed, model(input_ids=second, use_cache=False).logits)]
    pairs += [tuple(model(input_ids=ids, use_cache=False).logits[:, :start] for ids in (both, filled))]
    return tuple(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


class Measured(DocumentsAlone):
    """Measures, and refuses nothing."""

    largest = 0.0  # difference of a token, in any block

    def compare(self, block, together: Tensor, alone: Tensor) -> None:
        self.largest = max(self.largest, self.difference(together, alone))


def checked(model: PreTrainedModel, first: Tensor, second: Tensor) -> str:
    """What the check at the start of a run finds: the largest difference of a token, in any block."""
    try:
        moe = MoEModel(model)
        both = torch.cat([first, second], 1)
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in (first, second)]).unsqueeze(0)
        measured = Measured(moe, both, positions)
        check_parts(moe, both, after=measured.check, position_ids=positions)
    except (ValueError, RuntimeError) as error:
        return f"none, the model is refused ({str(error)[:60]})"
    return f"{measured.largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", help="of the models")
    dtype = getattr(torch, parser.parse_args().dtype)
    apart, seen, changed = [], [], []
    for name in architectures.ARCHITECTURES:
        generator = torch.Generator().manual_seed(0)
        documents = [torch.randint(5, 4000, (1, length), generator=generator) for length in LENGTHS]
        packed, filled = differences(architectures.build(name).eval(), *documents)
        (apart if packed < SAME else seen).append(name)
        changed += [name] if filled >= SAME else []
        check = checked(architectures.build(name).eval().to(dtype), *documents)
        print(f"{name:24s} positions restart {packed:.1e}   filled {filled:.1e}   check {check}", flush=True)
    print(
        f"\n{len(apart)} of {len(apart) + len(seen)} types keep documents apart by position ids; not {', '.join(seen)}"
    )
    print(f"the filling changes a document in {', '.join(changed) or 'none'}")


if __name__ == "__main__":
    main()
