"""llama.cpp's part of inference.py, in an environment with llama-cpp-python and gguf, without torch.

Writes a GGUF model in the requested shape and format, with fixed scales and random codes, so that tokens differ and
select different experts. Loads it, prints the bytes of its layers' weights and of its output head, and answers lines on
standard input:

    pass BATCH TOKENS THREADS        seconds of one llama_decode. It requests the logits of every token, because in the
                                     last layer, the only one there, llama.cpp runs experts only for tokens with logits
    generate PROMPT TOKENS THREADS   seconds a token of greedy generation after the prompt
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np

BATCH = 2048  # tokens that one llama_decode takes
# by format: values of a block's float16 fields by byte offset, for weights with a mean near 0 and a deviation of 0.02
SCALES = {
    **{"Q4_0": {0: 0.004}, "Q3_K": {108: 0.0005}, "Q2_K": {80: 0.0017, 82: 0.0026}},
    **{"Q5_0": {0: 0.0022}, "Q6_K": {208: 1.5e-5}, "Q8_0": {0: 0.00027}},
}


def write_model(path: Path, config: dict, name: str, head: str) -> tuple[int, int]:
    """Writes the GGUF file, and returns the bytes of the layers' weights and of the output head."""
    is_qwen = config["model_type"] == "qwen2_moe"
    writer = gguf.GGUFWriter(path, "qwen2moe" if is_qwen else "llama")
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    experts = config["num_experts"] if is_qwen else config["num_local_experts"]
    width = config["moe_intermediate_size"] if is_qwen else config["intermediate_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if is_qwen:
        writer.add_expert_feed_forward_length(width)
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    size = 0

    def add(tensor: str, *shape: int, kind: gguf.GGMLQuantizationType | None = None) -> None:
        nonlocal size
        if kind is None:
            generator = np.random.default_rng(0)
            data = np.ones(shape) if len(shape) == 1 else generator.normal(0, 0.02, shape)
            writer.add_tensor(tensor, data.astype(np.float32))
            return
        if kind == gguf.GGMLQuantizationType.F16:
            data = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
            writer.add_tensor(tensor, data.astype(np.float16))
            size += 2 * data.size
            return
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(size).integers(
            0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8
        )
        for offset, value in SCALES[kind.name].items():
            raw[..., offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        writer.add_tensor(tensor, raw, raw_dtype=kind)
        size += raw.nbytes

    kind, four = gguf.GGMLQuantizationType[name], gguf.GGMLQuantizationType.Q4_0
    add("token_embd.weight", config["vocab_size"], hidden)
    add("output.weight", config["vocab_size"], hidden, kind=gguf.GGMLQuantizationType[head])
    of_head = size
    add("output_norm.weight", hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}."
        for tensor in ("attn_norm", "ffn_norm"):
            add(f"{block}{tensor}.weight", hidden)
        for letter, rows in (("q", hidden), ("k", hidden * kv_heads // heads), ("v", hidden * kv_heads // heads)):
            add(f"{block}attn_{letter}.weight", rows, hidden, kind=four)
            if is_qwen:
                add(f"{block}attn_{letter}.bias", rows)
        add(f"{block}attn_output.weight", hidden, hidden, kind=four)
        add(f"{block}ffn_gate_inp.weight", experts, hidden)
        add(f"{block}ffn_gate_exps.weight", experts, width, hidden, kind=kind)
        add(f"{block}ffn_up_exps.weight", experts, width, hidden, kind=kind)
        # k-quants need blocks of 256 inputs; for 1408, no multiple of it, llama.cpp falls back to a 4-bit format, too
        add(f"{block}ffn_down_exps.weight", experts, hidden, width, kind=kind if width % 256 == 0 else four)
        if is_qwen:
            shared = config["shared_expert_intermediate_size"]
            add(f"{block}ffn_gate_inp_shexp.weight", hidden)
            add(f"{block}ffn_gate_shexp.weight", shared, hidden, kind=kind)
            add(f"{block}ffn_up_shexp.weight", shared, hidden, kind=kind)
            add(f"{block}ffn_down_shexp.weight", hidden, shared, kind=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size - of_head, of_head


def main() -> None:
    job = json.loads(sys.argv[1])
    shape = f"{job['config']['num_hidden_layers']}-layers-{job['config']['vocab_size']}-words"
    path = Path(job["directory"]) / f"{shape}-{job['format']}-head-{job['head']}.gguf"
    sizes = write_model(path, job["config"], job["format"], job["head"])
    quiet = llama.llama_log_callback(lambda *_: None)  # must stay alive: llama.cpp keeps calling it
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = 4 * job["most_tokens"], 4
    parameters.n_batch, parameters.n_ubatch = BATCH, 512
    context = llama.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp creates no context for {path}")
    print(*sizes, flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        first, tokens, threads = map(int, numbers)
        llama.llama_set_n_threads(context, threads, threads)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        if kind == "pass":
            generator = np.random.default_rng(0)
            ids = generator.integers(job["config"]["vocab_size"], size=(first, tokens))
            print(decode(context, ids, 0, True), flush=True)
        else:
            print(generate(context, first, tokens, job["config"]["vocab_size"]), flush=True)


def decode(context: object, ids: np.ndarray, position: int, all_logits: bool) -> float:
    """Seconds of one llama_decode of tokens [sequences, tokens] that begin at a position."""
    sequences, tokens = ids.shape
    batch = llama.llama_batch_init(ids.size, 0, 1)
    batch.n_tokens = ids.size
    for i, token in enumerate(ids.flatten().tolist()):
        batch.token[i] = token
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i % tokens, 1, i // tokens
        batch.logits[i] = all_logits or i % tokens == tokens - 1
    start = time.perf_counter()
    status = llama.llama_decode(context, batch)
    seconds = time.perf_counter() - start
    llama.llama_batch_free(batch)
    if status:
        raise SystemExit(f"llama_decode failed with {status}")
    return seconds


def generate(context: object, prompt: int, tokens: int, vocabulary: int) -> float:
    """Seconds a token of greedy generation, without the prompt's share; choosing a token counts."""
    ids = np.random.default_rng(0).integers(vocabulary, size=(1, prompt))
    for start in range(0, prompt, BATCH):
        decode(context, ids[:, start : start + BATCH], start, False)
    seconds = 0.0
    for i in range(tokens):
        start = time.perf_counter()
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        chosen = int(logits.argmax())
        seconds += time.perf_counter() - start + decode(context, np.array([[chosen]]), prompt + i, False)
    return seconds / tokens


if __name__ == "__main__":
    main()
