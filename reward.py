"""Stage 2, the reward model: learn from pairs which reply people prefer.

    python reward.py                                # bundled data, starts from out/sft
    python reward.py --dpo --lr=1e-4 --steps=1000   # a policy straight from the pairs, in out/dpo

Reads preferences.jsonl and prompts.jsonl of --data; writes the model, log.jsonl and state.pt to --out. Loss
(Bradley & Terry 1952; Stiennon et al. 2020, arXiv:2009.01325): -log sigmoid(score(chosen) - score(rejected)).
A model that only guesses has loss ln 2 = 0.693 and accuracy 0.5; noisy labels set a ceiling below 1.

DPO (Rafailov et al. 2023, arXiv:2305.18290): the policy is its own reward model. Same pairs, same loss.
"""
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from data import hub, prepare
from data.batches import batch_at, map_by_length, microbatches
from data.dry_run import run_dry
from data.evaluation import measure_sets, report
from data.examples import load_pairs, tokens_of_pair
from data.run import Run, check_flags, linear_lr, parse_flags, pick_device
from memory import all_reduce_sum, frozen_copy, make_optimizer, phase, shard
from model import (GPT, Scorer, answer_prompts, exported, load_model, make_model, policy_logprobs,
                   setup_training)


@dataclass(slots=True)
class Config:
    init: str = "out/sft"       # stage 1's checkpoint folder, or whatever stage 1's --init may be
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
    lr: float = 6e-4            # peak; for GPT-2 124M about 1e-5
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


# --- mathematics --------------------------------------------------------------------------------------------

def score_pairs(model, pairs, reference=None, beta=0.0):
    """[ids of (prompt, chosen, rejected), ...] -> (score(chosen), score(rejected)), each float32 (B,). A pair
    is one row with two branches: its prompt is computed once.

    With a reference, model is a policy and the score beta * log(model / reference) of the whole reply:
    Rafailov et al., eq. 5, without a term that both replies share.
    """
    if not reference:
        return model.scores([[p + c, p + r] for p, c, r in pairs]).view(-1, 2).unbind(1)
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    replies = [reply for _, *replies in pairs for reply in replies]
    with torch.no_grad():
        ref_logprobs, _ = policy_logprobs(reference, prompts, replies)
    logprobs, _ = policy_logprobs(model, prompts, replies)
    return (beta * (logprobs - ref_logprobs).sum(1)).view(-1, 2).unbind(1)


# The loss ignores what both replies' scores have in common, but PPO clips scores: keep it small.
CENTER = 0.01


def bradley_terry(chosen, rejected):
    """Scores, each (B,) -> (-log sigmoid(chosen - rejected), (chosen + rejected)^2), both summed.

    The second, times CENTER, keeps scores near 0: Eisenstein et al. 2023, arXiv:2312.09244, sec. 2.
    """
    return -F.logsigmoid(chosen - rejected).sum(), (chosen + rejected).square().sum()


@torch.no_grad()
def evaluate_margins(model, rows, cfg, reference=None):
    """score(chosen) - score(rejected) of each row, float32 on the CPU."""
    def margins(pairs):
        chosen, rejected = score_pairs(model, pairs, reference, cfg.beta)
        return (chosen - rejected).tolist()
    pairs = [row["ids"] for row in rows]
    return torch.tensor(map_by_length(margins, pairs, cfg.microbatch or cfg.batch, length=tokens_of_pair))


@torch.no_grad()
def mean_sft_score(model, cfg, tokenizer, device, dtype, n=512):
    """The average score of --init's own replies; None if it is scratch, or if there are no prompts."""
    rows = prepare.load(cfg.data, "prompts", optional=True)[0][:n]
    if cfg.init in hub.SCRATCH or not rows:
        return None
    sft = load_model(cfg.init, GPT, dtype=dtype)
    shard(setup_training(sft, replace(cfg, lora_rank=0), device), device)  # as --offload says
    room = cfg.block_size - cfg.block_size // 2  # for the prompt, as in answer_prompts
    dialogues = [tokenizer.prompt(row["prompt"], room) + reply
                 for row, reply in zip(rows, answer_prompts(sft, tokenizer, cfg, rows))]

    def scores(dialogues):
        return model.scores([[dialogue] for dialogue in dialogues]).tolist()
    return torch.tensor(map_by_length(scores, dialogues, cfg.microbatch or cfg.batch)).mean().item()


# --- training -----------------------------------------------------------------------------------------------

def learn(model, batch, cfg, reference=None):
    """Gradients of the mean of loss + CENTER * penalty over a batch of pairs of ids -> (the mean loss alone,
    how many pairs are ranked right). DPO's scores are log-probabilities: nothing to keep near 0."""
    loss, right = 0.0, 0
    center = 0.0 if reference else CENTER
    for pairs in microbatches(batch, cfg.microbatch):
        chosen, rejected = score_pairs(model, pairs, reference, cfg.beta)
        pair_loss, penalty = bradley_terry(chosen, rejected)
        ((pair_loss + center * penalty) / len(batch)).backward()
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

    optimizer = make_optimizer(model, cfg, betas=(0.9, 0.95))
    run = Run(cfg, device)
    if run.state:
        optimizer.load_state_dict(run.state["optimizer"])
    right, pairs = run.state["since_report"] if run.state else (0, 0)
    with run:
        for step in run.steps("reward"):
            batch = [train[i]["ids"] for i in batch_at(step, lengths, cfg.batch, cfg.seed)]
            loss, correct = learn(model, batch, cfg, reference)
            right, pairs = right + correct, pairs + len(batch)
            lr = linear_lr(step, cfg)
            norm = optimizer.step(lr, cfg.grad_clip)
            run.end_step(sum(len(ids) for pair in batch for ids in pair), loss=loss, grad_norm=norm)

            if run.due("log"):
                run.report(f"loss {loss:.4f} | acc {right / pairs:.3f} | norm {norm:.2f} | lr {lr:.1e}",
                           loss=loss, accuracy=right / pairs, grad_norm=norm, lr=lr)
                right = pairs = 0
            if val and run.due("eval") and run.done < cfg.steps:
                margin = evaluate_margins(model, val, cfg, reference)
                run.report_evaluation(val_accuracy=(margin > 0).float().mean().item())
            if run.due("save"):
                run.save(*exported(model), optimizer=optimizer, since_report=(right, pairs))

    summary = {"val_accuracy": None, "ceiling": None}
    if val:
        summary["val_accuracy"], summary["ceiling"], bins = report(
            val, evaluate_margins(model, val, cfg, reference))
        run.log(calibration=bins)
    if cfg.dpo:
        prompts = prepare.load(cfg.data, "prompts", optional=True)[1]
        summary |= measure_sets(prompts, partial(answer_prompts, model, tokenizer, cfg), tokenizer)
        return run.finish(**summary)
    if hasattr(model.ln_f, "bias"):  # RMSNorm has none that a shift() could go to
        offset = mean_sft_score(model, cfg, tokenizer, device, dtype)
        if offset is not None:
            model.shift(-offset)
            run.save_model(*exported(model))
            print(f"scores shifted by {-offset:+.3f}: stage 1's replies now average 0")
    return run.finish(**summary)


if __name__ == "__main__":
    main(parse_flags(Config))
