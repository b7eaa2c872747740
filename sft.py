"""Stage 1, supervised fine-tuning: learn to answer by imitating demonstrations (and plain pre-training, on
text).

    python sft.py                                   # bundled data, from random weights
    python sft.py --data=book.txt                   # pre-training on any text

Reads sft.jsonl and prompts.val.jsonl of --data; writes the model, log.jsonl and state.pt to --out.
The loss is the negative log-likelihood of what the assistant says, <|end|> included (of text: every token).
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from data import prepare
from data.batches import batch_at, map_by_length, microbatches, rng
from data.dry_run import run_dry
from data.evaluation import measure_sets, question_of
from data.examples import load_examples
from data.run import Run, check_flags, linear_lr, parse_flags, pick_device
from data.tokenizer import count_targets
from memory import all_reduce_sum, make_optimizer, phase, shard
from model import GPT, answer_prompts, exported, generate_many, make_model, negative_log_likelihood


@dataclass(slots=True)
class Config:
    init: str = "scratch"       # random weights (also scratch-llama); gpt2, smollm2-135m, ...; or a folder
    tokenizer: str = "tiny"     # of a model from scratch: tiny (bundled) or gpt2
    n_layer: int = 2            # size of a model from scratch
    n_head: int = 2
    n_embd: int = 128
    data: str = "data/tiny"     # a folder with sft.jsonl, or a file in any format that data/prepare.py knows
    out: str = "out/sft"
    device: str = "auto"        # auto: cuda, then mps, then cpu
    dtype: str = "auto"         # of weights on the device; auto: bfloat16 where the processor has it
    seed: int = 0
    steps: int = 3000
    batch: int = 24             # rows per step
    microbatch: int = 0         # rows at once, 0: all; changes memory, not the gradient
    block_size: int = 256       # tokens of context; longer rows lose their beginning
    lr: float = 3e-3            # peak; for GPT-2 124M about 3e-5
    warmup: int = 50            # steps
    weight_decay: float = 0.1
    grad_clip: float = 1.0      # global norm
    checkpoint: bool = False    # recompute activations in backward: less memory, a third more time
    offload: str = "none"       # optimizer: 32-bit state on the host; all: the weights, too (and checkpoint)
    lora_rank: int = 0          # above 0: learn adapters of this rank instead of the matrices
    dry_run: bool = False       # print what a step takes in memory, for any size, without a GPU or weights
    resume: bool = False        # go on from out/state.pt
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500


# --- evaluation ---------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, val, cfg, device):
    """-> the mean of -log p over all held-out targets, in nats; None where there are none."""
    def nll_of(examples):
        return negative_log_likelihood(model, examples, device).sum(1).tolist()
    nll = map_by_length(nll_of, val, cfg.microbatch or cfg.batch, length=lambda example: len(example[0]))
    return sum(nll) / count_targets(val) if val else None


def print_samples(model, tokenizer, prompts, val, cfg, n=4):
    """What the model says to a few held-out prompts, or its continuation of held-out text."""
    if prompts:
        shown = [question_of(row) for row in prompts[:n]]
        replies = answer_prompts(model, tokenizer, cfg, prompts[:n])
    else:
        beginnings = [idx[:cfg.block_size // 4] for idx, _ in val[:n]]
        shown = [tokenizer.decode(ids) for ids in beginnings]
        replies = generate_many(model, beginnings, cfg.block_size // 2, tokenizer.end, rng(cfg.seed), n)
    for text, reply in zip(shown, replies):
        tqdm.write(f"    {text!r} -> {tokenizer.decode(reply)!r}")


# --- training -----------------------------------------------------------------------------------------------

def learn(model, batch, n, cfg, device):
    """Gradients of the summed loss over a batch of (idx, targets), divided by n; returns the batch's own
    mean, in nats a target.

    n is how many targets a batch has on average. Rows of one batch are of similar length: divided by the
    batch's own number of targets, a token of a short reply would weigh many times one of a long reply.
    """
    total = 0.0
    for examples in microbatches(batch, cfg.microbatch):
        nll = negative_log_likelihood(model, examples, device).sum()
        (nll / n).backward()
        total += nll.item()
    return all_reduce_sum(total)[0] / count_targets(batch)


def dry_iteration(cfg, device, dtype):
    """One step at full length, for a dry run."""
    model, _ = make_model(cfg, GPT, device, dtype)
    optimizer = make_optimizer(model, cfg)
    phase("update")
    batch = [([0] * cfg.block_size, [0] * cfg.block_size)] * cfg.batch
    learn(model, batch, cfg.batch * cfg.block_size, cfg, device)
    optimizer.step(cfg.lr, cfg.grad_clip)


def main(cfg):
    check_flags(cfg)
    if cfg.dry_run:
        return run_dry(cfg, dry_iteration)
    device, dtype = pick_device(cfg.device, cfg.dtype)
    model, tokenizer = make_model(cfg, GPT, device, dtype)
    shard(model, device)
    train, val, val_characters = load_examples(cfg, tokenizer)
    prompts = prepare.load(cfg.data, "prompts", optional=True)[1]
    lengths = tuple(len(idx) for idx, _ in train)
    n = count_targets(train) / len(train) * cfg.batch
    print(f"{sum(p.numel() for p in model.parameters()):,} weights; {cfg.steps} steps x {cfg.batch} rows = "
          f"{cfg.steps * cfg.batch / len(train):.1f} epochs")

    optimizer = make_optimizer(model, cfg, betas=(0.9, 0.95))
    run = Run(cfg, device)
    if run.state:
        optimizer.load_state_dict(run.state["optimizer"])
    elif val:
        print(f"before training: val_loss {validate(model, val, cfg, device):.4f} "
              f"(ln V = {math.log(model.cfg.vocab_size):.4f})")
    with run:
        for step in run.steps("sft"):
            batch = [train[i] for i in batch_at(step, lengths, cfg.batch, cfg.seed)]
            loss = learn(model, batch, n, cfg, device)
            lr = linear_lr(step, cfg)
            norm = optimizer.step(lr, cfg.grad_clip)
            run.end_step(sum(len(idx) for idx, _ in batch), loss=loss, grad_norm=norm)

            if run.due("log"):
                run.report(f"loss {loss:.4f} | norm {norm:.2f} | lr {lr:.1e}",
                           loss=loss, grad_norm=norm, lr=lr)
            if run.due("eval") and run.done < cfg.steps:
                if val:
                    run.report_evaluation(val_loss=validate(model, val, cfg, device))
                print_samples(model, tokenizer, prompts, val, cfg)
            if run.due("save"):
                run.save(*exported(model), optimizer=optimizer)

    summary = {"val_loss": validate(model, val, cfg, device)}
    summary |= measure_sets(prompts, partial(answer_prompts, model, tokenizer, cfg), tokenizer)
    if val_characters:
        summary["val_loss_per_character"] = summary["val_loss"] * count_targets(val) / val_characters
    print_samples(model, tokenizer, prompts, val, cfg, n=8)
    return run.finish(**summary)


if __name__ == "__main__":
    main(parse_flags(Config))
