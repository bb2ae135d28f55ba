"""PESF against a brute-force reference that skips pairs one by one, in every experts implementation and packed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import architectures
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed_loading import compress
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel, Qwen2MoeConfig

import eacmoe_lightning
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.skipping import PESF, set_skipping
from eacmoe_lightning.skipping.decode import Demand
from eacmoe_lightning.skipping.selection import drop, exact, kept_experts, reroute, skip_counts
from eacmoe_lightning.skipping.session import _check_can_skip

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
implementations = pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def skewed_model() -> PreTrainedModel:
    """A model larger than the tiny ones: 4 blocks of 24 experts, top-4, with norms of router rows by a power law."""
    config = Qwen2MoeConfig(
        **{**tiny_models.COMMON, "hidden_size": 96, "num_hidden_layers": 4},
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        num_experts=24,
        num_experts_per_tok=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for block in MoEModel(model).moe_blocks:
        block.router_weight.data *= 12 / torch.arange(1, 25).float().pow(0.7).unsqueeze(1)
    return model.eval()


def brute_force(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, alpha: float) -> Tensor:
    """Logits with every rarely selected (token, expert) pair left out, one token and one expert at a time."""
    model = copy.deepcopy(model)
    real = torch.ones_like(input_ids) if mask is None else mask
    batch, length = input_ids.shape

    def experts_of(block):
        experts, part = block.experts.module, block.experts

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            num_experts, top_k = part.num_experts, ids.shape[1]
            out = torch.zeros_like(hidden)
            for b in range(batch):
                counts = [0] * num_experts
                for t in range(length):
                    if real[b, t]:
                        for e in ids[b * length + t].tolist():
                            counts[e] += 1
                tokens = int(real[b].sum())
                rare = [c < Fraction(str(alpha)) * tokens * top_k / num_experts for c in counts]
                for t in range(length):
                    n = b * length + t
                    for e, w in zip(ids[n].tolist(), weights[n], strict=True):
                        if not rare[e]:
                            out[n] += w * F.linear(part.intermediate(hidden[n : n + 1], e)[0], experts.down_proj[e])
            return out

        return forward

    for block in MoEModel(model).moe_blocks:
        block.experts.module.forward = experts_of(block)
    return model(input_ids, attention_mask=mask, use_cache=False).logits


def padded(lengths: list[int], side: str) -> Tensor:
    """[B, T] attention mask."""
    width = max(lengths)
    rows = [[1] * n + [0] * (width - n) if side == "right" else [0] * (width - n) + [1] * n for n in lengths]
    return torch.tensor(rows)


def error(got: Tensor, want: Tensor, mask: Tensor | None = None) -> float:
    real = torch.ones(want.shape[:2]).bool() if mask is None else mask.bool()
    return float((got - want)[real].abs().max() / want[real].abs().max())


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_counts_and_kept_experts_by_hand():
    ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [3, 1]], [[3, 2], [3, 2], [0, 1], [0, 1]]])  # [2, 4, 2]
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    counts = skip_counts(ids, real, 4)
    assert counts.tolist() == [[3, 2, 1, 0], [2, 2, 2, 2]]
    # thresholds alpha * l * K / E: 0.7 * 3 * 2 / 4 = 1.05 and 0.7 * 4 * 2 / 4 = 1.4
    kept = kept_experts(counts, torch.tensor([3, 4]), 2, 0.7)
    assert kept.tolist() == [[True, True, False, False], [True] * 4]


def test_a_count_equal_to_the_threshold_is_kept_whatever_floats_say():
    # 0.3 * 110 * 2 / 6 is exactly 11, but 11.000000000000002 in floats
    assert exact(0.3) == Fraction(3, 10)
    counts = torch.tensor([[11, 10, 99, 50, 25, 25]])
    assert kept_experts(counts, torch.tensor([110]), 2, 0.3).tolist() == [[True, False, True, True, True, True]]


@given(
    alpha=st.decimals("0.001", "1", places=3),
    counts=st.lists(st.integers(0, 300), min_size=4, max_size=12),
    top_k=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_kept_experts_is_the_paper_s_inequality_in_exact_arithmetic(alpha, counts, top_k):
    length = sum(counts) // top_k
    kept = kept_experts(torch.tensor([counts]), torch.tensor([length]), top_k, float(alpha))[0].tolist()
    assert kept == [not c < Fraction(alpha) * length * top_k / len(counts) for c in counts]


def test_survivors_by_hand():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 2.0, 3.0]])
    ids, weights = torch.tensor([[0, 1], [0, 1], [1, 3]]), torch.tensor([[0.6, 0.2], [0.6, 0.2], [0.5, 0.3]])
    dropped = torch.tensor([[False, True], [True, True], [False, False]])
    new_ids, kept_weights = drop(ids, weights, dropped, 4)
    assert new_ids.tolist() == [[0, 4], [4, 4], [1, 3]]
    assert torch.equal(kept_weights, torch.tensor([[0.6, 0], [0, 0], [0.5, 0.3]]))
    _, scaled = drop(ids, weights, dropped, 4, renormalize=True)
    assert torch.allclose(scaled, torch.tensor([[0.8, 0], [0, 0], [0.5, 0.3]]))

    def weigh(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.gather(1, ids)

    usable = torch.tensor([[True, False, False, True], [False, False, True, False], [True] * 4])
    new_ids, new_weights = reroute(logits, ids, weights, dropped, usable, weigh)
    assert new_ids.tolist() == [[0, 3], [2, 4], [1, 3]]  # for the second token only one expert is kept
    assert torch.equal(new_weights, torch.tensor([[4.0, 1.0], [2.0, 0.0], [0.5, 0.3]]))


# --- on models --------------------------------------------------------------------------------------------------------


@implementations
@families
@torch.no_grad()
def test_equals_brute_force_on_every_family(family, experts):
    model = tiny_models.build(family)
    model.config._experts_implementation = experts
    mask = padded([32, 20, 27], "left")
    ids = random_ids(3, 32)
    plain = model(ids, attention_mask=mask, use_cache=False).logits
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        got = model(ids, attention_mask=mask, use_cache=False).logits
    assert report.summary()["dropped"] > 0 and error(got, plain, mask) > 1e-3
    assert error(got, brute_force(model, ids, mask, 0.7), mask) < 1e-5
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, plain)  # the model is restored


@implementations
@torch.no_grad()
def test_equals_brute_force_on_a_larger_model_with_skewed_routing(experts):
    model = skewed_model()
    model.config._experts_implementation = experts
    ids, mask = random_ids(2, 96), padded([96, 70], "right")
    with eacmoe_lightning.pesf(model, alpha=0.3) as report:
        got = model(ids, attention_mask=mask).logits
    assert report.summary()["pairs_dropped"] > 0.02 and report.summary()["experts_skipped"] > 0.2
    assert error(got, brute_force(model, ids, mask, 0.3), mask) < 1e-5


@implementations
@torch.no_grad()
def test_equals_brute_force_on_the_bundled_model(experts):
    model = load_original("bundled", "float32")
    model.config._experts_implementation = experts
    ids = random_ids(1, 128)
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        got = model(ids).logits
    assert report.summary()["pairs_dropped"] > 0.05
    assert error(got, brute_force(model, ids, None, 0.7)) < 1e-5


@families
@torch.no_grad()
def test_packed_experts_equal_brute_force_on_their_decoded_weights(family, tmp_path, tiny_model_dir):
    folder = compress(tiny_model_dir(family), tmp_path / "compressed")
    packed, decoded = load(folder, "float32"), load(folder, "float32", packed=False)
    ids, mask = random_ids(2, 40), padded([40, 33], "left")
    with eacmoe_lightning.pesf(packed, alpha=0.7) as report:
        got = packed(ids, attention_mask=mask).logits
    assert report.summary()["dropped"] > 0
    assert error(got, brute_force(decoded, ids, mask, 0.7), mask) < 1e-5
    plain = packed(ids).logits
    with eacmoe_lightning.pesf(packed, alpha=1e-4):
        assert torch.equal(packed(ids).logits, plain)


@implementations
@families
@torch.no_grad()
def test_alpha_towards_zero_is_bit_equal_to_no_pruning(family, experts):
    model = tiny_models.build(family)
    model.config._experts_implementation = experts
    ids, mask = random_ids(2, 48), padded([48, 30], "left")
    plain, plain_padded = model(ids).logits, model(ids, attention_mask=mask).logits
    for survivors in ("keep", "renormalize", "reroute"):
        with eacmoe_lightning.pesf(model, alpha=1e-4, survivors=survivors):
            assert torch.equal(model(ids).logits, plain)
            # experts that only padding selects are skipped, so products have other shapes and round differently
            assert error(model(ids, attention_mask=mask).logits, plain_padded, mask) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("survivors", ["keep", "renormalize", "reroute"])
@torch.no_grad()
def test_padding_does_not_change_a_sequence(side, survivors):
    model, lengths = tiny_models.build("qwen3_moe"), [60, 41, 1, 17]
    ids, mask = random_ids(4, 60), padded(lengths, side)
    with eacmoe_lightning.pesf(model, alpha=0.7, survivors=survivors):
        together = model(ids, attention_mask=mask).logits
        for row, (tokens, is_real) in enumerate(zip(ids, mask.bool(), strict=True)):
            assert error(together[row][is_real].unsqueeze(0), model(tokens[is_real].unsqueeze(0)).logits) < 1e-5


@torch.no_grad()
def test_short_sequences_and_padding_alone_lose_nothing():
    model = tiny_models.build("mixtral")  # 8 experts, top-2: up to 8 / (0.3 * 2) = 13 tokens
    for length in (1, 2, 13):
        ids = random_ids(3, length)
        plain = model(ids).logits
        with eacmoe_lightning.pesf(model, alpha=0.3) as report:
            assert torch.equal(model(ids).logits, plain)
        assert report.summary()["dropped"] == 0
    ids, nothing = random_ids(2, 40), torch.zeros(2, 40, dtype=torch.long)
    plain = model(ids, attention_mask=nothing).logits
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        assert torch.equal(model(ids, attention_mask=nothing).logits, plain)
    assert report.summary() == {**report.summary(), "pairs": 0, "sequence_skipped": 0, "batch_untouched": 0}


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "packed"])
@torch.no_grad()
def test_the_weights_of_skipped_experts_are_not_touched(experts, tmp_path, tiny_model_dir):
    if experts == "packed":
        model = load(compress(tiny_model_dir("mixtral"), tmp_path / "compressed"), "float32")
    else:
        model = tiny_models.build("mixtral")
        model.config._experts_implementation = experts
    ids = random_ids(1, 48)
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        want = model(ids).logits
        used = [set() for _ in range(3)]
        handles = [
            block.router.register_forward_hook(lambda m, a, out, i=i: used[i].update(out[2].flatten().tolist()))
            for i, block in enumerate(MoEModel(model).moe_blocks)
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        for block, used_experts in zip(MoEModel(model).moe_blocks, used, strict=True):
            for e in set(range(8)) - used_experts:
                down = block.experts.module.down_proj
                (down.scale if experts == "packed" else down)[e] = torch.nan
        assert torch.equal(model(ids).logits, want)
    assert report.summary()["dropped"] > 0
    assert not torch.isfinite(model(ids).logits).all()


@torch.no_grad()
def test_the_report_distinguishes_sequences_from_batches():
    model = tiny_models.build("mixtral")
    ids = torch.stack([random_ids(1, 64)[0], random_ids(1, 1, seed=1).expand(1, 64)[0]])
    alone = []
    for row in ids:
        with eacmoe_lightning.pesf(model, alpha=0.7) as report:
            model(row.unsqueeze(0))
        alone.append(report.summary())
        assert alone[-1]["experts_skipped"] == alone[-1]["experts_untouched"]  # a batch of one
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        model(ids)
    both = report.summary()
    assert both["sequence_skipped"] == sum(s["sequence_skipped"] for s in alone)
    assert both["dropped"] == sum(s["dropped"] for s in alone)
    assert both["experts_untouched"] < both["experts_skipped"]
    assert "(sequence, expert) pairs were skipped" in str(report)


@torch.no_grad()
def test_generate_prunes_the_prompt_and_runs_the_rest_in_full():
    model = tiny_models.build("qwen2_moe")
    ids, mask = random_ids(2, 40), padded([40, 25], "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        dynamic = model.generate(ids, **options)
        static = model.generate(ids, **options, cache_implementation="static")
    assert torch.equal(dynamic, static)
    assert report.summary("prefill")["pairs"] == 2 * 65 * 2 * 3 and report.summary("prefill")["dropped"] > 0
    assert report.summary("decode")["pairs"] > 0 and report.summary("decode")["dropped"] == 0


@torch.no_grad()
def test_biased_and_transposed_experts_of_gpt_oss():
    config = GptOssConfig(**tiny_models.COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "router" in name or name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    ids = random_ids(2, 64)
    outputs = []
    for experts in ("eager", "grouped_mm"):
        model.set_experts_implementation(experts)
        with eacmoe_lightning.pesf(model, alpha=0.7) as report:
            outputs.append(model(ids).logits)
    model.set_experts_implementation("eager")

    def zero_rare(router, args, output):
        logits, weights, chosen = output
        weights = weights.clone()
        for rows, row_weights in zip(chosen.view(2, 64, 2), weights.view(2, 64, 2), strict=True):
            counts = rows.flatten().bincount(minlength=8)
            row_weights[counts[rows] < 0.7 * 64 * 2 / 8] = 0
        return logits, weights, chosen

    for block in MoEModel(model).moe_blocks:
        block.router.register_forward_hook(zero_rare)
    assert report.summary()["dropped"] > 0
    assert all(error(got, model(ids).logits) < 1e-5 for got in outputs)


@torch.no_grad()
def test_experts_on_a_cpu_do_not_see_skipped_pairs():
    model, ids = tiny_models.build("mixtral"), random_ids(1, 40)
    experts = MoEModel(model).moe_blocks[1].experts.module

    def strict(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if int(ids.max()) >= 8 or len(ids) == 0:
            raise IndexError("no expert 8")
        return type(experts).forward(experts, hidden, ids, weights)

    set_skipping(model, PESF(0.3))
    mild = model(ids).logits
    set_skipping(model, None)
    experts.forward = strict
    with eacmoe_lightning.pesf(model, alpha=0.3):
        assert error(model(ids).logits, mild) < 1e-6
    assert experts.forward is strict
    with pytest.raises(ValueError, match="cannot skip a .* pair"):  # what a user sees if experts do get them
        _check_can_skip(MoEModel(model).moe_blocks[1], model.dtype)


@torch.no_grad()
@pytest.mark.parametrize("rule", [PESF(alpha=0.7), PESF(alpha=0.7, decode=Demand())])
def test_blocks_that_get_the_last_tokens_alone(rule):
    """Gemma 4's last blocks read the keys of others: where only the last logits count, they get no other tokens."""
    model = architectures.build("gemma4_text").eval()
    ids = random_ids(2, 40)
    seen = []
    for block in MoEModel(model).moe_blocks:
        block.watch_router(lambda routing, _: seen.append(len(routing.ids)))
    set_skipping(model, rule)
    model(ids, logits_to_keep=1)
    if set(seen) == {80}:
        pytest.skip("this version gives these blocks all tokens")
    assert set(seen) == {80, 2}
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, :40], ids)


@torch.no_grad()
def test_a_model_pickles_with_its_rule_after_a_prompt():
    model, ids = tiny_models.build("mixtral"), random_ids(2, 40)
    set_skipping(model, PESF(alpha=0.7, survivors="reroute"))
    expected = model(ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


def check_threads(model: PreTrainedModel, texts: list[Tensor]) -> None:
    """Every text gives in a thread of its own, among those of the others, what it gives alone."""

    @torch.no_grad()
    def run(ids: Tensor, times: int = 20) -> list[Tensor]:
        return [model(ids, use_cache=False).logits for _ in range(times)]

    alone = [run(ids, 1)[0] for ids in texts]
    with ThreadPoolExecutor(len(texts)) as threads:
        for got, expected in zip(threads.map(run, texts), alone, strict=True):
            assert all(torch.equal(logits, expected) for logits in got)


@torch.no_grad()
def test_threads_do_not_mix_the_logits_of_routers_whose_matrix_is_a_layer():
    model, texts = architectures.build("gemma4_text"), [random_ids(1, length, length) for length in (20, 27, 34, 41)]
    with eacmoe_lightning.pesf(model, alpha=0.9, survivors="reroute"):
        check_threads(model, texts)
        copied, (ids, *_) = pickle.loads(pickle.dumps(model)), texts
        assert torch.equal(copied(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_skips_as_it_does_otherwise():
    config = tiny_models.config_of("mixtral")
    config.num_hidden_layers = 1
    model, ids = tiny_models.build_random(config, 0), random_ids(2, 40)
    with eacmoe_lightning.pesf(model, alpha=0.7) as report:
        want = model(ids, use_cache=False).logits
        model(ids[:, :7], use_cache=False)
        assert error(torch.compile(model, backend="eager")(ids, use_cache=False).logits, want) < 1e-5
    assert report.summary()["dropped"] > 0


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing_behind():
    model, ids = tiny_models.build("mixtral"), random_ids(1, 40)
    layer = MoEModel(model).moe_blocks[0].layer
    with eacmoe_lightning.pesf(model, alpha=0.7):
        handle = layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        hidden = torch.randn(2, 24, model.config.hidden_size)  # then a block alone, as `evaluate` runs it
        positions = model.model.rotary_emb(hidden, torch.arange(24)[None])
        assert layer(hidden, position_embeddings=positions).shape == hidden.shape
