"""Lightning callbacks for everything around router calibration: quantization, pruning, statistics and output.

They work on the module `eacmoe_lightning.job.qesc.QESC`, and each can be used without the others. The order of the
imports matters: at the end of a run the callbacks act in it.
"""

from eacmoe_lightning.callbacks.layerwise_quantization import LayerwiseQuantization

from eacmoe_lightning.callbacks.expert_frequency import ExpertFrequency  # isort: skip
from eacmoe_lightning.callbacks.expert_pruning import ExpertPruning  # isort: skip
from eacmoe_lightning.callbacks.compressed_model import CompressedModel  # isort: skip
from eacmoe_lightning.callbacks.routing_report import RoutingReport  # isort: skip
from eacmoe_lightning.callbacks.block_progress import BlockProgress  # isort: skip
from eacmoe_lightning.callbacks.phase_cost import PhaseCost  # isort: skip
from eacmoe_lightning.callbacks.board_layout import BoardLayout  # isort: skip
from eacmoe_lightning.callbacks.token_scores import TokenScores  # isort: skip

__all__ = [
    "BlockProgress",
    "BoardLayout",
    "CompressedModel",
    "ExpertFrequency",
    "ExpertPruning",
    "LayerwiseQuantization",
    "PhaseCost",
    "RoutingReport",
    "TokenScores",
]
