"""DeepSeek-MoE-16B without remote code: transformers has no class for it, and its remote code broke on v5.

`model_type: deepseek` (DeepSeek-MoE-16B, January 2024: multi-head attention, softmax top-6 of 64
routed experts, two shared experts, a dense first block) is the only model of the EAC-MoE paper that
transformers 5 cannot load: it is neither `deepseek_v2` (latent attention) nor any other registered
type. But the text tower of DeepSeek-OCR-2 has exactly this architecture. So this file contains no
maths, only what connects the two:

- `DeepseekConfig` reads the original `config.json` and turns `first_k_dense_replace` and
  `moe_layer_freq` into the `mlp_layer_types` that the tower expects;
- `DeepseekForCausalLM` puts the language-model head on the tower;
- the checkpoint conversion of `qwen2_moe` is registered for the type, so that the original keys
  (`model.layers.N.mlp.experts.E.gate_proj.weight`) are read, and written by `save_pretrained`.

Importing the module registers all three with transformers. Local code takes precedence over the
checkpoint's `auto_map` unless `trust_remote_code=True` is passed.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)
from transformers.utils import can_return_tuple

from eacmoe_lightning.models.transformers_loader import share_conversion, trust_tokenizer_file
from eacmoe_lightning.models.transformers_modules import CACHE


@strict
class DeepseekConfig(DeepseekOcr2TextConfig):
    """The fields of DeepSeek-MoE's `config.json`; defaults as in its `configuration_deepseek.py`.

    Args:
        first_k_dense_replace: number of leading blocks with a dense MLP (1 in the 16B model).
        moe_layer_freq: of the other blocks, those whose index is a multiple of this have experts (1: all).
        norm_topk_prob: whether expert weights are divided by their sum; only False is supported.
        scoring_func: how router logits become scores; only `softmax` is supported.

    Raises:
        ValueError: the config needs something that the tower does not compute.
    """

    model_type = "deepseek"
    base_config_key = ""

    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs):
        if self.norm_topk_prob:
            raise ValueError(
                "norm_topk_prob=True in config.json: the built-in deepseek model does not divide the "
                "weights of the selected experts by their sum (DeepSeek-MoE-16B has False), so a "
                "variant that needs it cannot be loaded"
            )
        if self.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func={self.scoring_func!r} in config.json: the built-in deepseek model "
                "scores experts by 'softmax' only; deepseek_v2 and deepseek_v3 are other model types"
            )
        if not self.n_shared_experts:
            raise ValueError(
                f"n_shared_experts={self.n_shared_experts} in config.json: the built-in deepseek "
                "model needs at least 1 (DeepSeek-MoE-16B has 2)"
            )
        self.n_group, self.topk_group = self.n_group or 1, self.topk_group or 1  # vLLM groups by them, None ends it
        self.mlp_layer_types = [
            "sparse" if index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0 else "dense"
            for index in range(self.num_hidden_layers)
        ]
        super().__post_init__(**kwargs)


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """DeepSeek-MoE with its language-model head; checkpoint keys are those of the original."""

    config_class = DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T], 1 for tokens and 0 for padding
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # [B, T, D], instead of input_ids
        labels: torch.LongTensor | None = None,  # [B, T], not shifted; -100 is ignored
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits [B, T, V] and, with labels, the mean cross entropy in nats.

        `logits_to_keep`: number of last positions to compute logits for (0: all), or a tensor of
        positions. The load-balancing loss of pre-training is not computed.
        """
        cache = kwargs.pop(CACHE, past_key_values)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # [B, T, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),  # TOWER_RETURNS_ROUTER_LOGITS
            **{CACHE: outputs.get(CACHE)},
        )


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
share_conversion("deepseek", "qwen2_moe")
trust_tokenizer_file("deepseek")
