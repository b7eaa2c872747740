"""Stage 2, the reward model: learn from pairs which reply people prefer.

    python reward.py                                # bundled data, starts from out/sft
    python reward.py --dpo --lr=1e-4 --steps=1000   # a policy straight from the pairs, in out/dpo

Reads preferences.jsonl and prompts.jsonl of --data; writes the model, log.jsonl and state.pt to --out. Loss
(Bradley & Terry 1952; Stiennon et al. 2020, arXiv:2009.01325): -log sigmoid(score(chosen) - score(rejected)).
A model that only guesses has loss ln 2 = 0.693 and accuracy 0.5; noisy labels set a ceiling below 1.

DPO (Rafailov et al. 2023, arXiv:2305.18290): the policy is its own reward model. Same pairs, same loss.
"""
import os
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import prepare
from data.batches import batch_at, map_by_length
from data.run import Run, check_flags, linear_lr, memory_gb, parse_flags, pick_device, require, run_dry
from memory import QUIET, RANK, WORLD, all_reduce_sum, phase, shard
from model import (GPT, Scorer, evaluate_replies, exported, frozen_copy, generate_many, load_model,
                   make_model, make_optimizer, policy_logprobs, setup_training)


@dataclass(slots=True)
class Config:
    init: str = "out/sft"       # stage 1's checkpoint folder, a hub's GPT-2 (gpt2, ...), or scratch
    tokenizer: str = "tiny"     # of a model from scratch: tiny (bundled) or gpt2
    n_layer: int = 2            # size of a model from scratch
    n_head: int = 2
    n_embd: int = 128
    data: str = "data/tiny"     # a folder with preferences.jsonl, or a file in any format of data/prepare.py
    out: str = "out/reward"     # with --dpo out/dpo, unless you say otherwise
    device: str = "auto"        # auto: cuda, then mps, then cpu
    dtype: str = "auto"         # of weights on the device; auto: bfloat16 where the processor has it
    seed: int = 0
    steps: int = 2400
    batch: int = 64             # pairs per step
    microbatch: int = 0         # pairs at once, 0: all; changes memory, not the gradient
    block_size: int = 256       # tokens of context; longer dialogues lose their beginning
    lr: float = 1e-3            # peak; for GPT-2 124M about 1e-5
    warmup: int = 100           # steps
    weight_decay: float = 0.1
    grad_clip: float = 1.0      # global norm
    dpo: bool = False           # learn a policy instead of a reward model
    beta: float = 1.0           # of DPO: score that a nat of log(policy / stage 1) is; 0.1 for large models
    checkpoint: bool = False    # recompute activations in backward: less memory, a third more time
    offload: str = "none"       # optimizer: 32-bit state on the host; all: the weights, too (and checkpoint)
    lora_rank: int = 0          # above 0: learn adapters of this rank and the head instead of the matrices
    dry_run: bool = False       # print what a step takes in memory, for any size, without a GPU or weights
    resume: bool = False        # go on from out/state.pt
    log_every: int = 50
    eval_every: int = 1000
    save_every: int = 500


# --- data ---------------------------------------------------------------------------------------------------

def encode_pair(row, tokenizer, block_size):
    """-> ids of (prompt, chosen, rejected). A prompt that is too long loses its beginning, as much as the
    longer reply asks for; None if that is all of it."""
    replies = [tokenizer.encode(row[side]) + [tokenizer.end] for side in ("chosen", "rejected")]
    room = block_size - max(map(len, replies))
    return (tokenizer.prompt(row["prompt"], room), *replies) if room > 1 else None  # <|assistant|> is not all


def load_pairs(cfg, tokenizer):
    """-> (train rows, val rows), each row with its `ids`. Ties teach nothing and are dropped."""
    out, cut = [], 0
    for rows in prepare.load(cfg.data, "preferences"):
        for row in tqdm(rows, desc="encoding", leave=False, disable=QUIET):
            row["ids"] = encode_pair(row, tokenizer, cfg.block_size)
        fit = [row for row in rows if row["ids"]]
        out.append([row for row in fit if row["ids"][1] != row["ids"][2]])
        cut += sum(row["ids"][0][0] != tokenizer.user for row in out[-1])  # it begins a whole dialogue
        for n, what in ((len(rows) - len(fit), f"whose longer reply alone fills {cfg.block_size} tokens"),
                        (len(fit) - len(out[-1]), "of equal replies")):
            if n:
                print(f"dropped {n:,} pairs {what}")
    require(out[0], f"{cfg.data}: no pair to learn from at --block_size={cfg.block_size}.")
    print(f"{len(out[0]):,} pairs, {len(out[1]):,} held out; in {cut:,} the prompt lost its beginning to fit "
          f"{cfg.block_size} tokens")
    return out


def tokens_of_pair(pair):
    """What the two dialogues take as one row: see branching()."""
    return sum(map(len, pair)) - len(os.path.commonprefix(pair[1:]))


# --- mathematics --------------------------------------------------------------------------------------------

def score_pairs(model, pairs, reference=None, beta=0.0):
    """[ids of (prompt, chosen, rejected), ...] -> (score(chosen), score(rejected)), each float32 (B,). A pair
    is one row with two branches: its prompt is computed once.

    With a reference, model is a policy and the score beta * log(model / reference) of the whole reply:
    Rafailov et al., eq. 5, without a term that both replies share.
    """
    if not reference:
        return model.scores([[p + c, p + r] for p, c, r in pairs]).view(-1, 2).unbind(1)
    sides = [(p, reply) for p, *both in pairs for reply in both]
    with torch.no_grad():
        ref_logprobs = policy_logprobs(reference, *zip(*sides))[0]
    return (beta * (policy_logprobs(model, *zip(*sides))[0] - ref_logprobs).sum(1)).view(-1, 2).unbind(1)


# The loss ignores what both replies' scores have in common, but PPO clips scores: keep it small.
CENTER = 0.01


def bradley_terry(chosen, rejected):
    """Scores, each (B,) -> (-log sigmoid(chosen - rejected), (chosen + rejected)^2), both summed.

    The second, times CENTER, keeps scores near 0: Eisenstein et al. 2023, arXiv:2312.09244, sec. 2.
    """
    return -F.logsigmoid(chosen - rejected).sum(), (chosen + rejected).square().sum()


@torch.no_grad()
def evaluate_margins(model, rows, size, reference=None, beta=0.0):
    """score(chosen) - score(rejected) of each row, float32 on the CPU."""
    def margins(pairs, _):
        chosen, rejected = score_pairs(model, pairs, reference, beta)
        return (chosen - rejected).tolist()
    return torch.tensor(map_by_length(margins, [row["ids"] for row in rows], size, length=tokens_of_pair))


def accuracy_table(rows, margin):
    """-> {skill: (pairs, accuracy, ceiling)} with "all" last.

    A row's "agreement" is the probability that a rater chooses as its label says. Labels are noisy: a model
    that knows the raters' taste exactly is right where it is above 1/2: their share is the ceiling (or None).
    """
    groups, table = defaultdict(list), {}
    for i, row in enumerate(rows):
        groups[row.get("skill", "")].append(i)
    groups.pop("", None)
    for skill, members in [*sorted(groups.items()), ("all", range(len(rows)))]:
        known = all("agreement" in rows[i] for i in members)
        ceiling = sum(rows[i]["agreement"] > 0.5 for i in members) / len(members) if known else None
        table[skill] = len(members), (margin[list(members)] > 0).float().mean().item(), ceiling
    return table


def calibration(margin, bins=5):
    """-> [(pairs, predicted, observed)] by confidence: the predicted and the real share of right rankings."""
    confidence, right = margin.abs().sigmoid(), (margin > 0).float()
    edges = torch.linspace(0.5, 1, bins + 1)
    which = torch.bucketize(confidence, edges[1:-1])
    return [(int(m.sum()), confidence[m].mean().item(), right[m].mean().item())
            for m in (which == b for b in range(bins)) if m.any()]


def report(rows, margin):
    """Print accuracy by skill and calibration; return (accuracy, ceiling, calibration)."""
    table, bins = accuracy_table(rows, margin), calibration(margin)
    print(f"{'skill':20} {'pairs':>6} {'accuracy':>9} {'ceiling':>8}")
    for skill, (n, accuracy, ceiling) in table.items():
        print(f"{skill:20} {n:6} {accuracy:9.3f} {'unknown' if ceiling is None else f'{ceiling:.3f}':>8}")
    print("confidence: " + ", ".join(f"{predicted:.2f} -> right {observed:.2f} ({n} pairs)"
                                     for n, predicted, observed in bins))
    return *table["all"][1:], bins


@torch.no_grad()
def mean_sft_score(model, cfg, tokenizer, device, dtype, n=512):
    """The average score of --init's own replies; None if it is scratch, or if there are no prompts."""
    prompts = prepare.load(cfg.data, "prompts", optional=True)[0][:n]
    if cfg.init == "scratch" or not prompts:
        return None
    sft, new = load_model(cfg.init, GPT, dtype=dtype), cfg.block_size // 2
    shard(setup_training(sft, replace(cfg, lora_rank=0), device), device)  # as --offload says
    prompts = [tokenizer.prompt(row["prompt"], cfg.block_size - new) for row in prompts]
    replies = generate_many(sft, prompts, new, tokenizer.end, cfg.seed, cfg.microbatch or 4 * cfg.batch)
    rows = sorted((p + r for p, r in zip(prompts, replies)), key=len)
    scores = map_by_length(lambda rows, _: model.scores([[row] for row in rows]).tolist(), rows,
                           cfg.microbatch or cfg.batch)
    return torch.tensor(scores).mean().item()


# --- training -----------------------------------------------------------------------------------------------

def learn(model, batch, cfg, reference=None):
    """Gradients of the mean of loss + CENTER * penalty over a batch of pairs of ids -> (the mean loss alone,
    how many pairs are ranked right). DPO's scores are log-probabilities: nothing to keep near 0."""
    loss, right, size, mine = 0.0, 0, cfg.microbatch or cfg.batch, batch[RANK::WORLD]
    for i in range(0, len(mine), size):
        chosen, rejected = score_pairs(model, mine[i:i + size], reference, cfg.beta)
        pair_loss, penalty = bradley_terry(chosen, rejected)
        ((pair_loss + CENTER * penalty * (not reference)) / len(batch)).backward()
        loss += pair_loss.item() / len(batch)
        right += (chosen > rejected).sum().item()
    return all_reduce_sum(loss, right)


def load_models(cfg, device, dtype):
    """-> (what learns, DPO's reference or None, tokenizer)."""
    model, tokenizer = make_model(cfg, GPT if cfg.dpo else Scorer, device, dtype)
    return model, frozen_copy(model) if cfg.dpo else None, tokenizer


def dry_iteration(cfg, device, dtype):
    """One step at full length, for a dry run."""
    model, reference, _ = load_models(cfg, device, dtype)
    optimizer = make_optimizer(model, cfg)
    phase("update")
    replies = [[t] * (cfg.block_size - 1) for t in (0, 1)]  # nothing in common
    learn(model, [([0], *replies)] * cfg.batch, cfg, reference)
    optimizer.step(cfg.lr, cfg.grad_clip)


def main(cfg):
    if cfg.dpo and cfg.out == Config().out:
        cfg.out = "out/dpo"  # the reward model is still needed
    check_flags(cfg)
    if cfg.dry_run:
        return run_dry(cfg, dry_iteration)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    model, reference, tokenizer = load_models(cfg, device, dtype)
    for network in filter(None, (model, reference)):
        shard(network, device)
    train, val = load_pairs(cfg, tokenizer)
    lengths = tuple(tokens_of_pair(row["ids"]) for row in train)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights; {cfg.steps} steps x {cfg.batch} pairs = "
          f"{cfg.steps * cfg.batch / len(train):.1f} epochs")

    run = Run(cfg)
    optimizer = make_optimizer(model, cfg, betas=(0.9, 0.95))
    if run.state:
        optimizer.load_state_dict(run.state["optimizer"])
    say, clock, seen, size, right, recent = tqdm.write, time.time(), 0, cfg.microbatch or cfg.batch, 0, 0
    with run:
        for step in run.steps("reward"):
            batch = [train[i]["ids"] for i in batch_at(step, lengths, cfg.batch, cfg.seed)]
            loss, correct = learn(model, batch, cfg, reference)
            right += correct
            lr = linear_lr(step, cfg)
            norm = optimizer.step(lr, cfg.grad_clip)
            run.check_finite(step, loss=loss, grad_norm=norm)
            seen += sum(len(ids) for pair in batch for ids in pair)
            recent += len(batch)

            done = step + 1
            if done % cfg.log_every == 0 or done == cfg.steps:
                speed, clock, seen = seen / (time.time() - clock), time.time(), 0
                accuracy, right, recent = right / recent, 0, 0
                say(f"step {done:5}/{cfg.steps} | loss {loss:.4f} | acc {accuracy:.3f} | norm {norm:.2f} | "
                    f"lr {lr:.1e} | {speed:,.0f} tok/s | {memory_gb(device):.2f} GB")
                run.log(step=done, loss=loss, accuracy=accuracy, grad_norm=norm, lr=lr, tokens_per_s=speed,
                        seconds=time.time() - run.clock, memory_gb=memory_gb(device))
            if val and done % cfg.eval_every == 0 and done < cfg.steps:
                margin = evaluate_margins(model, val, size, reference, cfg.beta)
                accuracy = (margin > 0).float().mean().item()
                say(f"step {done:5}/{cfg.steps} | val_accuracy {accuracy:.4f}")
                run.log(step=done, val_accuracy=accuracy)
                clock, seen = time.time(), 0
            if run.save_due(done):
                run.save(done, *exported(model), optimizer=optimizer)

    accuracy = ceiling = None
    if val:
        accuracy, ceiling, bins = report(val, evaluate_margins(model, val, size, reference, cfg.beta))
        run.log(step=cfg.steps, calibration=bins)
    if cfg.dpo:
        prompts = prepare.load(cfg.data, "prompts", optional=True)[1]
        return run.finish(cfg.steps, val_accuracy=accuracy, ceiling=ceiling,
                          **evaluate_replies(model, prompts, tokenizer, cfg))
    offset = mean_sft_score(model, cfg, tokenizer, device, dtype)
    if offset is not None:
        model.shift(-offset)
        run.save_model(*exported(model))
        print(f"scores shifted by {-offset:+.3f}: stage 1's replies now average 0")
    return run.finish(cfg.steps, val_accuracy=accuracy, ceiling=ceiling)


if __name__ == "__main__":
    main(parse_flags(Config))
