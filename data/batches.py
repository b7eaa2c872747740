"""Token ids -> padded batches. Which rows a step trains on, and every random number, are functions of the
seed and the place in the run, so a resumed run needs no saved random states.
"""
import functools
import hashlib
import math
import os
from itertools import accumulate, chain, cycle, islice

import torch
from tqdm import tqdm

from memory import QUIET, distributed_map


def rng(seed, *place):
    """A random generator of its own for each place in the run, as in rng(seed, "rollout", step)."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # below 2**63


def pad(rows, value=0, dtype=torch.long):
    """Lists of numbers -> (B, T), padded on the right, T a multiple of 8: with few different shapes, matrix
    products are planned once and reused, which makes a training step on a CPU a fifth faster."""
    T = math.ceil(max(map(len, rows)) / 8) * 8
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows], dtype=dtype)


def branching(groups, device, wanted=None):
    """[[row, row, ...], ...], lists of ids -> arguments of GPT.forward in which each group is one row; what
    its rows have in common at their beginning stands there, and is computed, once:

        [common | rest of row 1 | rest of row 2 | ...]

    idx, positions and branch, each (groups, T): tokens, their places in their own rows, and whose they are
    (0: everyone's, 1, 2, ...). at = (rows, columns), each (N,): where those positions of the rows are that
    are wanted, a list of positions for each row; unless given, where the rows end. Where little is in common,
    each row stands alone.
    """
    idx, positions, branch, at = [], [], [], []
    every = [row for rows in groups for row in rows]
    wanted = wanted or [[len(row) - 1] for row in every]
    places = iter(wanted)
    for i, rows in enumerate(groups):
        n = len(os.path.commonprefix(rows))
        rests = [row[n:] for row in rows]
        idx.append([*rows[0][:n], *chain(*rests)])
        positions.append([*range(n), *chain(*(range(n, n + len(rest)) for rest in rests))])
        branch.append([0] * n + [k for k, rest in enumerate(rests, 1) for _ in rest])
        shifts = accumulate(map(len, rests[:-1]), initial=0)  # how far each rest stands from its own place
        at += [(i, t + shift * (t >= n)) for shift, place in zip(shifts, places) for t in place]
    if max(map(len, idx)) * len(idx) > 0.9 * max(map(len, every)) * len(every):
        out, at = {"idx": pad(every)}, [(i, t) for i, place in enumerate(wanted) for t in place]
    else:
        out = {"idx": pad(idx), "positions": pad(positions), "branch": pad(branch)}
    return {**{name: x.to(device) for name, x in out.items()}, "at": tuple(torch.tensor(at).T.to(device))}


@functools.lru_cache(1)  # every step of an epoch asks for it
def batches(lengths, batch, seed, epoch):
    """lengths: a tuple, one for each row -> lists of `batch` row numbers that cover all rows, in random
    order. Rows of one list are of similar length, so that little is padding.

    All are full: where `batch` does not divide the rows, some rows come again.
    """
    generator = rng(seed, "batches", epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order = list(islice(cycle(order), math.ceil(len(order) / batch) * batch))
    # sorting all rows at once would make every epoch's batches alike: 50 batches, or a quarter of the rows
    pool = batch * max(1, min(50, len(order) // batch // 4))
    for i in range(0, len(order), pool):
        order[i:i + pool] = sorted(order[i:i + pool], key=lambda row: lengths[row])
    out = [order[i:i + batch] for i in range(0, len(order), batch)]
    return [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]


def batch_at(step, lengths, batch, seed):
    """The row numbers of training step `step` (from 0)."""
    per_epoch = math.ceil(len(lengths) / batch)
    return batches(lengths, batch, seed, step // per_epoch)[step % per_epoch]


def map_by_length(function, rows, batch, length=len):
    """One result for each row, in the order of `rows`, from function(some rows, i) -> one result a row.

    For work without gradients on many rows: they are sorted by length, cut into batches (i is where a batch
    begins in the sorted rows), shared among the processes, and the results put back into order.
    """
    order = sorted(range(len(rows)), key=lambda row: length(rows[row]))
    starts = tqdm(range(0, len(rows), batch), desc="evaluating", leave=False, disable=QUIET)
    parts = distributed_map(lambda i: function([rows[row] for row in order[i:i + batch]], i), starts)
    results = dict(zip(order, chain.from_iterable(parts)))
    return [results[row] for row in range(len(rows))]
