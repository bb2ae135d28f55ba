"""Applies the settings of torchrun, `fabric run` and SLURM's srun (devices, processes), which LightningCLI ignores."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed
from jsonargparse import Namespace

INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning ignores SLURM
STRATEGY = "ddp_find_unused_parameters_true"  # of several processes: each block trains one router only
# by which Lightning knows that somebody has started the processes of several nodes
STARTED = ("MASTER_ADDR", "NODE_RANK", "GROUP_RANK", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def follow_launcher(trainer: Namespace) -> None:
    """Sets devices, nodes, accelerator, strategy and precision as torchrun, `fabric run` or srun sets them.

    LightningCLI ignores these launchers, so every process would silently run the whole job alone. Without a launcher,
    sets the strategy that several processes need.

    Raises:
        ValueError: the config or the command line sets another value, the SLURM job cannot be followed, or several
            nodes are asked for and no launcher has started them.
    """
    if torch.distributed.is_torchelastic_launched():  # also in a SLURM job
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        _follow_processes(trainer, local, world // local)
        _follow_fabric(trainer)
    elif (tasks := _slurm_tasks()) is not None:
        _follow_processes(trainer, *tasks)
    else:
        several_devices = trainer.get("devices") not in (None, "auto", 1, "1")
        several_nodes = trainer.get("num_nodes") not in (None, 1)
        if several_nodes and not any(name in os.environ for name in STARTED):
            raise ValueError(
                f"--trainer.num_nodes {trainer['num_nodes']}: nothing has started the processes of the other nodes, so "
                "this one would wait for them. Start the job with torchrun or srun (docs/large-models.md), or set "
                "MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
            )
        if (several_devices or several_nodes) and trainer.get("strategy") in (None, "auto"):
            trainer["strategy"] = STRATEGY


def _follow_processes(trainer: Namespace, local: int, nodes: int) -> None:
    """Takes over the number of processes of a node and of nodes."""
    if (
        local * nodes > 1
        and trainer.get("strategy") in (None, "auto")
        and os.environ.get("LT_STRATEGY") in (None, "auto", "ddp")
    ):
        _settle(trainer, "strategy", STRATEGY, "auto")
    _settle(trainer, "devices", local, "auto")
    _settle(trainer, "num_nodes", nodes, 1)


def _follow_fabric(trainer: Namespace) -> None:
    """Takes over the options of `fabric run`."""
    for option, default in (("accelerator", "auto"), ("strategy", "auto"), ("precision", None)):
        value = os.environ.get(f"LT_{option.upper()}")
        if value is not None and not (option == "strategy" and value in ("auto", "ddp")):
            _settle(trainer, option, value, default)


def _slurm_tasks() -> tuple[int, int] | None:
    """Tasks per node and nodes of the srun that has started this process; None without one.

    Raises:
        ValueError: nodes have different numbers of tasks, srun was left out, or Lightning would ignore srun.
    """
    is_interactive = os.environ.get("SLURM_JOB_NAME") in INTERACTIVE
    if "SLURM_STEP_NUM_TASKS" not in os.environ:
        tasks = int(os.environ.get("SLURM_NTASKS", 1))
        if tasks > 1 and not is_interactive:
            raise ValueError(
                f"this SLURM job has {tasks} tasks, but the command was started without srun, as one process: put srun "
                "before it, or srun --ntasks 1 for one process"
            )
        return None
    tasks, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    if is_interactive:
        if tasks > 1:
            raise ValueError(
                f"Lightning takes a SLURM job of the name {os.environ['SLURM_JOB_NAME']} for an interactive shell, and "
                f"each of the {tasks} tasks would run alone: pass another name to salloc or srun, as in --job-name fit"
            )
        return None
    by_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if tasks % nodes or "," in by_node:
        raise ValueError(
            f"srun has started {tasks} tasks on {nodes} nodes ({by_node}): every node needs the same number, as with "
            "--ntasks-per-node"
        )
    # Lightning compares devices with this variable, which is that of the job, or absent if --ntasks gave the number
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)
    return tasks // nodes, nodes


def _settle(trainer: Namespace, option: str, value: Any, default: Any) -> None:
    given = trainer.get(option)
    if given not in (None, default) and str(given) != str(value):
        raise ValueError(f"the launcher sets {option}={value}, but --trainer.{option} is {given}: leave one out")
    trainer[option] = value
