"""One engine loads one export, in a process that `export_check.py` starts in the engine's environment.

    python export_engines.py ENGINE JOB

with JOB = {"export": directory, "tokens": ids [B, T] as .npy, "texts": list of strings as .json, "out": .npz, "dtype":
vLLM's}. Writes `logits` [B, T, V] in float32 (vLLM's log-probabilities), `control` (GPTQModel's logits with weights
decoded to float32) and, if the engine has a tokenizer, the token ids of each text. Prints one line of JSON about the
engine.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

Seen = tuple[dict[str, np.ndarray], list[list[int]], dict]  # logits, token ids of the texts, about the engine


def gptqmodel(export: Path, tokens: np.ndarray, texts: list[str]) -> Seen:
    """Runs GPTQModel's portable kernel, which computes in bfloat16."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 does not start on two cores otherwise
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file

    model = GPTQModel.load(str(export), device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    stored = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    about = {
        "version": f"GPTQModel {version('gptqmodel')}",
        "transformers": version("transformers"),
        "num_packed": len(packed),
        "kernel": sorted({type(module).__name__ for module in packed.values()}),
        "unread": sorted((model.state_dict().keys() ^ stored.keys()) - {*tied}),
    }

    def run() -> np.ndarray:
        return np.concatenate([model(row[None]).logits.float().numpy() for row in torch.from_numpy(tokens)])

    with torch.no_grad():
        seen = {"logits": run()}
        for name, module in packed.items():  # the engine's own decoding, with the scales as they are stored
            module.scales = stored[f"{name}.scales"].float()
            weight = module.dequantize_weight().T.float().contiguous()
            linear = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(weight)
            model.set_submodule(name, linear)
        model.float().load_state_dict(stored, strict=False)
        seen["control"] = run()
    return seen, [], about


def llama_cpp(export: Path, tokens: np.ndarray, texts: list[str]) -> Seen:
    """Runs llama.cpp in float32, but products with quantized weights round activations to 8 bit in blocks of 32."""
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda *_: None)  # must stay alive: llama.cpp keeps calling it
    if os.environ.get("LLAMA_LOG") != "1":
        llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.use_extra_bufts = False  # no repacking for this machine
    model = llama.llama_model_load_from_file(str(export / "model.gguf").encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp does not load {export}: LLAMA_LOG=1 shows why")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = tokens.shape[1]
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = llama.GGML_TYPE_F32
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocabulary)
    logits = np.empty((*tokens.shape, size), dtype=np.float32)
    batch = llama.llama_batch_init(tokens.shape[1], 0, 1)
    for row, window in enumerate(tokens):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), i, 1, 0
            batch.logits[i] = True
        if status := llama.llama_decode(context, batch):
            raise SystemExit(f"llama_decode failed with {status}")
        logits[row] = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(len(window), size))
    ids = [_tokenize(llama, vocabulary, text.encode()) for text in texts]
    return {"logits": logits}, ids, {"version": f"llama-cpp-python {llama.__version__}"}


def _tokenize(llama, vocabulary, text: bytes) -> list[int]:
    room = (llama.llama_token * (len(text) + 8))()
    number = llama.llama_tokenize(vocabulary, text, len(text), room, len(room), False, False)
    return list(room[:number])


def decode_gguf(export: Path, out: Path) -> None:
    """Writes the same file with every tensor decoded to float32, to separate the effects of weights and activations."""
    import gguf

    reader = gguf.GGUFReader(export / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out / "model.gguf", architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            element_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, element_kind)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in tensor.shape[::-1])
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vllm(export: Path, tokens: np.ndarray, texts: list[str], dtype: str) -> Seen:
    """Runs vLLM in its own kernels, without this package's plugin."""
    os.environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    # In eager mode its operator rotates latent attention's queries wrongly on CPUs; torch does it right.
    options = {"enforce_eager": True, "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    options |= {"max_model_len": 512, "max_logprobs": -1, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    try:
        model = LLM(str(export), dtype=dtype, **options)
    except Exception as error:  # a refusal is a result
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    all_of_them = {"prompt_logprobs": -1, "logprobs": -1, "flat_logprobs": True, "detokenize": False}
    settings, logprobs = SamplingParams(temperature=0, max_tokens=1, **all_of_them), []
    for window in tokens:
        seen = model.generate({"prompt_token_ids": window.tolist()}, settings, use_tqdm=False)[0]
        places = [(seen.prompt_logprobs, i) for i in range(1, len(window))] + [(seen.outputs[0].logprobs, 0)]
        for found, position in places:
            which = slice(found.start_indices[position], found.end_indices[position])
            row = np.empty(model.llm_engine.model_config.get_vocab_size(), dtype=np.float32)
            row[found.token_ids[which]] = found.logprobs[which]
            logprobs.append(row)
    (kernels,) = model.apply_model(
        lambda module: {
            type(experts.quant_method.moe_kernel.fused_experts).__name__
            for experts in module.modules()
            if isinstance(experts, RoutedExperts)
        }
    )
    about = {"version": f"vLLM {version('vllm-cpu')}", "kernel": sorted(kernels)}
    return {"logits": np.stack(logprobs).reshape(*tokens.shape, -1)}, [], about


ENGINES = {"gptqmodel": gptqmodel, "llama.cpp": llama_cpp, "vllm": vllm}

if __name__ == "__main__":
    engine, job = sys.argv[1], json.loads(sys.argv[2])
    export = Path(job["export"])
    if job.get("decoded"):
        decoded = Path(job["decoded"])
        decoded.mkdir(parents=True, exist_ok=True)
        decode_gguf(export, decoded)
        export = decoded
    options = {"dtype": job["dtype"]} if engine == "vllm" else {}
    tokens, texts = np.load(job["tokens"]), json.loads(Path(job["texts"]).read_text())
    arrays, ids, about = ENGINES[engine](export, tokens, texts, **options)
    np.savez(job["out"], **arrays, **{f"ids_{i}": np.array(text_ids) for i, text_ids in enumerate(ids)})
    print(json.dumps(about))
