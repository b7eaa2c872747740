"""GPT-2 and what became of it (Llama, Qwen3) from scratch: the network, LoRA, the KV cache and sampling,
loading and saving.

    python model.py --model=out/ppo                                  # a chat (data/chat.py)
    python model.py --model=out/ppo --prompt="What is 2 plus 3?"     # one answer

Reads a checkpoint folder in the Hugging Face hub's layout: config.json, model.safetensors. Shapes: B rows,
T tokens, S tokens in the cache, C the width (n_embd), H heads of width D, K of them with keys and values of
their own (in GPT-2 all), V the vocabulary. Where the weights live (streamed from the host, sharded among
processes) is memory.py's business.
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from data import hub
from data.batches import branching, map_by_length, pad, rng
from data.kernels import is_packed, linear, prepacked
from data.run import parse_flags, require
from data.tokenizer import Tokenizer
from memory import (WORLD, checkpoint, few_shapes, first_process_first, full_tensor, local_shard, logits_of,
                    lookup, memory_tag, shard_like, stream, token_logprobs, unsharded, vocab_chunks)


# --- the network: GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023, arXiv:2302.13971), Qwen3 ---------

# From GPT-2 to Llama (SmolLM2 is one) five things changed. All else, and the names, are the same.
#     LayerNorm -> RMSNorm: less work         position vectors (wpe) -> rotary_angles, rotate: distances count
#     MLP -> GatedMLP: learns better          as many keys as queries -> fewer (n_kv_head): a smaller cache
#     biases -> none; Qwen3 has norms on queries and keys instead (q_norm, k_norm)

@dataclass
class GPTConfig:
    """The sizes of a network, named as in GPT-2's config.json, and those that its successors add."""
    vocab_size: int
    n_positions: int            # the longest row that it can read
    n_layer: int
    n_head: int
    n_embd: int
    tokenizer: str              # what its ids mean: tiny, gpt2, or a folder with a tokenizer.json
    model_type: str = "gpt2"    # or llama, qwen3
    n_kv_head: int = 0          # heads of keys and values; 0: n_head
    head_dim: int = 0           # 0: n_embd / n_head
    n_inner: int = 0            # width inside an MLP; 0: 4 n_embd
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: dict | None = None  # Llama 3.1's: see rotary_angles()
    tied: bool = True           # the embedding is the output matrix, too
    checkpoint: bool = False    # gradient checkpointing: recompute each block in backward

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd

    def norm(self):  # GPT-2's eps is LayerNorm's default
        return nn.LayerNorm(self.n_embd) if self.model_type == "gpt2" else RMSNorm(self.n_embd, self.norm_eps)


class Linear(nn.Linear):
    """y = x W^T + b; with LoRA's adapters y + (x A^T) B^T: Hu et al. 2021, arXiv:2106.09685, eq. 3 with
    alpha = rank. Llama and its kin have no b."""
    def __init__(self, in_features, out_features, cfg):
        super().__init__(in_features, out_features, bias=cfg.model_type == "gpt2")
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def add_lora(self, rank, generator):
        """A (rank, in) random, x A^T as large as x; B (out, rank) zero: at first nothing changes."""
        a = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        self.lora_a = nn.Parameter(a.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x):
        # (..., in) -> (..., out); LoRA goes through (..., rank), never making the (out, in) matrix B A
        y = linear(x, self.weight, self.bias)
        return y if self.lora_a is None else y + F.linear(F.linear(x, self.lora_a), self.lora_b)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2) * weight: LayerNorm without its mean and bias. Zhang & Sennrich 2019,
    arXiv:1910.07467, eq. 4."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


def rotary_angles(positions, cfg):
    """positions (B, T) or (T,) -> (cos, sin) of the angles by which RoPE turns queries and keys of all heads,
    each (B or 1, 1, T, D / 2).

    Pair i of a head's D numbers turns by theta^(-2 i / D) a position: Su et al. 2021, arXiv:2104.09864, eq.
    15. Llama 3.1 was first trained on shorter rows. Pairs that turned round fewer than `low` times within one
    of these now turn slower, by `factor`; those with more than `high` turns go on as before, others between.
    """
    D = cfg.head_dim
    speed = 1 / cfg.rope_theta ** (torch.arange(0, D, 2, device=positions.device) / D)  # radians a position
    if cfg.rope_scaling:
        names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        factor, low, high, trained_length = (cfg.rope_scaling[name] for name in names)
        turns = trained_length * speed / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angles = (positions[..., None] * speed).unsqueeze(-3)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Queries or keys (B, H, T, D): the pair (x[i], x[i + D / 2]) turns by its angle, cos and sin
    (B or 1, 1, T, D / 2). (The paper pairs neighbours.) q . k then depends on how far apart two tokens are,
    not on where they stand."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + mask) v for q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    H / K neighbouring heads of queries share keys and values (Ainslie et al. 2023, arXiv:2305.13245).
    mask (B, 1, T or 1, S) is 0 for the keys that a token may see, -inf for the others. Without it S = T and
    attention is causal, which also hides padding: that is on the right, in the future of every real token.
    """
    (B, H, T, D), K, S, device = q.shape, k.size(1), k.size(2), q.device.type
    # On a CPU the fused kernel's backward is up to four times slower than the formula's, except on long rows;
    # on Apple's MPS it gives wrong numbers for strided 16-bit inputs (pytorch#163597, #181133).
    # All in k's type, for a CPU's cache is float32. Heads of queries that share keys stand side by side.
    if device == "mps" or device == "cpu" and T <= 512:
        if mask is None:
            mask = torch.full((T, S), -math.inf, dtype=k.dtype, device=q.device).triu(1)
        # as if they were tokens of one head: (B, K, H / K T, D) -> (B, K, H / K T, S)
        scores = (q.to(k.dtype) * D ** -0.5).reshape(B, K, -1, D) @ k.transpose(-1, -2)
        weights = (scores.view(B, H, T, S) + mask).softmax(-1)
        return (weights.view(B, K, -1, S) @ v).view(B, H, T, D).to(q.dtype)
    # One fused kernel, which never writes the (T, S) matrix. It masks tokens by their place, so only where
    # there is one token can heads pose as tokens; otherwise each gets a copy of its keys.
    if T > 1:
        k, v = (x[:, :, None].expand(-1, -1, H // K, -1, -1).flatten(1, 2) for x in (k, v))
    q_ = q.to(k.dtype).reshape(B, k.size(1), -1, D)
    y = F.scaled_dot_product_attention(q_, k, v, attn_mask=mask, is_causal=mask is None)
    return y.reshape(B, H, T, D).to(q.dtype)


def branch_mask(branch, dtype):
    """branch (B, T) -> attend()'s mask (B, 1, T, T): a token sees what is before it and is common, or of its
    own branch."""
    T = branch.size(1)
    sees = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])  # (B, T, T): [b, query, key]
    sees &= torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=branch.device).masked_fill(~sees, -math.inf)[:, None]


class Attention(nn.Module):
    """Every position gathers what it needs from those before it, by n_head patterns of attention at once."""
    def __init__(self, cfg):
        super().__init__()
        self.counts, self.head_dim = (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head), cfg.head_dim
        # queries, keys and values side by side
        self.c_attn = Linear(cfg.n_embd, sum(self.counts) * cfg.head_dim, cfg)
        self.c_proj = Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, cfg)
        qwen3 = cfg.model_type == "qwen3"  # keeps q . k small: Dehghani et al. 2023, arXiv:2302.05442, sec. 2
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if qwen3 else nn.Identity()

    def forward(self, x, cache=None, layer=0, mask=None, rotary=None):
        """x (B, T, C) -> (B, T, C). With a cache, also over the keys and values that it has of this layer."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = heads.split(self.counts, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = attend(q, k, v, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again


class MLP(nn.Module):
    """The same two matrices at every position on its own."""
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Linear(cfg.n_embd, cfg.n_inner, cfg)
        self.c_proj = Linear(cfg.n_inner, cfg.n_embd, cfg)

    def forward(self, x):
        # (B, T, C) -> (B, T, n_inner) -> (B, T, C); GPT-2 was trained with the tanh form of GELU
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GatedMLP(nn.Module):
    """An MLP whose inner numbers are multiplied by gates: SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6."""
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Linear(cfg.n_embd, 2 * cfg.n_inner, cfg)  # gates and numbers side by side
        self.c_proj = Linear(cfg.n_inner, cfg.n_embd, cfg)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, -1)  # each (B, T, n_inner)
        return self.c_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One layer. It adds to x, the residual stream, and normalises what it reads, not the stream itself."""
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = cfg.norm()
        self.attn = Attention(cfg)
        self.ln_2 = cfg.norm()
        self.mlp = MLP(cfg) if cfg.model_type == "gpt2" else GatedMLP(cfg)

    def forward(self, x, cache=None, layer=0, mask=None, rotary=None, keep=None):
        """x (B, T, C) -> (B, T, C); with keep = (rows, columns), each (N,), only these positions (N, C)."""
        x = x + self.attn(self.ln_1(x), cache, layer, mask, rotary)  # attention reads all of them
        if keep is not None:
            x = x[keep]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A language model. Its parameters have the names of the hub's GPT-2, whatever the family;
    data/layouts.py knows what others call them, and which of them are apart there."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # (V, C)
        if cfg.model_type == "gpt2":
            self.wpe = nn.Embedding(cfg.n_positions, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = cfg.norm()
        if not cfg.tied:
            self.lm_head = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # rows of it are read, as of wte: (V, C)
        self.streamed_blocks = None  # what stream() runs instead of self.h

    def initialize(self, generator):
        """Random weights, their standard deviations such that activations keep their size at any width. (With
        GPT-2's fixed 0.02 a network of width 128 learned more slowly.)"""
        for name, p in self.named_parameters():
            if name.startswith(("wte", "wpe", "lm_head")):
                # logits of deviation 1/2, a first loss of ln V + (1/2)^2 / 2
                nn.init.normal_(p, std=0.5 / math.sqrt(self.cfg.n_embd), generator=generator)
            elif p.dim() >= 2:
                # 2 n_layer projections add to the residual stream: they start smaller, by 1/sqrt(2 n_layer)
                adding = 2 * self.cfg.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=1 / math.sqrt(p.size(1) * adding), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def forward(self, idx, cache=None, keep=None, positions=None, branch=None):
        """idx (B, T) -> hidden states after the final norm (B, T, C), or of some positions: see Block.

        positions (B, T) are 0, 1, 2, ... if not given; branch (B, T): see branching() in data/batches.py.
        """
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        x = lookup(self.wte.weight, idx)  # (B, T, C)
        if self.cfg.model_type == "gpt2":
            rotary = None
            # pad() rounds T up: only padding is beyond the last position
            x = x + self.wpe(positions.clamp(max=self.cfg.n_positions - 1))
        else:
            rotary = [y.to(x.dtype) for y in rotary_angles(positions, self.cfg)]
        mask = cache.mask if cache is not None else None
        if branch is not None:
            mask = branch_mask(branch, x.dtype)
        for layer, block in enumerate(self.streamed_blocks or self.h):
            last = layer + 1 == len(self.h)
            block = partial(block, cache=cache, layer=layer, mask=mask, rotary=rotary,
                            keep=keep if last else None)
            x = checkpoint(block, x) if self.cfg.checkpoint and cache is None else block(x)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> float32 (..., V). In bfloat16 less a constant of each position, which no softmax sees:
        mean_row() in memory.py."""
        with memory_tag("logits"):
            if is_packed(self.output_matrix):
                return linear(hidden, self.output_matrix).float()
            chunk = 8192 if self.streamed_blocks else self.cfg.vocab_size  # rows that come at a time
            out = torch.cat([logits_of(hidden.flatten(0, -2), w)
                             for _, w in vocab_chunks(self.output_matrix, chunk, self.device)], -1)
            return out.view(*hidden.shape[:-1], -1)

    @property
    def output_matrix(self):
        return self.wte.weight if self.cfg.tied else self.lm_head.weight  # (V, C)

    @property
    def device(self):
        """Where idx has to be. (With stream() the embedding and the blocks live elsewhere.)"""
        return self.ln_f.weight.device


class Scorer(GPT):
    """A GPT with one number at each position instead of a vocabulary: the reward model and the critic."""
    def __init__(self, cfg):
        super().__init__(dataclasses.replace(cfg, tied=True))  # no output matrix of its own
        self.score = nn.Linear(cfg.n_embd, 1, bias=False)  # nn's: always trained, no LoRA

    def initialize(self, generator):
        super().initialize(generator)
        return self.initialize_head(generator)

    def initialize_head(self, generator):
        # 1/sqrt(C + 1): Stiennon et al. 2020, arXiv:2009.01325; scores start with a deviation of about 1
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.cfg.n_embd + 1), generator=generator)
        return self

    def scores(self, groups):
        """[[row, ...], ...], lists of ids, those of a group with the same prompt -> the score at the last
        token of each row, in order, float32 (N,)."""
        return self.head(self(**branching(groups, self.device)))

    def head(self, hidden):
        """(..., C) -> (...), in float32: bfloat16 has too few digits for a score."""
        return (hidden.float() @ self.score.weight.float().T).squeeze(-1)

    @torch.no_grad()
    def shift(self, c):
        """Add the constant c to every score. The head has no bias (the hub's format has none), but
        w . (h + c w / |w|^2) = w . h + c: so c w / |w|^2 is added to the bias of ln_f, whose output is h."""
        if isinstance(self, FSDPModule):
            self.reshard()
        w, bias = full_tensor(local_shard(self.score.weight), self.score.weight)[0].float(), self.ln_f.bias
        local_shard(bias).add_(shard_like((c * w / w.dot(w)).to(bias.dtype), bias))


def negative_log_likelihood(model, examples, device):
    """[(idx, targets), ...] -> -log p(targets[t] | idx[:t + 1]), float32 (B, T), 0 where there is no target.

    The caller divides the sum by a number of targets that is the same for all micro-batches, so that their
    size cannot change the gradient.
    """
    idx = pad([idx for idx, _ in examples]).to(device)
    targets = pad([targets for _, targets in examples], -1).to(device)
    logprobs, _ = token_logprobs(model(idx), model.output_matrix, targets)
    return -logprobs


def reply_states(model, prompts, replies):
    """Lists of ids, each reply after its prompt -> hidden states (N + spare, C) at the positions that predict
    the replies' N tokens, in order. Neighbours with the same prompt are one row: it is computed once."""
    pairs = [*zip(prompts, replies)]
    groups = [[p + r for p, r in group] for _, group in groupby(pairs, key=lambda pair: pair[0])]
    before = [range(len(p) - 1, len(p) + len(r) - 1) for p, r in pairs]
    inputs = branching(groups, model.device, before)
    rows, columns = inputs["keep"]
    spare = few_shapes(len(rows), 64) - len(rows)  # their states are the first token's, which nobody reads
    return model(**inputs | {"keep": (F.pad(rows, (0, spare)), F.pad(columns, (0, spare)))})


def by_reply(x, replies):
    """(N + spare,), N numbers for the replies' N tokens -> (B, R): a row for each reply, 0 beyond its end."""
    lengths = [len(reply) for reply in replies]
    return pad_sequence(x[:sum(lengths)].split(lengths), batch_first=True)


def policy_logprobs(model, prompts, replies, temperature=1.0, entropy=False):
    """-> (log-probabilities of the replies' tokens under the distribution that generate() samples from at
    this temperature, its entropy if asked for, else 0), each float32 (B, R), 0 beyond a reply's end."""
    # logits = hidden @ output_matrix.T: dividing the one divides the other
    hidden = reply_states(model, prompts, replies) / temperature
    targets = [t for reply in replies for t in reply]
    targets = torch.tensor(targets + [-1] * (len(hidden) - len(targets))).to(model.device)
    logprobs, entropies = token_logprobs(hidden, model.output_matrix, targets, entropy=entropy)
    return by_reply(logprobs, replies), by_reply(entropies, replies)


# --- generation ---------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of the tokens so far, allocated once: (layers, 2, B, K, capacity, D). The first forward
    is the prefill, its rows are the different prompts, and prompt (B,) says which of them each row has. Then
    advance() and a forward with one token a row take turns."""
    def __init__(self, cfg, prompt, capacity, like):
        shape = cfg.n_layer, 2, len(prompt), cfg.n_kv_head, few_shapes(capacity, 16), cfg.head_dim
        # A CPU attends twice as fast in float32. Zeros, as masked values must be numbers: 0 * nan = nan.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        with memory_tag("KV cache"):
            self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        self.prompt, self.rows, self.lengths, self.mask = prompt, None, None, None

    def update(self, layer, *new):
        """New keys and values, each (rows, K, T, D) -> those of all tokens so far, each (rows, K, S, D)."""
        for kept, x in zip(self.kv[layer], new):  # kept (B, K, capacity, D)
            if self.mask is None:  # nobody has called advance(): prefill
                kept[:, :, :x.size(2)] = x[self.prompt]
            else:  # one token a row, each at a position of its own, (B, K, D)
                kept[self.rows, :, self.lengths] = x[:, :, 0].to(kept.dtype)
        return new if self.mask is None else self.kv[layer, ..., :self.mask.size(-1), :]

    def advance(self, lengths, longest):
        """The next forward has one token a row, at position `lengths` (B,), of which `longest` is the
        largest."""
        self.lengths, self.rows = lengths, torch.arange(len(lengths), device=lengths.device)
        S = few_shapes(longest + 1, 16)
        unseen = torch.arange(S, device=lengths.device) > lengths[:, None]  # (B, S)
        seen = torch.zeros(unseen.shape, dtype=self.kv.dtype, device=lengths.device)
        self.mask = seen.masked_fill(unseen, -math.inf)[:, None, None]  # (B, 1, 1, S)

    def select(self, alive):
        """Forget all rows but those numbered in alive (n,); layer by layer, in place: a second cache might
        not fit."""
        for kv in self.kv:
            kv[:, :len(alive)] = kv[:, alive]
        self.kv = self.kv[:, :, :len(alive)]


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V), u (B,) uniform in [0, 1) -> token ids (B,). Temperature 0: the most likely token.

    Inverse-CDF sampling: u falls into a token's interval with that token's probability. The same u gives the
    same token, whoever else is in the batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:  # all below the k-th largest logit get probability 0
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:  # the fewest tokens with a probability of top_p: Holtzman et al. 2019, arXiv:1904.09751
        probs, order = logits.softmax(-1).sort(descending=True)
        drop = probs.cumsum(-1) - probs >= top_p  # those before it suffice
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)  # scatter undoes the sort
    cdf = logits.softmax(-1).cumsum(-1)  # its last column is 1 but for rounding
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # the first whose cdf exceeds u
    return token.squeeze(1).clamp(max=logits.size(-1) - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             on_token=None, u=None):
    """prompts: lists of ids, of any lengths -> replies: lists of ids, with the `end` token where it was
    reached.

    Every row has its own random numbers, so a reply does not depend on when its neighbours stop: u
    (B, max_new_tokens), uniform in [0, 1), from the generator if not given. on_token(row, id) sees tokens as
    they come. Raises ValueError if a prompt is empty or leaves no room for the reply.
    """
    cfg, device = model.cfg, model.device
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0 or longest + max_new_tokens > cfg.n_positions:
        raise ValueError(f"prompts of 1 to {cfg.n_positions - max_new_tokens} tokens fit, not "
                         f"{min(map(len, prompts))} to {longest}")
    u = (torch.rand(len(prompts), max_new_tokens, generator=generator) if u is None else u).to(device)
    # 1. prefill: each different prompt once, right-padded; the hidden state at its last token
    which = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    prompt = torch.tensor([which[tuple(p)] for p in prompts]).to(device)
    idx = pad(list(which)).to(device)
    cache = Cache(cfg, prompt, idx.size(1) + max_new_tokens, model.ln_f.weight)
    ends = torch.arange(len(which)), torch.tensor([len(p) - 1 for p in which])
    hidden = model(idx, cache, keep=tuple(x.to(device) for x in ends))[prompt]  # (B, C)
    # Who goes on is decided on the host, which waits for the device once a token. rows: whose reply each row
    # of the cache is
    rows, replies, ended = list(range(len(prompts))), [[] for _ in prompts], set()
    lengths = torch.tensor([len(p) for p in prompts]).to(device)
    with prepacked(model, len(prompts)):
        for step in range(max_new_tokens):
            # 2. one token a row
            with memory_tag("logits"):
                token = sample(model.logits(hidden), u[:, step], temperature, top_k, top_p)  # (B,)
            for row, t in zip(rows, token.tolist()):  # the wait
                if row not in ended:
                    replies[row].append(t)
                    if on_token:
                        on_token(row, t)
                    if t == end:
                        ended.add(row)
            if step + 1 == max_new_tokens or len(ended) == len(prompts):
                break
            # 3. rows that have ended leave the batch, but for a few
            going_on_first = sorted(range(len(rows)), key=lambda i: rows[i] in ended)
            kept = sorted(going_on_first[:few_shapes(len(prompts) - len(ended), 8)])
            if len(kept) < len(rows):
                rows = [rows[i] for i in kept]
                kept = torch.tensor(kept).to(device)
                token, lengths, u = token[kept], lengths[kept], u[kept]
                cache.select(kept)
            # 4. the tokens go in, each at its row's next position
            cache.advance(lengths, max(len(prompts[row]) for row in rows) + step)
            hidden = model(token[:, None], cache, positions=lengths[:, None])[:, 0]
            lengths = lengths + 1
    return replies


def generate_many(model, prompts, max_new_tokens, end, generator, batch, temperature=1.0):
    """generate() for any number of prompts, `batch` at a time, shared among the processes -> replies in their
    order. Neither the batch nor the number of processes changes what a prompt is answered."""
    u = torch.rand(len(prompts), max_new_tokens, generator=generator)

    def answer(rows):
        return generate(model, [prompts[i] for i in rows], max_new_tokens, end, temperature, u=u[rows])
    with unsharded(model):
        return map_by_length(answer, range(len(prompts)), batch, length=lambda i: len(prompts[i]))


def answer_prompts(model, tokenizer, cfg, rows):
    """The model's replies to rows of prompts.jsonl, lists of ids, of at most half a context."""
    new = cfg.block_size // 2
    prompts = [tokenizer.prompt(row["prompt"], cfg.block_size - new) for row in rows]
    at_once = cfg.microbatch or 4 * cfg.batch
    return generate_many(model, prompts, new, tokenizer.end, rng(cfg.seed, "answers"), at_once)


# --- loading, saving, and what of a model is trained --------------------------------------------------------

def load_model(folder, cls=GPT, device="cpu", dtype=torch.float32, head_seed=None):
    """A folder in the hub's layout, or a name of hub.MODELS -> cls, GPT from a language model, Scorer from a
    reward model. With head_seed a Scorer is made from a language model, its head drawn from that seed."""
    with first_process_first():  # one download is enough
        folder = hub.hub_folder(folder) if folder in hub.MODELS and not Path(folder).exists() else folder
    config, tensors = hub.read(folder)
    model = cls(GPTConfig(**config))
    kinds = "language model", "reward model"
    has_head, needs_head = "score.weight" in tensors, cls is Scorer and head_seed is None
    require(has_head == needs_head, f"{folder}: a {kinds[has_head]}, where a {kinds[needs_head]} is needed. "
            "sft.py and ppo.py write language models, reward.py reward models.")
    if cls is Scorer and not has_head:
        tensors["score.weight"] = model.initialize_head(rng(head_seed, "head")).score.weight.detach()
        tensors.pop("lm_head.weight", None)
    wanted = {(name, t.shape) for name, t in model.state_dict().items()}
    found = {(name, t.shape) for name, t in tensors.items()}
    wrong = sorted({name for name, _ in wanted ^ found})
    require(not wrong, f"{folder}: keys missing, unexpected or of another shape than config.json says: "
            f"{', '.join(wrong[:5])}.")
    broken = [name for name, t in tensors.items() if not t.isfinite().all()]
    require(not broken, f"{folder}: {', '.join(broken[:5])}: holds nan or infinity. Fetch or train it anew.")
    model.load_state_dict(tensors)
    return model.to(device, dtype)


def exported(model):
    """model -> (config, tensors), as hub.write and Run.save take them. LoRA is merged in, W + B A; these
    matrices become float32."""
    state = {name: full_tensor(local_shard(t), t) for name, t in model.state_dict().items()}
    adapted = [name.removesuffix("lora_a") for name in state if name.endswith("lora_a")]
    if adapted:  # float32 copies: on the host, where there is room
        state = {name: t.cpu() for name, t in state.items()}
    for name in adapted:
        lora_delta = state.pop(name + "lora_b").float() @ state.pop(name + "lora_a").float()
        state[name + "weight"] = state[name + "weight"].float() + lora_delta
    config = dataclasses.asdict(model.cfg)
    del config["checkpoint"]
    return config, state


@memory_tag("weights")
def make_model(cfg, cls, device, dtype):
    """--init -> (model, tokenizer): random weights of the size that the flags say, or a folder's.

    A dry run needs sizes only: no weights are read, and any tokenizer will do.
    """
    if cfg.dry_run or cfg.init in hub.SCRATCH:
        model = cls(GPTConfig(**hub.find_config(cfg)))
        if not cfg.dry_run:
            model.initialize(rng(cfg.seed, "init"))
    else:
        model = load_model(cfg.init, cls, head_seed=cfg.seed)  # a Scorer gets a fresh head
    require(cfg.block_size <= model.cfg.n_positions,
            f"--block_size={cfg.block_size}: {cfg.init} has {model.cfg.n_positions} positions.")
    tokenizer = Tokenizer("tiny" if cfg.dry_run else model.cfg.tokenizer)
    return setup_training(model.to(dtype), cfg, device), tokenizer


@memory_tag("weights")
def setup_training(model, cfg, device):
    """Decide what learns (all weights, or LoRA's adapters and a Scorer's head) and where the weights live."""
    # streamed weights leave the device after each block: backward has to run the block again
    model.cfg.checkpoint = cfg.checkpoint or cfg.offload == "all"
    if cfg.lora_rank:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                module.add_lora(cfg.lora_rank, rng(cfg.seed, "lora", name))
        if isinstance(model, Scorer):
            model.score.requires_grad_()
    if cfg.offload == "all":
        stream(model, device)
    elif WORLD == 1:  # otherwise shard() brings this process's part of each block
        model.to(device)
    return model


if __name__ == "__main__":
    from data import chat  # which imports this file
    chat.main(parse_flags(chat.Config))
