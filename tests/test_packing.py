"""Several documents in one window: how they are packed, that no token sees another document, and who cannot."""

import copy
import json

import architectures
import jobs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eacmoe_lightning.calibration.streams import Streams
from eacmoe_lightning.evaluation.coverage import coverage, coverage_lines
from eacmoe_lightning.job.data import TextWindows
from eacmoe_lightning.models.documents import DocumentsAlone, most_telling, spans
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.self_check import check_parts
from eacmoe_lightning.run.block_file import BlockStats, read_stats
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.ranks import Ranks
from eacmoe_lightning.text.documents import read_documents
from eacmoe_lightning.text.packing import pack
from eacmoe_lightning.text.rows import Conversation
from eacmoe_lightning.text.windows import Windows, cut_windows

BUILDS = {"mixtral": tiny_models.build, "qwen3_moe": tiny_models.build, "deepseek_v3": architectures.build}
models = pytest.mark.parametrize("name", BUILDS)


# --- which documents share a window


def test_each_document_joins_the_fullest_window_with_room():
    assert pack([5, 3, 3, 2, 1], 6) == [[0, 4], [1, 2], [3]]
    assert pack([6, 6, 1], 6) == [[0], [1], [2]]
    assert pack([2, 4, 3, 3], 6) == [[1, 0], [2, 3]]  # 4 + 2 and 3 + 3 leave nothing


def test_as_many_of_the_first_documents_as_fit():
    assert pack([4, 4, 4, 1], 6, 2) == [[0], [1]]  # 12 tokens, but no two of 4 share a window of 6
    assert pack([4, 2, 3, 3, 1], 6, 2) == [[0, 1], [2, 3]]
    assert pack([2, 2], 6, 5) == [[0, 1]]
    assert pack([], 6, 5) == []


def texts_of(windows: Windows) -> list[list[int]]:
    """The documents in windows, sorted, without what fills them up."""
    found = []
    for row, fill in enumerate(windows.num_filling.tolist()):
        end = windows.input_ids.shape[1] - fill
        is_packed = windows.position_ids is not None
        parts = spans(windows.position_ids[row, :end]) if is_packed else [slice(0, end)]
        found += [windows.input_ids[row, part].tolist() for part in parts]
    return sorted(found)


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory) -> list[str]:
    return list(read_documents(str(jobs.short_texts(tmp_path_factory.mktemp("short")))))


def test_packed_windows_hold_each_document_once(short_texts, tokenizer):
    separate = cut_windows(short_texts, tokenizer, None, 32, layout="separate")
    packed = cut_windows(short_texts, tokenizer, None, 32, layout="packed")
    assert texts_of(packed) == texts_of(separate)
    assert len(separate.input_ids) > 1.5 * len(packed.input_ids)
    assert torch.equal(packed.counts.sum(1), 32 - packed.num_filling)  # what fills up does not count
    assert not packed.counts[packed.num_filling > 0, -1].any()
    assert (packed.position_ids[:, 0] == 0).all() and (packed.position_ids.diff() != 1).sum() == (
        len(separate.input_ids) - len(packed.input_ids)
    )
    assert any(len(tokenizer(text)["input_ids"]) > 32 for text in short_texts)  # cut, as `separate` cuts them


def test_a_seed_draws_the_documents(short_texts, tokenizer):
    one, again, other = (cut_windows(short_texts, tokenizer, 12, 48, seed, layout="packed") for seed in (0, 0, 1))
    assert one.input_ids.shape == (12, 48) and int(one.num_filling.sum()) < 0.05 * 12 * 48
    assert all(torch.equal(getattr(one, name), getattr(again, name)) for name in vars(one))
    assert texts_of(one) != texts_of(other)
    everything = texts_of(cut_windows(short_texts, tokenizer, None, 48, layout="packed"))
    assert all(text in everything for text in texts_of(one))


def test_too_few_documents_are_counted_in_packed_windows(short_texts, tokenizer):
    available = len(cut_windows(short_texts, tokenizer, None, 32, layout="packed").input_ids)
    with pytest.raises(
        ValueError, match=f"make {available} windows of 32 .*pass a longer text, --data.num_windows={available}"
    ):
        cut_windows(short_texts, tokenizer, available + 1, 32, layout="packed")
    assert len(cut_windows(short_texts, tokenizer, available, 32, 0, layout="packed").input_ids) == available


def test_packed_conversations_without_answers_are_left_out(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    question = {"role": "user", "content": "one two three four"}
    talks = [Conversation([question]), Conversation([question, {"role": "assistant", "content": "Five."}])]
    windows = cut_windows(talks, tokenizer, None, 64, answers_only=True, layout="packed")
    assert len(texts_of(windows)) == 1 and 0 < windows.counts.sum() < 64 - windows.num_filling
    with pytest.raises(ValueError, match="holds .* tokens, but no window of 64 with a token of an answer"):
        cut_windows(talks[:1], tokenizer, None, 64, answers_only=True, layout="packed")


# --- the data module


@pytest.fixture
def data_of(tmp_path, tiny_model_dir):
    """`data_of(...)`: a data module on short texts."""

    def make(**options) -> TextWindows:
        defaults = {
            "calibration": str(jobs.short_texts(tmp_path)),
            "heldout": [],
            "num_windows": 12,
            "window_length": 48,
            "batch_size": 5,
            "tokenizer": str(tiny_model_dir("mixtral")),
            "documents": "packed",
        }
        return TextWindows(**defaults | options)

    return make


def test_positions_stand_beside_the_windows_in_the_module_and_in_its_batches(data_of):
    data = data_of()
    positions = data.calibration_positions
    assert positions.shape == data.calibration_windows.shape == (12, 48)
    for batch in data.train_dataloader():
        assert torch.equal(batch["position_ids"], positions[batch["index"]])
    assert "position_ids" not in next(iter(data_of(documents="separate").train_dataloader()))
    ids, window_positions = data.checked_window(1000)
    assert len(spans(window_positions[0])) > 1 and any(torch.equal(ids[0], row) for row in data.calibration_windows)
    joined_ids, none = data_of(documents="joined").checked_window(1000)
    assert none is None and torch.equal(joined_ids, data_of(documents="joined").calibration_windows[:1])


def test_how_full_windows_are(data_of, tmp_path):
    data = data_of(calibration=[str(jobs.short_texts(tmp_path)), "bundled:prose"], documents="separate", num_windows=8)
    full = data.fullness
    assert set(full) == {"short", "prose"} and full["prose"] == 1 > full["short"] > 0.1
    assert full["short"] == pytest.approx(float(data.calibration_weights[:4].double().mean()))
    assert data_of().fullness["short"] > 0.95
    assert data_of(documents="joined").fullness == {}


def test_the_report_says_it_where_something_fills_windows_up():
    stats = BlockStats(0, "model.layers.0", source_load=[[1, 0], [2, 3]])
    report = {"coverage": coverage([stats], {"short": 1, "sampled": 2}, {"short": 0.975})}
    assert report["coverage"]["short"]["full"] == 0.975 and "full" not in report["coverage"]["sampled"]
    short, sampled = coverage_lines(report)
    assert short.startswith("calibrated on short: 1 windows, 98% full, which reach 1 of 2 experts")
    assert sampled.startswith("calibrated on sampled: 2 windows, which reach 2 of 2 experts, 1 of them alone")


def test_where_documents_begin_is_part_of_the_digest(data_of):
    digests = {data_of(documents=how).calibration_digest for how in ("joined", "separate", "packed")}
    data, same = data_of(), data_of()
    windows = data._calibration
    moved = torch.arange(48).expand(12, -1)
    same._calibration = Windows(windows.input_ids, windows.counts, moved, windows.num_filling)
    assert len(digests | {same.calibration_digest}) == 4
    assert data_of().calibration_digest == data.calibration_digest


def test_what_was_called_separate():
    with pytest.raises(ValueError, match="--data.separate=True was replaced: pass --data.documents separate"):
        TextWindows(separate=True)
    with pytest.raises(ValueError, match="--data.documents=glued must be one of joined, separate, packed"):
        TextWindows(documents="glued")


# --- no token sees another document


def selections(moe: MoEModel, windows: Windows, folder) -> tuple[list[Tensor], Tensor]:
    """By MoE block, the router logits [N, E] of the tokens that count, and the logits [N, V] of the whole model."""
    counts, logits = windows.counts, []
    streams = Streams(
        moe, windows.input_ids, 0, 3, RunDirectory(folder), Ranks(), counts=counts, position_ids=windows.position_ids
    )
    streams.embed()
    for block in moe.blocks:
        routing = streams.advance(block, "x")
        streams.advance(block, "x_hat")
        streams.step(block.index + 1, keep=False)
        if routing is not None:
            logits.append(streams.counted(routing.logits))
    return logits, moe.head(streams.x[:], windows.input_ids)[counts]


@models
@torch.no_grad()
def test_packed_documents_give_what_separate_ones_give(name, short_texts, tokenizer, tmp_path):
    moe = MoEModel(BUILDS[name](name))
    separate = cut_windows(short_texts[:40], tokenizer, None, 48, layout="separate")
    packed = cut_windows(short_texts[:40], tokenizer, None, 48, layout="packed")
    assert len(separate.input_ids) > 1.5 * len(packed.input_ids)
    routers, logits = selections(moe, separate, tmp_path / "separate")
    packed_routers, packed_logits = selections(moe, packed, tmp_path / "packed")
    # where each token of a packed window is among those of the separate ones
    starts = {}
    for row, fill in zip(separate.input_ids.tolist(), separate.num_filling.tolist(), strict=True):
        text = tuple(row[: 48 - fill])
        starts[text] = sum(map(len, starts))
    order = []
    for ids, positions, fill in zip(packed.input_ids, packed.position_ids, packed.num_filling, strict=True):
        for span in spans(positions[: 48 - int(fill)]):
            start = starts[tuple(ids[span].tolist())]
            order += range(start, start + span.stop - span.start)
    assert sorted(order) == list(range(len(logits)))
    for router, packed_router in zip(routers, packed_routers, strict=True):
        torch.testing.assert_close(packed_router, router[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed_logits, logits[order], rtol=1e-4, atol=1e-4)
    joined = Windows(packed.input_ids, packed.counts, None, packed.num_filling)
    assert not torch.allclose(selections(moe, joined, tmp_path / "joined")[1], logits[order], rtol=1e-2, atol=1e-2)


# --- the check at the start


IDS = torch.randint(5, 4000, (1, 60), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(n) for n in (10, 20, 30)]).unsqueeze(0)


def check(moe: MoEModel) -> DocumentsAlone:
    alone = DocumentsAlone(moe, IDS, POSITIONS)
    check_parts(moe, IDS, after=alone.check, position_ids=POSITIONS)
    return alone


def test_the_window_to_check():
    windows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((8,), (6, 2), (2, 2, 4), (5, 1, 2))]
    assert [(span.start, span.stop) for span in spans(windows[2])] == [(0, 2), (2, 4), (4, 8)]
    assert most_telling(torch.stack(windows)) == 2
    assert most_telling(windows[0].unsqueeze(0)) == 0


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_attention_pass(name, dtype):
    moe = MoEModel(BUILDS[name](name).to(dtype))
    alone = check(moe)
    assert list(alone.states) == [(30, 60), (10, 30)]


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "lfm2_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_other_documents_are_refused(name, dtype):
    with pytest.raises(ValueError) as error:
        check(MoEModel(architectures.build(name).to(dtype)))
    message = str(error.value)
    assert message.startswith(f"{name} does not keep documents of one window apart") and "layers.0: a token" in message
    assert "--data.documents packed" in message and "pass --data.documents separate" in message


def test_a_model_without_position_ids_is_refused():
    model = tiny_models.build("mixtral")
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(ValueError, match="its forward pass takes no position ids.*--data.documents separate"):
        check(MoEModel(model))


def test_what_is_only_finite_alone_is_refused():
    def overflow(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * float("nan") if args[0].shape[1] == IDS.shape[1] else output

    model = tiny_models.build("mixtral")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"mixtral does not keep documents .*model\.layers\.1: a token differs by nan"):
        check(MoEModel(model))
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, output: output * float("inf"))
    check(MoEModel(model))  # an overflow of the model itself is reported elsewhere


def test_an_embedding_that_reads_the_token_before_is_refused():
    """As an embedding of n-grams does."""
    model = tiny_models.build("mixtral")
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1) / 2)
    with pytest.raises(ValueError, match=r"mixtral does not keep documents .*model\.layers\.0"):
        check(MoEModel(model))


# --- runs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ridge", "sgd"])
def test_a_run_on_packed_documents_is_one_on_separate_documents(method, tmp_path, tiny_model_dir, tokenizer, capsys):
    """All documents are taken, so both runs see the same tokens; ridge, sgd and the joint stage count them alike."""
    text = jobs.short_texts(tmp_path)
    texts = list(read_documents(str(text)))
    runs = {}
    for how in ("separate", "packed"):
        number = len(cut_windows(texts, tokenizer, None, 64, layout=how).input_ids)
        options = {
            "data__calibration": text,
            "data__documents": how,
            "data__num_windows": number,
            "data__batch_size": number,  # one batch of all tokens, in whichever order
            "data__held_back": 0,
            "data__heldout": "[]",
            "model__router_method": method,
            "model__joint_epochs": 1,
            "model__quantizer": "rtn",
        }
        runs[how] = RunDirectory(jobs.fit(tiny_model_dir("mixtral"), tmp_path / how, **options))
    assert "the windows of short are" in capsys.readouterr().out
    reports = {how: json.loads((run.path / "report.json").read_text()) for how, run in runs.items()}
    assert reports["packed"]["coverage"]["short"]["full"] > 0.95 > reports["separate"]["coverage"]["short"]["full"]
    assert reports["packed"]["coverage"]["short"]["windows"] < reports["separate"]["coverage"]["short"]["windows"] / 1.5
    assert reports["packed"]["coverage"]["short"]["blocks"] == reports["separate"]["coverage"]["short"]["blocks"]
    for index in range(3):
        one, other = (read_stats(runs[how], index) for how in ("separate", "packed"))
        assert one.expert_load["original"] == other.expert_load["original"]
        routers = [load_file(run.block(index))[f"model.layers.{index}.mlp.gate.weight"] for run in runs.values()]
        apart = (routers[0] - routers[1]).abs() > 1e-3 * routers[0].abs() + 1e-4
        assert apart.float().mean() < 0.01  # AdamW's first steps follow the sign of gradients that are nearly 0


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_cannot_pack_does_not_begin(tmp_path, tokenizer, capsys):
    model = tmp_path / "jamba"
    architectures.build("jamba").save_pretrained(model)
    tokenizer.save_pretrained(model)
    options = {"data__calibration": jobs.short_texts(tmp_path), "data__heldout": "[]"}
    with pytest.raises(SystemExit):
        jobs.fit(model, tmp_path / "run", data__documents="packed", **options)
    assert "error: jamba does not keep documents of one window apart" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    jobs.fit(model, tmp_path / "run", data__documents="separate", model__joint_epochs=0, **options)
    assert (tmp_path / "run" / "report.json").exists()
