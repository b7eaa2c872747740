"""Token ids -> padded batches. Which rows a step trains on, and every random number, are functions of the
seed and the place in the run, so a resumed run needs no saved random states.
"""
import functools
import hashlib
import math
import os
from itertools import accumulate, chain, cycle, islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from memory import QUIET, RANK, WORLD, distributed_map, few_shapes


def rng(seed, *place):
    """A random generator of its own for each place in the run, as in rng(seed, "rollout", step)."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # below 2**63


# --- rows -> what the network reads -------------------------------------------------------------------------

def pad(rows, value=0, dtype=torch.long):
    """Lists of numbers -> (B, T), padded on the right."""
    T = few_shapes(max(map(len, rows)), 8)
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows], dtype=dtype)


def branching(groups, device, keep=None):
    """[[row, row, ...], ...], lists of ids -> arguments of GPT.forward in which each group is one row; what
    its rows have in common at their beginning stands there, and is computed, once:

        [common | rest of row 1 | rest of row 2 | ...]

    idx, positions and branch, each (groups, T): tokens, their places in their own rows, and whose they are
    (0: everyone's, 1, 2, ...). keep is a list of places for each row, unless given where the row ends; in the
    result keep = (rows, columns), each (N,), says where these N tokens stand now. Where little is in common,
    each row stands alone.
    """
    every = [row for rows in groups for row in rows]
    keep = keep or [[len(row) - 1] for row in every]
    keep_of_row = iter(keep)
    idx, positions, branch, kept = [], [], [], []
    for i, rows in enumerate(groups):
        n = len(os.path.commonprefix(rows))
        rests = [row[n:] for row in rows]
        idx.append([*rows[0][:n], *chain(*rests)])
        positions.append([*range(n), *chain(*(range(n, n + len(rest)) for rest in rests))])
        branch.append([0] * n + [k for k, rest in enumerate(rests, 1) for _ in rest])
        shifts = accumulate(map(len, rests[:-1]), initial=0)  # how far each rest stands from its own place
        kept += [(i, t + shift * (t >= n)) for shift, places in zip(shifts, keep_of_row) for t in places]
    if max(map(len, idx)) * len(idx) > 0.9 * max(map(len, every)) * len(every):
        out = {"idx": pad(every)}
        kept = [(i, t) for i, places in enumerate(keep) for t in places]
    else:
        out = {"idx": pad(idx), "positions": pad(positions), "branch": pad(branch)}
    out = {name: x.to(device) for name, x in out.items()}
    return out | {"keep": tuple(torch.tensor(kept).T.to(device))}


# --- which rows ---------------------------------------------------------------------------------------------

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


def microbatches(rows, size):
    """This process's rows, `size` at a time (0: all at once). Gradients add up, and are divided by the whole
    batch, so the size changes memory and time, but no result."""
    mine = rows[RANK::WORLD]
    size = size or len(mine)
    return [mine[i:i + size] for i in range(0, len(mine), size)]


def map_by_length(function, rows, batch, length=len):
    """One result for each row, in the order of `rows`, from function(some rows) -> one result a row.

    For work without gradients on many rows: they are sorted by length, cut into batches, shared among the
    processes, and the results put back into order.
    """
    order = sorted(range(len(rows)), key=lambda row: length(rows[row]))
    starts = tqdm(range(0, len(rows), batch), "evaluating", leave=False, disable=QUIET, delay=5)
    results = distributed_map(lambda i: function([rows[row] for row in order[i:i + batch]]), starts)
    results = dict(zip(order, chain.from_iterable(results)))
    return [results[row] for row in range(len(rows))]


# --- PPO's batch: a dict of lists and tensors, an entry for each reply --------------------------------------

def slice_batch(batch, rows):
    """Some replies, a list of numbers, cut to the longest."""
    R = max(len(batch["replies"][i]) for i in rows)
    index = torch.tensor(rows).to(batch["mask"].device)
    out = {}
    for name, x in batch.items():
        if isinstance(x, list):
            out[name] = [x[i] for i in rows]
        else:  # (B,) or (B, R)
            out[name] = x[index] if x.dim() == 1 else x[index, :R]
    return out


def map_microbatches(function, batch, size):
    """function(slice of the batch) -> {name: tensor (b,) or (b, r)}, for `size` replies at a time, shared
    among the processes -> the tensors of all slices joined, (B,) or (B, R)."""
    B, R = batch["mask"].shape

    def run(i):
        out = function(slice_batch(batch, [*range(i, min(i + size, B))]))
        return {name: x if x.dim() == 1 else F.pad(x, (0, R - x.size(1))) for name, x in out.items()}
    slices = distributed_map(run, range(0, B, size))
    return {name: torch.cat([x[name] for x in slices]).to(batch["mask"].device) for name in slices[0]}
