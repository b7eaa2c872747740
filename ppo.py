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
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import prepare
from data.batches import batch_at, map_by_length, rng
from data.run import (Run, check_flags, linear_lr, machine, memory_gb, parse_flags, pick_device, require,
                      run_dry)
from data.tokenizer import count_targets, encode_demonstration
from memory import RANK, WORLD, all_reduce_sum, distributed_map, phase, shard, unsharded
from model import (GPT, Scorer, by_reply, exported, frozen_copy, generate, generate_many, load_model,
                   make_model, make_optimizer, negative_log_likelihood, passes, policy_logprobs, reply_states,
                   setup_training, yardsticks)


@dataclass(slots=True)
class Config:
    init: str = "out/sft"       # stage 1's checkpoint folder: the actor and its reference
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
    steps: int = 90             # rollouts, each followed by `epochs` passes over it
    batch: int = 128            # replies per rollout
    minibatch: int = 64         # replies per gradient step; must divide `batch`
    microbatch: int = 0         # replies at once, 0: a minibatch or less; changes memory, not the gradient
    epochs: int = 1
    group: int = 0              # above 1: so many replies to each prompt are compared, without a critic
    group_norm: bool = False    # divide a group's advantages by the deviation of its rewards
    max_new_tokens: int = 48    # of a reply
    block_size: int = 256       # tokens of prompt and reply together; longer prompts lose their beginning
    temperature: float = 0.7    # of the policy: divides the logits in rollout, reference and update alike
    lr: float = 5e-4            # peak, decays linearly to 0; for GPT-2 124M about 1e-5
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
    ptx_coef: float = 0.0       # weight of stage 1's loss on stage 1's data, against forgetting
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
    critic: Scorer | None           # starts from the reward model, learns to predict its score; or --group
    reward_model: Scorer | None     # stage 2, frozen; None: rewards come from the prompts' checks


# --- mathematics, on (B, R): column t is about a reply's token t; mask: has the reply so many? --------------

def masked_mean(x, mask):
    """The mean of x where mask is true, both (...). 0 where mask is empty, never 0/0."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Each token pays kl_coef * log(policy / reference); each reply's last one earns the score (B,)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.size(1) - 1 - mask.flip(1).int().argmax(1)  # (B,): the first true of the flipped mask
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
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

    -> (loss, tokens where the clip binds, approximate KL from old to new, ratio), each summed over the mask:
    the caller divides by the tokens of its whole minibatch.
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
    mask = torch.arange(max(map(len, replies))) < torch.tensor([[len(reply)] for reply in replies])
    ended = torch.tensor([reply[-1] == end for reply in replies])
    return {"rows": rows, "prompts": [row["ids"] for row in rows], "replies": replies,
            "mask": mask.to(device), "ended": ended.to(device)}


def slice_batch(batch, rows):
    """Some rows, a list of numbers, cut to the longest reply."""
    R, index = max(len(batch["replies"][i]) for i in rows), torch.tensor(rows).to(batch["mask"].device)
    return {name: [x[i] for i in rows] if isinstance(x, list) else x[index] if x.dim() == 1 else x[index, :R]
            for name, x in batch.items()}


def microbatch_size(cfg, batch=None):
    """Rows at once: cfg.microbatch. If that is 0, a process's part of a minibatch, or a quarter of it where
    the rows of a rollout differ so much in length that this saves a quarter of the work."""
    n = cfg.minibatch // WORLD
    lengths = sorted(len(p) + len(r) for p, r in zip(batch["prompts"], batch["replies"])) if batch else []
    computed = lambda n: sum(n * lengths[min(i + n, len(lengths)) - 1] for i in range(0, len(lengths), n))
    quarter = batch and n % 4 == 0 and computed(n // 4) < 0.75 * computed(n)
    return cfg.microbatch or (n // 4 if quarter else n)


def map_microbatches(function, batch, size):
    """Apply function(part of the batch), which returns a list of tensors, to `size` rows at a time, shared
    among the processes -> the tensors of all parts joined, (B,) or (B, R)."""
    B, R = batch["mask"].shape

    def run(i):
        out = function(slice_batch(batch, [*range(i, min(i + size, B))]))
        return [x if x.dim() == 1 else F.pad(x, (0, R - x.size(1))) for x in out]
    parts = distributed_map(run, range(0, B, size))
    return [torch.cat(x).to(batch["mask"].device) for x in zip(*parts)]


def score_replies(reward_model, rows, replies, tokenizer):
    """-> (B,): scores from the reward model, or 1 for a reply that passes its row's check and 0 otherwise.
    Neighbours with the same prompt are scored as one row."""
    pairs = zip(rows, replies)
    if not reward_model:
        return torch.tensor([float(passes(row, reply, tokenizer)) for row, reply in pairs])
    return reward_model.scores([[row["ids"] + reply for row, reply in group]
                                for _, group in groupby(pairs, key=lambda pair: pair[0]["ids"])])


def clip_scores(scores, ended, cfg):
    """Scores (B,) clipped to +-score_clip; a reply that did not end scores missing_eos_penalty less than the
    worst of the batch. (A fixed score for it would pay off wherever an ended reply can score lower.)"""
    scores = scores.clamp(-cfg.score_clip, cfg.score_clip)
    return torch.where(ended, scores, scores.min() - cfg.missing_eos_penalty) if cfg.missing_eos_penalty \
        else scores


def sample_replies(step, prompts, actor, tokenizer, cfg):
    """Lists of ids -> lists of ids. Each process answers its share, all of them get all replies."""
    # u chooses the tokens, see sample(). Drawn here it is the same for any number of processes.
    u = torch.rand(len(prompts), cfg.max_new_tokens, generator=rng(cfg.seed, "rollout", step))

    def answer(rank):
        mine, my_u, replies = prompts[rank::WORLD], u[rank::WORLD], []
        for i in range(0, len(mine), cfg.minibatch):  # so that short prompts stand beside short ones
            part = slice(i, i + cfg.minibatch)
            replies += generate(actor, mine[part], cfg.max_new_tokens, tokenizer.end, cfg.temperature,
                                u=my_u[part])
        return replies
    with unsharded(actor):
        shares = distributed_map(answer, range(WORLD))
    return [shares[i % WORLD][i // WORLD] for i in range(len(prompts))]


def predicted(critic, batch):
    """-> (B, R): before each token of a reply, what the critic expects of the rest."""
    return by_reply(critic.head(reply_states(critic, batch["prompts"], batch["replies"])), batch["replies"])


@torch.no_grad()
def rollout(step, rows, models, tokenizer, cfg, kl_coef):
    """The policy answers `rows` -> (batch with everything that the update needs, replies, first_pass).

    If the first gradient step takes the whole batch at once, its policy is still the one that sampled. Then
    first_pass is (logprobs, values) with their graphs, which the update need not compute again. Otherwise,
    and with checkpointing or offloading, which save memory, it is None.
    """
    actor, reference, critic, reward_model = models
    phase("rollout")
    replies = sample_replies(step, [row["ids"] for row in rows], actor, tokenizer, cfg)
    if cfg.dry_run:  # every token is 0 there, and what sisters have in common is computed once
        replies = [[i, *reply[1:]] for i, reply in enumerate(replies)]
    phase("scoring")
    batch = as_batch(rows, replies, tokenizer.end, actor.device)
    mask, size = batch["mask"], microbatch_size(cfg, batch)

    # Computed as the update does it, not taken from generation, so that the first ratio is exactly 1.
    def learning(b):
        both = policy_logprobs(actor, b["prompts"], b["replies"], cfg.temperature, entropy=True)
        return [*both, *([predicted(critic, b)] if critic else [])]

    def frozen(b):
        return [policy_logprobs(reference, b["prompts"], b["replies"], cfg.temperature)[0],
                score_replies(reward_model, b["rows"], b["replies"], tokenizer)]

    keep_graph = size == len(rows) and WORLD == 1 and not cfg.checkpoint and cfg.offload == "none"
    with torch.set_grad_enabled(keep_graph):
        logprobs, batch["entropy"], *values = map_microbatches(learning, batch, size)
    batch["logprobs"] = logprobs.detach()
    batch["ref_logprobs"], scores = map_microbatches(frozen, batch, size)
    batch["scores"] = clip_scores(scores, batch["ended"], cfg)
    batch["kl"] = batch["logprobs"] - batch["ref_logprobs"]
    batch["rewards"] = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, kl_coef)
    if critic:
        batch["values"] = values[0].detach()
        advantages = gae(batch["rewards"], batch["values"], mask, cfg.gamma, cfg.lam)
        batch["returns"] = advantages + batch["values"]
        batch["advantages"] = whiten(advantages, mask)
    else:
        # a group of equal scores teaches nothing: what is left is the KL's noise, which norm would blow up
        scores = batch["scores"].view(-1, cfg.group)
        batch["signal"] = (scores != scores[:, :1]).any(1).repeat_interleave(cfg.group)
        advantages = group_advantages(batch["rewards"].sum(1), cfg.group, cfg.group_norm) * batch["signal"]
        batch["advantages"] = advantages[:, None] * mask
    return batch, replies, (logprobs, *values) if keep_graph else None


def token_table(batch, i, tokenizer):
    """All that is known of reply i: its tokens, its score, and a column of numbers for each name."""
    names = {"logprob": "logprobs", "ref": "ref_logprobs", "kl": "kl", "reward": "rewards",
             "value": "values", "return": "returns", "advantage": "advantages"}
    reply = batch["replies"][i]
    columns = {title: [round(x, 4) for x in batch[name][i, :len(reply)].tolist()]
               for title, name in names.items() if name in batch}
    tokens = [tokenizer.decode([t]) if t != tokenizer.end else "<|end|>" for t in reply]
    return {"tokens": tokens, "score": batch["scores"][i].item(), "columns": columns}


def trace(batch, tokenizer):
    """Print the first reply, token by token."""
    reply = token_table(batch, 0, tokenizer)
    print(f"{'token':>14} " + " ".join(f"{title:>9}" for title in reply["columns"]))
    for token, *numbers in zip(reply["tokens"], *reply["columns"].values()):
        text = token if token == "<|end|>" else repr(token)
        print(f"{text:>14} " + " ".join(f"{round(x, 3) + 0.0:9.3f}" for x in numbers))  # no -0.000
    print(f"score {reply['score']:.3f}, paid on the last token")


# --- update -------------------------------------------------------------------------------------------------

def minibatches(n, cfg, generator):
    """Row numbers of each gradient step: all n rows, reshuffled in each of `epochs` passes, groups whole."""
    group = cfg.group or 1
    for _ in range(cfg.epochs):
        order = torch.randperm(n // group, generator=generator)[:, None] * group + torch.arange(group)
        yield from order.flatten().split(cfg.minibatch)


def ppo_gradients(batch, minibatch, first_pass, models, actor_learns, cfg):
    """Gradients of PPO's two losses on a minibatch (row numbers) -> statistics, tensors on the device: this
    process's part of their means over the minibatch's reply tokens."""
    stats, n = defaultdict(float), sum(len(batch["replies"][i]) for i in minibatch)
    # The batch is sorted by length: neighbours need little padding.
    for part in minibatch.sort().values[RANK::WORLD].split(microbatch_size(cfg, batch)):
        b = slice_batch(batch, part.tolist())
        if actor_learns:
            logprobs = first_pass[0] if first_pass else policy_logprobs(
                models.actor, b["prompts"], b["replies"], cfg.temperature)[0]
            sums = policy_loss(logprobs, b["logprobs"], b["advantages"], b["mask"], cfg.clip)
            (sums[0] / n).backward()  # before the critic begins: one network's activations at a time
            for name, x in zip(("policy_loss", "clip_fraction", "approx_kl", "ratio"), sums):
                stats[name] += x.detach() / n
        if models.critic:
            values = first_pass[1] if first_pass else predicted(models.critic, b)
            loss = value_loss(values, b["values"], b["returns"], b["mask"], cfg.value_clip)
            (cfg.value_coef * loss / n).backward()
            stats["value_loss"] += loss.detach() / n
    return stats


def ptx_gradients(actor, demonstrations, generator, cfg):
    """Gradients of ptx_coef times stage 1's loss on a minibatch of stage 1's data -> this process's part of
    that loss."""
    drawn = torch.randint(len(demonstrations), (cfg.minibatch,), generator=generator).tolist()
    drawn, loss, size = [demonstrations[i] for i in drawn], 0.0, microbatch_size(cfg)
    n, mine = count_targets(drawn), drawn[RANK::WORLD]
    for i in range(0, len(mine), size):
        nll = negative_log_likelihood(actor, mine[i:i + size], actor.device).sum()
        (cfg.ptx_coef * nll / n).backward()
        loss += nll.detach() / n
    return loss


def update(step, batch, first_pass, models, optimizers, lr, demonstrations, cfg):
    """Learn from rollout number `step` -> statistics: means over the gradient steps; `updates`: how many
    steps the actor took; `ratio_first`: its first ratio.

    Where the policy has moved by target_kl from the one that spoke, its gradient is dropped and it rests
    until the next rollout; the critic takes all its steps.
    """
    generator, history, updates, actor_learns = rng(cfg.seed, "update", step), defaultdict(list), 0, True
    phase("update")
    for minibatch in minibatches(len(batch["rows"]), cfg, generator):
        if not actor_learns and not models.critic:
            break
        stats = ppo_gradients(batch, minibatch, first_pass, models, actor_learns, cfg)
        first_pass = None  # the weights change now
        if cfg.ptx_coef and actor_learns:
            stats["ptx_loss"] = ptx_gradients(models.actor, demonstrations, generator, cfg)
        numbers = torch.stack([*stats.values()]).tolist()  # the host waits for the device here
        stats = dict(zip(stats, all_reduce_sum(*numbers)))
        if actor_learns and 0 < cfg.target_kl < stats["approx_kl"]:
            actor_learns = False
            optimizers["actor"].zero_grad()
        elif actor_learns:
            stats["grad_norm"], updates = optimizers["actor"].step(lr, cfg.grad_clip), updates + 1
        if models.critic:
            stats["value_grad_norm"] = optimizers["critic"].step(lr, cfg.grad_clip)
        for name, value in stats.items():
            require(math.isfinite(value), f"rollout {step + 1}: {name} is {value}. Lower --lr. {cfg.out} "
                                          "keeps the last good checkpoint.")
            history[name].append(value)
    ratio_first = history.pop("ratio")[0]
    means = {name: sum(values) / len(values) for name, values in history.items()}
    return means | {"ratio_first": ratio_first, "updates": updates}


def update_kl_coef(kl_coef, kl, cfg):
    """The proportional controller of Ziegler et al. 2019, section 2.2: error clipped to +-0.2."""
    if cfg.kl_target <= 0:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * cfg.batch / cfg.kl_horizon)


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


def health_warnings(log, dtype):
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
def evaluate_policy(model, reference, reward_model, rows, tokenizer, cfg, seed):
    """The policy answers `rows` -> (replies, lists of ids; scores (N,); KL from the reference, nats a reply
    (N,)), on the CPU."""
    at_once = cfg.batch if cfg.microbatch else 2 * cfg.batch
    replies = generate_many(model, [row["ids"] for row in rows], cfg.max_new_tokens, tokenizer.end, seed,
                            at_once, cfg.temperature)

    def measure(pairs, _):  # (row, reply) -> (score, KL)
        rows, replies = zip(*pairs)
        scores = score_replies(reward_model, rows, replies, tokenizer)
        kl = torch.zeros(len(rows))
        if model is not reference:
            prompts = [row["ids"] for row in rows]
            logprobs, ref_logprobs = (policy_logprobs(net, prompts, replies, cfg.temperature)[0]
                                      for net in (model, reference))
            kl = (logprobs - ref_logprobs).sum(1)
        return [*zip(scores.tolist(), kl.tolist())]
    measured = map_by_length(measure, list(zip(rows, replies)), microbatch_size(cfg),
                             length=lambda pair: (len(pair[0]["ids"]), pair[0]["ids"], len(pair[1])))
    scores, kl = torch.tensor([*zip(*measured)])
    ended = torch.tensor([reply[-1] == tokenizer.end for reply in replies])
    # unclipped, so that high scores can be compared
    return replies, clip_scores(scores, ended, replace(cfg, score_clip=math.inf)), kl


def win_rate(ours, theirs):
    """Per-prompt results (N,) -> (rate, low, high): a tie counts as half; the interval is Wilson's (1927, of
    95 %), which stays honest for few prompts and for rates of 0 and 1."""
    n, z = len(ours), 1.96
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, middle - margin, middle + margin


def evaluate(models, sets, tokenizer, cfg):
    """{set: held-out rows} -> (summary of the first set, {set: its yardsticks}, samples): of stage 1, its
    best of n by the same reward model, and the policy. Who wins is decided by the checks, or by the learned
    score where a row has none."""
    answers = lambda model, rows, seed: evaluate_policy(model, models.reference, models.reward_model, rows,
                                                        tokenizer, cfg, seed)
    named = lambda rows, replies, suffix: {f"{name}_{suffix}": share for name, share
                                           in yardsticks(rows, replies, tokenizer).items()}
    measured = {name: (answers(models.reference, rows, cfg.seed + 1),
                       answers(models.actor, rows, cfg.seed + 2)) for name, rows in sets.items()}
    table = {name: named(sets[name], before[0], "before") | named(sets[name], after[0], "after")
             for name, (before, after) in measured.items()}
    first, rows = next(iter(sets.items()))
    (before, before_scores, _), (after, after_scores, kl) = measured[first]
    n = cfg.best_of_n
    many, many_scores, _ = answers(models.reference, [row for row in rows for _ in range(n)], cfg.seed + 3)
    best = [many[i * n + j] for i, j in enumerate(many_scores.view(-1, n).argmax(1).tolist())]
    passed = lambda replies: torch.tensor([float(passes(*pair, tokenizer)) for pair in zip(rows, replies)])
    checked = all("check" in row for row in rows)
    rate, low, high = win_rate(*(map(passed, (after, before)) if checked else (after_scores, before_scores)))
    samples = [{"question": rows[i]["prompt"][-1]["content"][-200:],
                "before": tokenizer.decode(before[i]), "score_before": before_scores[i].item(),
                "after": tokenizer.decode(after[i]), "score_after": after_scores[i].item()}
               for i in range(0, len(rows), max(1, len(rows) // 8))]
    print("held-out prompts, stage 1 -> after PPO:")
    for x in samples:
        print(f"    {x['question']!r}\n        {x['before']!r} ({x['score_before']:+.2f})\n"
              f"     -> {x['after']!r} ({x['score_after']:+.2f})")
    for name, shares in table.items():
        shown = [f"{key} {shares[f'{key}_before']:.2f} -> {shares[f'{key}_after']:.2f}"
                 for key in ("right", "gold") if shares[f"{key}_before"] is not None]
        if shown:
            print(f"{len(sets[name])} prompts, {name}: {', '.join(shown)}")
    return {**table[first], **named(rows, best, "best_of_n"),
            "win_rate": rate, "win_rate_low": low, "win_rate_high": high, "kl": kl.mean().item(),
            "score_before": before_scores.mean().item(), "score": after_scores.mean().item(),
            "score_best_of_n": many_scores.view(-1, n).amax(1).mean().item()}, table, samples


# --- training -----------------------------------------------------------------------------------------------

def check_ppo_flags(cfg):
    check_flags(cfg)
    require(0 < cfg.max_new_tokens < cfg.block_size,
            f"--max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in "
            f"--block_size={cfg.block_size}.")
    require(cfg.kl_coef > 0 or not cfg.kl_target,
            f"--kl_target={cfg.kl_target} multiplies --kl_coef={cfg.kl_coef}, which would stay 0.")
    if cfg.group:
        require(cfg.group > 1 and cfg.minibatch % cfg.group == 0,
                f"--group={cfg.group}: two or more replies, and whole groups in --minibatch={cfg.minibatch}.")
        require(cfg.gamma == 1, f"--gamma={cfg.gamma} discounts for a critic; with --group there is none.")
    require(cfg.group or not cfg.group_norm, "--group_norm says how groups are compared: give --group=8.")
    require(cfg.temperature > 0, f"--temperature={cfg.temperature}: above 0, a policy needs probabilities.")


def load_prompts(cfg, tokenizer):
    """-> (train rows, val rows), each with its `ids`."""
    max_prompt_tokens = cfg.block_size - cfg.max_new_tokens
    out, trimmed = prepare.load(cfg.data, "prompts"), 0
    for row in out[0] + out[1]:
        ids = tokenizer.prompt(row["prompt"], 10**9)  # uncut
        row["ids"], trimmed = ids[-max_prompt_tokens:], trimmed + (len(ids) > max_prompt_tokens)
    require(out[0], f"{cfg.data}: no prompts.")
    require(cfg.reward != "check" or all("check" in row for row in out[0] + out[1]),
            f"--reward=check: some prompts of {cfg.data} have no \"check\".")
    print(f"{len(out[0]):,} prompts, {len(out[1]):,} held out; "
          f"{trimmed} longer than {max_prompt_tokens} tokens lost their beginning")
    return out


def load_models(cfg, device, dtype):
    """-> (Models, tokenizer). Reference and reward model are frozen copies of actor and critic, taken before
    these learn: with LoRA four models share two sets of weights."""
    actor, tokenizer = make_model(cfg, GPT, device, dtype)
    if cfg.reward == "check" or cfg.dry_run:  # the critic starts from stage 1 and predicts 0
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
    setup_training(critic, cfg, device)
    reward_model = None if cfg.reward == "check" else frozen_copy(critic)
    return Models(actor, frozen_copy(actor), None if cfg.group else critic, reward_model), tokenizer


def make_optimizers(models, cfg):
    """-> {"actor": its optimizer, "critic": its optimizer, if there is one}."""
    return {name: make_optimizer(getattr(models, name), cfg, eps=1e-5) for name in ("actor", "critic")
            if getattr(models, name)}


def dry_iteration(cfg, device, dtype):
    """One rollout and its update with every prompt and every reply at full length, for a dry run."""
    models, tokenizer = load_models(cfg, device, dtype)
    optimizers, T = make_optimizers(models, cfg), cfg.block_size
    # every prompt begins with another token: equal ones would be computed once
    rows = [{"ids": [i, *[0] * (T - cfg.max_new_tokens - 1)], "check": ""}
            for i in range(cfg.batch // (cfg.group or 1)) for _ in range(cfg.group or 1)]
    batch, _, first_pass = rollout(0, rows, models, tokenizer, cfg, cfg.kl_coef)
    update(0, batch, first_pass, models, optimizers, cfg.lr, [([0] * T, [0] * T)], cfg)


def main(cfg):
    check_ppo_flags(cfg)
    if cfg.dry_run:
        return run_dry(cfg, dry_iteration)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    models, tokenizer = load_models(cfg, device, dtype)
    for model in filter(None, models):
        shard(model, device)
    train, val = load_prompts(cfg, tokenizer)
    demonstrations = [e for row in prepare.load(cfg.data, "sft")[0] for e in
                      encode_demonstration(row, tokenizer, cfg.block_size)
                      if count_targets([e])] if cfg.ptx_coef else None
    require(demonstrations != [], f"--ptx_coef: no row of {cfg.data} has anything to learn from.")
    print(f"{cfg.batch} replies / {cfg.minibatch} per minibatch = {cfg.batch // cfg.minibatch} gradient "
          f"steps x {cfg.epochs} epochs, {cfg.steps} times")

    run, kl_coef, say = Run(cfg), cfg.kl_coef, tqdm.write
    optimizers = make_optimizers(models, cfg)
    if run.state:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(run.state[name])
        kl_coef = run.state["kl_coef"]
    with run:
        for step in run.steps("ppo"):
            clock = time.time()
            drawn = batch_at(step, (0,) * len(train), cfg.batch // (cfg.group or 1), cfg.seed)
            rows = sorted((train[i] for i in drawn), key=lambda row: len(row["ids"]))  # little padding
            rows = [row for row in rows for _ in range(cfg.group or 1)]
            batch, replies, first_pass = rollout(step, rows, models, tokenizer, cfg, kl_coef)
            if cfg.trace and (step == run.start or (step + 1) % cfg.eval_every == 0):
                trace(batch, tokenizer)
            lr = linear_lr(step, cfg)
            log = update(step, batch, first_pass, models, optimizers, lr, demonstrations, cfg)

            done = step + 1
            log |= rollout_statistics(batch) | {
                **yardsticks(rows, replies, tokenizer), "kl_coef": kl_coef, "lr": lr,
                "tokens_per_s": sum(map(len, replies)) / (time.time() - clock),
                "seconds": time.time() - run.clock, "memory_gb": memory_gb(device)}
            kl_coef = update_kl_coef(kl_coef, log["kl"], cfg)
            if done % cfg.log_every == 0 or done == cfg.steps:
                shares = "".join(f"{name} {log[name]:.2f} | " for name in ("right", "gold")
                                 if log[name] is not None)
                say(f"step {done:4}/{cfg.steps} | score {log['score']:+.3f} | {shares}kl {log['kl']:.2f} | "
                    f"entropy {log['entropy']:.2f} | clipped {log['clip_fraction']:.3f} | "
                    f"approx kl {log['approx_kl']:.4f} | "
                    + (f"no signal {log['groups_without_signal']:.2f} | " if cfg.group
                       else f"value {log['value_loss']:.3f} | ") +
                    f"length {log['response_length']:.1f} | {log['tokens_per_s']:,.0f} tok/s | "
                    f"{log['memory_gb']:.2f} GB")
                run.log(step=done, **log)
            for warning in health_warnings(log, dtype):
                say(f"    warning: {warning}")
                run.log(step=done, warning=warning)
            if step == run.start or done % cfg.eval_every == 0:
                some = range(0, len(rows), math.ceil(len(rows) / 8))  # short prompts, middling and long ones
                tables = [{"question": rows[i]["prompt"][-1]["content"][-200:],
                           **token_table(batch, i, tokenizer)} for i in some]
                run.log(step=done, rollouts=tables, flags=run.cfg, machine=machine(device))
            if done % cfg.eval_every == 0:
                for i in range(0, len(rows), math.ceil(len(rows) / 3)):
                    question, reply = rows[i]["prompt"][-1]["content"][-200:], tokenizer.decode(replies[i])
                    say(f"    {question!r} -> {reply!r} "
                        f"(score {batch['scores'][i]:+.2f}, kl {batch['kl'][i].sum():.2f})")
            if run.save_due(done):
                run.save(done, *exported(models.actor), **optimizers, kl_coef=kl_coef)

    summary = {}
    if val:
        sets = {name: rows[:cfg.eval_prompts] for name, rows in prepare.by_set(val).items()}
        summary, table, samples = evaluate(models, sets, tokenizer, cfg)
        run.log(step=cfg.steps, sets=table, samples=samples)
    return run.finish(cfg.steps, **summary)


if __name__ == "__main__":
    main(parse_flags(Config))
