"""Train the small mixture-of-experts model in `hetero/demo_model/` on a CPU.

After `prepare_demo_text.py`, three calls; `train` takes the hours, and resumes where it stopped:

    train_demo_model.py train --work DIR --hours 2    # needs a C++ compiler, for torch.compile
    train_demo_model.py export --work DIR             # weights and tokenizer into --model-dir
    train_demo_model.py verify --work DIR             # against transformers; loss by domain

`config.json` in --model-dir (default: hetero/demo_model) is where the shapes are from. On Linux set
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000, so that freed activations are not faulted in
anew at each step, and OMP_WAIT_POLICY=PASSIVE where other work shares the cores.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# Shapes: T tokens, B sequences, S sequence length, D hidden, H query heads, K head dim, E experts,
# I expert intermediate, L layers, V vocabulary.

Params = dict[str, Tensor]
Ids = NDArray[np.integer[Any]]

ADAM_NAMES = ("embed", "attn_norm", "q_norm", "k_norm", "moe_norm", "final_norm", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The model's sizes, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float


def read_shape(model_dir: Path) -> Shape:
    """Read the sizes from a folder's config.json."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return Shape(**{field.name: config[field.name] for field in fields(Shape)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How it is trained. Fractions are of the wall clock: a paused run still ends in time."""

    shares: tuple[tuple[str, float], ...] = (  # of the training tokens, by domain
        ("books", 0.52),
        ("tech_docs", 0.18),
        ("code", 0.12),
        ("math", 0.09),
        ("drama", 0.03),
        ("multilingual", 0.06),
    )
    tokens_per_step: int = 8192
    # (until this fraction, sequence length): short first, since attention costs as much as the rest
    lengths: tuple[tuple[float, int], ...] = ((0.4, 256), (0.9, 512), (math.inf, 1024))
    warmup_steps: int = 100
    decay_from: float = 0.45
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.05
    adam_lr: float = 3e-3
    adam_betas: tuple[float, float] = (0.9, 0.95)
    balance_weight: float = 0.01  # a layer
    router_z_weight: float = 1e-4


class Batches:
    """Draws training sequences; at one length, a domain is read whole before any of it repeats."""

    def __init__(self, work: Path, recipe: Recipe, position: dict[str, int]) -> None:
        self.shares = dict(recipe.shares)
        self.tokens: dict[str, Ids] = {n: np.load(work / f"{n}.train.npy") for n in self.shares}
        self.position = {name: position.get(name, 0) for name in self.shares}  # tokens drawn
        self.orders: dict[tuple[str, int, int], Ids] = {}

    def draw(self, step: int, num_seqs: int, length: int) -> Tensor:
        """Return `num_seqs` rows of `length + 1` token ids."""
        rng = np.random.default_rng((2, step))
        names = rng.choice(list(self.shares), num_seqs, p=list(self.shares.values()))
        rows = [self.draw_one(str(name), length) for name in names]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def draw_one(self, name: str, length: int) -> Ids:
        """Return the next window of a domain, `length + 1` ids."""
        tokens = self.tokens[name]
        num_windows = (len(tokens) - 1) // length
        epoch, window = divmod(self.position[name] // length, num_windows)
        key = (name, epoch, length)
        if key not in self.orders:
            seed = (3, epoch, length, *name.encode())
            self.orders[key] = np.random.default_rng(seed).permutation(num_windows)
        start = int(self.orders[key][window]) * length
        self.position[name] += length
        return tokens[start : start + length + 1]


# ---- the model


def init_params(shape: Shape) -> Params:
    """Return fresh float32 weights, the layers of one kind stacked along the first axis."""
    s, per_layer, per_expert = (
        shape,
        (shape.num_hidden_layers,),
        (shape.num_hidden_layers, shape.num_experts),
    )
    q_size, kv_size = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    fan_in = s.hidden_size**-0.5
    matrices = {
        "embed": (0.02, (s.vocab_size, s.hidden_size)),
        "router": (0.02, (*per_expert, s.hidden_size)),
        "q": (fan_in, (*per_layer, q_size, s.hidden_size)),
        "k": (fan_in, (*per_layer, kv_size, s.hidden_size)),
        "v": (fan_in, (*per_layer, kv_size, s.hidden_size)),
        "o": (0.02, (*per_layer, s.hidden_size, q_size)),
        "gate_up": (fan_in, (*per_expert, 2, s.moe_intermediate_size, s.hidden_size)),
        "down": (0.02, (*per_expert, s.hidden_size, s.moe_intermediate_size)),
    }
    norms = {
        "attn_norm": (*per_layer, s.hidden_size),
        "q_norm": (*per_layer, s.head_dim),
        "k_norm": (*per_layer, s.head_dim),
        "moe_norm": (*per_layer, s.hidden_size),
        "final_norm": (s.hidden_size,),
    }
    torch.manual_seed(0)
    params = {name: std * torch.randn(size) for name, (std, size) in matrices.items()}
    params |= {name: torch.ones(size) for name, size in norms.items()}
    return {name: value.requires_grad_() for name, value in params.items()}


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [S, K], halves repeated (the rotate-half convention)."""
    exponents = torch.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = torch.outer(torch.arange(length).float(), shape.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to [B, H, S, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


@torch.compile(dynamic=False)
def attention(x: Tensor, layer: Params, shape: Shape, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return [B, S, D] after causal self-attention, residual added."""
    s, (batch, length, _), residual = shape, x.shape, x
    x = F.rms_norm(x, (s.hidden_size,), layer["attn_norm"], s.rms_norm_eps)
    sizes = [s.num_attention_heads, s.num_key_value_heads, s.num_key_value_heads]
    qkv = x @ torch.cat([layer["q"], layer["k"], layer["v"]]).T
    parts = torch.split(qkv.view(batch, length, -1, s.head_dim), sizes, dim=2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    q = rotate(F.rms_norm(q, (s.head_dim,), layer["q_norm"], s.rms_norm_eps), rope)
    k = rotate(F.rms_norm(k, (s.head_dim,), layer["k_norm"], s.rms_norm_eps), rope)
    group = s.num_attention_heads // s.num_key_value_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return residual + out.transpose(1, 2).reshape(batch, length, -1) @ layer["o"].T


class GroupedExperts(torch.autograd.Function):
    """SwiGLU experts over rows sorted by expert: [T, D], [E, 2I, D], [E, D, I] -> [T, D].

    Written out because autograd would stack every expert's gradient in a copy of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, sizes: list[int]) -> Tensor:
        hidden, out = x.new_empty(len(x), gate_up.shape[1]), torch.empty_like(x)
        start = 0
        for expert, size in enumerate(sizes):
            rows = slice(start, start + size)
            torch.mm(x[rows], gate_up[expert].T, out=hidden[rows])
            gate, up = hidden[rows].chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down[expert].T, out=out[rows])
            start += size
        ctx.save_for_backward(x, gate_up, down, hidden)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate_up, down, hidden = ctx.saved_tensors
        x_grad, gate_up_grad, down_grad = map(torch.empty_like, (x, gate_up, down))
        start = 0
        for expert, size in enumerate(ctx.sizes):
            rows = slice(start, start + size)
            out_grad, (gate, up) = grads[0][rows], hidden[rows].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            torch.mm(out_grad.T, silu * up, out=down_grad[expert])
            act_grad = out_grad @ down[expert]
            # d silu(g)/dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
            gate_grad = torch.addcmul(sigmoid, silu, 1 - sigmoid).mul_(up).mul_(act_grad)
            hidden_grad = torch.cat([gate_grad, silu.mul_(act_grad)], dim=-1)
            torch.mm(hidden_grad.T, x[rows], out=gate_up_grad[expert])
            torch.mm(hidden_grad, gate_up[expert], out=x_grad[rows])
            start += size
        return x_grad, gate_up_grad, down_grad, None


def experts(x: Tensor, layer: Params, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return the routed experts' output of normed [T, D], router logits [T, E], counts [E]."""
    logits = x @ layer["router"].T
    weights, chosen = logits.softmax(dim=-1).topk(shape.num_experts_per_tok, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    token = order // shape.num_experts_per_tok
    counts = torch.bincount(chosen.flatten(), minlength=shape.num_experts)
    rows, gate_up = x.index_select(0, token), layer["gate_up"].flatten(1, 2)
    apply: Callable[..., Tensor] = GroupedExperts.apply
    out = apply(rows, gate_up, layer["down"], counts.tolist())
    weighted = out * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted), logits, counts


def forward(params: Params, ids: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return final hidden states [B, S, D], router logits [L, T, E] and expert counts [L, E]."""
    s = shape
    x = params["embed"][ids]
    rope = rope_tables(s, ids.shape[1])
    stacked = {n: v.unbind() for n, v in params.items() if n not in ("embed", "final_norm")}
    all_logits, all_counts = [], []
    for i in range(s.num_hidden_layers):
        layer = {name: values[i] for name, values in stacked.items()}
        x = attention(x, layer, s, rope)
        normed = F.rms_norm(x, (s.hidden_size,), layer["moe_norm"], s.rms_norm_eps)
        out, logits, counts = experts(normed.flatten(0, 1), layer, s)
        x = x + out.view_as(x)
        all_logits.append(logits)
        all_counts.append(counts)
    x = F.rms_norm(x, (s.hidden_size,), params["final_norm"], s.rms_norm_eps)
    return x, torch.stack(all_logits), torch.stack(all_counts)


class HeadLoss(torch.autograd.Function):
    """Mean next-token loss of [T, D] under the tied embedding, 1024 rows at a time.

    The gradients are made beside the loss, so the [T, V] logits stay in the cache and are not kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embed: Tensor, targets: Tensor) -> Tensor:
        loss, embed_grad = hidden.new_zeros(()), torch.zeros_like(embed)
        hidden_grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), 1024):
            rows = slice(start, start + 1024)
            target = targets[rows, None]
            probabilities = (hidden[rows] @ embed.T).softmax(dim=-1)
            loss -= probabilities.gather(1, target).clamp_min_(1e-30).log_().sum()
            grad = probabilities.scatter_add_(1, target, -torch.ones(target.shape))
            hidden_grad[rows] = grad @ embed
            embed_grad.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(hidden_grad.div_(len(hidden)), embed_grad.div_(len(hidden)))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, embed_grad = ctx.saved_tensors
        return hidden_grad * grads[0], embed_grad * grads[0], None


def training_loss(
    params: Params, rows: Tensor, shape: Shape, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss to descend, the bare next-token loss, and expert counts [L, E]."""
    hidden, router_logits, counts = forward(params, rows[:, :-1], shape)
    apply: Callable[..., Tensor] = HeadLoss.apply
    loss = apply(hidden.flatten(0, 1), params["embed"], rows[:, 1:].flatten())
    load = counts / counts.sum(dim=-1, keepdim=True)
    mean_probability = router_logits.softmax(dim=-1).mean(dim=1)
    balance = shape.num_experts * (load * mean_probability).sum()
    router_z = router_logits.logsumexp(dim=-1).square().mean()
    total = loss + recipe.balance_weight * balance + recipe.router_z_weight * router_z
    return total, loss.detach(), counts


# ---- the optimizer


def orthogonalize(g: Tensor) -> Tensor:
    """Return (nearly) the closest orthogonal matrices of [..., R, C]: Muon's Newton-Schulz."""
    is_tall = g.shape[-2] > g.shape[-1]
    x: Tensor = g.transpose(-2, -1) if is_tall else g
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-2, -1)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(-2, -1) if is_tall else x


@torch.no_grad()
def update(params: Params, state: Params, recipe: Recipe, step: int, lr_scale: float) -> None:
    """Move the weights one step: Adam for `ADAM_NAMES`, Muon for the other matrices."""
    for name, param in params.items():
        grad = param.grad
        assert grad is not None
        first = state[f"{name}.first"]
        if name in ADAM_NAMES:
            second = state[f"{name}.second"]
            beta1, beta2 = recipe.adam_betas
            first.lerp_(grad, 1 - beta1)
            second.lerp_(grad.square(), 1 - beta2)
            scale = math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
            param.sub_(lr_scale * recipe.adam_lr * scale * first / (second.sqrt() + 1e-10))
        else:
            first.lerp_(grad, 1 - recipe.muon_momentum)
            direction = orthogonalize(grad.lerp(first, recipe.muon_momentum))
            lr = lr_scale * recipe.muon_lr
            param.mul_(1 - lr * recipe.muon_weight_decay)
            param.sub_(lr * max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5 * direction)
        param.grad = None


# ---- the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands; kept in the checkpoint's metadata."""

    step: int
    num_tokens: int
    train_s: float
    started_at: float  # Unix time; the schedule runs from here to the deadline
    position: dict[str, int]


def save_checkpoint(path: Path, params: Params, state: Params, progress: Progress) -> None:
    """Write weights, optimizer state, progress; the old file stays until the new one is whole."""
    tensors = {f"params.{n}": v.detach() for n, v in params.items()}
    tensors |= {f"state.{n}": v for n, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[Params, Params, Progress]:
    """Read what `save_checkpoint` wrote."""
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run `train` first, with the same --work")
    with safe_open(path, framework="pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    tensors = load_file(path)
    params = {n.removeprefix("params."): v for n, v in tensors.items() if n.startswith("params.")}
    state = {n.removeprefix("state."): v for n, v in tensors.items() if n.startswith("state.")}
    return {n: v.requires_grad_() for n, v in params.items()}, state, progress


def train(work: Path, shape: Shape, deadline: float, save_every_s: float) -> None:
    """Train until the deadline (Unix time), from the checkpoint in `work` if there is one."""
    recipe, path = Recipe(), work / "checkpoint.safetensors"
    if path.exists():
        params, state, progress = load_checkpoint(path)
    else:
        params = init_params(shape)
        state = {f"{name}.first": torch.zeros_like(value) for name, value in params.items()}
        state |= {f"{name}.second": torch.zeros_like(params[name]) for name in ADAM_NAMES}
        progress = Progress(step=0, num_tokens=0, train_s=0.0, started_at=time.time(), position={})
    batches = Batches(work, recipe, progress.position)
    step, num_tokens, train_s = progress.step, progress.num_tokens, progress.train_s
    saved_at, mean_loss = time.time(), math.nan
    is_over = saved_at >= deadline
    while not is_over:
        now = time.time()
        done = (now - progress.started_at) / (deadline - progress.started_at)
        length = next(length for until, length in recipe.lengths if done < until)
        rows = batches.draw(step, recipe.tokens_per_step // length, length)
        total, loss, counts = training_loss(params, rows, shape, recipe)
        torch.autograd.backward(total)
        decay = max(0.0, min(1.0, (1 - done) / (1 - recipe.decay_from)))
        update(params, state, recipe, step, min(1.0, (step + 1) / recipe.warmup_steps) * decay)
        step, num_tokens = step + 1, num_tokens + recipe.tokens_per_step
        # a step is seconds: a longer one was paused from outside, and pauses are not training time
        step_s = time.time() - now
        train_s += min(step_s, 10.0)
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 20 == 0:
            load = counts / counts.sum(dim=-1, keepdim=True) * shape.num_experts
            print(
                f"step {step} tokens {num_tokens / 1e6:.2f}M done {done:.3f} length {length}"
                f" loss {mean_loss:.3f} lr x{decay:.2f} load {load.min():.2f}..{load.max():.2f}"
                f" {recipe.tokens_per_step / step_s:.0f} tokens/s",
                flush=True,
            )
        is_over = time.time() >= deadline
        if is_over or time.time() - saved_at > save_every_s:
            saved_at = time.time()
            progress = Progress(
                step=step,
                num_tokens=num_tokens,
                train_s=train_s,
                started_at=progress.started_at,
                position=batches.position,
            )
            save_checkpoint(path, params, state, progress)


# ---- Hugging Face files


def export_tensors(params: Params, shape: Shape) -> Params:
    """Return bfloat16 tensors under the names of the hub's Qwen3-MoE checkpoints."""
    tensors = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
    }
    plain = {
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "moe_norm": "post_attention_layernorm",
        "router": "mlp.gate",
    }
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{hub}.weight": params[ours][i] for ours, hub in plain.items()}
        for e in range(shape.num_experts):
            expert = f"{layer}.mlp.experts.{e}"
            tensors[f"{expert}.gate_proj.weight"] = params["gate_up"][i, e, 0]
            tensors[f"{expert}.up_proj.weight"] = params["gate_up"][i, e, 1]
            tensors[f"{expert}.down_proj.weight"] = params["down"][i, e]
    return {name: t.detach().to(torch.bfloat16).clone() for name, t in tensors.items()}


def export(work: Path, model_dir: Path, shape: Shape) -> None:
    """Write the weights of the checkpoint in `work`, and its tokenizer, into `model_dir`."""
    params, _, progress = load_checkpoint(work / "checkpoint.safetensors")
    path = model_dir / "model.safetensors"
    save_file(export_tensors(params, shape), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives new files to their owner alone
    shutil.copyfile(work / "tokenizer.json", model_dir / "tokenizer.json")
    print(progress, file=sys.stderr)


@torch.no_grad()
def verify(work: Path, model_dir: Path, shape: Shape, max_tokens: int) -> None:
    """Compare `model_dir` in transformers with the checkpoint; print that and loss by domain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    params, _, progress = load_checkpoint(work / "checkpoint.safetensors")
    params = {name: value.to(torch.bfloat16).float() for name, value in params.items()}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # byte-level: one sign a byte, but a special token stands for no text
    signs = tokenizer.convert_ids_to_tokens(list(range(shape.vocab_size)))
    token_bytes = torch.tensor([0 if s in tokenizer.all_special_tokens else len(s) for s in signs])
    domains, max_logit_difference = {}, 0.0
    for name, _ in Recipe().shares:
        ids = torch.from_numpy(np.load(work / f"{name}.heldout.npy").astype(np.int64))
        length = shape.max_position_embeddings
        windows = ids[: max_tokens + 1].unfold(0, length + 1, length)
        nats, loads = 0.0, torch.zeros(shape.num_hidden_layers, shape.num_experts)
        for window in windows:
            hidden, _, counts = forward(params, window[None, :-1], shape)
            logits = hidden[0] @ params["embed"].T
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
            loads += counts
        theirs = model(window[None, :-1]).logits[0]
        max_logit_difference = max(max_logit_difference, (theirs - logits).abs().max().item())
        num_bytes = int(token_bytes[windows[:, 1:]].sum())
        domains[name] = {
            "num_tokens": windows[:, 1:].numel(),
            "nats_per_token": nats / windows[:, 1:].numel(),
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "expert_load": (loads / loads.mean(dim=-1, keepdim=True)).tolist(),
        }
    report = {"max_logit_difference": max_logit_difference, "domains": domains}
    print(json.dumps(report | asdict(progress)))


def main() -> None:
    """Parse the command line and run one of the three steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("train", "export", "verify"))
    parser.add_argument("--work", type=Path, required=True, help="tokens and checkpoint")
    parser.add_argument("--model-dir", type=Path, default=Path("hetero/demo_model"))
    parser.add_argument("--hours", type=float, default=2.0, help="train: end this long from now")
    parser.add_argument("--save-every-s", type=float, default=300.0, help="train: checkpoints")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-tokens", type=int, default=65536, help="verify: tokens a domain")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = read_shape(args.model_dir)
    if args.step == "train":
        train(args.work, shape, time.time() + args.hours * 3600, args.save_every_s)
    elif args.step == "export":
        export(args.work, args.model_dir, shape)
    else:
        verify(args.work, args.model_dir, shape, args.max_tokens)


if __name__ == "__main__":
    main()
