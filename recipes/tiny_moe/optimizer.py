"""Muon for the matrices of the blocks, AdamW for embedding, routers and norms.

Muon (Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix by five
Newton-Schulz steps. All matrices of one shape, most of them experts, are orthogonalised as one batch.
"""

import torch
from ranks import share_out
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz in bf16 on a batch [M,R,C] with R <= C."""
    x = g.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Matrices may be stacked in a leading dimension; those in `pairs` hold two, gate and up, and are split."""

    def __init__(
        self, matrices: list[nn.Parameter], pairs: list[nn.Parameter], lr: float, momentum: float = 0.95,
        decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})
        self.pairs = {id(p) for p in pairs}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_size: dict[tuple[int, int], list[tuple[nn.Parameter, bool, Tensor]]] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])
                g = g.view(-1, *p.shape[-2:]) if p.dim() == 2 else g
                if id(p) in self.pairs:
                    g = g.reshape(-1, g.shape[1] // 2, g.shape[2])
                tall = g.shape[1] > g.shape[2]
                g = g.mT if tall else g
                by_size.setdefault(tuple(g.shape[1:]), []).append((p, tall, g))
            for entries in by_size.values():
                updates = share_out(orthogonalise, torch.cat([g for _, _, g in entries])).float()
                for (p, tall, _), update in zip(entries, updates.split([len(g) for _, _, g in entries]), strict=True):
                    update = update.mT if tall else update
                    scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def build(model: nn.Module, matrix_lr: float, adam_lr: float, router_lr: float) -> list[torch.optim.Optimizer]:
    """The two optimizers; every group keeps its peak learning rate as `peak`."""
    pairs = [p for name, p in model.named_parameters() if name.endswith("gate_up")]
    single = [p for name, p in model.named_parameters() if name.split(".")[-1] in ("qkv", "o", "down", "shared_down")]
    matrices = [p for p in model.parameters() if any(p is one for one in (*pairs, *single))]
    routers = [p for name, p in model.named_parameters() if name.endswith("router")]
    known = {id(p) for p in matrices + routers}
    others = [p for p in model.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(
        [{"params": others, "lr": adam_lr}, {"params": routers, "lr": router_lr}],
        betas=(0.9, 0.95), weight_decay=0.0, fused=True,
    )  # fmt: skip
    optimizers = [Muon(matrices, pairs, lr=matrix_lr), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
