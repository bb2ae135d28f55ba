"""What a GGUF file says about a model: the keys that llama.cpp builds it from; what no key can say is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from eacmoe_lightning.exports.gguf_architectures import ARCHITECTURES, Architecture
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.runtime.packed_modules import ACTIVATION_NAMES

KINDS = ("linear_attention", "full_attention")
RECURRENT = ("conv", "linear_attention", "mamba")
WITHOUT_HEADS = (*RECURRENT, "moe")
SECTIONS = [11, 11, 10]  # how Qwen3.5 divides rotated pairs between time, height and width, where its config does not
UNROTATED = 4  # every how many layers one is not rotated, where only those with sliding windows are
LITE = (26, 27)  # numbers of blocks at which llama.cpp takes deepseek2 for a model whose queries are not latent
KANANA = (48, 128256)  # the same: blocks and tokens of Kanana-2
SMALLEST_SUM = 2.0**-14  # llama.cpp divides expert weights by no smaller sum
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # llama.cpp's, where an architecture does not set them
ROPE_TYPES = ("default", "yarn", "ntk_alpha")
REMEDY = "export with --format dense, for other engines and for llama.cpp's scripts if they know such a model"


def architecture_of(moe: MoEModel) -> Architecture:
    """llama.cpp's architecture for a model.

    Raises:
        ValueError: llama.cpp has none, or would compute something else.
    """
    kind = moe.config.model_type
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        why = " (llama.cpp weights its experts by another rule)" if kind == "phimoe" else ""
        raise ValueError(f"--format gguf knows {', '.join(ARCHITECTURES)}, not {kind}{why}: {REMEDY}")
    for option, value, supported in _compared(moe, architecture):
        if not _is_same(value, supported):
            raise ValueError(
                f"the model has {option}={value!r}, but llama.cpp's architecture {architecture.name} has "
                f"{supported!r}: {REMEDY}"
            )
    dense = [block.index for block in moe.blocks if not block.is_moe]
    expected = list(range(len(dense))) if architecture.leading_dense else []
    if architecture.separate:
        expected = [index for index, kind in enumerate(_kinds(moe.config)) if kind != "moe"]
    if dense != expected:
        raise ValueError(
            f"blocks {dense} have no experts, and llama.cpp's architecture {architecture.name} expects some: {REMEDY}"
        )
    return architecture


def _is_same(value: Any, supported: Any) -> bool:
    if supported == "silu":
        return value in ACTIVATION_NAMES["silu"]
    return math.isclose(value, supported, rel_tol=1e-6) if isinstance(supported, float) else value == supported


def warn_of_rounding(moe: MoEModel) -> None:
    """Warns of the one difference that every GGUF file of such a model has (gpt-oss)."""
    rope = _rope(moe.config)
    if rope.get("rope_type") == "yarn" and _yarn_slowing(moe, rope) != _yarn_slowing(moe, rope | {"truncate": True}):
        warnings.warn(
            "the model blends rotary frequencies by YaRN without rounding the limits (truncate=false), and llama.cpp "
            "rounds them to whole frequencies, as in every GGUF file of such a model",
            stacklevel=2,
        )


def keys_of(moe: MoEModel, architecture: Architecture, widths: Mapping[str, int]) -> dict[str, Any]:
    """The sizes and options that llama.cpp builds the model from: name of the writer's method without `add_` -> value.

    Args:
        moe: the model.
        architecture: from `architecture_of`.
        widths: in_features of the down projections: `ffn_down_exps`, and `ffn_down_shexp` and `ffn_down` if there are
            shared experts and dense blocks.
    """
    import gguf

    config, expert = moe.config, widths["ffn_down_exps"]
    feed_forward = widths.get("ffn_down", getattr(config, "intermediate_size", expert))
    if architecture.separate:
        feed_forward = [expert if kind == "moe" else 0 for kind in _kinds(config)]
    keys = {
        "vocab_size": config.vocab_size,
        "block_count": len(moe.blocks),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": feed_forward,
        "head_count": config.num_attention_heads,
        "layer_norm_rms_eps": _epsilon(config),
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": expert,
    }
    keys |= _attention_keys(config, architecture) | _rotary_keys(moe)
    if shared := widths.get("ffn_down_shexp"):
        keys |= {"expert_shared_feed_forward_length": shared, "expert_shared_count": shared // expert}
    if architecture.leading_dense:
        keys["leading_dense_block_count"] = len(moe.blocks) - len(moe.moe_blocks)
    if architecture.gating:
        keys["expert_gating_func"] = gguf.ExpertGatingFuncType(architecture.gating)
    if architecture.normalizes is None:
        keys["expert_weights_norm"] = config.norm_topk_prob
    if architecture.scales:
        keys["expert_weights_scale"] = float(config.routed_scaling_factor)
    if architecture.grouped and _groups(config) != (1, 1):
        keys["expert_group_count"], keys["expert_group_used_count"] = _groups(config)
    for name, value in architecture.keys.items():
        value = getattr(config, value) if isinstance(value, str) else value
        keys |= {} if value is None else {name: value}
    return keys


def _attention_keys(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    if architecture.latent:  # one key and value head, which holds the latent vector
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        keys = {
            "head_count_kv": 1,
            "key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "value_length": config.kv_lora_rank,
            "kv_lora_rank": config.kv_lora_rank,
            "key_length_mla": head,
            "value_length_mla": config.v_head_dim,
        }
        return keys | {"q_lora_rank": config.q_lora_rank or 0}
    kinds = _kinds(config)
    keys = {"head_count_kv": config.num_key_value_heads, "key_length": _head(config), "value_length": _head(config)}
    if architecture.recurrent == "delta net":
        keys["ssm_inner_size"] = config.linear_num_value_heads * config.linear_value_head_dim
        keys["full_attention_interval"] = _interval(kinds)
    elif {*kinds} & {*WITHOUT_HEADS}:
        keys["head_count_kv"] = [0 if kind in WITHOUT_HEADS else config.num_key_value_heads for kind in kinds]
    if architecture.recurrent == "mamba":
        heads = _first_of(config, "mamba_n_heads", "mamba_num_heads")
        keys["ssm_inner_size"] = heads * _first_of(config, "mamba_d_head", "mamba_head_dim")
        keys["rope_scaling_finetuned"] = getattr(config, "position_embedding_type", None) == "rope"  # if any is rotated
    if "sliding_attention" in architecture.layers:
        keys["sliding_window"] = config.sliding_window
        keys["sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds]
    return keys


def _rotary_keys(moe: MoEModel) -> dict[str, Any]:
    import gguf

    rope, dimensions = _rope(moe.config), _rotary_dimensions(moe)
    base, keys = rope.get("rope_theta", 10000.0), {}
    if rope.get("rope_type") == "ntk_alpha":  # HunYuan's: a constant change of the base
        base *= rope["alpha"] ** (dimensions / (dimensions - 2))
    if rope.get("rope_type") == "yarn":
        keys = {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": _yarn_factor(moe.config),
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
        }
        if share := rope.get("mscale_all_dim"):
            keys["rope_scaling_yarn_log_mul"] = 0.1 * share  # llama.cpp takes the factor .1 out again
    if sections := _sections(moe.config):
        keys["rope_dimension_sections"] = [*sections, 0]
    return {"rope_dimension_count": dimensions, "rope_freq_base": float(base)} | keys


def _compared(moe: MoEModel, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Options and properties of the model, their values, and the values that llama.cpp computes with."""
    config = moe.config
    kinds, kind = _kinds(config), _rope(config).get("rope_type") or "default"
    yield "hidden_act", getattr(config, "hidden_act", "silu"), "silu"
    yield "rope_type", kind, kind if kind in ROPE_TYPES else "default"
    if kind == "yarn":
        yield from _compared_yarn(moe)
    yield "layer_types", kinds, [kind for kind in kinds if kind in architecture.layers]
    if architecture.rotates_sliding:
        pattern = ["sliding_attention" if (i + 1) % UNROTATED else "full_attention" for i in range(len(kinds))]
        yield "layer_types", kinds, pattern
    if not kinds:
        yield "sliding_window", getattr(config, "sliding_window", None) or None, None
    if architecture.recurrent == "delta net":
        every = _interval(kinds)
        pattern = [KINDS[(i + 1) % every == 0] for i in range(len(kinds))]
        yield "layer_types", kinds, pattern
        yield "linear_value_head_dim", config.linear_value_head_dim, config.linear_key_head_dim
    if {*architecture.layers} & {*RECURRENT}:  # llama.cpp aborts where one of its two caches has no layer
        yield "some layers without attention", bool({*kinds} & {*RECURRENT}), True
        yield "some layers with attention", bool({*kinds} - {*WITHOUT_HEADS}), True
    if "sliding_attention" in architecture.layers:
        yield "some layers with sliding windows", "sliding_attention" in kinds, True
    yield "experts selected in each block", [block.top_k for block in moe.moe_blocks], [moe.top_k] * len(moe.moe_blocks)
    for option, supported in architecture.expects.items():
        value = getattr(config, option, supported)
        yield option, tuple(value) if isinstance(value, list) else value, supported
    blocks, tokens = len(moe.blocks), config.vocab_size
    if architecture.latent and (blocks in LITE or (blocks, tokens) == KANANA):
        yield f"q_lora_rank, at {blocks} blocks and {tokens} tokens", config.q_lora_rank, None
    if sections := _sections(config):  # pair n is number n // 3 of section n % 3, and rotated if it is in one
        pairs = [n % sum(sections) for n in range(_rotary_dimensions(moe) // 2)]
        yield "mrope_section longer than a head", sum(sections) > _head(config), False
        yield "rotated pairs in no mrope_section", [n for n in pairs if n // 3 >= sections[n % 3]], []
    if architecture.multi_head:
        yield "num_key_value_heads", config.num_key_value_heads, config.num_attention_heads
    if architecture.full_width:
        yield "head_dim", _head(config), config.hidden_size // config.num_attention_heads
    if (smallest := getattr(config, "moe_norm_min", 0.0)) > SMALLEST_SUM:  # ERNIE's
        yield "moe_norm_min", smallest, SMALLEST_SUM
    if architecture.normalizes is not None and config.model_type != "deepseek_v2":  # which does not read the option
        yield "norm_topk_prob", getattr(config, "norm_topk_prob", architecture.normalizes), architecture.normalizes
    if not architecture.scales:
        yield "routed_scaling_factor", getattr(config, "routed_scaling_factor", None) or 1.0, 1.0
    if not architecture.grouped:
        yield "n_group and topk_group", _groups(config), (1, 1)
    if not architecture.partial_rotary and not architecture.latent:
        yield "partial_rotary_factor", _rotary_dimensions(moe) / _head(config), 1.0
    rotated, scaling = _attention_factors(config, architecture)
    for name, module in moe.decoder.named_modules():
        if "RMSNorm" in type(module).__name__:
            epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            yield f"{name}.eps", float(epsilon), float(_epsilon(config))
        elif isinstance(factor := getattr(module, "attention_scaling", None), float):
            yield f"{name}.attention_scaling", factor, rotated
        elif isinstance(factor := getattr(module, "scaling", None), float):
            yield f"{name}.scaling", factor, scaling


def _compared_yarn(moe: MoEModel) -> Iterator[tuple[str, Any, Any]]:
    """The options that move YaRN's limits; llama.cpp has no key for them in any of our architectures."""
    rope, supported = _rope(moe.config), _yarn_slowing(moe, YARN)
    for option in ("beta_fast", "beta_slow"):
        value = float(rope.get(option) or YARN[option])
        if _yarn_slowing(moe, YARN | {option: value}) != supported:
            yield option, value, YARN[option]
    if moe.config.model_type != "gpt_oss" and _yarn_slowing(moe, rope) != supported:  # `warn_of_rounding` names that
        yield "truncate", rope.get("truncate"), YARN["truncate"]


def _yarn_slowing(moe: MoEModel, options: Mapping[str, Any]) -> list[float]:
    """By what YaRN multiplies the frequency of each rotated pair: 1 below its limits, 1 / factor above.

    The limits are the pairs with beta_fast and beta_slow turns in the original context.
    """
    rope, dimensions, limits = _rope(moe.config), _rotary_dimensions(moe), []
    for option, rounded in (("beta_fast", math.floor), ("beta_slow", math.ceil)):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * (options.get(option) or YARN[option]))
        limit = dimensions * math.log(turns) / (2 * math.log(rope["rope_theta"]))
        limits.append(rounded(limit) if options.get("truncate", YARN["truncate"]) else limit)
    low, high = max(limits[0], 0), min(limits[1], dimensions - 1)
    shares = [min(max((pair - low) / (high - low or 0.001), 0.0), 1.0) for pair in range(dimensions // 2)]
    return [1 - share * (1 - 1 / _yarn_factor(moe.config)) for share in shares]


def _attention_factors(config: PreTrainedConfig, architecture: Architecture) -> tuple[float, float]:
    """By what llama.cpp multiplies rotated queries and keys, and the products of both."""
    rope = _rope(config)
    head = config.qk_nope_head_dim + config.qk_rope_head_dim if architecture.latent else _head(config)
    scaling = head**-0.5
    if "attention_scale" in architecture.keys:
        scaling = float(config.attention_multiplier)
    if rope.get("rope_type") != "yarn":
        return 1.0, scaling
    grown, share = 0.1 * math.log(_yarn_factor(config)), rope.get("mscale_all_dim") or 0.0
    if not architecture.latent:
        return 1 + grown, scaling
    return (1.0 if share else 1 + grown), scaling * (1 + grown * (share or 1)) ** 2


def _rotary_dimensions(moe: MoEModel) -> int:
    """How many of a head's dimensions are rotated."""
    rotations = (2 * len(module.inv_freq) for module in moe.decoder.modules() if hasattr(module, "inv_freq"))
    return next(rotations, _head(moe.config))


def _sections(config: PreTrainedConfig) -> list[int]:
    """How the rotated pairs are divided between time, height and width, which are equal in text."""
    is_divided = config.model_type == "qwen3_5_moe_text"
    return list(_rope(config).get("mrope_section") or SECTIONS) if is_divided else []


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    is_alpha = config.model_type == "hunyuan_v1_moe" and rope.get("rope_type") == "dynamic" and rope.get("alpha")
    return rope | {"rope_type": "ntk_alpha"} if is_alpha else rope  # HunYuan's checkpoints call it dynamic


def _yarn_factor(config: PreTrainedConfig) -> float:
    rope = _rope(config)
    return float(rope.get("factor") or config.max_position_embeddings / rope["original_max_position_embeddings"])


def _head(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kinds(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer, where the config has it."""
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []


def _interval(kinds: list[str]) -> int:
    """Every how many layers one has full attention."""
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def _epsilon(config: PreTrainedConfig) -> float:
    return _first_of(config, "rms_norm_eps", "norm_eps", "layer_norm_epsilon")


def _first_of(config: PreTrainedConfig, *names: str) -> Any:
    """The option that goes by one of these names, by model type."""
    return next(getattr(config, name) for name in names if hasattr(config, name))


def _groups(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of groups of experts, and of those that a token may select from."""
    groups = getattr(config, "n_group", None) or 1
    chosen = getattr(config, "topk_group", None) or groups
    if getattr(config, "topk_method", None) == "greedy" or groups == chosen:
        return 1, 1
    return groups, chosen
