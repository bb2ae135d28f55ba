"""Rules as settings of a model: nested, saved with it and restored, in evaluations, and which arguments are refused."""

import copy
import json
import math
import pickle

import pytest
import tiny_models
import torch
from test_packed_loading import compress
from test_pesf import error, random_ids
from transformers import AutoModelForCausalLM

import eacmoe_lightning
from eacmoe_lightning.compressed.directory import CompressedWeights
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import load_original
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.skipping import PESF, Demand, current_rule, set_skipping, skipping


@torch.no_grad()
def test_settings_nest_and_are_restored_after_errors():
    model, ids = tiny_models.build("mixtral"), random_ids(1, 64)
    plain = model(ids).logits
    set_skipping(model, PESF(0.3))
    mild = model(ids).logits
    with pytest.raises(KeyError), eacmoe_lightning.pesf(model, alpha=1.0):
        assert current_rule(model) == PESF(1.0) and not torch.equal(model(ids).logits, mild)
        raise KeyError
    assert current_rule(model) == PESF(0.3) and torch.equal(model(ids).logits, mild)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, mild)
        set_skipping(twin, None)
        assert torch.equal(twin(ids).logits, plain)
    assert torch.equal(model(ids).logits, mild)
    set_skipping(model, None)
    assert current_rule(model) is None and torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_a_setting_is_saved_with_the_compressed_model_and_restored(tmp_path, tiny_model_dir):
    model = load(compress(tiny_model_dir("mixtral"), tmp_path / "first"), "float32")
    ids = random_ids(1, 64)
    plain = model(ids).logits
    rule = PESF(0.7, "renormalize", rescue=0.5, decode=Demand(half_life=32))
    set_skipping(model, rule)
    skipped = model(ids).logits
    model.save_pretrained(tmp_path / "second")
    for reloaded in (
        eacmoe_lightning.load(tmp_path / "second"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32),
    ):
        assert current_rule(reloaded) == rule and torch.equal(reloaded(ids).logits, skipped)
    decoded = eacmoe_lightning.load(tmp_path / "second", packed=False)
    assert current_rule(decoded) == rule and error(decoded(ids).logits, skipped) < 1e-5
    set_skipping(reloaded, None)
    reloaded.save_pretrained(tmp_path / "third")
    third = eacmoe_lightning.load(tmp_path / "third")
    assert current_rule(third) is None and torch.equal(third(ids).logits, plain)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    for wrong in ({"rule": "other"}, {"rule": "pesf", "beta": 1}, {"rule": "pesf", "alpha": 2}):
        (tmp_path / "second" / "config.json").write_text(json.dumps(config | {"expert_skipping": wrong}))
        with pytest.raises(ValueError, match="expert_skipping in config.json|alpha=2"):
            eacmoe_lightning.load(tmp_path / "second")


@torch.no_grad()
def test_a_restored_setting_is_what_an_evaluation_sees(tmp_path, tiny_model_dir):
    """Evaluating block by block in batches of any size gives the loss of the model itself on single windows."""
    path = tiny_model_dir("mixtral")
    model, windows = load(compress(path, tmp_path / "plain")), random_ids(3, 64)
    loss = [float(model(ids[None], labels=ids[None]).loss) for ids in windows]
    set_skipping(model, PESF(0.7))
    skipped = [float(model(ids[None], labels=ids[None]).loss) for ids in windows]
    assert abs(sum(skipped) - sum(loss)) > 1e-3
    model.save_pretrained(tmp_path / "skipping")
    original = MoEModel(load_original(str(path)))
    for batch_size in (1, 2, 3):
        subject = StreamedModel(CompressedWeights(tmp_path / "skipping"))
        perplexity = evaluate(original, subject, {"a": windows}, batch_size)["perplexity"]["a"]["compressed"]
        assert math.log(perplexity) == pytest.approx(sum(skipped) / 3, abs=1e-5)


@pytest.mark.parametrize("alpha", [0, -0.3, 1.01, float("nan"), float("inf"), True, "0.3", None])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* is not in \(0, 1\]"), eacmoe_lightning.pesf(None, alpha=alpha):
        pass


def test_other_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="survivors='drop' is not one of keep, renormalize, reroute"):
        PESF(0.3, "drop")
    with pytest.raises(ValueError, match=r"rescue=2 is not in \[0, 1\]"):
        PESF(0.3, rescue=2)
    with pytest.raises(ValueError, match=r"rescue='1' is not in \[0, 1\]"):
        PESF(0.3, rescue="1")
    with pytest.raises(ValueError, match="decode='yes' is neither None nor a Demand"):
        PESF(0.3, decode="yes")
    dense = tiny_models.build("llama")
    with pytest.raises(ValueError, match="no routed experts"), eacmoe_lightning.pesf(dense):
        pass
    model = tiny_models.build("mixtral")
    with pytest.raises(ValueError, match="'pesf' is not a rule: pass one such as PESF"):
        set_skipping(model, "pesf")
    with pytest.raises(ValueError, match="does not distinguish padding from tokens"), skipping(model, PESF()):
        model(random_ids(2, 8), attention_mask=torch.ones(2, 1, 8))
