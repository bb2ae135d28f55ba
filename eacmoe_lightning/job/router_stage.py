"""The router stage: the router of one block learns to select what the original selects (EAC-MoE, section 4.2).

The block's attention is solved, its experts are not yet. The router reads x_hat, the compressed stream; its target is
what the original's router said of x. `ridge` solves that in closed form before the first epoch, which then only
measures the loss. With `sgd` the epochs minimise a loss of `routers/losses.py`.
"""

from __future__ import annotations

from torch import Tensor

from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.routers.losses import RouterLoss


class RouterStage:
    """The router stage of the current block (`job.stage.Stage`).

    Args:
        parts: the trained parameters.
        router_loss: the loss; its number of targets is also ridge's.
        method: none, ridge, sgd or joint.
        ridge: strength of the closed form's penalty on drift.
        warm_start: whether sgd starts from the closed form.
        rate: learning rate of sgd.
    """

    curve, rate_options = "router/loss", "router_lr"

    def __init__(
        self, parts: TrainedParts, router_loss: RouterLoss, method: str, ridge: float, warm_start: bool, rate: float
    ) -> None:
        self.parts, self.router_loss, self.method, self.ridge = parts, router_loss, method, ridge
        self.warm_start, self.rates = warm_start, {"router": rate}
        self.calibration: Calibration

    @property
    def takes_steps(self) -> bool:
        return self.method == "sgd" and self.calibration.block.calibrates

    def start(self) -> None:
        """Solves the router in closed form, if the method does."""
        block = self.calibration.block
        if block.calibrates and (self.method == "ridge" or (self.method == "sgd" and self.warm_start)):
            num_targets = self.router_loss.num_targets(block.num_experts, block.top_k)
            self.parts.put_router(block, self.calibration.ridge_router(num_targets, self.ridge))

    def losses(self, batch: dict[str, Tensor]) -> Tensor | None:
        block = self.calibration.block
        if not block.calibrates:
            return None
        x, teacher = self.calibration.router_rows(batch["index"])
        device = self.parts.moe.device
        student = block.router_logits(x.to(device), self.parts.router(block))
        return self.router_loss(block.choice(student), block.choice(teacher.to(device)), block.top_k)
