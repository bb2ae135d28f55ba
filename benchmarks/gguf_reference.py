"""Writes tests/gguf_reference.json: what llama.cpp's own converter makes of the tests' tiny models.

    python benchmarks/gguf_reference.py --llama_cpp DIR

DIR is a source tree of llama.cpp; the source distribution of llama-cpp-python has one in `vendor/llama.cpp`. For each
model of tests/gguf_models.py the file has the tensors with their shapes and the architecture's keys. Tokenizers are
left out: the converter knows none of the bundled one's kind.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

HUNYUAN = {"moe_intermediate_size": [64] * 3, "moe_topk": [2] * 3, "num_shared_expert": [1] * 3}
ADDED = {  # options on the hub that transformers does not write, or writes with other words
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_moe": HUNYUAN,
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "minimax_m2": {"rotary_dim": 8},
}
SKIPPED = (
    "gpt_oss-plain",  # which it writes without biases
    "granitemoehybrid-rope",  # the converter never has hybrid models rotate
    "hunyuan_v1_moe-alpha",  # which must have the real model's sizes
    "olmoe-tied",  # which it writes without a head
    "qwen2_moe-tied",  # the same
)
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_cpp", type=Path, required=True)
    parser.add_argument("--names", nargs="*")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp / "gguf-py"), str(args.llama_cpp), str(ROOT), str(ROOT / "tests")]
    import gguf_models

    path = ROOT / "tests" / "gguf_reference.json"
    reference = json.loads(path.read_text()) if path.exists() and args.names else {}
    for name in args.names or [name for name in gguf_models.NAMES if name not in SKIPPED]:
        with tempfile.TemporaryDirectory() as folder:
            gguf_models.build(name).save_pretrained(folder)
            reference[name] = converted(Path(folder), ADDED.get(name, {}))
        lines = [f"{json.dumps(name)}: {json.dumps(reference[name])}" for name in sorted(reference)]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def converted(folder: Path, added: dict) -> dict:
    """Tensors and keys of the file that the converter writes for an original with further options."""
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(folder, False) | added
    base = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    options = {"set_vocab": lambda self: None, "model_arch": base.model_arch, "no_mtp": True}
    without_tokenizer = type(base.__name__, (base,), options)
    out = folder / "model.gguf"
    without_tokenizer(folder, gguf.LlamaFileType.ALL_F32, out, hparams=hparams).write()
    reader = gguf.GGUFReader(out)
    architecture = reader.fields["general.architecture"].contents()
    keys = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()
            if name.startswith(f"{architecture}.")}  # fmt: skip
    tensors = {tensor.name: [int(n) for n in tensor.shape[::-1] if n > 1] for tensor in reader.tensors}
    return {"architecture": architecture, "keys": keys, "tensors": by_pattern(tensors)}


def by_pattern(tensors: dict[str, list[int]]) -> dict[str, list]:
    """Tensors with the blocks that have them: `blk.N.attn_q.weight` -> [shape, [0, 1, 2]]."""
    found: dict[str, list] = {}
    for name, shape in sorted(tensors.items()):
        block = re.match(r"blk\.(\d+)\.", name)
        pattern = re.sub(r"^blk\.\d+\.", "blk.N.", name)
        found.setdefault(pattern, [shape, []])[1].extend([int(block[1])] if block else [])
    return found


if __name__ == "__main__":
    main()
