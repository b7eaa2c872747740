"""The nouns of the pipeline: GPT-2, its tokenizers, generation, checkpoints, and what every script needs to
start.

    python model.py --model=out/ppo                                  # a chat in the terminal
    python model.py --model=out/ppo --prompt="What is 2 plus 3?"     # one answer

Reads a checkpoint folder in the hub's GPT-2 layout: config.json, model.safetensors.
"""
import argparse
import base64
import codecs
import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import mmap
import os
import re
import signal
import struct
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from data.hub import hub_folder
from memory import (DEVICE, QUIET, RANK, WORLD, OffloadedAdamW, checkpoint, dry_run, first_alone, gathered,
                    join, leave, local, lookup, owner, part_of, pieces, spread, stream, summed,
                    token_logprobs, whole)

ROOT = Path(__file__).parent


# --- tokenizers ---------------------------------------------------------------------------------------------

CONTROL = ("<|user|>", "<|assistant|>", "<|end|>")
TINY_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = {"tiny": 1024, "gpt2": 50304}  # sizes, padded to a multiple of 64, which matrix products like
NO_NETWORK = """the GPT-2 encoding could not be fetched ({error}).
Without a network, place the two files of https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ in
a folder as tiktoken names them, and set TIKTOKEN_CACHE_DIR to that folder:
    vocab.bpe    -> 6d1cbeee0f20b3d9449abfede4726ed8212e3aee
    encoder.json -> 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6
Or use --tokenizer=tiny, which is bundled."""


class Tokenizer:
    """tiktoken's encoding `name` plus three control tokens, which text from data can never produce."""
    def __init__(self, name):
        if name == "tiny":
            lines = (ROOT / "data/tiny/tiny.tiktoken").read_text().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
            pattern, special = TINY_PATTERN, {}
        elif name == "gpt2":
            try:
                base = tiktoken.get_encoding("gpt2")
            except Exception as error:  # requests, urllib3 and tiktoken have exceptions of their own for this
                raise SystemExit(NO_NETWORK.format(error=type(error).__name__)) from None
            ranks, pattern, special = base._mergeable_ranks, base._pat_str, base._special_tokens
        else:
            raise SystemExit(f"--tokenizer={name}: unknown. Choose tiny or gpt2.")
        n = len(ranks) + len(special)
        self.name = name
        self.user, self.assistant, self.end = n, n + 1, n + 2
        special = {**special, **dict(zip(CONTROL, range(n, n + 3)))}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        self.vocab_size = VOCABULARY[name]

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def bytes(self, ids):
        """The bytes of ordinary tokens; control tokens and the padding of the vocabulary have none."""
        return b"".join(self.encoding.decode_single_token_bytes(i) for i in ids if i < self.user)

    def decode(self, ids):
        return self.bytes(ids).decode("utf-8", errors="replace")

    def render(self, messages):
        """[{"role", "content"}, ...] -> (ids, learn): learn marks what an assistant says, with <|end|>."""
        ids, learn = [], []
        for message in messages:
            content = self.encode(message["content"])
            if message["role"] == "user":
                ids += [self.user, *content]
                learn += [False] * (1 + len(content))
            else:
                ids += [self.assistant, *content, self.end]
                learn += [False] + [True] * (len(content) + 1)
        return ids, learn

    def prompt(self, messages, room):
        """ids up to where the assistant begins to speak; a prompt longer than `room` loses its beginning."""
        return (self.render(messages)[0] + [self.assistant])[-room:]


CHAT_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
                 "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def tokenizer_files(name, n_positions):
    """The tokenizer for transformers -> {file name: JSON}; apply_chat_template() there is render() here."""
    encoding = Tokenizer(name).encoding
    # GPT-2 writes bytes as printable characters: these as they are, the others from 256 on
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = dict(zip(plain + others, map(chr, [*plain, *range(256, 324)])))
    spell = lambda token: "".join(letters[b] for b in token)
    ranks = encoding._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # what were the last two? Merge as one does when encoding, lowest rank first
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    plainly = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **plainly}
             for text, i in sorted(encoding._special_tokens.items(), key=lambda item: item[1])]
    return {"tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges}},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|user|>",
            "model_max_length": n_positions, "chat_template": CHAT_TEMPLATE}}


# --- the network: GPT-2, Radford et al. 2019 ----------------------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_embd: int
    tokenizer: str
    checkpoint: bool = False  # recompute each block in backward


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, each (B, H, T, D). Without a mask (B, 1, 1, T) it is causal: padding is on
    the right, so the causal mask alone hides it from every real token."""
    # one fused kernel, which never writes the (T, T) matrix
    if mask is not None or q.device.type != "cpu" or q.size(2) > 512:
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=mask is None)
        return y.to(q.dtype)
    # On a CPU the fused kernel's backward takes up to four times as long as the formula, but for long rows.
    future = torch.ones(q.size(2), k.size(2), dtype=torch.bool).triu(1)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class Linear(nn.Linear):
    """x W^T + b, and where LoRA has added adapters + x A^T B^T: Hu et al. 2021, arXiv:2106.09685, eq. 3,
    alpha = rank."""
    packed = None

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def add_lora(self, rank, generator):
        """A (rank, in) random, B (out, rank) zero: at first nothing changes."""
        a = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        self.lora_a = nn.Parameter(a.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x):
        y = super().forward(x) if self.packed is None else multiply(x, self.packed, self.bias)
        return y if self.lora_a is None else y + F.linear(F.linear(x, self.lora_a), self.lora_b)


def multiply(x, packed, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@contextmanager
def packed(model, rows):
    """Decoding on a CPU, `rows` at a time: before each product oneDNN rearranges the matrix, which for a few
    rows takes longer than the product. Here it does so once, in a copy, and a token takes a half to a third
    of the time."""
    able = (model.device.type == "cpu" and not model.visits and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (model.wpe.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    modules = [x for x in model.modules() if isinstance(x, Linear)] if able else []
    for x in modules:
        x.packed = torch.ops.mkldnn._reorder_linear_weight(x.weight.detach(), rows)
    model.packed = torch.ops.mkldnn._reorder_linear_weight(model.wte.weight.detach(), rows) if able else None
    try:
        yield
    finally:
        for x in [model, *modules]:
            x.packed = None


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, *kv = qkv  # (B, H, T, D) each
        if cache is not None:
            kv = cache.update(layer, qkv[1:])
        y = attend(q, *kv, cache.mask if cache is not None else None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # as GPT-2 was trained


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, cache=None, layer=0, at=None):
        """at: (rows, columns) of the only positions that anybody reads afterwards, None: all."""
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x if at is None else x[at]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The names are the hub's, so that checkpoints need no table of translations."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)  # also the output matrix
        self.wpe = nn.Embedding(cfg.n_positions, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.visits = self.packed = None  # stream() puts the blocks' stand-ins here, packed() the head

    def initialize(self, generator):
        # Spreads that keep the size of a signal, whatever the width; at GPT-2's widths near its own 0.02,
        # with which a network of width 128 was slower to learn.
        for name, p in self.named_parameters():
            if name.startswith("w"):  # the first logits have a spread of 1/2, the first loss is ln V + 1/8
                nn.init.normal_(p, std=0.5 / math.sqrt(self.cfg.n_embd), generator=generator)
            elif p.dim() >= 2:
                # projections that write to the residual stream start smaller, by the number of writers
                writers = 2 * self.cfg.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=1 / math.sqrt(p.size(1) * writers), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def forward(self, idx, cache=None, at=None):
        """idx (B, T) -> hidden states after the final LayerNorm (B, T, C), or at `at` only (N, C)."""
        start = 0 if cache is None else cache.lengths[:, None]  # each row is at a place of its own
        positions = start + torch.arange(idx.size(1), device=idx.device)
        positions = positions.clamp(max=self.cfg.n_positions - 1)  # only padding can lie beyond
        x = lookup(self.wte.weight, idx) + self.wpe(positions)
        for layer, block in enumerate(self.visits or self.h):
            rest = cache, layer, at if layer + 1 == len(self.h) else None
            x = checkpoint(block, x, *rest) if self.cfg.checkpoint and cache is None else block(x, *rest)
        return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> float32 (..., V)."""
        with owner("logits"):
            if self.packed is not None:
                return multiply(hidden, self.packed).float()
            if self.visits is None:
                return F.linear(hidden, self.wte.weight).float()
            parts = [hidden @ w.T for _, w in pieces(self.wte.weight, 8192, self.device)]
            return torch.cat(parts, -1).float()

    @property
    def device(self):
        """Where idx has to be. (The embedding and the blocks may live elsewhere.)"""
        return self.wpe.weight.device


class Scorer(GPT):
    """A GPT with one number at each position instead of a vocabulary: the reward model and the critic."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.score = nn.Linear(cfg.n_embd, 1, bias=False)

    def initialize(self, generator):
        super().initialize(generator)
        return self.initialize_head(generator)

    def initialize_head(self, generator):
        # 1/sqrt(C + 1): Stiennon et al. 2020, arXiv:2009.01325; scores then start with a spread of about 1
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.cfg.n_embd + 1), generator=generator)
        return self

    def values(self, idx):
        """idx (B, T) -> float32 (B, T)."""
        return self.head(self(idx))

    def last(self, idx, lengths):
        """idx (B, T), right-padded, lengths (B,) -> the score at the last real token, float32 (B,)."""
        return self.head(self(idx, at=(torch.arange(len(idx), device=idx.device), lengths - 1)))

    def head(self, hidden):
        # bfloat16 has too few digits for a score
        return (hidden.float() @ self.score.weight.float().T).squeeze(-1)

    @torch.no_grad()
    def shift(self, by):
        """Add a constant to every score, by way of the last LayerNorm's bias: no file format has to know."""
        if isinstance(self, FSDPModule):
            self.reshard()
        w, bias = whole(local(self.score.weight), self.score.weight)[0].float(), self.ln_f.bias
        local(bias).add_(part_of((by * w / w.dot(w)).to(bias.dtype), bias))


# --- generation ---------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of the tokens so far, allocated once: (layers, 2, B, H, T, D)."""
    def __init__(self, cfg, lengths, T, like):
        shape = cfg.n_layer, 2, len(lengths), cfg.n_head, T, cfg.n_embd // cfg.n_head
        # A CPU attends twice as fast in float32. Zeros: masked values must be numbers, for 0 * nan is nan.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        with owner("KV cache"):
            self.kv = torch.zeros(shape, dtype=dtype, device=like.device)
        self.lengths = torch.zeros_like(lengths)
        self.mask = None

    def update(self, layer, kv):
        """New keys and values (2, B, H, T, D) -> all of them, likewise."""
        if self.mask is None:  # prefill: all rows at once, from position 0
            self.kv[layer, ..., :kv.size(3), :] = kv
            return kv
        self.kv[layer, :, self.rows, :, self.lengths] = kv[..., 0, :].transpose(0, 1).to(self.kv.dtype)
        return self.kv[layer, ..., :self.mask.size(-1), :]

    def advance(self, lengths):
        """The next call brings one token a row, at position `lengths` (B,)."""
        self.lengths, self.rows = lengths, torch.arange(len(lengths), device=lengths.device)
        positions = torch.arange(int(lengths.max()) + 1, device=lengths.device)
        self.mask = (positions <= lengths[:, None])[:, None, None, :]

    def keep(self, rows):
        """Forget the other rows; a layer at a time, in place, for a second cache might not fit."""
        n = int(rows.sum())
        for kv in self.kv:
            kv[:, :n] = kv[:, rows]
        self.kv = self.kv[:, :, :n]


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """logits (B, V), u (B,) uniform in [0, 1) -> token ids (B,). Temperature 0: the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:  # the smallest set of tokens that is top_p likely: Holtzman et al. 2019, arXiv:1904.09751
        probs, order = logits.softmax(-1).sort(descending=True)
        drop = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logits.size(-1) - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             on_token=None, u=None):
    """prompts: lists of ids, of any lengths -> replies: lists of ids, with the `end` token where it was
    reached.

    One prefill of the right-padded prompts, then one token a step at each row's own position. Every row has
    its own random numbers, so a reply does not depend on when its neighbours stop: u (B, max_new_tokens),
    uniform in [0, 1), from the generator if not given. on_token(row, id) sees tokens as they come. Raises
    ValueError if a prompt is empty or leaves no room for the reply.
    """
    cfg, device = model.cfg, model.device
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0 or longest + max_new_tokens > cfg.n_positions:
        raise ValueError(f"prompts of 1 to {cfg.n_positions - max_new_tokens} tokens fit, not {longest}")
    u = (torch.rand(len(prompts), max_new_tokens, generator=generator) if u is None else u).to(device)
    lengths = torch.tensor([len(p) for p in prompts]).to(device)
    idx = pad(prompts).to(device)
    cache = Cache(cfg, lengths, idx.size(1) + max_new_tokens, model.wpe.weight)
    hidden = model(idx, cache)[torch.arange(len(prompts), device=device), lengths - 1]

    replies = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # which reply each row of the cache belongs to
    with packed(model, len(prompts)):
        for step in range(max_new_tokens):
            with owner("logits"):
                token = sample(model.logits(hidden), u[rows, step], temperature, top_k, top_p)
            for row, t in zip(rows.tolist(), token.tolist()):
                replies[row].append(t)
                if on_token:
                    on_token(row, t)
            alive = token != end
            if step + 1 == max_new_tokens or not alive.any():
                break
            if not alive.all():  # rows that have ended leave the batch
                rows, token, lengths = rows[alive], token[alive], lengths[alive]
                cache.keep(alive)
            cache.advance(lengths)
            hidden = model(token[:, None], cache)[:, 0]
            lengths = lengths + 1
    return replies


def generate_many(model, prompts, max_new_tokens, end, seed, batch, temperature=1.0):
    """generate() for any number of prompts, in batches of similar length -> replies in their order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    starts = tqdm(range(0, len(order), batch), desc="generating", leave=False, disable=QUIET)
    with gathered(model):
        part = lambda i: generate(model, [prompts[r] for r in order[i:i + batch]], max_new_tokens, end,
                                  temperature, generator=rng(seed, i))
        parts = spread(part, starts)
    replies = [None] * len(prompts)
    for r, reply in zip(order, (reply for part in parts for reply in part)):
        replies[r] = reply
    return replies


def is_good(row, text):
    """Does the reply match the row's check in full? Training never asks, but with ppo.py --reward=check."""
    return re.fullmatch(row["check"], text) is not None


def gold_score(model, tokenizer, rows, max_new_tokens, seed, batch):
    """The share of sampled replies to `rows` that are good; None where no row has a check."""
    rows = [row for row in rows if "check" in row]
    if not rows:
        return None
    prompts = [tokenizer.prompt(row["prompt"], model.cfg.n_positions - max_new_tokens) for row in rows]
    replies = generate_many(model, prompts, max_new_tokens, tokenizer.end, seed, batch)
    return sum(is_good(row, tokenizer.decode(reply)) for row, reply in zip(rows, replies)) / len(rows)


# --- tensors that all stages need ---------------------------------------------------------------------------

def pad(rows, value=0, dtype=torch.long):
    """Lists of numbers -> (B, T), padded on the right, T a multiple of 8: with few different shapes, matrix
    products are planned once and reused, which makes a training step on a CPU a fifth faster."""
    T = -(-max(map(len, rows)) // 8) * 8
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows], dtype=dtype)


def masked_mean(x, mask):
    """The mean of x where mask is true, both (...). 0 where mask is empty, never 0/0."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def encode_demonstration(row, tokenizer, block_size):
    """A row of sft.jsonl -> [(idx, targets), ...]: targets[t] follows idx[t]; -1 where there is nothing to
    learn.

    Messages teach what the assistant says, and lose their beginning if they are too long. Text teaches all of
    itself, in as many windows as it takes.
    """
    if "text" in row:
        ids = [tokenizer.end, *tokenizer.encode(row["text"]), tokenizer.end]
        starts = range(0, len(ids) - 1, block_size)
        return [(ids[i:-1][:block_size], ids[i + 1:][:block_size]) for i in starts]
    ids, learn = tokenizer.render(row["messages"])
    targets = [i if l else -1 for i, l in zip(ids[1:], learn[1:])]
    return [(ids[:-1][-block_size:], targets[-block_size:])]


def negative_log_likelihood(model, examples, device):
    """[(idx, targets), ...] -> (sum over targets of -log p(target | what came before), their number).

    The caller divides, by the targets of its whole batch: then the size of a micro-batch cannot change the
    gradient.
    """
    idx, targets = (pad(column, fill).to(device) for column, fill in zip(zip(*examples), (0, -1)))
    logprobs, _ = token_logprobs(model(idx), model.wte.weight, targets)
    return -logprobs.sum(), int((targets >= 0).sum())


def cosine(step, cfg):
    """The learning rate of step `step`: a linear warm-up, then half a cosine down to a tenth."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def rng(seed, *place):
    """A generator that depends on the seed and the place alone: a resumed run needs no random states."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@functools.lru_cache(1)  # every step of an epoch asks for it
def batches(lengths, batch, seed, epoch):
    """lengths: a tuple -> lists of `batch` indices that cover all rows, in random order, each of similar
    length: little is padding.

    All are full: where `batch` does not divide the rows, the last one is filled up with rows from the first.
    """
    generator = rng(seed, "batches", epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order = list(islice(cycle(order), -(-len(order) // batch) * batch))
    pool = 50 * batch  # sort within pools only, so that the rows of a batch still differ from epoch to epoch
    for i in range(0, len(order), pool):
        order[i:i + pool] = sorted(order[i:i + pool], key=lambda r: lengths[r])
    out = [order[i:i + batch] for i in range(0, len(order), batch)]
    return [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]


def batch_at(step, lengths, batch, seed):
    """The rows of training step `step` (from 0): a function of the step alone, so resuming is trivial."""
    per_epoch = -(-len(lengths) // batch)
    return batches(lengths, batch, seed, step // per_epoch)[step % per_epoch]


# --- checkpoints: the hub's GPT-2 layout --------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "U8": torch.uint8}
# stored (in, out)
CONV1D = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"


def write_file(path, write):
    """write(temporary path), then rename: a kill or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"{path}: could not be written ({error}). The last good checkpoint is untouched; "
                         f"free some space and go on with --resume.") from None


def write_safetensors(path, tensors):
    """8 bytes of header length, a JSON header, raw bytes: https://huggingface.co/docs/safetensors"""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        dtype = next(k for k, v in DTYPES.items() if v == t.dtype)
        header[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors.values():
            f.write(t.contiguous().cpu().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """name -> tensor, memory-mapped: nothing is read before it is used."""
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(data, dtype=DTYPES[t["dtype"]], count=math.prod(t["shape"]),
                                       offset=start + t["data_offsets"][0]).view(t["shape"])
                for name, t in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError) as error:
        raise SystemExit(f"{path}: not a readable safetensors file ({error}).") from None


def merged(model):
    """model's state_dict() with LoRA's adapters added to the matrices, which become float32."""
    state = {name: whole(local(t), t) for name, t in model.state_dict().items()}
    for name in [name for name in state if name.endswith("lora_a")]:
        weight = name.replace("lora_a", "weight")
        detour = state.pop(name.replace("lora_a", "lora_b")).float() @ state.pop(name).float()
        state[weight] = state[weight].float() + detour
    return state


def save_model(folder, model):
    """config.json and model.safetensors, as transformers reads them."""
    cfg, scalar = model.cfg, isinstance(model, Scorer)
    config = {"model_type": "gpt2",
              "architectures": ["GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"],
              "vocab_size": cfg.vocab_size, "n_positions": cfg.n_positions, "n_ctx": cfg.n_positions,
              "n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tokenizer": cfg.tokenizer}
    tokenizer = Tokenizer(cfg.tokenizer)
    config |= {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
    # transformers reads the score at the last token that is not padding: padding must not be <|end|>
    config |= {"num_labels": 1, "pad_token_id": tokenizer.user} if scalar else {}
    tensors = {}
    for name, p in merged(model).items():
        name = name if name.startswith("score.") else "transformer." + name
        tensors[name] = p.T if name.endswith(CONV1D) else p
    if RANK:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", lambda path: write_safetensors(path, tensors))
    for name, content in {"config.json": config, **tokenizer_files(cfg.tokenizer, cfg.n_positions)}.items():
        write_file(folder / name, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


HUB = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
       "gpt2-xl": (48, 25, 1600)}  # layers, heads, width


def read_weights(folder):
    """name -> tensor from the files that the folder has: whole, sharded, PyTorch's own (no code runs)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if index.exists():
        tensors, files = {}, read_json(index).get("weight_map")
        require(isinstance(files, dict) and all(isinstance(file, str) for file in files.values()),
                f"{index}: no weight_map from keys to files.")
        for file in sorted(set(files.values())):
            tensors |= read_safetensors(folder / Path(file).name)
        return tensors
    try:
        return torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    except Exception as error:  # pickle's are many
        raise SystemExit(f"{folder}/pytorch_model.bin: not readable without running its code "
                         f"({type(error).__name__}).") from None


def read_json(path):
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise SystemExit(f"{path}: not readable as JSON ({error}).") from None
    require(isinstance(value, dict), f"{path}: not a JSON object.")
    return value


def read_config(folder):
    """A folder in the hub's layout -> the GPTConfig of its config.json."""
    folder = Path(folder)
    files = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
    if not (folder / "config.json").exists() or not any((folder / file).exists() for file in files):
        before = {"out/sft": "sft.py", "out/reward": "reward.py", "out/ppo": "ppo.py"}.get(str(folder))
        remedy = "It should hold config.json and model.safetensors."
        remedy = f'Run "python {before}" first.' if before else remedy
        raise SystemExit(f"{folder}: no checkpoint here. {remedy}")
    config = read_json(folder / "config.json")
    kind, activation = config.get("model_type"), config.get("activation_function", "gelu_new")
    if kind != "gpt2" or activation not in ("gelu_new", "gelu_pytorch_tanh"):  # two names of one function
        raise SystemExit(f"{folder}: a GPT-2 with gelu_new is needed, this is {kind} with {activation}.")
    tokenizer = config.get("tokenizer", "gpt2")
    require(tokenizer in VOCABULARY, f"{folder}: tokenizer {tokenizer} is unknown; tiny and gpt2 are there.")
    sizes = [config.get(name) for name in ("n_positions", "n_layer", "n_head", "n_embd")]
    require(all(isinstance(n, int) and 0 < n < 10**6 for n in sizes) and sizes[3] % sizes[2] == 0,
            f"{folder}/config.json: n_positions, n_layer, n_head, n_embd = {sizes}: not a GPT-2's sizes.")
    weights = sum(f.stat().st_size for f in folder.glob("*") if f.suffix in (".safetensors", ".bin")) / 2
    require(12 * sizes[1] * sizes[3] ** 2 <= weights,
            f"{folder}: {sizes[1]} layers of width {sizes[3]} (config.json) are more than model.safetensors "
            "holds.")
    return GPTConfig(VOCABULARY[tokenizer], *sizes, tokenizer)


def load_model(folder, cls=GPT, device="cpu", dtype=torch.float32, seed=0):
    """A folder in the hub's layout -> cls. A Scorer made from a language model gets a fresh head (drawn from
    `seed`).

    A vocabulary without room for the control tokens (GPT-2's own) grows: new rows are the mean of the old
    ones.
    """
    with first_alone():  # one download is enough
        folder = hub_folder(folder) if folder in HUB and not Path(folder).exists() else Path(folder)
    model, tensors = cls(read_config(folder)), read_weights(folder)
    want, have = model.state_dict(), {}
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("transformer.wte.weight", tensors.get("wte.weight"))
    require(head is None or embedding is None or torch.equal(head, embedding),
            f"{folder}: lm_head.weight differs from wte.weight; only GPT-2's tied head is known here.")
    for name, t in tensors.items():
        name = name.removeprefix("transformer.")
        if re.search(r"\.attn\.(bias|masked_bias)$", name) or name == "lm_head.weight":
            continue  # the causal mask as a buffer (not c_attn.bias!); the tied head
        if name == "wte.weight" and len(t) < model.cfg.vocab_size:
            mean = t.float().mean(0, keepdim=True).to(t.dtype)
            t = torch.cat([t, mean.expand(model.cfg.vocab_size - len(t), -1)])
        have[name] = t.T if name.endswith(CONV1D) else t
    if cls is Scorer and "score.weight" not in have:
        have["score.weight"] = model.initialize_head(rng(seed, "head")).score.weight.detach()
    if cls is GPT:
        have.pop("score.weight", None)
    wrong = [k for k in want.keys() | have.keys()
             if k not in want or k not in have or want[k].shape != have[k].shape]
    if wrong:
        raise SystemExit(f"{folder}: keys missing, unexpected or of another shape than config.json says: "
                         f"{', '.join(sorted(wrong)[:5])}.")
    model.load_state_dict(have)
    return model.to(device, dtype)


@owner("weights")
def make_model(cfg, cls, device, dtype):
    """--init -> (model, tokenizer): random weights of the size that the flags say, or a folder's.

    A dry run needs sizes only: no weights, no encoding (any tokenizer will do there).
    """
    scratch = cfg.tokenizer, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd
    if cfg.init == "scratch" and not cfg.dry_run:
        tokenizer = Tokenizer(cfg.tokenizer)
        model = cls(GPTConfig(tokenizer.vocab_size, *scratch[1:], tokenizer.name))
        model.initialize(rng(cfg.seed, "init"))
    elif not cfg.dry_run:
        model = load_model(cfg.init, cls, seed=cfg.seed)
        tokenizer = Tokenizer(model.cfg.tokenizer)
    else:
        name, *sizes = ("gpt2", 1024, *HUB[cfg.init]) if cfg.init in HUB else scratch
        known = cfg.init == "scratch" or cfg.init in HUB
        model = cls(GPTConfig(VOCABULARY[name], *sizes, name) if known else read_config(cfg.init))
        tokenizer = Tokenizer("tiny")
    require(cfg.block_size <= model.cfg.n_positions,
            f"--block_size={cfg.block_size}: {cfg.init} has {model.cfg.n_positions} positions.")
    return place(model.to(dtype), cfg, device), tokenizer


@owner("weights")
def place(model, cfg, device):
    """Where its weights live, and what learns: everything, or LoRA's adapters and a Scorer's head."""
    model.cfg.checkpoint = cfg.checkpoint or cfg.offload == "all"  # else the graph keeps what visits
    if cfg.lora_rank:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                module.add_lora(cfg.lora_rank, rng(cfg.seed, "lora", name))
        if isinstance(model, Scorer):
            model.score.requires_grad_()
    if cfg.offload == "all":
        stream(model, device)
    elif WORLD == 1:  # otherwise shard() brings a block at a time, or its part of it
        model.to(device)
    return model


@owner("weights")
def twin(model):
    """The network as it was before LoRA, frozen. Weights that do not learn are shared, the others copied."""
    memo = {id(p): nn.Parameter(p.detach().clone(), False) if p.requires_grad else p
            for p in model.parameters()}
    out = copy.deepcopy(model, memo | {id(model.visits): None})
    for module in out.modules():
        if isinstance(module, Linear):
            module.lora_a = module.lora_b = None
    if model.visits:
        stream(out, model.device)
    return out


# --- flags, device, log: how a script starts ----------------------------------------------------------------

def parse_flags(cls, argv=None):
    """A dataclass -> its flags. Every field is a flag of the same name; its trailing comment is its help."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=inspect.getmodule(cls).__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        kind = {"const": True, "nargs": "?", "type": to_bool} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name, default=f.default, metavar=f.type.__name__,
                            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"), **kind)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(cls)], 1)
        hint = f"Did you mean --{near[0]}?" if near else "Try --help."
        raise SystemExit(f"{unknown[0]}: no such flag. {hint}")
    return cls(**vars(known))


def to_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text}: true or false")
    return text.lower() in ("true", "1", "yes")


def require(condition, message):
    if not condition:
        raise SystemExit(message)


def check_common(cfg):
    """What the three stages refuse alike, before any compute is spent."""
    for name in ("steps", "batch", "block_size", "log_every", "eval_every", "save_every", "n_layer", "n_head",
                 "n_embd"):
        require(getattr(cfg, name) >= 1, f"--{name}={getattr(cfg, name)}: at least 1.")
    require(cfg.tokenizer in VOCABULARY, f"--tokenizer={cfg.tokenizer}: unknown. Choose tiny or gpt2.")
    for name in ("microbatch", "warmup", "weight_decay", "grad_clip", "seed", "lora_rank"):
        require(getattr(cfg, name) >= 0, f"--{name}={getattr(cfg, name)}: at least 0.")
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        require(f.type is not float or math.isfinite(value), f"--{f.name}={value}: not a finite number.")
    require(0 < cfg.lr < 1, f"--lr={cfg.lr}: between 0 and 1, often about 1e-4.")
    require(cfg.n_embd % cfg.n_head == 0, f"--n_embd={cfg.n_embd} does not divide by --n_head={cfg.n_head}.")
    require(cfg.offload in ("none", "optimizer", "all"), f"--offload={cfg.offload}: none, optimizer or all.")
    require(cfg.dtype in ("auto", "float32", "bfloat16"), f"--dtype={cfg.dtype}: auto, float32 or bfloat16.")
    require(cfg.microbatch == 0 or cfg.batch % cfg.microbatch == 0,
            f"--batch={cfg.batch} does not divide by --microbatch={cfg.microbatch}.")
    for name in ("init", "reward"):
        require(not hasattr(cfg, name) or Path(cfg.out).resolve() != Path(getattr(cfg, name)).resolve(),
                f"--out={cfg.out} would overwrite --{name}.")
    require(cfg.batch % WORLD == 0, f"--batch={cfg.batch} does not divide by {WORLD} processes.")
    require(WORLD == 1 or cfg.offload != "all" and not cfg.dry_run,
            "--offload=all and --dry_run are for one process; torchrun shards the weights instead.")


def pick_device(device, dtype):
    """("auto" or a name, likewise) -> (torch.device, torch.dtype); says what it chose and why."""
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        device = join(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device={device}: not usable here ({str(error).splitlines()[0]}).") from None
    kind = device.type
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        tells = kind == "cpu" and hasattr(torch.cpu, "get_capabilities")
        features = torch.cpu.get_capabilities() if tells else {}
        has_bf16 = features.get("avx512_bf16") or features.get("amx_bf16")
    found = f"the processor has {'' if has_bf16 else 'no '}bfloat16 in hardware"
    reason = found if dtype == "auto" else "asked for"
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16 else "float32"
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {device} ({name}), {dtype} ({reason})" + f", {WORLD} processes" * (WORLD > 1))
    return device, getattr(torch, dtype)


def memory_gb(device):
    """The peak: allocated on a GPU, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rehearse(cfg, iteration):
    """--dry_run: `iteration(cfg, device, dtype)` on tensors without data -> the log's only line."""
    with dry_run() as count:
        iteration(cfg, DEVICE, torch.float32 if cfg.dtype == "float32" else torch.bfloat16)
    result = count.report()
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out) / "log.jsonl", "a") as f:  # an earlier run's log stays
        print(json.dumps(result), file=f)
    return result


def adamw(model, cfg, **kwargs):
    """The optimizer that --offload asks for."""
    host = None if cfg.offload == "none" else "cpu"
    return OffloadedAdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, host=host, **kwargs)


def read_state(path):
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(state["step"], int) and isinstance(state["cfg"], dict):
            return state
        error = "another program's file"
    except Exception as caught:  # pickle's are many
        error = type(caught).__name__
    raise SystemExit(f"{path}: not a state to resume from ({error}). Delete it, or leave --resume, to begin "
                     "anew.")


class Run:
    """What a training run leaves behind: log.jsonl, state.pt and the model, each whole at every moment.

    state.pt alone decides a resume: it holds the 32-bit weights, the optimizer and the step; every random
    draw is a function of the seed and the step. Of many processes the first one writes.
    """
    MAY_CHANGE = {"resume", "log_every", "eval_every", "save_every", "trace"}  # no number depends on these

    def __init__(self, cfg):
        self.cfg, self.out = dataclasses.asdict(cfg), Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.state, self.start, self.signals = None, 0, 0
        state, log = self.out / "state.pt", self.out / "log.jsonl"
        self.clock = time.time()
        if cfg.resume and state.exists():
            self.state = read_state(state)
            self.start = self.state["step"]
            for name, was in self.state["cfg"].items():
                now = self.cfg.get(name)
                require(name in self.MAY_CHANGE or was == now,
                        f"--resume: {state} was made with --{name}={was}, not {now}. Use the same, or leave "
                        "--resume.")
            print(f"resuming {self.out} after step {self.start}")
        else:
            if cfg.resume:
                print(f"nothing to resume in {self.out}: starting at step 0")
            if not RANK:  # an earlier run's: a later --resume must not take it for this one
                state.unlink(missing_ok=True)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        kept = [line for line in lines if self._is_past(line)]
        if not RANK:
            write_file(log, lambda path: path.write_text("".join(line + "\n" for line in kept)))

    def _is_past(self, line):
        try:
            row = json.loads(line)
            return self.state is not None and row["step"] <= self.start and "final" not in row
        except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a kill
            return False

    def steps(self, name):
        """The steps that are left, with a bar where somebody looks."""
        total = self.cfg["steps"]
        return tqdm(range(self.start, total), name, initial=self.start, total=total, disable=QUIET)

    def check(self, step, loss):
        require(math.isfinite(loss), f"step {step + 1}: the loss is {loss}. Lower --lr or raise --warmup. "
                                     f"{self.out} keeps the last good checkpoint.")

    def log(self, **numbers):
        if RANK:
            return
        try:
            with open(self.out / "log.jsonl", "a") as f:
                print(json.dumps(numbers), file=f)
        except OSError as error:
            raise SystemExit(f"{self.out}/log.jsonl: could not be written ({error}). The last good "
                             "checkpoint is untouched; free some space and go on with --resume.") from None

    def save(self, step, model, **state):
        """state.pt first: the model's files can be made from it, not the other way round."""
        state = {"step": step, "cfg": self.cfg, **{k: v.state_dict() if hasattr(v, "state_dict") else v
                                                   for k, v in state.items()}}
        if not RANK:
            write_file(self.out / "state.pt", lambda path: torch.save(state, path))
        self.save_model(model)

    def save_model(self, model):
        save_model(self.out, model)

    def finish(self, step, **summary):
        """The last line of the log, which main() returns."""
        shown = " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
        print(f"{self.out}: {shown} | {time.time() - self.clock:.0f} s")
        self.log(step=step, **summary, final=True)
        leave()
        return summary

    def __enter__(self):
        """Ctrl-C finishes the step and saves; a second one stops at once."""
        def handler(*_):
            self.signals += 1
            if self.signals > 1:
                raise KeyboardInterrupt
            if not RANK:
                print("\nfinishing this step, then saving; Ctrl-C again to stop at once", file=sys.stderr)
        try:
            self.old_handler = signal.signal(signal.SIGINT, handler)
        except ValueError:  # not in the main thread: nobody presses keys there
            self.old_handler = None
        return self

    def __exit__(self, *_):
        if self.old_handler:
            signal.signal(signal.SIGINT, self.old_handler)

    def interrupted(self):
        """Has any process been told to stop?"""
        return summed(self.signals)[0] > 0

    def stop_if_interrupted(self):
        if self.interrupted():
            raise SystemExit("stopped and saved. The same command with --resume goes on.")


# --- chat ---------------------------------------------------------------------------------------------------

@dataclass(slots=True)
class Config:
    model: str = "out/ppo"      # a checkpoint folder
    compare: str = ""           # a second folder, to answer beside the first
    reward: str = ""            # stage 2's folder, to score what is said
    prompt: str = ""            # answer this and leave
    max_new_tokens: int = 0     # 0: half of the context
    temperature: float = 0.7    # 0: always the most likely token
    top_k: int = 0              # sample among the k most likely tokens; 0: all
    top_p: float = 1.0          # sample among the most likely tokens that make up this probability
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def reply(model, tokenizer, messages, cfg, generator):
    """Streams the assistant's next turn to the terminal and returns its text. Ctrl-C ends it."""
    new, said = cfg.max_new_tokens or model.cfg.n_positions // 2, []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens

    def show(_, token):
        said.append(token)
        print(decoder.decode(tokenizer.bytes([token])), end="", flush=True)
    prompt = tokenizer.prompt(messages, model.cfg.n_positions - new)  # a full context loses its oldest part
    try:
        generate(model, [prompt], new, tokenizer.end, cfg.temperature, cfg.top_k, cfg.top_p, generator, show)
    except KeyboardInterrupt:
        pass
    print(decoder.decode(b"", final=True))
    return tokenizer.decode(said)


@torch.no_grad()
def score_of(judge, tokenizer, messages):
    """What the reward model makes of a dialogue's last turn."""
    ids = tokenizer.render(messages)[0][-judge.cfg.n_positions:]
    idx, length = torch.tensor([ids]).to(judge.device), torch.tensor([len(ids)]).to(judge.device)
    return judge.last(idx, length).item()


def main(cfg):
    require(0 <= cfg.temperature, f"--temperature={cfg.temperature}: at least 0.")
    require(0 < cfg.top_p <= 1, f"--top_p={cfg.top_p}: above 0, at most 1.")
    device, dtype = pick_device(cfg.device, cfg.dtype)
    folders = [folder for folder in (cfg.model, cfg.compare) if folder]
    models = [load_model(folder, GPT, device, dtype) for folder in folders]
    judge = load_model(cfg.reward, Scorer, device, dtype) if cfg.reward else None
    names = {net.cfg.tokenizer for net in [*models, *filter(None, [judge])]}
    require(len(names) == 1, f"--compare, --reward: their tokenizers differ ({', '.join(sorted(names))}).")
    require(cfg.max_new_tokens < min(net.cfg.n_positions for net in models),
            f"--max_new_tokens={cfg.max_new_tokens}: the context has {models[0].cfg.n_positions} positions.")
    tokenizer, generator, dialogues = Tokenizer(names.pop()), rng(cfg.seed), [[] for _ in models]

    def answer(text):
        for folder, net, messages in zip(folders, models, dialogues):
            messages.append({"role": "user", "content": text})
            if len(models) > 1:
                print(f"{folder}: ", end="")
            messages.append({"role": "assistant", "content": reply(net, tokenizer, messages, cfg, generator)})
            if judge:
                print(f"    (score {score_of(judge, tokenizer, messages):+.2f})")
        return dialogues[0][-1]["content"]
    if cfg.prompt:
        return answer(cfg.prompt)
    try:
        import readline  # noqa: F401  (arrow keys, where Python has it)
    except ImportError:
        pass
    print("/reset forgets, /save FILE keeps the dialogue, Ctrl-C ends a reply, Ctrl-D leaves.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, file = text.partition(" ")
        if command == "/reset":
            dialogues[:] = [[] for _ in models]
        elif command == "/save":
            try:
                said = json.dumps(dialogues, indent=2, ensure_ascii=False)
                Path(file or "chat.json").write_text(said + "\n")
                print(f"saved to {file or 'chat.json'}")
            except OSError as error:
                print(f"{file}: could not be written ({error.strerror})")
        elif text:
            answer(text)


if __name__ == "__main__":
    main(parse_flags(Config))
