"""Every claim, checked. A test's name is the claim; test_bug_NN are real bugs of other code bases, by name.

    python test_all.py                  # all, in the order of this file; pytest test_all.py does the same
    python test_all.py bug_05 -k hub    # those with such a part in their names; -f: stop at the first failure
    python test_all.py readme           # all commands of README and docs, cut short, and the exercises
    FUZZ=10000 python test_all.py fuzz  # damage files and flags in so many ways
"""
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import html.parser
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import unittest
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import memory
import model as m
import ppo
import reward
import sft
from data import batches, chat, dry_run, evaluation, examples, hub, kernels, prepare, tokenizer
from data import bpe as data_bpe
from data import layouts as data_layouts
from data import run as data_run
from data.batches import pad, rng
from data.follow import make as follow
from data.tiny import make
from data.tokenizer import Tokenizer
from memory import OffloadedAdamW, checkpoint, token_logprobs
from model import GPT, GPTConfig, Scorer, generate

torch.set_num_threads(1)  # two threads gain nothing on tests this small, and wait for each other under load
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
ROOT, CPU, TINY = Path(__file__).parent, torch.device("cpu"), Tokenizer("tiny")
ASSISTANT, = TINY.header("assistant", first=False)


# --- small things to test with ------------------------------------------------------------------------------

FAMILY = {}  # what the networks of tiny() are besides
LLAMA = {"model_type": "llama", "n_kv_head": 2, "head_dim": 12, "n_inner": 40, "tied": False,
         "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16}}
QWEN3 = {"model_type": "qwen3", "n_kv_head": 1, "head_dim": 10, "n_inner": 40, "norm_eps": 1e-6,
         "rope_theta": 1e6}

def in_every_family(test):
    """Run a test with GPT-2s, with Llamas and with Qwen3s."""
    @functools.wraps(test)
    def thrice(*args, **kwargs):
        for family in ({}, LLAMA, QWEN3):
            with mock.patch.dict(FAMILY, family):
                test(*args, **kwargs)
    return thrice

def tiny(cls=GPT, n_layer=2, n_embd=32, seed=0, spread=0.2, n_positions=64, **changes):
    """A small float32 model; spread is wider than at a real start, so that mistakes show."""
    cfg = dataclasses.replace(GPTConfig(TINY.vocab_size, n_positions, n_layer, 4, n_embd, "tiny"),
                              **{"head_dim": n_embd // 4} | FAMILY | changes)
    net = cls(cfg).initialize(rng(seed))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "score" not in name:
                p.add_(spread * torch.randn(p.shape, generator=rng(seed, name)))
    return net

random_ids = lambda *shape, seed=0: torch.randint(3, 1000, shape, generator=rng(seed, "ids"))
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
logits = lambda net, ids: net.logits(net(torch.tensor([ids])))[0]  # of one row: (tokens, vocabulary)
greedy = lambda net, prompts, n, end=-1: generate(net, prompts, n, end, temperature=0)
weights_of = lambda *nets: torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
save = lambda folder, net: hub.write(folder, *m.exported(net))
jsonl = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
log = lambda folder: jsonl(folder / "log.jsonl")

def apart(a, b):
    """The largest distance between two tensors, or numbers."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()

def close(a, b, tolerance=1e-5):
    assert apart(a, b) <= tolerance, f"{apart(a, b)} apart, more than {tolerance}: {a}, {b}"

def quiet(function, *args, **kwargs):
    """-> (result, what was printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*args, **kwargs)
    return result, out.getvalue()

def refuses(call, *fragments, kind=SystemExit):
    """`call` stops with one clear message that holds all fragments."""
    try:
        quiet(call)
    except kind as error:
        assert all(fragment in str(error) for fragment in fragments), (fragments, str(error))
    else:
        raise AssertionError(f"not refused: {fragments}")

def write_data(folder):
    """A miniature data set, once: everybody asks for a colour, and red is right."""
    if folder.exists():
        return str(folder)
    folder.mkdir(parents=True)
    things = "rose poppy cherry ruby brick tomato strawberry fire sunset lobster".split()
    questions = [[user(f"What colour is the {things[i % 10]} number {i}?")] for i in range(60)]
    answers = {"chosen": "It is red.", "rejected": "It is blue.", "agreement": 0.9, "skill": "colour"}
    said = [assistant(answers["chosen" if i % 3 else "rejected"]) for i in range(60)]
    for kind, rows in {"sft": [{"messages": [*q, reply]} for q, reply in zip(questions, said)],
                       "preferences": [{"prompt": q, **answers} for q in questions],
                       "prompts": [{"prompt": q, "right": ".*red.*", "check": "It is red\\."}
                                   for q in questions]}.items():
        for name, part in ((kind, rows[:48]), (f"{kind}.val", rows[48:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder)

def small(stage, root, **changes):
    """A stage's Config that runs in about a second, on the miniature data."""
    defaults = dict(data=changes.get("data") or write_data(root / "data"), device="cpu", dtype="float32",
                    out=str(root / "out" / stage.__name__), block_size=64, steps=6, batch=8, n_layer=2,
                    n_head=4, n_embd=32, save_every=2, eval_every=3, log_every=1)
    if stage is not sft:
        defaults["init"] = str(root / "out/sft")
    if stage is ppo:
        defaults |= {"reward": str(root / "out/reward"), "minibatch": 4, "epochs": 2, "max_new_tokens": 12,
                     "best_of_n": 2}
    return stage.Config(**defaults | changes)

def run(stage, root, **changes):
    """-> (result, what was printed) of a whole stage."""
    return quiet(stage.main, small(stage, root, **changes))

def run_all(root, **changes):
    """-> {stage: result}."""
    return {stage.__name__: run(stage, root, **changes)[0] for stage in (sft, reward, ppo)}

def a_rollout(**changes):
    """(cfg, models, batch) of four small networks and real rollouts."""
    models = ppo.Models(tiny(), tiny(), tiny(Scorer, seed=1), tiny(Scorer, seed=1))
    cfg = ppo.Config(**dict(batch=8, minibatch=4, max_new_tokens=10, temperature=1.0, epochs=1) | changes)
    rows = [{"ids": random_ids(3 + i, seed=i).tolist()} for i in range(8)]
    return cfg, models, ppo.rollout(0, rows, models, TINY, cfg, kl_coef=0.05)

def update(cfg, models, batch, lr=1e-3, demonstrations=None, **changes):
    """-> statistics."""
    adams = {name: OffloadedAdamW(getattr(models, name).parameters(), lr, **changes)
             for name in ("actor", "critic")}
    return ppo.update(0, batch, models, adams, lr, demonstrations, cfg)

def values_of(net, idx):
    """A Scorer's number at each position."""
    return net.head(net(idx))

def watched(net, prompts, n, end=-1):
    """-> (greedy replies, (rows, tokens) of each forward pass)."""
    with mock.patch.object(GPT, "forward", autospec=True, side_effect=GPT.forward) as spy:
        return greedy(net, prompts, n, end), [tuple(call.args[1].shape) for call in spy.call_args_list]

def gpt2():
    try:
        return Tokenizer("gpt2")
    except SystemExit:
        raise unittest.SkipTest("no GPT-2 encoding: set TIKTOKEN_CACHE_DIR, or allow a download") from None


# --- the real bugs of others, numbered as in the list of known bugs -----------------------------------------
# Each test runs the production code, then the mistake in a line or two, and shows that it tells them apart.

def test_bug_01_ratio_is_not_one_on_the_first_minibatch():
    # huggingface/trl#454, jingyaogong/minimind#814, DeepSpeed-Chat's README
    cfg, models, batch = a_rollout()
    assert update(cfg, models, batch)["ratio_first"] == 1.0
    actor, prompts, replies = tiny(), batch["prompts"], batch["replies"]  # before the update
    new, _ = m.policy_logprobs(actor, prompts, replies)
    assert torch.equal(new, batch["logprobs"])
    targets = torch.tensor(sum(replies, []))
    dropped = F.dropout(m.reply_states(actor, prompts, replies), 0.1)[:len(targets)]  # the mistake
    old, _ = token_logprobs(dropped, actor.wte.weight, targets)
    assert ((new[batch["mask"]] - old).exp() - 1).abs().max() > 0.01

def test_bug_02_padding_shifts_positions():  # CarperAI/trlx#509, OpenRLHF/OpenRLHF#217, nnsight#672
    net, prompts = tiny(), [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    assert greedy(net, prompts, 8) == [greedy(net, [p], 8)[0] for p in prompts]
    padded, plain = (logits(net, ids)[-1].softmax(-1) for ids in ([0, 0, 0, 0, 11, 12], [11, 12]))
    assert (padded - plain).abs().sum() / 2 > 0.1  # the mistake: padding on the left

def test_bug_03_sampling_distribution_is_not_the_logprob_distribution():
    # minChatGPT (top-k), minimind (temperature)
    net, prompt, tokens = tiny(spread=0.1), [5, 6, 7], [[i] for i in range(TINY.vocab_size)]
    replies = generate(net, [prompt] * 4000, 1, end=-1, temperature=0.6, generator=rng(0))
    def entropies(temperature):  # of the samples, and of the distribution
        logprobs, exact = m.policy_logprobs(net, [prompt] * len(tokens), tokens, temperature, entropy=True)
        return -logprobs[torch.tensor(replies)].mean(), exact[0, 0]
    close(*entropies(0.6), 0.05)
    assert apart(*entropies(1.0)) > 0.15  # the mistake

def test_bug_04_kl_with_the_wrong_sign_or_partner():
    # Colossal-AI until 75c538903; lucidrains/PaLM-rlhf-pytorch#38, #41, #43
    mask, likelier, reference = torch.tensor([[[1, 1]], [[-1, -1]], [[-3, -1]]])
    close(ppo.token_rewards(torch.zeros(1), likelier, reference, mask.bool(), 0.1), [[-0.2, 0.0]], 1e-6)
    p, q = torch.randn(2, 5000, generator=rng(0)).log_softmax(1)
    exact = (p.exp() * (p - q)).sum()
    assert (ppo.k3(p, q) >= 0).all()
    close((p.exp() * ppo.k3(p, q)).sum(), exact, 5e-5)
    assert apart((p.exp() * ppo.k3(q, p)).sum(), exact) > 0.01  # the mistake: swapped

def test_bug_05_padding_leaks_into_returns():  # natolambert/rlhf-book#216
    values, rewards, logprobs = torch.randn(3, 3, 6, generator=rng(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    poison, gae = torch.where(mask, 0.0, 1e6), lambda values: ppo.gae(rewards * mask, values, mask, 1.0, 0.95)
    clean = gae(values * mask)
    white = ppo.whiten(clean, mask)
    assert torch.equal(gae(values + poison) * mask, clean)
    close(ppo.whiten(clean + poison, mask), white)
    close([white[mask].mean(), white[mask].std(unbiased=False)], [0, 1], 5e-6)
    assert apart(((clean - clean.mean()) / clean.std())[mask], white[mask]) > 0.1  # the mistake
    for loss in (lambda x: ppo.policy_loss(x, x.detach() * 0.9, white, mask, 0.2)[0],
                 lambda x: ppo.value_loss(x, x.detach() * 0.9, clean, mask, 0.2)):
        close(loss(logprobs), loss(torch.where(mask, logprobs, 7.0)))

def test_bug_06_the_score_lands_on_the_first_pad():  # huggingface/trl#3750, microsoft/DeepSpeedExamples#672
    rows, replies = [{"ids": [5, 6]}, {"ids": [7]}], [[8, TINY.end], [9, 10, 11, TINY.end]]
    mask = ppo.as_batch(rows, replies, TINY.end, CPU)["mask"]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    zeros = torch.zeros(mask.shape)
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0]), zeros, zeros, mask, 0.1)
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]  # where each reply's `end` stands
    assert mask[:, -1].tolist() == [False, True]  # the mistake: the last column, whatever stands there

def test_bug_07_the_reward_model_reads_prompt_and_padding():  # Colossal-AI until 7b9b86441; ColossalAI#4475
    net, rows = tiny(Scorer), [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    scores, values = net.scores([[row] for row in rows]), values_of(net, pad(rows))
    close(scores, torch.cat([net.scores([[row]]) for row in rows]))
    close(scores, values[[0, 1], [2, 5]])
    assert apart(values.mean(1), scores) > 0.01  # the mistake

def test_bug_08_the_prompt_mask_is_lost_on_the_way_to_the_loss():  # karpathy/nanochat#570
    row = {"messages": [user("What is 2 plus 3?"), assistant("5."), user("And 1 plus 1?"), assistant("2.")]}
    net, [(idx, targets)] = tiny(), tokenizer.encode_demonstration(row, TINY, 64)
    loss = m.negative_log_likelihood(net, [(idx, targets)], CPU).sum()
    spoken = [*TINY.encode("5."), TINY.end, *TINY.encode("2."), TINY.end]
    assert [t for t in targets if t >= 0] == spoken
    assert tokenizer.count_targets([(idx, targets)]) == len(spoken)
    every = F.cross_entropy(logits(net, idx), torch.tensor([*idx[1:], TINY.end]), reduction="none")
    close(loss, every[torch.tensor(targets) >= 0].sum(), 5e-4)
    assert every.sum() - loss > 1  # the mistake: all tokens count

def test_bug_09_an_all_masked_batch_gives_nan():
    # karpathy/nanochat#590; Colossal-AI's labels[-0:], fixed in c5239840e
    x, nothing, net = torch.ones(4), torch.zeros(4, dtype=torch.bool), tiny()
    assert ((x * nothing).sum() / nothing.sum()).isnan()  # the mistake
    assert ppo.masked_mean(x, nothing) == 0 and ppo.masked_mean(3 * x, torch.arange(4) == 2) == 3
    loss = m.negative_log_likelihood(net, [([5, 6], [-1, -1])], CPU).sum()
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)

def test_bug_10_pad_equals_end_so_the_model_never_learns_to_stop():  # huggingface/trl#1623
    [(_, targets)] = tokenizer.encode_demonstration({"messages": [user("Hi"), assistant("Hello.")]}, TINY, 64)
    batch = ppo.as_batch([{"ids": [5]}], [[6, TINY.end]], TINY.end, CPU)
    assert targets[-1] == TINY.end  # the mistake: -1 wherever `end` is, because padding is the same token
    assert batch["ended"].all() and batch["mask"].tolist() == [[True, True]]  # the policy learns to end, too

def test_bug_11_exact_gelu_on_weights_trained_with_tanh():  # karpathy/nanoGPT#2, #274
    mlp, x = tiny().h[0].mlp, 2 * torch.randn(3, 32, generator=rng(0))
    h = mlp.c_fc(x)
    by_hand = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    close(mlp(x), mlp.c_proj(by_hand))
    assert apart(mlp(x), mlp.c_proj(F.gelu(h))) > 1e-5  # the mistake

@in_every_family
def test_bug_12_the_cache_changes_the_output_or_is_silently_lost():
    # karpathy/nanoGPT#613; Colossal-AI 02-15 to 04-26 2023
    net, prompts = tiny(), [[5, 6, 7], [8, 9, 10, 11, 12]]
    replies, shapes = watched(net, prompts, 12)
    assert [tokens for _, tokens in shapes] == [8] + [1] * 11  # a lost cache would feed ever longer rows
    for prompt, reply in zip(prompts, replies):
        assert reply == [logits(net, prompt + reply[:i])[-1].argmax() for i in range(12)]
    alone, after = (net(torch.tensor([ids]))[0, -1] for ids in (replies[0][:1], prompts[0] + replies[0][:1]))
    assert apart(alone, after) > 0.1  # the mistake: the new token without its past

def test_bug_13_gradients_clipped_before_backward_and_equal_betas():  # minChatGPT
    def train(grad_clip, betas=(0.9, 0.95)):
        w = nn.Parameter(torch.ones(2, 2))
        adam = OffloadedAdamW([w], 0.1, betas)
        for slope in (100, 1, 1, 1):
            (slope * w.sum()).backward()
            norm = adam.step(0.1, grad_clip)
        return w.detach(), norm, {group["betas"] for group in adam.adamw.param_groups}
    (clipped, norm, betas), (plain, *_) = train(0.5), train(0)
    assert betas == {(0.9, 0.95)}
    close(norm, 2.0, 5e-6)  # of the last step's gradient, before clipping
    assert apart(clipped, plain) > 1e-3  # the mistake: clipping what is not there yet
    assert apart(plain, train(0, betas=(0.9, 0.9))[0]) > 1e-3  # the mistake

def test_bug_14_offloaded_adamw_with_another_epsilon_or_moments_that_move():  # GRPO-Zero; pytorch#3658
    def trained(step_of):
        w = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        step = step_of([w])
        for i in range(5):
            (w ** 2).sum().mul(1e-3 * (i + 1)).backward()
            step()
            w.grad = None
        return w.detach()
    ours = trained(lambda ps: partial(OffloadedAdamW(ps, 0.01, eps=1e-3, weight_decay=0.1).step, 0.01))
    torchs = lambda eps: trained(lambda ps: torch.optim.AdamW(ps, 0.01, eps=eps, weight_decay=0.1).step)
    close(ours, torchs(1e-3), 1e-6)
    assert apart(ours, torchs(math.sqrt(1e-3))) > 1e-4  # the mistake: sqrt(v + eps), at v = 0 sqrt(eps)
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    adam, plain = OffloadedAdamW([w], 0.1), torch.optim.AdamW([w], 0.1)
    (w * 1.234).sum().backward()
    adam.step(0.1)
    before, moment = adam.states[0]["exp_avg"], adam.states[0]["exp_avg"].clone()
    adam.load_state_dict({name: t.clone() for name, t in adam.state_dict().items()})
    after = adam.states[0]["exp_avg"]
    assert (after.dtype, after.data_ptr()) == (torch.float32, before.data_ptr())
    assert torch.equal(after, moment)
    state = {0: {"step": torch.ones(()), "exp_avg": moment, "exp_avg_sq": moment}}
    plain.load_state_dict(plain.state_dict() | {"state": state})
    assert plain.state[w]["exp_avg"].dtype == torch.bfloat16  # the mistake: moments follow the weights

def test_bug_15_stage_3_never_loads_stage_2s_model(tmp_path):  # ColossalAI#3011
    policy, scorer, idx = tiny(seed=1), tiny(Scorer, seed=2), random_ids(2, 9)
    save(tmp_path / "sft", policy)
    save(tmp_path / "reward", scorer)
    cfg = ppo.Config(init=str(tmp_path / "sft"), reward=str(tmp_path / "reward"), block_size=64)
    (actor, reference, critic, reward_model), _ = ppo.load_models(cfg, CPU, torch.float32)
    assert all(torch.equal(net(idx), policy(idx)) for net in (actor, reference))
    assert all(torch.equal(values_of(net, idx), values_of(scorer, idx)) for net in (reward_model, critic))
    assert apart(values_of(tiny(Scorer, seed=3), idx), values_of(scorer, idx)) > 0.1  # the mistake: fresh
    assert actor.wte.weight.data_ptr() != reference.wte.weight.data_ptr()
    cfg.reward = str(tmp_path / "nothing")
    refuses(lambda: ppo.load_models(cfg, CPU, torch.float32), "no checkpoint here")

def test_bug_16_ptx_from_different_batches():  # Colossal-AI until 62f4e2eb0
    rows = [{"messages": [user("Hello"), assistant(f"{i} and {i * i}")]} for i in range(1, 20)]
    demonstrations = [e for row in rows for e in tokenizer.encode_demonstration(row, TINY, 64)]
    losses, follows = [], lambda idx, targets: all(t == i for i, t in zip(idx[1:], targets) if t >= 0)
    for microbatch in (0, 2):
        cfg, models, batch = a_rollout(ptx_coef=0.5, microbatch=microbatch)
        with mock.patch.object(ppo, "negative_log_likelihood", wraps=ppo.negative_log_likelihood) as spy:
            losses.append(update(cfg, models, batch, demonstrations=demonstrations)["ptx_loss"])
        seen = [row for call in spy.call_args_list for row in call.args[1]]
        assert seen and all(len(i) == len(t) and follows(i, t) for i, t in seen)
    close(*losses, 5e-5)  # micro-batches change no sum
    assert losses[0] > 0
    assert not all(follows(i, t) for (i, _), (_, t) in zip(demonstrations, demonstrations[1:]))  # the mistake

def test_bug_17_lora_that_reaches_only_the_head():
    # Colossal-AI on GPT-2: it looked for nn.Linear, the weights are Conv1D
    net, cfg = tiny(), sft.Config(lora_rank=3)
    params = dict(m.setup_training(net, cfg, CPU).named_parameters())
    learns = {name: p for name, p in params.items() if p.requires_grad}
    matrices = {n: p for n, p in params.items() if p.dim() == 2 and n.startswith("h.") and "lora" not in n}
    assert len(matrices) == 2 * 4  # c_attn, c_proj, c_fc, c_proj in each of two blocks
    assert set(learns) == {name.replace("weight", ab) for name in matrices for ab in ("lora_a", "lora_b")}
    assert sum(p.numel() for p in learns.values()) == sum(3 * sum(p.shape) for p in matrices.values())
    optimizer, before = memory.make_optimizer(net, cfg), net(random_ids(1, 8))
    for _ in range(2):  # at the first step B is 0, so A's gradient is, too
        m.negative_log_likelihood(net, [([5, 6, 7], [6, 7, 8])], CPU).sum().backward()
        optimizer.step(0.1)
    assert all((p != 0).any() for name, p in params.items() if "lora_b" in name)
    assert not torch.equal(net(random_ids(1, 8)), before)
    head = nn.ModuleDict({"h": net.h, "score": nn.Linear(32, 1)})  # the trunk's are of another type
    assert [n for n, x in head.named_modules() if type(x) is nn.Linear] == ["score"]  # the mistake

def test_bug_18_double_softmax_in_the_reward_loss():  # nanoChatGPT
    net, margin = tiny(Scorer), torch.tensor([2.0, -1.0])
    loss = torch.stack([reward.bradley_terry(x, torch.zeros(1))[0] for x in margin.view(2, 1)])
    close(loss, torch.log1p((-margin).exp()))
    twice = -torch.stack([margin, 0 * margin], 1).softmax(1).log_softmax(1)[:, 0]  # the mistake
    assert apart(twice, loss) > 0.1
    chosen, rejected = reward.score_pairs(net, [([], [5, 6], [7, 8, 9])])
    close(chosen - rejected, net.scores([[[5, 6]]]) - net.scores([[[7, 8, 9]]]))

def test_bug_19_a_square_weight_that_nobody_transposed(tmp_path):
    net, idx, path = tiny(), random_ids(2, 7), tmp_path / "model.safetensors"
    save(tmp_path, net)
    stored = {k: v.clone() for k, v in hub.read_safetensors(path).items()}
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(stored[square], net.h[0].attn.c_proj.weight.T)  # the hub keeps (in, out)
    stored["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # old files' causal mask
    hub.write_safetensors(path, stored)
    assert torch.equal(m.load_model(tmp_path)(idx), net(idx))
    stored[square] = stored[square].T.contiguous()  # the mistake
    hub.write_safetensors(path, stored)
    assert apart(m.load_model(tmp_path)(idx), net(idx)) > 0.01

def test_bug_20_logged_loss_is_the_last_micro_batch_only(tmp_path):  # karpathy/nanoGPT#207
    logged = []
    for microbatch in (0, 2):
        run(sft, tmp_path, microbatch=microbatch, steps=3, out=str(tmp_path / f"out{microbatch}"))
        logged.append([row["loss"] for row in log(tmp_path / f"out{microbatch}") if "loss" in row])
    close(*logged, 5e-5)
    first, last = m.negative_log_likelihood(tiny(), [([5, 6], [6, 7]), ([8], [9])], CPU).sum(1)
    assert apart(last, first + last) > 5e-4  # the mistake

def test_bug_21_a_group_whose_scores_are_equal():
    # NVIDIA-NeMo/RL#4161, huggingface/trl#6365: its deviation is 0, or rounding
    cfg, models, _ = a_rollout(group=4, group_norm=True, missing_eos_penalty=0.0)
    rows = [{"ids": [5, 6 + i], "check": "-", "prompt": [user("?")]} for i in (0, 1) for _ in range(4)]
    models = models._replace(reference=tiny(seed=2), critic=None, reward_model=None)
    batch = ppo.rollout(0, rows, models, TINY, cfg, kl_coef=1e-3)
    assert batch["scores"].eq(0).all() and ppo.rollout_statistics(batch)["groups_without_signal"] == 1
    assert batch["advantages"].eq(0).all() and not batch["signal"].any()
    assert (torch.zeros(4) / torch.zeros(4).std()).isnan().all()  # the mistake, alone
    # and beside a KL that costs a thousandth: noise as loud as a reward
    assert ppo.group_advantages(batch["rewards"].sum(1), 4, True).abs().max() > 1

def test_bug_22_groups_that_are_not_those_of_one_prompt():  # XU-YIJIE/grpo-flat#2
    returns = torch.tensor([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])  # an easy prompt and a hard one
    for norm, want in ((True, [-1, 0, 1]), (False, [-1.5, 0, 1.5])):
        close(ppo.group_advantages(returns, 3, norm), 2 * want, 1e-3)
    mistake = (returns - returns.mean()) / returns.std()
    assert (mistake[:3] < 0).all() and (mistake[3:] > 0).all()
    cfg = ppo.Config(group=4, minibatch=8, epochs=2)
    for part in ppo.minibatches(16, cfg, rng(0)):  # a gradient step takes whole groups
        assert sorted(Counter((part // 4).tolist()).values()) == [4, 4]

def test_bug_23_a_leave_one_out_mean_that_includes_the_reply():  # areal-project/AReaL#354
    returns = torch.randn(5, generator=rng(0))
    alone = [r - torch.cat([returns[:i], returns[i + 1:]]).mean() for i, r in enumerate(returns)]
    close(ppo.group_advantages(returns, 5, False), torch.stack(alone))
    assert apart(returns - returns.mean(), torch.stack(alone)) > 0.1  # the mistake: a fifth of it is missing

def test_bug_24_dividing_by_a_replys_own_length():
    # huggingface/trl#3138, sail-sg/understand-r1-zero#10: a long bad reply is punished less for each token
    logprobs, mask = torch.zeros(2, 8, requires_grad=True), torch.arange(8) < torch.tensor([[2], [8]])
    ppo.policy_loss(logprobs, torch.zeros(2, 8), -1.0 * mask, mask, 0.2)[0].backward()
    assert (logprobs.grad == mask).all()
    logprobs.grad = None
    ((-logprobs.exp() * -1.0 * mask).sum(1) / mask.sum(1)).sum().backward()  # the mistake
    assert logprobs.grad[0, 0] == 4 * logprobs.grad[1, 0]

def test_bug_25_dpo_that_divides_by_length_or_misses_the_end():
    # OpenRLHF/OpenRLHF#235 (the prompt), 0xallam/Direct-Preference-Optimization#4 (padding),
    # jingyaogong/minimind#298 (a mean over the padded length), huggingface/trl#1239 (replies do not stop)
    policy, reference, end = tiny(), tiny(seed=1), TINY.end
    pairs = [([5, 6, 7], [8, end], [9, 10, 11, 12, end]), ([13] * 20, [14, 15, 16, end], [14, end])]
    scores = torch.stack(reward.score_pairs(policy, pairs, reference, 0.3), 1)  # (pairs, sides)
    def by_hand(prompt, reply, spoken):
        idx, targets = (prompt + reply)[:-1], [-1] * (len(prompt) - 1) + spoken
        said, before = (plain_logprobs(net, idx, targets) for net in (policy, reference))
        return 0.3 * sum(a - b for (a, _), (b, _) in zip(said, before))
    want = torch.stack([torch.stack([by_hand(p, r, r) for r in sides]) for p, *sides in pairs])
    close(scores, want)
    endless = [[by_hand(p, r, r[:-1] + [-1]) for r in sides] for p, *sides in pairs]
    assert apart(torch.tensor(endless), want) > 0.01  # the mistake: to stop is not learned
    asked = torch.tensor([sum(by_hand(p[:t], [p[t]], [p[t]]) for t in range(1, len(p))) for p, *_ in pairs])
    assert asked.abs().max() > 0.01  # the mistake: the prompt; it cancels in the loss, but not in the scores
    mean = want / torch.tensor([[len(r) for r in sides] for _, *sides in pairs])
    assert ((mean[:, 0] - mean[:, 1]) - (want[:, 0] - want[:, 1])).abs().max() > 0.01  # the mistake: a mean

def test_bug_26_dpo_whose_reference_has_dropout_or_learns():
    # huggingface/trl#744 and #2042, unslothai/unsloth-zoo#830
    net, cfg = tiny(), reward.Config(dpo=True, batch=2)
    pairs = [([5, 6], [7, 3], [8, 9, 3]), ([10], [11, 3], [12, 3])]
    reference, adam = memory.frozen_copy(net), OffloadedAdamW(net.parameters(), 1e-2)
    before, losses = weights_of(reference), []
    for _ in range(5):
        losses.append(reward.learn(net, pairs, cfg, reference)[0])
        adam.step(1e-2)
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[4] < losses[0] - 0.01
    assert torch.equal(weights_of(reference), before)
    assert not any(p.requires_grad for p in reference.parameters())
    assert torch.stack(reward.score_pairs(net, pairs, net, 0.1)).eq(0).all()  # the mistake: it learns, too
    states = m.reply_states(reference, [[5, 6]], [[7, 3]])[:2]
    said = lambda states: token_logprobs(states, reference.wte.weight, torch.tensor([7, 3]))[0].sum()
    assert apart(said(states), said(F.dropout(states, 0.1))) > 0.01  # the mistake: a first loss beside ln 2


# --- memory.py: checkpoint, optimizer, streaming, LoRA, chunked log-probabilities, dry run ------------------

@in_every_family
def test_checkpointed_gradients_equal_plain_ones_also_nested_bound_and_with_frozen_inputs():
    nets = tiny(checkpoint=False), tiny(checkpoint=True)
    for net in nets:
        net.logits(net(random_ids(3, 10))).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(net.parameters() for net in nets)))
    w = nn.Parameter(torch.randn(4, 4, generator=rng(0)))
    x = torch.randn(2, 4, generator=rng(1))  # needs no gradient, w does
    inner = lambda x: (x @ w).tanh()
    plain = lambda x, scale: inner(x) * scale + inner(inner(x))
    nested = lambda x, scale: checkpoint(inner, x) * scale + checkpoint(inner, checkpoint(inner, x))
    def gradient(y):
        w.grad = None
        y.square().sum().backward()
        return w.grad
    for function in (plain, nested):
        assert torch.equal(gradient(checkpoint(partial(function, scale=3), x)), gradient(plain(x, scale=3)))

def test_offloaded_adamw_follows_torch_adamw():
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = nn.Linear(8, 4).to(dtype), nn.Linear(8, 4)
        plain.load_state_dict(ours.state_dict())
        adam = OffloadedAdamW(ours.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1)
        groups = [{"params": plain.weight, "weight_decay": 0.1}, {"params": plain.bias, "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), fused=True)
        for step in range(20):
            for micro in range(2):
                g = torch.randn(4, 8, generator=rng(step, micro)).to(dtype)
                for net, bias in ((ours, g.sum(1)), (plain, g.sum(1).float())):
                    ((net.weight * g.to(net.weight.dtype)).sum() + (net.bias * bias).sum()).backward()
            close(adam.step(1e-2, 0.5), torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5), 5e-5)
            assert ours.weight.grad is None
            reference.step()
            reference.zero_grad()
        assert torch.equal(adam.masters[0], plain.weight)
        assert torch.equal(ours.weight, adam.masters[0].to(dtype))

@in_every_family
def test_gradients_by_the_row_and_by_the_piece_equal_gradients_of_the_whole():
    idx, targets, plain, net = random_ids(2, 9), random_ids(2, 9, seed=1), tiny(), tiny()
    targets[0, :4] = -1
    adam = OffloadedAdamW(net.parameters(), 1e-3)
    for x in (plain, net):
        logprobs, _ = token_logprobs(x(idx), x.output_matrix, targets, chunk=100)
        (logprobs.sum() / 7).backward()
    for p, master in zip(plain.parameters(), adam.masters):
        close(p.grad, master.grad)
    assert plain.wte.weight.grad.abs().max() > 0.1
    assert torch.equal(memory.lookup(net.wte.weight, idx), F.embedding(idx, net.wte.weight))

@in_every_family
def test_streaming_changes_no_number():
    examples = [(random_ids(9, seed=i).tolist(), random_ids(9, seed=i + 1).tolist()) for i in range(4)]
    for rank in (0, 2):
        results = []
        for offload in ("none", "all"):
            net, cfg = tiny(), sft.Config(offload=offload, lora_rank=rank)
            adam = memory.make_optimizer(m.setup_training(net, cfg, CPU), cfg)
            for step in range(3):
                m.negative_log_likelihood(net, examples, CPU).sum().backward()
                adam.step(1e-2, 1.0)
            assert (net.streamed_blocks is not None) == (offload == "all")
            said = torch.tensor(generate(net, [[5, 6, 7], [8, 9]], 6, -1, generator=rng(0)))
            results.append([*net.state_dict().values(), net(random_ids(2, 8)), said])
        assert all(map(torch.equal, *results)), rank

@in_every_family
def test_lora_changes_nothing_at_first_and_merges_into_the_same_function(tmp_path):
    net, idx = tiny(Scorer), random_ids(2, 9)
    before = values_of(net, idx)
    m.setup_training(net, reward.Config(lora_rank=4), CPU)
    assert net.score.weight.requires_grad  # a fresh head has to learn
    assert torch.equal(values_of(net, idx), before)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_b" in name:
                p.normal_(generator=rng(0, name))
    assert apart(values_of(net, idx), before) > 0.1
    plain = tiny(Scorer, seed=5)
    plain.load_state_dict(m.exported(net)[1])  # strict: no adapters are left in it
    close(values_of(plain, idx), values_of(net, idx), 1e-4)
    save(tmp_path, net)
    close(values_of(m.load_model(tmp_path, Scorer), idx), values_of(net, idx), 1e-4)

def test_token_logprobs_equal_full_logits_whatever_the_chunk():
    hidden, weight = torch.randn(3, 7, 16, generator=rng(0)), torch.randn(50, 16, generator=rng(1))
    targets, scale = torch.randint(-1, 50, (3, 7), generator=rng(2)), torch.randn(3, 7, generator=rng(3))
    def values_and_gradients(logprobs_of):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = logprobs_of(h, w)
        (logprobs * scale).sum().backward()
        return logprobs.detach(), entropy, h.grad, w.grad
    def full(h, w):
        table, said = (h @ w.T).log_softmax(-1), targets >= 0
        chosen = table.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return chosen * said, (-(table.exp() * table).sum(-1) * said).detach()
    for chunk in (1, 4, 5, 1000):
        ours = values_and_gradients(lambda h, w: token_logprobs(h, w, targets, chunk, entropy=True))
        for a, b in zip(ours, values_and_gradients(full)):
            close(a, b, 1e-4)
    nothing = torch.full_like(targets, -1)
    logprobs, _, h_grad, _ = values_and_gradients(lambda h, w: token_logprobs(h, w, nothing))
    assert (logprobs.abs().sum(), h_grad.abs().sum()) == (0, 0)

def run_dry(stage, root, **changes):
    changes |= {"minibatch": 1, "max_new_tokens": 8} if stage is ppo else {}
    return run(stage, root, dry_run=True, init="gpt2", data="none", block_size=512, batch=1, **changes)

def test_the_arithmetic_of_the_docstring_and_a_tenth_of_the_announced_memory(tmp_path):
    weights = 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    phases = run_dry(ppo, tmp_path)[0]["phases"]
    assert [*phases] == ["rollout", "scoring", "update"]
    owners = phases["update"]["owners"]
    for name, per_weight in (("weights", 4 * 4), ("gradients", 2 * 4), ("optimizer", 2 * 8)):
        close(owners[name] / weights / per_weight, 1, 0.001)
    update = run_dry(sft, tmp_path, dtype="bfloat16", offload="optimizer")[0]["phases"]["update"]
    close(update["owners"]["weights"] / weights / 2, 1, 0.001)
    assert sum(update["owners"].values()) == update["peak_device_bytes"]  # of the device's bytes, all
    crossing = 2 * 50304 * 768  # the buffer for what crosses the bus: the largest matrix, in bfloat16
    close(update["peak_host_bytes"] / (16 * weights + crossing), 1, 0.02)
    assert run_dry(ppo, tmp_path, dtype="bfloat16", offload="all")[0]["peak_device_bytes"] < 0.16 * 2**30

def test_it_needs_no_weights_takes_hub_names_and_keeps_an_earlier_log(tmp_path):
    for earlier in ("", '{"dry_run": true}\n', '{"step": 1}\n'):
        (tmp_path / "out/reward").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out/reward/log.jsonl").write_text(earlier)
        result, text = run_dry(reward, tmp_path, checkpoint=True)
        assert log(tmp_path / "out/reward") == [{"step": 1} if "step" in earlier else result]
    assert "reward/log.jsonl is a run's and stays as it is" in text
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {".lock", "log.jsonl"}
    assert "simulated" in text
    assert set(result) == {"dry_run", "peak_device_bytes", "peak_host_bytes", "phases"}
    assert result["peak_device_bytes"] >= sum(result["phases"]["update"]["owners"].values())


# --- memory.py on a second device: tensors that compute on the CPU but are not there ------------------------

class Elsewhere(torch.Tensor):
    """A tensor of the device "elsewhere". `inner` is where its numbers really are."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    tolist = lambda self: self.inner.tolist()

    @staticmethod
    def __new__(cls, inner):
        t = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                                storage_offset=inner.storage_offset(), device="elsewhere:0")
        t.inner = inner
        COUNT.see(inner)
        return t

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute_elsewhere(op, *args, **(kwargs or {}))

class Count:
    """Bytes on the second device, as storages come and go; its peak in each phase."""
    def __init__(self):
        self.alive, self.total, self.peaks, self.name = {}, 0, {}, "setup"

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        def gone(_):
            self.total -= self.alive.pop(key)[1]
        if size and key not in self.alive:
            self.alive[key] = weakref.ref(storage, gone), size
            self.total += size
            self.phase(self.name)

    def phase(self, name):
        self.name = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.total)

COUNT = Count()

def compute_elsewhere(op, *args, device=None, **kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    if op is not torch.ops.aten.copy_.default and len({isinstance(t, Elsewhere) for t in tensors}) > 1:
        raise RuntimeError(f"{op} mixes tensors of two devices")
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | ({"device": "cpu"} if device else {})
    args_, kwargs = tree_map_only(Elsewhere, lambda t: t.inner, (args, kwargs))
    out = op(*args_, **kwargs)
    if op._schema.is_mutable:
        return args[0] if op._schema.returns else None
    at_home = device is not None and torch.device(device).type == "cpu"
    return out if at_home else tree_map_only(torch.Tensor, Elsewhere, out)

def flash_elsewhere(q, k, v, attn_mask=None, is_causal=False):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]

def make_second_device():
    """-> what has to stay alive for it, or None where this torch cannot make one. Now, because autograd asks
    for the devices there are at its first backward only."""
    register = getattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend", None)
    if not register:
        return None
    register("elsewhere")
    libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries[0].fallback(compute_elsewhere, "PrivateUse1")
    for name in ("default", "start", "start_step"):  # as they come, they would resize a tensor from inside
        overload = getattr(torch.ops.aten.arange, name)
        libraries[1].impl(overload, partial(compute_elsewhere, overload), "PrivateUse1")
    return libraries

ELSEWHERE = make_second_device()

def second_device(test):
    test = mock.patch.object(F, "scaled_dot_product_attention", flash_elsewhere)(test)
    return unittest.skipUnless(ELSEWHERE, "this torch cannot make a device in Python")(test)

@second_device
def test_a_tensor_on_the_wrong_side_is_refused_and_bytes_are_counted():
    x = torch.ones(3, 4, device="elsewhere:0")
    refuses(lambda: x + torch.ones(3, 4), "mixes", kind=RuntimeError)
    before, y = COUNT.total, x @ x.T
    assert (y.to("cpu") == 4).all() and COUNT.total == before + 9 * 4
    del y
    assert COUNT.total == before

@second_device
def test_all_stages_run_there_with_every_offload_and_agree_with_the_cpu(tmp_path):
    losses, setting = [], {"device": "elsewhere:0", "steps": 2, "save_every": 10, "eval_every": 10}
    for changes in ({"device": "cpu"}, {}, {"offload": "optimizer"}, {"offload": "all"},
                    {"offload": "all", "lora_rank": 2}):  # the last one is another model, and has to run
        stages = run_all(tmp_path, **setting | changes)
        rows = [row for stage in stages for row in log(tmp_path / "out" / stage) if "lr" in row]
        losses.append(torch.tensor([row.get("loss", row.get("value_loss")) for row in rows]))
    for other in losses[1:4]:
        assert torch.allclose(losses[0], other, rtol=1e-3), losses
    llama = setting | {"init": "scratch-llama", "n_layer": 1, "out": str(tmp_path / "llama")}
    close(*(run(sft, tmp_path, **llama | {"device": device})[0]["val_loss"]
            for device in ("cpu", "elsewhere:0")), 1e-3)
    run(ppo, tmp_path, **setting, reward="check")

@second_device
def test_the_dry_run_agrees_with_the_bytes_counted_there(tmp_path):
    global COUNT
    never_ends = lambda net, prompts, n, end, *rest, **more: generate(net, prompts, n, -1, *rest, **more)
    reward_model = lambda folder, cls, dtype: Scorer(GPTConfig(1024, 64, 3, 4, 64, "tiny"))
    for stage in (sft, reward, ppo):
        for changes in ({}, {"checkpoint": True, "microbatch": 2}, {"offload": "optimizer"},
                        {"offload": "all"}, {"lora_rank": 2},
                        {"offload": "all", "lora_rank": 2, "microbatch": 1}):
            cfg = small(stage, tmp_path, init="scratch", n_layer=3, n_embd=64, batch=4, **changes)
            dry, text = quiet(stage.main, dataclasses.replace(cfg, dry_run=True))
            assert "update" in text
            COUNT = Count()
            with mock.patch.object(memory, "TRACKERS", [COUNT]), \
                 mock.patch.object(m, "generate", never_ends), \
                 mock.patch.object(ppo, "load_model", reward_model):
                stage.dry_iteration(cfg, torch.device("elsewhere:0"), torch.float32)
            for name, peak in dry["phases"].items():
                ratio = peak["peak_device_bytes"] / COUNT.peaks[name]
                assert abs(ratio - 1) < 0.02, (stage.__name__, changes, name, ratio)


# --- tokens and batches -------------------------------------------------------------------------------------

def test_text_round_trips_makes_no_control_tokens_and_has_the_same_ids_in_transformers():
    import regex  # tiktoken depends on it
    model = tokenizer.tokenizer_files("tiny", 64)["tokenizer.json"]["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    spelled = {TINY.encoding.decode_single_token_bytes(i): text for text, i in model["vocab"].items()}
    for text in ("Hello there!", "caf\u00e9 \U0001f600 42", "<|end|><|user|>", " \n\t", "",
                 "What is 2 plus 3?", " Hello, World!! It's  fine.", "naïve 漢字 😀\n\n x"):
        ids = []
        for word in regex.findall(TINY.encoding._pat_str, text):  # BPE from the merges alone
            parts = [spelled[bytes([b])] for b in word.encode()]
            while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
                _, i = min(pairs)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [model["vocab"][part] for part in parts]
        assert ids == TINY.encode(text) and TINY.decode(ids) == text and all(i < TINY.first for i in ids)
    assert TINY.decode(TINY.encode(" " * 10**6 + "x")) == " " * 10**6 + "x" and TINY.vocab_size % 64 == 0

def test_gpt2_has_its_known_values_and_long_texts_are_cut_where_tokens_end():
    ours = gpt2()
    assert ours.encode("Hello world") == [15496, 995] and ours.encode("\n\nHuman:") == [198, 198, 20490, 25]
    assert (ours.first, ours.end, ours.vocab_size) == (50257, 50259, 50304)
    assert 50256 not in ours.encode("<|endoftext|>") and ours.decode([15496, 50256, 50259, 50300]) == "Hello"
    for coder in (TINY, ours):
        for blanks in ("\n\n  ", "\n" * 99):
            long = "".join(f"It's {i}!{blanks}word" for i in range(1_000_000 // (10 + len(blanks))))
            same = coder.encode(long) == coder.encoding.encode_ordinary(long)
            assert same and len(long) > 900_000, (coder.name, blanks)

def test_only_user_and_assistant_speak_and_a_system_message_goes_before_the_users():
    import jinja2  # torch depends on it
    def refuse(message):
        raise SystemExit(message)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        tokenizer.chat_template(TINY.chat, TINY.system))
    shown = lambda messages: template.render(messages=messages, raise_exception=refuse)
    system, tool = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "42"}
    turns = [system, user("a "), assistant("b"), user(" c"), assistant("d")]
    assert shown(turns) == TINY.encoding.decode(TINY.render(turns)[0]) == (
        "<|user|>Be brief.\n\na<|assistant|>b<|end|><|user|>c<|assistant|>d<|end|>")
    assert TINY.render([system, user("a")]) == TINY.render([user("Be brief.\n\na")])
    kind = {"role": "system", "content": "Be kind."}
    assert prepare.join_systems([system, system, kind, user("a"), system, user("b")]) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."}, user("a"), user("Be brief.\n\nb")]
    for wrong in (tool, system):
        for read in (shown, TINY.render):
            refuses(lambda: read([user("a"), wrong]), "only user and assistant can speak")

def test_a_turn_of_weight_0_is_read_and_not_learned():
    talk = [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]
    ids, mask = TINY.render(talk)
    assert ids == TINY.render([turn | {"weight": 1} for turn in talk])[0]
    assert [i for i, learned in zip(ids, mask) if learned] == TINY.reply("d")
    [(_, targets)] = tokenizer.encode_demonstration({"messages": talk}, TINY, 64)
    assert [t for t in targets if t >= 0] == TINY.reply("d")

def test_both_replies_of_a_pair_see_the_same_prompt(tmp_path):
    question, longer = "a b c " * 20, "It is a very long story, and it does not end soon."
    row = {"prompt": [user(question)], "chosen": longer, "rejected": "No."}
    reply = lambda text: [ASSISTANT, *TINY.encode(text), TINY.end]
    # the longer reply fills what the prompt leaves
    prompt = [TINY.first, *TINY.encode(question.strip())][len(reply(longer)) - 64:]
    pair = prompt + [ASSISTANT], reply(longer)[1:], reply("No.")[1:]
    assert examples.encode_pair(row, TINY, 64) == pair and len(pair[0] + pair[1]) == 64
    assert examples.encode_pair(row, TINY, len(reply(longer))) is None  # nothing of the prompt is left
    fits = len(reply("It is blue."))
    pairs, text = quiet(reward.load_pairs, small(reward, tmp_path, block_size=12), TINY)
    cut = sum(len(TINY.render(row["prompt"])[0]) + fits > 12 for rows in pairs for row in rows)
    assert cut and f"in {cut} the prompt lost its beginning" in text
    refuses(lambda: reward.load_pairs(small(reward, tmp_path, block_size=fits), TINY), f"--block_size={fits}")

def test_texts_become_windows_that_lose_no_token_and_long_dialogues_lose_their_beginning():
    text, question = "To be, or not to be, that is the question. " * 5, user("a b c " * 90)
    windows = tokenizer.encode_demonstration({"text": text}, TINY, 16)
    assert [t for _, targets in windows for t in targets] == [*TINY.encode(text), TINY.end]
    assert all(len(idx) == len(targets) <= 16 for idx, targets in windows)
    [(idx, targets)] = tokenizer.encode_demonstration({"messages": [question, assistant("Yes.")]}, TINY, 32)
    prompt = TINY.prompt([question], 20)
    assert (len(idx), targets[-1]) == (32, TINY.end) and (len(prompt), prompt[-1]) == (20, ASSISTANT)
    assert tokenizer.count_targets([([5, 6, 7], [0, -1, 3]), ([8], [-1])]) == 2  # 0 is a token like any other

def test_batches_cover_every_row_hold_similar_lengths_and_mix_anew_each_epoch():
    lengths = tuple(torch.randint(5, 100, (1000,), generator=rng(0)).tolist())
    out, after = (batches.batches(lengths, 16, seed=0, epoch=epoch) for epoch in (0, 1))
    assert {i for b in out for i in b} == set(range(1000)) and {len(b) for b in out} == {16}
    assert sum(max(lengths[i] for i in b) * len(b) for b in out) / sum(lengths) < 1.1
    assert out != after and batches.batch_at(63, lengths, 16, 0) == after[0]
    lengths = tuple(torch.randint(20, 250, (1500,), generator=rng(0)).tolist())  # a small set
    pairs = [{(a, b) for rows in batches.batches(lengths, 64, 0, epoch) for a in rows for b in rows if a < b}
             for epoch in (0, 1)]
    assert len(pairs[0] & pairs[1]) / len(pairs[0]) < 0.25  # all rows sorted at once: 0.7

def test_results_come_back_in_the_order_of_the_rows():
    rows, seen = [[3, 3, 3], [1], [2, 2], [4, 4, 4, 4], [0]], []
    def double(some):
        seen.append(some)
        return [2 * sum(row) for row in some]
    for order in ({}, {"length": lambda row: -row[0]}):
        assert batches.map_by_length(double, rows, 2, **order) == [18, 2, 8, 32, 0], order
    assert seen[:4] == [[[1], [0]], [[2, 2], [3, 3, 3]], [[4, 4, 4, 4]], [[4, 4, 4, 4], [3, 3, 3]]]


# --- words and chat formats of a folder ---------------------------------------------------------------------

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
WAYS = {  # pre_tokenizer -> how the library tokenizers splits, as patterns one after the other
    "gpt2": (LEVEL, [data_bpe.GPT2_PATTERN]),
    "smollm2": ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]},
                [r"\p{N}|[^\p{N}]+", data_bpe.GPT2_PATTERN]),
    "llama3": ({"type": "Sequence", "pretokenizers": [SPLIT, LEVEL | {"use_regex": False}]}, [LLAMA3_SPLIT])}
CHATML, LLAMA3 = tokenizer.CHATML.control_tokens(), tokenizer.LLAMA3.control_tokens()

def stored_words(control, way="smollm2", absent=(), **changes):
    """-> tokenizer.json as an object: the tiny encoding, but control tokens have the first ids, some bytes
    are absent, and <think> is a word of its own."""
    model = tokenizer.tokenizer_files("tiny", 64)["tokenizer.json"]["model"]
    absent = {data_bpe.letters()[b] for b in absent}
    control = list(dict.fromkeys(control))
    kept = [text for text in model["vocab"] if text not in TINY.words.control and text not in absent]
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(control)]
    added.append({"id": len(control) + len(kept), "content": "<think>", "special": False})
    return {"added_tokens": added, "normalizer": None, "pre_tokenizer": WAYS[way][0], "model": model | {
        "vocab": {text: i for i, text in enumerate([*control, *kept])},
        "merges": [" ".join(pair) for pair in model["merges"]], **changes}}

def words_folder(folder, stored, template=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer.read_words.cache_clear()
    return str(folder)

def ids_by_merges(text, stored, patterns):
    """What the library tokenizers does, step by step."""
    import regex  # tiktoken depends on it
    vocab, words, ids = stored["model"]["vocab"], [text], []
    ranks = {tuple(pair.split()): i for i, pair in enumerate(stored["model"]["merges"])}
    for pattern in patterns:
        words = [piece for word in words for piece in regex.findall(pattern, word)]
    for word in words:
        parts = [letter for letter in (data_bpe.letters()[b] for b in word.encode()) if letter in vocab]
        while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[part] for part in parts]
    return ids

TEXTS = ("Hello there!", "caf\u00e9 \U0001f600 4200", "<|end|><|user|>", " \n\t", "", "What is 2 plus 3?",
         " Hello, World!! It's  fine.", "na\u00efve \u6f22\u5b57 \n\n x", "a 1  23 b\n 4",
         "IT'S\r\n\n(ok).\n\nx\t y ")

def test_a_folders_words_have_the_ids_that_its_merges_give(tmp_path):
    draw = random.Random(0)
    texts = [*TEXTS, *("".join(draw.choices(" \n'ab\u00e9\u00bd7.,\u6f22T", k=40)) for _ in range(200))]
    for way, (_, patterns) in WAYS.items():
        stored = stored_words(CHATML, way, absent=[1, 255])
        ours = Tokenizer(words_folder(tmp_path / way, stored))
        for text in texts:
            assert ours.encode(text) == ids_by_merges(text, stored, patterns), (way, text)
            assert ours.decode(ours.encode(text)) == text
        assert ours.encode("a\x01b") == ours.encode("a") + ours.encode("b")  # a byte without a token
        for text in ("".join(draw.choices(" \x01.,'ab7", k=30)) for _ in range(100)):
            assert ours.encode(text) == ids_by_merges(text, stored, patterns), (way, text)
        think, control = stored["added_tokens"][-1]["id"], {*range(len({*CHATML}))}
        assert ours.encode("so <think>") == [*ours.encode("so "), think] and ours.decode([think]) == "<think>"
        assert control.isdisjoint(ours.encode("".join(CHATML))) and ours.decode([*control]) == ""
        written = tokenizer.tokenizer_files(ours.name, 64)["tokenizer.json"]
        again = Tokenizer(words_folder(tmp_path / "again", written))
        assert again.words == ours.words and tokenizer.same_tokens(ours.name, again.name), way
    damaged = words_folder(tmp_path / "damaged", stored_words(CHATML, absent=[ord("u")]))
    refuses(lambda: Tokenizer(damaged), "no token for a letter of the chat format")  # tiktoken panics
    composed = Tokenizer(words_folder(tmp_path, stored_words(CHATML) | {"normalizer": {"type": "NFC"}}))
    assert composed.encode("cafe\u0301") == composed.encode("caf\u00e9") != ours.encode("cafe\u0301")
    for other in (composed.name, "tiny"):
        assert not tokenizer.same_tokens(ours.name, other), other

def test_words_that_tiktoken_cannot_make_exactly_are_refused_by_name(tmp_path):
    good = stored_words(CHATML)
    model, [*added, think] = good["model"], good["added_tokens"]
    swapped = dict(model["vocab"])
    swapped["in"], swapped["er"] = swapped["er"], swapped["in"]
    digits = lambda **changes: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True} | changes, LEVEL]}}
    for changes, *words in (
            ({"model": model | {"type": "Unigram"}}, "not byte-level BPE"),
            ({"model": model | {"byte_fallback": True}}, "not byte-level BPE"),
            ({"model": model | {"dropout": 0.1}}, "dropout is 0.1"),
            ({"model": model | {"unk_token": "<unk>"}}, "unk_token is '<unk>'"),
            ({"model": model | {"vocab": swapped}}, "merges", "order of its ids"),
            ({"model": model | {"merges": model["merges"][:-1]}}, "merges", "order of its ids"),
            ({"model": model | {"vocab": model["vocab"] | {"\u2581the": 2000}}}, "\u2581", "no byte"),
            ({"normalizer": {"type": "Lowercase"}}, "the normalizer is", "Lowercase"),
            ({"pre_tokenizer": LEVEL | {"add_prefix_space": True}}, "the pre_tokenizer is", "prefix_space"),
            ({"pre_tokenizer": {"type": "Metaspace"}}, "the pre_tokenizer is", "Metaspace"),
            (digits(individual_digits=False), "the pre_tokenizer is", "Digits"),
            ({"pre_tokenizer": None}, "the pre_tokenizer is None"),
            ({"added_tokens": [*added, think | {"lstrip": True}]}, "<think>", "lstrip"),
            ({"added_tokens": [*added, think | {"id": 5}]}, "ids are not whole numbers, each of one"),
            ({"added_tokens": [*added, think | {"id": -1}]}, "ids are not whole numbers"),
            ({"model": []}, "not a tokenizer")):
        folder = words_folder(tmp_path, good | changes)
        refuses(lambda: Tokenizer(folder), "tokenizer.json", *words)
    refuses(lambda: Tokenizer(str(tmp_path / "empty")), "empty/tokenizer.json", "SentencePiece")

def test_a_dialogue_is_written_as_the_model_knows_it_and_the_template_says_the_same(tmp_path):
    import jinja2  # torch depends on it
    smol = "{% if x %}{{ '<|im_start|>system\nYou\\'re kind.<|im_end|>\n' }}{% endif %}"
    qwen = "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    system = {"role": "system", "content": " Be brief. "}
    talk = [user(" Hi\n"), assistant("Hello <|im_end|>"), user("x"), assistant(" Yes.\n")]
    kind, brief = map("<|im_start|>system\n{}<|im_end|>\n".format, ("You're kind.", "Be brief."))
    chatml = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello <|im_end|><|im_end|>\n"
              "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>")
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    llama3 = "".join(map(turn, ("user", "assistant") * 2, ("Hi", "Hello <|im_end|>", "x", "Yes.")))
    ours = "<|user|>{}Hi<|assistant|>Hello <|im_end|><|end|><|user|>x<|assistant|>Yes.<|end|>".format
    for control, template, alone, told in (
            (CHATML, smol, kind + chatml, brief + chatml), (CHATML, qwen, chatml, brief + chatml),
            (LLAMA3, "", LLAMA3[0] + llama3, LLAMA3[0] + turn("system", "Be brief.") + llama3),
            ([], "", ours(""), ours("Be brief.\n\n"))):
        k = Tokenizer(words_folder(tmp_path, stored_words(control), template))
        exported = tokenizer.tokenizer_files.__wrapped__(k.name, 64)["tokenizer_config.json"]["chat_template"]
        shown = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(exported).render
        for messages, want in ((talk, alone), ([system, *talk], told)):
            ids, mask = k.render(messages)
            assert k.encoding.decode(ids) == shown(messages=messages) == want, want
            said = [k.encoding.decode([i for i, _ in part]) for learned, part in
                    itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]) if learned]
            assert said == [f"Hello <|im_end|>{k.chat.end}", f"Yes.{k.chat.end}"]
            prompt, asked = k.prompt(messages[:-1], 999), messages[:-1]
            assert k.encoding.decode(prompt) == shown(messages=asked, add_generation_prompt=True)
            assert ids == prompt + k.reply("Yes.") and ids[0] == k.first != k.end
            assert k.prompt(asked, 9) == [*k.begin, *prompt[len(k.begin) - 9:]]  # Llama 3's first token stays
        k2 = Tokenizer(words_folder(tmp_path / "again", stored_words(control), exported))
        assert (k2.system, k2.chat) == (k.system, k.chat)
        good = k.reply("Yes.")
        assert evaluation.passes({"check": "Yes\\."}, good, k)
        assert not any(evaluation.passes({"check": ".*"}, [*k.encode("Yes"), i, k.end], k)
                       for i in (k.first, k.end, k.vocab_size))
    assert (k.rows(1000), k.rows(1100)) == (1088, 1100)  # without and with room for our three tokens

def test_dialogues_that_lost_their_beginning_are_counted_whatever_the_header(tmp_path):
    k = Tokenizer(words_folder(tmp_path / "words", stored_words(CHATML)))
    n = len(k.prompt([user("What colour is the rose number 0?")], 999))
    for block_size, cut in ((n + 40, "; 0 longer"), (n - 9, "; 60 longer")):
        _, text = quiet(sft.load_examples, small(sft, tmp_path, block_size=block_size), k)
        assert cut in text, text


# --- weights in ---------------------------------------------------------------------------------------------

class HubHandler(http.server.BaseHTTPRequestHandler):
    log_message = lambda *_: None

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        wrong = self.server.misbehave.pop(0) if self.server.misbehave else None
        if isinstance(wrong, int):
            return self.send_error(wrong)
        name = Path(self.path).name
        if not (self.server.files / name).exists():
            return self.send_error(404)
        data = b"" if wrong == "empty" else (self.server.files / name).read_bytes()
        if not self.path.startswith("/store") and wrong not in ("no length", "empty"):
            # as the hub: a redirect that knows size and hash
            digest = "0" * 64 if wrong == "hash" else hashlib.sha256(data).hexdigest()
            self.send_response(302)
            self.send_header("Location", f"/store/{name}")
            self.send_header("X-Linked-Size", str(len(data) + (wrong == "size")))
            self.send_header("X-Linked-Etag", f'"{digest}"')
            return self.end_headers()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if wrong != "no length":
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + 60_000] if wrong == "drop" else data[start:])

@contextlib.contextmanager
def hub_server(root, misbehave=(), fill=lambda folder: save(folder, tiny())):
    """A server on this machine that behaves as the hub does on its worse days: `misbehave` says what to do
    wrong, request by request."""
    fill(root / "files")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server, \
         mock.patch.dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="secret",
                         HF_HOME=str(root / "cache"), HF_HUB_CACHE="", HF_HUB_OFFLINE=""), \
         mock.patch.object(hub.time, "sleep"):
        server.files, server.requests, server.misbehave = root / "files", [], list(misbehave)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

def loads(model, case=""):
    """It has the weights of tiny()."""
    assert torch.equal(weights_of(m.load_model(model)), weights_of(tiny())), case

def test_a_name_is_downloaded_once_and_a_hub_on_its_worse_days_is_asked_again(tmp_path):
    for i, (misbehave, starts, requests) in enumerate((
            ([], [None], 4), ([None, "drop", 503, None, "drop"], [None, "bytes=60000-", "bytes=120000-"], 9),
            (["no length"] * 2, [], 2),  # a plain mirror: no redirect, no hash either
            (["empty", None, "empty"], [None, None], 7), ([429, 408, 416, 500], [None], 8))):
        with hub_server(tmp_path / str(i), misbehave) as server:
            loads("gpt2", misbehave)
            loads("gpt2", misbehave)  # is found, not asked for
        ranges = [sent.get("Range") for path, sent in server.requests if path == "/store/model.safetensors"]
        assert (ranges, len(server.requests)) == (starts, requests), misbehave
        tokens = {(path.split("/")[1], sent.get("Authorization")) for path, sent in server.requests}
        assert tokens - {("store", None)} == {("openai-community", "Bearer secret")}, misbehave  # not sent on
        assert not list((tmp_path / str(i) / "cache").rglob("*.part")), misbehave

def test_words_come_along_and_weights_in_shards_do_too(tmp_path):
    def in_shards(folder):
        llama_folder(folder)
        tensors = [*hub.read_safetensors(folder / "model.safetensors").items()]
        for name, part in (("a", tensors[:5]), ("b", tensors[5:])):
            hub.write_safetensors(folder / f"{name}.safetensors", dict(part))
        where = {name: f"{'a' if i < 5 else 'b'}.safetensors" for i, (name, _) in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "model.safetensors").unlink()
    for i, (fill, files) in enumerate(((llama_folder, 4), (in_shards, 6))):
        with hub_server(tmp_path / str(i), fill=fill) as server:
            for _ in range(2):  # the second time it is found, not asked for
                net = m.load_model("smollm2-135m-instruct")
            asked = [path for path, _ in server.requests if not path.startswith("/store")]
        paths = {f"/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/main/{name}" for name in (
            "config.json", "tokenizer.json", "tokenizer_config.json")}
        assert paths <= {*asked} and len({*asked}) == files + (i == 1), asked
        assert Tokenizer(net.cfg.tokenizer).chat == tokenizer.CHATML
        assert torch.equal(weights_of(net), weights_of(tiny(vocab_size=net.cfg.vocab_size, **LLAMA)))
    in_use = mock.patch.object(hub, "lock_folder", side_effect=SystemExit("in use"))
    with hub_server(tmp_path), in_use as lock:
        refuses(lambda: m.load_model("llama-3.2-1b"), "in use")
        assert str(lock.call_args.args[0]).endswith("Llama-3.2-1B/snapshots/main")
    with hub_server(tmp_path, [403]):
        refuses(lambda: m.load_model("llama-3.2-1b"), "HF_TOKEN", "tokenizer.json", "ask for access",
                "huggingface.co/meta-llama/Llama-3.2-1B")

def test_wrong_sizes_hashes_and_refusals_stop_with_a_remedy_and_no_model(tmp_path):
    with hub_server(tmp_path) as server:
        for wrong, word in ((["size", None] * 5, "ended after"), (["hash", None] * 5, "announced"),
                            ([404] * 2, "404"), ([401], "HF_TOKEN"), ([503] * 5, "503"), ([416] * 5, "416"),
                            ([429] * 5, "429")):
            server.misbehave = wrong
            refuses(lambda: m.load_model("gpt2"), word, "config.json and model.safetensors")
            assert not list((tmp_path / "cache").rglob("model.safetensors")), word
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch.object(hub, "fetch", side_effect=full) as fetch:
            refuses(lambda: m.load_model("gpt2"), "No space left", "main/model.safetensors")
        assert fetch.call_count == 1  # it would be as full a second later

def test_without_a_network_a_home_or_a_folder_the_message_names_what_to_set(tmp_path):
    tokenizer.read_words.cache_clear()
    with mock.patch.object(tokenizer.tiktoken, "get_encoding", side_effect=OSError("no route")):
        refuses(lambda: Tokenizer("gpt2"), "TIKTOKEN_CACHE_DIR", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    (tmp_path / "file").touch()
    for environment, *words in (({"HF_HOME": str(tmp_path / "file")}, "Not a directory", "HF_HOME"),
                                ({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
                                ({}, "no home", "HF_HOME"),
                                ({"HF_HUB_CACHE": "/nowhere", "HF_HUB_OFFLINE": "1"}, "/nowhere")):
        with mock.patch.dict(os.environ, environment, clear=True), \
             mock.patch.object(Path, "home", side_effect=RuntimeError):
            refuses(lambda: m.load_model("gpt2"), *words)

def test_every_variant_of_a_folder_loads(tmp_path):
    save(tmp_path, tiny())
    tensors = hub.read_safetensors(tmp_path / "model.safetensors")
    def variant(**files):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        shutil.copy(tmp_path / "config.json", folder)
        for name, part in files.items():
            hub.write_safetensors(folder / f"{name}.safetensors", part)
        return folder
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for dtype in (torch.bool, torch.uint8, torch.float32, torch.float64):  # of a causal mask; it is not used
        mask = torch.ones(1, 1, 8, 8).to(dtype)
        masks = {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor([-1e4])}
        loads(variant(model=bare | masks), dtype)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."):
        loads(variant(model={prefix + name: t for name, t in tensors.items()}), prefix)
    loads(variant(model={name.replace("h.0.", "h.0._orig_mod."): t for name, t in tensors.items()}))
    loads(variant(model=tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}))
    shards = variant(a=dict(list(bare.items())[:9]), b=dict(list(bare.items())[9:]))
    where = {name: f"{'a' if i < 9 else 'b'}.safetensors" for i, name in enumerate(bare)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    loads(shards)
    pickled = variant()
    for name, part in (("a", list(bare.items())[:9]), ("b", list(bare.items())[9:])):
        torch.save({key: t.clone() for key, t in part}, pickled / f"{name}.bin")
    where = {name: file.replace("safetensors", "bin") for name, file in where.items()}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    loads(pickled)
    pickled = variant()
    torch.save({name: t.clone() for name, t in tensors.items()}, pickled / "pytorch_model.bin")
    (pickled / "tf_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")  # not asked for
    loads(pickled)
    for dtype in (torch.float16, torch.bfloat16):
        half = m.load_model(variant(model={name: t.to(dtype) for name, t in tensors.items()}))
        close(half.wpe.weight, tiny().wpe.weight, 0.02)

def test_weights_that_are_no_numbers_or_other_programs_are_named(tmp_path):
    for value in (math.nan, -math.inf):
        net = tiny()
        with torch.no_grad():
            net.h[0].attn.c_attn.weight[1, 2] = value
        save(tmp_path / "broken", net)
        refuses(lambda: m.load_model(tmp_path / "broken"), "broken: h.0.attn.c_attn.weight: holds nan")
    nanogpt, net = tmp_path / "nanogpt", tiny(vocab_size=50304)
    nanogpt.mkdir()
    net.cfg.tokenizer = "gpt2"
    sizes = {name: getattr(net.cfg, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    names = {"_orig_mod.transformer." + name: t for name, t in net.state_dict().items()}
    torch.save({"model": names | {"_orig_mod.lm_head.weight": net.wte.weight.detach()}, "optimizer": {},
                "model_args": sizes | {"block_size": net.cfg.n_positions}}, nanogpt / "ckpt.pt")
    (tmp_path / "gpt2_124M.bin").touch()
    for path, words in ((nanogpt, "nanoGPT"), (nanogpt / "ckpt.pt", "docs/reference.md"),
                        (tmp_path / "gpt2_124M.bin", "export_hf.py")):
        refuses(lambda: m.load_model(path), "no checkpoint here", words)
    told = (ROOT / "docs/reference.md").read_text().split("```python\n")[1].split("```")[0]
    with mock.patch.object(torch, "load", partial(torch.load, nanogpt / "ckpt.pt")):
        exec(told.replace('"ckpt.pt", ', "").replace("out/nanogpt", str(tmp_path / "converted")), {})
    assert torch.equal(weights_of(m.load_model(tmp_path / "converted")), weights_of(net))

@in_every_family
def test_what_is_written_is_read_back_in_our_names_and_orientation(tmp_path):
    for net, labels, padding in ((tiny(), None, None), (tiny(Scorer), 1, TINY.first)):
        config, tensors = m.exported(net)
        hub.write(str(tmp_path), config, tensors)  # a name does, too, as it does for read
        config_too, tensors_too = hub.read(str(tmp_path))
        stored = json.loads((tmp_path / "config.json").read_text())
        assert GPTConfig(**config_too) == net.cfg and config_too == hub.read_config(tmp_path)
        assert (stored.get("num_labels"), stored.get("pad_token_id")) == (labels, padding)
        assert tensors_too.keys() == tensors.keys() == net.state_dict().keys()
        head = (tmp_path / "model.safetensors").read_bytes()[:8]
        assert int.from_bytes(head, "little") % 8 == 0  # so that all tensors are aligned
        assert all(torch.equal(tensors_too[name], t) for name, t in net.state_dict().items())

def test_what_is_no_gpt2_is_refused_by_name_and_no_code_runs(tmp_path):
    save(tmp_path, tiny())
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    load, settings = lambda: m.load_model(tmp_path), json.loads(config.read_text())
    tensors = {name: t.clone() for name, t in hub.read_safetensors(path).items()}
    unknown = {"model_type": "mistral", "activation_function": "relu", "scale_attn_weights": False,
               "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True,
               "layer_norm_epsilon": 1e-6, "tokenizer": ["t"]}
    for change, changed, *words in (
            *(({name: value}, {}, f"{name} is {value};") for name, value in unknown.items()),
            ({"n_inner": 96}, {}, "another shape", "c_fc"), ({"n_embd": None}, {}, "sizes"),
            ({"n_embd": 10**9}, {}, "sizes"), ({"vocab_size": 21128}, {}, "21128 rows", "tiny"),
            ({"n_layer": 5000}, {}, "more than model.safetensors holds"),
            ({}, {"transformer.wte.weight": torch.zeros(21128, 32)}, "21128 rows"),
            ({}, {"lm_head.weight": torch.zeros(1024, 32)}, "lm_head.weight", "tied"),
            ({}, {"transformer.ln_f.bias": None}, "ln_f.bias"), ({}, {"extra": torch.zeros(1)}, "extra")):
        config.write_text(json.dumps(settings | change))
        hub.write_safetensors(path, {name: t for name, t in (tensors | changed).items() if t is not None})
        refuses(load, *words)
    path.unlink()
    config.write_text(json.dumps(settings))
    class Evil:
        __reduce__ = lambda self: (os.mkdir, (str(tmp_path / "ran"),))
    for stored, word in (({"wte.weight": torch.zeros(10**5), "x": Evil()}, "without running its code"),
                         ({"state_dict": tensors}, "not a state_dict()")):
        torch.save(stored, tmp_path / "pytorch_model.bin")
        refuses(load, "pytorch_model.bin", word)
    assert not (tmp_path / "ran").exists()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
    index = json.dumps({"weight_map": {"wte.weight": "lost.safetensors"}})
    for name, text, *words in (
            ("model.safetensors", pointer, "model.safetensors", "git lfs pull"),
            ("model.safetensors.index.json", index, "lost.safetensors"),
            ("config.json", "[1]", "config.json")):
        (tmp_path / name).write_text(text)
        refuses(load, *words)
        (tmp_path / name).unlink()

def test_gpt2s_own_rows_pass_and_get_room_for_the_control_tokens(tmp_path):
    gpt2()
    net = GPT(GPTConfig(50257, 64, 1, 2, 8, "gpt2")).initialize(rng(0))
    with mock.patch.object(hub, "tokenizer_files", return_value={}):
        save(tmp_path, net)
    for tokens in ('{"Ġthe": 262}', '{"\\u0120the": 262}'):
        (tmp_path / "vocab.json").write_text(tokens, encoding="utf-8")
        grown = m.load_model(tmp_path).wte.weight
        assert torch.equal(grown[:50257], net.wte.weight) and len(grown) == 50304, tokens
        close(grown[50257:], net.wte.weight.mean(0).expand(47, -1))
    (tmp_path / "vocab.json").write_text(json.dumps({"Ġque": 262}))
    refuses(lambda: m.load_model(tmp_path), "vocab.json", "not GPT-2's tokens", "tokenizer.json")


# --- model.py: the network, generation, the chat ------------------------------------------------------------

def test_attention_follows_the_formula_and_sees_neither_the_future_nor_the_padding():
    q, k, v = torch.randn(3, 1, 2, 520, 8, generator=rng(0))
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(520, 520).triu(1).bool(), -math.inf)
    for n in (520, 9):
        close(m.attend(*(x[:, :, :n] for x in (q, k, v))), (scores.softmax(-1) @ v)[:, :, :n])
    net, idx, row = tiny(), random_ids(1, 12), random_ids(1, 9)
    before, after = net(idx)[0], net(torch.cat([idx[:, :8], torch.full((1, 4), 3)], 1))[0]
    assert torch.equal(before[:8], after[:8]) and not torch.equal(before[8:], after[8:])
    close(net(F.pad(row, (0, 20), value=77))[:, :9], net(row))
    scorer, full = tiny(Scorer, n_positions=60), random_ids(1, 60)  # pad() makes 64 columns of a full row
    close(scorer.scores([full.tolist()]), values_of(scorer, full)[:, -1])
    assert len(greedy(tiny(n_positions=60), [[5, 6, 7]], 57)[0]) == 57

def test_the_first_loss_is_near_ln_v_and_first_scores_have_spread_one():
    net, idx = tiny(n_embd=64, spread=0), random_ids(4, 33)
    nll = m.negative_log_likelihood(net, [(r[:-1], r[1:]) for r in idx.tolist()], CPU)
    # the logits of a fresh network are random with a spread of 1/2, which costs (1/2)^2 / 2 nats
    close(nll.mean(), math.log(net.cfg.vocab_size) + 1 / 8, 0.06)
    scores = tiny(Scorer, n_embd=128, spread=0).scores([[row] for row in random_ids(400, 12).tolist()])
    assert 0.5 < scores.std() < 1.5
    close(-F.logsigmoid(torch.zeros(())), math.log(2), 5e-7)

def test_a_score_is_the_number_at_the_last_position_and_a_shift_adds_a_constant():
    net, idx, lengths = tiny(Scorer), random_ids(3, 8), [8, 3, 5]
    before = values_of(net, idx)
    close(net.scores([[row[:n]] for row, n in zip(idx.tolist(), lengths)]),
          before[torch.arange(3), torch.tensor(lengths) - 1])
    net.shift(1.5)
    close(values_of(net, idx), before + 1.5)

def branching_cases():
    """Groups of rows: unequal replies, prompts cut from the left, a reply that is the beginning of another,
    two equal ones."""
    ids = random_ids(1, 200).flatten().tolist()
    return [[ids[:20] + ids[40:43], ids[:20] + ids[50:61]], [ids[5:30], ids[5:30] + ids[60:64]],
            [ids[7:33]] * 2, [ids[2:28] + ids[70:75], ids[2:28] + ids[70:73] + ids[80:88]]]

def each_alone(groups):
    return [[row] for rows in groups for row in rows]

def all_close(results):
    """Lists of tensors: each like the first."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b, 3e-6 * max(1, b.abs().max().item()))

@in_every_family
def test_rows_that_branch_score_as_rows_of_their_own():
    groups = branching_cases()
    arguments = batches.branching(groups, CPU)
    assert arguments["branch"].max() == 2 and len(arguments["idx"]) == 4  # they do branch
    assert arguments["idx"].numel() < 0.8 * pad([row for [row] in each_alone(groups)]).numel()
    assert set(batches.branching([[[5, 6]], [[7]]], CPU)) == {"idx", "keep"}  # nothing in common: rows alone
    for changes in ({}, {"checkpoint": True}):
        results = []
        for rows in (groups, each_alone(groups)):
            net = tiny(Scorer, **changes)
            for i in (0, 1):  # LoRA is a part of each matrix
                net.h[i].attn.c_attn.add_lora(2, rng(i))
                nn.init.normal_(net.h[i].attn.c_attn.lora_b, generator=rng(i, "b"))
            scores = net.scores(rows)
            (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
            results.append([scores.detach(), *(p.grad for p in net.parameters())])
        all_close(results)
    ids = random_ids(1, 60).flatten().tolist()
    many = [[ids[:16] + ids[16 + 4 * i:20 + 4 * i] for i in range(9)]]  # a branch does not see its sisters
    close(tiny(Scorer).scores(many), tiny(Scorer).scores(each_alone(many)), 1e-6)
    assert batches.branching(many, CPU)["idx"].numel() == 16 + 4 * 9 + 4  # padded to 56

@in_every_family
def test_rows_that_branch_learn_the_same_with_every_offload():
    pairs, grads = branching_cases(), []
    split = lambda groups, device: batches.branching(each_alone(groups), device)
    for changes in ({}, {"microbatch": 1}, {"offload": "optimizer"}, {"offload": "all"}):
        for branching in (batches.branching, split):
            cfg = reward.Config(batch=len(pairs), **changes)
            net = m.setup_training(tiny(Scorer), cfg, CPU)
            adam = memory.make_optimizer(net, cfg)
            with mock.patch.object(m, "branching", branching):
                reward.learn(net, [([], *pair) for pair in pairs], cfg)
            grads.append([master.grad for master in adam.masters])
    all_close(grads)

def test_rows_that_branch_take_less_memory_and_a_dry_run_counts_what_is_kept_for_backward(tmp_path):
    peaks, prompt = [], list(range(200))
    for pair in ((prompt + [1] * 56, prompt + [2] * 56), ([1] * 256, [2] * 256)):
        with dry_run.dry_run() as count:
            net = tiny(Scorer, n_layer=3, n_positions=256).to(dry_run.DEVICE)
            count.phase("update")
            reward.learn(net, [([], *pair)] * 8, reward.Config(batch=8))
        peaks.append(count.phases["update"]["peak_device_bytes"])
    assert peaks[0] < 0.75 * peaks[1], peaks
    for stage in (sft, reward):
        a, b = (run(stage, tmp_path, init="scratch", batch=batch, dry_run=True)[0]
                ["phases"]["update"]["owners"]["activations"] for batch in (4, 8))
        assert b > 1.8 * a, stage

def test_logits_far_from_zero_are_as_exact_in_bfloat16_as_those_near_it():
    # GPT-2's own lie near -100, where bfloat16 has steps of 0.5
    noise = torch.randn(1000, 256, generator=rng(0)) * 0.3
    hidden = torch.randn(64, 256, generator=rng(1)) + 0.5
    moved = hidden + 0.01 * torch.randn(hidden.shape, generator=rng(2))
    targets = (hidden @ noise.T).argmax(1)  # tokens as a policy would choose them
    logprobs = lambda logits: logits.log_softmax(-1)[torch.arange(64), targets]
    net, errors, ratios, wrong = GPT(GPTConfig(1000, 8, 0, 1, 256, "tiny")).bfloat16(), [], [], []
    for offset in (0.0, -100 / (256 * 0.5)):
        net.wte.weight.data = weight = (noise + offset).bfloat16()
        exact, got, plain = [], [], []
        for h in (hidden.bfloat16(), moved.bfloat16()):
            exact.append(logprobs(h.double() @ weight.double().T))
            got.append(token_logprobs(h, weight, targets, chunk=300)[0].double())
            plain.append(logprobs((h @ weight.T).float()))  # the mistake
            close(logprobs(net.logits(h)), exact[-1], 0.1)
        errors.append((got[0] - exact[0]).square().mean().sqrt())
        ratios.append((got[1] - got[0] - (exact[1] - exact[0])).exp())
        wrong.append((plain[1] - plain[0] - (exact[1] - exact[0])).exp())
    assert errors[1] < 1.5 * errors[0], errors
    assert all((r - 1).abs().max() < 0.2 for r in ratios) and (wrong[1] - 1).abs().max() > 0.2

def test_logits_equal_those_of_transformers(tmp_path):
    # weights from a formula, in the hub's layout; the numbers are transformers 5.24's, GPT2LMHeadModel
    # and GPT2ForSequenceClassification (which seeks the last token that is not padding) and the like of the
    # others, for these ids
    ids = torch.arange(12)[None] * 37 % 1000
    ids[0, -1] = TINY.end
    for family, cls, golden in (({}, GPT, [-3.50855, 1.51101, 2.38861, -3.28141, 0.04353, 3.24915]),
                                ({}, Scorer, [-2.45859]),
                                (LLAMA, GPT, [-0.50108, -0.87075, 1.14647, 0.021, -1.16204, 0.84029]),
                                (LLAMA, Scorer, [-0.46861]),
                                (QWEN3, GPT, [-2.71235, -0.05605, 2.7539, -1.9851, -1.28257, 2.93572]),
                                (QWEN3, Scorer, [2.26365])):
        path = tmp_path / f"{family.get('model_type')}{cls.__name__}/model.safetensors"
        save(path.parent, tiny(cls, n_embd=16, n_positions=32, **family))
        tensors = {}
        for i, (name, p) in enumerate(sorted(hub.read_safetensors(path).items())):
            wave = 0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.3 + i * 0.7)
            is_scale = re.search(r"(ln_.|norm)\.weight$", name) is not None
            tensors[name] = (wave + is_scale).float().view(p.shape)
        hub.write_safetensors(path, tensors)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # data begin at a multiple of 8 bytes
        net = m.load_model(path.parent, cls)
        close(net.logits(net(ids))[0, -1, :6] if cls is GPT else net.scores([ids.tolist()]), golden, 2e-5)

def test_equal_prompts_are_read_once_and_the_device_is_asked_once_a_token():
    net, prompts = tiny(), [[5, 6, 7]] * 3 + [[8, 9]] * 2 + [[5, 6, 7]]
    u = torch.rand(6, 12, generator=rng(0))
    alone = [generate(net, [p], 12, TINY.end, u=u[i:i + 1])[0] for i, p in enumerate(prompts)]
    waits, to_list = [], torch.Tensor.tolist
    def wait(t):
        waits.append(t.shape)
        return to_list(t)
    asks = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("item", "__bool__", "__int__")}
    with mock.patch.multiple(torch.Tensor, tolist=wait, **asks), \
         mock.patch.object(GPT, "forward", autospec=True, side_effect=GPT.forward) as forward:
        together = generate(net, prompts, 12, TINY.end, u=u)
    rows = [len(call.args[1]) for call in forward.call_args_list]
    assert together == alone and rows[0] == 2 and rows[1] <= 6
    assert len(waits) == max(map(len, together))

def until(end, reply):
    return reply[:reply.index(end) + 1] if end in reply else reply

def test_generation_ends_per_row_whoever_its_neighbours_are_and_when_all_have_ended():
    net, prompts = tiny(spread=0.1), [[5, 6], [7, 8, 9], [10]]
    free = generate(net, prompts, 16, -1, generator=rng(1))
    cut = generate(net, prompts, 16, free[0][2], generator=rng(1))
    assert cut == [until(free[0][2], reply) for reply in free]
    net, prompts = tiny(), [[5, 6, 7], [8], [9, 10]]
    free = greedy(net, prompts, 12)
    assert greedy(net, prompts, 12, end=free[0][3]) == [until(free[0][3], reply) for reply in free]
    # no more work for what has ended, in eights
    prompts = [random_ids(2 + i % 5, seed=i).tolist() for i in range(19)]
    free = greedy(net, prompts, 12)
    end = Counter(t for reply in free for t in reply).most_common(1)[0][0]
    stopped, shapes = watched(net, prompts, 12, end)
    assert stopped == [until(end, reply) for reply in free]
    going = [sum(len(reply) > step for reply in stopped) for step in range(12)]
    assert [n for n, _ in shapes[1:]] == [min(19, math.ceil(n / 8) * 8) for n in going[1:] if n]
    assert 8 in (n for n, _ in shapes)
    cache = m.Cache(net.cfg, torch.arange(3), 8, net.ln_f.weight)
    cache.kv.copy_(torch.randn(cache.kv.shape))
    want, place = cache.kv[:, :, [0, 2]].clone(), cache.kv.data_ptr()
    cache.select(torch.tensor([0, 2]))
    assert torch.equal(cache.kv, want) and cache.kv.data_ptr() == place  # no second cache

@in_every_family
def test_matrices_packed_for_decoding_give_the_same_logits():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        net, idx = tiny().to(dtype), random_ids(2, 5)
        plain = net.logits(net(idx))
        with kernels.prepacked(net, 2):
            able = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
            if dtype == torch.bfloat16:  # needs a processor that has it
                able = able and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            assert len(kernels.PACKED) == able * (2 * 4 + 1)  # four matrices a block, the output matrix
            close(net.logits(net(idx)), plain, tolerance)
        assert torch.equal(net.logits(net(idx)), plain) and not kernels.PACKED

@in_every_family
def test_a_bfloat16_model_decodes_what_its_full_forward_says():
    net, prompt = tiny().to(torch.bfloat16), [5, 6, 7, 8]
    reply = greedy(net, [prompt, prompt[:2]], 10)[0]
    table = logits(net, prompt + reply)[len(prompt) - 1:-1]
    assert (table.max(1).values - table[torch.arange(10), reply]).max() < 0.1  # likeliest, but for rounding

def test_top_k_and_top_p_keep_exactly_the_most_likely():
    row, u = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.rand(2000, generator=rng(0))
    sampled = lambda **how: m.sample(row.repeat(2000, 1), u, **how)
    for how, kept in ({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({"temperature": 0}, {0}), \
                     ({"top_p": 0.7}, {0, 1}):  # 0.64 does not reach 0.7, 0.88 does
        assert set(sampled(**how).tolist()) == kept, how
    close(sampled().bincount(minlength=4) / 2000, row[0].softmax(0), 0.04)
    # never a token that was filtered out
    assert m.sample(row.repeat(2, 1), torch.tensor([0.0, 1 - 2 ** -24]), top_k=2).tolist() == [0, 1]

def test_tokens_are_seen_as_they_come_and_prompts_that_do_not_fit_are_refused():
    seen = []
    replies = generate(tiny(), [[5, 6], [7]], 4, -1, generator=rng(0), on_token=lambda *x: seen.append(x))
    assert [[t for row, t in seen if row == i] for i in (0, 1)] == replies and len(seen) == 8
    for prompts in ([[1] * 60], [[]], [[1], []]):
        refuses(lambda: generate(tiny(), prompts, 10, end=-1), kind=ValueError)

def talk(cfg, *typed, **instead):
    """-> what main() returned and printed, where this is typed in and functions of the chat are replaced."""
    with mock.patch("builtins.input", side_effect=typed), mock.patch.multiple(chat, **instead):
        return quiet(chat.main, cfg)

def test_the_chat_keeps_turns_resets_compares_and_stops_at_ctrl_c(tmp_path):
    run(sft, tmp_path)
    save(tmp_path / "b", tiny(seed=1))
    save(tmp_path / "reward_model", tiny(Scorer))
    one = chat.Config(model=str(tmp_path / "out/sft"), dtype="float32", device="cpu")
    answer, text = quiet(chat.main, dataclasses.replace(one, prompt="Hello" * 100))
    assert answer in text
    seen = []
    def speak(net, tokenizer, messages, *_):
        seen.append([(turn["role"], turn["content"]) for turn in messages])
        return "Yes."
    three = dataclasses.replace(one, compare=str(tmp_path / "b"), reward=str(tmp_path / "reward_model"))
    _, text = talk(three, "Hi", "And?", "/reset", "Bye", EOFError, reply=speak)
    second = [("user", "Hi"), ("assistant", "Yes."), ("user", "And?")]
    assert seen == [second[:1]] * 2 + [second] * 2 + [[("user", "Bye")]] * 2  # each of both models
    assert text.count("(score ") == 6 and f"{three.compare}: " in text
    def interrupted(*_, on_token):
        on_token(0, TINY.encode(" yes")[0])
        raise KeyboardInterrupt
    assert talk(dataclasses.replace(one, prompt="Well?"), generate=interrupted)[0] == " yes"

def test_the_chat_forgets_whole_exchanges_oldest_first_and_survives_odd_bytes_and_a_lost_terminal(tmp_path):
    save(tmp_path / "a", tiny())
    save(tmp_path / "r", tiny(Scorer, n_positions=40))
    cfg = chat.Config(model=str(tmp_path / "a"), dtype="float32", device="cpu", max_new_tokens=24)
    speak = mock.Mock(return_value=[])
    talk(cfg, *(f"{i} is a number?" for i in range(8)), EOFError, generate=speak)
    assert speak.call_count == 8
    for i, call in enumerate(speak.call_args_list):  # a whole question, and all from there on
        prompt = TINY.decode(call.args[1][0])
        first = int(prompt[0])
        assert prompt == "".join(f"{j} is a number?" for j in range(first, i + 1)) and (first > 0) == (i > 4)
    dialogue = [user("a b c d"), assistant("e")] * 9
    with mock.patch.object(Scorer, "scores", return_value=torch.zeros(1)) as scores:
        chat.score_dialogue(m.load_model(tmp_path / "r", Scorer), TINY, dialogue)
    [[ids]] = scores.call_args.args[0]
    assert ids == TINY.render(dialogue[-len(ids) // 8 * 2:])[0][-len(ids):]
    assert ids[0] == TINY.first and 24 < len(ids) <= 40
    question = [user("x " * 99)]
    assert chat.last_exchanges(dialogue + question, TINY, 40) == question  # the last one stays, however long
    said = mock.Mock(return_value="")
    talk(cfg, "caf\udce9", OSError, reply=said)
    assert said.call_args.args[2][0]["content"] == "caf?"
    with mock.patch.object(sys, "stdin", None):
        refuses(lambda: chat.main(cfg), "Standard input is closed", "--prompt")

def test_a_check_is_matched_in_full_and_given_up_after_a_second():
    passes = lambda check, text: evaluation.passes_check({"prompt": [user("What?")], "check": check}, text)
    assert passes("red", "red") and not passes("red", "red or blue")
    errors, began, setitimer = io.StringIO(), time.time(), signal.setitimer
    with mock.patch.object(evaluation.signal, "setitimer", lambda which, s: setitimer(which, s / 10)), \
         contextlib.redirect_stderr(errors):
        assert [passes(r"(?s)(.?.?)*\x00", "x" * 60) for _ in range(2)] == [False] * 2
    assert time.time() - began < 5 and errors.getvalue().count("(.?.?)*") == 1
    assert "'What?'" in errors.getvalue() and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


# --- data/prepare.py ----------------------------------------------------------------------------------------

def become(messages, *pairs):
    """All rows that one dialogue, or the better one of a pair, becomes: a demonstration and a prompt, too."""
    return {"sft": [{"messages": messages}], "preferences": [*pairs], "prompts": [{"prompt": messages[:-1]}]}

parts = lambda text: [{"type": "text", "text": text}]
Q, A, B = [user("Why?")], "Because.", "No idea."
TALK, WRONG = [*Q, assistant(A)], [*Q, assistant(B)]
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
PAIRS, TALKS = become(TALK, PAIR), become(TALK)
SYSTEM = {"role": "system", "content": "Be brief."}
BRIEF = become([SYSTEM, user("Why?"), assistant(A)])
FORMATS = {  # one record of each format -> what it must become
    "hh": ({"chosen": f"\n\nHuman: Why?\n\nAssistant: {A}", "rejected": f"\n\nHuman: Why?\n\nAssistant: {B}"},
           PAIRS),
    "trl strings": ({"prompt": "Why?", "chosen": A, "rejected": B}, PAIRS),
    "trl messages": ({"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant(B)]}, PAIRS),
    "ultrafeedback": ({"prompt": "Why?", "chosen": TALK, "rejected": WRONG, "score_chosen": 7.5}, PAIRS),
    "ranked": ({"instruction": "Why?", "output_1": B, "output_2": A, "preference": 2}, PAIRS),
    "lists with a prompt of their own": ({"prompt": "How?", "chosen": TALK, "rejected": WRONG}, PAIRS),
    "alpaca": ({"instruction": "Why?", "input": "", "output": A}, TALKS),
    "alpaca input": ({"instruction": "Add.", "input": "1 2", "output": "3"},
                     become([user("Add.\n\n1 2"), assistant("3")])),
    "dolly": ({"instruction": "Why?", "context": "", "response": A, "category": "qa"}, TALKS),
    "completion": ({"prompt": "Why?", "completion": A}, TALKS),
    "response": ({"prompt": "Why?", "response": A}, TALKS),
    "question": ({"question": "Why?", "answer": A}, TALKS),
    "openai": ({"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, BRIEF),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": A}]}, TALKS),
    "content in parts": ({"messages": [{**x, "content": parts(x["content"])} for x in TALK]}, TALKS),
    "nulls": ({"messages": TALK, "prompt": None, "chosen": None, "rejected": None, "text": None}, TALKS),
    "system, history": ({"instruction": "Why?", "output": A, "system": "Be brief.", "history": [["a", "b"]]},
                        become([SYSTEM, user("a"), assistant("b"), *TALK])),
    "reply in parts": ({"prompt": "Why?", "completion": parts(A)}, TALKS),
    "message in parts": ({"prompt": "Why?", "completion": [assistant(parts(A))]}, TALKS),
    "history of messages": ({"prompt": "Why?", "completion": A, "history": [user("a"), assistant("b")]},
                            become([user("a"), assistant("b"), *TALK])),
    "system, prompt, output": ({"prompt": "Why?", "output": A, "system_prompt": "Be brief."}, BRIEF),
    "context": ({"question": "Why?", "context": "It rains.", "answer": A},
                become([user("Why?\n\nIt rains."), assistant(A)])),
    "hh with a prompt": ({"prompt": "\n\nHuman: Why?\n\nAssistant:",
                          "chosen": f"\n\nHuman: Why?\n\nAssistant: {A}",
                          "rejected": f"\n\nHuman: Why?\n\nAssistant: {B}"}, PAIRS),
    "hh with a plain prompt": ({"prompt": "Why?", "chosen": f"\n\nHuman: Why?\n\nAssistant: {A}",
                                "rejected": f"\n\nHuman: Why?\n\nAssistant: {B}"}, PAIRS),
    "many rejected": ({"prompt": "Why?", "chosen": A, "rejected": [B, "So."]},
                      become(TALK, PAIR, PAIR | {"rejected": "So."})),
    "a system text told twice": ({"system": "Be brief.", "messages": [SYSTEM, *TALK]}, BRIEF),
    "a label of another kind": ({"prompt": "Why?", "completion": A, "label": "physics"}, TALKS),
    "a prompt alone": ({"question": "Why?"}, {"sft": [], "preferences": [], "prompts": [{"prompt": Q}]}),
    "a turn to read, not to learn": ({"conversations": [*Q, assistant(B) | {"weight": 0}, *Q, assistant(A)]},
                                     become([*Q, assistant(B) | {"weight": 0}, *TALK])),
    "the same in other words": ({"messages": [*Q, assistant(B) | {"loss": False}, *Q,
                                              assistant(A) | {"train": True}]},
                                become([*Q, assistant(B) | {"weight": 0}, *TALK])),
    "text": ({"text": "Once."}, {"sft": [{"text": "Once."}], "preferences": [], "prompts": []}),
}

def convert(root, *records, name="in.jsonl", fresh=True, **flags):
    """Records, or the bytes of a file -> ({kind: rows, train before held out}, what was printed)."""
    path, out = root / name, root / "prepared"
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    lines = [r if isinstance(r, (bytes, str)) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    _, text = quiet(prepare.main, [path], out, **flags)
    return {kind: sum(map(jsonl, sorted(out.glob(f"{kind}.*"))), []) for kind in prepare.KINDS}, text

def test_every_format_becomes_our_rows_and_a_file_is_known_by_its_first_bytes(tmp_path):
    for name, (record, want) in FORMATS.items():
        assert convert(tmp_path, record)[0] == want, name
    record, want = FORMATS["alpaca"]
    line, indented = json.dumps(record).encode(), json.dumps(record, indent=1).encode()
    one, book = b"[" + line + b"]", b"".join(b"Line %d of a long story.\n\n" % i for i in range(500))
    for name, data in (
            ("in.json", one), ("in.jsonl", line), ("in.json.gz", gzip.compress(one)), ("in.jsonl", indented),
            ("in.JSON", line), ("IN.Json.GZ", gzip.compress(one)),
            ("in.jsonl.gz", gzip.compress(line)), ("in.jsonl", gzip.compress(line)), ("in.jsonl.gz", line),
            ("in.jsonl", one), ("in.jsonl", json.dumps([record], indent=1).encode()),
            ("in.jsonl", line.decode().encode("utf-16"))):
        assert convert(tmp_path, data, name=name)[0] == want, (name, data)
    assert convert(tmp_path, line, line, b"", name="in.json")[0]["sft"] == 2 * want["sft"]
    for name, data in (("in.txt", book), ("in.txt.gz", gzip.compress(book)), ("in.TXT", book),
                       ("IN.Txt.GZ", gzip.compress(book))):
        rows, _ = convert(tmp_path, data, name=name, val_fraction=0.0)
        assert "".join(row["text"] for row in rows["sft"]) == book.decode(), name
    for data, *fragments in ((b"PAR1\0", "read_parquet"), (b"PK\3\4", "zip"), (b"\xff" * 4 + b"\0", "Arrow"),
                             (b"version https://git-lfs", "git lfs pull"), (b'"a","b"\nc,d\n', ":1", ".csv"),
                             ("hello".encode("utf-16-le"), "UTF-8"), (b"<html>", "web page")):
        refuses(lambda: convert(tmp_path, data), "in.jsonl", *fragments)
    refuses(lambda: convert(tmp_path, b"one\ncaf\xe9 two", name="in.txt"), "in.txt:2", "iconv")

def test_what_cannot_be_used_is_dropped_with_a_reason_and_line(tmp_path):
    said = lambda reply, **more: {"prompt": "x", "completion": reply, **more}
    ours = {"agreement is 'high'": {**PAIR, "agreement": "high"}, "skill is not text": {**PAIR, "skill": 3},
            "agreement is 'nan'": {**PAIR, "agreement": math.nan},
            "not a regular expression (": {"prompt": Q, "check": "("},
            "not a regular expression (OverflowError": {"prompt": Q, "check": "x{1,99999999999}"}}
    bad = {"empty reply": said("  "), "is not text": said(7), "label is false": said("bad", label=False),
           "history is not a list": said("y", history=5), "no known format": {"foo": 1},
           "weight is '0.5'": {"messages": [*Q, assistant(A) | {"weight": 0.5}]},
           "every reply has weight 0": {"messages": [*Q, assistant(A) | {"weight": 0}]},
           "a part of content": {"messages": [*Q, assistant([{"type": "thinking", "text": "Hm."}])]},
           "a part of completion is not": said([assistant(A), *parts("x")]),
           "without a prompt: a dialogue begins": {**FORMATS["hh"][0], "rejected": B},
           "a whole dialogue where one turn": said("\n\nHuman: x\n\nAssistant: y"),
           "a turn is not an object": said("y", history=[["a", "b"], "cd"]),
           "both replies are equal": {**PAIR, "rejected": A}, "is not the assistant's": {"messages": Q},
           "prompts of chosen and rejected differ": {"chosen": TALK, "rejected": [user("What?"), WRONG[1]]},
           "turns do not alternate": {"messages": [*Q, *Q, assistant(A)]},
           "unknown role": {"messages": [{"role": "oracle", "content": "x"}, assistant("y")]},
           "system message that no": {"messages": [*Q, {"role": "system", "content": "s"}, assistant("b")]},
           "no clear preference": {"instruction": "x", "output_1": "a", "output_2": "b", "preference": 0},
           "input is not text": {"instruction": "x", "input": ["a"], "output": "b"},
           "one message of a tree": {"message_id": "1", "parent_id": None, "text": "hi", "role": "prompter"},
           "broken JSON": '{"prompt": ', "not a JSON object": "[1, 2]", "too deep": "[" * 10**5,
           "lone surrogate": '{"prompt": "x", "completion": "\\ud83d"}'}
    for reason, record in (bad | ours).items():
        rows, text = convert(tmp_path, PAIR, record, FORMATS["alpaca"][0], fresh=False)
        assert "in.jsonl:2: " in text and reason in text, (reason, text)
        assert (len(rows["sft"]), len(rows["preferences"])) == (2, 1), reason
        refuses(lambda: convert(tmp_path, PAIR, record, strict=True), "in.jsonl:2: ", reason)
    for reason, row in ours.items():  # in a folder of ours such rows are refused when they are loaded, too
        kind = "preferences" if "chosen" in row else "prompts"
        (tmp_path / f"{kind}.jsonl").write_text("\n" + json.dumps(row))
        refuses(lambda: prepare.load(tmp_path, kind), f"{kind}.jsonl:2", reason, "Mend or delete that line")
    _, text = convert(tmp_path, {**PAIR, "score": 1}, {**PAIR, "id": 2}, *[{"foo": 1}] * 30)
    assert text.count("further rows") == 1  # complaints end
    assert text.count("no known format") == 21 and "dropped 30: no known format" in text
    assert "in.jsonl: columns not used, in so many rows: id (1), score (1)\n" in text
    calls = {"messages": [*Q, assistant(A) | {"tool_calls": [{}], "reasoning": "Hm."}]}
    assert "not used, in so many rows: reasoning of a turn (2), tool_calls of a turn (2)\n" in convert(
        tmp_path, calls, calls)[1]

def test_whatever_goes_wrong_earlier_output_stays_and_is_named(tmp_path):
    convert(tmp_path, PAIR)
    out, bad, source = tmp_path / "prepared", tmp_path / "bad.json", tmp_path / "in.jsonl"
    before = {path: path.read_bytes() for path in out.iterdir()}
    bad.write_text('[{"prompt": "x",\n "completion" "y"}]')
    for path, to, *fragments in (
            (bad, out, "bad.json:2", "broken JSON"), (tmp_path / "none", out, "no such file"),
            (out / "sft.jsonl", out, "prepared/sft.jsonl", "Choose another --out"),
            (source, source, "--out=", "no folder that can be written to")):
        refuses(lambda: prepare.main([path], to), *fragments)
    refuses(lambda: prepare.load(bad, "sft"), "bad.json:2", "broken JSON")
    with mock.patch.object(prepare.os, "replace", side_effect=OSError(errno.ENOSPC, "no space left")):
        refuses(lambda: prepare.main([source], out), "--out=", "no space left")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.suffix for path in before) == ["", *[".jsonl"] * 3 * 2]  # .lock
    _, text = convert(tmp_path, FORMATS["text"][0], fresh=False)
    assert "preferences.jsonl: left from an earlier preparation" in text and "sft.jsonl: left" not in text

def test_a_text_file_stays_one_document_in_pieces_and_a_tenth_is_held_out(tmp_path):
    book = tmp_path / "book.txt"
    for text in ("".join(f"line {i} of a book\n" for i in range(20_000)), "".join(map(str, range(80_000)))):
        book.write_text(text)
        train, val = prepare.load(book, "sft")
        assert 0.03 < len(val) / len(train) < 0.25 and max(len(row["text"]) for row in train + val) < 6001
        rows = [row for _, row in prepare.read(book, None)]
        assert "".join(row["text"] for row in rows) == text
        windows = [w for row in rows for w in tokenizer.encode_demonstration(row, TINY, 64)]
        assert windows[0][0][0] == TINY.end == windows[-1][1][-1]
        assert sum(idx.count(TINY.end) + targets.count(TINY.end) for idx, targets in windows) == 2
    book.write_text(("x" * 299 + "\n") * 50)  # no blank line: at most twice the size
    sizes = [len(row["text"]) for _, row in prepare.text_chunks(book, 500)]
    assert sum(sizes) == 15000 and max(sizes) == 1000

def test_the_split_keeps_a_prompts_rows_together_and_is_loaded_as_written(tmp_path):
    pairs = ({"prompt": [user(f"Question {i % 50}?")], "chosen": f"{i}", "rejected": B} for i in range(400))
    convert(tmp_path, *pairs, val_fraction=0.3)
    rows = lambda name: jsonl(tmp_path / f"prepared/{name}.jsonl")
    questions = lambda name: {(row.get("prompt") or row["messages"])[0]["content"] for row in rows(name)}
    held_out = questions("preferences.val")
    assert 5 < len(held_out) < 25 and not held_out & questions("preferences")
    assert questions("prompts.val") == questions("sft.val") == held_out
    loaded = prepare.load(tmp_path / "prepared", "preferences")
    assert tuple(loaded) == (rows("preferences"), rows("preferences.val"))
    dialogues = ({"messages": [*TALK, user(f"{i}?"), assistant("Yes.")]} for i in range(30))
    others = ({"prompt": f"{i}", "completion": "b"} for i in range(30))
    convert(tmp_path, *dialogues, *others, val_fraction=0.5)
    assert sum(row["messages"][0] == Q[0] for row in rows("sft.val")) in (0, 30)  # all begin alike

def test_limit_max_tokens_bom_unicode_and_our_own_columns(tmp_path):
    rows, _ = convert(tmp_path, "\ufeff" + json.dumps(PAIR), {"text": "caf\u00e9 \U0001f600"})
    assert (rows["preferences"], rows["sft"][-1]["text"]) == ([PAIR], "caf\u00e9 \U0001f600")
    check = {"prompt": Q, "check": "Because\\.", "skill": "why"}
    assert convert(tmp_path, check, val_fraction=0.0)[0]["prompts"] == [check]
    assert len(convert(tmp_path, *({"text": f"number {i}"} for i in range(100)), limit=10)[0]["sft"]) == 10
    with mock.patch.object(prepare, "token_counter", lambda: lambda row: len(str(row))):
        rows, text = convert(tmp_path, {"text": "short"}, {"text": "long " * 100}, max_tokens=50)
    assert rows["sft"] == [{"text": "short"}] and "dropped 1: sft of more than 50 tokens" in text
    refuses(lambda: convert(tmp_path, {"text": "x"}, max_tokens=-1), "--max_tokens=-1")
    again = {"prompt": "Why?", "completion": A}, {**check, "right": "x"}, {**check, "right": "y"}
    rows, text = convert(tmp_path, *again, {"prompt": "How?"}, val_fraction=0.0)  # all that is known is kept
    assert rows["prompts"] == [{**check, "right": "x"}, {"prompt": [user("How?")]}]
    assert "dropped 1: a prompt that came before with other notes" in text

def test_max_tokens_counts_all_that_is_said_in_gpt2s_tokens():
    gpt2()
    for row, n in (({"text": "one two three"}, 3), ({"messages": [user("one"), assistant(" two")]}, 2),
                   ({"prompt": [user("one")], "chosen": " two", "rejected": " three four"}, 3)):
        assert prepare.token_counter()(row) == n, row

def test_memory_stays_flat_however_many_rows_there_are(tmp_path):
    peaks, path = [], tmp_path / "many.jsonl"
    for n in (10, 2_000, 20_000):  # the first warms up
        rows = ({"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(n))
        path.write_text("\n".join(map(json.dumps, rows)))
        tracemalloc.start()
        quiet(prepare.main, [path], tmp_path / "many")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 100_000

def test_instructions_to_follow_are_their_generators_and_their_checks_tell_kept_from_broken():
    train, val, shown = follow.make()
    for name, rows in (("prompts", train), ("prompts.val", val), ("sft", shown)):
        assert jsonl(ROOT / f"data/follow/{name}.jsonl") == rows, name
    asked = lambda rows: {row["prompt"][0]["content"] for row in rows}
    assert asked(train).isdisjoint(asked(val))
    sets = prepare.by_set(val)
    assert list(sets) == ["new topics", "new wordings", "new kinds"]
    known = {row["skill"] for row in train}
    assert {row["skill"] for row in sets["new topics"] + sets["new wordings"]} == known
    assert {row["skill"] for row in sets["new kinds"]} == {*follow.NEW_KINDS}
    for row in train + val:  # to say the instruction again is not to keep it
        assert not evaluation.passes_check(row, row["prompt"][0]["content"]), row
    kept = {"words": "Rain is very wet", "one sentence": "Rain is wet.",
            "no comma": "Rain is wet and it is cold", "lower case": "all the rain falls down.",
            "capitals": "RAIN IS WET!", "begin": "Well, rain is wet.",
            "end": "Rain is wet\nindeed.", "bullets": "- Rain\n* is wet.", "quotes": '"Rain is wet."',
            "question": "Rain is wet. Is it?", "thrice": "Very, very, very wet rain",
            "two sentences": "Rain is wet. It falls.", "short": "Rain is wet.",
            "word": "My mother likes rain.",
            "three sentences": "Rain. Is. Wet.", "brackets": "[Rain is wet.]", "thanks": "Rain! Thank you.",
            "no e": "Rain is a cold liquid.", "numbered": "1. Rain\n2. is\n3) wet"}
    draw = mock.Mock(choice=lambda options: options[1] if options == (3, 4, 5, 6) else options[0])
    found = follow.kinds("rain", draw)
    matches = lambda kind, text: evaluation.passes_check({"check": found[kind][0]}, text)
    assert kept.keys() == found.keys() and all(len(wordings) in (1, 3) for _, wordings in found.values())
    for kind, text in kept.items():
        assert matches(kind, text), (kind, text)
        assert not matches(kind, re.sub("(?i)rain", "snow", text)), kind  # not about what was asked
        assert not matches(kind, "") and not matches(kind, "Rain"), kind
    broken = {"words": "Rain is wet", "one sentence": "Rain is wet. It falls.",
              "no comma": "Rain is wet, and it is cold", "lower case": "All the rain falls down.",
              "capitals": "RAIN IS Wet!", "begin": "Rain? Well, it is wet.",
              "end": "Indeed, rain is wet.", "bullets": "- Rain\n- is\n- wet", "quotes": '"Rain" is "wet"',
              "question": "Is rain wet? Yes.", "thrice": "Very, very wet rain",
              "two sentences": "Rain is wet.",
              "short": "Rain " * 9, "word": "Mothers like rain.", "three sentences": "Rain. Is wet.",
              "brackets": "[Rain] is wet.", "thanks": "Thank you for the rain.", "no e": "Rain is the cold.",
              "numbered": "1. Rain\n2. is wet"}
    for kind, text in broken.items():
        assert not matches(kind, text), (kind, text)

def test_the_bundled_set_is_its_generators_holds_prompts_out_and_its_checks_tell_good_from_bad(tmp_path):
    quiet(make.main, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "data/tiny" / path.name).read_bytes(), path.name
    sft_rows, pairs, prompts = (prepare.load(ROOT / "data/tiny", kind) for kind in prepare.KINDS)
    asked = lambda side: {turn["content"] for row in (*sft_rows[side], *pairs[side], *prompts[side])
                          for turn in row.get("messages", row.get("prompt")) if turn["role"] == "user"}
    assert not asked(0) & asked(1)
    sets = prepare.by_set(prompts[1])
    assert {name: len(rows) for name, rows in sets.items()} == {"held out": 600, **make.SETS}
    for row in prompts[1][::7]:
        for text in ("I do not care.", "", "Sure."):
            assert not evaluation.passes_check(row, text) and not evaluation.passes_check(row, text, "right")
    row = next(row for row in sets["new facts"] if row["skill"] == "sum")
    a, b = map(int, re.findall(r"(\d) plus (\d)", row["check"])[0])
    c = a + b
    for text, *want in ((f"Sure. That makes {c}.", 1, 1), (f"Sure. {b} plus {a} is {c}.", 1, 1),
                        (f"Sure. That makes {c}. My uncle has a wooden sledge.", 1, 0), (f"{c}", 1, 0),
                        (f"Everybody knows that: {c}.", 1, 0), (f"Sure!! It is {c}!!", 1, 0),
                        (f"{c} plus {b} is 99.", 0, 0), (f"Sure. It is {c}, 4 or 7.", 0, 0),
                        ("Gladly. It is 99.", 0, 0)):
        assert [evaluation.passes_check(row, text, name) for name in ("right", "check")] == want, text
    # no way to ask for a new fact, and no question about a new thing, occurs in training
    numbers = lambda row: sorted(re.findall(r"\d+", row["prompt"][-1]["content"]))
    trained = [numbers(row) for row in prompts[0] if row["skill"] == "sum"]
    assert not any(numbers(row) in trained for row in sets["new facts"] if row["skill"] == "sum")
    for row in (row for row in prompts[1] if row["skill"] == "unknown"):  # to admit it is always right
        assert evaluation.passes_check(row, "Sorry. I do not know that.")
        assert not evaluation.passes_check(row, "Sure. It is 5.", "right")
    short = [row for row in prompts[0] if re.match("(?i)and ", row["prompt"][-1]["content"])]
    assert len(short) > 100 and all(len(row["prompt"]) > 1 for row in short)
    typed = [json.loads(line) for line in open(ROOT / "data/tiny/asked.jsonl", encoding="utf-8")]
    assert len(typed) == 150 and all(re.compile(row["right"]) and "inside" in row for row in typed)
    turns = Counter(len(row["prompt"]) // 2 + 1 for row in prompts[0])
    assert max(turns) == 5 and 0.17 < 1 - turns[1] / sum(turns.values()) < 0.23
    assert 0.05 < turns[5] / sum(turns.values()) < 0.15
    assert {len(row["messages"]) // 2 for row in sft_rows[0]} == {1, 2, 3, 4, 5}
    assert all(0 <= pair["agreement"] <= 1 for pair in pairs[1])


# --- sft.py, reward.py, and the mathematics of ppo.py -------------------------------------------------------

def test_pretraining_on_text_reports_loss_per_character(tmp_path):
    book, mixed = tmp_path / "book.txt", tmp_path / "mixed.jsonl"
    book.write_text("\n\n".join(f"The cat number {i} sat on the mat." * 20 for i in range(60)))
    result, text = run(sft, tmp_path, data=str(book), steps=3)
    assert 0 < result["val_loss_per_character"] < result["val_loss"] and "; 0 longer than" in text
    val = prepare.load(book, "sft")[1]
    targets = tokenizer.count_targets(w for row in val for w in tokenizer.encode_demonstration(row, TINY, 64))
    nats = result["val_loss"] * targets
    close(result["val_loss_per_character"], nats / sum(len(row["text"]) for row in val), 1e-9)
    rows = [row for i in range(40) for row in ({"text": f"The cat number {i}."},
                                               {"messages": [user(f"{i}?"), assistant("Yes.")]})]
    mixed.write_text("\n".join(map(json.dumps, rows)))  # needs a text in every held-out row
    assert "val_loss_per_character" not in run(sft, tmp_path, data=str(mixed), steps=3)[0]

def test_every_target_weighs_the_same_whatever_its_batch():
    net, cfg = tiny(), sft.Config(batch=2)
    short, long = [([5, 6], [6, 7])] * 2, [(random_ids(20).tolist(), random_ids(20, seed=1).tolist())] * 2
    for batch in (short, long):
        sft.learn(net, batch, 22, cfg, CPU)  # the two hold 4 and 40 targets: 22 on average
    got = net.wte.weight.grad.clone()
    net.zero_grad()
    for e in (*short, *long):
        (m.negative_log_likelihood(net, [e], CPU).sum() / 22).backward()
    close(got, net.wte.weight.grad)

def test_dialogues_cut_short_or_with_nothing_to_learn_from_are_counted(tmp_path):
    cfg = small(sft, tmp_path, block_size=16)
    _, text = quiet(sft.load_examples, cfg, TINY)
    rows = [row for rows in prepare.load(cfg.data, "sft") for row in rows]
    longer = sum(len(TINY.render(row["messages"])[0]) - 1 > 16 for row in rows)
    assert 0 < longer and f"{longer} longer than 16 tokens" in text
    assert "dropped" not in quiet(sft.load_examples, small(sft, tmp_path), TINY)[1]
    with mock.patch.object(examples, "encode_demonstration", lambda *_: [([1], [-1])]):
        refuses(lambda: sft.load_examples(cfg, TINY), "learn")

def test_the_shift_is_measured_on_stage_1s_replies_to_training_prompts(tmp_path):
    run(sft, tmp_path)
    cfg, net = small(reward, tmp_path, microbatch=3, block_size=24), tiny(Scorer)
    asked = [row["prompt"] for row in prepare.load(cfg.data, "prompts")[0][:4]]
    cut, said = [TINY.prompt(turns, 12) for turns in asked], [[7, TINY.end], [8, 9]] * 2
    assert any(len(TINY.prompt(turns, 99)) > 12 for turns in asked)
    def speak(policy, prompts, new, end, generator, batch):
        assert torch.equal(weights_of(policy), weights_of(m.load_model(cfg.init)))
        assert (prompts, new, batch) == (cut, 12, 3)
        return said
    with mock.patch.object(m, "generate_many", speak):
        got = reward.mean_sft_score(net, cfg, TINY, CPU, torch.float32, n=4)
    close(got, sum(values_of(net, torch.tensor([p + r]))[0, -1] for p, r in zip(cut, said)) / 4)
    cfg.init = "scratch"
    assert reward.mean_sft_score(net, cfg, TINY, CPU, torch.float32) is None

def slopes_agree(loss, x):
    """Autograd's gradient and finite differences."""
    assert torch.autograd.gradcheck(loss, (x.double().requires_grad_(),), eps=1e-6, atol=1e-5)

def test_every_loss_agrees_with_finite_differences():
    old, advantages, returns = torch.randn(3, 2, 6, generator=rng(0)).double()
    x = old + 0.3 * torch.randn(2, 6, generator=rng(1)).double()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    slopes_agree(lambda x: ppo.policy_loss(x, old, advantages, mask, 0.2)[0], x)
    slopes_agree(lambda x: ppo.value_loss(x, old, returns, mask, 0.2), x)
    slopes_agree(lambda x: -F.logsigmoid(x[0] - x[1]).mean(), x)
    # token_logprobs works in float32: compare slopes along random directions
    h, w = torch.randn(5, 8, generator=rng(2)), torch.randn(20, 8, generator=rng(3))
    targets, d = torch.tensor([3, -1, 0, 19, 7]), torch.randn(5, 8, generator=rng(4))
    f = lambda h: token_logprobs(h, w, targets)[0].double().sum()
    f(h.requires_grad_()).backward()
    close((f(h.detach() + 1e-2 * d) - f(h.detach() - 1e-2 * d)) / 2e-2, (h.grad * d).sum(), 5e-3)
    # the reward model's: centring sees only what the pair has in common
    chosen, rejected = torch.randn(2, 6, generator=rng(0)).double()
    slopes_agree(lambda x: reward.bradley_terry(x, rejected)[0], chosen)
    (loss, common), (shifted, more) = (reward.bradley_terry(chosen + x, rejected + x) for x in (0, 3))
    close(loss, shifted, 5e-8)
    assert more > common and reward.bradley_terry(chosen, -chosen)[1] == 0

def test_gae_on_three_tokens_worked_by_hand():
    # gamma 1, lambda 0.5; deltas: 0 + 2 - 1 = 1, 0 + 3 - 2 = 1, 5 + 0 - 3 = 2
    # advantages from the end: 2, 1 + 0.5 * 2 = 2, 1 + 0.5 * 2 = 2
    rewards, values = torch.tensor([[0.0, 0.0, 5.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert ppo.gae(rewards, values, mask, 1.0, 0.5).tolist() == [[2, 2, 2, 0]]

def test_gae_equals_its_definition_by_brute_force():
    rewards, values = torch.randn(2, 4, 9, generator=rng(0))
    spans = [(0, 9), (2, 6), (5, 7), (8, 9)]
    mask = torch.tensor([[s <= t < e for t in range(9)] for s, e in spans])
    got = ppo.gae(rewards, values, mask, 0.9, 0.8)
    for b, (s, e) in enumerate(spans):
        following = F.pad(values[b, s + 1:e], (s, 10 - e))
        delta = rewards[b] + 0.9 * following - values[b]
        for t in range(s, e):
            close(got[b, t], sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, e)), 5e-6)

def test_the_clipped_objective_stops_pushing_beyond_the_clip():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()[None].requires_grad_()
    loss, share, _, _ = ppo.policy_loss(logprobs, old, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), mask, 0.2)
    loss.backward()
    assert (logprobs.grad[0] != 0).tolist() == [False, True, True, False] and share == 2

def test_a_reply_that_never_ends_gets_the_penalty_and_scores_are_clipped():
    reward_model = mock.Mock(scores=lambda groups: torch.tensor([9.0, 3.0, -0.5]))
    scores = ppo.score_replies(reward_model, [{"ids": [5]}] * 3, [[6, TINY.end], [6, 7], [6, TINY.end]], None)
    for penalty, want in (1.0, [9.0, -1.5, -0.5]), (0.0, [9.0, 3.0, -0.5]):  # below every reply that ended
        assert ppo.penalize_unended(scores, torch.tensor([True, False, True]), penalty).tolist() == want
    cfg, models, batch = a_rollout(score_clip=2.0, missing_eos_penalty=0.0)
    for score, clipped in ((9.0, 2.0), (-9.0, -2.0), (1.0, 1.0)):
        judge = mock.Mock(scores=lambda groups: torch.full((len(groups),), score))
        seen = ppo.rollout(0, batch["rows"], models._replace(reward_model=judge), TINY, cfg, 0.1)["scores"]
        assert seen.tolist() == [clipped] * 8

def test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask():
    x, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 5.0, 99.0, 99.0]]), torch.ones(2, 4).bool()
    close(ppo.whiten(torch.full((2, 4), 2.0), mask), torch.zeros(2, 4), 1e-3)  # equal rewards: no NaN
    mask[0, 3:] = mask[1, 2:] = False  # 1 to 5: mean 3, variance 2
    close(ppo.whiten(x, mask), (x - 3) / 2 ** 0.5 * mask)

def test_k3_and_approx_kl_keep_their_digits_and_adaptive_kl_moves_towards_its_target():
    x = torch.linspace(-1e-3, 1e-3, 2001)
    exact = torch.expm1(x.double()) - x.double()  # about x^2 / 2
    old, mask = torch.zeros(1, len(x)), torch.ones(1, len(x), dtype=torch.bool)
    k3 = ppo.k3(torch.zeros_like(x), x)
    _, _, approx_kl, _ = ppo.policy_loss(x[None], old, old, mask, 0.2)
    assert (k3 >= 0).all() and ((k3 - exact)[exact > 1e-9].abs() / exact[exact > 1e-9]).max() < 0.01
    close(approx_kl, exact.sum(), 1e-4 * exact.sum().item())
    assert (x.exp() - 1 - x < 0).float().mean() > 0.05  # the mistake: the digits cancel
    cfg = ppo.Config(kl_target=6.0, batch=100, kl_horizon=2000)
    for kl, error in (60.0, 0.2), (6.6, 0.1), (1.0, -0.2):
        close(ppo.update_kl_coef(0.1, kl, cfg), 0.1 * (1 + error * 100 / 2000), 5e-8)
    assert ppo.update_kl_coef(0.1, 60.0, ppo.Config(kl_target=0.0)) == 0.1
    cfg.kl_horizon = 1  # never more than a fifth a rollout, never to 0 or below
    assert [ppo.update_kl_coef(0.1, kl, cfg) for kl in (0.0, 60.0)] == [0.1 * 0.8, 0.1 * 1.2]

def test_the_actor_rests_when_it_has_moved_enough_and_the_critic_goes_on():
    ends = []
    for target_kl, allowed in ((0.02, None), (1e-9, None), (0.0, 100)):
        cfg, models, batch = a_rollout(epochs=50, target_kl=target_kl)
        before = weights_of(models.actor)
        with mock.patch.object(OffloadedAdamW, "step", autospec=True, side_effect=OffloadedAdamW.step) as spy:
            updates = update(cfg, models, batch, lr=1e-3)["updates"]
        assert spy.call_count == 100 + updates and (allowed is None) == (updates < 100)
        ends.append((updates, apart(before, weights_of(models.actor))))
    assert ends[1][0] == 1  # the second minibatch sees a policy that has moved: that step is not taken
    assert ends[0][1] < ends[2][1]

def test_micro_batches_do_not_change_ppos_update():
    after = []
    for microbatch in (0, 1):
        cfg, models, batch = a_rollout()
        cfg.microbatch = microbatch
        # eps is large, so that a step is as long as its gradient and does not blow up rounding errors
        update(cfg, models, batch, eps=1.0)
        after.append(weights_of(models.actor, models.critic))
    close(*after, 1e-7)

def test_calibration_ceiling_win_rate_and_gold_of_known_cases():
    [(n, predicted, observed)] = evaluation.calibration(torch.tensor([3.0, 3.0, 3.0, -3.0]))
    assert (n, observed) == (4, 0.75)
    close(predicted, 1 / (1 + math.exp(-3)), 5e-6)
    fifths = torch.tensor([0.55, 0.65, 0.75, 0.85, 0.95])  # one confidence in each of five bins
    bins = torch.tensor(evaluation.calibration(torch.cat([fifths.logit(), -fifths[:1].logit()])))
    close(bins.T, [[2, 1, 1, 1, 1], fifths.tolist(), [0.5, 1, 1, 1, 1]])
    rows = [{"agreement": x, "skill": skill} for x, skill in ((0.9, "a"), (0.2, "a"), (0.7, "b"))] * 2
    table = evaluation.accuracy_table(rows, torch.tensor([1.0, 1, -1, 1, 1, 1]))
    assert table["a"] == (4, 1.0, 0.5)
    assert [*evaluation.accuracy_table(rows[::-1], torch.ones(6))] == ["a", "b", "all"]
    close(table["all"][1:], (5 / 6, 4 / 6), 5e-6)
    assert evaluation.accuracy_table([{}], torch.ones(1))["all"][2] is None
    assert evaluation.accuracy_table([{"agreement": 0.5}], torch.zeros(1))["all"][1:] == (0.0, 0.0)
    assert evaluation.win_rate(torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 1, 1, 0]))[0] == 0.625
    # 8 of 8 and 5 of 10, from Wilson's formula worked by hand; ties count as half
    for ours, *want in ([1.0] * 8, 1, 0.6756, 1), ([1.0] * 5 + [-1.0] * 5, 0.5, 0.2366, 0.7634):
        close(torch.tensor(evaluation.win_rate(torch.tensor(ours), torch.zeros(len(ours)))), want, 1e-4)
    # gold counts replies that match in full and end
    say = lambda text, *last: [*TINY.encode(text), *last]
    good = say("aa", TINY.end)
    bad = [say("ab", TINY.end), say("ba", TINY.end), say("aa"), say("a", TINY.first, TINY.end)]
    rows, replies = [{"check": "a+"}] * 5, [good, *bad]
    assert [evaluation.passes(rows[0], reply, TINY) for reply in replies] == [True] + [False] * 4
    assert evaluation.yardsticks(rows, replies, TINY) == {"right": None, "gold": 0.2}
    assert evaluation.yardsticks([*rows, {}], [*replies, good], TINY)["gold"] == 0.2  # a row without a check

def test_health_signs_are_named():
    healthy = dict(ratio_first=1.0, eos_rate=0.9, entropy=1.0, kl=2.0)
    assert not list(evaluation.health_warnings(healthy, torch.float32))
    for name, value, word in (("ratio_first", 1.1, "ratio"), ("kl", -2.0, "below 0"), ("kl", 30.5, "KL"),
                              ("eos_rate", 0.0, "ended"), ("entropy", 0.0, "entropy")):
        [complaint] = evaluation.health_warnings(healthy | {name: value}, torch.float32)
        assert word in complaint


# --- the stages, end to end ---------------------------------------------------------------------------------

def test_the_three_stages_run_and_return_what_the_log_says(tmp_path):
    since = time.time()
    results, took = run_all(tmp_path), time.time() - since
    assert set(results["sft"]) == {"val_loss", "right", "gold"}
    assert set(results["reward"]) == {"val_accuracy", "ceiling"}
    assert set(results["ppo"]) >= {"gold_before", "gold_after", "gold_best_of_n", "win_rate", "win_rate_low",
                                   "win_rate_high", "kl", "score"}
    for name, result in results.items():
        rows = log(tmp_path / "out" / name)
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        assert 0 < seconds[0] and seconds == sorted(seconds) and seconds[-1] < took
        first, *_, last = rows
        assert set(first) >= {"step", "grad_norm", "lr", "tokens_per_s", "seconds", "memory_gb"}
        assert last.pop("final") and last.pop("step") and last == result
    assert (first["ratio_first"], first["kl"], first["kl_k3"]) == (1.0, 0.0, 0.0)  # ppo's
    cfg = small(reward, tmp_path)  # stage 1's replies average 0 under the saved reward model
    close(reward.mean_sft_score(m.load_model(cfg.out, Scorer), cfg, TINY, CPU, torch.float32), 0, 5e-5)
    run(ppo, tmp_path, ptx_coef=0.5, steps=1)
    assert "ptx_loss" in log(tmp_path / "out/ppo")[0]
    _, text = run(ppo, tmp_path, trace=True, steps=4, batch=1, minibatch=1, eval_every=2)
    assert text.count("advantage") == text.count("paid on the last token") == 3  # the first, 2nd and 4th
    assert "advantage" not in run(ppo, tmp_path, steps=2, batch=1, minibatch=1, eval_every=1)[1]

def test_checkpointing_offloading_and_lora_change_only_what_they_should(tmp_path):
    weights = []
    for changes in ({}, {"checkpoint": True, "offload": "optimizer"}, {"offload": "all"}):
        run_all(tmp_path, **changes)
        weights.append([path.read_bytes() for path in sorted(tmp_path.glob("out/*/model.safetensors"))])
    assert weights[0] == weights[1] == weights[2] and len(weights[0]) == 3
    cfg = small(ppo, tmp_path, lora_rank=2)  # four models on two trunks
    (actor, reference, critic, reward_model), _ = ppo.load_models(cfg, CPU, torch.float32)
    for one, other in ((actor, reference), (critic, reward_model)):
        assert {p.data_ptr() for p in other.h.parameters()} <= {p.data_ptr() for p in one.parameters()}
    assert critic.score.weight.data_ptr() != reward_model.score.weight.data_ptr()
    results = run_all(tmp_path, lora_rank=2, steps=4)
    first = log(tmp_path / "out/ppo")[0]
    assert (first["ratio_first"], first["kl"]) == (1.0, 0.0)
    assert abs(results["ppo"]["kl"]) > 0  # the actor moved, the reference did not

def test_reward_check_needs_no_reward_model_and_learns(tmp_path):
    run(sft, tmp_path, steps=150, lr=3e-3, warmup=5, batch=16)
    result, _ = run(ppo, tmp_path, reward="check", steps=25, lr=1e-3, batch=32, minibatch=16, kl_coef=0.01)
    assert result["gold_after"] > result["gold_before"]

def test_a_rollout_begins_at_distance_0_and_its_trace_shows_a_reply_token_by_token():
    cfg, models, batch = a_rollout(temperature=0.7)
    assert torch.equal(batch["logprobs"], batch["ref_logprobs"])
    batch = ppo.rollout(0, batch["rows"], models._replace(reference=tiny(seed=3)), TINY, cfg, 0.05)
    assert batch["kl"][batch["mask"]].abs().min() > 1e-3
    _, text = quiet(evaluation.trace, evaluation.token_table(batch, 0, TINY))
    head, *lines, last = text.splitlines()
    assert head.split() == "token logprob ref kl reward value return advantage".split()
    assert len(lines) == int(batch["mask"][0].sum())
    for name, column in (("logprobs", -7), ("kl", -5), ("rewards", -4), ("advantages", -1)):
        close([float(line.split()[column]) for line in lines], batch[name][0][batch["mask"][0]], 6e-4)
    assert last == f"score {batch['scores'][0].item():.3f}, paid on the last token"
    reply = batch["replies"][2]
    reply[-1] = TINY.end
    table = evaluation.token_table(batch, 2, TINY)
    assert table["tokens"] == [*(TINY.decode([t]) for t in reply[:-1]), "<|end|>"]
    assert {len(column) for column in table["columns"].values()} == {len(reply)}
    close(table["columns"]["kl"], batch["kl"][2][batch["mask"][2]], 1e-4)

def test_groups_work_with_whatever_else_there_is(tmp_path):
    run_all(tmp_path, steps=2)
    base, weights = dict(group=4, minibatch=4, steps=3, reward="check", missing_eos_penalty=0.0), []
    for changes in ({}, {"microbatch": 2}, {"offload": "all"}, {"checkpoint": True, "offload": "optimizer"}):
        run(ppo, tmp_path, **base | changes)
        weights.append(weights_of(m.load_model(tmp_path / "out/ppo")))
        close(weights[0], weights[-1], 1e-5)
    rows = [row for row in log(tmp_path / "out/ppo") if "entropy" in row]
    assert all(0 <= row["groups_without_signal"] <= 1 and "value_loss" not in row for row in rows)
    _, text = run(ppo, tmp_path, group=4, group_norm=True, lora_rank=2, trace=True, steps=2)
    assert "advantage" in text and not re.search(r"\bvalue\b", text)
    dry = partial(run, ppo, tmp_path, dry_run=True, out=str(tmp_path / "dry"))
    peaks = [dry(**x)[0]["peak_device_bytes"] for x in ({}, {"group": 4}, {"group": 4, "reward": "check"})]
    assert peaks[1] < 0.75 * peaks[0] and peaks[2] < peaks[1], peaks
    with mock.patch.object(m, "branching", wraps=m.branching) as spy:  # sisters differ there, too
        dry(max_new_tokens=48, group=4, minibatch=8)
    assert all(len({tuple(row) for row in rows}) == 4 for call in spy.call_args_list for rows in call.args[0])
    for changes, *fragments in (({"group": 1}, "--group=1"), ({"group": 3}, "whole groups"),
                                ({"group": 4, "gamma": 0.9}, "--gamma"), ({"group_norm": True}, "--group=8")):
        refuses(lambda: ppo.main(small(ppo, tmp_path, **changes)), *fragments)

def test_dpo_writes_a_policy_and_resumes(tmp_path):
    run(sft, tmp_path)
    cfg = small(reward, tmp_path, dpo=True, steps=12, lr=3e-3)
    policy = lambda: weights_of(m.load_model(tmp_path / "out/reward"))  # a language model
    result, text = quiet(reward.main, cfg)
    losses = [row["loss"] for row in log(tmp_path / "out/reward") if "loss" in row]
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[-1] < 0.6
    assert result["val_accuracy"] > 0.9 and result["gold"] is not None and "confidence" in text
    whole = policy()
    run_and_resume(reward, cfg, "learn", 7)
    assert torch.equal(policy(), whole)
    for changes in ({"microbatch": 2}, {"offload": "all"}):
        run(reward, tmp_path, dpo=True, steps=12, lr=3e-3, **changes)
        close(policy(), whole, 5e-4)
    assert run(reward, tmp_path, dpo=True, dry_run=True, out=f"{tmp_path}/dry")[0]["peak_device_bytes"] > 0
    with mock.patch.object(reward, "load_models", side_effect=SystemExit("stop")), \
            mock.patch.object(reward, "check_flags") as checked:  # the reward model is not overwritten
        refuses(lambda: reward.main(reward.Config(dpo=True)), "stop")
    assert checked.call_args.args[0].out == "out/dpo"


# --- the second family, end to end --------------------------------------------------------------------------

def llama_folder(folder, control=CHATML, family=LLAMA, **changes):
    """A checkpoint with words of its own, as the hub has them."""
    k = Tokenizer(words_folder(folder.parent / f"{folder.name}-words", stored_words(control)))
    save(folder, tiny(vocab_size=k.vocab_size, tokenizer=k.name, **family | changes))
    return str(folder)

def test_what_a_llama_folder_may_be_and_what_is_refused_by_name(tmp_path):
    folder = Path(llama_folder(tmp_path / "good", n_positions=48))
    path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors, net = {name: t.clone() for name, t in hub.read_safetensors(path).items()}, m.load_model(folder)
    assert settings.keys() >= {"head_dim", "rope_theta"} and "tokenizer" not in settings
    def variant(changes, **changed):
        kept = {key: x for key, x in (settings | changes).items() if x is not ...}  # ...: left out
        (folder / "config.json").write_text(json.dumps(kept))
        hub.write_safetensors(path, {name: t for name, t in (tensors | changed).items() if t is not None})
        return m.load_model(folder)
    rope = settings["rope_scaling"] | {"rope_theta": settings["rope_theta"]}
    for changes in ({"rope_parameters": rope, "rope_scaling": ..., "rope_theta": ...},  # transformers 5
                    {"rope_scaling": {"type": "llama3", **LLAMA["rope_scaling"]}},  # before 4.43
                    {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "num_experts": 0}):
        assert variant(changes).cfg == net.cfg
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}  # of old checkpoints
    assert torch.equal(weights_of(variant({}, **inverse)), weights_of(net))
    defaults = variant({"rope_scaling": None, "rope_theta": ..., "rms_norm_eps": ...}).cfg
    assert (defaults.rope_theta, defaults.norm_eps, defaults.rope_scaling) == (1e4, 1e-6, None)
    half = variant({}, **{name: t.bfloat16() for name, t in tensors.items()})
    close(weights_of(half), weights_of(net).bfloat16().float(), 0)
    for changes, *words in (
            *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"kind {kind}; known here: default")
              for kind in ("linear", "dynamic", "yarn", "longrope")),
            *(({"model_type": kind}, f"model_type is {kind}; known here: gpt2, llama, qwen3")
              for kind in ("qwen2", "mistral", "gemma3_text", "qwen3_moe", None)),
            ({"sliding_window": 4096}, "window is 4096"), ({"attention_bias": True}, "attention_bias"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
            ({"num_local_experts": 8}, "num_local_experts is 8"), ({"hidden_act": "gelu"}, "act is gelu"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"mlp_bias": True}, "mlp_bias"),
            ({"rope_parameters": rope | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
            ({"num_key_value_heads": 3}, "not the sizes of a llama"), ({"head_dim": "x"}, "not the sizes"),
            ({"num_hidden_layers": 5000}, "more than model.safetensors holds"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "factor"), ({"rope_theta": "x"}, "config.json"),
            ({"tie_word_embeddings": True}, "lm_head.weight", "tied")):
        refuses(lambda: variant(changes), *words)
    for changed, word in (({"model.layers.1.self_attn.k_proj.weight": None}, "h.1.attn.c_attn.weight"),
                          ({"lm_head.weight": None}, "lm_head.weight"), ({"extra": torch.ones(1)}, "extra")):
        refuses(lambda: variant({}, **changed), "missing, unexpected or of another shape", word)
    variant({})
    (folder / "tokenizer.json").unlink()
    tokenizer.read_words.cache_clear()
    refuses(lambda: m.load_model(folder), "tokenizer.json", "SentencePiece")

def test_a_vocabulary_without_a_chat_format_gets_ours_and_rows_for_it(tmp_path):
    k = Tokenizer(words_folder(tmp_path / "words", stored_words([])))
    net = tiny(vocab_size=1022, tokenizer=k.name, **LLAMA)
    save(tmp_path / "base", net)
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(stored_words([])))  # as the hub has it
    tokenizer.read_words.cache_clear()
    grown = m.load_model(tmp_path / "base")
    for name in ("wte", "lm_head"):
        new, old = (getattr(x, name).weight for x in (grown, net))
        assert torch.equal(new[:1022], old) and len(new) == 1088
        close(new[1022:], old.mean(0).expand(66, -1))
    save(tmp_path / "out", grown)
    assert tokenizer.same_tokens(str(tmp_path / "out"), str(tmp_path / "base"))
    assert len(m.load_model(tmp_path / "out").wte.weight) == 1088

def test_a_model_of_the_second_family_goes_through_every_stage_flag_and_method(tmp_path):
    start, weights, said = llama_folder(tmp_path / "hub"), {}, {}
    for changes in ({}, {"checkpoint": True, "offload": "optimizer"}, {"offload": "all"}):
        run(sft, tmp_path, init=start, **changes)
        for stage in (reward, ppo):
            _, said[stage] = run(stage, tmp_path, **changes)
        for path in tmp_path.glob("out/*/model.safetensors"):
            assert weights.setdefault(path, path.read_bytes()) == path.read_bytes(), (path, changes)
    cfg = small(reward, tmp_path)
    mean = reward.mean_sft_score(m.load_model(cfg.out, Scorer), cfg, Tokenizer(start), CPU, torch.float32)
    assert "scores shifted" not in said[reward] and abs(mean) > 1e-4  # no bias can take it, and nobody asks:
    with mock.patch.object(m, "generate_many", side_effect=AssertionError):  # 512 replies of a real model
        run(reward, tmp_path)  # take a quarter of an hour
    for stage, step in ((sft, "learn"), (reward, "learn"), (ppo, "update")):
        changes = {"init": start} if stage is sft else {}
        run_and_resume(stage, small(stage, tmp_path, **changes), step, 3)
        path = tmp_path / "out" / stage.__name__ / "model.safetensors"
        assert path.read_bytes() == weights[path]  # to the bit
    for stage, changes in ((ppo, {"group": 4, "minibatch": 4, "group_norm": True}), (ppo, {"ptx_coef": 0.5}),
                           (ppo, {"lora_rank": 2}), (ppo, {"reward": "check"}), (reward, {"dpo": True})):
        run(stage, tmp_path, steps=2, out=str(tmp_path / "other"), **changes)
    cfg = chat.Config(model=f"{tmp_path}/out/ppo", reward=f"{tmp_path}/out/reward", compare=start,
                      prompt="Hi", dtype="float32", device="cpu")
    assert "(score " in quiet(chat.main, cfg)[1]
    stored = json.loads((tmp_path / "out/ppo/config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"] and stored["eos_token_id"] == 1
    refuses(lambda: run(ppo, tmp_path, init="scratch-llama"), "reward model with --init=scratch-llama")

def test_scratch_of_each_family_has_a_size_and_learns(tmp_path):
    sizes = []
    for init in hub.SCRATCH:
        result, text = run(sft, tmp_path, init=init, steps=30, lr=1e-2)
        first = float(re.search(r"before training: val_loss (\S+)", text)[1])
        assert abs(first - math.log(1024) - 1 / 8) < 0.2 and result["val_loss"] < 2, (init, first, result)
        sizes.append(m.load_model(tmp_path / "out/sft").cfg)
        peak = run(sft, tmp_path, init=init, dry_run=True, out=f"{tmp_path}/dry")[0]["peak_device_bytes"]
        assert peak > 16 * sum(p.numel() for p in m.load_model(tmp_path / "out/sft").parameters())
    assert [(c.model_type, c.n_kv_head, c.n_inner) for c in sizes] == [
        ("gpt2", 4, 128), ("llama", 2, 128), ("qwen3", 2, 128)]
    sizes = data_layouts.scratch("llama", 2, 3, 128)
    assert (sizes["n_inner"], sizes["n_kv_head"]) == (384, 3)  # 8/3 of 128, in 64s; 3 heads have no half

def test_a_dry_run_knows_every_name(tmp_path):
    for name, (_, config) in hub.MODELS.items():
        small_one = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_inner": 64, "n_kv_head": 2}
        with mock.patch.dict(hub.MODELS, {name: ("", config | small_one)}):
            result, _ = run(sft, tmp_path, init=name, dry_run=True, batch=1, out=f"{tmp_path}/dry")
        assert result["peak_device_bytes"] > 16 * 32 * config["vocab_size"], name


# --- the assembly: each stage against a second, slow implementation -----------------------------------------

# One row at a time, one token at a time: no batches, masks, padding or micro-batches; torch's AdamW. Every
# logged number and the last weights have to agree, with a stop and a resume on the way.

def plain_adam(net, cfg, **kwargs):
    groups = [{"params": [p for p in net.parameters() if (p.dim() >= 2) == matrix], "weight_decay": decay}
              for matrix, decay in ((True, cfg.weight_decay), (False, 0.0))]
    return torch.optim.AdamW(groups, 1.0, **kwargs)

def plain_step(net, adam, step, cfg):
    """-> what the log says of it."""
    lr = cfg.lr * min((step + 1) / cfg.warmup, (cfg.steps - step) / (cfg.steps - cfg.warmup))  # up, then down
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()
    adam.zero_grad()
    return {"lr": lr, "grad_norm": norm.item()}

def plain_logprobs(net, idx, targets, temperature=1.0):
    """-> [(log-probability, entropy) of each target]."""
    table = (logits(net, idx) / temperature).log_softmax(-1)
    return [(row[t], -(row.exp() * row).sum()) for row, t in zip(table, targets) if t >= 0]

plain_nll = lambda net, example: -sum(logprob for logprob, _ in plain_logprobs(net, *example))

def run_and_resume(stage, cfg, step, stop_at):
    """Run a stage, stop it in call number stop_at of its function `step`, and go on with --resume."""
    stops = [mock.DEFAULT] * stop_at + [KeyboardInterrupt]
    with mock.patch.object(stage, step, wraps=getattr(stage, step), side_effect=stops):
        refuses(lambda: stage.main(cfg), kind=KeyboardInterrupt)
    result, text = quiet(stage.main, dataclasses.replace(cfg, resume=True))
    assert "resuming" in text and "before training" not in text
    return result

def log_and_weights_agree(cfg, expected, net, but=()):
    rows = [row for row in log(Path(cfg.out)) if "lr" in row]
    for row, want in zip(rows, expected, strict=True):
        for name, value in want.items():
            agree = abs(row[name] - value) < 1e-4 * max(0.05, abs(value))
            assert agree, (row["step"], name, row[name], value)
        others = row.keys() ^ want.keys()
        assert others == {"step", "tokens_per_s", "seconds", "memory_gb"} and row["tokens_per_s"] > 0, others
    saved = m.load_model(cfg.out, type(net)).state_dict()
    for name, p in net.state_dict().items():
        a, b = saved[name].clone(), p.clone()
        if name.endswith("c_attn.bias"):  # a key's bias cancels in the softmax: its gradient is rounding
            a.view(3, -1)[1] = b.view(3, -1)[1] = 0
        assert name in but or apart(a, b) < 2e-5, (name, apart(a, b))

LITTLE = dict(n_layer=1, n_embd=16, batch=4, microbatch=2, weight_decay=0.1, grad_clip=0.5, steps=7, warmup=3,
              lr=0.02)

def test_stage_1_does_what_plain_loops_do(tmp_path):
    cfg = small(sft, tmp_path, **LITTLE)
    result = run_and_resume(sft, cfg, "learn", 5)
    net = GPT(GPTConfig(TINY.vocab_size, 64, 1, 4, 16, "tiny")).initialize(rng(0, "init"))
    train, val = ([tokenizer.encode_demonstration(row, TINY, 64)[0] for row in rows]
                  for rows in prepare.load(cfg.data, "sft"))
    count = lambda examples: sum(t >= 0 for _, targets in examples for t in targets)
    adam, expected, val_losses = plain_adam(net, cfg, betas=(0.9, 0.95)), [], []
    for step in range(7):
        batch = [train[i] for i in batches.batch_at(step, tuple(len(i) for i, _ in train), 4, 0)]
        nll = sum(plain_nll(net, e) for e in batch)
        (nll / (4 * count(train) / len(train))).backward()
        expected.append({"loss": nll.item() / count(batch), **plain_step(net, adam, step, cfg)})
        if step in (2, 5, 6):
            val_losses.append(sum(plain_nll(net, e).item() for e in val) / count(val))
    log_and_weights_agree(cfg, expected, net)
    close([row["val_loss"] for row in log(Path(cfg.out)) if "val_loss" in row], val_losses, 1e-4)
    assert log(Path(cfg.out))[-1]["val_loss"] == result["val_loss"]

def test_stage_2_does_what_plain_loops_do(tmp_path):
    run(sft, tmp_path, n_layer=1, n_embd=16)
    path = tmp_path / "data/preferences.jsonl"
    path.write_text("".join(json.dumps(row | {"rejected": "It is blue" + " or so" * (7 * i % 5)}) + "\n"
                            for i, row in enumerate(jsonl(path))))  # of many lengths
    cfg = small(reward, tmp_path, **LITTLE, log_every=2)
    result = run_and_resume(reward, cfg, "learn", 5)
    net = Scorer(GPTConfig(TINY.vocab_size, 64, 1, 4, 16, "tiny"))
    net.load_state_dict(m.load_model(cfg.init).state_dict(), strict=False)
    net.initialize_head(rng(0, "head"))
    train, val = prepare.load(cfg.data, "preferences")
    say = lambda row, side: TINY.render([*row["prompt"], assistant(row[side])])[0]
    score = lambda row, side: values_of(net, torch.tensor([say(row, side)]))[0, -1]
    accuracy = lambda: sum((score(row, "chosen") > score(row, "rejected")).item() for row in val) / len(val)
    lengths = tuple(max(len(say(row, side)) for side in ("chosen", "rejected")) for row in train)
    adam, expected, right = plain_adam(net, cfg, betas=(0.9, 0.95)), [], []
    for step in range(7):
        loss, penalty = 0, 0
        for i in batches.batch_at(step, lengths, 4, 0):
            chosen, rejected = (score(train[i], side) for side in ("chosen", "rejected"))
            loss = loss + torch.log1p((rejected - chosen).exp()) / 4
            penalty = penalty + 0.01 * (chosen + rejected) ** 2 / 4
            right.append((chosen > rejected).item())
        (loss + penalty).backward()
        stepped = plain_step(net, adam, step, cfg)
        if step % 2 or step == 6:
            expected.append({"loss": loss.item(), "accuracy": sum(right) / len(right), **stepped})
            right = []
        if step == 2:
            close([row["val_accuracy"] for row in log(Path(cfg.out)) if "val_accuracy" in row][0], accuracy())
    log_and_weights_agree(cfg, expected, net, but=["ln_f.bias"])  # where the scores' shift went
    close(result["val_accuracy"], accuracy())
    assert result["ceiling"] == 1.0

def test_stage_3_does_what_plain_loops_do(tmp_path):
    run(sft, tmp_path, n_layer=1, n_embd=16, n_head=2)
    net = m.load_model(tmp_path / "out/sft")
    towards_end = net.wte.weight.data[TINY.end]
    net.ln_f.bias.data += 4 * towards_end / towards_end.square().sum()  # it often ends its replies
    save(tmp_path / "out/sft", net)
    run(reward, tmp_path, n_layer=1, n_embd=16, steps=2)
    for changes in ({}, {"group": 3, "gamma": 1.0}, {"group": 3, "gamma": 1.0, "group_norm": True}):
        stage_3_agrees_with_plain_loops(tmp_path, **changes)

def stage_3_agrees_with_plain_loops(tmp_path, **changes):
    last = TINY.end
    cfg = small(ppo, tmp_path, **LITTLE | dict(
        batch=6, minibatch=3, microbatch=1, steps=6, epochs=2, lr=0.01, warmup=2, max_new_tokens=6,
        temperature=0.7, kl_coef=0.2, kl_target=0.3, kl_horizon=20, gamma=0.9, lam=0.8, clip=0.1,
        value_clip=0.05, value_coef=0.7, score_clip=0.6, missing_eos_penalty=0.3, ptx_coef=0.4,
        target_kl=0.02, save_every=2) | changes)
    group = cfg.group or 1
    with mock.patch.object(ppo, "evaluate", return_value=({}, {}, [])) as evaluate:
        run_and_resume(ppo, cfg, "update", 3)
    prompts, held_out = ([TINY.prompt(row["prompt"], 58) for row in rows]
                         for rows in prepare.load(cfg.data, "prompts"))
    assert [row["ids"] for row in evaluate.call_args.args[1]["held out"]] == sorted(held_out, key=len)
    demonstrations = [tokenizer.encode_demonstration(row, TINY, 64)[0]
                      for row in prepare.load(cfg.data, "sft")[0]]
    actor, reference = (m.load_model(cfg.init) for _ in range(2))
    critic, reward_model = (m.load_model(cfg.reward, Scorer) for _ in range(2))
    adams = [plain_adam(net, cfg, eps=1e-5) for net in (actor, critic)]
    mean = lambda values: sum(values) / len(values)
    expected, kl_coef = [], cfg.kl_coef
    for step in range(6):
        uniform, replies = torch.rand(6, 6, generator=rng(0, "rollout", step)), []
        rows = [prompts[i] for i in batches.batch_at(step, (0,) * len(prompts), 6 // group, 0)]
        for u, prompt in zip(uniform, [row for row in sorted(rows, key=len) for _ in range(group)]):
            reply = []
            while len(reply) < 6 and last not in reply:
                cdf = (logits(actor, prompt + reply)[-1] / 0.7).softmax(-1).cumsum(0)
                reply.append(int((cdf <= u[len(reply)] * cdf[-1]).sum()))
            idx, targets = (prompt + reply)[:-1], [-1] * (len(prompt) - 1) + reply
            said, before = (plain_logprobs(net, idx, targets, 0.7) for net in (actor, reference))
            whole = torch.tensor([prompt + reply])
            replies.append({"idx": idx, "targets": targets, "n": len(reply), "ended": last in reply,
                            "logprob": [x.item() for x, _ in said], "entropy": [x.item() for _, x in said],
                            "kl": [(a - b).item() for (a, _), (b, _) in zip(said, before)],
                            "value": values_of(critic, whole)[0, len(prompt) - 1:-1].tolist(),
                            "score": values_of(reward_model, whole)[0, -1].clamp(-0.6, 0.6).item(),
                            "gold": reply == [*TINY.encode("It is red."), last],
                            "right": "red" in TINY.decode(reply)})
        worst = min(r["score"] for r in replies)
        for r in replies:
            r["score"] = r["score"] if r["ended"] else worst - 0.3
            reward_of = [-kl_coef * x for x in r["kl"]]
            reward_of[-1] += r["score"]
            value, r["advantage"] = r["value"] + [0.0], [0.0] * (r["n"] + 1)
            for t in reversed(range(r["n"])):
                delta = reward_of[t] + 0.9 * value[t + 1] - value[t]
                r["advantage"][t] = delta + 0.9 * 0.8 * r["advantage"][t + 1]
            r["return"] = [a + v for a, v in zip(r["advantage"], value[:-1])]
            r["earned"] = sum(reward_of)
        groups = [replies[i:i + 3] for i in (0, 3)]
        silent = [len({r["score"] for r in sisters}) == 1 for sisters in groups]
        for sisters, nothing in zip(groups, silent) if cfg.group else ():
            earned = [r["earned"] for r in sisters]
            for i, r in enumerate(sisters):
                a = earned[i] - mean(earned[:i] + earned[i + 1:])
                if cfg.group_norm:
                    a = (earned[i] - mean(earned)) / (torch.tensor(earned).std().item() + 1e-4)
                r["advantage"] = [0.0 if nothing else a] * r["n"]
        of = lambda name: [x for r in replies for x in r[name][:r["n"]]]
        centre, returns = mean(of("advantage")), of("return")
        spread = (mean([(a - centre) ** 2 for a in of("advantage")]) + 1e-8) ** 0.5
        centre, spread = (0.0, 1.0) if cfg.group else (centre, spread)
        generator, seen, resting = rng(0, "update", step), [], False
        for epoch in range(2):
            order = torch.randperm(6 // group, generator=generator)
            for rows_of_it in torch.stack([order * group + i for i in range(group)], 1).flatten().split(3):
                if resting and cfg.group:
                    break
                part, numbers = [replies[i] for i in rows_of_it], {}
                n = sum(r["n"] for r in part)
                loss = value_loss = clipped = approx_kl = ratios = 0
                for r in part:
                    new = plain_logprobs(actor, r["idx"], r["targets"], 0.7)
                    values = values_of(critic, torch.tensor([r["idx"]]))[0, -r["n"]:]
                    for t in range(r["n"]):
                        ratio = (new[t][0] - r["logprob"][t]).exp()
                        a = (r["advantage"][t] - centre) / spread
                        free, held = -a * ratio, -a * ratio.clamp(0.9, 1.1)
                        loss, clipped = loss + max(free, held), clipped + (held > free).item()
                        approx_kl += (ratio - 1 - ratio.log()).item()
                        ratios += ratio.item()
                        near = r["value"][t] + (values[t] - r["value"][t]).clamp(-0.05, 0.05)
                        far = [(v - r["return"][t]) ** 2 for v in (values[t], near)]
                        value_loss = value_loss + max(far) / 2
                if not cfg.group:
                    (0.7 * value_loss / n).backward()
                    stepped = plain_step(critic, adams[1], step, cfg)
                    numbers = {"value_loss": value_loss.item() / n, "value_grad_norm": stepped["grad_norm"]}
                if not resting:
                    drawn = torch.randint(len(demonstrations), (3,), generator=generator).tolist()
                    nll = sum(plain_nll(actor, demonstrations[i]) for i in drawn)
                    nll = nll / sum(t >= 0 for i in drawn for t in demonstrations[i][1])
                    numbers |= {"policy_loss": loss.item() / n, "clip_fraction": clipped / n,
                                "ptx_loss": nll.item(), "approx_kl": approx_kl / n}
                    numbers |= {} if seen else {"ratio_first": ratios / n}
                    resting = approx_kl / n > 0.02
                    if not resting:
                        (loss / n + 0.4 * nll).backward()
                        numbers |= plain_step(actor, adams[0], step, cfg)
                seen.append(numbers)
        want = {name: mean([x[name] for x in seen if name in x]) for name in set().union(*seen)}
        want |= {name: mean([r[name] for r in replies]) for name in ("score", "gold", "right")}
        want |= {"eos_rate": mean([r["ended"] for r in replies]), "entropy": mean(of("entropy")),
                 "response_length": mean([r["n"] for r in replies]), "kl": sum(of("kl")) / 6,
                 "kl_k3": mean([math.exp(-x) - 1 + x for x in of("kl")]), "kl_coef": kl_coef,
                 "updates": sum("grad_norm" in x for x in seen)}
        if cfg.group:
            want["groups_without_signal"] = mean(silent)
        else:
            variance = mean([(x - mean(returns)) ** 2 for x in returns])
            residual = mean([(a - b) ** 2 for a, b in zip(returns, of("value"))])
            want["explained_variance"] = 1 - residual / variance
        expected.append(want)
        kl_coef *= 1 + min(max(want["kl"] / 0.3 - 1, -0.2), 0.2) * 6 / 20
    log_and_weights_agree(cfg, expected, actor)
    # it was all there: ends and none, steps not taken, ratios clipped, a coefficient that moved
    assert 0 < mean([row["eos_rate"] for row in expected]) < 1 and {row["updates"] for row in expected} != {4}
    assert max(row["clip_fraction"] for row in expected) > 0 and kl_coef != cfg.kl_coef
    assert ("critic" in torch.load(tmp_path / "out/ppo/state.pt", weights_only=True)) == (not cfg.group)

def test_the_evaluation_reports_known_replies_and_scores():
    yes, no, so = (TINY.encode(word)[0] for word in (" yes", " no", " so"))
    end, value = TINY.end, {yes: 2.0, no: -9.0, so: 1.0}
    rows = [{"ids": [5, 6 + i], "prompt": [user(f"{i}?")], "check": " yes"} for i in range(4)]
    # the policy is right 3 times of 4; stage 1 once, and once it does not end; of its four tries the second
    # is right and scores best, and the last does not end, which scores below all others
    after = [[yes, end], [so, end], [yes, end], [yes, end]]
    before = [[yes, end], [no, end], [yes, so], [so, end]]
    tries = [[no, end], [yes, end], [so, end], [so, so]]
    actor, reference, reward_model = tiny(), tiny(seed=1), mock.Mock()
    reward_model.scores = lambda groups: torch.tensor([value[row[2]] for rows in groups for row in rows])
    def speak(net, prompts, new, end, generator, batch, temperature):
        assert (new, end, temperature) == (7, TINY.end, 0.5)
        assert [row["ids"] for row in rows] == prompts[::len(prompts) // 4]
        return after if net is actor else before if len(prompts) == 4 else tries * 4
    cfg = ppo.Config(best_of_n=4, max_new_tokens=7, temperature=0.5, minibatch=2, score_clip=1.0)
    args = ppo.Models(actor, reference, None, reward_model), {"held out": rows}, TINY, cfg
    with mock.patch.object(ppo, "generate_many", speak):
        (result, table, samples), text = quiet(ppo.evaluate, *args)
        with mock.patch.object(ppo, "generate_many", side_effect=speak) as spoken:  # the best of one: no more
            (of_one, *_), _ = quiet(ppo.evaluate, *args[:3], dataclasses.replace(cfg, best_of_n=1))
        assert spoken.call_count == 2 and of_one["score_best_of_n"] == of_one["score_before"]
        del rows[0]["check"]  # without a yardstick the learned score decides
        (by_score, *_), _ = quiet(ppo.evaluate, *args)
    names = "right_before", "gold_before", "right_after", "gold_after"
    assert table == {"held out": {name: result[name] for name in names}}
    kl = 0
    for row, reply in zip(rows, after):
        for net, sign in ((actor, 1), (reference, -1)):
            said = plain_logprobs(net, row["ids"] + reply[:1], [-1, *reply], 0.5)
            kl += sign * sum(logprob.item() for logprob, _ in said) / 4
    close(result.pop("kl"), kl, 1e-4)
    rate, low, high = evaluation.win_rate(torch.tensor([0.0, 0, 1, 1]), torch.zeros(4))  # two ties, two wins
    want = {"gold_before": 0.25, "gold_after": 0.75, "gold_best_of_n": 1.0, "win_rate": rate,
            "right_before": None, "right_after": None, "right_best_of_n": None,
            "win_rate_low": low, "win_rate_high": high, "score_before": (2 - 9 - 10 + 1) / 4,
            "score": (2 + 1 + 2 + 2) / 4, "score_best_of_n": 2.0}
    assert result == want and rate == 0.75, result
    assert "'3?'\n        ' so' (+1.00)\n     -> ' yes' (+2.00)" in text
    assert samples[3] == {"question": "3?", "before": " so", "score_before": 1.0, "after": " yes",
                          "score_after": 2.0}
    assert (by_score["gold_after"], by_score["win_rate"]) == (2 / 3, 0.875)  # a tie, three wins

def test_a_ppo_runs_own_numbers_are_printed_and_on_its_page_and_each_set_is_measured_apart(tmp_path):
    blue = {"prompt": [user("What?")], "right": "[^☃]*", "check": "It is blue\\.", "set": "blue things"}
    with open(Path(write_data(tmp_path / "data")) / "prompts.val.jsonl", "a") as file:
        file.write(5 * (json.dumps(blue) + "\n"))
    for stage in (sft, reward):
        run(stage, tmp_path)
    cfg = small(ppo, tmp_path, steps=5, eval_every=2, batch=12, eval_prompts=3, out=str(tmp_path / "a & <b>"))
    _, text = quiet(ppo.main, cfg)
    assert len(re.findall(r"\(score .*, kl ", text)) == 2 * 3  # of two replies, three times
    assert "3 prompts, held out: right " in text and "3 prompts, blue things: right " in text
    path, page = Path(cfg.out) / "log.jsonl", Path(cfg.out) / "run.html"
    *steps, last, summary = jsonl(path)
    sets = last["sets"]
    assert {**summary, **sets["held out"]} == summary != {**summary, **sets["blue things"]}
    assert sets.keys() == {"held out", "blue things"}
    assert all(0 <= share <= 1 for shares in sets.values() for share in shares.values())
    told = [row for row in steps if "rollouts" in row]
    assert [row["step"] for row in told] == [1, 2, 4]
    assert told[0]["flags"] | {"resume": False} == dataclasses.asdict(cfg) and "torch" in told[0]["machine"]
    said = [reply for row in told for reply in row["rollouts"]]
    assert len(told[0]["rollouts"]) == 6 and said[0].keys() == {"question", "tokens", "score", "columns"}
    for reply in said:  # what it was paid is the score, less what the distance cost
        numbers = reply["columns"]
        assert all(len(x) == len(reply["tokens"]) for x in numbers.values())
        close(sum(numbers["reward"]), reply["score"] - cfg.kl_coef * sum(numbers["kl"]), 1e-3)
    view = lambda *args: finished([sys.executable, ROOT / "docs/view.py", *args])
    done = view(cfg.out)
    assert done.returncode == 0, done.stderr
    shown = page.read_text()
    assert not re.search("<script|https?://|src=|& <b>", shown) and html.escape("a & <b>") in shown
    with mock.patch.object(html.parser.HTMLParser, "handle_starttag") as tags:
        html.parser.HTMLParser().feed(shown)
    attributes = [dict(call.args[1]) for call in tags.call_args_list]
    titles = [tag["title"] for tag in attributes if tag.get("class") == "token"]
    assert titles[0] == ", ".join(f"{name} {x[0]:.3f}" for name, x in said[0]["columns"].items())
    assert len(titles) == 4 * sum(len(reply["tokens"]) for reply in said)
    assert [tag.get("id") for tag in attributes if "checked" in tag] == ["advantage"]
    assert shown.count("<summary>numbers") == len(said)  # on paper nothing hovers
    sample, step = last["samples"][0], [row for row in steps if "entropy" in row][-1]
    assert html.escape(f"{sample['after']} ({sample['score_after']:+.2f})") in shown
    assert f"gold {step['gold']:.3g}<" in shown and f"score {step['score']:.3g}<" in shown
    assert shown.count("<figure>") == 12 and "<h1>Stage 3: " in shown and "win rate over stage 1 " in shown
    assert re.search("<tr><td>blue things</td><td>", shown) and ">entropy " in shown
    for stage, curve in (("sft", ">training "), ("reward", ">held out ")):
        assert view(tmp_path / "out" / stage).returncode == 0
        shown = (tmp_path / "out" / stage / "run.html").read_text()
        assert shown.count("<polyline") == 2 and curve in shown and shown.count("<figure>") == 1
    quiet(ppo.main, dataclasses.replace(cfg, dry_run=True))  # leaves the run's log as it is
    assert jsonl(path)[-1] == summary
    path.write_text(path.read_text()[:-20])  # a run that has not ended, its last line half-written
    assert view(cfg.out).returncode == 0 and "not finished: step" in page.read_text()
    for args, message in (([tmp_path / "nowhere"], "no log here"),
                          (["learnign", tmp_path / "a.png", f"ppo={cfg.out}"], "learnign: no such picture")):
        done = view(*args)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr

def test_a_blanked_function_turns_its_tests_red_until_it_is_given_back(tmp_path):
    blank = lambda *args: finished([sys.executable, ROOT / "docs/blank.py", *args], cwd=tmp_path)
    assert "no function of" in blank("gaee").stderr
    mine = tmp_path / "out/exercise/ppo.py"
    for args, left, grade in ((["whiten", "gae"], 2, "0 passed, 2 failed"),
                              (["--solution", "gae"], 1, "1 passed, 1 failed")):
        assert blank(*args).returncode == 0
        assert mine.read_text().count("yours to write") == left and "arXiv:1506.02438" in mine.read_text()
        done = finished([sys.executable, "test_all.py", "whitened", "gae_on"], cwd=mine.parent)
        assert grade in done.stdout, (args, done.stdout)
    assert blank("--solution", "whiten").returncode == 0 and mine.read_text() == (ROOT / "ppo.py").read_text()
    mine.write_text("def broken(:\n")
    assert "line 1: not Python yet" in blank("gae").stderr

def test_stages_1_and_2_validate_and_print_samples_every_eval_every_steps(tmp_path):
    samples = lambda text: len(re.findall(r"^    '.*' -> ['\"]", text, re.M))
    assert samples(run(sft, tmp_path, steps=5, eval_every=2, log_every=2)[1]) == 2 * 4 + 8
    assert [row["step"] for row in log(tmp_path / "out/sft") if "loss" in row] == [2, 4, 5]
    for stage, key in ((sft, "val_loss"), (reward, "val_accuracy")):  # the last step's is the summary's
        run(stage, tmp_path, steps=4, eval_every=2)
        assert [row["step"] for row in log(tmp_path / "out" / stage.__name__) if key in row] == [2, 4]
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a book.\n\n" for i in range(9000)))
    text = run(sft, tmp_path, data=str(tmp_path / "book.txt"), steps=1)[1]
    assert samples(text) == 8 and "Line " in text  # continuations of what was held out

def test_axes_have_round_numbers_and_step_lines_fit_a_terminal(tmp_path):
    spec = importlib.util.spec_from_file_location("view", ROOT / "docs/view.py")
    spec.loader.exec_module(view := importlib.util.module_from_spec(spec))
    for low, high, want in ((0, 0.97, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 31, [-10, 0, 10, 20, 30, 40]),
                            (0.5, 0.99, [0.5, 0.6, 0.7, 0.8, 0.9, 1]),
                            (0, 0.01, [0, 0.002, 0.004, 0.006, 0.008, 0.01])):
        assert view.ticks(low, high) == want, (view.ticks(low, high), want)
    run_all(tmp_path)
    text = run(ppo, tmp_path, steps=4, batch=4, log_every=2, eval_every=9, save_every=9)[1]
    lines = re.findall("^step .*", text, re.M)
    assert len(lines) == 2 and max(map(len, lines)) <= 108 and lines[-1].endswith("| 0:00 left"), lines
    running = data_run.Run(dataclasses.replace(small(sft, tmp_path, out=f"{tmp_path}/timed"), steps=200))
    running.done, running.clock, running.busy = 100, time.perf_counter() - 119.7, 1.0
    assert "| 2:00 left" in quiet(running.report, "x")[1]

def test_stage_1s_yardsticks_are_those_of_replies_sampled_to_the_first_set():
    rows = [{"prompt": [user(f"{i}?")], "check": "yes", "right": ".*yes.*"} for i in range(3)] + [
        {"prompt": [user("x")], "check": "yes", "set": "new"}, {"prompt": [user("y")]}]
    assert prepare.by_set(rows) == {"held out": rows[:3] + rows[4:], "new": rows[3:4]}
    good, bad = [*TINY.encode("yes"), TINY.end], TINY.encode("oh yes")
    answer = partial(m.answer_prompts, tiny(), TINY, sft.Config(block_size=48, seed=3, batch=2))
    with mock.patch.object(m, "generate_many", side_effect=[[good, bad, good], [good]]) as speak:
        found, text = quiet(evaluation.measure_sets, rows, answer, TINY)
        nothing, _ = quiet(evaluation.measure_sets, rows[4:], answer, TINY)
    for call, part in zip(speak.call_args_list, (rows[:3], rows[3:4]), strict=True):
        _, prompts, new, _, generator, batch = call.args
        assert prompts == [TINY.prompt(row["prompt"], 24) for row in part] and (new, batch) == (24, 8)
        assert torch.equal(generator.get_state(), rng(3, "answers").get_state())
    assert found == {"right": 1, "gold": 2 / 3} and nothing == {"right": None, "gold": None}
    assert "3 prompts, held out: right 1.00, gold 0.67\n1 prompts, new: gold 1.00" in text

def test_rollouts_differ_from_step_to_step_and_from_seed_to_seed_and_their_padding_is_cut():
    models = ppo.Models(tiny(), tiny(), None, None)
    rows = [{"ids": [5, 6], "check": "-", "prompt": [user("?")]}] * 4
    draws = lambda step, seed: ppo.rollout(step, rows, models, TINY, ppo.Config(
        seed=seed, max_new_tokens=5, group=4), 0.1)["replies"]
    assert draws(0, 0) == draws(0, 0) != draws(1, 0) and draws(0, 0) != draws(0, 1)
    batch = ppo.as_batch([{"ids": [5] * 3}, {"ids": [5] * 20}], [[6] * 4, [7] * 9], TINY.end, CPU)
    assert [ppo.slice_batch(batch, [*range(n)])["mask"].shape for n in (1, 2)] == [(1, 4), (2, 9)]


# --- running them: killed, resumed, refused -----------------------------------------------------------------

def command(stage, root, out, **changes):
    """What a user types to run a stage in a process of its own."""
    cfg = dataclasses.asdict(small(stage, root, out=str(out), **changes))
    return [sys.executable, str(ROOT / f"{stage.__name__}.py"), *(f"--{k}={v}" for k, v in cfg.items())]

# the order of a sum depends on the number of threads: theirs is ours
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT,
         "env": os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}}
start, finished = partial(subprocess.Popen, **PIPES), partial(subprocess.run, **PIPES, timeout=120)

def stopped(process, out, step, stop):
    """Call `stop` after so many logged steps -> what the process wrote to stderr."""
    path, deadline = out / "log.jsonl", time.time() + 60
    while not path.exists() or sum('"lr"' in line for line in path.read_text().splitlines()) < step:
        assert process.poll() is None and time.time() < deadline, "it ended before it could be stopped"
        time.sleep(0.01)
    stop()
    return process.communicate(timeout=60)[1]

def test_killed_and_resumed_weights_are_bit_identical(tmp_path):
    for stage, steps in ((sft, 40), (reward, 24), (ppo, 24)):
        often = {"steps": steps, "save_every": 3, "log_every": 2, "eval_every": 7}
        run(stage, tmp_path, **often)
        whole, out = tmp_path / "out" / stage.__name__, tmp_path / "killed" / stage.__name__
        resume = [*command(stage, tmp_path, out, **often), "--resume"]
        for kill_at in (2, 5)[:1 + (stage is ppo)]:  # between two checkpoints, and again after a resume
            process = start(resume)
            stopped(process, out, kill_at, process.kill)
        assert torch.load(out / "state.pt", weights_only=True)["step"] < steps
        done = finished(resume)
        assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
        for file in ("model.safetensors", "config.json"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), (stage, file)
        times = {"seconds", "tokens_per_s", "memory_gb", "flags"}
        timeless = lambda folder: [{name: x for name, x in row.items() if name not in times}
                                   for row in jsonl(folder / "log.jsonl")]
        assert timeless(out) == timeless(whole), stage  # line for line

def test_ctrl_c_saves_and_says_how_to_go_on_and_a_second_one_is_pythons_own(tmp_path):
    process = start(command(sft, tmp_path, tmp_path / "stopped", steps=4000))
    errors = stopped(process, tmp_path / "stopped", 3, partial(process.send_signal, signal.SIGINT))
    assert "--resume" in errors and "Traceback" not in errors, errors
    assert torch.load(tmp_path / "stopped/state.pt", weights_only=True)["step"] >= 3
    with quiet(data_run.Run, small(sft, tmp_path))[0] as running:
        def due(what, done):
            running.done = done
            return running.due(what)
        assert [due("save", done) for done in (1, 2, 5, 6)] == [False, True, False, True]
        assert [due("eval", done) for done in (1, 3, 6)] == [False, True, True]
        signal.raise_signal(signal.SIGINT)
        assert due("save", 1) and not due("eval", 1)
        refuses(lambda: signal.raise_signal(signal.SIGINT), kind=KeyboardInterrupt)

def test_a_full_disk_and_a_fresh_run_leave_the_last_good_checkpoint_until_a_save(tmp_path):
    run(sft, tmp_path)
    out, cfg = tmp_path / "out/sft", small(sft, tmp_path, steps=99)
    before = {path: path.read_bytes() for path in out.iterdir()}
    running = data_run.Run(cfg)
    running.log(loss=1)
    assert before == {path: path.read_bytes() for path in before}
    refuses(lambda: data_run.Run(dataclasses.replace(cfg, resume=True)), "--steps=6, not 99")
    for where in ((torch, "save"), (hub, "write_safetensors")):
        with mock.patch.object(*where, side_effect=OSError(errno.ENOSPC, "No space left on device")):
            resumed, _ = quiet(data_run.Run, small(sft, tmp_path, resume=True))
            refuses(lambda: resumed.save(*m.exported(tiny())), "No space left", "untouched", "--resume")
    assert all(path.read_bytes() == data for path, data in before.items()
               if path.name not in ("log.jsonl", "state.pt"))
    torch.load(out / "state.pt", weights_only=True)
    assert not list(out.glob("*.tmp"))
    running.save(*m.exported(tiny()))
    running.log(loss=3)
    assert log(out) == [{"step": 0, "loss": n} for n in (1, 3)] and not (out / "log.jsonl.new").exists()
    assert torch.load(out / "state.pt", weights_only=True)["log"] == running.lines[:1]

def test_an_out_that_is_in_use_or_cannot_be_written_is_one_clear_line_before_the_data_are_read(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc/nowhere/x")
    for name in ("file", "file/below", "link"):
        out = str(tmp_path / name)
        for changes in ({}, {"dry_run": True}):
            refuses(lambda: run(sft, tmp_path, data="unread", out=out, **changes), f"--out={out}: no folder")
        refuses(lambda: save(out, tiny()), f"{name}/model.safetensors", "another folder")
    write = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with mock.patch.object(Path, "unlink", write):
        refuses(lambda: hub.write_file(tmp_path / "x", write), "/x: ", "Permission denied")
    cfg = small(sft, tmp_path)
    lock = f"from data.run import *; file = lock_folder({cfg.out!r}); print(1); input()"
    with start([sys.executable, "-u", "-c", lock], stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "1\n", other.stderr.read()
        for refused in (data_run.check_flags, data_run.Run):
            refuses(lambda: refused(cfg), "--out=", "another process")
        refuses(lambda: prepare.main([Path(cfg.data) / "sft.jsonl"], Path(cfg.out)), "another process")
        other.kill()
    quiet(sft.main, cfg)  # the first one has ended

def test_resume_refuses_inputs_that_have_changed(tmp_path):
    run_all(tmp_path)
    resume = lambda: data_run.Run(small(ppo, tmp_path, resume=True))
    with open(tmp_path / "out/sft/log.jsonl", "a") as f:
        f.write("a dry run's line, which is no input\n")
    quiet(resume)
    for name, path in (("init", "out/sft/config.json"), ("reward", "out/reward/model.safetensors"),
                       ("data", "data/prompts.jsonl")):
        whole = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(whole[:-1] + b" ")
        refuses(resume, f"--{name}=", "has changed", "omit --resume")
        (tmp_path / path).write_bytes(whole)
    state = torch.load(tmp_path / "out/ppo/state.pt", weights_only=True)
    assert state.pop("inputs").keys() == {"init", "reward", "data"}
    torch.save(state, tmp_path / "out/ppo/state.pt")  # as earlier versions wrote it
    assert "resuming" in quiet(resume)[1]

def test_ranks_of_other_launchers_and_poor_consoles_end_no_run_and_no_terminal_means_no_bar(tmp_path):
    ranks = ("import sys\nfrom data.run import *\nsys.stdout = sys.stderr\n"
             "pick_device('cpu', 'float32'); sys.exit(f'{RANK} of {WORLD}')")
    for given, said in (({"RANK": "1"}, "0 of 1"), ({"RANK": "", "WORLD_SIZE": ""}, "0 of 1"),
                        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun")):
        errors = finished([sys.executable, "-c", ranks], env=os.environ | given).stderr
        assert said in errors and "Traceback" not in errors, errors
    shows = "import model\nfrom data.chat import Config\nprint(model.parse_flags(Config).prompt)"
    typed = [sys.executable, "-c", shows]
    done = finished([*typed, "--prompt=\u2192"], env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr
    done = finished(command(sft, tmp_path, tmp_path / "plain"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout and done.stdout.startswith("device cpu")

def test_bad_input_is_refused_with_a_remedy_before_the_run(tmp_path):
    run_all(tmp_path)
    data, empty, here = tmp_path / "data", tmp_path / "empty", os.getcwd()
    empty.mkdir()
    policy, scorer, nowhere = (str(tmp_path / name) for name in ("out/sft", "out/reward", "nowhere"))
    for stage, flags, *fragments in (
            (ppo, {"minibatch": 3}, "--batch=8"), (ppo, {"minibatch": 0}), (sft, {"microbatch": -1}),
            (ppo, {"clip": math.nan}, "finite"), (ppo, {"lam": 1.5}), (sft, {"lr": 0.0}),
            (sft, {"dtype": "half"}, "bfloat16"), (sft, {"device": "warp"}), (ppo, {"max_new_tokens": 64}),
            (sft, {"tokenizer": "klingon"}, "tiny or gpt2"), (sft, {"n_head": 5}),
            (reward, {"block_size": 128}), (ppo, {"kl_target": 3.0, "kl_coef": 0.0})):
        given = [f"--{name}={value}" for name, value in flags.items()]
        refuses(lambda: run(stage, tmp_path, **flags), *given, *fragments)
    for stage, flags, *fragments in (
            (sft, {"resume": True, "lr": 1e-5}, "--lr="), (sft, {"data": str(empty)}, "sft.jsonl"),
            (reward, {"out": policy}, "overwrite --init"), (ppo, {"out": scorer}, "overwrite --reward"),
            (reward, {"init": nowhere}, "no checkpoint here"), (sft, {"data": nowhere}, "nowhere"),
            (ppo, {"reward": policy}, "out/sft: a language model", "reward model is needed"),
            *((stage, {"init": scorer, "out": nowhere}, "out/reward: a reward model",
               "a language model is needed") for stage in (sft, reward, ppo))):
        refuses(lambda: run(stage, tmp_path, **flags), *fragments)
    for flags, said in (({"model": policy, "reward": policy}, "out/sft: a language model"),
                        ({"model": scorer}, "out/reward: a reward model")):
        refuses(lambda: chat.main(chat.Config(**flags, prompt="Hi", device="cpu")), said)
    refuses(lambda: data_run.parse_flags(sft.Config, ["--weight-decay=1"]), "--weight-decay",
            "Did you mean --weight_decay")
    with mock.patch.object(data_run, "WORLD", 3):  # what does not divide among the processes
        for flags, *fragments in (({}, "--batch=8", "3 processes"),
                                  ({"batch": 6, "offload": "all"}, "--offload=all")):
            refuses(lambda: data_run.check_flags(small(sft, tmp_path, **flags)), *fragments)
    try:
        os.chdir(data)  # where there is no out/sft
        refuses(lambda: m.load_model("out/sft"), 'Run "python sft.py" first')
    finally:
        os.chdir(here)
    stranger = tiny(Scorer)
    stranger.cfg.tokenizer = "gpt2"
    with mock.patch.object(ppo, "load_model", return_value=stranger):
        refuses(lambda: run(ppo, tmp_path), "gpt2 tokens", "tiny tokens")
    for text, *fragments in (("", "sft.jsonl"),
                             ('{"messages": [{"role": "user", "content": "x"}]\n', "sft.jsonl:1", "JSON")):
        (empty / "sft.jsonl").write_text(text)
        refuses(lambda: run(sft, tmp_path, data=str(empty)), *fragments)
    with open(data / "prompts.val.jsonl", "a") as f:
        f.write(json.dumps({"prompt": [user("What?")]}) + "\n")
    refuses(lambda: run(ppo, tmp_path, reward="check"), "--reward=check", 'have no "check"')

def test_every_flag_is_refused_beyond_its_ends_and_trains_at_them(tmp_path):
    run_all(tmp_path)
    largest = {"seed": 2**31, "steps": 2, "batch": 8, "minibatch": 8, "n_layer": 3, "n_head": 4, "n_embd": 64,
               "block_size": 64, "max_new_tokens": 63, "epochs": 2, "group": 8, "eval_prompts": 9,
               "lora_rank": 99, "best_of_n": 3, "microbatch": 99, "lr": 0.9}  # where the end is far or none
    for stage in (sft, reward, ppo):
        fields = {f.name: f.type for f in dataclasses.fields(stage.Config)}
        ends = {}
        for name in fields.keys() & data_run.RANGES.keys():
            interval = data_run.RANGES[name]
            low, high = map(float, interval[1:-1].split(", "))
            tiny_step = 1 if fields[name] is int else 1e-9
            outside = ([low - tiny_step] if interval[0] == "[" else [low, low - tiny_step]) + (
                [] if high == math.inf else [high + tiny_step] if interval[-1] == "]" else [high])
            for value in map(fields[name], outside):
                refuses(lambda: data_run.check_flags(small(stage, tmp_path, **{name: value})),
                        f"--{name}={value}: {data_run.in_words(name)}.")
            ends[name] = (fields[name](low if interval[0] == "[" else low + 1e-9),
                          fields[name](largest.get(name, 9 if high == math.inf else high)))
        assert {name for name, kind in fields.items() if kind in (int, float)} == ends.keys()
        lowest = {name: low for name, (low, _) in ends.items()} | {
            "block_size": 24, "steps": 2, "max_new_tokens": 1, "temperature": 1.0}
        highest = {name: high for name, (_, high) in ends.items()} | {"temperature": 9.0, "gamma": 1.0}
        for flags in (lowest, highest, highest | {"lora_rank": 0}):
            for name in ("n_layer", "n_head", "n_embd") if stage is not sft else ():
                flags = flags | {name: 2}
            flags = {name: value for name, value in flags.items() if name in fields}
            result, text = run(stage, tmp_path, **flags | {"out": str(tmp_path / "ends")})
            assert jsonl(tmp_path / "ends/log.jsonl")[-1]["final"], text

    for name, value, words in (("top_p", 0.0, "above 0, at most 1"), ("top_p", 1.1, "above 0, at most 1"),
                               ("top_k", -1, "at least 0"), ("temperature", -0.1, "at least 0")):
        refuses(lambda: chat.main(chat.Config(**{name: value})), f"--{name}={value}: {words}.")
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        data_run.parse_flags(ppo.Config, ["--help"])
    assert "of the probability ratio; above 0 [0.2]" in re.sub(r"\s+", " ", shown.getvalue())

def test_a_clock_that_stands_still_a_warm_up_beyond_the_end_and_a_mad_reward_model(tmp_path):
    with mock.patch.object(data_run.time, "perf_counter", lambda: 5.0):
        run(sft, tmp_path)
    run(reward, tmp_path)
    rates = [data_run.linear_lr(step, sft.Config(lr=1.0, steps=4, warmup=50)) for step in range(4)]
    assert rates == [0.5, 1.0, 1.0, 0.5] and data_run.linear_lr(0, sft.Config(lr=1.0, steps=1)) == 1.0
    mad = lambda *_: torch.full((4,), 1e30)
    with mock.patch.object(ppo, "score_replies", mad):
        refuses(lambda: run(ppo, tmp_path, score_clip=1e32, batch=4), "out/reward scores a reply 1e+30",
                "--score_clip", "train the reward model")
    for value in (0.0, -1.0):
        refuses(lambda: run(reward, tmp_path, dpo=True, beta=value), f"--beta={value}: above 0")

def test_a_loss_or_a_gradient_that_is_not_finite_changes_no_weight_and_stops_the_run(tmp_path):
    loss = lambda net, rows, device: net.wte.weight.sum(1, keepdim=True) * math.nan
    with mock.patch.object(sft, "negative_log_likelihood", loss):
        refuses(lambda: run(sft, tmp_path), "step 1", "nan")
    run_all(tmp_path)
    for stage, where in ((sft, "learn"), (reward, "learn"), (ppo, "ppo_gradients")):
        path, function = tmp_path / "out" / stage.__name__ / "model.safetensors", getattr(stage, where)
        whole = path.read_bytes()
        def overflows(*args):  # a finite loss whose gradient is not
            out = function(*args)
            net = args[2].actor if stage is ppo else args[0]
            first = next(p for p in net.parameters() if p.requires_grad)
            first.accumulate_grad(torch.full_like(first, math.inf))
            return out
        with mock.patch.object(stage, where, overflows):
            refuses(lambda: run(stage, tmp_path, save_every=1), "grad_norm is inf", "last good checkpoint")
        assert path.read_bytes() == whole, stage
    w = torch.nn.Parameter(torch.ones(2))
    adam = OffloadedAdamW([w], 0.1)
    (w * math.inf).sum().backward()
    assert adam.step(0.1, 1.0) == math.inf and torch.equal(w, torch.ones(2))

def test_a_reply_may_hold_token_0():
    models = ppo.Models(tiny(), tiny(), tiny(Scorer), tiny(Scorer))
    cfg = ppo.Config(batch=2, minibatch=2, max_new_tokens=4)
    with mock.patch.object(m, "generate", lambda *_, **__: [[0, 5, TINY.end], [0, TINY.end]]):
        batch = ppo.rollout(0, [{"ids": [7, 8]}, {"ids": [9, 8]}], models, TINY, cfg, 0.05)
    assert batch["mask"].sum(1).tolist() == [3, 2] and batch["logprobs"].count_nonzero() == 5

def test_without_a_reward_model_the_critic_is_stage_1_predicting_0_and_long_prompts_lose_their_left(tmp_path):
    run(sft, tmp_path)
    models, _ = ppo.load_models(small(ppo, tmp_path, reward="check"), CPU, torch.float32)
    assert models.reward_model is None and not models.critic.score.weight.any()
    for name, p in models.actor.state_dict().items():
        assert torch.equal(p, models.critic.state_dict()[name])
    long = [user("why " * 200)]
    with open(tmp_path / "data/prompts.jsonl", "a") as f:
        f.write(json.dumps({"prompt": long, "check": "no"}) + "\n")
    (train, _), text = quiet(ppo.load_prompts, small(ppo, tmp_path), TINY)
    assert "; 1 longer than 52 tokens" in text and train[-1]["ids"] == TINY.prompt(long, 10**9)[-52:]
    longest = max(len(row["ids"]) for row in train[:-1])  # a prompt that just fits is whole
    cfg = small(ppo, tmp_path, max_new_tokens=64 - longest)
    assert longest <= 52 and f"; 1 longer than {longest} tokens" in quiet(ppo.load_prompts, cfg, TINY)[1]


# --- running them on damaged files and flags ----------------------------------------------------------------

# Whatever is wrong: one clear message, never a traceback, never another program's code.
FUZZ = int(os.environ.get("FUZZ", 100))  # random mutations of each kind

def damaged(data, draw, head=None):
    """Bytes as a bad disk, download or hand would leave them; changed mostly in the first `head` of them."""
    data, words = bytearray(data), b"-1 2147483648 1e999 null NaN true [[]] {\"a\":{}}".split()
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, signs = draw.randrange(min(head or len(data), len(data)) or 1), draw.randrange(1, 9)
        start, end, new = draw.choice((
            (at, at + 1, draw.randbytes(1)), (draw.randrange(len(data) + 1), None, b""),
            (at, at, bytes(draw.choices(b'{}[]",:0123456789 \n\\abcxyz-.', k=signs))),
            (at, at + draw.randrange(1, 20), b""), (at, at + 1, draw.choice(words)),
            (at, at + 8, draw.randbytes(8))))
        data[start:end] = new
    return bytes(data)

def survives(path, use, head=None):
    whole, draw, refused = path.read_bytes(), random.Random(path.name), 0
    for i in range(FUZZ):
        data = damaged(whole, draw, head)
        path.write_bytes(data)
        try:
            quiet(use)
        except SystemExit as error:
            assert error.code and isinstance(error.code, str)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{path.name}, mutation {i}: {data[:300]}") from error
    path.write_bytes(whole)
    quiet(use)
    if FUZZ > 100:
        print(f"{path.name}: {FUZZ:,} mutations, {refused:,} refused", file=sys.__stdout__)

def test_fuzz_checkpoints_and_what_a_resume_reads(tmp_path):
    cfg, out = small(sft, tmp_path, steps=2, n_layer=1, n_embd=8, resume=True), tmp_path / "out/sft"
    quiet(sft.main, cfg)
    load = lambda: m.load_model(out)
    for name in ("state.pt", "log.jsonl"):
        survives(out / name, lambda: data_run.Run(cfg))
    weights, old, index = (out / name for name in (
        "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"))
    whole, tensors = weights.read_bytes(), hub.read_safetensors(weights)
    survives(out / "config.json", load)
    survives(weights, load, head=8 + int.from_bytes(whole[:8], "little"))
    torch.save(dict(tensors), old)
    hub.write_safetensors(out / "part.safetensors", tensors)
    for damage in (whole[:100], whole[:-500], b"\xff" * 16, b""):
        weights.write_bytes(damage)
        refuses(load, "model.safetensors")
    weights.unlink()
    survives(old, load)
    old.unlink()
    index.write_text(json.dumps({"weight_map": {name: "part.safetensors" for name in tensors}}))
    survives(index, load)

def test_fuzz_a_folder_with_words_of_its_own(tmp_path):
    folder = Path(llama_folder(tmp_path / "llama", n_layer=1))

    def load():
        tokenizer.read_words.cache_clear()
        k = Tokenizer(m.load_model(folder).cfg.tokenizer)
        k.encode(k.decode(k.render([user("Hi 12"), assistant("Yes.")])[0]))
    survives(folder / "config.json", load)
    survives(folder / "tokenizer.json", load, head=3000)
    survives(folder / "tokenizer_config.json", load)

def test_fuzz_data(tmp_path):
    write_data(tmp_path / "data")
    for kind in prepare.KINDS:
        path = tmp_path / "data" / f"{kind}.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:5]))
        survives(path, lambda: prepare.load(tmp_path / "data", kind))
    records = [record for record, _ in FORMATS.values()]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    for name, data in {"in.jsonl": lines, "in.json": json.dumps(records).encode(), "in.txt": lines,
                       "in.jsonl.gz": gzip.compress(lines)}.items():
        (tmp_path / name).write_bytes(data)
        survives(tmp_path / name, lambda: prepare.main([tmp_path / name], tmp_path / "out"))

def test_fuzz_rows_of_two_formats_lose_no_word_in_silence():
    draw, records, count = random.Random(0), [record for record, _ in FORMATS.values()], itertools.count(1000)
    fixed = {"role", "from", "type", "preference"}

    def marked(x, name):  # every free text becomes a word of its own
        if isinstance(x, dict):
            return {key: marked(value, key) for key, value in x.items()}
        if isinstance(x, list):
            return [marked(value, name) for value in x]
        free = isinstance(x, str) and name not in fixed
        words = re.compile(r"(?<=Human: )[^\n]+|(?<=Assistant: ).+|^[^\n]+$")
        return words.sub(lambda _: f"w{next(count)}.", x) if free else x
    converted = 0
    for i in range(5 * FUZZ):
        both = [*draw.choice(records).items(), *draw.choice(records).items()]
        row = marked({key: value for key, value in both if draw.random() < 0.85}, "")
        for value in row.values():
            for turn in value if isinstance(value, list) and draw.random() < 0.3 else []:
                if isinstance(turn, dict):
                    turn["extra"] = f"w{next(count)}."
        chosen = row.get("chosen")
        if "rejected" in row and isinstance(chosen, str) and "Human:" in chosen:  # one prompt for both
            row["rejected"] = chosen[:-1] + "no."
        elif "rejected" in row and isinstance(chosen, list):
            row["rejected"] = [*chosen[:-1], assistant(f"w{next(count)}.")]
        record = prepare.Record(row)
        try:
            rows = json.dumps(prepare.convert(record))
        except prepare.Unusable:
            continue
        converted, unused = converted + 1, record.unused()
        for name, value in row.items():
            lost = [word for word in re.findall(r"w\d+\.", json.dumps(value)) if word not in rows]
            assert not lost or unused & {name, "extra of a turn", "extra of a part"}, (lost, row, rows)
    assert 2 * FUZZ < converted

@mock.patch.object(data_run, "lock_folder", mock.Mock())  # no folder is made
def test_fuzz_flags():
    draw, passed, signs = random.Random(0), 0, ("=", "=", "=", "", "-", "x=")
    values = ["", *"0 -1 1 3 0.5 1e999 nan -inf yes all gpt2 / ..".split(), "9" * 30]
    for i in range(FUZZ):
        stage = draw.choice((sft, reward, ppo))
        fields = [f.name for f in dataclasses.fields(stage.Config)]
        argv = [f"--{draw.choice(fields)}{draw.choice(signs)}{draw.choice(values)}"
                for _ in range(draw.choice((1, 2, 4)))]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                cfg = data_run.parse_flags(stage.Config, argv)
                quiet(data_run.check_flags, cfg)
                quiet(data_run.pick_device, cfg.device, cfg.dtype)
        except SystemExit as error:
            assert error.code, argv
            continue
        passed += 1
        assert all(math.isfinite(x) for x in dataclasses.astuple(cfg) if isinstance(x, float)), (argv, cfg)
    assert FUZZ / 50 < passed < FUZZ


# --- many processes: torchrun and FSDP, on this machine with gloo, on CPUs ----------------------------------

def torchrun(n, typed, *flags):
    if not hasattr(memory.FSDPModule, "set_force_sum_reduction_for_comms"):
        raise unittest.SkipTest(f"torch {torch.__version__} is too old for several processes")
    typed = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *flags,
             *typed[1:]]
    return start(typed, env=os.environ | {"OMP_NUM_THREADS": "1"})

def test_two_processes_take_the_same_course_as_one(tmp_path):
    ids = random_ids(4, 16)
    save(tmp_path / "qwen3", tiny(tied=False, **QWEN3))
    qwen3 = {"init": str(tmp_path / "qwen3"), "reward": "check"}
    for stage, changes in ((sft, {"microbatch": 2}), (reward, {"dpo": True}),
                           (reward, {"checkpoint": True, "offload": "optimizer"}),
                           (ppo, {"ptx_coef": 0.5, "temperature": 0.7}),
                           (ppo, {"group": 4, "minibatch": 8, "microbatch": 8, **qwen3})):
        run(stage, tmp_path, **changes)
        folders = tmp_path / "out" / stage.__name__, tmp_path / "two"
        process = torchrun(2, command(stage, tmp_path, folders[1], **changes))
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out.count("2 processes") == 1, errors  # the first speaks for all
        for a, b in zip(*map(log, folders), strict=True):
            for name in a.keys() - {"seconds", "tokens_per_s", "memory_gb", "calibration", "flags",
                                         "rollouts", "samples"}:
                agree = a[name] == b[name] or abs(a[name] - b[name]) < 1e-5 * max(1, abs(a[name]))
                assert agree, (stage, name, a, b)
        kind = Scorer if stage is reward and "dpo" not in changes else GPT
        nets = [m.load_model(folder, kind) for folder in folders]
        close(*(values_of(net, ids) if kind is Scorer else net.logits(net(ids)) for net in nets), 1e-3)

def test_a_process_that_dies_ends_the_job_and_another_number_of_them_goes_on(tmp_path):
    run(sft, tmp_path, steps=40)
    out, ids = tmp_path / "killed", random_ids(4, 16)
    typed = command(sft, tmp_path, out, steps=40, lora_rank=0)
    process = torchrun(2, typed, "--monitor-interval=2")  # the interval leaves the other one time to speak
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    errors = stopped(process, out, 5, lambda: os.kill(int(children.read_text().split()[-1]), signal.SIGKILL))
    assert process.returncode != 0 and "SIGKILL" in errors, errors
    assert "process 0: another process of this job has ended." in errors, errors
    m.load_model(out)
    done = finished([*typed, "--resume"])
    assert "resuming" in done.stdout, done.stderr
    nets = m.load_model(tmp_path / "out/sft"), m.load_model(out)
    close(*(net.logits(net(ids)) for net in nets), 1e-3)

def test_the_whole_model_is_there_for_sampling_and_sharded_again_after_it():
    calls, block, model = mock.Mock(), mock.call.block, mock.call.model
    for name in ("block", "model"):
        calls.attach_mock(mock.create_autospec(memory.FSDPModule, instance=True), name)
    calls.model.h = [calls.block]
    with memory.unsharded(calls.model):
        assert calls.mock_calls == [block.set_reshard_after_forward(False, recurse=False), block.unshard(),
                                    model.set_reshard_after_forward(False, recurse=False), model.unshard()]
        calls.reset_mock()
    assert calls.mock_calls == [block.set_reshard_after_forward(True, recurse=False), block.reshard(),
                                model.set_reshard_after_forward(False, recurse=False), model.reshard()]


# --- the house ----------------------------------------------------------------------------------------------

def test_imports_run_one_way_and_no_stage_imports_another():
    house = ("memory data.dry_run data.kernels data.bpe data.tokenizer data.layouts data.prepare data.hub "
             "data.batches data.run data.examples data.evaluation model data.chat").split()
    ours = re.compile(r"^ *from (memory|model|sft|reward|ppo|data(?:\.\w+)?) import (\w+)", re.M)
    for i, name in enumerate([*house, "sft", "reward", "ppo"]):
        text = (ROOT / f"{name.replace('.', '/')}.py").read_text().split("if __name__")[0]
        imported = {f"data.{what}" if module == "data" else module for module, what in ours.findall(text)}
        assert imported <= set(house[:i]), (name, imported)


# --- the README: every command, and every exercise that breaks something ------------------------------------

# What makes a command short; a later flag of the same name wins.
SHORT = {"sft.py": "--steps=4 --batch=8 --save_every=2", "reward.py": "--steps=4 --batch=8 --save_every=2",
         "ppo.py": "--steps=2 --batch=16 --minibatch=8 --microbatch=2 --max_new_tokens=12 --best_of_n=2 "
                   "--eval_prompts=8", "docs/bench.py best-of": "2", "docs/bench.py own": "2"}
SKIP = "pip install", "git clone", "python test_all.py"  # what runs this, or takes minutes

def commands(text):
    """The lines of a README that a reader would type."""
    joined = re.sub(r"\\\n +", "", text)
    lines = re.findall(r"^    (?:[A-Z_]+=\S+ )*(?:python|torchrun|pip|git) .*$", joined, re.M)
    return [re.sub(r" +#.*", "", line).strip() for line in lines]

def exercises(text):
    """-> [(file, old text, new text, name of the test that turns red), ...]"""
    found = re.findall(r"In `([\w/]+\.py)`:\n\n((?:    [-+] .*\n)+)\n(?:.*\n)*?.*Red: `(test_\w+)`", text)
    side = lambda patch, sign: "".join(line[6:] + "\n" for line in patch.splitlines() if line[4] == sign)
    return [(file, side(patch, "-"), side(patch, "+"), name) for file, patch, name in found]

def readme():
    """In a copy of this folder: run all commands, cut short, then break what the exercises break."""
    text = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    with tempfile.TemporaryDirectory() as folder:
        copy, cache = Path(folder) / "copy", Path(folder) / "hub"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
        said = "\n\nHuman: Why %d?\n\nAssistant: %s."
        rows = [{"chosen": said % (i, "Because"), "rejected": said % (i, "No")} for i in range(60)]
        pairs, prose = "\n".join(map(json.dumps, rows)).encode(), b"All the world is a stage.\n\n" * 200
        for name, data in {"mine.jsonl": pairs, "helpful-base.test.jsonl.gz": gzip.compress(pairs),
                           "book.txt": prose, "tinyshakespeare.txt": prose}.items():
            (copy / name).write_bytes(data)
        net = GPT(GPTConfig(50304, 1024, 1, 2, 8, "gpt2")).initialize(rng(0))  # stands in for the hub's
        save(cache / "models--openai-community--gpt2/snapshots/main", net)
        llama_folder(cache / "models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/main", n_positions=512)
        env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        for line in commands(text):
            if line.startswith(SKIP):
                print(f"skipped: {line}", flush=True)
                continue
            typed = re.sub(r"\bpython\b", sys.executable, line)
            typed = re.sub(r"\btorchrun\b", f"{sys.executable} -m torch.distributed.run", typed)
            for script, flags in SHORT.items():
                typed = re.sub(rf" {script}\b(?![^&]*--dry_run)[^&]*", rf"\g<0> {flags} ", typed)
            since = time.time()
            done = finished(typed, shell=True, cwd=copy, env=env, stdin=subprocess.DEVNULL, timeout=None)
            assert done.returncode == 0, f"README: {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            print(f"ran in {time.time() - since:3.0f} s: {line}", flush=True)
        for file, old, new, name in exercises(text):
            whole = (copy / file).read_text()
            assert whole.count(old) == 1, f"README: {file} has not one place with\n{old}"
            (copy / file).write_text(whole.replace(old, new))
            done = finished([sys.executable, "test_all.py", "-k", name], cwd=copy, timeout=None)
            red = done.stdout.endswith("\n0 passed, 1 failed, 0 skipped\n") and done.returncode == 1
            assert red, f"README: {name} is not red\n{done.stdout}\n{done.stderr}"
            (copy / file).write_text(whole)
            print(f"red, as it should be: {name}", flush=True)


# --- the runner ---------------------------------------------------------------------------------------------

def run_tests(arguments):
    """-> the exit code."""
    parts = [part for part in arguments if part not in ("-k", "-f")] or [""]
    tests = {name: test for name, test in globals().items()
             if name.startswith("test_") and any(part in name for part in parts)}
    counts = {"ok": 0, "FAILED": 0, "skipped": 0}
    for name, test in tests.items():
        since, outcome, reason, output = time.time(), "ok", "", io.StringIO()
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output), \
                 contextlib.redirect_stderr(output):
                test(*[Path(folder)] * ("tmp_path" in inspect.signature(test).parameters))
        except unittest.SkipTest as skip:
            outcome, reason = "skipped", f": {skip}"
        except (Exception, SystemExit):
            outcome = "FAILED"
            output.write(traceback.format_exc())
        counts[outcome] += 1
        print(f"{name} {outcome}{reason} {time.time() - since:.1f} s", flush=True)
        if outcome == "FAILED":
            print(output.getvalue(), flush=True)
            if "-f" in arguments:
                break
    print("{ok} passed, {FAILED} failed, {skipped} skipped".format(**counts))
    return int(counts["FAILED"] > 0 or not tests)


if __name__ == "__main__":
    sys.exit(readme() if sys.argv[1:] == ["readme"] else run_tests(sys.argv[1:]))
