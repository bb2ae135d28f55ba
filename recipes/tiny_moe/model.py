"""The training-time twin of transformers' Qwen3-MoE and GLM-4-MoE: the same functions, several times faster on CPU.

Weights are kept in fp32 and multiplied in bf16 (AMX); the router and all norms compute in fp32.
Experts run over tokens sorted by expert, one matmul per expert, with a hand-written backward; the
language-model loss never holds more than a chunk of logits. `export` copies the weights into a
real model of transformers and checks that both give the same loss.

Shapes: B batch, T sequence, N = B*T tokens, D hidden, F expert width, E experts, K top_k.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from attention import CausalAttention
from torch import Tensor, nn

LOSS_CHUNK = 2048  # tokens of logits held at once
SAMPLE = 4  # the overlap loss looks at every 4th token
ROWS = 128  # an expert's tokens are padded to a multiple of this: oneDNN compiles per matrix size


@dataclass
class Shape:
    """Sizes of the model, named as in Qwen3MoeConfig and Glm4MoeConfig where these have them.

    With `sigmoid` it is a GLM-4-MoE: scores are sigmoids, and a correction bias that training adjusts to even loads
    (arXiv 2408.15664) takes part in the selection only.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 20
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    norm_topk_prob: bool = True
    rope_theta: float = 10_000.0
    sigmoid: bool = False
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0  # blocks at the start with an MLP of `intermediate_size` in place of experts
    intermediate_size: int = 768
    routed_scaling_factor: float = 1.0
    partial_rotary_factor: float = 1.0

    def as_dict(self) -> dict:
        return asdict(self)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@torch.compile(dynamic=False)
def attention_inputs(x, norm, w_qkv, q_norm, k_norm, cos, sin, heads, kv_heads):
    """x [B,T,D] fp32 -> q [B,H,T,d], k and v [B,KV,T,d], normed and rotated, bf16."""
    qkv = (rms_norm(x, norm).bfloat16() @ w_qkv.T).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)

    def rotate(z: Tensor) -> Tensor:
        z, rest = z.split((cos.shape[-1], z.shape[-1] - cos.shape[-1]), dim=-1)
        a, b = z.chunk(2, dim=-1)
        return torch.cat((z * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1).bfloat16()

    return rotate(rms_norm(q, q_norm)), rotate(rms_norm(k, k_norm)), v


@torch.compile(dynamic=False)
def attention_output(x, context, w_o, norm, router):
    """Residual after attention, the experts' bf16 input, and router logits in fp32."""
    x = x + (context.transpose(1, 2).flatten(2) @ w_o.T).float()
    h = rms_norm(x, norm)
    return x, h.bfloat16(), h @ router.T


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A dense MLP in bf16: x [N,D] -> [N,D]."""
    return (swiglu(x @ gate_up.bfloat16().T) @ down.bfloat16().T).float()


@torch.compile(dynamic=False)
def swiglu(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).bfloat16()


@torch.compile(dynamic=False)
def swiglu_backward(h: Tensor, d_act: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    d_act = d_act.float()
    return torch.cat((d_act * up * (s + gate * s * (1 - s)), d_act * gate * s), dim=-1).bfloat16()


@torch.compile(dynamic=False)
def combine(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the K expert outputs of each token: [R,D] -> [N,D]."""
    return (y[place].unflatten(0, weights.shape).float() * weights.unsqueeze(-1)).sum(1)


@torch.compile(dynamic=False)
def combine_backward(grad, y, place, token_of_row, weights, row_weights):
    d_weights = (y[place].unflatten(0, weights.shape).float() * grad.unsqueeze(1)).sum(-1)
    return d_weights, (grad[token_of_row] * row_weights.unsqueeze(-1)).bfloat16()


@torch.compile(dynamic=False)
def gather_sum(d_rows: Tensor, place: Tensor, top_k: int) -> Tensor:
    return d_rows[place].unflatten(0, (-1, top_k)).float().sum(1).bfloat16()


def lay_out(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Rows sorted by expert, each expert's share padded to a multiple of ROWS.

    Returns place [N*K] (the row of each selection), token_of_row [R] (0 for padding), spans.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    load = flat.bincount(minlength=num_experts)
    padded = (load + ROWS - 1) // ROWS * ROWS
    ends = padded.cumsum(0)
    shift = (ends - padded) - (load.cumsum(0) - load)  # how far padding moves an expert's rows
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) + shift[flat[order]]
    token_of_row = torch.zeros(len(flat) + num_experts * ROWS, dtype=torch.long)
    token_of_row[place] = torch.arange(len(flat)) // expert_ids.shape[1]
    ends = ends.tolist()
    return place, token_of_row, list(zip([0, *ends[:-1]], ends, strict=True))


class Experts(torch.autograd.Function):
    """All experts of a block on the tokens that selected them; R rows, padding included.

    Returns the weighted sum [N,D], and every SAMPLE-th token's unweighted outputs [N/SAMPLE,K,D].
    """

    @staticmethod
    def forward(ctx, x, gate_up, down, expert_ids, expert_weights):
        place, token_of_row, spans = lay_out(expert_ids, len(gate_up))
        rows = x[token_of_row]
        h = x.new_empty(len(rows), gate_up.shape[1])
        for e, (a, b) in enumerate(spans):
            torch.mm(rows[a:b], gate_up[e].T, out=h[a:b])
        h[spans[-1][1] :] = 0
        act = swiglu(h)
        y = torch.empty_like(rows)
        for e, (a, b) in enumerate(spans):
            torch.mm(act[a:b], down[e].T, out=y[a:b])
        sample = place.unflatten(0, expert_ids.shape)[::SAMPLE]
        ctx.save_for_backward(rows, h, act, y, place, token_of_row, gate_up, down, expert_weights)
        ctx.spans, ctx.sample = spans, sample
        return combine(y, place, expert_weights), y[sample]

    @staticmethod
    def backward(ctx, grad, grad_sample):
        rows, h, act, y, place, token_of_row, gate_up, down, expert_weights = ctx.saved_tensors
        row_weights = torch.zeros(len(rows))  # padding weighs nothing, so it receives no gradient
        row_weights[place] = expert_weights.flatten()
        d_weights, d_y = combine_backward(grad, y, place, token_of_row, expert_weights, row_weights)
        d_y.index_add_(0, ctx.sample.flatten(), grad_sample.flatten(0, 1).to(d_y.dtype))
        d_act, d_down = torch.zeros_like(act), torch.zeros_like(down)
        for e, (a, b) in enumerate(ctx.spans):
            torch.mm(d_y[a:b], down[e], out=d_act[a:b])
            torch.mm(d_y[a:b].T, act[a:b], out=d_down[e])
        d_h = swiglu_backward(h, d_act)
        d_rows, d_gate_up = torch.empty_like(rows), torch.zeros_like(gate_up)
        for e, (a, b) in enumerate(ctx.spans):
            torch.mm(d_h[a:b], gate_up[e], out=d_rows[a:b])
            torch.mm(d_h[a:b].T, rows[a:b], out=d_gate_up[e])
        return gather_sum(d_rows, place, expert_weights.shape[1]), d_gate_up, d_down, None, d_weights


@torch.compile(dynamic=False)
def loss_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    lse = logits.logsumexp(-1, keepdim=True)
    columns = torch.arange(logits.shape[-1])
    gradient = ((logits - lse).exp() - (columns == targets.unsqueeze(-1)).float()) * scale
    picked = logits.gather(-1, targets.unsqueeze(-1))
    return (lse - picked).sum() * scale, gradient.bfloat16()


class LanguageModelLoss(torch.autograd.Function):
    """Mean cross entropy of h [N,D] against targets [N]; gradients are formed chunk by chunk."""

    @staticmethod
    def forward(ctx, h, embedding, targets):
        d_h, d_embedding, total = torch.empty_like(h), torch.zeros(embedding.shape), 0.0
        for a in range(0, len(h), LOSS_CHUNK):
            rows = h[a : a + LOSS_CHUNK]
            loss, gradient = loss_and_gradient(rows @ embedding.T, targets[a : a + LOSS_CHUNK], 1 / len(h))
            torch.mm(gradient, embedding, out=d_h[a : a + LOSS_CHUNK])
            d_embedding += gradient.T @ rows
            total = total + loss
        ctx.save_for_backward(d_h, d_embedding)
        return total

    @staticmethod
    def backward(ctx, grad):
        d_h, d_embedding = ctx.saved_tensors
        return d_h * grad, d_embedding * grad, None


@torch.compile(dynamic=False)
def overlap(outputs: Tensor) -> Tensor:
    """Mean squared cosine between the outputs [M,K,D] of the experts that one token selected.

    If it is low, a token's experts do different things, so that replacing one by another costs something
    (the orthogonality loss of "Advancing Expert Specialization for Better MoE", arXiv 2505.22323).
    """
    unit = F.normalize(outputs.float(), dim=-1)
    total = (unit.sum(1).pow(2).sum(-1) - unit.pow(2).sum((1, 2))) / (outputs.shape[1] * (outputs.shape[1] - 1))
    return total.pow(2).mean()


class Block(nn.Module):
    """One decoder layer: grouped-query attention with q/k norms; router, routed and shared experts, or an MLP."""

    def __init__(self, s: Shape, is_dense: bool = False):
        super().__init__()
        heads, width = s.num_attention_heads + 2 * s.num_key_value_heads, s.hidden_size
        residual = (2 * s.num_hidden_layers) ** -0.5

        def matrix(*size: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(size) * scale * size[-1] ** -0.5)

        self.qkv = matrix(heads * s.head_dim, width)
        self.o = matrix(width, s.num_attention_heads * s.head_dim, scale=residual)
        self.is_dense = is_dense
        if not is_dense:
            self.gate_up = matrix(s.num_experts, 2 * s.moe_intermediate_size, width)
            self.down = matrix(s.num_experts, width, s.moe_intermediate_size, scale=residual)
            self.router = matrix(s.num_experts, width, scale=0.5)
            self.register_buffer("correction", torch.zeros(s.num_experts))
        always = s.intermediate_size if is_dense else s.n_shared_experts * s.moe_intermediate_size
        if always:
            self.shared_gate_up = matrix(2 * always, width)
            self.shared_down = matrix(width, always, scale=residual)
        self.input_norm, self.post_norm = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(s.head_dim)), nn.Parameter(torch.ones(s.head_dim))
        self.shape = s

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """x [B,T,D] -> (x, router_logits [N,E], expert_ids [N,K], overlap); a dense block has only the first."""
        s = self.shape
        q, k, v = attention_inputs(
            x, self.input_norm, self.qkv.bfloat16(), self.q_norm, self.k_norm, cos, sin,
            s.num_attention_heads, s.num_key_value_heads,
        )  # fmt: skip
        context = CausalAttention.apply(q, k, v)
        router = self.post_norm[None] if self.is_dense else self.router
        x, h, logits = attention_output(x, context, self.o.bfloat16(), self.post_norm, router)
        if self.is_dense:
            return x + mlp(h, self.shared_gate_up, self.shared_down), None, None, None
        logits = logits.flatten(0, 1)
        scores = logits.sigmoid() if s.sigmoid else logits.softmax(-1)
        expert_ids = (scores + self.correction).topk(s.num_experts_per_tok, dim=-1).indices
        expert_weights = scores.gather(1, expert_ids)
        if s.norm_topk_prob:
            expert_weights = expert_weights / expert_weights.sum(-1, keepdim=True)
        expert_weights = expert_weights * s.routed_scaling_factor
        y, outputs = Experts.apply(
            h.flatten(0, 1), self.gate_up.bfloat16(), self.down.bfloat16(), expert_ids, expert_weights
        )
        x = x + y.unflatten(0, x.shape[:2])
        if s.n_shared_experts:
            x = x + mlp(h, self.shared_gate_up, self.shared_down)
        return x, logits, expert_ids, overlap(outputs)


class TinyMoE(nn.Module):
    """Embedding, blocks, final norm; the head is the embedding."""

    def __init__(self, shape: Shape, context: int):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(shape, number < shape.first_k_dense_replace) for number in range(shape.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        width = int(shape.head_dim * shape.partial_rotary_factor)
        steps = torch.arange(0, width, 2) / width
        angles = torch.outer(torch.arange(context), shape.rope_theta**-steps).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens [B,T+1] -> (mean loss, balance loss and overlap averaged over MoE blocks, their loads [blocks,E])."""
        x, balances, overlaps, loads = F.embedding(tokens[:, :-1], self.embedding), [], [], []
        for block in self.blocks:
            x, logits, expert_ids, shared = block(x, self.cos, self.sin)
            if block.is_dense:
                continue
            balances.append(balance_loss(logits, expert_ids))
            overlaps.append(shared)
            loads.append(expert_ids.flatten().bincount(minlength=self.shape.num_experts))
        h = rms_norm(x, self.norm).bfloat16().flatten(0, 1)
        loss = LanguageModelLoss.apply(h, self.embedding.bfloat16(), tokens[:, 1:].flatten())
        return loss, torch.stack(balances).mean(), torch.stack(overlaps).mean(), torch.stack(loads)

    @torch.no_grad()
    def correct(self, loads: Tensor, step: float) -> None:
        """Moves every correction by `step` towards even loads [blocks,E]."""
        sparse = [block for block in self.blocks if not block.is_dense]
        for block, load in zip(sparse, loads, strict=True):
            block.correction += step * torch.sign(load.mean() - load)


def balance_loss(router_logits: Tensor, expert_ids: Tensor) -> Tensor:
    """Switch's load balancing: E * sum of (share of selections) * (mean probability); 1 when even."""
    num_experts = router_logits.shape[-1]
    share = expert_ids.flatten().bincount(minlength=num_experts) / expert_ids.numel()
    return num_experts * (share * router_logits.softmax(-1).mean(0)).sum()
