"""Our side of every benchmark: speed, what the memory tricks cost, the largest model that fits.

    python docs/bench.py                     # all workloads, one JSON line each, minutes
    python docs/bench.py sft ppo-1           # only these
    python docs/bench.py tricks              # one PPO iteration of GPT-2 124M, really run: memory and seconds
    python docs/bench.py fit                 # the largest GPT-2 that fits a device, by dry runs
    python docs/bench.py ragged-reward       # GPT-2 124M on rows of real lengths; ragged-sft, generate-same
    python docs/bench.py chat out/ppo        # held-out questions of the bundled world, five to a dialogue
    python docs/bench.py asked out/ppo       # 150 questions that three people typed
    python docs/bench.py bias out/reward out/sft out/ppo    # who falls for enthusiasm!!
    python docs/bench.py policies out/sft out/reward out/ppo out/dpo    # beside stage 1; takes ppo.py's flags
    python docs/bench.py best-of out/sft out/reward out/best-of    # best of 1 to 64, a log for docs/view.py
    python docs/bench.py own out/ppo out/reward out/own-ppo        # calibration on a policy's own replies
    python docs/bench.py follow out/kept smollm2-135m-instruct out/follow    # instructions kept: a log

Every workload runs in a process of its own, so that peaks of memory do not mix. Weights are random, nothing
is downloaded. Beside each figure stand the machine's own rates, measured in the same process.
"""
import functools
import gzip
import io
import json
import math
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import memory
import model
import ppo
import reward
import sft
from data import dry_run
from data.batches import rng
from data.chat import last_exchanges, score_dialogue
from data.evaluation import calibration, passes, win_rate, yardsticks
from data.prepare import by_set, load
from data.run import memory_gb, parse_flags, pick_device, require, seconds_since
from data.tokenizer import Tokenizer
from memory import OffloadedAdamW
from model import GPT, GPTConfig, Scorer, generate, generate_many, load_model, policy_logprobs

# --- speed --------------------------------------------------------------------------------------------------

SIZES = {"tiny": (512, 256, 4, 4, 256), "gpt2": (50304, 1024, 12, 12, 768)}  # V, positions, layers, heads, C
WORKLOADS = {  # (rows or pairs, tokens) or (rows, prompt, new tokens[, epochs, rows per minibatch])
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
    """A tracker for memory.TRACKERS, as the dry run is one: seconds of each phase, run by run."""
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
        seconds.append(seconds_since(start))
    return sorted(seconds[warmup:])[n // 2]


def machine_rates(dtype):
    """-> (GFLOP/s of a large matrix product, GB/s of a copy, read and written)."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    x, y = torch.empty(2**27, dtype=torch.uint8), torch.empty(2**27, dtype=torch.uint8)
    return (2 * 2048**3 / median_seconds(lambda: a @ b, 2, 7) / 1e9,
            2 * 2**27 / median_seconds(lambda: y.copy_(x), 2, 7) / 1e9)


def bench_workload(name, size, dtype_name):
    """Print one JSON line."""
    work, dtype, watch = WORKLOADS[name][size], getattr(torch, dtype_name), Stopwatch()
    vocabulary, positions, *rest = SIZES[size]
    net = lambda cls: cls(GPTConfig(vocabulary, positions, *rest, "gpt2")).initialize(rng(0)).to(dtype)
    ids = lambda *shape: torch.randint(vocabulary - 64, shape).tolist()
    host = None if dtype == torch.float32 else "cpu"
    # operations are those of matrix products; positions are looked up, not multiplied
    weights = sum(p.numel() for name_, p in net(GPT).named_parameters() if name_ != "wpe.weight")
    head = vocabulary * rest[2]
    extra, cpu, kind = {}, torch.device("cpu"), name.split("-")[0]
    repeat = (1, 3) if size == "gpt2" else (2, 9)
    if kind in ("sft", "reward"):
        B, T = work
        stage, model = (sft, net(GPT)) if kind == "sft" else (reward, net(Scorer))
        cfg, adam = stage.Config(batch=B), OffloadedAdamW(model.parameters(), 1e-5, host=host)
        tokens = B * T * (1 + (kind == "reward"))
        flops = 6 * tokens * (weights - (kind == "reward") * head)

        def run():
            if kind == "sft":
                sft.learn(model, [(row[:-1], row[1:]) for row in ids(B, T + 1)], B * T, cfg, cpu)
            else:
                reward.learn(model, [([], ids(T), ids(T)) for _ in range(B)], cfg)
            adam.step(1e-5)
    elif kind == "generate":
        B, P, N = work
        model, tokens, flops = net(GPT), B * N, 2 * B * (P + N) * weights
        run = lambda: generate(model, ids(B, P), N, -1, generator=rng(0))
    else:
        B, P, N, epochs, minibatch = work
        models = ppo.Models(*(net(cls) for cls in (GPT, GPT, Scorer, Scorer)))
        models.reference.requires_grad_(False)
        models.reward_model.requires_grad_(False)
        cfg = ppo.Config(batch=B, minibatch=minibatch, max_new_tokens=N, epochs=epochs, temperature=1.0,
                         target_kl=0.0)  # no step is left out
        adams = {name: OffloadedAdamW(getattr(models, name).parameters(), 1e-5, host=host)
                 for name in ("actor", "critic")}
        tokens = B * (P + N)
        forwards = 4 + 6 * epochs  # of one network; a backward pass counts as two
        flops = 2 * tokens * (weights + forwards * (weights - head)) + forwards * B * N * head
        memory.TRACKERS.append(watch)

        def run():
            rows = [{"ids": row} for row in ids(B, P)]
            batch = ppo.rollout(0, rows, models, SimpleNamespace(end=-1), cfg, 0.05)
            ppo.update(0, batch, models, adams, 1e-5, None, cfg)
            watch.phase("rest")
    seconds = median_seconds(run, *repeat)
    for phase, each in watch.seconds.items():
        extra[phase + "_seconds"] = sorted(each[repeat[0]:])[repeat[1] // 2]
    gflops, copy = machine_rates(dtype)
    if kind == "generate":  # every step reads every weight
        extra |= {"ms_per_token_step": 1000 * seconds / N,
                  "share_of_copy_rate": weights * dtype.itemsize / (seconds / N) / 1e9 / copy}
    print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in {
        "workload": name, "peer": "ours", "size": size, "dtype": dtype_name,
        "tokens_per_s": tokens / seconds, "seconds": seconds, "peak_rss_mb": memory_gb(cpu) * 1000,
        "tokens": tokens, "gflops": flops / seconds / 1e9,
        "share_of_matmul_rate": flops / seconds / 1e9 / gflops, "machine_gflops": gflops,
        "machine_copy_gb_s": copy, **extra, "threads": torch.get_num_threads()}.items()}), flush=True)


# --- rows of real, unequal lengths --------------------------------------------------------------------------

# HH-RLHF's helpful-base, https://huggingface.co/datasets/Anthropic/hh-rlhf, is not part of this project
PREFERENCES = "helpful-base.test.jsonl.gz"


def bench_ragged(name, pairs=128, batch=8, cut=512):
    """GPT-2 124M, bfloat16: one pass over the file's first pairs, which lose their beginning beyond 512
    tokens, in batches of 8 pairs, or of 8 chosen dialogues. Print one JSON line."""
    require(Path(PREFERENCES).exists(), f"{PREFERENCES}: not here. It is a part of "
                                        "https://huggingface.co/datasets/Anthropic/hh-rlhf")
    encode, rows = Tokenizer("gpt2").encode, []
    for line in gzip.open(PREFERENCES, "rt", encoding="utf-8"):
        pair = [encode(json.loads(line)[side]) for side in ("chosen", "rejected")]
        beyond = max(0, max(map(len, pair)) - cut)
        rows += [tuple(ids[beyond:] for ids in pair)] * (pair[0] != pair[1] and len(rows) < pairs)
    is_reward = name == "ragged-reward"
    net = (Scorer if is_reward else GPT)(GPTConfig(*SIZES["gpt2"], "gpt2")).initialize(rng(0)).bfloat16()
    real = sum(len(ids) for pair in rows for ids in pair[:1 + is_reward])
    lengths = tuple(reward.tokens_of_pair(([], *pair)) if is_reward else len(pair[0]) for pair in rows)
    adam = OffloadedAdamW(net.parameters(), 1e-5)

    def step(members):
        if is_reward:
            reward.learn(net, [([], *rows[i]) for i in members], reward.Config(batch=batch))
        else:  # every token is a target, as a text's are
            examples = [(rows[i][0][:-1], rows[i][0][1:]) for i in members]
            sft.learn(net, examples, real / len(rows) * batch, sft.Config(batch=batch), torch.device("cpu"))
        adam.step(1e-5, 1.0)
    # sorted, as the 50 batches are that batches() forms together where there are enough rows
    order = torch.tensor(lengths).argsort().split(batch)
    order = [order[i].tolist() for i in torch.randperm(len(order), generator=rng(0))]
    step(order[0])  # warm-up
    start = time.perf_counter()
    for members in order:
        step(members)
    seconds, (gflops, copy) = seconds_since(start), machine_rates(torch.bfloat16)
    print(json.dumps({"work": name, **{key: round(x, 3) for key, x in {
        "per_s": len(rows) / seconds, "real_tokens_per_s": real / seconds, "seconds": seconds,
        "machine_gflops": gflops, "machine_copy_gb_s": copy}.items()}}), flush=True)


def bench_generate_same(n=16, prompt=400, new=112):
    """n replies to one prompt, GPT-2 124M, bfloat16. Print one JSON line."""
    net = GPT(GPTConfig(*SIZES["gpt2"], "gpt2")).initialize(rng(0)).bfloat16()
    row = torch.randint(50000, (prompt,)).tolist()
    seconds = median_seconds(lambda: generate(net, [row] * n, new, -1, generator=rng(0)), 1, 3)
    gflops, copy = machine_rates(torch.bfloat16)
    print(json.dumps({"work": "generate-same", **{key: round(x, 3) for key, x in {
        "per_s": n * new / seconds, "seconds": seconds, "machine_gflops": gflops,
        "machine_copy_gb_s": copy}.items()}}), flush=True)


# --- what the memory tricks cost ----------------------------------------------------------------------------

TRICKS = {"float32": {"dtype": "float32"}, "float32, checkpoint": {"dtype": "float32", "checkpoint": True},
          "bfloat16": {}, "bfloat16, checkpoint": {"checkpoint": True},
          "bfloat16, offload=all": {"offload": "all"}, "bfloat16, LoRA": {"lora_rank": 16}}


def bench_trick(name):
    """One PPO iteration of four GPT-2 124M with random weights, really run: its peak memory, its seconds."""
    watch, cpu = Stopwatch(), torch.device("cpu")
    cfg = ppo.Config(init="gpt2", dry_run=True, batch=2, minibatch=2, epochs=2, block_size=512,
                     max_new_tokens=112, **{"dtype": "bfloat16"} | TRICKS[name])
    memory.TRACKERS.append(watch)
    ppo.dry_iteration(cfg, cpu, getattr(torch, cfg.dtype))
    watch.phase("rest")
    print(json.dumps({"trick": name, "peak_rss_mb": round(memory_gb(cpu) * 1000),
                      **{phase: round(x, 2) for phase, [x] in watch.seconds.items()}}), flush=True)


def bench_adamw():
    """The optimizer's step on the weights of GPT-2 124M in float32, beside torch's."""
    params = [torch.nn.Parameter(torch.randn(shape))
              for shape in [(50304, 768)] + [(768, 3072), (3072, 768), (2304, 768), (768, 768)] * 12]
    ours, theirs = OffloadedAdamW(params, 1e-4, host=None), torch.optim.AdamW(params, 1e-4, fused=True)
    for p, master in zip(params, ours.masters):
        p.grad, master.grad = torch.randn_like(p), torch.randn_like(p)

    def torch_step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()
        for p in params:
            p.grad.zero_()
    seconds = [[], []]
    for _ in range(9):  # in turn
        for i, step in enumerate((lambda: ours.step(1e-4, 1.0), torch_step)):
            seconds[i].append(median_seconds(step, 0, 1))
    ours_, theirs_ = (sorted(x)[4] for x in seconds)
    print(json.dumps({"adamw_step_seconds": round(ours_, 4), "torch_fused": round(theirs_, 4),
                      "ratio": round(ours_ / theirs_, 3)}), flush=True)


# --- fit: the largest GPT-2 whose PPO iteration fits, by dry runs -------------------------------------------

SETTINGS = {"plain PyTorch, float32": {"dtype": "float32"},
            "bfloat16 --offload=optimizer --checkpoint": {"offload": "optimizer", "checkpoint": True},
            "bfloat16 --lora_rank=16 --checkpoint": {"lora_rank": 16, "checkpoint": True},
            "bfloat16 --offload=all": {"offload": "all"}}


@functools.cache
def peaks(setting, k):
    """GiB on (device, host) of one iteration: batch 1, 400 + 112 tokens, k layers of k heads of width 128."""
    cfg = ppo.Config(init="scratch", tokenizer="gpt2", n_layer=k, n_head=k, n_embd=128 * k, block_size=512,
                     max_new_tokens=112, batch=1, minibatch=1, epochs=1, dry_run=True, **SETTINGS[setting])

    # only two tokens are generated, the others fed with the prompt: faster, and the peak a little higher
    def last_tokens(net, prompts, n, *rest, **more):
        replies = generate(net, [prompt + [0] * (n - 2) for prompt in prompts], 2, *rest, **more)
        return [[0] * (n - 2) + reply for reply in replies]
    with dry_run.dry_run() as count, mock.patch.object(model, "generate", last_tokens):
        ppo.dry_iteration(cfg, dry_run.DEVICE, torch.float32 if cfg.dtype == "float32" else torch.bfloat16)
    phases = [peak for name, peak in count.phases.items() if name != "setup"]
    return tuple(max(peak[f"peak_{side}_bytes"] for peak in phases) / 2**30 for side in ("device", "host"))


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


# --- the bundled world --------------------------------------------------------------------------------------

def answers(folder, dialogues, seed, temperature):
    """-> (the language model's replies to dialogues that end in a question, tokenizer)."""
    net = load_model(folder, GPT, *pick_device("auto", "auto"))
    tokenizer, new = Tokenizer(net.cfg.tokenizer), net.cfg.n_positions // 2
    prompts = [tokenizer.prompt(last_exchanges(d, tokenizer, new), new) for d in dialogues]
    return generate_many(net, prompts, new, tokenizer.end, rng(seed), 100, temperature), tokenizer


@torch.no_grad()
def chat(folder="out/ppo", n=300, turns=5, temperature=0.7):
    """n dialogues of `turns` held-out questions each, one after another, as model.py answers them. A greeting
    comes first, thanks do not, a farewell comes last, and none is short for "the same of ..."."""
    rows, n = by_set(load("data/tiny", "prompts")[1])["held out"], int(n)
    rows = [row for row in rows if not re.search(r"(?i)(^|[.:] )and ", row["prompt"][-1]["content"])]
    dialogues = [[] for _ in range(n)]
    for turn in range(turns):
        odd = {"greeting" if turn else "thanks", "farewell" if turn + 1 < turns else ""}
        suited = [row for row in rows if row["skill"] not in odd]
        drawn = torch.randint(len(suited), (n,), generator=rng(0, "chat", turn))
        asked = [suited[i] for i in drawn.tolist()]
        dialogues = [d + row["prompt"][-1:] for d, row in zip(dialogues, asked)]
        replies, tokenizer = answers(folder, dialogues, turn, temperature)
        print(f"question {turn + 1}: {yardsticks(asked, replies, tokenizer)}", flush=True)
        dialogues = [[*d, {"role": "assistant", "content": tokenizer.decode(reply)}]
                     for d, reply in zip(dialogues, replies)]
    for name, rows in by_set(load("data/tiny", "prompts")[1]).items():
        inside = [row for row in rows if row["skill"] != "unknown"] or rows
        replies, tokenizer = answers(folder, [row["prompt"] for row in inside], turns, temperature)
        unknown = sum(bool(ADMITS.search(tokenizer.decode(reply))) for reply in replies)
        print(f"{name}: {unknown} of {len(inside)} replies say that they do not know")


ADMITS = re.compile("not know|Nobody has told|not understand|only understand|too hard")


@torch.no_grad()
def asked(*folders):
    """150 questions that three people typed who knew README's list and not data/tiny/make.py, some of them
    beyond it: how many replies are right, how many decline, how many are wrong. (22 of them, most of two or
    three words, are in the lessons word for word.)"""
    rows = [json.loads(line) for line in open("data/tiny/asked.jsonl", encoding="utf-8")]
    for folder in folders:
        dialogues = [[{"role": "user", "content": row["q"]}] for row in rows]
        replies, tokenizer = answers(folder, dialogues, 0, 0.7)
        for inside in (True, False):
            told = [(row, tokenizer.decode(reply)) for row, reply in zip(rows, replies)
                    if row["inside"] == inside]
            declined = sum(bool(ADMITS.search(text)) for _, text in told)
            right = sum(bool(re.search(row["right"], text, re.I)) and not ADMITS.search(text)
                        for row, text in told)
            print(f"{folder}, {'in' if inside else 'out'}side: of {len(told)} right {right}, declined "
                  f"{declined}, wrong {len(told) - right - declined}", flush=True)


@torch.no_grad()
def bias(reward="out/reward", *folders):
    """How often a reward model prefers !! to a stop or a ! in replies that differ in nothing else; and which
    share of the language models' replies has it, at the chat's temperature."""
    rows = by_set(load("data/tiny", "prompts")[1])["held out"]
    plain, tokenizer = answers(folders[0], [row["prompt"] for row in rows], 0, 0.7)
    scorer, wins, pairs = load_model(reward, Scorer, *pick_device("auto", "auto")), 0, 0
    for row, reply in zip(rows, plain):
        if yardsticks([row], [reply], tokenizer)["gold"]:
            text = tokenizer.decode(reply)
            said = [[*row["prompt"], {"role": "assistant", "content": x}]
                    for x in (text, re.sub("[.!](?= |$)", "!!", text))]
            calm, excited = (score_dialogue(scorer, tokenizer, d) for d in said)
            wins, pairs = wins + (excited > calm), pairs + 1
    print(f"{reward} prefers the enthusiastic one of {pairs} pairs in {wins} ({wins / max(1, pairs):.2f})")
    for folder in folders:
        replies, _ = answers(folder, [row["prompt"] for row in rows], 1, 0.7)
        share = sum("!!" in tokenizer.decode(reply) for reply in replies) / len(replies)
        print(f"{folder}: {share:.3f} of the replies have !!, {yardsticks(rows, replies, tokenizer)}")


def held_out(sft, reward, *flags):
    """-> (PPO's models with stage 1 as actor, {set: held-out rows}, tokenizer, PPO's settings)."""
    cfg = parse_flags(ppo.Config, [f"--init={sft}", f"--reward={reward}", "--best_of_n=1", *flags])
    with redirect_stdout(io.StringIO()):
        models, tokenizer = ppo.load_models(cfg, *pick_device("auto", "auto"))
        sets = by_set(ppo.load_prompts(cfg, tokenizer)[1])
    return models, {name: rows[:cfg.eval_prompts] for name, rows in sets.items()}, tokenizer, cfg


def policies(sft, reward, *folders):
    """PPO's last evaluation, for policies of any origin, by any reward model: a JSON line and a few samples
    each. Flags are ppo.py's."""
    flags = [x for x in folders if x.startswith("--")]
    models, sets, tokenizer, cfg = held_out(sft, reward, *flags)
    for folder in (x for x in folders if x not in flags):
        actor = load_model(folder, GPT, models.actor.device, models.actor.ln_f.weight.dtype)
        with redirect_stdout(io.StringIO()) as printed:
            result, *_ = ppo.evaluate(models._replace(actor=actor), sets, tokenizer, cfg)
        shown = "right_after", "gold_after", "win_rate", "win_rate_low", "win_rate_high", "kl", "score"
        print(json.dumps({"policy": folder, **{name: round(result[name], 4) for name in shown
                                               if result[name] is not None}}), flush=True)
        print("\n".join(line for line in printed.getvalue().split("\n") if line.startswith("    ")))


def own_replies(policy, judge, out, n=4):
    """Is a reward model as right as it is sure about a policy's own replies? Of n to each held-out prompt all
    pairs of a good one and one that is not, by confidence: a log for docs/view.py calibration."""
    (models, sets, tokenizer, cfg), n = held_out(policy, judge), int(n)
    rows = [row for row in sets["held out"] for _ in range(n)]
    replies, scores, _ = ppo.evaluate_policy(models.actor, models, rows, tokenizer, cfg, 0)
    good = torch.tensor([passes(*pair, tokenizer) for pair in zip(rows, replies)]).view(-1, n)
    better = good[:, :, None] & ~good[:, None]  # (prompts, n, n): is i good and j not?
    margin = (scores.view(-1, n, 1) - scores.view(-1, 1, n))[better]
    bins = calibration(margin)
    for pairs, sure, right in bins:
        print(f"{out}: {sure:.2f} sure, right in {right:.2f} of {pairs} pairs")
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "log.jsonl").write_text(json.dumps({"calibration": bins}) + "\n")


def best_of(sft, reward, out, most=64):
    """The best of n replies of stage 1 by the reward model, n = 1, 2, 4 ... `most`: a log of right, gold,
    score and KL over n. KL from stage 1: log n - (n - 1) / n, Stiennon et al. 2020, appendix G.3."""
    (models, sets, tokenizer, cfg), most = held_out(sft, reward), int(most)
    rows = [row for row in sets["held out"] for _ in range(most)]
    replies, scores, _ = ppo.evaluate_policy(models.actor, models, rows, tokenizer, cfg, 0)
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "log.jsonl", "w") as file:
        for n in (2 ** k for k in range(most.bit_length())):
            best = scores.view(-1, n).max(1)  # each prompt has most / n such groups
            chosen = [i * n + j for i, j in enumerate(best.indices.tolist())]
            row = {"n": n, "kl": math.log(n) - (n - 1) / n, "score": best.values.mean().item(),
                   **yardsticks([rows[i] for i in chosen], [replies[i] for i in chosen], tokenizer)}
            print(json.dumps(row), flush=True)
            file.write(json.dumps({"step": n, **row}) + "\n")
        file.write(json.dumps({"final": True}) + "\n")


@torch.no_grad()
def follow(out, *folders, new=48, room=96, temperature=0.7):
    """Replies of each policy to the held-out instructions of data/follow: by set the share that is kept, with
    Wilson's interval, and by kind. And what training never sees: how long they are, how many differ, and
    their loss under the first policy, nats a token: what no longer reads like language costs more there.
    Prints that; writes it with all replies to out/log.jsonl, which docs/view.py kept draws."""
    first, sets = None, by_set(load("data/follow", "prompts")[1])
    Path(out).mkdir(parents=True, exist_ok=True)
    log = open(Path(out) / "log.jsonl", "w", encoding="utf-8")
    for folder in folders:
        net = load_model(folder, GPT, *pick_device("auto", "auto"))
        first, tokenizer = first or net, Tokenizer(net.cfg.tokenizer)
        for name, rows in sets.items():
            prompts = [tokenizer.prompt(row["prompt"], room) for row in rows]
            replies = generate_many(net, prompts, new, tokenizer.end, rng(0, name), 64, temperature)
            kept, kinds, nats = [passes(*pair, tokenizer) for pair in zip(rows, replies)], {}, 0.0
            for row, good in zip(rows, kept):
                kinds.setdefault(row["skill"], []).append(good)
            for i in range(0, len(rows), 16):
                logprobs, _ = policy_logprobs(first, prompts[i:i + 16], replies[i:i + 16])
                nats -= logprobs.sum().item()
            texts, tokens = [tokenizer.decode(reply) for reply in replies], sum(map(len, replies))
            share = win_rate(torch.tensor(kept).float(), torch.full((len(kept),), 0.5))
            row = {"policy": folder, "set": name, "kept": [round(x, 3) for x in share],
                   "tokens": round(tokens / len(rows), 1), "different": len({*texts}),
                   "ended": sum(r[-1] == tokenizer.end for r in replies), "replies": len(rows),
                   "nats_under_first": round(nats / tokens, 2),
                   "kinds": {k: round(sum(x) / len(x), 2) for k, x in kinds.items()}}
            print(json.dumps(row), flush=True)
            said = [[row["prompt"][0]["content"], *reply] for row, *reply in zip(rows, texts, kept)]
            log.write(json.dumps(row | {"said": said}) + "\n")
    log.close()


def main(names):
    """A workload's name runs it in new processes: `python docs/bench.py run FUNCTION ARGUMENTS`."""
    if names == ["fit"]:
        return fit()
    world = {"chat": chat, "bias": bias, "policies": policies, "best-of": best_of, "own": own_replies,
             "follow": follow, "asked": asked}
    if names and names[0] in world:
        return world[names[0]](*names[1:])
    if names[:1] == ["run"]:
        functions = bench_workload, bench_ragged, bench_generate_same, bench_trick, bench_adamw
        return {f.__name__: f for f in functions}[names[1]](*names[2:])
    jobs = [("bench_trick", name) for name in TRICKS] + [("bench_adamw",)]
    if names != ["tricks"]:
        known = {"ragged-reward": [("bench_ragged", "ragged-reward")],
                 "ragged-sft": [("bench_ragged", "ragged-sft")], "generate-same": [("bench_generate_same",)],
                 **{name: [("bench_workload", name, size, dtype) for size in sizes
                           for dtype in ("float32", "bfloat16")] for name, sizes in WORKLOADS.items()}}
        for name in names:
            require(name in known, f"{name}: unknown. Choose from tricks, fit, {', '.join(known)}.")
        jobs = [job for name in names or WORKLOADS for job in known[name]]
    for job in jobs:
        subprocess.run([sys.executable, __file__, "run", *job], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
