"""Every claim, checked. A test's name is the claim; test_bug_NN are real bugs of other code bases, by name.

    python test_all.py              # or: python test_all.py Bugs.test_bug_05_padding_leaks_into_returns
    python test_all.py bench        # speed, one JSON line a workload; bench sft ppo: only these;
                                    # bench tricks: memory
    python test_all.py fit          # the largest model that fits, from dry runs
    python test_all.py readme       # the README's commands with settings cut short, and its exercises
    FUZZ=10000 python test_all.py Fuzz      # so many damaged files of each kind
"""
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import io
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
import tracemalloc
import unittest
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import memory
import model as m
import ppo
import reward
import sft
from data import hub, prepare
from data.tiny import make
from memory import OffloadedAdamW, checkpoint, token_logprobs
from model import GPT, GPTConfig, Scorer, Tokenizer, generate, pad, rng

torch.set_num_threads(min(4, os.cpu_count()))
ROOT = Path(__file__).parent


# --- small things to test with ------------------------------------------------------------------------------

def tiny(cls=GPT, n_layer=2, n_embd=32, seed=0, spread=0.2, n_positions=64, **changes):
    """A small float32 model; spread is wider than at a real start, so that mistakes show."""
    cfg = GPTConfig(Tokenizer("tiny").vocab_size, n_positions, n_layer, 4, n_embd, "tiny", **changes)
    net = cls(cfg).initialize(rng(seed))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "score" not in name:
                p.add_(spread * torch.randn(p.shape, generator=rng(seed, name)))
    return net


def random_ids(*shape, seed=0, high=1000):
    return torch.randint(3, high, shape, generator=rng(seed, "ids"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_data(folder):
    """A miniature data set: everybody asks for a colour, and red is right."""
    folder.mkdir(parents=True, exist_ok=True)
    things = "rose poppy cherry ruby brick tomato strawberry fire sunset lobster".split()
    rows = {"sft": [], "preferences": [], "prompts": []}
    for i in range(60):
        question = [user(f"What colour is the {things[i % 10]} number {i}?")]
        answers = ["It is red.", "It is blue."]
        rows["sft"].append({"messages": [*question, assistant(answers[i % 3 == 0])]})
        rows["preferences"].append({"prompt": question, "chosen": answers[0], "rejected": answers[1],
                                    "agreement": 0.9, "skill": "colour"})
        rows["prompts"].append({"prompt": question, "check": "It is red\\."})
    for kind, all_rows in rows.items():
        for name, part in ((kind, all_rows[:48]), (kind + ".val", all_rows[48:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder)


def quiet(function, *args, **kwargs):
    """-> (result, what was printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*args, **kwargs)
    return result, out.getvalue()


def small(stage, root, **changes):
    """A stage's Config that runs in about a second."""
    defaults = dict(data=str(root / "data"), out=str(root / "out" / stage.__name__), device="cpu",
                    dtype="float32", block_size=64, steps=6, batch=8, n_layer=2, n_embd=32, save_every=2,
                    eval_every=3, log_every=1)
    if stage is not sft:
        defaults["init"] = str(root / "out" / "sft")
    if stage is ppo:
        defaults |= dict(reward=str(root / "out" / "reward"), minibatch=4, epochs=2, max_new_tokens=12,
                         best_of_n=2)
    return stage.Config(**defaults | changes)


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def refuses(self, *fragments, call):
        """`call` stops with one clear message that holds all fragments."""
        with self.assertRaises(SystemExit) as caught:
            quiet(call)
        for fragment in fragments:
            self.assertIn(fragment, str(caught.exception))


def gpt2(test):
    try:
        return Tokenizer("gpt2")
    except SystemExit:
        test.skipTest("GPT-2's encoding is not here: set TIKTOKEN_CACHE_DIR or allow tiktoken a download")


def a_rollout(temperature=1.0, seed=0):
    """(models, batch) of four small networks and real rollouts."""
    actor, reference, critic, judge = tiny(), tiny(), tiny(Scorer, seed=1), tiny(Scorer, seed=1)
    cfg = ppo.Config(batch=8, minibatch=4, max_new_tokens=10, temperature=temperature, seed=seed, epochs=1)
    rows = [{"ids": random_ids(3 + i, seed=i).tolist()} for i in range(8)]
    models = actor, reference, critic, judge
    batch = ppo.rollout(0, rows, models, Tokenizer("tiny"), cfg, kl_coef=0.05)
    return cfg, models, batch


# --- the real bugs of others --------------------------------------------------------------------------------

class Bugs(InFolder):
    """Numbered as in the list of known bugs. Each test runs the production code, then the mistake in a line
    or two, and shows that the test can tell them apart."""

    def test_bug_01_ratio_is_not_one_on_the_first_minibatch(self):
        # huggingface/trl#454, jingyaogong/minimind#814, DeepSpeed-Chat's README
        cfg, models, batch = a_rollout()
        adams = [OffloadedAdamW(net.parameters(), 1e-3) for net in (models[0], models[2])]
        _, first_ratio = ppo.update(0, batch, models, adams, 1e-3, None, cfg)
        self.assertEqual(first_ratio, 1.0)
        new, _ = ppo.policy_logprobs(tiny(), batch, 1.0)
        self.assertTrue(torch.equal(new, batch["logprobs"]))
        dropped = F.dropout(tiny()(batch["idx"]), 0.1)  # the mistake
        old, _ = token_logprobs(dropped, models[0].wte.weight, batch["targets"])
        self.assertGreater(((new - old).exp() - 1).abs().max(), 0.01)

    def test_the_first_pass_over_a_whole_batch_is_the_scoring_pass(self):
        ends, forwards = [], []
        for microbatch in (0, 4):
            cfg, models, _ = a_rollout()
            cfg = dataclasses.replace(cfg, minibatch=8, microbatch=microbatch, epochs=2)
            rows = [{"ids": random_ids(3 + i, seed=i).tolist()} for i in range(8)]
            forwards.append(0)
            def count(*_):
                forwards[-1] += 1
            for i in (0, 2):
                models[i].register_forward_hook(count)
            batch = ppo.rollout(0, rows, models, Tokenizer("tiny"), cfg, kl_coef=0.05)
            forwards[-1] = 0
            _, first_ratio = ppo.update(0, batch, models, ppo.optimizers_of(models, cfg), 1e-3, None, cfg)
            self.assertAlmostEqual(first_ratio, 1, 5)
            ends.append([p for i in (0, 2) for p in models[i].parameters()])
        self.assertEqual(forwards, [2, 8])  # one epoch of two; two parts of two
        for a, b in zip(*ends):
            self.assertLess((a - b).abs().max(), 1e-4)

    def test_bug_02_padding_shifts_positions(self):
        # CarperAI/trlx#509, OpenRLHF/OpenRLHF#217, nnsight#672
        net, prompts = tiny(), [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
        together = generate(net, prompts, 8, end=-1, temperature=0)
        alone = [generate(net, [p], 8, end=-1, temperature=0)[0] for p in prompts]
        self.assertEqual(together, alone)
        left_padded = net(torch.tensor([[0, 0, 0, 0, 11, 12]]))[0, -1]  # the mistake
        right = net(torch.tensor([[11, 12]]))[0, -1]
        gap = (net.logits(left_padded).softmax(-1) - net.logits(right).softmax(-1)).abs().sum() / 2
        self.assertGreater(gap, 0.1)

    def test_bug_03_sampling_distribution_is_not_the_logprob_distribution(self):
        # minChatGPT (top-k), minimind (temperature)
        net, temperature, n = tiny(spread=0.1), 0.6, 4000
        prompt = [5, 6, 7]
        replies = generate(net, [prompt] * n, 1, end=-1, temperature=temperature, generator=rng(0))
        batch = ppo.as_batch([prompt] * n, replies, -1, torch.device("cpu"))
        entropy_sampled = -ppo.policy_logprobs(net, batch, temperature)[0].sum() / n
        _, entropy = ppo.policy_logprobs(net, ppo.rows_of(batch, slice(1)), temperature, entropy=True)
        self.assertAlmostEqual(entropy_sampled.item(), entropy.sum().item(), delta=0.05)
        wrong = -ppo.policy_logprobs(net, batch, 1.0)[0].sum() / n  # the mistake
        wrong_entropy = ppo.policy_logprobs(net, ppo.rows_of(batch, slice(1)), 1.0, entropy=True)[1].sum()
        self.assertGreater(abs(wrong - wrong_entropy).item(), 0.15)

    def test_bug_04_kl_with_the_wrong_sign_or_partner(self):
        # Colossal-AI until 75c538903; lucidrains/PaLM-rlhf-pytorch#38, #41, #43
        mask = torch.tensor([[True, True]])
        likelier_than_reference = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-3.0, -1.0]])
        rewards = ppo.token_rewards(torch.zeros(1), *likelier_than_reference, mask, kl_coef=0.1)
        self.assertTrue(torch.allclose(rewards, torch.tensor([[-0.2, 0.0]])))
        p, q = torch.randn(2, 5000, generator=rng(0)).log_softmax(1)
        self.assertTrue((ppo.k3(p, q) >= 0).all())
        exact = (p.exp() * (p - q)).sum()
        self.assertAlmostEqual((p.exp() * ppo.k3(p, q)).sum().item(), exact.item(), places=4)
        swapped = (p.exp() * ppo.k3(q, p)).sum()  # the mistake
        self.assertGreater(abs(swapped - exact), 0.01)

    def test_bug_05_padding_leaks_into_returns(self):
        # natolambert/rlhf-book#216
        values, rewards = torch.randn(2, 3, 6, generator=rng(0))
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
        poison = torch.where(mask, 0.0, 1e6)
        clean = ppo.gae(rewards * mask, values * mask, mask, 1.0, 0.95)
        self.assertTrue(torch.equal(ppo.gae(rewards * mask, values + poison, mask, 1.0, 0.95) * mask, clean))
        white = ppo.whiten(clean, mask)
        self.assertTrue(torch.allclose(ppo.whiten(clean + poison, mask), white))
        self.assertAlmostEqual(white[mask].mean().item(), 0, places=5)
        self.assertAlmostEqual(white[mask].std(unbiased=False).item(), 1, places=4)
        leaky = (clean - clean.mean()) / clean.std()  # the mistake
        self.assertGreater((leaky - white)[mask].abs().max(), 0.1)
        logprobs = torch.randn(3, 6, generator=rng(1))
        for loss in (lambda x: ppo.policy_loss(x, x.detach() * 0.9, white, mask, 0.2)[0],
                     lambda x: ppo.value_loss(x, x.detach() * 0.9, clean, mask, 0.2)):
            self.assertTrue(torch.allclose(loss(logprobs), loss(torch.where(mask, logprobs, 7.0))))

    def test_bug_06_the_score_lands_on_the_first_pad(self):
        # huggingface/trl#3750, microsoft/DeepSpeedExamples#672
        end = Tokenizer("tiny").end
        batch = ppo.as_batch([[5, 6], [7]], [[8, end], [9, 10, 11, end]], end, torch.device("cpu"))
        mask = batch["targets"] >= 0
        zeros = torch.zeros(mask.shape)
        rewards = ppo.token_rewards(torch.tensor([1.0, 2.0]), zeros, zeros, mask, 0.1)
        self.assertEqual(batch["targets"][rewards != 0].tolist(), [end, end])
        wrong = torch.zeros(mask.shape)
        wrong[torch.arange(2), batch["lengths"] - 1] = 1.0  # the mistake: it indexes tokens, not predictions
        self.assertNotEqual(batch["targets"][wrong != 0].tolist(), [end, end])

    def test_bug_07_the_reward_model_reads_prompt_and_padding(self):
        # Colossal-AI until 7b9b86441; ColossalAI#4475
        net, rows = tiny(Scorer), [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
        scores = reward.score(net, rows, torch.device("cpu"))
        alone = torch.cat([reward.score(net, [row], torch.device("cpu")) for row in rows])
        self.assertTrue(torch.allclose(scores, alone, atol=1e-5))
        values = net.values(pad(rows))
        self.assertTrue(torch.allclose(scores, torch.stack([values[0, 2], values[1, 5]]), atol=1e-5))
        self.assertGreater((values.mean(1) - scores).abs().max(), 0.01)  # the mistake

    def test_bug_08_the_prompt_mask_is_lost_on_the_way_to_the_loss(self):
        # karpathy/nanochat#570
        tokenizer, net = Tokenizer("tiny"), tiny()
        row = {"messages": [user("What is 2 plus 3?"), assistant("5."),
                            user("And 1 plus 1?"), assistant("2.")]}
        [(idx, targets)] = m.encode_demonstration(row, tokenizer, 64)
        loss, n = m.negative_log_likelihood(net, [(idx, targets)], torch.device("cpu"))
        spoken = tokenizer.encode("5.") + [tokenizer.end] + tokenizer.encode("2.") + [tokenizer.end]
        self.assertEqual([t for t in targets if t >= 0], spoken)
        self.assertEqual(n, len(spoken))
        every = F.cross_entropy(net.logits(net(torch.tensor([idx])))[0],
                                torch.tensor([*idx[1:], tokenizer.end]), reduction="none")
        self.assertAlmostEqual(loss.item(), every[torch.tensor(targets) >= 0].sum().item(), places=3)
        self.assertGreater(every.sum().item() - loss.item(), 1)  # the mistake: all tokens count

    def test_bug_09_an_all_masked_batch_gives_nan(self):
        # karpathy/nanochat#590; Colossal-AI's labels[-0:], fixed in c5239840e
        x, nothing = torch.ones(4), torch.zeros(4, dtype=torch.bool)
        self.assertEqual(m.masked_mean(x, nothing).item(), 0)
        self.assertTrue(((x * nothing).sum() / nothing.sum()).isnan())  # the mistake
        net = tiny()
        loss, n = m.negative_log_likelihood(net, [([5, 6], [-1, -1])], torch.device("cpu"))
        loss.backward()
        self.assertEqual((loss.item(), n), (0, 0))
        self.assertTrue(all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None))

    def test_bug_10_pad_equals_end_so_the_model_never_learns_to_stop(self):
        # huggingface/trl#1623
        tokenizer = Tokenizer("tiny")
        [(_, targets)] = m.encode_demonstration(
            {"messages": [user("Hi"), assistant("Hello.")]}, tokenizer, 64)
        self.assertEqual(targets[-1], tokenizer.end)
        self.assertNotIn(tokenizer.end, [-1 if t == tokenizer.end else t for t in targets])  # the mistake
        batch = ppo.as_batch([[5]], [[6, tokenizer.end]], tokenizer.end, torch.device("cpu"))
        self.assertTrue(batch["ended"].all())
        self.assertIn(tokenizer.end, batch["targets"][batch["targets"] >= 0].tolist())

    def test_bug_11_exact_gelu_on_weights_trained_with_tanh(self):
        # karpathy/nanoGPT#2, #274
        mlp, x = tiny().h[0].mlp, 2 * torch.randn(3, 32, generator=rng(0))
        h = mlp.c_fc(x)
        by_hand = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        self.assertLess((mlp(x) - mlp.c_proj(by_hand)).abs().max(), 1e-5)
        self.assertGreater((mlp(x) - mlp.c_proj(F.gelu(h))).abs().max(), 1e-5)  # the mistake

    def test_bug_12_the_cache_changes_the_output_or_is_silently_lost(self):
        # karpathy/nanoGPT#613; Colossal-AI 02-15 to 04-26 2023
        net, prompts = tiny(), [[5, 6, 7], [8, 9, 10, 11, 12]]
        widths, forward = [], GPT.forward
        with mock.patch.object(GPT, "forward", lambda s, idx, cache=None: (widths.append(idx.size(1)),
                                                                           forward(s, idx, cache))[1]):
            replies = generate(net, prompts, 12, end=-1, temperature=0)
        self.assertEqual(widths, [8] + [1] * 11)  # a lost cache would feed ever longer rows
        for prompt, reply in zip(prompts, replies):
            ids = list(prompt)
            for token in reply:
                self.assertEqual(net.logits(net(torch.tensor([ids])))[0, -1].argmax().item(), token)
                ids.append(token)
        one = torch.tensor([[replies[0][0]]])
        shifted = net(one)[0, -1]  # the mistake: the new token without its past
        self.assertGreater((shifted - net(torch.tensor([[5, 6, 7, replies[0][0]]]))[0, -1]).abs().max(), 0.1)

    def test_bug_13_gradients_clipped_before_backward_and_equal_betas(self):
        # minChatGPT
        def train(grad_clip, betas=(0.9, 0.95), steps=4):
            w = torch.nn.Parameter(torch.ones(2, 2))
            adam = OffloadedAdamW([w], 0.1, betas)
            for i in range(steps):
                (w.sum() * (100.0 if i == 0 else 1.0)).backward()
                norm = adam.step(0.1, grad_clip)
            return w.detach(), norm, adam
        clipped, norm, adam = train(0.5)
        self.assertEqual(adam.betas, (0.9, 0.95))
        self.assertAlmostEqual(norm, 2.0, places=5)  # the norm of the last step's gradient, before clipping
        # the mistake: clipping what is not there yet
        self.assertGreater((clipped - train(0)[0]).abs().max(), 1e-3)
        self.assertGreater((train(0)[0] - train(0, betas=(0.9, 0.9))[0]).abs().max(), 1e-3)  # the mistake

    def test_bug_14_offloaded_adamw_with_another_epsilon_or_moments_that_move(self):
        # GRPO-Zero; pytorch#3658
        def run(optimizer_of, eps=1e-3):
            w = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
            step = optimizer_of([w], eps)
            for i in range(5):
                (w ** 2).sum().mul(1e-3 * (i + 1)).backward()
                step()
                w.grad = None
            return w.detach()
        def ours(params, eps):
            adam = OffloadedAdamW(params, 0.01, eps=eps, weight_decay=0.1)
            return lambda: adam.step(0.01)
        def torchs(params, eps):
            return torch.optim.AdamW(params, 0.01, eps=eps, weight_decay=0.1).step
        def inside_the_root(params, eps):  # the mistake: sqrt(v + eps) is sqrt(eps) larger than eps at v = 0
            return torch.optim.AdamW(params, 0.01, eps=math.sqrt(eps), weight_decay=0.1).step
        self.assertLess((run(ours) - run(torchs)).abs().max(), 1e-6)
        self.assertGreater((run(ours) - run(inside_the_root)).abs().max(), 1e-4)

        w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        adam, plain = OffloadedAdamW([w], 0.1), torch.optim.AdamW([w], 0.1)
        (w * 1.234).sum().backward()
        adam.step(0.1)
        moment, place = adam.exp_avgs[0].clone(), adam.exp_avgs[0].data_ptr()
        saved = {name: [t.clone() for t in tensors] for name, tensors in adam.state_dict().items()}
        adam.load_state_dict(saved)
        self.assertEqual((adam.exp_avgs[0].dtype, adam.exp_avgs[0].data_ptr()), (torch.float32, place))
        self.assertTrue(torch.equal(adam.exp_avgs[0], moment))
        plain.load_state_dict(plain.state_dict() | {"state": {0: {
            "step": torch.ones(()), "exp_avg": moment, "exp_avg_sq": moment}}})
        # the mistake: moments follow the weights
        self.assertEqual(plain.state[w]["exp_avg"].dtype, torch.bfloat16)

    def test_bug_15_stage_3_never_loads_stage_2s_model(self):
        # ColossalAI#3011
        m.save_model(self.root / "sft", tiny(seed=1))
        m.save_model(self.root / "reward", tiny(Scorer, seed=2))
        cfg = ppo.Config(init=str(self.root / "sft"), reward=str(self.root / "reward"), block_size=64)
        (actor, reference, critic, judge), _ = ppo.load_models(cfg, torch.device("cpu"), torch.float32)
        idx = random_ids(2, 9)
        want = tiny(Scorer, seed=2).values(idx)
        self.assertTrue(torch.equal(judge.values(idx), want) and torch.equal(critic.values(idx), want))
        self.assertTrue(torch.equal(actor(idx), reference(idx))
                        and torch.equal(actor(idx), tiny(seed=1)(idx)))
        # the mistake: a fresh one
        self.assertGreater((tiny(Scorer, seed=3).values(idx) - want).abs().max(), 0.1)
        self.assertNotEqual(actor.wte.weight.data_ptr(), reference.wte.weight.data_ptr())
        cfg.reward = str(self.root / "nothing")
        self.refuses("no checkpoint here",
                     call=lambda: ppo.load_models(cfg, torch.device("cpu"), torch.float32))

    def test_bug_16_ptx_from_different_batches(self):
        # Colossal-AI until 62f4e2eb0
        cfg, models, batch = a_rollout()
        cfg.ptx_coef, tokenizer = 0.5, Tokenizer("tiny")
        rows = [{"messages": [user("Hello"), assistant(f"{i} and {i * i}")]} for i in range(1, 20)]
        demonstrations = [e for row in rows for e in m.encode_demonstration(row, tokenizer, 64)]
        seen, plain = [], m.negative_log_likelihood
        adams = [OffloadedAdamW(net.parameters(), 1e-3) for net in (models[0], models[2])]
        with mock.patch.object(ppo, "negative_log_likelihood", lambda net, rows, device: (
                seen.extend(rows), plain(net, rows, device))[1]):
            stats, _ = ppo.update(0, batch, models, adams, 1e-3, demonstrations, cfg)
        self.assertGreater(stats["ptx_loss"], 0)
        # micro-batches change no sum
        small_, models, batch = dataclasses.replace(cfg, microbatch=2), *a_rollout()[1:]
        adams = [OffloadedAdamW(net.parameters(), 1e-3) for net in (models[0], models[2])]
        again, _ = ppo.update(0, batch, models, adams, 1e-3, demonstrations, small_)
        self.assertAlmostEqual(again["ptx_loss"], stats["ptx_loss"], 4)
        follows = lambda idx, targets: all(t == i for i, t in zip(idx[1:], targets) if t >= 0)
        self.assertTrue(seen and all(len(i) == len(t) and follows(i, t) for i, t in seen))
        # the mistake
        self.assertFalse(all(follows(i, t) for (i, _), (_, t) in zip(demonstrations, demonstrations[1:])))

    def test_bug_17_lora_that_reaches_only_the_head(self):
        # Colossal-AI on GPT-2: it looked for nn.Linear, the weights are Conv1D
        cfg = sft.Config(lora_rank=3)
        net = m.place(tiny(), cfg, torch.device("cpu"))
        learns = {name for name, p in net.named_parameters() if p.requires_grad}
        matrices = {name for name, p in net.named_parameters()
                    if p.dim() == 2 and name.startswith("h.") and "lora" not in name}
        self.assertEqual(len(matrices), 2 * 4)  # c_attn, c_proj, c_fc, c_proj in each of two blocks
        self.assertEqual(
            learns, {name.replace("weight", which) for name in matrices for which in ("lora_a", "lora_b")})
        shapes = {name: (p.size(1), p.size(0)) for name, p in net.named_parameters() if name in matrices}
        self.assertEqual(sum(p.numel() for p in net.parameters() if p.requires_grad),
                         sum(3 * sum(s) for s in shapes.values()))
        optimizer = m.adamw(net, cfg)
        before = net(random_ids(1, 8))
        for _ in range(2):  # at the first step B is 0, so A's gradient is, too
            m.negative_log_likelihood(net, [([5, 6, 7], [6, 7, 8])], torch.device("cpu"))[0].backward()
            optimizer.step(0.1)
        self.assertTrue(all((p != 0).any() for name, p in net.named_parameters() if "lora_b" in name))
        self.assertFalse(torch.equal(net(random_ids(1, 8)), before))
        head = torch.nn.ModuleDict({"h": net.h, "score": torch.nn.Linear(32, 1)})
        found = [name for name, x in head.named_modules() if type(x) is torch.nn.Linear]
        self.assertEqual(found, ["score"])  # the mistake: the trunk's matrices are of another type

    def test_bug_18_double_softmax_in_the_reward_loss(self):
        # nanoChatGPT
        margin = torch.tensor([2.0, -1.0])
        loss = torch.stack([reward.bradley_terry(x, torch.zeros(1))[0] for x in margin.view(2, 1)])
        self.assertTrue(torch.allclose(loss, torch.log1p((-margin).exp())))
        twice = -torch.stack([margin, 0 * margin], 1).softmax(1).log_softmax(1)[:, 0]  # the mistake
        self.assertGreater((twice - loss).abs().max(), 0.1)
        net, pairs = tiny(Scorer), [([5, 6], [7, 8, 9])]
        by_hand = (reward.score(net, [[5, 6]], torch.device("cpu"))
                   - reward.score(net, [[7, 8, 9]], torch.device("cpu")))
        self.assertTrue(torch.allclose(reward.margins(net, pairs, torch.device("cpu")), by_hand, atol=1e-5))

    def test_bug_19_a_square_weight_that_nobody_transposed(self):
        net, idx = tiny(), random_ids(2, 7)
        m.save_model(self.root, net)
        stored = m.read_safetensors(self.root / "model.safetensors")
        square = "transformer.h.0.attn.c_proj.weight"
        self.assertTrue(torch.equal(stored[square], net.h[0].attn.c_proj.weight.T))  # the hub keeps (in, out)
        # the causal mask that old files carry goes, c_attn.bias stays
        stored = {k: v.clone() for k, v in stored.items()} | {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
        m.write_safetensors(self.root / "model.safetensors", stored)
        loaded = m.load_model(self.root)
        self.assertTrue(torch.equal(loaded(idx), net(idx)))
        # the mistake would swallow it
        self.assertTrue("transformer.h.0.attn.c_attn.bias".endswith("attn.bias"))
        stored[square] = stored[square].T.contiguous()  # the mistake
        m.write_safetensors(self.root / "model.safetensors", stored)
        self.assertGreater((m.load_model(self.root)(idx) - net(idx)).abs().max(), 0.01)

    def test_bug_20_logged_loss_is_the_last_micro_batch_only(self):
        # karpathy/nanoGPT#207
        write_data(self.root / "data")
        logged = []
        for microbatch in (0, 2):
            cfg = small(sft, self.root, microbatch=microbatch, steps=3,
                        out=str(self.root / f"out{microbatch}"))
            quiet(sft.main, cfg)
            lines = (Path(cfg.out) / "log.jsonl").read_text().splitlines()
            logged.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        for whole, pieces in zip(*logged):
            self.assertAlmostEqual(whole, pieces, places=4)
        net, examples = tiny(), [([5, 6], [6, 7]), ([8], [9])]
        parts = [m.negative_log_likelihood(net, [e], torch.device("cpu"))[0].item() for e in examples]
        self.assertNotAlmostEqual(parts[-1], sum(parts), places=3)  # the mistake


# --- the network --------------------------------------------------------------------------------------------

class Network(InFolder):
    def test_long_rows_attend_as_the_formula_says(self):
        q, k, v = torch.randn(3, 1, 2, 520, 8, generator=rng(0))
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(520, 520).triu(1).bool(), -math.inf)
        self.assertLess((m.attend(q, k, v) - scores.softmax(-1) @ v).abs().max(), 1e-5)
        self.assertLess((m.attend(q[:, :, :9], k[:, :, :9], v[:, :, :9])
                         - (scores.softmax(-1) @ v)[:, :, :9]).abs().max(), 1e-5)

    def test_no_position_sees_the_future(self):
        net, idx = tiny(), random_ids(1, 12)
        changed = idx.clone()
        changed[0, 8:] = 3
        self.assertTrue(torch.equal(net(idx)[0, :8], net(changed)[0, :8]))
        self.assertFalse(torch.equal(net(idx)[0, 8:], net(changed)[0, 8:]))

    def test_right_padding_changes_nothing(self):
        net, row = tiny(), random_ids(1, 9)
        padded = F.pad(row, (0, 20), value=77)
        self.assertLess((net(padded)[:, :9] - net(row)).abs().max(), 1e-5)

    def test_the_first_loss_is_near_ln_v(self):
        net, idx = tiny(n_embd=64, spread=0), random_ids(4, 33)
        loss, n = m.negative_log_likelihood(net, [(r[:-1], r[1:]) for r in idx.tolist()], torch.device("cpu"))
        # the logits of a fresh network are random with a spread of 1/2, which costs (1/2)^2 / 2 nats
        self.assertAlmostEqual(loss.item() / n, math.log(net.cfg.vocab_size) + 1 / 8, delta=0.06)

    def test_an_untrained_reward_model_has_loss_ln_2_and_scores_of_spread_one(self):
        net = tiny(Scorer, n_embd=128, spread=0)
        scores = reward.score(net, random_ids(400, 12).tolist(), torch.device("cpu"))
        self.assertTrue(0.5 < scores.std() < 1.5)
        self.assertAlmostEqual(-F.logsigmoid(torch.zeros(1)).item(), math.log(2), places=6)

    def test_generation_ends_per_row_and_when_all_have_ended(self):
        net, prompts = tiny(), [[5, 6, 7], [8], [9, 10]]
        free = generate(net, prompts, 12, end=-1, temperature=0)
        end = free[0][3]
        steps, forward = [], GPT.forward
        with mock.patch.object(GPT, "forward", lambda s, idx, cache=None: (steps.append(len(idx)),
                                                                           forward(s, idx, cache))[1]):
            stopped = generate(net, prompts, 12, end=end, temperature=0)
        for full, short in zip(free, stopped):
            self.assertEqual(short, full[:full.index(end) + 1] if end in full else full)
        self.assertEqual(steps, sorted(steps, reverse=True))  # rows that ended are not computed any more
        cache = m.Cache(net.cfg, torch.tensor([1, 1, 1]), 8, net.wpe.weight)
        cache.kv.copy_(torch.randn(cache.kv.shape))
        want, place = cache.kv[:, :, [0, 2]].clone(), cache.kv.data_ptr()
        cache.keep(torch.tensor([True, False, True]))
        self.assertTrue(torch.equal(cache.kv, want) and cache.kv.data_ptr() == place)  # no second cache
        self.assertLess(sum(steps[1:]), 3 * 11)

    def test_matrices_packed_for_decoding_give_the_same_logits(self):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            net, idx = tiny().to(dtype), random_ids(2, 5)
            plain = net.logits(net(idx))
            with m.packed(net, 2):
                self.assertEqual(net.packed is not None, torch.backends.mkldnn.is_available())
                self.assertLess((net.logits(net(idx)) - plain).abs().max(), tolerance)
            self.assertTrue(torch.equal(net.logits(net(idx)), plain))

    def test_a_bfloat16_model_decodes_what_its_full_forward_says(self):
        net, prompt = tiny().to(torch.bfloat16), [5, 6, 7, 8]
        reply = generate(net, [prompt, prompt[:2]], 10, end=-1, temperature=0)[0]
        logits = net.logits(net(torch.tensor([prompt + reply])))[0, len(prompt) - 1:-1]
        chosen = logits.gather(1, torch.tensor(reply)[:, None])
        # the likeliest, but for rounding
        self.assertLess((logits.max(1, keepdim=True).values - chosen).max(), 0.1)

    def test_only_the_last_position_gives_the_same_score(self):
        net, idx, lengths = tiny(Scorer), random_ids(3, 8), torch.tensor([8, 3, 5])
        values = net.values(idx)
        self.assertLess((net.last(idx, lengths) - values[torch.arange(3), lengths - 1]).abs().max(), 1e-5)

    def test_a_reply_does_not_depend_on_its_neighbours_lengths(self):
        net, prompts = tiny(spread=0.1), [[5, 6], [7, 8, 9], [10]]
        free = generate(net, prompts, 16, end=-1, generator=rng(1))
        end = free[0][2]
        short = generate(net, prompts, 16, end=end, generator=rng(1))
        for full, cut in zip(free, short):
            self.assertEqual(cut, full[:full.index(end) + 1] if end in full else full)

    def test_top_k_and_top_p_keep_exactly_the_most_likely(self):
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(2000, 1)
        u = torch.rand(2000, generator=rng(0))
        self.assertEqual(set(m.sample(logits, u, top_k=2).tolist()), {0, 1})
        # 0.64 does not reach 0.7, 0.88 does
        self.assertEqual(set(m.sample(logits, u, top_p=0.7).tolist()), {0, 1})
        self.assertEqual(set(m.sample(logits, u, top_p=0.5).tolist()), {0})
        self.assertEqual(set(m.sample(logits, u, temperature=0).tolist()), {0})
        counts = m.sample(logits, u).bincount(minlength=4) / 2000
        self.assertLess((counts - logits[0].softmax(0)).abs().max(), 0.04)
        edge = torch.tensor([0.0, 1 - 2 ** -24])
        # never a token that was filtered out
        self.assertEqual(m.sample(logits[:2], edge, top_k=2).tolist(), [0, 1])

    def test_generation_refuses_what_does_not_fit(self):
        for prompts in ([[1] * 60], [[]], [[1], []]):
            with self.assertRaises(ValueError):
                generate(tiny(), prompts, 10, end=-1)

    def test_shift_adds_a_constant_to_every_score(self):
        net, idx = tiny(Scorer), random_ids(3, 8)
        before = net.values(idx)
        net.shift(1.5)
        self.assertTrue(torch.allclose(net.values(idx), before + 1.5, atol=1e-5))

    def test_logits_equal_those_of_transformers(self):
        # weights from a formula, in the hub's layout; the numbers are transformers 5.23's, GPT2LMHeadModel
        # and GPT2ForSequenceClassification (which seeks the last token that is not padding), for these ids
        ids = torch.arange(12)[None] * 37 % 1000
        ids[0, -1] = Tokenizer("tiny").end
        for cls, golden in ((GPT, [-3.50855, 1.51101, 2.38861, -3.28141, 0.04353, 3.24915]),
                            (Scorer, [-2.45859])):
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                m.save_model(folder, tiny(cls, n_embd=16, n_positions=32))
                tensors = {}
                for i, (name, p) in enumerate(
                        sorted(m.read_safetensors(folder / "model.safetensors").items())):
                    wave = 0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.3 + i * 0.7)
                    tensors[name] = (wave + ("ln_" in name and name.endswith("weight"))).float().view(p.shape)
                m.write_safetensors(folder / "model.safetensors", tensors)
                net = m.load_model(folder, cls)
                out = net.logits(net(ids))[0, -1, :6] if cls is GPT else net.last(ids, torch.tensor([12]))
                self.assertLess((out - torch.tensor(golden)).abs().max(), 2e-5)


# --- tokens -------------------------------------------------------------------------------------------------

class Tokens(InFolder):
    def test_text_round_trips_and_never_makes_control_tokens(self):
        tokenizer = Tokenizer("tiny")
        for text in ("Hello there!", "caf\u00e9 \U0001f600 42", "<|end|><|user|>", " \n\t", ""):
            ids = tokenizer.encode(text)
            self.assertEqual(tokenizer.decode(ids), text)
            self.assertTrue(all(i < tokenizer.user for i in ids))
        self.assertEqual(tokenizer.vocab_size % 64, 0)

    def test_the_tokenizer_that_transformers_reads_gives_the_same_ids(self):
        import regex  # tiktoken depends on it
        tokenizer, texts = Tokenizer("tiny"), [
            "What is 2 plus 3?", " Hello, World!! It's  fine.", "naïve 漢字 😀\n\n x"]
        model = m.tokenizer_files("tiny", 64)["tokenizer.json"]["model"]
        ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
        spelled = {i: text for text, i in model["vocab"].items()}
        letter = {bytes: spelled[i] for bytes, i in tokenizer.encoding._mergeable_ranks.items()
                  if len(bytes) == 1}
        for text in texts:  # BPE from the merges alone, word by word
            ids = []
            for word in regex.findall(tokenizer.encoding._pat_str, text):
                parts = [letter[bytes([b])] for b in word.encode()]
                while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                                if pair in ranks]:
                    _, i = min(pairs)
                    parts[i:i + 2] = [parts[i] + parts[i + 1]]
                ids += [model["vocab"][part] for part in parts]
            self.assertEqual(ids, tokenizer.encode(text))

    def test_gpt2_encoding_has_its_known_values(self):
        tokenizer = gpt2(self)
        self.assertEqual(tokenizer.encode("Hello world"), [15496, 995])
        self.assertEqual(tokenizer.encode("\n\nHuman:"), [198, 198, 20490, 25])
        self.assertEqual((tokenizer.user, tokenizer.end, tokenizer.vocab_size), (50257, 50259, 50304))
        self.assertNotIn(50256, tokenizer.encode("<|endoftext|>"))
        self.assertEqual(tokenizer.decode([15496, 50259, 50300]), "Hello")

    def test_without_a_network_the_message_names_the_files(self):
        with mock.patch.object(m.tiktoken, "get_encoding", side_effect=OSError("no route")):
            self.refuses("TIKTOKEN_CACHE_DIR", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
                         call=lambda: Tokenizer("gpt2"))

    def test_text_becomes_windows_that_lose_no_token(self):
        tokenizer = Tokenizer("tiny")
        text = "To be, or not to be, that is the question. " * 5
        windows = m.encode_demonstration({"text": text}, tokenizer, 16)
        targets = [t for _, ts in windows for t in ts]
        self.assertEqual(targets, [*tokenizer.encode(text), tokenizer.end])
        self.assertTrue(all(len(i) == len(t) <= 16 for i, t in windows))

    def test_long_dialogues_lose_their_beginning(self):
        tokenizer = Tokenizer("tiny")
        [(idx, targets)] = m.encode_demonstration(
            {"messages": [user("a b c " * 90), assistant("Yes.")]}, tokenizer, 32)
        self.assertEqual((len(idx), targets[-1]), (32, tokenizer.end))
        prompt = tokenizer.prompt([user("a b c " * 90)], 20)
        self.assertEqual((len(prompt), prompt[-1]), (20, tokenizer.assistant))

    def test_batches_cover_every_row_and_hold_similar_lengths(self):
        lengths = tuple(torch.randint(5, 100, (1000,), generator=rng(0)).tolist())
        out = m.batches(lengths, 16, seed=0, epoch=0)
        self.assertEqual({i for b in out for i in b}, set(range(1000)))
        self.assertEqual({len(b) for b in out}, {16})
        padded = sum(max(lengths[i] for i in b) * len(b) for b in out)
        self.assertLess(padded / sum(lengths), 1.1)
        self.assertNotEqual(out, m.batches(lengths, 16, seed=0, epoch=1))
        self.assertEqual(m.batch_at(63, lengths, 16, 0), m.batches(lengths, 16, 0, 1)[0])


# --- weights in ---------------------------------------------------------------------------------------------

class Hub(InFolder):
    """A server on this machine that behaves as the hub does on its worse days."""
    def setUp(self):
        super().setUp()
        net = tiny()
        m.save_model(self.root / "files", net)
        self.files, self.net, self.requests = self.root / "files", net, []
        self.misbehave = []  # what to do wrong, request by request
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                test.requests.append((self.path, dict(self.headers)))
                wrong = test.misbehave.pop(0) if test.misbehave else None
                if isinstance(wrong, int):
                    return self.send_error(wrong)
                data = (test.files / Path(self.path).name).read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if self.path.startswith("/openai"):  # as the hub: a redirect that knows size and hash
                    self.send_response(302)
                    self.send_header("Location", f"/store/{Path(self.path).name}")
                    self.send_header("X-Linked-Size", str(len(data) + (wrong == "size")))
                    self.send_header("X-Linked-Etag", f'"{digest if wrong != "hash" else "0" * 64}"')
                    return self.end_headers()
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:start + 60_000] if wrong == "drop" else data[start:])
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        for patch in (mock.patch.dict(os.environ, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                                                   "HF_HOME": str(self.root / "cache"),
                                                   "HF_TOKEN": "secret"}),
                      mock.patch.object(hub.time, "sleep")):
            patch.start()
            self.addCleanup(patch.stop)
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            os.environ.pop(name, None)

    def same(self, net):
        return all(torch.equal(p, q) for p, q in zip(net.parameters(), self.net.parameters()))

    def test_a_name_is_downloaded_once_and_then_found(self):
        self.assertTrue(self.same(m.load_model("gpt2")))
        n = len(self.requests)
        self.assertTrue(self.same(m.load_model("gpt2")))
        self.assertEqual(len(self.requests), n)
        tokens = {path: headers.get("Authorization") for path, headers in self.requests}
        self.assertEqual({v for k, v in tokens.items() if k.startswith("/openai")}, {"Bearer secret"})
        self.assertEqual({v for k, v in tokens.items() if k.startswith("/store")}, {None})  # not sent along

    def test_a_broken_connection_is_gone_on_with(self):
        self.misbehave = [None, "drop", 503, None, "drop"]
        self.assertTrue(self.same(m.load_model("gpt2")))
        ranges = [headers.get("Range") for path, headers in self.requests
                  if path == "/store/model.safetensors"]
        self.assertEqual(ranges[:3], [None, "bytes=60000-", "bytes=120000-"])
        self.assertEqual(list((self.root / "cache").rglob("*.part")), [])

    def test_wrong_sizes_hashes_and_refusals_stop_with_a_remedy_and_no_model(self):
        for wrong, words in ((["size", None] * 5, "ended after"), (["hash", None] * 5, "announced"),
                             ([404], "404"), ([401], "HF_TOKEN"), ([503] * 5, "503")):
            self.misbehave = list(wrong)
            self.refuses(words, "config.json and model.safetensors", call=lambda: m.load_model("gpt2"))
            self.assertEqual(list((self.root / "cache").rglob("model.safetensors")), [])
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            self.refuses("HF_HUB_OFFLINE", call=lambda: m.load_model("gpt2"))

    def test_every_variant_of_a_folder_loads(self):
        tensors = m.read_safetensors(self.files / "model.safetensors")
        variant = self.root / "variant"
        def write(files, extra={}):
            shutil.rmtree(variant, ignore_errors=True)
            variant.mkdir()
            shutil.copy(self.files / "config.json", variant)
            for name, part in files.items():
                m.write_safetensors(variant / name, part)
        bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        causal = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor([-1e4])}
        half = dict(list(bare.items())[:9]), dict(list(bare.items())[9:])
        for files in ({"model.safetensors": bare | causal},
                      {"model.safetensors": tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}},
                      {"a.safetensors": half[0], "b.safetensors": half[1]}):
            write(files)
            if "a.safetensors" in files:
                where = {name: "a.safetensors" if name in half[0] else "b.safetensors" for name in bare}
                (variant / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
            self.assertTrue(self.same(m.load_model(variant)))
        write({})
        torch.save({name: t.clone() for name, t in tensors.items()}, variant / "pytorch_model.bin")
        self.assertTrue(self.same(m.load_model(variant)))
        for dtype in (torch.float16, torch.bfloat16):
            write({"model.safetensors": {name: t.to(dtype) for name, t in tensors.items()}})
            self.assertLess((m.load_model(variant).wpe.weight - self.net.wpe.weight).abs().max(), 0.02)

    def test_what_is_no_gpt2_is_refused_by_name_and_no_code_runs(self):
        tensors, config = (m.read_safetensors(self.files / "model.safetensors"),
                           json.loads((self.files / "config.json").read_text()))
        variant = self.root / "variant"
        variant.mkdir()
        def refused(*words, config=config, tensors=tensors):
            (variant / "config.json").write_text(json.dumps(config))
            m.write_safetensors(variant / "model.safetensors", tensors)
            self.refuses(*words, call=lambda: m.load_model(variant))
        refused("llama", config=config | {"model_type": "llama"})
        refused("relu", config=config | {"activation_function": "relu"})
        refused("sizes", config=config | {"n_embd": 10**9})
        refused("more than model.safetensors holds", config=config | {"n_layer": 5000})
        refused("wte.weight", "tied", tensors=tensors | {"lm_head.weight": torch.zeros(1024, 32)})
        refused("ln_f.bias", tensors={name: t for name, t in tensors.items() if "ln_f.bias" not in name})
        refused("extra", tensors=tensors | {"extra": torch.zeros(1)})
        (variant / "config.json").write_text("[1]")
        self.refuses("config.json", call=lambda: m.load_model(variant))
        (variant / "config.json").write_text(json.dumps(config))
        (variant / "model.safetensors").unlink()
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(variant / "ran"),)
        torch.save({"wte.weight": torch.zeros(10**5), "x": Evil()}, variant / "pytorch_model.bin")
        self.refuses("pytorch_model.bin", call=lambda: m.load_model(variant))
        self.assertFalse((variant / "ran").exists())


# --- memory -------------------------------------------------------------------------------------------------

class Memory(unittest.TestCase):
    def test_checkpointed_gradients_equal_plain_gradients(self):
        idx, grads = random_ids(3, 10), []
        for on in (False, True):
            net = tiny(checkpoint=on)
            net(idx).square().sum().backward()
            grads.append({name: p.grad for name, p in net.named_parameters()})
        self.assertTrue(all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0]))

    def test_checkpoint_of_several_outputs_nested_and_with_frozen_inputs(self):
        w = torch.nn.Parameter(torch.randn(4, 4, generator=rng(0)))
        x = torch.randn(2, 4, generator=rng(1))  # needs no gradient, w does
        inner = lambda x: (x @ w).tanh()
        def f(x, scale):
            return inner(x) * scale, inner(inner(x))
        def nested(x, scale):
            return checkpoint(inner, x) * scale, checkpoint(inner, checkpoint(inner, x))
        grads = []
        for call in (lambda: f(x, 3), lambda: checkpoint(f, x, 3), lambda: checkpoint(nested, x, 3)):
            a, b = call()
            w.grad = None
            (a.sum() + (b * b).sum()).backward()
            grads.append(w.grad)
        self.assertTrue(torch.equal(grads[0], grads[1]))
        self.assertTrue(torch.equal(grads[0], grads[2]))

    def test_offloaded_adamw_follows_torch_adamw(self):
        for dtype in (torch.float32, torch.bfloat16):
            ours, plain = (torch.nn.Linear(8, 4) for _ in range(2))
            ours.load_state_dict(plain.state_dict())
            ours.to(dtype)
            plain.load_state_dict({k: v.to(dtype).float() for k, v in plain.state_dict().items()})
            adam = OffloadedAdamW(ours.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1)
            reference = torch.optim.AdamW([{"params": [plain.weight], "weight_decay": 0.1},
                                           {"params": [plain.bias], "weight_decay": 0.0}], 1e-2, (0.9, 0.95),
                                          fused=True)
            for step in range(20):
                for micro in range(2):
                    g = torch.randn(4, 8, generator=rng(step, micro)).to(dtype)
                    (ours.weight * g).sum().backward()
                    (ours.bias * g.sum(1)).sum().backward()
                    plain.weight.grad = (g.float() if plain.weight.grad is None
                                         else plain.weight.grad + g.float())
                    b = g.sum(1).float()
                    plain.bias.grad = b if plain.bias.grad is None else plain.bias.grad + b
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                self.assertAlmostEqual(adam.step(1e-2, 0.5), norm.item(), places=4)
                self.assertIsNone(ours.weight.grad)
                reference.step()
                reference.zero_grad()
            self.assertTrue(torch.equal(adam.masters[0], plain.weight))
            self.assertTrue(torch.equal(ours.weight, adam.masters[0].to(dtype)))

    def test_gradients_by_the_row_and_by_the_piece_equal_gradients_of_the_whole(self):
        idx, targets = random_ids(2, 9), random_ids(2, 9, seed=1)
        targets[0, :4] = -1
        grads = []
        for by_rows in (False, True):
            net = tiny()
            if by_rows:
                adam = OffloadedAdamW(net.parameters(), 1e-3)
            logprobs, _ = token_logprobs(net(idx), net.wte.weight, targets, chunk=100)
            (logprobs.sum() / 7).backward()
            grads.append(adam.masters[0].grad if by_rows else net.wte.weight.grad)
        self.assertLess((grads[0] - grads[1]).abs().max(), 1e-5)
        self.assertGreater(grads[0].abs().max(), 0.1)
        self.assertTrue(torch.equal(memory.lookup(net.wte.weight, idx), F.embedding(idx, net.wte.weight)))

    def test_streaming_changes_no_number(self):
        examples = [(random_ids(9, seed=i).tolist(), random_ids(9, seed=i + 1).tolist()) for i in range(4)]
        for rank in (0, 2):
            results = []
            for offload in ("none", "all"):
                cfg = sft.Config(offload=offload, lora_rank=rank)
                net = m.place(tiny(), cfg, torch.device("cpu"))
                adam = m.adamw(net, cfg)
                for step in range(3):
                    m.negative_log_likelihood(net, examples, torch.device("cpu"))[0].backward()
                    adam.step(1e-2, 1.0)
                self.assertEqual(net.visits is not None, offload == "all")
                replies = generate(net, [[5, 6, 7], [8, 9]], 6, -1, generator=rng(0))
                results.append((net.state_dict(), net(random_ids(2, 8)), replies))
            (plain, out, said), (streamed, out2, said2) = results
            self.assertTrue(all(torch.equal(plain[name], streamed[name]) for name in plain))
            self.assertTrue(torch.equal(out, out2))
            self.assertEqual(said, said2)

    def test_lora_changes_nothing_at_first_and_merges_into_the_same_function(self):
        net, idx = tiny(Scorer), random_ids(2, 9)
        before = net.values(idx)
        cfg = reward.Config(lora_rank=4)
        m.place(net, cfg, torch.device("cpu"))
        self.assertTrue(torch.equal(net.values(idx), before))
        self.assertTrue(net.score.weight.requires_grad)  # a fresh head has to learn
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "lora_b" in name:
                    p.normal_(generator=rng(0, name))
        self.assertGreater((net.values(idx) - before).abs().max(), 0.1)
        plain = tiny(Scorer, seed=5)
        plain.load_state_dict(m.merged(net))  # strict: no adapters are left in it
        self.assertLess((plain.values(idx) - net.values(idx)).abs().max(), 1e-4)
        with tempfile.TemporaryDirectory() as folder:
            m.save_model(Path(folder), net)
            self.assertLess((m.load_model(folder, Scorer).values(idx) - net.values(idx)).abs().max(), 1e-4)

    def test_token_logprobs_equal_full_logits_whatever_the_chunk(self):
        hidden, weight = torch.randn(3, 7, 16, generator=rng(0)), torch.randn(50, 16, generator=rng(1))
        targets = torch.randint(-1, 50, (3, 7), generator=rng(2))
        scale = torch.randn(3, 7, generator=rng(3))
        def run(logprobs_of):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            logprobs, entropy = logprobs_of(h, w)
            (logprobs * scale).sum().backward()
            return logprobs.detach(), entropy, h.grad, w.grad
        def full(h, w):
            table = (h @ w.T).log_softmax(-1)
            entropy = -(table.exp() * table).sum(-1) * (targets >= 0)
            return (table.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0),
                    entropy.detach())
        for chunk in (1, 4, 5, 1000):
            for ours, theirs in zip(run(lambda h, w: token_logprobs(h, w, targets, chunk, entropy=True)),
                                    run(full)):
                self.assertLess((ours - theirs).abs().max(), 1e-4)
        nothing = torch.full_like(targets, -1)
        logprobs, h_grad = run(lambda h, w: token_logprobs(h, w, nothing))[::2]
        self.assertEqual((logprobs.abs().sum().item(), h_grad.abs().sum().item()), (0, 0))

class DryRun(InFolder):
    def run_dry(self, stage, **changes):
        cfg = small(stage, self.root, dry_run=True, init="gpt2", block_size=512, batch=1, **changes)
        if stage is ppo:
            cfg = dataclasses.replace(cfg, minibatch=1, max_new_tokens=4)
        return quiet(stage.main, cfg)

    def test_the_arithmetic_of_the_docstring(self):
        weights = 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
        owners = self.run_dry(ppo)[0]["phases"]["update"]["owners"]
        for name, per_weight in (("weights", 4 * 4), ("gradients", 2 * 4), ("optimizer", 2 * 8)):
            self.assertLess(abs(owners[name] / weights / per_weight - 1), 0.001, name)
        result, _ = self.run_dry(sft, dtype="bfloat16", offload="optimizer")
        update = result["phases"]["update"]
        self.assertLess(abs(update["owners"]["weights"] / weights / 2 - 1), 0.001)
        crossing = 2 * 50304 * 768  # the buffer for what crosses the bus: the largest matrix, in bfloat16
        self.assertLess(abs(update["peak_host_bytes"] / (16 * weights + crossing) - 1), 0.02)

    def test_it_needs_no_weights_takes_hub_names_and_keeps_an_earlier_log(self):
        log = self.root / "out/reward/log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text('{"step": 1}\n')
        result, text = self.run_dry(reward, checkpoint=True)
        first, last = map(json.loads, log.read_text().splitlines())
        self.assertEqual((first, last), ({"step": 1}, result))
        self.assertEqual(sorted(p.name for p in self.root.rglob("*") if p.is_file()), ["log.jsonl"])
        self.assertIn("simulated", text)
        self.assertEqual(set(result), {"dry_run", "peak_device_bytes", "peak_host_bytes", "phases"})
        self.assertGreater(result["peak_device_bytes"],
                           sum(result["phases"]["update"]["owners"].values()) - 1)

    def test_the_announced_work_fits_into_a_tenth_of_the_announced_memory(self):
        cfg = ppo.Config(init="gpt2", dry_run=True, offload="all", batch=1, minibatch=1, block_size=512,
                         max_new_tokens=8, dtype="bfloat16", out=str(self.root))
        self.assertLess(quiet(ppo.main, cfg)[0]["peak_device_bytes"], 0.16 * 2**30)


# --- a second device: tensors that compute on the CPU but are not there -------------------------------------

class Elsewhere(torch.Tensor):
    """A tensor of the device "elsewhere". `inner` is where its numbers really are."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        t = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                                storage_offset=inner.storage_offset(), device="elsewhere:0")
        t.inner = inner
        COUNT.see(inner)
        return t

    def tolist(self):
        return self.inner.tolist()

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
        if size and key not in self.alive:
            def gone(_):
                self.total -= self.alive.pop(key)[1]
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
    unwrap = lambda t: t.inner if isinstance(t, Elsewhere) else t
    args_, kwargs_ = tree_map_only(
        torch.Tensor, unwrap, (args, kwargs | ({"device": "cpu"} if device else {})))
    kwargs_.pop("pin_memory", None)
    out = op(*args_, **kwargs_)
    if op._schema.is_mutable:
        return args[0] if op._schema.returns else None
    at_home = device is not None and torch.device(device).type == "cpu"
    return out if at_home else tree_map_only(torch.Tensor, Elsewhere, out)


def flash_elsewhere(q, k, v, attn_mask=None, is_causal=False):
    if attn_mask is not None:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(
            ~attn_mask, -math.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


def make_second_device():
    """-> what has to stay alive for it, or None. Autograd asks for the devices there are
    at its first backward only."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError:
        return None
    register("elsewhere")
    libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries[0].fallback(compute_elsewhere, "PrivateUse1")
    # as it comes, it would resize a tensor from inside
    for name in ("arange", "arange.start", "arange.start_step"):
        overload = getattr(torch.ops.aten.arange, name.partition(".")[2] or "default")
        libraries[1].impl(name, partial(compute_elsewhere, overload), "PrivateUse1")
    return libraries


ELSEWHERE = make_second_device()


@unittest.skipUnless(ELSEWHERE, "this torch cannot make a device in Python")
class SecondDevice(InFolder):
    def setUp(self):
        super().setUp()
        patch = mock.patch.object(F, "scaled_dot_product_attention", flash_elsewhere)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_tensor_on_the_wrong_side_is_refused_and_bytes_are_counted(self):
        x = torch.ones(3, 4, device="elsewhere:0")
        with self.assertRaisesRegex(RuntimeError, "mixes"):
            x + torch.ones(3, 4)
        before = COUNT.total
        y = x @ x.T
        self.assertEqual((y.to("cpu") == 4).all().item(), True)
        self.assertEqual(COUNT.total, before + 9 * 4)
        del y
        self.assertEqual(COUNT.total, before)

    def test_all_stages_run_there_with_every_offload_and_agree_with_the_cpu(self):
        write_data(self.root / "data")
        losses = {}
        for device, changes in (("cpu", {}), ("elsewhere:0", {}), ("elsewhere:0", {"offload": "optimizer"}),
                                ("elsewhere:0", {"offload": "all"}),
                                ("elsewhere:0", {"offload": "all", "lora_rank": 2})):
            for stage in (sft, reward, ppo):
                cfg = small(stage, self.root, device=device, steps=2, save_every=10, eval_every=10, **changes)
                quiet(stage.main, cfg)
                rows = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
                losses.setdefault((stage.__name__, "lora_rank" in changes), []).append(
                    [row.get("loss", row.get("value_loss")) for row in rows[:2]])
        for (stage, _), (first, *others) in losses.items():
            for other in others:
                self.assertTrue(torch.allclose(torch.tensor(first), torch.tensor(other), rtol=1e-3),
                                (stage, first, other))

    def test_the_dry_run_agrees_with_the_bytes_counted_there(self):
        write_data(self.root / "data")
        shape = dict(n_layer=3, n_embd=64, block_size=64, batch=4, init="scratch")
        for stage in (sft, reward, ppo):
            for changes in ({}, {"checkpoint": True, "microbatch": 2}, {"offload": "optimizer"},
                            {"offload": "all"}, {"lora_rank": 2},
                            {"offload": "all", "lora_rank": 2, "microbatch": 1}):
                cfg = small(stage, self.root, **shape | changes)
                dry, text = quiet(stage.main, dataclasses.replace(cfg, dry_run=True))
                global COUNT
                COUNT = Count()
                memory.METERS.append(COUNT)
                never = lambda net, prompts, n, end, *rest, **more: generate(
                    net, prompts, n, -1, *rest, **more)
                judge = lambda folder, cls, dtype: Scorer(GPTConfig(1024, 64, 3, 4, 64, "tiny"))
                with mock.patch.object(ppo, "generate", never), mock.patch.object(ppo, "load_model", judge):
                    stage.iteration(cfg, torch.device("elsewhere:0"), torch.float32)
                memory.METERS.remove(COUNT)
                for name, peak in dry["phases"].items():
                    counted = COUNT.peaks[name]
                    self.assertLess(abs(peak["peak_device_bytes"] / counted - 1), 0.02,
                                    (stage.__name__, changes, name, peak["peak_device_bytes"], counted))
                self.assertIn("update", text)


# --- PPO's mathematics --------------------------------------------------------------------------------------

class Mathematics(InFolder):
    def test_gae_on_three_tokens_worked_by_hand(self):
        # gamma 1, lambda 0.5; deltas: 0 + 2 - 1 = 1, 0 + 3 - 2 = 1, 5 + 0 - 3 = 2
        # advantages from the end: 2, 1 + 0.5 * 2 = 2, 1 + 0.5 * 2 = 2
        rewards, values = torch.tensor([[0.0, 0.0, 5.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0, 9.0]])
        mask = torch.tensor([[True, True, True, False]])
        self.assertEqual(ppo.gae(rewards, values, mask, 1.0, 0.5).tolist(), [[2, 2, 2, 0]])

    def test_gae_equals_its_definition_by_brute_force(self):
        rewards, values = torch.randn(2, 4, 9, generator=rng(0))
        starts, ends = [0, 2, 5, 8], [9, 6, 7, 9]
        mask = torch.tensor([[s <= t < e for t in range(9)] for s, e in zip(starts, ends)])
        got = ppo.gae(rewards, values, mask, 0.9, 0.8)
        for b, (s, e) in enumerate(zip(starts, ends)):
            delta = [rewards[b, t] + (0.9 * values[b, t + 1] if t + 1 < e else 0) - values[b, t]
                     for t in range(s, e)]
            for t in range(s, e):
                want = sum((0.9 * 0.8) ** (k - t) * delta[k - s] for k in range(t, e))
                self.assertAlmostEqual(got[b, t].item(), want.item(), places=5)

    def finite_differences(self, loss, x):
        x = x.double().requires_grad_()
        self.assertTrue(torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-5))

    def test_every_loss_agrees_with_finite_differences(self):
        old, advantages, returns = torch.randn(3, 2, 6, generator=rng(0)).double()
        x = old + 0.3 * torch.randn(2, 6, generator=rng(1)).double()
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
        self.finite_differences(lambda x: ppo.policy_loss(x, old, advantages, mask, 0.2)[0], x)
        self.finite_differences(lambda x: ppo.value_loss(x, old, returns, mask, 0.2), x)
        self.finite_differences(lambda x: -F.logsigmoid(x[0] - x[1]).mean(), x)
        # token_logprobs works in float32: compare slopes along random directions
        h, w = torch.randn(5, 8, generator=rng(2)), torch.randn(20, 8, generator=rng(3))
        targets, d = torch.tensor([3, -1, 0, 19, 7]), torch.randn(5, 8, generator=rng(4))
        h.requires_grad_()
        token_logprobs(h, w, targets)[0].sum().backward()
        f = lambda step: token_logprobs(h.detach() + step * d, w, targets)[0].double().sum()
        self.assertAlmostEqual(((f(1e-2) - f(-1e-2)) / 2e-2).item(), (h.grad * d).sum().item(), places=2)

    def test_the_clipped_objective_stops_pushing_beyond_the_clip(self):
        old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
        logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()[None].requires_grad_()
        advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
        loss, share, _, _ = ppo.policy_loss(logprobs, old, advantages, mask, 0.2)
        loss.backward()
        self.assertEqual((logprobs.grad[0] != 0).tolist(), [False, True, True, False])
        self.assertEqual(share.item(), 2)

    def test_a_reply_that_never_ends_gets_the_penalty_and_scores_are_clipped(self):
        end = Tokenizer("tiny").end
        batch = ppo.as_batch([[5]] * 3, [[6, end], [6, 7], [6, end]], end, torch.device("cpu"))
        judge = mock.Mock()
        judge.last = lambda idx, lengths: torch.tensor([9.0, 3.0, -0.5])
        scores = ppo.scores_of(batch, judge, None, None, ppo.Config(score_clip=5.0, missing_eos_penalty=1.0))
        self.assertEqual(scores.tolist(), [5.0, -1.0, -0.5])

    def test_equal_rewards_give_no_advantage_and_no_nan(self):
        mask = torch.ones(3, 4, dtype=torch.bool)
        white = ppo.whiten(torch.full((3, 4), 2.0), mask)
        self.assertTrue(torch.isfinite(white).all() and white.abs().max() < 1e-3)

    def test_adaptive_kl_moves_towards_its_target(self):
        cfg = ppo.Config(kl_target=6.0, batch=100)
        self.assertAlmostEqual(ppo.adapt(0.1, 60.0, cfg), 0.1 * (1 + 0.2 * 100 / 10_000))
        self.assertLess(ppo.adapt(0.1, 1.0, cfg), 0.1)
        self.assertEqual(ppo.adapt(0.1, 60.0, ppo.Config(kl_target=0.0)), 0.1)

    def test_an_update_ends_early_when_the_policy_has_moved_enough(self):
        cfg, models, batch = a_rollout()
        cfg.epochs = 50
        adams = [OffloadedAdamW(net.parameters(), 1e-2) for net in (models[0], models[2])]
        total, _ = ppo.update(0, batch, models, adams, 1e-2, None, cfg)
        self.assertLess(total["updates"], 100)

    def test_micro_batches_do_not_change_ppos_update(self):
        after = []
        for microbatch in (0, 1):
            cfg, models, batch = a_rollout()
            cfg.microbatch = microbatch
            # eps is large, so that a step is as long as its gradient and does not blow up rounding errors
            adams = [OffloadedAdamW(net.parameters(), 1e-3, eps=1.0) for net in (models[0], models[2])]
            ppo.update(0, batch, models, adams, 1e-3, None, cfg)
            after.append(torch.cat([p.detach().flatten()
                                    for p in (*models[0].parameters(), *models[2].parameters())]))
        self.assertLess((after[0] - after[1]).abs().max(), 1e-7)

    def test_k1_and_policy_start_at_zero_distance(self):
        _, _, batch = a_rollout(temperature=0.7)
        self.assertTrue(torch.equal(batch["logprobs"], batch["ref_logprobs"]))

    def test_centring_sees_only_what_the_pair_has_in_common(self):
        chosen, rejected = torch.randn(2, 6, generator=rng(0)).double()
        loss, common = reward.bradley_terry(chosen, rejected)
        shifted, more = reward.bradley_terry(chosen + 3, rejected + 3)
        self.assertAlmostEqual(loss.item(), shifted.item())
        self.assertGreater(more.item(), common.item())
        self.assertEqual(reward.bradley_terry(chosen, -chosen)[1].item(), 0)
        self.finite_differences(lambda x: reward.bradley_terry(x, rejected)[0], chosen)

    def test_win_rate_counts_ties_as_half(self):
        rate, low, high = ppo.win_rate(torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 1, 1, 0]))
        self.assertEqual(rate, 0.625)
        checks = [{"check": "a+"}, {"check": "b"}]
        self.assertEqual(ppo.gold(checks, ["aa", "c"]), 0.5)
        self.assertIsNone(ppo.gold([*checks, {}], ["aa", "b", "b"]))  # some rows without a check
        self.assertTrue(0 <= low < rate < high <= 1)

    def test_health_signs_are_named(self):
        healthy = dict(ratio_first=1.0, eos_rate=0.9, entropy=1.0, kl=2.0)
        self.assertEqual(list(ppo.complaints(healthy, torch.float32)), [])
        for sick, word in ((dict(ratio_first=1.1), "ratio"), (dict(kl=-2.0), "below 0"),
                           (dict(eos_rate=0.0), "ended"), (dict(entropy=0.0), "entropy"),
                           (dict(kl=99.0), "KL")):
            [complaint] = ppo.complaints(healthy | sick, torch.float32)
            self.assertIn(word, complaint)

    def test_calibration_and_ceiling_of_known_cases(self):
        margin = torch.tensor([3.0, 3.0, 3.0, -3.0])
        [(n, predicted, observed)] = reward.calibration(margin)
        self.assertEqual((n, observed), (4, 0.75))
        self.assertAlmostEqual(predicted, 1 / (1 + math.exp(-3)), places=5)
        rows = [{"agreement": 0.9, "skill": "a"}, {"agreement": 0.2, "skill": "a"},
                {"agreement": 0.7, "skill": "b"}] * 2
        table = reward.accuracy_table(rows, torch.tensor([1.0, 1, -1, 1, 1, 1]))
        self.assertEqual(table["a"], (4, 1.0, 0.5))
        self.assertAlmostEqual(table["all"][1], 5 / 6, places=5)
        self.assertAlmostEqual(table["all"][2], 4 / 6, places=5)
        self.assertIsNone(reward.accuracy_table([{}], torch.ones(1))["all"][2])


# --- data ---------------------------------------------------------------------------------------------------

Q, A, B = [user("Why?")], "Because.", "No idea."
TALK = [*Q, assistant(A)]
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
# one record of each format -> what it must become; a preference is also a demonstration and a prompt
FORMATS = {
    "hh": ({"chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No idea."}, PAIR),
    "trl strings": ({"prompt": "Why?", "chosen": A, "rejected": B}, PAIR),
    "trl messages": ({"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant(B)]}, PAIR),
    "ultrafeedback": ({"prompt": "Why?", "chosen": TALK, "rejected": [*Q, assistant(B)],
                       "score_chosen": 7.5}, PAIR),
    "ranked": ({"instruction": "Why?", "output_1": B, "output_2": A, "preference": 2}, PAIR),
    "alpaca": ({"instruction": "Why?", "input": "", "output": A}, TALK),
    "alpaca input": ({"instruction": "Add.", "input": "1 2", "output": "3"},
                     [user("Add.\n\n1 2"), assistant("3")]),
    "dolly": ({"instruction": "Why?", "context": "", "response": A, "category": "qa"}, TALK),
    "completion": ({"prompt": "Why?", "completion": A}, TALK),
    "response": ({"prompt": "Why?", "response": A}, TALK),
    "question": ({"question": "Why?", "answer": A}, TALK),
    "openai": ({"messages": [{"role": "system", "content": "Be brief."}, *TALK]},
               [user("Be brief.\n\nWhy?"), assistant(A)]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": A}]}, TALK),
    "text": ({"text": "Once upon a time."}, {"text": "Once upon a time."}),
}


class Data(InFolder):
    def convert(self, *records, name="in.jsonl", **flags):
        """-> ({kind: rows, train before held out}, what was printed)."""
        path, out = self.root / name, self.root / "prepared"
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        data = ("\n".join(lines) if ".json" != Path(name.removesuffix(".gz")).suffix
                else json.dumps(records)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        _, text = quiet(prepare.main, [path], out, **flags)
        return {kind: [json.loads(line)
                       for val in ("", ".val") if (out / f"{kind}{val}.jsonl").exists()
                       for line in (out / f"{kind}{val}.jsonl").read_text().splitlines()]
                for kind in prepare.KINDS}, text

    def test_every_format_becomes_our_rows(self):
        for name, (record, want) in FORMATS.items():
            with self.subTest(name):
                rows, _ = self.convert(record)
                if want is PAIR:
                    self.assertEqual(rows, {"sft": [{"messages": TALK}], "preferences": [PAIR],
                                            "prompts": [{"prompt": Q}]})
                elif isinstance(want, dict):
                    self.assertEqual(rows, {"sft": [want], "preferences": [], "prompts": []})
                else:
                    self.assertEqual(rows, {"sft": [{"messages": want}], "preferences": [],
                                            "prompts": [{"prompt": want[:-1]}]})
                self.forget()

    def forget(self):
        shutil.rmtree(self.root / "prepared", ignore_errors=True)

    def test_json_jsonl_and_txt_plain_and_zipped_say_the_same(self):
        record, results = FORMATS["alpaca"][0], []
        for name in ("in.json", "in.jsonl", "in.json.gz", "in.jsonl.gz"):
            results.append(self.convert(record, name=name)[0])
            self.forget()
        self.assertTrue(all(r == results[0] and r["sft"] for r in results))
        text = "".join(f"Line {i} of a long story.\n\n" for i in range(500))
        for name in ("in.txt", "in.txt.gz"):
            rows, _ = self.convert(text, name=name, val_fraction=0.0)
            self.assertEqual("".join(row["text"] for row in rows["sft"]), text)
            self.forget()

    def test_what_cannot_be_used_is_dropped_with_a_reason_and_line(self):
        bad = {"empty reply": {"prompt": "x", "completion": "  "},
               "both replies are equal": {**PAIR, "rejected": A},
               "prompts of chosen and rejected differ": {
                   "chosen": TALK, "rejected": [user("What?"), assistant(B)]},
               "turns do not alternate": {"messages": [user("a"), user("b"), assistant("c")]},
               "no known format": {"foo": 1}, "broken JSON": '{"prompt": ', "not a JSON object": "[1, 2]",
               "no clear preference": {"instruction": "x", "output_1": "a", "output_2": "b", "preference": 0},
               "unknown role": {"messages": [{"role": "oracle", "content": "x"}, assistant("y")]},
               "is not the assistant's": {"messages": [user("a")]},
               "is not text": {"prompt": "x", "completion": 7}}
        for reason, record in bad.items():
            with self.subTest(reason):
                rows, text = self.convert(PAIR, record, FORMATS["alpaca"][0])
                self.assertIn("in.jsonl:2: ", text)
                self.assertIn(reason, text)
                self.assertEqual((len(rows["sft"]), len(rows["preferences"])), (2, 1))
                self.refuses("in.jsonl:2: ", reason, call=lambda: self.convert(PAIR, record, strict=True))

    def test_a_broken_json_file_stops_and_leaves_earlier_output(self):
        before, _ = self.convert(PAIR)
        (self.root / "bad.json").write_text('[{"prompt": "x",\n "completion" "y"}]')
        self.refuses("bad.json:2", "broken JSON",
                     call=lambda: prepare.main([self.root / "bad.json"], self.root / "prepared"))
        self.refuses("no such file", call=lambda: prepare.main([self.root / "none"], self.root / "prepared"))
        self.assertEqual(sorted(p.suffix for p in (self.root / "prepared").iterdir()), [".jsonl"] * 3 * 2)

    def test_the_split_is_stable_and_keeps_a_prompts_rows_together(self):
        pairs = [{"prompt": [user(f"Question {i % 50}?")], "chosen": f"a{i}", "rejected": "b"}
                 for i in range(400)]
        self.convert(*pairs, val_fraction=0.3)
        lines = lambda name: (self.root / "prepared" / f"{name}.jsonl").read_text().splitlines()
        read = lambda name: list(map(json.loads, lines(name)))
        sides = [{row["prompt"][0]["content"] for row in read(name)}
                 for name in ("preferences", "preferences.val")]
        self.assertFalse(sides[0] & sides[1])
        self.assertTrue(5 < len(sides[1]) < 25)
        self.assertEqual({row["prompt"][0]["content"] for row in read("prompts.val")}, sides[1])
        self.assertEqual({row["messages"][0]["content"] for row in read("sft.val")}, sides[1])
        train, val = prepare.load(self.root / "prepared", "preferences")
        self.assertEqual((train, val), (read("preferences"), read("preferences.val")))

    def test_limit_bom_unicode_and_our_own_rows_survive(self):
        rows, _ = self.convert("\ufeff" + json.dumps(PAIR), {"text": "caf\u00e9 \U0001f600"})
        self.assertEqual((rows["preferences"], rows["sft"][-1]["text"]), ([PAIR], "caf\u00e9 \U0001f600"))
        self.forget()
        check = {"prompt": Q, "check": "Because\\.", "skill": "why"}
        self.assertEqual(self.convert(check, val_fraction=0.0)[0]["prompts"], [check])
        self.forget()
        rows, _ = self.convert(*({"text": f"number {i}"} for i in range(100)), limit=10)
        self.assertEqual(len(rows["sft"]), 10)

    def test_rows_of_too_many_tokens_are_dropped_and_counted(self):
        count = lambda row: len(str(row))
        with mock.patch.object(prepare, "token_counter", lambda: count):
            rows, text = self.convert({"text": "short"}, {"text": "long " * 100}, max_tokens=50)
        self.assertEqual([row["text"] for row in rows["sft"]], ["short"])
        self.assertIn("dropped 1: sft of more than 50 tokens", text)
        self.refuses("--max_tokens=-1", call=lambda: self.convert({"text": "x"}, max_tokens=-1))

    def test_max_tokens_counts_all_that_is_said_in_gpt2s_tokens(self):
        gpt2(self)
        count = prepare.token_counter()
        self.assertEqual(count({"text": "one two three"}), 3)
        self.assertEqual(count({"messages": [user("one"), assistant(" two")]}), 2)
        self.assertEqual(count({"prompt": [user("one")], "chosen": " two", "rejected": " three four"}), 4)

    def test_memory_stays_flat_however_many_rows_there_are(self):
        def peak(n):
            path = self.root / "many.jsonl"
            with open(path, "w") as f:
                for i in range(n):
                    print(json.dumps({"prompt": f"Question {i}?", "completion": f"Answer {i}."}), file=f)
            tracemalloc.start()
            quiet(prepare.main, [path], self.root / "many")
            size = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return size
        peak(10)
        self.assertLess(peak(20_000), peak(2_000) + 100_000)

    def test_the_bundled_set_is_what_its_generator_makes(self):
        out = self.root / "tiny"
        out.mkdir()
        quiet(make.main, out)
        for path in sorted(out.iterdir()):
            self.assertEqual(path.read_bytes(), (ROOT / "data/tiny" / path.name).read_bytes(), path.name)

    def test_the_bundled_set_holds_prompts_out_and_its_checks_tell_good_from_bad(self):
        question = lambda row: (row.get("prompt") or row["messages"][:-1])[-1]["content"]
        train, val = zip(*(prepare.load(ROOT / "data/tiny", kind) for kind in prepare.KINDS))
        self.assertFalse({question(row) for rows in train for row in rows}
                         & {question(row) for rows in val for row in rows})
        row = prepare.load(ROOT / "data/tiny", "prompts")[1][0]
        self.assertFalse(m.is_good(row, "I do not care.") or m.is_good(row, ""))
        for pair in prepare.load(ROOT / "data/tiny", "preferences")[1]:
            self.assertTrue(0 <= pair["agreement"] <= 1)


# --- the three stages, end to end ---------------------------------------------------------------------------

class Stages(InFolder):
    def setUp(self):
        super().setUp()
        write_data(self.root / "data")

    def three(self, **changes):
        results = {}
        for stage in (sft, reward, ppo):
            results[stage.__name__], text = quiet(stage.main, small(stage, self.root, **changes))
        return results, text

    def test_the_three_stages_run_and_return_what_the_log_says(self):
        results, _ = self.three()
        self.assertEqual(set(results["sft"]), {"val_loss", "gold"})
        self.assertEqual(set(results["reward"]), {"val_accuracy", "ceiling"})
        self.assertLessEqual({"gold_before", "gold_after", "gold_best_of_n", "win_rate", "win_rate_low",
                              "win_rate_high", "kl", "score"}, set(results["ppo"]))
        for name, result in results.items():
            lines = [json.loads(line)
                     for line in (self.root / "out" / name / "log.jsonl").read_text().splitlines()]
            self.assertTrue(lines[-1].pop("final"))
            self.assertEqual({k: v for k, v in lines[-1].items() if k != "step"}, result)
            self.assertLessEqual({"step", "grad_norm", "lr", "tokens_per_s", "seconds", "memory_gb"},
                                 set(lines[0]))
        first = json.loads((self.root / "out/ppo/log.jsonl").read_text().splitlines()[0])
        self.assertEqual((first["ratio_first"], first["kl"], first["kl_k3"]), (1.0, 0.0, 0.0))

    def test_checkpointing_and_offloading_change_no_weight(self):
        self.three()
        want = {name: (self.root / "out" / name / "model.safetensors").read_bytes()
                for name in ("sft", "reward", "ppo")}
        for changes in ({"checkpoint": True, "offload": "optimizer"}, {"offload": "all"}):
            self.three(**changes)
            for name, data in want.items():
                self.assertEqual((self.root / "out" / name / "model.safetensors").read_bytes(), data, name)

    def test_with_lora_four_models_stand_on_two_trunks_and_the_reference_stays(self):
        self.three()
        cfg = small(ppo, self.root, lora_rank=2)
        (actor, reference, critic, judge), _ = ppo.load_models(cfg, torch.device("cpu"), torch.float32)
        for one, other in ((actor, reference), (critic, judge)):
            places = {p.data_ptr() for p in one.parameters()}
            self.assertEqual(sum(p.data_ptr() in places for p in other.h.parameters()),
                             len(list(other.h.parameters())))
        self.assertNotEqual(critic.score.weight.data_ptr(), judge.score.weight.data_ptr())
        results, _ = self.three(lora_rank=2, steps=4)
        first = json.loads((self.root / "out/ppo/log.jsonl").read_text().splitlines()[0])
        self.assertEqual((first["ratio_first"], first["kl"]), (1.0, 0.0))
        self.assertGreater(abs(results["ppo"]["kl"]), 0)  # the actor moved, the reference did not

    def test_stage_1_replies_average_zero_under_the_saved_reward_model(self):
        self.three()
        cfg = small(reward, self.root)
        net = m.load_model(cfg.out, Scorer)
        mean = reward.mean_score(net, cfg, Tokenizer("tiny"), torch.device("cpu"), torch.float32)
        self.assertAlmostEqual(mean, 0, places=4)

    def test_reward_check_needs_no_reward_model_and_learns(self):
        quiet(sft.main, small(sft, self.root, steps=150, lr=3e-3, warmup=5, batch=16))
        cfg = small(ppo, self.root, reward="check", steps=25, lr=1e-3, batch=32, minibatch=16, kl_coef=0.01)
        result, _ = quiet(ppo.main, cfg)
        self.assertGreater(result["gold_after"], result["gold_before"])

    def test_trace_prints_a_rollout_token_by_token(self):
        self.three()
        one = dict(batch=1, minibatch=1, eval_every=1)  # one sample to show
        _, text = quiet(ppo.main, small(ppo, self.root, trace=True, steps=1, **one))
        self.assertIn("advantage", text)
        self.assertIn("paid on the last token", text)

    def test_ptx_keeps_stage_ones_loss_in_the_log(self):
        self.three()
        quiet(ppo.main, small(ppo, self.root, ptx_coef=0.5, steps=1))
        self.assertIn("ptx_loss", json.loads((self.root / "out/ppo/log.jsonl").read_text().splitlines()[0]))

    def test_the_chat_answers_one_prompt(self):
        quiet(sft.main, small(sft, self.root))
        cfg = m.Config(model=str(self.root / "out/sft"), prompt="Hello" * 100, dtype="float32", device="cpu")
        answer, text = quiet(m.main, cfg)
        self.assertIn(answer, text)

    def test_the_chat_keeps_turns_resets_saves_compares_and_stops_at_ctrl_c(self):
        m.save_model(self.root / "a", tiny())
        m.save_model(self.root / "b", tiny(seed=1))
        m.save_model(self.root / "judge", tiny(Scorer))
        saved = self.root / "chat.json"
        cfg = m.Config(model=str(self.root / "a"), compare=str(self.root / "b"),
                       reward=str(self.root / "judge"), dtype="float32", device="cpu", max_new_tokens=8)
        lines = iter(["Hi", "And?", f"/save {saved}", "/reset", "Bye",
                      f"/save {self.root}/no/where", f"/save {saved}2"])

        def typed(_):
            for line in lines:
                return line
            raise EOFError
        with mock.patch("builtins.input", typed):
            _, text = quiet(m.main, cfg)
        first, after = (json.loads(Path(file).read_text()) for file in (saved, f"{saved}2"))
        self.assertEqual([[turn["role"] for turn in dialogue] for dialogue in first],
                         [["user", "assistant"] * 2] * 2)
        self.assertEqual([[turn["content"] for turn in dialogue][0] for dialogue in after], ["Bye", "Bye"])
        self.assertEqual(text.count("(score "), 6)
        self.assertIn("could not be written", text)

        def interrupted(*args):
            args[-1](0, Tokenizer("tiny").encode(" yes")[0])
            raise KeyboardInterrupt
        with mock.patch.object(m, "generate", interrupted):
            answer, _ = quiet(m.main, dataclasses.replace(cfg, compare="", reward="", prompt="Well?"))
        self.assertEqual(answer, " yes")

    def test_pretraining_on_text_reports_loss_per_character(self):
        (self.root / "book.txt").write_text(
            "\n\n".join(f"The cat number {i} sat on the mat." * 20 for i in range(60)))
        cfg = small(sft, self.root, data=str(self.root / "book.txt"), steps=3)
        result, _ = quiet(sft.main, cfg)
        self.assertTrue(0 < result["val_loss_per_character"] < result["val_loss"])


class Commands(InFolder):
    """Scripts as a user starts them, in processes of their own."""
    def setUp(self):
        super().setUp()
        write_data(self.root / "data")

    def command(self, stage, out, **changes):
        cfg = dataclasses.asdict(small(stage, self.root, **changes)) | {"out": str(self.root / out)}
        return [sys.executable, str(ROOT / f"{stage.__name__}.py"), *(f"--{k}={v}" for k, v in cfg.items())]

    def run_it(self, command, **kwargs):
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **kwargs)

    def wait_for_step(self, process, log, step):
        deadline = time.time() + 60
        while not log.exists() or sum('"lr"' in line for line in log.read_text().splitlines()) < step:
            self.assertTrue(process.poll() is None and time.time() < deadline,
                            "it ended before it could be killed")
            time.sleep(0.01)


class Robustness(Commands):
    def test_killed_and_resumed_weights_are_bit_identical(self):
        for stage in (sft, reward, ppo):
            name = stage.__name__
            quiet(stage.main, small(stage, self.root, steps=40 if stage is sft else 24))
            steps, state = (40 if stage is sft else 24), self.root / "killed" / "state.pt"
            command = self.command(stage, "killed", steps=steps)
            for kill_at in (3, 8):  # once between two checkpoints, and again after a resume
                process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, cwd=ROOT)
                self.wait_for_step(process, self.root / "killed/log.jsonl", kill_at)
                process.send_signal(signal.SIGKILL)
                process.wait()
            self.assertLess(torch.load(state, weights_only=True)["step"], steps)
            done = self.run_it([*command, "--resume"])
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("resuming", done.stdout)
            for file in ("model.safetensors", "config.json"):
                self.assertEqual((self.root / "killed" / file).read_bytes(),
                                 (self.root / "out" / name / file).read_bytes(), (name, file))
            steps_of = lambda log: [row["step"] for row in map(json.loads, log.read_text().splitlines())
                                    if "lr" in row]
            self.assertEqual(steps_of(self.root / "killed/log.jsonl"), list(range(1, steps + 1)))
            (self.root / "killed").rename(self.root / f"killed_{name}")

    def test_ctrl_c_saves_and_says_how_to_go_on(self):
        process = subprocess.Popen(self.command(sft, "stopped", steps=4000), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.wait_for_step(process, self.root / "stopped/log.jsonl", 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.assertIn("--resume", errors)
        self.assertNotIn("Traceback", errors)
        self.assertGreaterEqual(torch.load(self.root / "stopped/state.pt", weights_only=True)["step"], 3)

    def test_a_full_disk_leaves_the_last_good_checkpoint(self):
        quiet(sft.main, small(sft, self.root))
        files = {p: p.read_bytes() for p in (self.root / "out/sft").iterdir() if p.name != "log.jsonl"}
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")
        cfg = small(sft, self.root, resume=True)
        for where in ("torch.save", "model.write_safetensors"):
            with mock.patch(where, side_effect=full):
                run, _ = quiet(m.Run, cfg)
                self.refuses("No space left", "last good checkpoint", call=lambda: run.save(6, tiny()))
        for path, data in files.items():
            if path.name != "state.pt":
                self.assertEqual(path.read_bytes(), data)
        torch.load(self.root / "out/sft/state.pt", weights_only=True)
        self.assertEqual([p.name for p in (self.root / "out/sft").glob("*.tmp")], [])

    def test_a_fresh_run_forgets_the_state_of_an_earlier_one(self):
        quiet(sft.main, small(sft, self.root))
        m.Run(small(sft, self.root, steps=99))
        self.assertFalse((self.root / "out/sft/state.pt").exists())
        self.assertTrue((self.root / "out/sft/model.safetensors").exists())

    def test_resume_with_other_flags_is_refused(self):
        quiet(sft.main, small(sft, self.root))
        self.refuses("--lr=", call=lambda: sft.main(small(sft, self.root, resume=True, lr=1e-5)))

    def test_output_that_is_no_terminal_gets_no_progress_bar(self):
        done = self.run_it(self.command(sft, "plain"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertNotIn("\r", done.stdout)
        self.assertTrue(done.stdout.startswith("device cpu"))

    def test_bad_input_is_refused_with_a_remedy(self):
        quiet(sft.main, small(sft, self.root))
        bad = lambda stage, **changes: lambda: stage.main(small(stage, self.root, **changes))
        self.refuses("--weight-decay", "Did you mean --weight_decay",
                     call=lambda: m.parse_flags(sft.Config, ["--weight-decay=1"]))
        self.refuses("--batch=8", "--microbatch=3", call=bad(sft, microbatch=3))
        self.refuses("--minibatch=3", call=bad(ppo, minibatch=3))
        self.refuses("--minibatch=0", call=bad(ppo, minibatch=0))
        self.refuses("--clip=nan", "finite", call=bad(ppo, clip=math.nan))
        self.refuses("--lam=1.5", call=bad(ppo, lam=1.5))
        self.refuses("--lr=0", call=bad(sft, lr=0.0))
        self.refuses("--dtype=half", "bfloat16", call=bad(sft, dtype="half"))
        self.refuses("--device=warp", call=bad(sft, device="warp"))
        self.refuses("--tokenizer=klingon", "tiny or gpt2", call=bad(sft, tokenizer="klingon"))
        self.refuses("--n_head=5", call=bad(sft, n_head=5))
        self.refuses("--block_size=128", call=bad(reward, block_size=128))
        self.refuses("overwrite --init", call=bad(reward, out=str(self.root / "out/sft")))
        self.refuses("overwrite --reward", call=bad(ppo, out=str(self.root / "out/reward")))
        self.refuses("no checkpoint here", call=bad(reward, init=str(self.root / "nothing")))
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.root / "data")  # where there is no out/sft
        self.refuses('Run "python sft.py" first', call=lambda: m.load_model("out/sft"))
        os.chdir(here)
        self.refuses("--max_new_tokens=64", call=bad(ppo, max_new_tokens=64))
        self.refuses("nowhere", call=bad(sft, data=str(self.root / "nowhere")))
        (self.root / "empty").mkdir()
        self.refuses("sft.jsonl", call=bad(sft, data=str(self.root / "empty")))
        (self.root / "empty/sft.jsonl").write_text("")
        self.refuses("sft.jsonl", call=bad(sft, data=str(self.root / "empty")))
        (self.root / "empty/sft.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]\n')
        self.refuses("sft.jsonl:1", "JSON", call=bad(sft, data=str(self.root / "empty")))

    def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(self):
        with mock.patch.object(sft, "negative_log_likelihood",
                               lambda net, rows, device: (net.wte.weight.sum() * math.nan, 1)):
            self.refuses("step 1", "nan", call=lambda: sft.main(small(sft, self.root)))

    def test_a_reward_model_with_another_tokenizer_is_refused(self):
        quiet(sft.main, small(sft, self.root))
        m.save_model(self.root / "out/reward", tiny(Scorer))
        config = json.loads((self.root / "out/sft/config.json").read_text())
        loaded = m.load_model
        def as_gpt2(folder, cls=GPT, **rest):
            net = loaded(folder, cls, **rest)
            net.cfg.tokenizer = "gpt2" if cls is Scorer else config["tokenizer"]
            return net
        with mock.patch.object(ppo, "load_model", as_gpt2):
            self.refuses("gpt2 tokens", "tiny tokens", call=lambda: ppo.main(small(ppo, self.root)))

    def test_long_prompts_are_trimmed_from_the_left_and_counted(self):
        quiet(sft.main, small(sft, self.root))
        with open(self.root / "data/prompts.jsonl", "a") as f:
            f.write(json.dumps({"prompt": [user("why " * 200)], "check": "no"}) + "\n")
        (train, _), text = quiet(ppo.load_prompts, small(ppo, self.root), Tokenizer("tiny"))
        self.assertIn("1 longer than 52 tokens", text)
        self.assertEqual(max(len(row["ids"]) for row in train), 52)

    def test_rows_with_nothing_to_learn_from_are_dropped_and_counted(self):
        examples, text = quiet(sft.load_examples, small(sft, self.root), Tokenizer("tiny"))
        self.assertNotIn("dropped", text)
        with mock.patch.object(sft, "encode_demonstration", lambda *_: [([1], [-1])]):
            self.refuses("learn", call=lambda: sft.load_examples(small(sft, self.root), Tokenizer("tiny")))

    def test_a_damaged_checkpoint_is_named(self):
        quiet(sft.main, small(sft, self.root))
        path = self.root / "out/sft/model.safetensors"
        data = path.read_bytes()
        for damage in (data[:100], data[:-500], b"\xff" * 16, b""):
            path.write_bytes(damage)
            self.refuses("model.safetensors", call=lambda: m.load_model(path.parent))


# --- damage -------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("FUZZ", 100))  # random mutations of each kind: FUZZ=10000 python test_all.py Fuzz


def damaged(data, draw, head=None):
    """Bytes as a bad disk, a bad download or a bad hand would leave them;
    mostly in the first `head` of them."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, kind = draw.randrange(min(head or len(data), len(data)) or 1), draw.randrange(6)
        if kind == 0:
            data[at:at + 1] = draw.randbytes(1)
        elif kind == 1:
            data = data[:draw.randrange(len(data) + 1)]
        elif kind == 2:
            data[at:at] = bytes(draw.choices(b'{}[]",:0123456789 \n\\abcxyz-.', k=draw.randrange(1, 9)))
        elif kind == 3:
            del data[at:at + draw.randrange(1, 20)]
        elif kind == 4:
            data[at:at + 1] = draw.choice((b"-1", b"2147483648", b"1e999", b"null", b"NaN", b"true",
                                           b"[[]]", b'{"a":{}}'))
        else:
            data[at:at + 8] = draw.randbytes(8)
    return bytes(data)


class Fuzz(InFolder):
    """Whatever is wrong with a file or a flag: one clear message, never a traceback,
    never another program's code."""
    def survives(self, path, use, head=None):
        whole, draw = path.read_bytes(), random.Random(path.name)
        outcomes = {"used": 0, "refused": 0}
        for i in range(FUZZ):
            data = damaged(whole, draw, head)
            path.write_bytes(data)
            try:
                quiet(use)
                outcomes["used"] += 1
            except SystemExit as error:
                self.assertTrue(error.code and isinstance(error.code, str))
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{path.name}, mutation {i}: {data[:300]}") from error
        path.write_bytes(whole)
        quiet(use)
        if "FUZZ" in os.environ:
            print(f"{path.name}: {FUZZ:,} mutations, {outcomes}")

    def test_checkpoints(self):
        folder = self.root / "model"
        m.save_model(folder, tiny(n_layer=1, n_embd=8))
        load = lambda: m.load_model(folder)
        self.survives(folder / "config.json", load)
        self.survives(folder / "model.safetensors", load,
                      8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little"))
        tensors = m.read_safetensors(folder / "model.safetensors")
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        m.write_safetensors(folder / "part.safetensors", tensors)
        (folder / "model.safetensors").unlink()
        self.survives(folder / "pytorch_model.bin", load)
        (folder / "pytorch_model.bin").unlink()
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {name: "part.safetensors" for name in tensors}}))
        self.survives(index, load)

    def test_what_a_resume_reads(self):
        write_data(self.root / "data")
        quiet(sft.main, small(sft, self.root, steps=2, n_layer=1, n_embd=8))
        cfg = small(sft, self.root, steps=2, n_layer=1, n_embd=8, resume=True)
        for name in ("state.pt", "log.jsonl"):
            self.survives(self.root / "out/sft" / name, lambda: m.Run(cfg))

    def test_data(self):
        write_data(self.root / "data")
        for kind in prepare.KINDS:
            path = self.root / "data" / f"{kind}.jsonl"
            path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:5]))
            self.survives(path, lambda: prepare.load(self.root / "data", kind))
        records = [record[0] for record in FORMATS.values()]
        lines = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in records)
        for name, data in {"in.jsonl": lines.encode(), "in.json": json.dumps(records).encode(),
                           "in.txt": lines.encode(), "in.jsonl.gz": gzip.compress(lines.encode())}.items():
            (self.root / name).write_bytes(data)
            self.survives(self.root / name, lambda: prepare.main([self.root / name], self.root / "out"))

    def test_flags(self):
        values = ("", "0", "-1", "1", "3", "0.5", "1e999", "nan", "-inf", "yes", "all", "gpt2", "/", "..",
                  "9" * 30)
        draw, passed = random.Random(0), 0
        for i in range(FUZZ):
            stage = draw.choice((sft, reward, ppo))
            fields = [f.name for f in dataclasses.fields(stage.Config)]
            argv = [f"--{draw.choice(fields)}"
                    f"{draw.choice(('=', '=', '=', '', '-', 'x='))}{draw.choice(values)}"
                    for _ in range(draw.choice((1, 2, 4)))]
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    cfg = m.parse_flags(stage.Config, argv)
                    quiet(ppo.check if stage is ppo else m.check_common, cfg)
                    quiet(m.pick_device, cfg.device, cfg.dtype)
            except SystemExit as error:
                self.assertTrue(error.code, argv)
                continue
            passed += 1
            for name in fields:
                value = getattr(cfg, name)
                self.assertFalse(isinstance(value, float) and not math.isfinite(value), (argv, name))
        self.assertTrue(FUZZ / 50 < passed < FUZZ)


# --- many processes -----------------------------------------------------------------------------------------

class Processes(Commands):
    """torchrun and FSDP: on this machine with gloo, on CPUs."""
    def torchrun(self, n, command, *flags):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc-per-node={n}", *flags]
        return subprocess.Popen([*start, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd=ROOT, env=environment)

    def test_two_processes_take_the_same_course_as_one(self):
        changes = {sft: {"microbatch": 2}, reward: {"checkpoint": True, "offload": "optimizer"},
                   ppo: {"ptx_coef": 0.5, "temperature": 0.7}}
        for stage in (sft, reward, ppo):
            alone, _ = quiet(stage.main, small(stage, self.root, **changes[stage]))
            process = self.torchrun(2, self.command(stage, "two", **changes[stage]))
            out, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, errors)
            self.assertEqual(out.count("2 processes"), 1)  # the first one speaks for all
            one, two = ([json.loads(line)
                         for line in (self.root / folder / "log.jsonl").read_text().splitlines()]
                        for folder in (f"out/{stage.__name__}", "two"))
            self.assertEqual(len(one), len(two))
            for a, b in zip(one, two):
                for name in a.keys() - {"seconds", "tokens_per_s", "memory_gb", "calibration"}:
                    close = a[name] == b[name] or abs(a[name] - b[name]) < 1e-5 * max(1, abs(a[name]))
                    self.assertTrue(close, (stage.__name__, name, a, b))
            a, b = (m.load_model(self.root / folder, Scorer if stage is reward else GPT)
                    for folder in (f"out/{stage.__name__}", "two"))
            ids = random_ids(4, 16)
            a, b = (net.values(ids) if stage is reward else net.logits(net(ids)) for net in (a, b))
            self.assertLess((a - b).abs().max(), 1e-3)

    def test_a_process_that_dies_ends_the_job_and_another_number_of_them_goes_on(self):
        quiet(sft.main, small(sft, self.root, steps=40))
        command = self.command(sft, "killed", steps=40, lora_rank=0)
        # the interval leaves the other one time to speak
        process = self.torchrun(2, command, "--monitor-interval=2")
        self.wait_for_step(process, self.root / "killed/log.jsonl", 5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        self.assertNotEqual(process.returncode, 0)
        self.assertIn("SIGKILL", errors)
        self.assertIn("process 0: another process of this job has ended.", errors)
        m.load_model(self.root / "killed")
        done = self.run_it([*command, "--resume"])
        self.assertIn("resuming", done.stdout, done.stderr)
        one, two = (m.load_model(self.root / folder) for folder in ("out/sft", "killed"))
        ids = random_ids(4, 16)
        self.assertLess((one.logits(one(ids)) - two.logits(two(ids))).abs().max(), 1e-3)

    def test_what_does_not_divide_among_the_processes_is_refused(self):
        with mock.patch.object(m, "WORLD", 3):
            self.refuses("--batch=8", "3 processes", call=lambda: m.check_common(small(sft, self.root)))
            self.refuses("--offload=all",
                         call=lambda: m.check_common(small(sft, self.root, batch=6, offload="all")))


# --- bench: our side of the work that the peers are timed on ------------------------------------------------

# vocabulary, positions, layers, heads, width
SHAPES = {"tiny": (512, 256, 4, 4, 256), "gpt2": (50304, 1024, 12, 12, 768)}
BENCH = {  # workload: (rows or pairs, tokens) or (rows, prompt, new tokens, epochs, rows per minibatch)
    "sft": {"gpt2": (4, 256), "tiny": (32, 128)},
    "reward": {"gpt2": (4, 256), "tiny": (16, 128)},
    "generate": {"gpt2": (16, 32, 64), "tiny": (16, 32, 64)},
    "generate-1": {"gpt2": (1, 32, 64), "tiny": (1, 32, 64)},
    "ppo": {"gpt2": (16, 32, 64, 4, 16), "tiny": (16, 32, 64, 4, 16)},
    "ppo-1": {"gpt2": (16, 32, 64, 1, 16), "tiny": (16, 32, 64, 1, 16)},
    "ppo-long": {"gpt2": (2, 400, 112, 3, 2)},  # the work of Colossal-AI's first benchmark, batch 2
    # as many tokens in few long rows as in many short ones
    **{f"ppo-{rows}x{2048 // rows}": {"gpt2": (rows, 1024 // rows, 2048 // rows, 1, rows)}
       for rows in (32, 16, 8, 4)},
}


class Stopwatch:
    """Seconds of each phase, run by run, heard through the same calls as the dry run's count."""
    def __init__(self):
        self.seconds, self.name, self.since = {}, None, 0.0

    def phase(self, name):
        now = time.perf_counter()
        if self.name:
            self.seconds.setdefault(self.name, []).append(now - self.since)
        self.name, self.since = name, now


def median_seconds(function, warmup, n):
    seconds = []
    for _ in range(warmup + n):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[warmup:])[n // 2]


def machine(dtype):
    """-> (the machine's own GFLOP/s in a large matrix product, its GB/s, read and written, in a copy)."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    x, y = torch.empty(2**27, dtype=torch.uint8), torch.empty(2**27, dtype=torch.uint8)
    return (2 * 2048**3 / median_seconds(lambda: a @ b, 2, 7) / 1e9,
            2 * 2**27 / median_seconds(lambda: y.copy_(x), 2, 7) / 1e9)


def bench_one(name, size, dtype_name):
    """Print one JSON line."""
    work, dtype, watch = BENCH[name][size], getattr(torch, dtype_name), Stopwatch()
    vocabulary, positions, *rest = SHAPES[size]
    net = lambda cls: cls(GPTConfig(vocabulary, positions, *rest, "gpt2")).initialize(rng(0)).to(dtype)
    ids = lambda *shape: torch.randint(vocabulary - 64, shape).tolist()
    host = None if dtype == torch.float32 else "cpu"
    # those that multiply
    weights = sum(p.numel() for name_, p in net(GPT).named_parameters() if name_ != "wpe.weight")
    extra, cpu, kind = {}, torch.device("cpu"), name.split("-")[0]
    repeat = (1, 3) if size == "gpt2" else (2, 9)
    if kind in ("sft", "reward"):
        B, T = work
        stage, model = (sft, net(GPT)) if kind == "sft" else (reward, net(Scorer))
        cfg, adam = stage.Config(batch=B), OffloadedAdamW(model.parameters(), 1e-5, host=host)
        tokens = B * T * (1 + (kind == "reward"))
        flops = 6 * tokens * (weights - (kind == "reward") * vocabulary * rest[2])
        def run():
            if kind == "sft":
                batch = [(row[:-1], row[1:]) for row in ids(B, T + 1)]
            else:
                batch = [(ids(T), ids(T)) for _ in range(B)]
            stage.learn(model, batch, cfg, cpu)
            adam.step(1e-5)
    elif kind == "generate":
        B, P, N = work
        model, tokens, flops = net(GPT), B * N, 2 * B * (P + N) * weights
        run = lambda: generate(model, ids(B, P), N, -1, generator=rng(0))
    else:
        B, P, N, epochs, minibatch = work
        models = [net(cls) for cls in (GPT, GPT, Scorer, Scorer)]
        for frozen in (models[1], models[3]):
            frozen.requires_grad_(False)
        cfg = ppo.Config(batch=B, minibatch=minibatch, max_new_tokens=N, epochs=epochs, temperature=1.0)
        adams = [OffloadedAdamW(x.parameters(), 1e-5, host=host) for x in (models[0], models[2])]
        tokens = B * (P + N)
        head = vocabulary * rest[2]
        # forward ones of a network; the first update's are scoring's
        passes = 4 + 6 * epochs - 2 * (minibatch == B)
        flops = 2 * tokens * (weights + passes * (weights - head)) + passes * B * N * head
        tokenizer = mock.Mock(end=-1)
        memory.METERS.append(watch)
        def run():
            rows = sorted(({"ids": row} for row in ids(B, P)), key=lambda row: len(row["ids"]))
            with mock.patch.object(ppo, "TARGET_KL", math.inf):
                batch = ppo.rollout(0, rows, models, tokenizer, cfg, 0.05)
                ppo.update(0, batch, models, adams, 1e-5, None, cfg)
            watch.phase("rest")
    seconds = median_seconds(run, *repeat)
    for phase_, each in watch.seconds.items():
        extra[phase_ + "_seconds"] = sorted(each[repeat[0]:])[repeat[1] // 2]
    gflops, copy = machine(dtype)
    if kind == "generate":  # every step reads every weight
        extra |= {"ms_per_token_step": 1000 * seconds / N,
                  "share_of_copy_rate": weights * dtype.itemsize / (seconds / N) / 1e9 / copy}
    print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in {
        "workload": name, "peer": "ours", "size": size, "dtype": dtype_name,
        "tokens_per_s": tokens / seconds, "seconds": seconds, "peak_rss_mb": m.memory_gb(cpu) * 1000,
        "tokens": tokens, "gflops": flops / seconds / 1e9,
        "share_of_matmul_rate": flops / seconds / 1e9 / gflops, "machine_gflops": gflops,
        "machine_copy_gb_s": copy, **extra, "threads": torch.get_num_threads()}.items()}), flush=True)


TRICKS = {"float32": {}, "float32, checkpoint": {"checkpoint": True}, "bfloat16": {"dtype": "bfloat16"},
          "bfloat16, checkpoint": {"dtype": "bfloat16", "checkpoint": True},
          "bfloat16, offload=all": {"dtype": "bfloat16", "offload": "all"},
          "bfloat16, LoRA": {"dtype": "bfloat16", "lora_rank": 16}}


def bench_trick(name):
    """One PPO iteration of four GPT-2 124M with random weights, really run: its peak memory, its seconds."""
    watch, cpu = Stopwatch(), torch.device("cpu")
    cfg = ppo.Config(init="gpt2", dry_run=True, batch=2, minibatch=2, epochs=2, block_size=512,
                     max_new_tokens=112, **{"dtype": "float32"} | TRICKS[name])
    memory.METERS.append(watch)
    ppo.iteration(cfg, cpu, getattr(torch, cfg.dtype))
    watch.phase("rest")
    print(json.dumps({"trick": name, "peak_rss_mb": round(m.memory_gb(cpu) * 1000),
                      **{phase_: round(x, 2) for phase_, [x] in watch.seconds.items()}}), flush=True)


def bench_adamw():
    """The optimizer's step on the weights of GPT-2 124M in float32, beside torch's."""
    params = [torch.nn.Parameter(torch.randn(shape))
              for shape in [(50304, 768)] + [(768, 3072), (3072, 768), (2304, 768), (768, 768)] * 12]
    ours, theirs = OffloadedAdamW(params, 1e-4, host=None), torch.optim.AdamW(params, 1e-4, fused=True)
    for p, master in zip(params, ours.masters):
        p.grad, master.grad = torch.randn_like(p), torch.randn_like(p)
    def plain():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()
        for p in params:
            p.grad.zero_()
    seconds = [[], []]
    for _ in range(9):  # in turn
        for i, step in enumerate((lambda: ours.step(1e-4, 1.0), plain)):
            seconds[i].append(median_seconds(step, 0, 1))
    ours_, theirs_ = (sorted(x)[4] for x in seconds)
    print(json.dumps({"adamw_step_seconds": round(ours_, 4), "torch_fused": round(theirs_, 4),
                      "ratio": round(ours_ / theirs_, 3)}), flush=True)


# --- fit: the largest GPT-2 whose PPO iteration fits, from dry runs -----------------------------------------

SETTINGS = {"plain PyTorch, float32": {"dtype": "float32"},
            "bfloat16 --offload=optimizer --checkpoint": {"offload": "optimizer", "checkpoint": True},
            "bfloat16 --lora_rank=16 --checkpoint": {"lora_rank": 16, "checkpoint": True},
            "bfloat16 --offload=all": {"offload": "all"}}


@functools.cache
def peaks(setting, k):
    """GiB on (device, host) of one iteration: batch 1, 400 + 112 tokens, k layers of k heads of width 128."""
    cfg = ppo.Config(init="scratch", tokenizer="gpt2", n_layer=k, n_head=k, n_embd=128 * k, block_size=512,
                     max_new_tokens=112, batch=1, minibatch=1, epochs=1, dry_run=True, **SETTINGS[setting])
    # the others with the prompt: faster, and the peak a little higher
    def last_tokens(net, prompts, n, *rest, **more):
        replies = generate(net, [prompt + [0] * (n - 2) for prompt in prompts], 2, *rest, **more)
        return [[0] * (n - 2) + reply for reply in replies]
    with memory.dry_run() as count, mock.patch.object(ppo, "generate", last_tokens):
        ppo.iteration(cfg, memory.DEVICE, torch.float32 if cfg.dtype == "float32" else torch.bfloat16)
    return tuple(
        max(phase_[f"peak_{place}_bytes"] for name, phase_ in count.phases.items() if name != "setup") / 2**30
        for place in ("device", "host"))


def fit(budgets=(4, 8, 16, 24, 80), host=1024):
    """Print the table: billions of parameters, (layers)."""
    print("| GiB on the device | " + " | ".join(SETTINGS) + " |\n" + "|---" * (1 + len(SETTINGS)) + "|")
    for budget in budgets:
        row = []
        for setting in SETTINGS:
            low, high = 0, 80  # low fits, high does not
            while high - low > 1:
                k = (low + high) // 2
                device_, host_ = peaks(setting, k)
                low, high = (k, high) if device_ <= budget and host_ <= host else (low, k)
            row.append(f"{(12 * low * (128 * low) ** 2 + 50304 * 128 * low) / 1e9:.2f} ({low})")
        print(f"| {budget} | " + " | ".join(row) + " |", flush=True)


def bench(names):
    """Each in a process of its own, so that peaks of memory do not mix."""
    if names == ["tricks"]:
        for name in [*TRICKS, "adamw"]:
            subprocess.run([sys.executable, __file__, "bench", "tricks", name], check=True)
        return
    for name in names or BENCH:
        m.require(name in BENCH, f"bench {name}: unknown. Choose from {', '.join(BENCH)}.")
        for size in BENCH[name]:
            for dtype in ("float32", "bfloat16"):
                subprocess.run([sys.executable, __file__, "bench", name, size, dtype], check=True)


# --- the README: every command, and every exercise that breaks something ------------------------------------

# What makes a command short; a later flag of the same name wins.
SHORT = {"sft.py": "--steps=4 --batch=8 --save_every=2", "reward.py": "--steps=4 --batch=8 --save_every=2",
         "ppo.py": "--steps=2 --batch=8 --minibatch=4 --microbatch=2 --max_new_tokens=12 --best_of_n=2 "
                   "--eval_prompts=8"}
SKIP = "pip install", "git clone", "python test_all.py"  # what runs this, or takes minutes


def commands(text):
    """The lines of a README that a reader would type."""
    joined = re.sub(r"\\\n +", "", text)
    lines = re.findall(r"^    (?:[A-Z_]+=\S+ )*(?:python|torchrun|pip|git) .*$", joined, re.M)
    return [re.sub(r" +#.*", "", line).strip() for line in lines]


def exercises(text):
    """-> [(file, old text, new text, name of the test that turns red), ...]"""
    found = re.findall(r"In `(\w+\.py)`:\n\n((?:    [-+] .*\n)+)\n(?:.*\n)*?.*Red: `(test_\w+)`", text)
    side = lambda patch, sign: "".join(line[6:] + "\n" for line in patch.splitlines() if line[4] == sign)
    return [(file, side(patch, "-"), side(patch, "+"), name) for file, patch, name in found]


def readme():
    """In a copy of this folder: run all commands, cut short, then break what the exercises break."""
    text = (ROOT / "README.md").read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
        pair = {"chosen": "\n\nHuman: Why %d?\n\nAssistant: Because.",
                "rejected": "\n\nHuman: Why %d?\n\nAssistant: No."}
        rows = "".join(json.dumps({side: words % i for side, words in pair.items()}) + "\n"
                       for i in range(60))
        (copy / "helpful-base.test.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        (copy / "mine.jsonl").write_text(rows)
        for name in ("book.txt", "tinyshakespeare.txt"):
            (copy / name).write_text("All the world is a stage.\n\n" * 200)
        # a small stand-in for the hub's model
        hub = Path(folder) / "hub/models--openai-community--gpt2/snapshots/main"
        m.save_model(hub, GPT(GPTConfig(50304, 1024, 1, 2, 8, "gpt2")).initialize(rng(0)))
        environment = os.environ | {"HF_HUB_CACHE": str(Path(folder) / "hub"), "HF_HUB_OFFLINE": "1"}
        for command in commands(text):
            if command.startswith(SKIP):
                print(f"skipped: {command}", flush=True)
                continue
            parts = []
            for part in command.split(" && "):
                script = next((name for name in SHORT if name in part.split()), None)
                short = script and "--dry_run" not in part
                parts.append(f"{part} {SHORT[script]}" if short else part)
            typed = re.sub(r"\bpython\b", sys.executable, " && ".join(parts))
            typed = re.sub(r"^((?:\S+=\S+ )*)torchrun",
                           rf"\1{sys.executable} -m torch.distributed.run", typed)
            start = time.time()
            done = subprocess.run(typed, shell=True, cwd=copy, env=environment, capture_output=True,
                                  text=True, stdin=subprocess.DEVNULL)
            m.require(done.returncode == 0,
                      f"README: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            print(f"ran in {time.time() - start:3.0f} s: {command}", flush=True)
        for file, old, new, name in exercises(text):
            whole = (copy / file).read_text()
            m.require(whole.count(old) == 1, f"README: {file} has not one place with\n{old}")
            (copy / file).write_text(whole.replace(old, new))
            done = subprocess.run([sys.executable, "test_all.py", "-k", name], cwd=copy,
                                  capture_output=True, text=True)
            m.require("Ran 1 test" in done.stderr and done.returncode == 1,
                      f"README: {name} is not red\n{done.stderr}")
            (copy / file).write_text(whole)
            print(f"red, as it should be: {name}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        if len(sys.argv) == 5 and sys.argv[3] in SHAPES:
            bench_one(*sys.argv[2:])
        elif sys.argv[2:3] == ["tricks"] and len(sys.argv) == 4:
            bench_adamw() if sys.argv[3] == "adamw" else bench_trick(sys.argv[3])
        else:
            bench(sys.argv[2:])
    elif sys.argv[1:] == ["fit"]:
        fit()
    elif sys.argv[1:] == ["readme"]:
        readme()
    else:
        unittest.main()
