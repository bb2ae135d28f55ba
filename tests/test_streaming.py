"""With one block in memory at a time, the model stays the same to the last bit, for every family and file layout."""

import gc
from pathlib import Path

import jobs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JambaConfig,
    OlmoeConfig,
    PreTrainedConfig,
)

from eacmoe_lightning import load
from eacmoe_lightning.cli import main
from eacmoe_lightning.compressed.directory import CompressedWeights, save_compressed
from eacmoe_lightning.compressed.finished import FinishedBlocks
from eacmoe_lightning.evaluation.evaluate import evaluate
from eacmoe_lightning.evaluation.streams import run_batches
from eacmoe_lightning.exports.export import export
from eacmoe_lightning.job.trained import TrainedParts
from eacmoe_lightning.models.checkpoint import Checkpoint
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.models.streamed import StreamedModel
from eacmoe_lightning.run import memory
from eacmoe_lightning.run.block_file import BlockStats, write_block
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import StoreError

families = pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
OTHERS: dict[str, PreTrainedConfig] = {  # with conversions of other kinds: buffers, biases, splits, stacked on disk
    "deepseek_v3": DeepseekV3Config(
        **SMALL, moe_intermediate_size=16, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(**SMALL, moe_intermediate_size=16, moe_num_experts=8, moe_k=2),
    "glm4_moe": Glm4MoeConfig(
        **SMALL, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1,
        head_dim=8,
    ),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granitemoe": GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "jamba": JambaConfig(**SMALL, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
                         attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    "olmoe": OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sharded(tiny_model_dir, tmp_path):
    """The directory of a tiny model in many files, like those of large models."""

    def save(family: str) -> Path:
        AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        return tmp_path

    return save


@families
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@torch.no_grad()
def test_blocks_are_those_of_from_pretrained(family, dtype, sharded, ids):
    folder = sharded(family)
    whole = load_original(str(folder), dtype)
    state = whole.state_dict()
    streamed = StreamedModel(Checkpoint(str(folder), dtype))
    assert streamed.model.state_dict().keys() == state.keys()
    for block in streamed.blocks:
        assert all(tensor.is_meta for tensor in block.layer.parameters())
        with streamed.loaded(block.index):
            for name, tensor in block.layer.state_dict().items():
                expected = state[f"{block.name}.{name}"]
                assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
        assert all(tensor.is_meta for tensor in block.layer.parameters())
    assert torch.equal(streamed.logits(ids), whole(ids, use_cache=False).logits)
    assert streamed.model.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_read_parameter_by_parameter(kind, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[kind], dtype=torch.float32)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    state, checkpoint = whole.state_dict(), Checkpoint(str(tmp_path))
    tied = set(whole.all_tied_weights_keys) if whole.config.tie_word_embeddings else set()
    for name, tensor in state.items():
        if name not in tied:
            assert torch.equal(checkpoint.read([name])[name], tensor), name
    buffers = dict(checkpoint.skeleton().named_buffers())
    for name, buffer in whole.named_buffers():
        if name not in state:
            assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [("glm4_moe", "bfloat16"), ("ernie4_5_moe", "bfloat16"), ("gpt_oss", "float16")]
)
def test_what_a_model_keeps_in_float32_stays_float32(kind, dtype, tmp_path):
    """A correction bias; routers; norms. Nothing is rounded from the original to the compressed and exported model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[kind], dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        tensor.normal_(std=0.1)
        tensor.add_(6.95 if "correction" in name else 1 if "norm" in name else 0)
    folder, compressed, dense = (tmp_path / name for name in ("original", "compressed", "dense"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tied = whole.all_tied_weights_keys if whole.config.tie_word_embeddings else ()
    expected = {name: tensor for name, tensor in whole.state_dict().items() if name not in tied}
    in_float32 = [name for name, tensor in expected.items() if tensor.dtype == torch.float32]
    assert in_float32 and len(in_float32) < len(expected)

    moe = StreamedModel(Checkpoint(str(folder), dtype))
    save_compressed(compressed, moe, str(folder), [{} for _ in moe.blocks], {"quantizer": "none"})
    assert export(str(compressed), str(dense), "dense").weights == 0
    run = RunDirectory(tmp_path / "run")
    for block in moe.blocks:
        write_block(run, BlockStats(block.index, block.name), {}, {})
    trained = TrainedParts(moe, run, trains_norms=True).routers_and_norms()
    read = {
        "original": moe.read(expected),
        "trained": expected | trained,
        "finished": FinishedBlocks(moe.weights, run, trained).read(expected),
        "compressed": CompressedWeights(compressed).read(expected),
        "loaded": load(compressed, packed=False).state_dict(),
        "packed": load(compressed).state_dict(),
        "dense": AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).state_dict(),
    }
    for reader, weights in read.items():
        for name, tensor in expected.items():
            assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), (reader, name)


def test_a_pytorch_checkpoint_is_streamed_too(tiny_model_dir, tmp_path, ids):
    folder = tiny_model_dir("mixtral")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = StreamedModel(Checkpoint(str(folder))).logits(ids)
    assert torch.equal(StreamedModel(Checkpoint(str(tmp_path))).logits(ids), expected)


def test_only_one_block_has_memory(tiny_model_dir, ids):
    """During a pass, at the input of every block, only that block's parameters are in memory."""
    streamed = StreamedModel(Checkpoint(str(tiny_model_dir("qwen2_moe"))))
    alive: list[int] = []

    def count(module, args):
        alive.append(sum(not next(block.layer.parameters()).is_meta for block in streamed.blocks))

    for block in streamed.blocks:
        block.layer.register_forward_pre_hook(count)
    streamed.logits(ids)
    assert max(alive) == 1


def test_the_next_block_is_prefetched(tiny_model_dir, monkeypatch):
    """Exactly the bytes of the next block are read ahead."""
    checkpoint = Checkpoint(str(tiny_model_dir("deepseek")))
    touched: list[list[str]] = []
    monkeypatch.setattr(checkpoint, "_touch", touched.append)
    streamed = StreamedModel(checkpoint)
    streamed.load(1)
    checkpoint._prefetching.join()
    assert touched[0] and all(key.startswith("model.layers.2.") for key in touched[0])
    keys = [key for key in checkpoint.files.keys if key.startswith("model.layers.2.")]
    assert sorted(touched[0]) == sorted(keys)
    Checkpoint._touch(checkpoint, keys)  # reads without an error
    streamed.load(2)
    assert len(touched) == 1  # nothing comes after the last block


def test_a_missing_tensor_is_named(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("mixtral")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1." in name and "q_proj" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    streamed = StreamedModel(Checkpoint(str(tmp_path)))
    streamed.load(0)
    with pytest.raises(StoreError, match=name):
        streamed.load(1)


# --- evaluation


@pytest.mark.parametrize("split", [False, True])
def test_evaluation_block_by_block_is_that_of_the_models(split, tiny_model_dir, ids):
    """Batches that go through the blocks together give what whole models give one batch at a time."""
    folders = [str(tiny_model_dir(family)) for family in ("mixtral", "mixtral")]
    original, subject = (
        StreamedModel(Checkpoint(folder, dtype)) for folder, dtype in zip(folders, ("float32", "bfloat16"), strict=True)
    )
    whole = MoEModel(load_original(folders[0])), MoEModel(load_original(folders[1], "bfloat16"))
    batches = [ids, ids.flip(0)[:1], ids[:, :9]]
    selections = []
    together = run_batches(original, subject, batches, split, lambda *args: selections.append(args))
    for j, batch in enumerate(batches):
        alone = run_batches(*whole, [batch], split)[0]
        assert alone.keys() == together[j].keys()
        for name in alone:
            assert torch.equal(alone[name], together[j][name])
    assert [(after.moe_block, batch) for batch, after in selections] == [(b, j) for b in range(3) for j in range(3)]
    logits = whole[0].model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(together[0]["original"], expected, rtol=1e-5, atol=1e-5)
    result = evaluate(original, subject, {"text": ids}, 1, split)
    assert result["tokens"] == {"text": 46} and len(result["expert_shift"]["blocks"]) == 3


# --- fit


def test_a_joint_stage_that_does_not_fit_is_refused_before_the_run(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eacmoe_lightning.job.start.available_memory", lambda device: 10**5)
    with pytest.raises(SystemExit):
        main(["fit", *jobs.options(tiny_model_dir("mixtral"), tmp_path / "run")])
    error = capsys.readouterr().err
    assert "only one block at a time is in memory, but 0.0 GB are available" in error
    assert "--model.joint_epochs 0 leaves it out" in error
    assert not (tmp_path / "run" / "run.json").exists()


def test_available_memory_is_no_more_than_the_machine_has():
    gc.collect()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < memory.available_memory(torch.device("cpu")) <= int(total.split()[1]) * 1024
