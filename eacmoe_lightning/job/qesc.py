"""The LightningModule: router calibration as supervised training, block by block.

Epochs walk through the model (`epochs.py`). `router_epochs` passes over the calibration windows calibrate the router of
block 0 (`router_stage.py`): a batch of windows stands for its tokens at this block. Then `block_epochs` passes train
the block as a whole (`block_stage.py`). So do the next blocks. After the last one, `joint_epochs` train all blocks
together (`joint_stage.py`). `callbacks.LayerwiseQuantization` quantizes the weights between epochs.

Before the first epoch `start.py` checks everything and begins the run, or resumes it; `settings.py` says what must be
the same then. `fit_state.py` makes the stages, and `walk.py` takes them from block to block between the gradient steps.

The language model stays outside the module tree: only the trained parts (`trained.py`) are parameters of the module.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from eacmoe_lightning import targets
from eacmoe_lightning.budget.target import SizeTarget
from eacmoe_lightning.calibration.blocks import Calibration
from eacmoe_lightning.calibration.recipe import Recipe
from eacmoe_lightning.job.block_stage import BlockStage
from eacmoe_lightning.job.checkpoint_io import follow_moved, mend_progress, refuse_other_job
from eacmoe_lightning.job.chosen_bits import ChosenBits
from eacmoe_lightning.job.comparison import Comparison
from eacmoe_lightning.job.divergence import LossWatch, refuse
from eacmoe_lightning.job.epochs import Epoch, Epochs
from eacmoe_lightning.job.fit_state import FitState
from eacmoe_lightning.job.joint_stage import JointStage
from eacmoe_lightning.job.settings import settings_of
from eacmoe_lightning.job.stage import Stage
from eacmoe_lightning.job.start import begin
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.job.trainer_options import refuse_unsuitable
from eacmoe_lightning.job.walk import BlockWalk
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.routers.losses import RouterLoss, TopKMSE
from eacmoe_lightning.run.block_file import BlockStats, read_stats
from eacmoe_lightning.run.lock import RunLock


class QESC(Comparison):
    """Quantization with expert-selection calibration (EAC-MoE, section 4) of one MoE language model.

    Args:
        name_or_path: The original model: `bundled`, a local Hugging Face directory or a hub id.
        dtype: Dtype in which the model is loaded and calibrated: auto (as stored), float32, bfloat16 or float16.
        target: Inference engine that will load the exported model. Settings that it cannot load are refused before
            any work starts (targets.py lists its formats; activation order is no restriction).
        tensor_parallel: Number of devices that the target will split each linear layer over.
        router_method: How routers are calibrated: none (plain GPTQ), ridge (closed form per block), sgd (gradient
            steps per block) or joint (only in the joint stage).
        router_loss: Loss that sgd minimises; its num_targets is also the k of ridge.
        router_lr: Learning rate of sgd. All learning rates but joint_code_lr are relative to the root mean square of
            the tensor that they train (1 + weight in norms that multiply by this), so that one number fits any scale.
        router_epochs: Passes over the calibration text per block.
        router_warm_start: Start sgd from the closed-form solution.
        ridge: Strength of ridge's penalty on drift from the original router, relative to the mean squared router
            input.
        block_epochs: Passes over the calibration text that train a block (router, norms, scales and codes) after its
            weights are solved, on the squared error of its output beside the original block's; 0 leaves the stage out.
        block_selection: Weight of the router loss beside that error; the loss is in units of the logits' spread.
        block_router_lr: Learning rate of the router in the block stage.
        block_norm_lr: Learning rate of the norms' weights in the block stage; 0 does not train them.
        block_scale_lr: Learning rate of the quantized weights' scales in the block stage; 0 does not train them.
        block_code_lr: Learning rate of the quantized weights' codes in the block stage, in steps of the grid; 0 does
            not train them.
        joint_epochs: Passes over the calibration text in the joint stage, which trains all routers together on the KL
            divergence from the original's output distribution; 0 leaves the stage out.
        joint_selection: Weight of the router loss beside the KL divergence; the loss is a mean over all blocks, in
            units of the logits' spread.
        joint_router_lr: Learning rate of the routers in the joint stage.
        joint_norm_lr: Learning rate of the norms' weights in the joint stage; 0 does not train them.
        joint_scale_lr: Learning rate of the quantized weights' scales in the joint stage; 0 does not train them.
        joint_code_lr: Learning rate of the quantized weights' codes in the joint stage, in steps of the grid; 0 does
            not train them. 5e-5 is a good one where memory has room for about 4 more bytes a weight.
        lr_schedule: Learning-rate schedule of each stage: constant, linear or cosine (both fall to zero).
        weight_decay: Weight decay of AdamW.
        stream_dtype: Dtype of the hidden states on disk between blocks. auto is the model's dtype and loses nothing;
            bfloat16 halves the disk space of a float32 model.
        evaluate: Model that validate, test and predict evaluate: a run directory, a compressed directory or an original
            model; null takes the run directory (trainer.default_root_dir).
        split_damage: Let test split the damage into that of the weights and that of the selections (EAC-MoE, table 1).
        trust_remote_code: Whether Python code that came with the model may run, where transformers has no class for it.
        target_bits: Bits of a quantized weight, scales and zero points included, that the result shall have. Widths are
            chosen for attention, shared and routed experts, in place of bits, attention_bits and shared_expert_bits;
            overrides stay. Weights of experts that pruning removes count too.
        target_gb: The same as gigabytes (10^9 bytes) of the compressed directory with everything in it.
        sensitivity: Output of `eacmoe sensitivity`, from which widths are chosen; null measures it before the first
            block.
        pruning: Rule for removing experts; on the command line it is set by `--pruning`.
        **recipe: Options of `Recipe`: bits, groups and quantizer of every weight.
    """

    def __init__(
        self,
        name_or_path: str = "bundled",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        target: Literal[targets.ENGINES] | None = None,
        tensor_parallel: int = 1,
        router_method: Literal["none", "ridge", "sgd", "joint"] = "ridge",
        router_loss: RouterLoss | None = None,
        router_lr: float = 2e-2,
        router_epochs: int = 1,
        router_warm_start: bool = False,
        ridge: float = 1e-3,
        block_epochs: int = 2,
        block_selection: float = 0.05,
        block_router_lr: float = 3e-3,
        block_norm_lr: float = 5e-3,
        block_scale_lr: float = 3e-3,
        block_code_lr: float = 4e-4,
        joint_epochs: int = 2,
        joint_selection: float = 0.2,
        joint_router_lr: float = 3e-3,
        joint_norm_lr: float = 5e-3,
        joint_scale_lr: float = 3e-3,
        joint_code_lr: float = 0.0,
        lr_schedule: Literal["constant", "linear", "cosine"] = "cosine",
        weight_decay: float = 0.0,
        stream_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        evaluate: str | None = None,
        split_damage: bool = False,
        trust_remote_code: bool = False,
        target_bits: float | None = None,
        target_gb: float | None = None,
        sensitivity: str | None = None,
        pruning: PruningRule | None = None,
        **recipe: Any,
    ) -> None:
        super().__init__(name_or_path, dtype, evaluate, split_damage, trust_remote_code)
        self.targets = targets.for_calibration(target) if target else []
        self.tensor_parallel = tensor_parallel
        if recipe.get("quantizer") is None:
            recipe["quantizer"] = "kquant" if target == "llama.cpp" else "gptq"
        self.recipe = Recipe(**recipe)
        if self.recipe.symmetric is None:
            self.recipe = replace(self.recipe, symmetric=bool(self.targets) and self.targets[0].symmetric)
        size = SizeTarget(target_bits, target_gb)
        self.chosen_bits = ChosenBits(self.recipe, pruning, size, sensitivity, self.targets, tensor_parallel)
        for option, value in (("router_epochs", router_epochs), ("router_lr", router_lr), ("ridge", ridge)):
            if value <= 0:
                raise ValueError(f"{option}={value} (--model.{option}) is not positive")
        self.block_lr = dict(router=block_router_lr, norm=block_norm_lr, scale=block_scale_lr, code=block_code_lr)
        self.joint_lr = dict(router=joint_router_lr, norm=joint_norm_lr, scale=joint_scale_lr, code=joint_code_lr)
        rates = (("block", self.block_lr), ("joint", self.joint_lr))
        for option, value in (
            *(("block_epochs", block_epochs), ("joint_epochs", joint_epochs), ("weight_decay", weight_decay)),
            *(("block_selection", block_selection), ("joint_selection", joint_selection)),
            *((f"{stage}_{kind}_lr", lr) for stage, lrs in rates for kind, lr in lrs.items()),
        ):
            if value < 0:
                raise ValueError(f"{option}={value} (--model.{option}) is negative")
        if router_method == "joint" and not (joint_epochs or block_epochs):
            raise ValueError(
                "router_method=joint (--model.router_method) calibrates routers in the joint stage, which "
                "joint_epochs=0 (--model.joint_epochs) leaves out, as block_epochs=0 (--model.block_epochs) does with "
                "the block stage: pass 1 or more, or another method"
            )
        if tensor_parallel < 1 or (tensor_parallel > 1 and not target):
            problem = "is below 1" if tensor_parallel < 1 else "is for an engine: pass --model.target too"
            raise ValueError(f"tensor_parallel={tensor_parallel} (--model.tensor_parallel) {problem}")
        self.pruning = pruning
        self.walk = BlockWalk(self)
        self.fit_state: FitState | None = None
        self.lock: RunLock | None = None  # on the run directory, held by the first process
        self.router_method, self.router_loss = router_method, router_loss or TopKMSE()
        self.router_lr, self.router_epochs, self.router_warm_start = router_lr, router_epochs, router_warm_start
        self.ridge, self.joint_selection = ridge, joint_selection
        self.block_epochs = 0 if router_method == "none" else block_epochs
        self.block_selection = block_selection
        self.joint_epochs = 0 if router_method == "none" else joint_epochs
        self.lr_schedule, self.weight_decay = lr_schedule, weight_decay
        self.stream_dtype = stream_dtype
        self.loss_watch = LossWatch()
        self.resumes_at = 0  # the block to which the last checkpoint leads back
        self.block_routers: dict[str, Tensor] = {}  # routers that the blocks were solved with, from the joint stage on

    # --- the models -------------------------------------------------------------------------------------

    @property
    def moe(self) -> StreamedModel:
        return self.fit_state.moe

    @property
    def original(self) -> Checkpoint:
        """The original's weights on disk."""
        return self.moe.weights

    @property
    def parts(self) -> TrainedParts:
        return self.fit_state.parts

    @property
    def calibration(self) -> Calibration:
        return self.fit_state.calibration

    @property
    def block_stage(self) -> BlockStage:
        return self.fit_state.block_stage

    @property
    def joint_stage(self) -> JointStage:
        return self.fit_state.joint_stage

    def block_stats(self) -> list[BlockStats]:
        """The statistics of every block, read from the block files."""
        return [read_stats(self.run, block.index) for block in self.moe.blocks]

    # --- the run -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "fit":
            super().setup(stage)
            return
        refuse_unsuitable(self.trainer, stage)
        if self.evaluate is not None:
            raise ValueError(
                f"--model.evaluate {self.evaluate} does not suit fit, which evaluates its own result: leave it out, or "
                "run validate, test or predict with it"
            )
        if self.trainer.is_global_zero:
            self.lock = RunLock(self.run.path)
        begun = begin(self)
        self.recipe, self.pruning = begun.recipe, begun.pruning
        self.fit_state = FitState.of(self, begun)
        parts = self.fit_state.parts
        self.routers, self.norms = parts.routers, parts.norms  # submodules, so that Lightning knows their parameters
        self.trainer.fit_loop.epoch_loop.max_steps = -1
        if self.trainer.max_epochs in (None, -1) or self.trainer.max_epochs > self.num_epochs:
            self.trainer.fit_loop.max_epochs = self.num_epochs

    def teardown(self, stage: str) -> None:
        self.free_run()

    def free_run(self) -> None:
        """Lets other jobs work in the run directory."""
        if self.lock is not None:
            self.lock.release()

    def identity(self) -> dict[str, Any]:
        """Everything that the result of `fit` depends on: `settings`, and digests of the original and of the text."""
        return self.settings() | {
            "model.fingerprint": self.fingerprint,
            "data.calibration_digest": self.trainer.datamodule.calibration_digest,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of the original as it was when the job began."""
        return fingerprint(self.name_or_path)

    def settings(self) -> dict[str, Any]:
        """Every option that the result of `fit` depends on, by name; local paths are absolute."""
        return settings_of(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.parts.optimizer_groups()
        return torch.optim.AdamW(groups, lr=self.router_lr, weight_decay=self.weight_decay, fused=True)

    def refuse_divergence(self) -> None:
        """Raises ValueError if a loss of the current epoch was NaN or infinite; called before anything is stored."""
        if (bad := self.loss_watch.bad()) is not None:
            self._refuse_loss(bad)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.refuse_divergence()
        checkpoint["block_routers"] = self.block_routers
        checkpoint["in_training"] = {"parts": self.parts.state(), "block": self.block_stage.state()}
        if self.calibration is not None:
            self.calibration.remove_solved(self.resumes_at)  # this checkpoint is not written yet: the one before may be
            self.resumes_at = self.block_index if self.parts.block is None else self.parts.block

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None:  # load_from_checkpoint
            raise ValueError(
                "a checkpoint holds the state of a job, not a model: pass it to Trainer.fit as ckpt_path to go on, or "
                "open the finished model with eacmoe_lightning.load(RUN_DIRECTORY)"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        refuse_other_job(checkpoint, shapes, self.trainer.ckpt_path)
        self.block_routers = checkpoint["block_routers"]
        self.parts.load_state(checkpoint["in_training"]["parts"])
        self.block_stage.load_state(checkpoint["in_training"]["block"])
        mend_progress(checkpoint["loops"]["fit_loop"])
        follow_moved(checkpoint["callbacks"], self.trainer.checkpoint_callbacks, self.trainer.ckpt_path)

    def on_fit_start(self) -> None:
        self.trainer.datamodule.holds_back = lambda epoch: self.epochs.at(epoch).stage == "block"
        self.fit_state.start(self)

    # --- epochs: which block, which stage ---------------------------------------------------------------

    @property
    def epochs(self) -> Epochs:
        return Epochs(len(self.moe.blocks), self.router_epochs, self.block_epochs, self.joint_epochs)

    @property
    def num_epochs(self) -> int:
        return self.epochs.total

    @property
    def epoch(self) -> Epoch:
        """The current epoch's place in the run."""
        return self.epochs.at(self.current_epoch)

    @property
    def stage(self) -> Stage:
        """What the current epoch trains."""
        state = self.fit_state
        return {"router": state.router_stage, "block": state.block_stage, "joint": state.joint_stage}[self.epoch.stage]

    @property
    def block_index(self) -> int:
        """Index of the current epoch's block; in the joint stage, the number of blocks."""
        return self.epoch.block

    def kinds(self, stage: str) -> list[str]:
        """What the block or the joint stage trains: of router, norm, scale and code."""
        rates, epochs = (self.block_lr, self.block_epochs) if stage == "block" else (self.joint_lr, self.joint_epochs)
        return [kind for kind, lr in rates.items() if lr] if epochs else []

    def autocast(self) -> AbstractContextManager:
        """The precision of training steps, for what runs outside of them."""
        return self.trainer.strategy.precision_plugin.train_step_context()

    # --- gradient steps -----------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.stage.losses(batch)
        if losses is None:  # nothing to train here, or other processes hold all of this batch's windows
            loss = sum(weight.sum() for weight in (*self.parameters(), *self.parts.unregistered())) * 0
        else:
            loss = self._global_mean(losses, batch)
        if (bad := self.loss_watch.see(loss, batch_idx)) is not None:
            self._refuse_loss(bad)
        self.log(self.stage.curve, loss)
        return loss

    def _refuse_loss(self, loss: Tensor) -> None:
        """Raises ValueError for a loss that is NaN or infinite."""
        where = "the joint stage" if self.epoch.stage == "joint" else f"block {self.block_index}"
        refuse(loss, where, self.moe.model.dtype, self.stage.rate_options)

    def _global_mean(self, losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean over the counted tokens of the global batch, of which this process may hold only some, or none."""
        tokens = int(batch["global_size"]) * self.trainer.datamodule.window_length
        if "weights" in batch:
            losses, tokens = losses * batch["weights"].flatten(), max(1, int(batch["global_tokens"]))
        return losses.sum() / tokens * self.trainer.world_size  # DDP averages gradients over processes

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Averages the gradients that DDP does not know over processes."""
        if self.trainer.world_size > 1:
            for weight in self.parts.unregistered():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.ranks.sum(gradient) / self.trainer.world_size

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        if not self.stage.takes_steps:
            optimizer_closure()
            return
        factor = self.schedule(epoch, batch_idx)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["rms"] * self.stage.rates.get(group["kind"], 0.0)
        self.parts.gather_moments(optimizer)
        optimizer.step(closure=optimizer_closure)

    def schedule(self, epoch: int, batch_idx: int) -> float:
        """Learning-rate factor at a step. It depends on the position in the stage alone, so it needs no state."""
        place = self.epochs.at(epoch)
        done = (place.number + batch_idx / self.trainer.num_training_batches) / place.passes
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.lr_schedule]
