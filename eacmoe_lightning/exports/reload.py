"""Opens an exported directory as any user would, in a process that has not imported this package.

    python -P reload.py DIRECTORY TOKENS.safetensors OUT.safetensors DTYPE TRUST [MODULE ...]

Loads the directory with transformers, runs the token ids `tokens` [B, T], and writes the logits and a sketch of every
weight, which `eacmoe_lightning.exports.check` compares. TRUST is `trust` if code in the directory may run. Each MODULE
is imported first: a model type may need it.
"""

import importlib
import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def sketch(tensor: Tensor) -> Tensor:
    """One number per row, float64 [rows]: the row's product with a fixed vector, so that reordered values differ."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    vector = torch.sin(torch.arange(1, rows.shape[-1] + 1, dtype=torch.float64))
    return torch.cat([chunk.double() @ vector for chunk in rows.split(4096)])


@torch.no_grad()
def look(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """`logits` [B, T, V] in float32, and the sketch of each floating-point tensor of the model, by name."""
    logits = model(tokens, use_cache=False).logits.float()  # runs first: packed linears may decode on first use
    sketches = {name: sketch(t) for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    return {"logits": logits, **sketches}


if __name__ == "__main__":
    directory, tokens, out, dtype, trust, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    import transformers

    code = {"trust_remote_code": True} if trust == "trust" else {}
    config = transformers.AutoConfig.from_pretrained(directory, **code)
    named = getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)
    loaded = named.from_pretrained(directory, dtype=getattr(torch, dtype), **code).eval()
    save_file({n: t.contiguous() for n, t in look(loaded, load_file(tokens)["tokens"]).items()}, out)
