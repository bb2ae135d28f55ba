"""Experts stored compressed outside the accelerator's memory and decoded on demand (MoE-Compression, arXiv 2509.07727).

codecs/      tensors as checksummed records            store.py     all records in one mapped file or in memory
model.py     `offload_experts`                         loading.py   `load_offloaded`: never all experts in memory
experts.py   a block's experts as a module             cache.py     a cache of bounded size: windows, prefetch, pins
slots.py     memory for decoded experts                policy.py    which expert to evict
fetch.py     threads and processes that decode         worker.py    such a process; jobs.py: the decoding itself
memory.py    shared memory                             counters.py  counts and times
"""

from eacmoe_lightning.offload.loading import load_offloaded
from eacmoe_lightning.offload.model import Offload, offload_experts

__all__ = ["Offload", "load_offloaded", "offload_experts"]
