"""Experts that rest compressed outside the accelerator's memory (MoE-Compression, arXiv 2509.07727).

codecs/      tensors as checksummed records            store.py     all experts in one mapped file or in memory
model.py     `offload_experts`                         loading.py   `load_offloaded`: never all experts in memory
experts.py   a block's experts as a module             cache.py     bounded bytes: windows, prefetch, pins
slots.py     where decoded experts lie                 policy.py    who leaves
fetch.py     threads and processes that decode         worker.py    such a process; jobs.py: what they all do
memory.py    shared memory                             counters.py  what happened
"""

from eacmoe_lightning.offload.loading import load_offloaded
from eacmoe_lightning.offload.model import Offload, offload_experts

__all__ = ["Offload", "load_offloaded", "offload_experts"]
