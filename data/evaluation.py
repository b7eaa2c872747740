"""What is measured of replies and shown to a person: yardsticks, win rate, best of n, the reward model's
accuracy and calibration, samples, a reply token by token, health signs.

No networks: a policy arrives as its replies, a reward model as its scores.
"""
import math
import re
import signal
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.prepare import by_set


# --- yardsticks: regular expressions, which training never sees ---------------------------------------------

@contextmanager
def time_limit(seconds):
    """TimeoutError inside after so long, by a signal: there is no limit on Windows, nor in a thread."""
    def give_up(*_):
        raise TimeoutError
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    old_handler = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)


@cache  # once a row
def report_slow_check(check, prompt):
    print(f"check {check!r} of prompt {prompt!r}: matching took over a second and was given up; such replies "
          "do not pass. Rewrite the check without nested repetition.", file=sys.stderr)


def passes_check(row, text, name="check"):
    """Does the reply match the row's `name`, a regular expression, in full? Training uses "check" in
    ppo.py --reward=check only, and "right" never."""
    try:
        with time_limit(1):  # some expressions try exponentially many ways to match
            return re.fullmatch(row[name], text) is not None
    except TimeoutError:
        report_slow_check(row[name], row["prompt"][-1]["content"])
        return False


def passes(row, reply, tokenizer):
    """Is the reply, a list of ids, good: does it end, has it no other control token, does its text match?"""
    whole = reply[-1] == tokenizer.end and all(t in tokenizer.ordinary for t in reply[:-1])
    return whole and passes_check(row, tokenizer.decode(reply))


def yardsticks(rows, replies, tokenizer):
    """Replies, lists of ids -> {"right": the share that gives a right answer somewhere, "gold": the share
    that is good}, of the rows that have "right" and "check"; None where none has."""
    right = [passes_check(row, tokenizer.decode(reply), "right") for row, reply in zip(rows, replies)
             if "right" in row]
    good = [passes(row, reply, tokenizer) for row, reply in zip(rows, replies) if "check" in row]
    return {"right": sum(right) / len(right) if right else None,
            "gold": sum(good) / len(good) if good else None}


def measure_sets(rows, answer, tokenizer):
    """Print the yardsticks of each set that the rows name, where answer(rows of one set) -> replies; return
    those of the first."""
    first = None
    for name, members in by_set(row for row in rows if "check" in row or "right" in row).items():
        shares = yardsticks(members, answer(members), tokenizer)
        shown = ", ".join(f"{name} {x:.2f}" for name, x in shares.items() if x is not None)
        print(f"{len(members)} prompts, {name}: {shown}")
        first = first or shares
    return first or {"right": None, "gold": None}


# --- one policy beside another ------------------------------------------------------------------------------

class Answers(NamedTuple):
    """What a policy says to some rows: lists of ids, and each reply's score and KL from stage 1, (N,)."""
    replies: list
    scores: torch.Tensor
    kl: torch.Tensor


def best_of(answers, n):
    """Answers to rows that each stand there n times -> those with the best score, one for each row."""
    best = answers.scores.view(-1, n).argmax(1) + n * torch.arange(len(answers.scores) // n)
    return Answers([answers.replies[i] for i in best.tolist()], answers.scores[best], answers.kl[best])


def win_rate(ours, theirs):
    """Per-prompt results (N,) -> (rate, low, high): a tie counts as half; the interval is Wilson's (1927, of
    95 %), which stays honest for few prompts and for rates of 0 and 1."""
    n, z = len(ours), 1.96
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, middle - margin, middle + margin


def compare(rows, before, after, best, tokenizer):
    """Answers of stage 1, of the policy, and stage 1's best of n, to the same rows -> summary. Who wins is
    decided by the checks, or by the learned score where a row has none."""
    summary = {}
    for suffix, answers in (("before", before), ("after", after), ("best_of_n", best)):
        for name, share in yardsticks(rows, answers.replies, tokenizer).items():
            summary[f"{name}_{suffix}"] = share
    ours, theirs = after.scores, before.scores
    if all("check" in row for row in rows):
        ours, theirs = (torch.tensor([passes(row, reply, tokenizer) for row, reply in zip(rows, x.replies)])
                        for x in (after, before))
    summary["win_rate"], summary["win_rate_low"], summary["win_rate_high"] = win_rate(ours, theirs)
    return summary | {"kl": after.kl.mean().item(), "score_before": before.scores.mean().item(),
                      "score": after.scores.mean().item(), "score_best_of_n": best.scores.mean().item()}


def print_before_after(name, rows, before, after, tokenizer):
    """Print the yardsticks of one set of rows; return them."""
    before, after = (yardsticks(rows, answers.replies, tokenizer) for answers in (before, after))
    shown = [f"{key} {before[key]:.2f} -> {after[key]:.2f}" for key in before if before[key] is not None]
    if shown:
        print(f"{len(rows)} prompts, {name}: {', '.join(shown)}")
    return {f"{key}_before": x for key, x in before.items()} | {f"{key}_after": x for key, x in after.items()}


def question_of(row):
    return row["prompt"][-1]["content"][-200:]


def print_samples(rows, before, after, tokenizer, n=8):
    """Print some questions with both answers; return them."""
    samples = [{"question": question_of(rows[i]),
                "before": tokenizer.decode(before.replies[i]), "score_before": before.scores[i].item(),
                "after": tokenizer.decode(after.replies[i]), "score_after": after.scores[i].item()}
               for i in range(0, len(rows), max(1, len(rows) // n))]
    print("held-out prompts, stage 1 -> after PPO:")
    for x in samples:
        print(f"    {x['question']!r}\n        {x['before']!r} ({x['score_before']:+.2f})\n"
              f"     -> {x['after']!r} ({x['score_after']:+.2f})")
    return samples


# --- a rollout ----------------------------------------------------------------------------------------------

def token_table(batch, i, tokenizer):
    """All that is known of reply i: its tokens, its score, and a column of numbers for each name."""
    names = {"logprob": "logprobs", "ref": "ref_logprobs", "kl": "kl", "reward": "rewards",
             "value": "values", "return": "returns", "advantage": "advantages"}
    reply = batch["replies"][i]
    columns = {title: [round(x, 4) for x in batch[name][i, :len(reply)].tolist()]
               for title, name in names.items() if name in batch}
    tokens = [tokenizer.decode([t]) if t != tokenizer.end else tokenizer.chat.end for t in reply]
    return {"tokens": tokens, "score": batch["scores"][i].item(), "columns": columns}


def trace(table):
    """Print a token_table()."""
    print(f"{'token':>14} " + " ".join(f"{title:>9}" for title in table["columns"]))
    for token, *numbers in zip(table["tokens"], *table["columns"].values()):
        text = token if re.fullmatch(r"<\|\w+\|>", token) else repr(token)
        print(f"{text:>14} " + " ".join(f"{round(x, 3) + 0.0:9.3f}" for x in numbers))  # no -0.000
    print(f"score {table['score']:.3f}, paid on the last token")


def show_rollout(batch, tokenizer, traced, n=8):
    """Print some replies, to short prompts, middling and long ones, and if `traced` the first one token by
    token; return n of them as tables."""
    rows = batch["rows"]
    shown = range(0, len(rows), math.ceil(len(rows) / n))
    tables = [{"question": question_of(rows[i]), **token_table(batch, i, tokenizer)} for i in shown]
    if traced:
        trace(tables[0])
    for i, table in [*zip(shown, tables)][::3]:
        tqdm.write(f"    {table['question']!r} -> {tokenizer.decode(batch['replies'][i])!r} "
                   f"(score {table['score']:+.2f}, kl {sum(table['columns']['kl']):.2f})")
    return tables


def rollout_line(log):
    """What the terminal shows of PPO's log."""
    shares = "".join(f"{name} {log[name]:.2f} | " for name in ("right", "gold") if log[name] is not None)
    return f"score {log['score']:+.2f} | {shares}kl {log['kl']:.2f} | length {log['response_length']:.1f}"


def health_warnings(log, dtype):
    """Signs in a rollout's log that are off, each with its likely cause."""
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


# --- a reward model -----------------------------------------------------------------------------------------

def accuracy_table(rows, margin):
    """-> {skill: (pairs, accuracy, ceiling)} with "all" last.

    Labels are noisy: a row's "agreement" is the probability that a rater chooses as its label says. Whoever
    knows the raters' taste exactly sides with most of them, and is right where that is above 1/2. The share
    of such rows is the ceiling; None where agreement is not known.
    """
    groups, table = defaultdict(list), {}
    for i, row in enumerate(rows):
        if row.get("skill"):
            groups[row["skill"]].append(i)
    for skill, members in [*sorted(groups.items()), ("all", [*range(len(rows))])]:
        ceiling = None
        if all("agreement" in rows[i] for i in members):
            ceiling = sum(rows[i]["agreement"] > 0.5 for i in members) / len(members)
        table[skill] = len(members), (margin[members] > 0).float().mean().item(), ceiling
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
