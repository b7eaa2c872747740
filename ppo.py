"""Stage 3, PPO: let the policy speak, score what it says, make what scored well more likely, stay near stage
1.

    python ppo.py                                   # bundled data; needs out/sft and out/reward
    python ppo.py --reward=check                    # rewards from the prompts' checks, without a reward model
    python ppo.py --trace                           # print replies token by token on the way

Reads prompts.jsonl of --data; writes the policy, log.jsonl and state.pt to --out. Four networks: the actor
learns, the reference is stage 1 and stays, the critic starts from the reward model and learns, the reward
model stays. Loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9), the reward of Ziegler et al. 2019,
arXiv:1909.08593, eq. 2.
"""
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import prepare
from memory import RANK, WORLD, gathered, phase, shard, spread, summed, token_logprobs
from model import (GPT, Run, Scorer, adamw, batch_at, check_common, encode_demonstration, generate,
                   generate_many, is_good, load_model, make_model, masked_mean, memory_gb,
                   negative_log_likelihood, pad, parse_flags, pick_device, place, rehearse, require, rng,
                   twin)


@dataclass(slots=True)
class Config:
    init: str = "out/sft"       # stage 1's checkpoint folder: the actor and its reference
    reward: str = "out/reward"  # stage 2's folder; check: 1 if a reply matches the prompt's check, else 0
    tokenizer: str = "tiny"     # of a model from scratch: tiny (bundled) or gpt2
    n_layer: int = 3            # size of a model from scratch
    n_head: int = 4
    n_embd: int = 128
    data: str = "data/tiny"     # a folder with prompts.jsonl, or a file in any format of data/prepare.py
    out: str = "out/ppo"
    device: str = "auto"        # auto: cuda, then mps, then cpu
    dtype: str = "auto"         # of weights on the device; auto: bfloat16 where the processor has it
    seed: int = 0
    steps: int = 110            # rollouts, each followed by `epochs` passes over it
    batch: int = 128            # replies per rollout
    minibatch: int = 32         # replies per gradient step; must divide `batch`
    microbatch: int = 0         # replies at once, 0: a minibatch; changes memory, not the gradient
    epochs: int = 2
    max_new_tokens: int = 48    # of a reply
    block_size: int = 128       # tokens of prompt and reply together; longer prompts lose their beginning
    temperature: float = 0.8    # of the policy: divides the logits in rollout, reference and update alike
    lr: float = 2e-4            # peak, decays linearly to 0; for GPT-2 124M about 1e-5
    warmup: int = 5             # rollouts
    weight_decay: float = 0.0
    grad_clip: float = 1.0      # global norm, of actor and critic each
    kl_coef: float = 0.05       # price of a nat of distance from stage 1, in units of the score
    kl_target: float = 0.0      # nats per reply; above 0 kl_coef adapts to hold it
    gamma: float = 1.0          # discount per token
    lam: float = 0.95           # GAE's lambda
    clip: float = 0.2           # of the probability ratio
    value_clip: float = 0.2
    value_coef: float = 0.5
    score_clip: float = 5.0
    missing_eos_penalty: float = 1.0    # a reply without <|end|> scores minus this
    ptx_coef: float = 0.0       # weight of stage 1's loss on stage 1's data, against forgetting
    best_of_n: int = 16         # the yardstick in the last evaluation
    eval_prompts: int = 600     # held-out prompts in the last evaluation
    checkpoint: bool = False    # recompute activations in backward: less memory, a third more time
    offload: str = "none"       # optimizer: 32-bit state on the host; all: the weights, too (and checkpoint)
    lora_rank: int = 0          # above 0: learn adapters of this rank; four models then stand on two trunks
    dry_run: bool = False       # print what a step takes in memory, for any size, without a GPU or weights
    trace: bool = False         # print a reply token by token: at first, and every `eval_every` rollouts
    resume: bool = False        # go on from out/state.pt
    log_every: int = 1
    eval_every: int = 20        # samples
    save_every: int = 20


# --- mathematics: positions are those that predict a token of the reply, mask marks them, all (B, T) --------

def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Each token pays kl_coef * log(policy / reference); each reply's last one earns the score (B,)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.size(1) - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantages (B, T): Schulman et al. 2016, arXiv:1506.02438, eq. 16."""
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t], next_value = following, values[:, t] * mask[:, t]
    return advantages


def whiten(x, mask):
    """Mean 0 and variance 1 over the mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped objective, eq. 7, summed over the mask -> (loss, share clipped, approximate KL old to
    new, ratio).

    The last three are summed over the mask as well: the caller divides by the tokens of its whole minibatch.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        share = ((clipped > unclipped) * mask).sum()
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum()
    return (torch.maximum(unclipped, clipped) * mask).sum(), share, approx_kl, (ratio.detach() * mask).sum()


def value_loss(values, old_values, returns, mask, value_clip):
    """Squared error, summed over the mask; no gain beyond value_clip from the old value."""
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * (torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum()


def k3(logprobs, ref_logprobs):
    """Schulman's estimator of KL(policy, reference), never negative: http://joschu.net/blog/kl-approx.html"""
    return (ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs)


# --- rollout ------------------------------------------------------------------------------------------------

def as_batch(prompts, replies, end, device):
    """Lists of ids -> what everything after generation works on, as a dict of tensors:

    idx (B, T), lengths (B,), ended (B,), and targets (B, T): the reply's token that each position predicts,
    or -1.
    """
    idx = pad([p + r for p, r in zip(prompts, replies)])
    targets = pad([[-1] * (len(p) - 1) + r + [-1] for p, r in zip(prompts, replies)], -1)
    batch = {"idx": idx, "targets": targets,
             "lengths": torch.tensor([len(p) + len(r) for p, r in zip(prompts, replies)]),
             "ended": torch.tensor([r[-1] == end for r in replies])}
    return {name: t.to(device) for name, t in batch.items()}


def policy_logprobs(model, batch, temperature, entropy=False):
    """(B, T) log-probabilities of the reply's tokens under the distribution that they were sampled from."""
    hidden = model(batch["idx"]) / temperature
    return token_logprobs(hidden, model.wte.weight, batch["targets"], entropy=entropy)


def rows_of(batch, rows):
    """Some rows, cut to the longest of them: no work for padding."""
    T = int(batch["lengths"][rows].max())
    return {name: t[rows] if t.dim() == 1 else t[rows, :-(-T // 8) * 8] for name, t in batch.items()}


def rows_at_once(cfg):
    return cfg.microbatch or cfg.minibatch // WORLD


def in_parts(function, batch, size):
    """function, which returns some tensors (B,) or (B, T), on `size` rows at a time; joined again."""
    B, T = batch["idx"].shape

    def part(i):
        out = function(rows_of(batch, slice(i, i + size)))
        return [x if x.dim() == 1 else F.pad(x, (0, T - x.size(1))) for x in out]
    return tuple(torch.cat(x).to(batch["idx"].device) for x in zip(*spread(part, range(0, B, size))))


def texts(batch, tokenizer):
    return [tokenizer.decode(t[t >= 0].tolist()) for t in batch["targets"]]


def scores_of(batch, reward_model, rows, tokenizer, cfg):
    """(B,) clipped scores from the reward model or the rows' checks; without an end, the penalty."""
    if reward_model:
        last = lambda b: (reward_model.last(b["idx"], b["lengths"]),)
        scores, = in_parts(last, batch, rows_at_once(cfg))
    else:
        good = [float(is_good(row, text)) for row, text in zip(rows, texts(batch, tokenizer))]
        scores = torch.tensor(good).to(batch["idx"].device)
    scores = scores.clamp(-cfg.score_clip, cfg.score_clip)
    return torch.where(batch["ended"], scores, -cfg.missing_eos_penalty)


@torch.no_grad()
def rollout(step, rows, models, tokenizer, cfg, kl_coef):
    """Let the policy answer `rows` -> the batch with everything that the update needs."""
    actor, reference, critic, reward_model = models
    device, size = actor.device, rows_at_once(cfg)
    phase("rollout")
    prompts, replies = [row["ids"] for row in rows], [None] * len(rows)
    u = torch.rand(len(rows), cfg.max_new_tokens, generator=rng(cfg.seed, "rollout", step))
    shares = [slice(rank, None, WORLD) for rank in range(WORLD)]
    with gathered(actor):
        parts = spread(lambda share: generate(actor, prompts[share], cfg.max_new_tokens, tokenizer.end,
                                              cfg.temperature, u=u[share]), shares)
    for share, part in zip(shares, parts):
        replies[share] = part
    phase("scoring")
    batch = as_batch(prompts, replies, tokenizer.end, device)
    mask = batch["mask"] = batch["targets"] >= 0
    # Scored by the function that the update calls, not taken from generation, so that the first ratio is 1.
    # Where a minibatch is the batch, and nobody asked for memory, this pass is kept as the update's first.
    with torch.set_grad_enabled(size == len(rows) and not cfg.checkpoint and cfg.offload == "none"):
        logprobs, entropy = in_parts(
            lambda b: policy_logprobs(actor, b, cfg.temperature, entropy=True), batch, size)
        values, = in_parts(lambda b: (critic.values(b["idx"]) * b["mask"],), batch, size)
    batch["logprobs"], batch["entropy"], batch["values"] = logprobs.detach(), entropy, values.detach()
    batch["ref_logprobs"] = in_parts(lambda b: policy_logprobs(reference, b, cfg.temperature), batch, size)[0]
    batch["scores"] = scores_of(batch, reward_model, rows, tokenizer, cfg)
    batch["rewards"] = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, kl_coef)
    advantages = gae(batch["rewards"], batch["values"], mask, cfg.gamma, cfg.lam)
    batch["returns"] = advantages + batch["values"]
    batch["advantages"] = whiten(advantages, mask)
    if logprobs.requires_grad:
        batch["first"] = logprobs, values
    return batch


def trace(batch, tokenizer, row=0):
    """One reply, token by token."""
    print(f"{'token':>14} {'logprob':>8} {'ref':>8} {'kl':>7} {'reward':>7} {'value':>7} {'return':>7} "
          f"{'advantage':>9}")
    names = "logprobs", "ref_logprobs", "rewards", "values", "returns", "advantages"
    for t in batch["mask"][row].nonzero().squeeze(1).tolist():
        token = batch["targets"][row, t].item()
        text = repr(tokenizer.decode([token])) if token != tokenizer.end else "<|end|>"
        lp, ref, reward, value, ret, advantage = (batch[name][row, t].item() for name in names)
        print(f"{text:>14} {lp:8.3f} {ref:8.3f} {lp - ref:7.3f} {reward:7.3f} {value:7.3f} {ret:7.3f} "
              f"{advantage:9.3f}")
    print(f"score {batch['scores'][row].item():.3f}, paid on the last token")


# --- update -------------------------------------------------------------------------------------------------

TARGET_KL = 0.02  # approximate KL from the rollout's policy at which the passes over a batch end early


def update(step, batch, models, optimizers, lr, demonstrations, cfg):
    """`epochs` passes over the batch in reshuffled minibatches -> sums of statistics, and the first ratio."""
    (actor, _, critic, _), (actor_adam, critic_adam) = models, optimizers
    device, total, first_ratio = batch["idx"].device, defaultdict(float), None
    first = batch.pop("first", None)
    generator = rng(cfg.seed, "update", step)
    phase("update")
    for epoch in range(cfg.epochs):
        for rows in torch.randperm(len(batch["idx"]), generator=generator).to(device).split(cfg.minibatch):
            stats = defaultdict(float)
            n = batch["mask"][rows].sum()
            # In the batch neighbours are of similar length.
            for part in rows.sort().values[RANK::WORLD].split(rows_at_once(cfg)):
                b = rows_of(batch, part)
                logprobs = first[0] if first else policy_logprobs(actor, b, cfg.temperature)[0]
                loss, *sums = policy_loss(logprobs, b["logprobs"], b["advantages"], b["mask"], cfg.clip)
                (loss / n).backward()  # before the critic begins: one network's activations at a time
                values, first = first[1] if first else critic.values(b["idx"]), None
                v_loss = value_loss(values, b["values"], b["returns"], b["mask"], cfg.value_clip)
                (cfg.value_coef * v_loss / n).backward()
                for name, x in zip(("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio"),
                                   (loss, v_loss, *sums)):
                    stats[name] += x.item() / n.item()
            if cfg.ptx_coef:
                drawn = torch.randint(len(demonstrations), (cfg.minibatch,), generator=generator).tolist()
                drawn = [demonstrations[i] for i in drawn]
                count = sum(t >= 0 for _, targets in drawn for t in targets)
                mine, size = drawn[RANK::WORLD], rows_at_once(cfg)
                for i in range(0, len(mine), size):
                    nll, _ = negative_log_likelihood(actor, mine[i:i + size], device)
                    (cfg.ptx_coef * nll / count).backward()
                    stats["ptx_loss"] += nll.item() / count
            stats = dict(zip(stats, summed(*stats.values())))
            require(math.isfinite(stats["policy_loss"] + stats["value_loss"]),
                    f"rollout {step + 1}: the loss is not finite. Lower --lr. {cfg.out} keeps the last good "
                    "checkpoint.")
            first_ratio = stats["ratio"] if first_ratio is None else first_ratio
            stats["grad_norm"] = actor_adam.step(lr, cfg.grad_clip)
            critic_adam.step(lr, cfg.grad_clip)
            for name, x in stats.items():
                total[name] += x
            total["updates"] += 1
            if stats["approx_kl"] > TARGET_KL:
                return total, first_ratio
    return total, first_ratio


def adapt(kl_coef, kl, cfg):
    """The proportional controller of Ziegler et al. 2019, eq. 4, with their horizon of 10,000 replies."""
    if cfg.kl_target <= 0:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * cfg.batch / 10_000)


def complaints(log, dtype):
    """Health signs that are off, each with its likely cause."""
    if abs(log["ratio_first"] - 1) > (1e-4 if dtype == torch.float32 else 1e-2):
        yield (f"first ratio {log['ratio_first']:.5f}, not 1: rollout and update disagree (temperature? "
               "dropout?)")
    if log["kl"] < -1:
        yield f"KL {log['kl']:.1f} nats a reply, below 0: the replies are not the scored policy's own"
    if log["eos_rate"] == 0:
        yield "no reply ended: is stage 1 trained on <|end|>, or --max_new_tokens too small?"
    if log["entropy"] < 0.01:
        yield f"entropy {log['entropy']:.4f}: the policy has collapsed; lower --lr or raise --kl_coef"
    if log["kl"] > 30:
        yield f"KL {log['kl']:.0f} nats a reply: too far from stage 1 to trust the score; raise --kl_coef"


# --- evaluation ---------------------------------------------------------------------------------------------

@torch.no_grad()
def judge(model, reference, reward_model, rows, tokenizer, cfg, seed):
    """The policy answers `rows` -> (replies, scores (N,), KL to the reference a reply (N,)), on the CPU."""
    prompts, size = [row["ids"] for row in rows], rows_at_once(cfg)
    cfg = replace(cfg, score_clip=math.inf)  # a yardstick has to tell good from better
    at_once = cfg.batch if cfg.microbatch else 2 * cfg.batch
    replies = generate_many(model, prompts, cfg.max_new_tokens, tokenizer.end, seed, at_once, cfg.temperature)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]) + len(replies[i]))
    batch = as_batch([prompts[i] for i in order], [replies[i] for i in order], tokenizer.end, model.device)
    scores, kl = torch.zeros(len(rows)), torch.zeros(len(rows))
    scores[order] = scores_of(batch, reward_model, [rows[i] for i in order], tokenizer, cfg).cpu()
    if model is not reference:
        ours, theirs = (in_parts(lambda b: policy_logprobs(m, b, cfg.temperature), batch, size)[0]
                        for m in (model, reference))
        kl[order] = (ours - theirs).sum(1).cpu()
    return [tokenizer.decode(r) for r in replies], scores, kl


def gold(rows, replies):
    """The share of replies that are good; None unless every row has a check."""
    return sum(map(is_good, rows, replies)) / len(rows) if all("check" in row for row in rows) else None


def win_rate(ours, theirs):
    """Per-prompt results (N,) -> (rate, low, high): a tie counts as half, the interval holds 95 %."""
    won = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    margin = 1.96 * won.std().item() / math.sqrt(len(won)) if len(won) > 1 else 1.0
    return won.mean().item(), max(0.0, won.mean().item() - margin), min(1.0, won.mean().item() + margin)


def evaluate(models, rows, tokenizer, cfg):
    """Held-out prompts: stage 1, stage 1's best of n by the same reward model, and the policy. Gold where
    there are checks; who wins is decided by gold, or by the learned score where there is none."""
    actor, reference, _, reward_model = models
    before, before_scores, _ = judge(reference, reference, reward_model, rows, tokenizer, cfg, cfg.seed + 1)
    after, after_scores, kl = judge(actor, reference, reward_model, rows, tokenizer, cfg, cfg.seed + 2)
    n = cfg.best_of_n
    many, many_scores, _ = judge(reference, reference, reward_model, [row for row in rows for _ in range(n)],
                                 tokenizer, cfg, cfg.seed + 3)
    best = [many[i * n + j] for i, j in enumerate(many_scores.view(-1, n).argmax(1).tolist())]
    judged = lambda replies: torch.tensor([float(is_good(*pair)) for pair in zip(rows, replies)])
    has_gold = gold(rows, before) is not None
    rate, low, high = win_rate(*(map(judged, (after, before)) if has_gold else (after_scores, before_scores)))
    print("held-out prompts, stage 1 -> after PPO:")
    for i in range(0, len(rows), max(1, len(rows) // 8)):
        question = rows[i]["prompt"][-1]["content"][-200:]
        print(f"    {question!r}\n        {before[i]!r} ({before_scores[i]:+.2f})\n"
              f"     -> {after[i]!r} ({after_scores[i]:+.2f})")
    return {"gold_before": gold(rows, before), "gold_after": gold(rows, after),
            "gold_best_of_n": gold(rows, best),
            "win_rate": rate, "win_rate_low": low, "win_rate_high": high, "kl": kl.mean().item(),
            "score_before": before_scores.mean().item(), "score": after_scores.mean().item(),
            "score_best_of_n": many_scores.view(-1, n).amax(1).mean().item()}


# --- training -----------------------------------------------------------------------------------------------

def check(cfg):
    check_common(cfg)
    for name in ("minibatch", "epochs", "best_of_n", "eval_prompts"):
        require(getattr(cfg, name) >= 1, f"--{name}={getattr(cfg, name)}: at least 1.")
    require(cfg.batch % cfg.minibatch == 0,
            f"--batch={cfg.batch} does not divide by --minibatch={cfg.minibatch}.")
    require(cfg.minibatch % WORLD == 0, f"--minibatch={cfg.minibatch} does not divide by {WORLD} processes.")
    require(cfg.microbatch == 0 or cfg.minibatch % cfg.microbatch == 0,
            f"--minibatch={cfg.minibatch} does not divide by --microbatch={cfg.microbatch}.")
    require(0 < cfg.max_new_tokens < cfg.block_size,
            f"--max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in "
            f"--block_size={cfg.block_size}.")
    require(cfg.temperature > 0, f"--temperature={cfg.temperature}: above 0, a policy needs probabilities.")
    for name in ("score_clip", "clip", "value_clip"):
        require(getattr(cfg, name) > 0, f"--{name}={getattr(cfg, name)}: above 0.")
    for name in ("kl_coef", "kl_target", "value_coef", "ptx_coef", "missing_eos_penalty"):
        require(getattr(cfg, name) >= 0, f"--{name}={getattr(cfg, name)}: at least 0.")
    for name in ("gamma", "lam"):
        require(0 <= getattr(cfg, name) <= 1, f"--{name}={getattr(cfg, name)}: from 0 to 1.")


def load_prompts(cfg, tokenizer):
    """-> (train rows, val rows), each with its `ids`."""
    room = cfg.block_size - cfg.max_new_tokens
    out, trimmed = prepare.load(cfg.data, "prompts"), 0
    for rows in out:
        for row in rows:
            full = len(tokenizer.prompt(row["prompt"], 10**9))
            row["ids"], trimmed = tokenizer.prompt(row["prompt"], room), trimmed + (full > room)
    require(out[0], f"{cfg.data}: no prompts.")
    require(cfg.reward != "check" or all("check" in row for row in out[0]),
            f"--reward=check: some prompts of {cfg.data} have no \"check\".")
    print(f"{len(out[0]):,} prompts, {len(out[1]):,} held out; "
          f"{trimmed} longer than {room} tokens lost their beginning")
    return out


def load_models(cfg, device, dtype):
    """-> (actor, reference, critic, reward model or None), tokenizer. The reference is the actor's twin, the
    reward model the critic's: with LoRA four models stand on two trunks."""
    actor, tokenizer = make_model(cfg, GPT, device, dtype)
    if cfg.reward == "check" or cfg.dry_run:  # the critic starts from stage 1, expecting nothing
        critic = Scorer(actor.cfg).to(dtype)
        state = {name: p for name, p in actor.state_dict().items() if "lora" not in name}
        critic.load_state_dict(state | {"score.weight": torch.zeros_like(critic.score.weight)})
    else:
        critic = load_model(cfg.reward, Scorer, dtype=dtype)
        name = critic.cfg.tokenizer
        require(name == actor.cfg.tokenizer,
                f"--reward={cfg.reward} reads {name} tokens, --init={cfg.init} writes "
                f"{actor.cfg.tokenizer} tokens. Train the reward model with --init={cfg.init}.")
        require(cfg.block_size <= critic.cfg.n_positions,
                f"--block_size={cfg.block_size}: {cfg.reward} has {critic.cfg.n_positions} positions.")
    place(critic, cfg, device)
    return (actor, twin(actor), critic, None if cfg.reward == "check" else twin(critic)), tokenizer


def optimizers_of(models, cfg):
    return [adamw(model, cfg, eps=1e-5) for model in (models[0], models[2])]


def iteration(cfg, device, dtype):
    """One rollout and its update with every prompt and every reply at full length, for a dry run."""
    models, tokenizer = load_models(cfg, device, dtype)
    optimizers, T = optimizers_of(models, cfg), cfg.block_size
    rows = [{"ids": [0] * (T - cfg.max_new_tokens), "check": ""}] * cfg.batch
    batch = rollout(0, rows, models, tokenizer, cfg, cfg.kl_coef)
    update(0, batch, models, optimizers, cfg.lr, [([0] * T, [0] * T)], cfg)


def main(cfg):
    check(cfg)
    if cfg.dry_run:
        return rehearse(cfg, iteration)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    models, tokenizer = load_models(cfg, device, dtype)
    for model in filter(None, models):
        shard(model, device)
    train, val = load_prompts(cfg, tokenizer)
    demonstrations = [e for row in prepare.load(cfg.data, "sft")[0] for e in
                      encode_demonstration(row, tokenizer, cfg.block_size)] if cfg.ptx_coef else None
    print(f"{cfg.batch} replies / {cfg.minibatch} per minibatch = {cfg.batch // cfg.minibatch} gradient "
          f"steps x {cfg.epochs} epochs, {cfg.steps} times")

    run, kl_coef = Run(cfg), cfg.kl_coef
    optimizers = optimizers_of(models, cfg)
    if run.state:
        for name, adam in zip(("actor", "critic"), optimizers):
            adam.load_state_dict(run.state[name])
        kl_coef = run.state["kl_coef"]
    say = tqdm.write
    with run:
        for step in run.steps("ppo"):
            clock = time.time()
            rows = sorted((train[i] for i in batch_at(step, (0,) * len(train), cfg.batch, cfg.seed)),
                          key=lambda row: len(row["ids"]))  # neighbours need little padding
            batch = rollout(step, rows, models, tokenizer, cfg, kl_coef)
            if cfg.trace and (step == run.start or (step + 1) % cfg.eval_every == 0):
                trace(batch, tokenizer)
            lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)) * (1 - step / cfg.steps)
            total, first_ratio = update(step, batch, models, optimizers, lr, demonstrations, cfg)

            done, mask = step + 1, batch["mask"]
            log = {name: total[name] / total["updates"] for name in total if name not in ("updates", "ratio")}
            gap = batch["logprobs"] - batch["ref_logprobs"]
            residual = masked_mean((batch["returns"] - batch["values"]) ** 2, mask)
            variance = masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)) ** 2, mask)
            replies = texts(batch, tokenizer)
            log |= {"score": batch["scores"].mean().item(), "kl": gap.sum(1).mean().item(),
                    "kl_k3": masked_mean(k3(batch["logprobs"], batch["ref_logprobs"]), mask).item(),
                    "entropy": masked_mean(batch["entropy"], mask).item(), "ratio_first": first_ratio,
                    "explained_variance": (1 - residual / variance.clamp(min=1e-8)).item(),
                    "eos_rate": batch["ended"].float().mean().item(),
                    "response_length": mask.sum(1).float().mean().item(), "kl_coef": kl_coef, "lr": lr,
                    "updates": total["updates"], "tokens_per_s": mask.sum().item() / (time.time() - clock),
                    "seconds": time.time() - run.clock, "memory_gb": memory_gb(device),
                    "gold": gold(rows, replies)}
            kl_coef = adapt(kl_coef, log["kl"], cfg)
            if done % cfg.log_every == 0 or done == cfg.steps:
                good = "" if log["gold"] is None else f"gold {log['gold']:.2f} | "
                say(f"step {done:4}/{cfg.steps} | score {log['score']:+.3f} | {good}kl {log['kl']:.2f} | "
                    f"entropy {log['entropy']:.2f} | clipped {log['clip_fraction']:.3f} | "
                    f"approx kl {log['approx_kl']:.4f} | value {log['value_loss']:.3f} | "
                    f"length {log['response_length']:.1f} | {log['tokens_per_s']:,.0f} tok/s | "
                    f"{log['memory_gb']:.2f} GB")
                run.log(step=done, **log)
            for complaint in complaints(log, dtype):
                say(f"    warning: {complaint}")
            if done % cfg.eval_every == 0:
                for i in range(0, len(rows), -(-len(rows) // 3)):
                    say(f"    {rows[i]['prompt'][-1]['content'][-200:]!r} -> {replies[i]!r} "
                        f"(score {batch['scores'][i]:+.2f}, kl {gap[i].sum():.2f})")
            if done % cfg.save_every == 0 or done == cfg.steps or run.interrupted():
                run.save(done, models[0], actor=optimizers[0], critic=optimizers[1], kl_coef=kl_coef)
                run.stop_if_interrupted()

    summary = evaluate(models, val[:cfg.eval_prompts], tokenizer, cfg) if val else {}
    return run.finish(cfg.steps, **summary)


if __name__ == "__main__":
    main(parse_flags(Config))
