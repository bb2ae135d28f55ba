"""ONNX Runtime's part of inference.py, in an environment with onnxruntime and onnx, without torch.

Builds the MoE block of the requested shape as a graph: a router, QMoE with random codes in groups of 128 and, if the
model has one, a shared expert of three MatMulNBits. `level` 4 allows activations to be rounded to 8 bit, 0 does not.
Prints the block's weight bytes. Then answers each line `pass BATCH TOKENS THREADS` on standard input with seconds.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

GROUP_SIZE = 128


class Graph:
    """Nodes and weights of one block, over float32 activations [N, D]."""

    def __init__(self, bits: int, level: int) -> None:
        self.bits, self.level = bits, level
        self.nodes, self.weights = [], []
        self.random = np.random.default_rng(0)

    def add(self, op: str, inputs: list[str], out: str, domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], domain=domain, **attributes))
        return out

    def put(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def codes(self, name: str, *shape: int) -> tuple[str, str]:
        """Packed codes and scales of a weight [..., O, I]."""
        *rows, width = shape
        packed = self.random.integers(0, 256, (*rows, width * self.bits // 8), dtype=np.uint8)
        scales = np.full((*rows, width // GROUP_SIZE), 0.08 / 2**self.bits, dtype=np.float32)
        return self.put(f"{name}.codes", packed), self.put(f"{name}.scales", scales)

    def linear(self, x: str, name: str, rows: int, width: int) -> str:
        codes, scales = self.codes(name, rows, width)
        self.weights[-2].dims[:] = (rows, width // GROUP_SIZE, GROUP_SIZE * self.bits // 8)
        grid = {"bits": self.bits, "block_size": GROUP_SIZE, "accuracy_level": self.level}
        return self.add("MatMulNBits", [x, codes, scales], f"{name}.out", "com.microsoft", K=width, N=rows, **grid)


def block(config: dict, bits: int, level: int) -> tuple[onnx.ModelProto, int]:
    """The MoE block as a model, and the bytes of its weights."""
    graph, hidden = Graph(bits, level), config["hidden_size"]
    is_qwen = config["model_type"] == "qwen2_moe"
    experts = config["num_experts"] if is_qwen else config["num_local_experts"]
    width = config["moe_intermediate_size"] if is_qwen else config["intermediate_size"]
    router = graph.put("router", graph.random.normal(0, 0.02, (hidden, experts)).astype(np.float32))
    logits = graph.add("MatMul", ["x", router], "logits")
    up, down = graph.codes("up", experts, 2 * width, hidden), graph.codes("down", experts, hidden, width)
    moe = {"k": config["num_experts_per_tok"], "block_size": GROUP_SIZE, "expert_weight_bits": bits}
    moe |= {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    moe |= {"accuracy_level": level, "weights_prepacked": 0, "normalize_routing_weights": int(not is_qwen)}
    out = graph.add("QMoE", ["x", logits, *up, "", *down], "routed", "com.microsoft", **moe)
    if is_qwen:
        shared = config["shared_expert_intermediate_size"]
        gate, wide = graph.linear("x", "gate", shared, hidden), graph.linear("x", "wide", shared, hidden)
        silu = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], "s")], "silu")
        shared_out = graph.linear(graph.add("Mul", [silu, wide], "inner"), "narrow", hidden, shared)
        share = graph.put("share", graph.random.normal(0, 0.02, (hidden, 1)).astype(np.float32))
        factor = graph.add("Sigmoid", [graph.add("MatMul", ["x", share], "f")], "factor")
        out = graph.add("Add", [out, graph.add("Mul", [shared_out, factor], "scaled")], "y")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", hidden]) for name in ("x", out)]
    whole = helper.make_graph(graph.nodes, "block", ends[:1], ends[1:], graph.weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    size = sum(len(weight.raw_data) for weight in graph.weights)
    return helper.make_model(whole, opset_imports=versions, ir_version=10), size


def main() -> None:
    job = json.loads(sys.argv[1])
    path = Path(job["directory"]) / f"block-{job['level']}.onnx"
    model, size = block(job["config"], job["bits"], job["level"])
    path.with_suffix(".data").unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.stem}.data")
    del model
    hidden, session, session_threads = job["config"]["hidden_size"], None, 0
    print(size, flush=True)
    for line in sys.stdin:
        sequences, tokens, threads = map(int, line.split()[1:])
        if threads != session_threads:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, session_threads = threads, threads
            session = None  # frees the previous one
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(0).normal(0, 1, (sequences * tokens, hidden)).astype(np.float32)
        start = time.perf_counter()
        (y,) = session.run(None, {"x": x})
        seconds = time.perf_counter() - start
        assert np.isfinite(y).all() and y.std() > 0
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
