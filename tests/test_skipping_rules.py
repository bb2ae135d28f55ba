"""Skipping after the prompt, and the baselines: against sequential and brute-force references, and by hand."""

import copy
import math
import pickle
from functools import partial

import architectures
import pytest
import tiny_models
import torch
from test_pesf import check_threads, error, padded, random_ids, skewed_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)

import eacmoe_lightning
from eacmoe_lightning.models.growing_cache import GrowingLayer, grow_in_place
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.skipping import EES, ODP, PESF, Demand, Truncation, current_rule, set_skipping, skipping
from eacmoe_lightning.skipping.baselines import mean_attention_received, median_ratios, most_important
from eacmoe_lightning.skipping.rules import Place
from eacmoe_lightning.skipping.stored import read_rule
from eacmoe_lightning.skipping.tokens import Tokens

# --- decode -----------------------------------------------------------------------------------------------------------


def decode_reference(model: PreTrainedModel, ids: Tensor, prompt: int, alpha: float, half_life: float) -> Tensor:
    """Logits [T, V] of one sequence in one pass, with the algorithm of `Demand` as loops over tokens and experts."""

    def choose(router, args, output):
        logits, weights, chosen = output
        weights, (length, top_k), num_experts = weights.clone(), chosen.shape, logits.shape[1]
        counts = [0.0] * num_experts
        for row in chosen[:prompt].tolist():
            for e in row:
                counts[e] += 1
        for t in range(prompt):
            for k in range(top_k):
                if counts[int(chosen[t, k])] < alpha * prompt * top_k / num_experts:
                    weights[t, k] = 0
        retention = 2 ** (-1 / half_life)
        scale = min(1.0, 1 / (1 - retention) / prompt)
        demand = [c * scale for c in counts]
        for t in range(prompt, length):
            demand = [d * retention for d in demand]
            for e in chosen[t].tolist():
                demand[e] += 1
            first = float(weights[t].max())
            for k in range(top_k):
                is_rare = demand[int(chosen[t, k])] < alpha * sum(demand) / num_experts
                if is_rare and float(weights[t, k]) < first:
                    weights[t, k] = 0
        return logits, weights, chosen

    handles = [block.router.register_forward_hook(choose) for block in MoEModel(model).moe_blocks]
    logits = model(ids.unsqueeze(0), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def stepwise(model: PreTrainedModel, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a prompt in one pass, then of one token at a time."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model(ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    logits = [out.logits]
    for t in range(prompt, ids.shape[1]):
        step = {"attention_mask": mask[:, : t + 1], "past_key_values": out.past_key_values}
        out = model(ids[:, t : t + 1], **step, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("half_life", [8.0, 500.0])
@torch.no_grad()
def test_decode_follows_the_algorithm_token_by_token(half_life):
    model, ids = skewed_model(), random_ids(2, 64)
    rule = PESF(0.7, decode=Demand(half_life))
    with skipping(model, rule) as report:
        got = stepwise(model, ids, 40)
    assert report.summary("decode")["pairs_dropped"] > 0.02
    for row, tokens in zip(got, ids, strict=True):
        assert error(row.unsqueeze(0), decode_reference(model, tokens, 40, 0.7, half_life).unsqueeze(0)) < 1e-5
    mask = padded([64, 57], "left")
    with skipping(model, rule):
        padded_rows = stepwise(model, ids, 40, mask)
        alone = stepwise(model, ids[1:, 7:], 33)
    assert error(padded_rows[1:, 7:], alone) < 1e-5


def test_demand_by_hand():
    demand = Demand(half_life=1)  # retention 1/2: an endless past counts as 2 tokens
    start = demand.start(torch.tensor([[6, 2, 0], [1, 1, 0]]), top_k=2)  # 4 tokens, and 1
    assert start.tolist() == [[3, 1, 0], [1, 1, 0]]
    after = demand.step(start, torch.tensor([[1, 2], [0, 2]]), torch.tensor([True, False]))
    assert after.tolist() == [[1.5, 1.5, 1], [0.5, 0.5, 0]]


def test_an_expert_returns_as_first_choice_or_when_it_is_selected_often():
    rule, place, memory = PESF(1.0, decode=Demand(half_life=16)), Place(0, torch.nn.Identity()), {}

    def decide(chosen: list[int], weights: list[float], times: int = 1) -> list[int]:
        routing = Routing(torch.zeros(times, 4), torch.tensor([chosen] * times), torch.tensor([weights] * times))
        tokens = Tokens(torch.ones(1, times).bool(), memory, is_continued=bool(memory))
        return rule.decide(place, routing, tokens).ids[-1].tolist()

    assert decide([0, 1], [0.6, 0.4], times=40) == [0, 1]
    assert decide([0, 2], [0.6, 0.4]) == [0, 4]  # 2 was never selected before
    assert decide([2, 0], [0.6, 0.4]) == [2, 0]  # here it is the first choice
    ran = [decide([0, 2], [0.6, 0.4]) == [0, 2] for _ in range(30)]
    # demand of expert 2 after n more tokens: about 2 + n, against a mean of about 23.6 * 2 / 4
    assert ran == sorted(ran) and 8 < ran.index(True) < 25


def test_a_demand_of_few_tokens_skips_nothing():
    rule, place, memory = PESF(0.9, decode=Demand(rescue=1.0)), Place(0, torch.nn.Identity()), {}
    # up to E / (alpha K) = 8 / (0.9 * 2) = 4.4 tokens, as after a prompt of which a block got the last token alone
    for chosen in ([0, 1], [2, 3], [4, 5], [6, 7]):
        routing = Routing(torch.zeros(1, 8), torch.tensor([chosen]), torch.tensor([[0.6, 0.4]]))
        tokens = Tokens(torch.ones(1, 1).bool(), memory, is_continued=bool(memory))
        assert rule.decide(place, routing, tokens).ids.tolist() == [chosen]


@torch.no_grad()
def test_generations_start_afresh_and_beams_keep_their_demand():
    model, ids = skewed_model(), random_ids(2, 40)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with eacmoe_lightning.pesf(model, alpha=0.7, decode=True):
        first = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options), first)
        assert torch.equal(model.generate(ids, **options, cache_implementation="static"), first)
        assert torch.equal(model.generate(ids, **options, cache_implementation="static"), first)
        beams = model.generate(
            ids, **options, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
        )
        for row, score in zip(beams.sequences, beams.sequences_scores, strict=True):
            # a beam replayed alone has the same likelihood, so it was scored with its own demand
            steps = stepwise(model, row.unsqueeze(0), 40)[0, 39:-1].log_softmax(-1)
            log_likelihood = steps.gather(1, row[40:].unsqueeze(1)).sum() / 12
            assert log_likelihood == pytest.approx(float(score), abs=1e-4)


@torch.no_grad()
def test_demand_follows_selected_and_repeated_sequences_and_a_crop_is_refused():
    model, ids = skewed_model(), random_ids(3, 50)
    token = random_ids(3, 1, seed=1)
    with eacmoe_lightning.pesf(model, alpha=0.7, decode=True):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        got = model(token[[2, 2, 0, 0]], past_key_values=cache).logits
        want = stepwise(model, torch.cat([ids, token], 1)[[2, 2, 0, 0]], 50)[:, -1:]
        assert error(got, want) < 1e-5
        cache.crop(0)
        model(token[[2, 2, 0, 0]], past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(ValueError, match="removed from the cache.*`prompt_lookup_num_tokens`"):
            model(token[[2, 2, 0, 0]], past_key_values=cache)
    model(token[[2, 2, 0, 0]], past_key_values=cache)  # without the rule, nothing is counted


@pytest.mark.parametrize("make", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_demand_is_copied_and_pickled_with_its_cache(make):
    model, ids = skewed_model(), random_ids(2, 50)
    tokens = random_ids(2, 6, seed=1)

    def steps(cache: DynamicCache) -> Tensor:
        return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, 1)], 1)

    with eacmoe_lightning.pesf(model, alpha=0.7, decode=True) as report:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        copied, swapped = make(cache), make(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        want = steps(cache)  # the copies' changes do not reach it
        assert error(want, stepwise(model, torch.cat([ids, tokens], 1), 50)[:, 50:]) < 1e-5
        assert report.summary("decode")["dropped"] > 0
        del cache
        assert torch.equal(steps(copied), want)
        swapped_rows = torch.cat([ids[[1, 0]], tokens], 1)
        assert error(steps(swapped), stepwise(model, swapped_rows, 50)[:, 50:]) < 1e-5


@torch.no_grad()
def test_a_cache_with_demand_still_grows_in_place():
    model, ids, cache = skewed_model(), random_ids(1, 40), DynamicCache()
    grow_in_place(model)
    with eacmoe_lightning.pesf(model, alpha=0.7, decode=True):
        for piece in (ids, ids[:, :1]):  # the layers come with the first
            model(input_ids=piece, past_key_values=cache)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_rule_is_warned_of(caplog):
    model, ids = skewed_model(), random_ids(1, 40)
    cache = model(ids, use_cache=True).past_key_values
    with eacmoe_lightning.pesf(model, alpha=0.7, decode=True):
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert [record.message[:32] for record in caplog.records] == ["1 tokens follow 40 in the cache:"]


@torch.no_grad()
def test_a_prompt_in_pieces_counts_as_one():
    model, ids = skewed_model(), random_ids(2, 60)
    # nothing is dropped, so the hidden states are the same
    with eacmoe_lightning.pesf(model, alpha=1e-4, decode=Demand(rescue=0)):
        whole, pieces = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids, past_key_values=whole)
        for piece in ids.split(20, 1):
            model(piece, past_key_values=pieces)
        assert whole.memory.keys() == pieces.memory.keys()
        assert all(torch.equal(whole.memory[name], pieces.memory[name]) for name in whole.memory)


# --- baselines --------------------------------------------------------------------------------------------------------


def weights_under(model: PreTrainedModel, rule, ids: Tensor, mask: Tensor | None = None):
    """(ids, weights) that the first MoE block runs, each [N, K]: first without a rule, then with it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see() -> None:
        router = MoEModel(model).moe_blocks[0].router
        handle = router.register_forward_hook(lambda m, a, out: seen.append((out[2], out[1])))
        model(ids, attention_mask=mask, use_cache=False)
        handle.remove()

    see()
    with skipping(model, rule):
        see()
    return seen


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_truncation_is_the_model_with_a_smaller_top_k(experts):
    model, ids = tiny_models.build("deepseek"), random_ids(2, 24)
    model.config._experts_implementation = experts
    with skipping(model, Truncation(survivors="keep")) as report:  # ceil(2 * 3 / 3) = 2
        got = model(ids).logits
    assert report.summary()["pairs_dropped"] == pytest.approx(1 / 3)
    config = tiny_models.config_of("deepseek")
    config.num_experts_per_tok = 2
    fewer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fewer.load_state_dict(model.state_dict())
    assert error(got, fewer(ids).logits) < 1e-5


@torch.no_grad()
def test_ees_drops_the_last_expert_of_half_the_tokens_it_was_calibrated_on():
    model, ids = tiny_models.build("qwen2_moe"), random_ids(4, 31)
    rule = EES.calibrate(model, ids, batch_size=3)
    (plain_ids, plain), (ids_run, run) = weights_under(model, rule, ids)
    ratio = plain.min(1).values / plain.max(1).values
    weak = ratio < ratio.median()
    assert rule.ratios[0] == pytest.approx(float(ratio.median())) and weak.sum() == (4 * 31 - 1) // 2
    assert torch.equal((ids_run == 8).any(1), weak)
    assert torch.equal(ids_run[~weak], plain_ids[~weak])
    torch.testing.assert_close(run.sum(1), plain.sum(1))  # renormalized
    assert torch.equal(run[weak].max(1).indices, plain[weak].max(1).indices)


@torch.no_grad()
def test_odp_equals_ees_except_for_protected_tokens():
    model, ids, mask = tiny_models.build("qwen3_moe"), random_ids(2, 50), padded([50, 40], "left")
    ratios = median_ratios(model, ids)
    before = model.config._attn_implementation
    _, (ees, _) = weights_under(model, EES(ratios), ids, mask)
    _, (none, _) = weights_under(model, ODP(ratios, protected=0), ids, mask)
    _, (some, _) = weights_under(model, ODP(ratios, protected=0.2), ids, mask)
    (full, _), (all_of_them, _) = weights_under(model, ODP(ratios, protected=1.0), ids, mask)
    real = mask.flatten().bool()
    assert torch.equal(none[real], ees[real]) and torch.equal(all_of_them[real], full[real])
    changed = ((some != ees).any(1) & real).view(2, 50).sum(1)
    assert 0 < changed[0] <= 10 and 0 < changed[1] <= 8
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("rule", [PESF(0.7), PESF(0.7, survivors="reroute"), PESF(0.7, decode=Demand()), "odp"])
@torch.no_grad()
def test_texts_packed_into_rows_are_counted_apart(rule):
    model, ids = tiny_models.build("qwen3_moe"), random_ids(2, 50)
    rule = ODP(median_ratios(model, ids), protected=0.3) if rule == "odp" else rule
    lengths = [[1, 32, 17], [50]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    texts = [text[None] for row, sizes in zip(ids, lengths, strict=True) for text in row.split(sizes)]
    with skipping(model, rule) as report:
        packed = model(ids, position_ids=positions, use_cache=False).logits
        together = report.summary()
        report.clear()
        alone = [model(text, use_cache=False).logits[0] for text in texts]
        assert error(packed, torch.cat(alone).view_as(packed)) < 1e-5
        for name in ("dropped", "sequence_skipped"):
            steps = report.summary("decode")  # the text of one token, of which nothing is skipped
            assert together[name] == report.summary()[name] + (0 if rule.counts_prompts else steps[name])


@torch.no_grad()
def test_odp_protects_the_same_tokens_with_every_cache():
    model, ids = tiny_models.build("qwen3_moe"), random_ids(1, 25)
    with skipping(model, ODP(median_ratios(model, ids), protected=0.3)):
        want = model(ids, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
            assert error(model(ids, past_key_values=cache).logits, want) < 1e-5
        pieces = []
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
            pieces.append(torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(10, 1)], 1))
        assert error(*pieces) < 1e-5


@torch.no_grad()
def test_threads_do_not_mix_the_attention_of_their_texts():
    model, texts = tiny_models.build("qwen3_moe"), [random_ids(1, length, length) for length in (20, 27, 34, 41)]
    with skipping(model, ODP(median_ratios(model, texts[0]), protected=0.3)):
        check_threads(model, texts)


@pytest.mark.parametrize("name, blocks", [("minimax", "0, 2"), ("nemotron_h", "0, 1")])
def test_odp_is_refused_where_blocks_have_no_attention_weights(name, blocks):
    model = architectures.build(name)
    with pytest.raises(ValueError, match=f"needs attention weights, and the layers of MoE blocks {blocks} "):
        ODP.calibrate(model, random_ids(2, 16))
    with pytest.raises(ValueError, match="use EES"):
        set_skipping(model, ODP((0.5,) * len(MoEModel(model).moe_blocks)))


def test_importance_by_hand():
    attention = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]]]])
    all_real = torch.ones(1, 3).bool()
    received = mean_attention_received(attention, all_real)
    torch.testing.assert_close(received, torch.tensor([[1.7 / 3, 0.7 / 2, 0.6]]))
    empty = torch.nn.functional.pad(attention, (2, 3), value=9.0)  # two tokens in the cache, three free places
    torch.testing.assert_close(mean_attention_received(empty, all_real, past=2), received)
    torch.testing.assert_close(mean_attention_received(attention, all_real, past=9), received)  # a window's keys
    padded_last = torch.tensor([[True, True, False]])
    torch.testing.assert_close(mean_attention_received(attention, padded_last)[0, :2], torch.tensor([1.5 / 2, 0.5]))
    importance = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    assert most_important(importance, torch.tensor([[True, True, True, False]]), 0.7).tolist() == [
        [True, False, True, False]
    ]


@torch.no_grad()
def test_baselines_generate_and_are_stored():
    model, ids = tiny_models.build("mixtral"), random_ids(2, 30)
    ratios = median_ratios(model, ids)
    for rule in (EES(ratios), ODP(ratios), Truncation(1)):
        set_skipping(model, rule)
        assert current_rule(model) == rule == read_rule(rule.to_dict())
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        report = model._expert_skipping.report
        assert report.summary("prefill")["dropped"] > 0 and report.summary("decode")["dropped"] > 0


def test_continuous_batching_runs_rules_for_single_tokens_and_refuses_others():
    model, prompts = tiny_models.build("qwen3_moe"), [random_ids(1, n, n)[0].tolist() for n in (5, 17)]
    options = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)

    def batch() -> list[list[int]]:
        out = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
        return sorted(result.generated_tokens for result in out.values())

    ratios = median_ratios(model, random_ids(2, 16))
    for rule in (Truncation(1), EES(ratios)):
        set_skipping(model, rule)
        alone = [model.generate(torch.tensor([p]), generation_config=options)[0, len(p) :].tolist() for p in prompts]
        assert batch() == sorted(alone)
    for rule in (PESF(0.7), ODP(ratios)):
        set_skipping(model, rule)
        with pytest.raises(ValueError, match="tokens of each sequence .* mix those of several requests: call generate"):
            batch()
    set_skipping(model, None)
    assert all(len(tokens) == 4 for tokens in batch())


def route_apart(model: PreTrainedModel) -> None:
    """Gives a router fewer tokens than the model has, as models do that route images apart from text."""
    block = MoEModel(model).moe_blocks[0]
    with skipping(model, PESF(0.7)):
        handle = block.router.register_forward_pre_hook(lambda router, args: (args[0][:20],))
        try:
            model(random_ids(1, 24))
        finally:
            handle.remove()


def test_bad_arguments_are_refused_by_name():
    model = tiny_models.build("mixtral")
    for make, message in [
        (lambda: Demand(half_life=0), "half_life=0 must be a positive"),
        (lambda: Demand(half_life=math.inf), "half_life=inf"),
        (lambda: Demand(rescue=-0.1), r"rescue=-0.1 is not in \[0, 1\]"),
        (lambda: ODP((0.5,), protected=2), r"protected=2 is not in \[0, 1\]"),
        (lambda: Truncation(survivors="reroute"), "survivors='reroute' is not one of keep, renormalize"),
        (lambda: set_skipping(model, Truncation(3)), "top_k=3 is not between 1 and the 2 experts"),
        (lambda: set_skipping(model, EES((0.5,))), "ees has 1 ratios and the model 3 MoE blocks"),
        (lambda: EES.calibrate(model, random_ids(2, 8)[:0]), "no calibration window"),
        (partial(route_apart, model), r"got 20 tokens, .* 1 x 24: .* call it without the rule"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
