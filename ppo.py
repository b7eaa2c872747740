"""Stage 3, PPO: let the policy speak, score what it says, make what scored well more likely, stay near stage
1.

    python ppo.py                                   # bundled data; needs out/sft and out/reward
    python ppo.py --reward=check                    # rewards from the prompts' checks, without a reward model
    python ppo.py --trace                           # print replies token by token on the way
    python ppo.py --group=8                         # eight replies to a prompt, no critic: RLOO
    python ppo.py --group=8 --group_norm            # GRPO

Reads prompts.jsonl of --data; writes the policy, log.jsonl and state.pt to --out. Four networks: the actor
learns, the reference is stage 1, frozen, the critic starts from the reward model and learns, the reward model
is frozen. Losses: Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9, without an entropy bonus; reward:
Ziegler et al. 2019, arXiv:1909.08593, eq. 2. With --group the critic is left out: a reply is compared with
its sisters (RLOO: Ahmadian et al. 2024, arXiv:2402.14740; GRPO: Shao et al. 2024, arXiv:2402.03300).
"""
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import evaluation, prepare
from data.batches import batch_at, map_microbatches, microbatches, rng, slice_batch
from data.dry_run import run_dry
from data.examples import load_demonstrations, load_prompts
from data.run import Run, check_flags, linear_lr, machine, parse_flags, pick_device, require
from data.tokenizer import count_targets, same_tokens
from memory import WORLD, all_reduce_sum, frozen_copy, make_optimizer, phase, shard
from model import (GPT, Scorer, by_reply, exported, generate_many, load_model, make_model,
                   negative_log_likelihood, policy_logprobs, reply_states, setup_training)


@dataclass(slots=True)
class Config:
    init: str = "out/sft"       # stage 1's checkpoint folder, or a model by name: the actor and its reference
    reward: str = "out/reward"  # stage 2's folder; check: 1 if a reply matches the prompt's check, else 0
    tokenizer: str = "tiny"     # of a model from scratch: tiny (bundled) or gpt2
    n_layer: int = 2            # size of a model from scratch
    n_head: int = 2
    n_embd: int = 128
    data: str = "data/tiny"     # a folder with prompts.jsonl, or a file in any format of data/prepare.py
    out: str = "out/ppo"
    device: str = "auto"        # auto: cuda, then mps, then cpu
    dtype: str = "auto"         # of weights on the device; auto: bfloat16 where the processor has it
    seed: int = 0
    steps: int = 110            # rollouts, each followed by `epochs` passes over it
    batch: int = 128            # replies per rollout
    minibatch: int = 64         # replies per gradient step; must divide `batch`
    microbatch: int = 16        # replies at once, 0: a minibatch; changes memory, not the gradient
    epochs: int = 1
    group: int = 0              # above 1: so many replies to each prompt are compared, without a critic
    group_norm: bool = False    # divide a group's advantages by the deviation of its rewards
    max_new_tokens: int = 48    # of a reply
    block_size: int = 256       # tokens of prompt and reply together; longer prompts lose their beginning
    temperature: float = 0.7    # of the policy: divides the logits in rollout, reference and update alike
    lr: float = 4e-4            # peak, decays linearly to 0; for GPT-2 124M about 1e-5
    warmup: int = 5             # rollouts
    weight_decay: float = 0.0
    grad_clip: float = 1.0      # global norm, of actor and critic each
    kl_coef: float = 0.1        # score that a nat of KL from stage 1 costs
    kl_target: float = 0.0      # nats per reply; above 0 kl_coef adapts to hold it
    kl_horizon: int = 1000      # replies in which it can change by a fifth (Ziegler et al.: 10,000)
    gamma: float = 1.0          # discount per token
    lam: float = 0.95           # GAE's lambda
    clip: float = 0.2           # of the probability ratio
    target_kl: float = 0.02     # approximate KL from the rollout's policy at which the actor rests; 0: never
    value_clip: float = 0.2
    value_coef: float = 0.5
    score_clip: float = 5.0
    missing_eos_penalty: float = 1.0    # a reply without <|end|> scores this below the rollout's worst; 0: no
    ptx_coef: float = 0.0       # weight of stage 1's loss on stage 1's data ("pretraining mix")
    best_of_n: int = 16         # the yardstick in the last evaluation
    eval_prompts: int = 600     # held-out prompts in the last evaluation
    checkpoint: bool = False    # recompute activations in backward: less memory, a third more time
    offload: str = "none"       # optimizer: 32-bit state on the host; all: the weights, too (and checkpoint)
    lora_rank: int = 0          # above 0: learn adapters of this rank; four models share two sets of weights
    dry_run: bool = False       # print what a step takes in memory, for any size, without a GPU or weights
    trace: bool = False         # print a reply token by token: at first, and every `eval_every` rollouts
    resume: bool = False        # go on from out/state.pt
    log_every: int = 1
    eval_every: int = 20        # print samples
    save_every: int = 20


class Models(NamedTuple):
    actor: GPT                      # the policy: learns
    reference: GPT                  # stage 1, frozen
    critic: Scorer | None           # starts from the reward model, learns to predict its score; --group: None
    reward_model: Scorer | None     # stage 2, frozen; None: rewards come from the prompts' checks


# --- mathematics, on (B, R): column t is about a reply's token t; mask: has the reply so many? --------------

def masked_mean(x, mask):
    """The mean of x where mask is true, both (...). 0 where mask is empty, never 0/0."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Each token pays kl_coef * log(policy / reference); each reply's last one earns the score (B,)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rewards[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantages (B, R): Schulman et al. 2016, arXiv:1506.02438, eq. 16, from the end backwards.

        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1

    Beyond the last token V and A are 0, for replies that were cut off, too.
    """
    advantages, next_advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])  # (B, R), (B,)
    next_value = torch.zeros_like(next_advantage)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        advantages[:, t], next_value = next_advantage, values[:, t] * mask[:, t]
    return advantages


def whiten(x, mask):
    """Mean 0 and variance 1 over the mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def group_advantages(returns, group, norm):
    """What each reply earned (B,), those to one prompt side by side -> advantages (B,).

    RLOO: minus the mean of its sisters, which leaves the reply itself out, so that this baseline adds no
    bias. norm, GRPO: minus the group's mean, divided by its deviation.
    """
    returns = returns.view(-1, group)
    advantages = returns - returns.mean(1, keepdim=True)
    if norm:
        return (advantages / (returns.std(1, keepdim=True) + 1e-4)).flatten()
    return (advantages * group / (group - 1)).flatten()  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped objective, eq. 7:

        loss = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)),    ratio = exp(logprobs - old_logprobs)

    -> (loss, tokens where the clip binds (the second is larger), approximate KL from old to new (ratio - 1 -
    log ratio), ratio), each summed over the mask: the caller divides by the tokens of its whole minibatch.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(unclipped, clipped) * mask).sum()
    statistics = clipped > unclipped, torch.expm1(log_ratio) - log_ratio, ratio
    return loss, *((x.detach() * mask).sum() for x in statistics)


def value_loss(values, old_values, returns, mask, value_clip):
    """max((V - R)^2, (V_clipped - R)^2) / 2, summed over the mask. V_clipped is at most value_clip away from
    the old value: moving further towards R gains nothing. (Not in the paper; from OpenAI's baselines.)"""
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * (torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum()


def k3(logprobs, ref_logprobs):
    """Schulman's estimator of KL(policy, reference), never negative: http://joschu.net/blog/kl-approx.html"""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio  # exp(x) - 1 - x, whose digits would cancel for small x


# --- rollout ------------------------------------------------------------------------------------------------

def as_batch(rows, replies, end, device):
    """-> what everything after generation works on, a dict of lists and tensors: rows, prompts and replies
    (lists of ids), mask (B, R), ended (B,)."""
    lengths = torch.tensor([len(reply) for reply in replies])
    mask = torch.arange(lengths.max()) < lengths[:, None]  # true for the first tokens of each row
    ended = torch.tensor([reply[-1] == end for reply in replies])
    return {"rows": rows, "prompts": [row["ids"] for row in rows], "replies": replies,
            "mask": mask.to(device), "ended": ended.to(device)}


def score_replies(reward_model, rows, replies, tokenizer):
    """-> (B,): scores from the reward model, or 1 for a reply that passes its row's check and 0 otherwise.
    Neighbours with the same prompt are scored as one row."""
    pairs = zip(rows, replies)
    if not reward_model:
        return torch.tensor([float(evaluation.passes(row, reply, tokenizer)) for row, reply in pairs])
    return reward_model.scores([[row["ids"] + reply for row, reply in group]
                                for _, group in groupby(pairs, key=lambda pair: pair[0]["ids"])])


def penalize_unended(scores, ended, penalty):
    """Scores (B,); a reply that did not end scores `penalty` less than the worst of the batch. (A fixed score
    for it would pay off wherever an ended reply can score lower.)"""
    return torch.where(ended, scores, scores.min() - penalty) if penalty else scores


def predicted_values(critic, batch):
    """-> (B, R): before each token of a reply, what the critic expects of the rest."""
    return by_reply(critic.head(reply_states(critic, batch["prompts"], batch["replies"])), batch["replies"])


@torch.no_grad()
def respond(rows, models, tokenizer, cfg, generator):
    """The actor answers `rows` -> a batch: see as_batch(); logprobs, ref_logprobs, kl, entropy and, with a
    critic, values, each (B, R); scores (B,)."""
    actor, reference, critic, reward_model = models
    phase("rollout")
    at_once = cfg.minibatch // WORLD  # a process's share of a minibatch
    replies = generate_many(actor, [row["ids"] for row in rows], cfg.max_new_tokens, tokenizer.end, generator,
                            at_once, cfg.temperature)
    if cfg.dry_run:  # every token is 0 there, and what sisters have in common is computed once
        replies = [[i, *reply[1:]] for i, reply in enumerate(replies)]
    phase("scoring")
    batch = as_batch(rows, replies, tokenizer.end, actor.device)

    def score(b):
        # Computed as the update does it, not taken from generation, so that the first ratio is exactly 1.
        logprobs, entropy = policy_logprobs(actor, b["prompts"], b["replies"], cfg.temperature, entropy=True)
        ref_logprobs = logprobs
        if reference is not actor:
            ref_logprobs, _ = policy_logprobs(reference, b["prompts"], b["replies"], cfg.temperature)
        out = {"logprobs": logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs,
               "scores": score_replies(reward_model, b["rows"], b["replies"], tokenizer)}
        if critic:
            out["values"] = predicted_values(critic, b)
        return out
    batch |= map_microbatches(score, batch, cfg.microbatch or at_once)
    batch["kl"] = batch["logprobs"] - batch["ref_logprobs"]
    return batch


def rollout(step, rows, models, tokenizer, cfg, kl_coef):
    """-> the batch of respond() with what the update needs: rewards, advantages and, with a critic, returns,
    each (B, R)."""
    batch = respond(rows, models, tokenizer, cfg, rng(cfg.seed, "rollout", step))
    scores = batch["scores"].clamp(-cfg.score_clip, cfg.score_clip)
    largest = scores.abs().max().item()
    require(largest < 1e6, f"--reward={cfg.reward} scores a reply {largest:g}, of which no critic can learn. "
            f"Lower --score_clip={cfg.score_clip:g}, or train the reward model with a lower --lr.")
    batch["scores"] = penalize_unended(scores, batch["ended"], cfg.missing_eos_penalty)
    batch["rewards"] = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], batch["mask"],
                                     kl_coef)
    add_advantages(batch, cfg)
    return batch


def add_advantages(batch, cfg):
    """How much better than expected: than the critic expected, or than the other replies of the group."""
    mask = batch["mask"]
    if "values" in batch:
        advantages = gae(batch["rewards"], batch["values"], mask, cfg.gamma, cfg.lam)
        batch["returns"] = advantages + batch["values"]
        batch["advantages"] = whiten(advantages, mask)
    else:
        # A group of equal scores teaches nothing: its replies differ in their KL alone, which is noise, and
        # --group_norm would divide it by its own small deviation, making it as loud as a real difference.
        scores = batch["scores"].view(-1, cfg.group)
        batch["signal"] = (scores != scores[:, :1]).any(1).repeat_interleave(cfg.group)  # (B,)
        advantages = group_advantages(batch["rewards"].sum(1), cfg.group, cfg.group_norm) * batch["signal"]
        batch["advantages"] = advantages[:, None] * mask


def rollout_statistics(batch):
    """What the log says of a rollout, by the models as they were before the update."""
    mask = batch["mask"]
    out = {"score": batch["scores"].mean(), "kl": batch["kl"].sum(1).mean(),
           "kl_k3": masked_mean(k3(batch["logprobs"], batch["ref_logprobs"]), mask),
           "entropy": masked_mean(batch["entropy"], mask),
           "eos_rate": batch["ended"].float().mean(), "response_length": mask.sum(1).float().mean()}
    if "values" in batch:  # 1: the critic predicts the returns exactly; 0: no better than their mean would
        residual = masked_mean((batch["returns"] - batch["values"]) ** 2, mask)
        variance = masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)) ** 2, mask)
        out["explained_variance"] = 1 - residual / variance.clamp(min=1e-8)
    else:
        out["groups_without_signal"] = 1 - batch["signal"].float().mean()
    return dict(zip(out, torch.stack([*out.values()]).tolist()))


# --- update -------------------------------------------------------------------------------------------------

def minibatches(n, cfg, generator):
    """Row numbers of each gradient step: all n rows, reshuffled in each of `epochs` passes, groups whole."""
    group = cfg.group or 1
    for _ in range(cfg.epochs):
        order = torch.randperm(n // group, generator=generator)[:, None] * group + torch.arange(group)
        yield from order.flatten().split(cfg.minibatch)


def ppo_gradients(batch, minibatch, models, actor_learns, cfg):
    """Gradients of PPO's two losses on a minibatch (row numbers) -> statistics, tensors on the device: this
    process's share of their means over the minibatch's reply tokens."""
    n = sum(len(batch["replies"][i]) for i in minibatch)  # tokens
    stats = defaultdict(float)
    # The batch is sorted by the prompts' length: neighbours need little padding.
    for rows in microbatches(sorted(minibatch.tolist()), cfg.microbatch):
        b = slice_batch(batch, rows)
        if actor_learns:
            logprobs, _ = policy_logprobs(models.actor, b["prompts"], b["replies"], cfg.temperature)
            sums = policy_loss(logprobs, b["logprobs"], b["advantages"], b["mask"], cfg.clip)
            (sums[0] / n).backward()  # before the critic begins: one network's activations at a time
            for name, x in zip(("policy_loss", "clip_fraction", "approx_kl", "ratio"), sums):
                stats[name] += x.detach() / n
        if models.critic:
            values = predicted_values(models.critic, b)
            loss = value_loss(values, b["values"], b["returns"], b["mask"], cfg.value_clip)
            (cfg.value_coef * loss / n).backward()
            stats["value_loss"] += loss.detach() / n
    return stats


def ptx_gradients(actor, demonstrations, generator, cfg):
    """Gradients of ptx_coef times stage 1's loss on a minibatch of stage 1's data -> this process's share of
    that loss."""
    drawn = torch.randint(len(demonstrations), (cfg.minibatch,), generator=generator).tolist()
    drawn = [demonstrations[i] for i in drawn]
    loss, n = 0.0, count_targets(drawn)
    for examples in microbatches(drawn, cfg.microbatch):
        nll = negative_log_likelihood(actor, examples, actor.device).sum()
        (cfg.ptx_coef * nll / n).backward()
        loss += nll.detach() / n
    return loss


def update(step, batch, models, optimizers, lr, demonstrations, cfg):
    """Learn from rollout number `step` -> statistics: means over the gradient steps; `updates`: how many
    steps the actor took; `ratio_first`: its first ratio.

    Where the policy has moved by target_kl from the one that spoke, its gradient is dropped and it rests
    until the next rollout; the critic takes all its steps.
    """
    generator = rng(cfg.seed, "update", step)
    history, updates, actor_learns = defaultdict(list), 0, True
    phase("update")
    for minibatch in minibatches(len(batch["rows"]), cfg, generator):
        if not actor_learns and not models.critic:
            break
        stats = ppo_gradients(batch, minibatch, models, actor_learns, cfg)
        if cfg.ptx_coef and actor_learns:
            stats["ptx_loss"] = ptx_gradients(models.actor, demonstrations, generator, cfg)
        numbers = torch.stack([*stats.values()]).tolist()  # the host waits for the device here
        stats = dict(zip(stats, all_reduce_sum(*numbers)))
        if actor_learns and 0 < cfg.target_kl < stats["approx_kl"]:
            actor_learns = False
            optimizers["actor"].zero_grad()
        elif actor_learns:
            stats["grad_norm"] = optimizers["actor"].step(lr, cfg.grad_clip)
            updates += 1
        if models.critic:
            stats["value_grad_norm"] = optimizers["critic"].step(lr, cfg.grad_clip)
        for name, value in stats.items():
            history[name].append(value)
    ratio_first = history.pop("ratio")[0]
    means = {name: sum(values) / len(values) for name, values in history.items()}
    return means | {"ratio_first": ratio_first, "updates": updates}


def update_kl_coef(kl_coef, kl, cfg):
    """The proportional controller of Ziegler et al. 2019, section 2.2: error clipped to +-0.2. (Theirs could
    turn negative where a rollout has more replies than the horizon, and would pay for distance.)"""
    if cfg.kl_target <= 0:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(1, cfg.batch / cfg.kl_horizon))


# --- evaluation ---------------------------------------------------------------------------------------------

def evaluate_policy(model, models, rows, tokenizer, cfg, seed):
    """The model answers `rows` -> Answers. Scores are not clipped, so that high ones can be compared."""
    models = models._replace(actor=model, critic=None)
    batch = respond(rows, models, tokenizer, cfg, rng(seed, "evaluation"))
    scores = penalize_unended(batch["scores"], batch["ended"], cfg.missing_eos_penalty)
    return evaluation.Answers(batch["replies"], scores.cpu(), batch["kl"].sum(1).cpu())


def evaluate(models, sets, tokenizer, cfg):
    """{set: held-out rows} -> (summary of the first set, {set: its yardsticks}, samples): of stage 1, its
    best of n by the same reward model, and the policy."""
    def answers(model, rows, seed):
        return evaluate_policy(model, models, rows, tokenizer, cfg, cfg.seed + seed)
    before = {name: answers(models.reference, rows, 1) for name, rows in sets.items()}
    after = {name: answers(models.actor, rows, 2) for name, rows in sets.items()}
    first, rows = next(iter(sets.items()))
    best = before[first]
    if cfg.best_of_n > 1:
        repeated = [row for row in rows for _ in range(cfg.best_of_n)]
        best = evaluation.best_of(answers(models.reference, repeated, 3), cfg.best_of_n)
    samples = evaluation.print_samples(rows, before[first], after[first], tokenizer)
    table = {name: evaluation.print_before_after(name, rows, before[name], after[name], tokenizer)
             for name, rows in sets.items()}
    return evaluation.compare(rows, before[first], after[first], best, tokenizer), table, samples


# --- training -----------------------------------------------------------------------------------------------

def load_models(cfg, device, dtype):
    """-> (Models, tokenizer). Reference and reward model are frozen copies of actor and critic, taken before
    these learn: with LoRA four models share two sets of weights."""
    actor, tokenizer = make_model(cfg, GPT, device, dtype)
    if cfg.reward == "check" or cfg.dry_run:  # the critic starts from stage 1 and predicts 0
        critic = Scorer(actor.cfg).to(dtype)
        head = {"score.weight": torch.zeros_like(critic.score.weight)}
        state = actor.state_dict() | head
        critic.load_state_dict({name: state[name] for name in critic.state_dict()})
    else:
        critic = load_model(cfg.reward, Scorer, dtype=dtype)
        reads, writes = critic.cfg.tokenizer, actor.cfg.tokenizer
        require(same_tokens(reads, writes), f"--reward={cfg.reward} reads {reads} tokens, --init={cfg.init} "
                f"writes {writes} tokens. Train the reward model with --init={cfg.init}.")
        require(cfg.block_size <= critic.cfg.n_positions,
                f"--block_size={cfg.block_size}: {cfg.reward} has {critic.cfg.n_positions} positions.")
    setup_training(critic, cfg, device)
    reward_model = None if cfg.reward == "check" else frozen_copy(critic)
    return Models(actor, frozen_copy(actor), None if cfg.group else critic, reward_model), tokenizer


def make_optimizers(models, cfg):
    """-> {"actor": its optimizer, "critic": its optimizer, if there is one}."""
    return {name: make_optimizer(getattr(models, name), cfg, eps=1e-5) for name in ("actor", "critic")
            if getattr(models, name)}


def by_length(rows):
    """Short prompts first: neighbours need little padding."""
    return sorted(rows, key=lambda row: len(row["ids"]))


def draw_rows(step, train, cfg):
    """The rows of rollout `step`, each `group` times."""
    group = cfg.group or 1
    lengths = (0,) * len(train)  # of replies nothing is known yet: any order
    drawn = batch_at(step, lengths, cfg.batch // group, cfg.seed)
    return [row for row in by_length(train[i] for i in drawn) for _ in range(group)]


def dry_iteration(cfg, device, dtype):
    """One rollout and its update with every prompt and every reply at full length, for a dry run."""
    models, tokenizer = load_models(cfg, device, dtype)
    optimizers, T = make_optimizers(models, cfg), cfg.block_size
    # every prompt begins with another token: equal ones would be computed once
    prompts = [{"ids": [i, *[0] * (T - cfg.max_new_tokens - 1)], "check": ""} for i in range(cfg.batch)]
    batch = rollout(0, draw_rows(0, prompts, cfg), models, tokenizer, cfg, cfg.kl_coef)
    update(0, batch, models, optimizers, cfg.lr, [([0] * T, [0] * T)], cfg)


def main(cfg):
    check_flags(cfg)
    if cfg.dry_run:
        return run_dry(cfg, dry_iteration)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    models, tokenizer = load_models(cfg, device, dtype)
    for model in filter(None, models):
        shard(model, device)
    train, val = load_prompts(cfg, tokenizer)
    demonstrations = load_demonstrations(cfg, tokenizer)
    print(f"{cfg.batch} replies / {cfg.minibatch} per minibatch = {cfg.batch // cfg.minibatch} gradient "
          f"steps x {cfg.epochs} epochs, {cfg.steps} times")

    optimizers = make_optimizers(models, cfg)
    kl_coef = cfg.kl_coef
    run = Run(cfg, device)
    if run.state:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(run.state[name])  # the weights, too
        kl_coef = run.state["kl_coef"]
    with run:
        for step in run.steps("ppo"):
            rows = draw_rows(step, train, cfg)
            batch = rollout(step, rows, models, tokenizer, cfg, kl_coef)
            lr = linear_lr(step, cfg)
            log = update(step, batch, models, optimizers, lr, demonstrations, cfg)
            run.end_step(sum(map(len, batch["replies"])), **log)

            log |= rollout_statistics(batch) | evaluation.yardsticks(rows, batch["replies"], tokenizer)
            log |= {"kl_coef": kl_coef, "lr": lr}
            kl_coef = update_kl_coef(kl_coef, log["kl"], cfg)
            if run.due("log"):
                run.report(evaluation.rollout_line(log), **log)
            for warning in evaluation.health_warnings(log, dtype):
                tqdm.write(f"    warning: {warning}")
                run.log(warning=warning)
            if step == 0 or run.due("eval"):
                tables = evaluation.show_rollout(batch, tokenizer, cfg.trace)
                run.log(rollouts=tables, flags=run.cfg, machine=machine(device))
            if run.due("save"):
                run.save(*exported(models.actor), **optimizers, kl_coef=kl_coef)

    summary = {}
    if val:
        sets = {name: by_length(rows[:cfg.eval_prompts]) for name, rows in prepare.by_set(val).items()}
        summary, table, samples = evaluate(models, sets, tokenizer, cfg)
        run.log(sets=table, samples=samples)
    return run.finish(**summary)


if __name__ == "__main__":
    main(parse_flags(Config))
