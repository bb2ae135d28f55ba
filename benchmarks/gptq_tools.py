"""One tool quantizes one model, in a process that `gptq_quality.py` starts in the tool's environment.

    python gptq_tools.py TOOL JOB

with JOB = {"model": .., "windows": .., "self_windows": .., "seed": .., "bits": .., "options": {..}, "out": ..}; the
windows were drawn with `seed`, and the last `self_windows` of them the model has written. `bits` are the experts', a
list of them for equal shares of the blocks, from the first on.

The result has the same form for every tool: a Hugging Face directory `out` of dense float32 weights, with a
`result.json` (version, seconds of quantizing, peak bytes) in it. Only the chosen tool is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ATTENTION_BITS, GROUP_SIZE, BATCH_SIZE = 4, 128, 4
Result = tuple[float, int, dict[str, Tensor], str]  # seconds, peak bytes, weights, version


def work(tool: str, job: dict) -> None:
    """Quantizes in this process and writes the directory `job["out"]`."""
    model, out = Path(job["model"]), Path(job["out"])
    input_ids = load_file(job["windows"])["input_ids"]  # [S, T]
    seconds, peak, weights, tool_version = TOOLS[tool](model, input_ids, job)
    out.mkdir(parents=True)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (out / "result.json").write_text(json.dumps({"version": tool_version, "seconds": seconds, "peak_bytes": peak}))


def ours(model: Path, input_ids: Tensor, job: dict) -> Result:
    from eacmoe_lightning import __version__
    from eacmoe_lightning.cli import main as command_line
    from eacmoe_lightning.commands.rows import words_of
    from eacmoe_lightning.compressed.loading import load
    from eacmoe_lightning.run.directory import RunDirectory
    from eacmoe_lightning.run.files import read_json
    from eacmoe_lightning.text.windows import digest

    settings = {"name_or_path": str(model), "dtype": "float32", "bits": job["bits"], "attention_bits": ATTENTION_BITS}
    settings |= {"group_size": GROUP_SIZE, "router_method": "none"} | job["options"]
    text = calibration_options(job["seed"], *input_ids.shape, job["self_windows"]) | {"batch_size": BATCH_SIZE}
    trainer = {"default_root_dir": "run", "accelerator": "cpu", "enable_progress_bar": "false", "logger": "false"}
    groups = {"model": settings, "data": text | {"num_heldout_windows": 1}, "trainer": trainer}
    options = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    command_line(["fit", *words_of(options)])
    run = RunDirectory("run")
    if read_json(run.manifest)["data.calibration_digest"] != digest(input_ids):
        raise ValueError(f"the run drew other windows than those in {job['windows']}")
    cost = read_json(run.path / "report.json")["cost"]
    others = ("read", "check", "evaluate", "write", "total_seconds")
    phases = [phase for name, phase in cost.items() if name not in others]
    seconds, peak = sum(phase["seconds"] for phase in phases), max(phase["peak_bytes"] for phase in phases)
    return seconds, peak, dense(load("run", packed=False).state_dict()), __version__


def llm_compressor(model: Path, input_ids: Tensor, job: dict) -> Result:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # oneshot splits the fused experts
    options = dict(job["options"])
    all_experts, observer = options.pop("all_experts"), options.pop("observer")
    grid = {"type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP_SIZE, "observer": observer}
    targets = {"attention": (r"re:.*self_attn\.[qkvo]_proj$", ATTENTION_BITS)}
    for block, bits in enumerate(block_bits(model, job["bits"])):
        linears = rf"re:.*layers\.{block}\.mlp\.(experts\.\d+|shared_expert)\.(gate|up|down)_proj$"
        targets[f"block_{block}"] = (linears, bits)
    groups = {
        part: QuantizationScheme(targets=[pattern], weights=QuantizationArgs(num_bits=part_bits, **grid))
        for part, (pattern, part_bits) in targets.items()
    }
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in input_ids.split(BATCH_SIZE)]
    start = time.perf_counter()
    oneshot(
        model=network,
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], **options),
        moe_calibrate_all_experts=all_experts,
        num_calibration_samples=len(batches),
    )
    return time.perf_counter() - start, peak_memory(), dense(network.state_dict()), version("llmcompressor")


def gptqmodel(model: Path, input_ids: Tensor, job: dict) -> Result:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 does not start on two cores otherwise
    from gptqmodel import GPTQModel, QuantizeConfig

    by_block = block_bits(model, job["bits"])
    linears = {rf".*layers\.{block}\.mlp\..*": {"bits": bits} for block, bits in enumerate(by_block)}
    config = QuantizeConfig(
        bits=by_block[0],
        group_size=GROUP_SIZE,
        sym=False,
        format="gptq_v2",  # has true zero points
        dynamic=linears | {r".*self_attn.*": {"bits": ATTENTION_BITS}},
        device="cpu",
        offload_to_disk=False,
        **job["options"],
    )
    network = GPTQModel.load(str(model), config, dtype=torch.float32)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in input_ids]
    start = time.perf_counter()
    network.quantize(samples, batch_size=BATCH_SIZE)
    seconds, peak = time.perf_counter() - start, peak_memory()
    network.save("quantized")
    return seconds, peak, decode_gptq(Path("quantized"), by_block), version("gptqmodel")


def autoround(model: Path, input_ids: Tensor, job: dict) -> Result:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"sym": False, "iters": 200} | job["options"]
    grid = {"group_size": GROUP_SIZE, "sym": options["sym"]}
    linears = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    by_block = block_bits(model, job["bits"])
    layers = {name: ATTENTION_BITS for name in linears if ".self_attn." in name}
    layers |= {f"layers.{block}.mlp.experts": bits for block, bits in enumerate(by_block)}
    tuning = AutoRound(
        network,
        AutoTokenizer.from_pretrained(model),
        bits=by_block[0],
        group_size=GROUP_SIZE,
        layer_config={name: {"bits": bits, **grid} for name, bits in layers.items()},
        dataset=torch.utils.data.DataLoader(input_ids, batch_size=BATCH_SIZE),
        nsamples=len(input_ids),
        seqlen=input_ids.shape[1],
        batch_size=BATCH_SIZE,
        seed=job["seed"],
        device_map="cpu",
        amp=False,  # float32, as the other tools
        **options,
    )
    start = time.perf_counter()
    network, _ = tuning.quantize()
    return time.perf_counter() - start, peak_memory(), dense(network.state_dict()), version("auto-round")


def calibration_options(seed: int, number: int, length: int, num_self: int = 0) -> dict:
    """Options of our data module for `number` windows, of which the original writes the last `num_self`."""
    options = {"num_windows": number - num_self, "window_length": length, "seed": seed}
    return options | ({"calibration": ["bundled:calibration", f"self:{num_self}"]} if num_self else {})


def block_bits(model: Path, bits: int | list[int]) -> list[int]:
    """The bits of each block's experts; a list is of equal shares of the blocks, from the first on."""
    number = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return [bits[block * len(bits) // number] for block in range(number)] if isinstance(bits, list) else [bits] * number


def decode_gptq(path: Path, by_block: list[int]) -> dict[str, Tensor]:
    """Dense weights [O, I] of a directory in the `gptq_v2` format, with the bits of each block's experts."""
    packed = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = dense(packed)
    for layer in [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]:
        layer_bits = ATTENTION_BITS if "self_attn" in layer else by_block[int(layer.split("layers.")[1].split(".")[0])]
        codes = unpack_words(packed[f"{layer}.qweight"].T, layer_bits)  # [O, I]
        zero_point = unpack_words(packed[f"{layer}.qzeros"], layer_bits).T  # [O, G]
        scale, group = packed[f"{layer}.scales"].float().T, packed[f"{layer}.g_idx"].long()  # [O, G], [I]
        weights[f"{layer}.weight"] = (codes - zero_point[:, group]) * scale[:, group]
    return weights


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n * bits / 32] -> float32 codes [..., n], from a little-endian stream of bits."""
    stream = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    codes = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits, dtype=torch.int32)).sum(-1).float()


def dense(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict, without scales and the like, and without the tied output embedding."""
    return {name: tensor for name, tensor in state.items() if name.endswith((".weight", "gate_up_proj", "down_proj"))
            and name != "lm_head.weight"}  # fmt: skip


def peak_memory() -> int:
    """Peak memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


TOOLS = {"ours": ours, "llm-compressor": llm_compressor, "gptqmodel": gptqmodel, "autoround": autoround}

if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]))
