"""Where the bytes live.

Training one weight with AdamW in float32 takes 16 bytes: 4 for the weight, 4 for its gradient, 4 for each of
two moments. PPO trains two of its four networks: 16 + 16 + 4 + 4 = 40 bytes, for GPT-2 124M 4.6 GiB, before
a single activation. The tricks below bring that down. Two of them change results (bfloat16 rounds, LoRA
learns fewer weights), the others at most the order in which numbers are added:

    bfloat16                                 2 bytes a weight, 2 its gradient; 4 for the optimizer's master
    OffloadedAdamW(params, lr, ...)          on the host: 4 master + 4 gradient + 8 moments
    stream(model, device)                    also the 2 bytes on the host; two blocks at a time on the device
    checkpoint(function, x)                  keeps 2 C bytes a token of a block, its input, instead of 32 C
    token_logprobs(hidden, weight, targets)  no (tokens x vocabulary) matrix: 4 V bytes a token, 200 kB
    lookup(weight, idx)                      the gradient of the rows a batch read, not of (vocabulary x C)
    LoRA (in model.py)                       16 bytes for adapters only; four models share two sets of weights
    shard(model, device)                     under torchrun: each of N processes keeps an N-th of all of it

`--dry_run` counts all of it, for any size, without a GPU and without the memory: data/dry_run.py.
"""
import copy
import math
import os
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

# --- labels for whoever is counting -------------------------------------------------------------------------

TRACKERS = []                    # the counts in progress: usually none
MEMORY_TAGS = ["activations"]    # a stack: the last one labels new tensors


@contextmanager
def memory_tag(name):
    """Tensors made inside are counted as `name`: weights, optimizer, KV cache, logits."""
    MEMORY_TAGS.append(name)
    try:
        yield
    finally:
        MEMORY_TAGS.pop()


def phase(name):
    """Tell the trackers that the rollout, the scoring or the update begins here."""
    for tracker in TRACKERS:
        tracker.phase(name)


# --- many processes: torch's FSDP, Zhao et al. 2023, arXiv:2304.11277 ---------------------------------------

# torchrun starts WORLD processes. Each draws the same batches from the same seed and works on its own rows,
# [RANK::WORLD]. A sum over a batch is a sum over the processes, so WORLD of them train as one would.
# (An empty variable counts as unset, and a rank alone, which other launchers set, means nothing.)
try:
    WORLD = int(os.environ.get("WORLD_SIZE") or 1)
    RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
except ValueError as error:
    raise SystemExit(f"WORLD_SIZE or RANK: {error}. Start processes with torchrun, or unset both.") from None
QUIET = True if RANK else None  # tqdm's `disable`: a bar on the first process only, and only in a terminal


@contextmanager
def first_process_first():
    """The first process runs the body, then the others run it and find what the first one downloaded."""
    if RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


@cache
def device_mesh(kind):
    return dist.init_device_mesh(kind, (WORLD,))


def shard(model, device):
    """Under torchrun: this process keeps its rows of each matrix; a block is whole only while it computes."""
    if WORLD > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # gradients add up in 32 bits
        for module in (*model.h, model):
            fully_shard(module, mesh=device_mesh(device.type), mp_policy=policy)
            # FSDP would average over processes; our losses are divided by the whole batch already
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


@contextmanager
def unsharded(model):
    """Inside, every process has the whole model: for sampling, where each takes its own number of steps."""
    modules = (*model.h, model) if isinstance(model, FSDPModule) else ()
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)  # FSDP's own default
            module.reshard()


def distributed_map(function, items):
    """[function(x) for x in items], each process doing its share, all of them getting all results.

    A sharded model needs every process at every step, so all take the same number of turns: where the items
    do not divide evenly, the first ones are done again.
    """
    if WORLD == 1:
        return [function(x) for x in items]
    items, results = list(items), [None] * WORLD
    turns = math.ceil(len(items) / WORLD)
    mine = [function(items[i % len(items)]) for i in range(RANK, turns * WORLD, WORLD)]
    dist.all_gather_object(results, tree_map_only(torch.Tensor, torch.Tensor.cpu, mine))
    return [x for turn in zip(*results) for x in turn][:len(items)]


def all_reduce_sum(*numbers):
    """Each number's sum over the processes."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def shard_like(tensor, p):
    """A whole tensor of p's shape -> what this process keeps of it if it is sharded as the parameter p is."""
    if not isinstance(p, DTensor):
        return tensor
    # src_data_rank=None: nothing is sent, every process has the whole already
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None).to_local()


def full_tensor(shard, p):
    """The opposite of shard_like. All processes have to call it; what was sharded arrives on the CPU."""
    if not isinstance(p, DTensor):
        return shard
    sharded = DTensor.from_local(shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    return sharded.full_tensor().cpu()


def local_shard(tensor):
    """This process's shard of a tensor; of an ordinary one, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- gradient checkpointing: Chen et al. 2016, arXiv:1604.06174 ---------------------------------------------

class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x, _):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)  # autograd records nothing inside forward: intermediate results are freed here

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        x = x.detach().requires_grad_(x.requires_grad)
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)  # adds to the .grad of the function's parameters, too
        return None, x.grad, None


def checkpoint(function, x):
    """function(x) with the same value and the same gradients, bit for bit, keeping only x for backward.

    x and function(x) are one tensor each; whatever else the function needs is bound to it (a closure, or
    functools.partial). It must be deterministic (this code base has no dropout, so there are no random
    states to restore). Costs one more forward pass.
    """
    if not torch.is_grad_enabled():
        return function(x)
    # Autograd calls backward only if some input needs a gradient. The function's parameters are not among
    # the inputs, and after a frozen embedding x needs none either: so an empty third input requires one.
    return _Checkpoint.apply(function, x, torch.empty(0, requires_grad=True))


# --- AdamW with its 32-bit state on the host: ZeRO-Offload, Ren et al. 2021, arXiv:2101.06840 ---------------

class OffloadedAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) for weights of any type, with float32 masters on `host`.

    Each gradient leaves the device the moment backward has finished it, so they never exist there together;
    the gradients of micro-batches add up on the host in float32. torch.optim.AdamW updates the masters: with
    float32 weights the result is exactly its own. Weight decay applies to matrices, not to biases and
    LayerNorm.

    host="cpu" offloads; host=None keeps masters, moments and gradients on the weights' own device. Of a
    sharded model it holds this process's shard; its state_dict() holds the whole.
    """
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, host="cpu"):
        self.params = [p for p in params if p.requires_grad]
        self.weights = [local_shard(p.detach()) for p in self.params]  # the same memory
        with memory_tag("optimizer"):
            # .to() copies only if it has to: float32 weights that are there already are their own masters
            self.masters = [w.to(host or w.device).float() for w in self.weights]
            self.states = [{"step": torch.zeros((), device=m.device), "exp_avg": torch.zeros_like(m),
                            "exp_avg_sq": torch.zeros_like(m)} for m in self.masters]
            self.staging = torch.empty(0)
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]
        # fused: a group's key, because the constructor's argument refuses the dry run's device
        groups = [{"params": matrices, "weight_decay": weight_decay, "fused": True},
                  {"params": vectors, "weight_decay": 0.0, "fused": True}]
        self.adamw = torch.optim.AdamW(groups, lr, betas, eps)
        self.adamw.state.update(zip(self.masters, self.states))
        for p, master in zip(self.params, self.masters):
            with memory_tag("gradients"):
                master.grad = torch.zeros_like(master)
            # Where gradients go: grad_hook, lookup and token_logprobs find it on the parameter. (Of a sharded
            # model the last two see FSDP's gathered weight, which has no such attribute.)
            p.accumulate_grad = partial(self._accumulate_grad, master)
            p.register_post_accumulate_grad_hook(partial(grad_hook, p))

    def _staging_like(self, like):
        """The buffer on the host, pinned for a GPU, through which everything crosses the bus. Copies to and
        from it block until they are done, which is all the synchronization that is needed."""
        if self.staging.numel() < like.numel() or self.staging.dtype != like.dtype:
            with memory_tag("optimizer"):
                self.staging = torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.is_cuda)
        return self.staging[:like.numel()].view(like.shape)

    def _accumulate_grad(self, master, grad, rows=None):
        """Add a finished gradient, or that of some rows (a slice, or indices that may repeat), to the sum."""
        grad = local_shard(grad)
        if grad.device != master.device:
            grad = self._staging_like(grad).copy_(grad)
        if isinstance(rows, torch.Tensor):
            master.grad.index_add_(0, rows.to(master.device), grad.float())
        else:
            (master.grad if rows is None else master.grad[rows]).add_(grad)

    @torch.no_grad()
    def step(self, lr, grad_clip=0.0):
        """Clip by the global norm (0: do not), update, copy the weights back -> the norm before clipping. If
        that is not finite, nothing changes; zero_grad() forgets such gradients."""
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters])
        if WORLD > 1:
            norm = norm.new_tensor(all_reduce_sum(norm.item() ** 2)[0] ** 0.5)
        if not math.isfinite(norm.item()):
            return norm.item()
        torch.nn.utils.clip_grads_with_norm_(self.masters, grad_clip or float("inf"), norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.zero_grad()
        self._update_weights()
        return norm.item()

    def zero_grad(self):
        """Forget the gradients since the last step."""
        self.adamw.zero_grad(set_to_none=False)

    def _update_weights(self):
        for weight, master in zip(self.weights, self.masters):
            if weight.device != master.device:
                weight.copy_(self._staging_like(weight).copy_(master))
            elif weight.dtype != master.dtype:
                weight.copy_(master)

    def _tensors(self):
        """(name, this process's tensor, its parameter) of all that a resume needs."""
        for i, (p, master, state) in enumerate(zip(self.params, self.masters, self.states)):
            for name, tensor in {"master": master, **state}.items():
                yield f"{i}.{name}", tensor, p if tensor.shape else None  # `step` is a number, never sharded

    @torch.no_grad()
    def state_dict(self):
        return {name: full_tensor(tensor, p) for name, tensor, p in self._tensors()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies into the tensors that are there: nothing changes its type or its device."""
        for name, tensor, p in self._tensors():
            tensor.copy_(shard_like(state[name], p))
        self._update_weights()


def grad_hook(p, leaf):
    """The gradient of p has arrived at `leaf` (p itself, or its copy on the device): pass it on, free it."""
    if leaf.grad is not None:  # None: lookup or token_logprobs took it
        p.accumulate_grad(leaf.grad)
        leaf.grad = None


def make_optimizer(model, cfg, **kwargs):
    """AdamW for what of the model is trained, its 32-bit state where --offload says."""
    host = None if cfg.offload == "none" else "cpu"
    return OffloadedAdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, host=host, **kwargs)


# --- streaming: a block's weights are on the device only while it computes ----------------------------------

class StreamedBlock:
    """A block whose weights live on the host. A call runs it on copies of them, while copies for the block
    that runs next are on their way."""
    def __init__(self, blocks, i, device, copy_stream, prefetched):
        self.blocks, self.i, self.device = blocks, i, device
        self.copy_stream, self.prefetched = copy_stream, prefetched  # shared by all blocks

    def fetch(self, i):
        """-> (copies by name, event: they have arrived)."""
        weights = {name: p.detach() for name, p in self.blocks[i].named_parameters()}
        with memory_tag("weights"):
            if self.copy_stream is None:
                return {name: w.to(self.device) for name, w in weights.items()}, None
            copies = {name: torch.empty_like(w, device=self.device) for name, w in weights.items()}
        # The allocator may have given us memory that kernels queued earlier still read: the copy waits for
        # those. It does not wait for the block that is about to be queued, and so overlaps with it.
        self.copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copy_stream):
            for name, w in weights.items():
                copies[name].copy_(w, non_blocking=True)
        return copies, self.copy_stream.record_event()

    def __call__(self, x, **kwargs):
        copies, arrived = self.prefetched.pop(self.i, None) or self.fetch(self.i)
        if arrived:  # no kernel reads the copies before they are there
            torch.cuda.current_stream().wait_event(arrived)
        # Gradients on: checkpoint() runs blocks again in backward, the last one first, so i - 1 comes next.
        following = self.i + (-1 if torch.is_grad_enabled() else 1)
        if 0 <= following < len(self.blocks):
            self.prefetched[following] = self.fetch(following)
        if torch.is_grad_enabled():
            for name, p in self.blocks[self.i].named_parameters():
                if p.requires_grad:
                    leaf = copies[name].requires_grad_()
                    leaf.register_post_accumulate_grad_hook(partial(grad_hook, p))
        # The copies are freed with the last reference, here or at the end of backward. Their memory was
        # allocated for the current stream and last used there: its next user is queued after that.
        return torch.func.functional_call(self.blocks[self.i], copies, (x,), kwargs)


def stream(model, device):
    """Keep the weights of the blocks (h), the token embedding (wte) and the output matrix, if it is another
    (lm_head), in host memory, pinned for a GPU; move the rest to `device`.

    The device then holds two blocks, one computing and one arriving, whatever the depth. (So call it before
    the optimizer is made: weights move.) The embedding
    crosses over as the rows that a batch reads (`lookup`) and as the chunks that logits need
    (`token_logprobs`). Training needs OffloadedAdamW and checkpoint() around each block: without it the graph
    would keep all copies until backward, and the order of fetching would be wrong.
    """
    cuda = device.type == "cuda"
    for name, child in model.named_children():
        if name not in ("h", "wte", "lm_head"):
            child.to(device)
    for p in [*model.h.parameters(), model.wte.weight, model.output_matrix]:
        if cuda and not p.is_pinned():
            p.data = p.data.pin_memory()
    shared = device, torch.cuda.Stream(device) if cuda else None, {}
    model.streamed_blocks = [StreamedBlock(model.h, i, *shared) for i in range(len(model.h))]


@memory_tag("weights")
def frozen_copy(model):
    """A frozen copy of the network without LoRA's adapters. Frozen weights are shared with the model, only
    trained ones are copied: with LoRA that is almost nothing."""
    # deepcopy takes what memo says for an object's id; streaming is set up anew
    memo = {id(p): torch.nn.Parameter(p.detach().clone(), False) if p.requires_grad else p
            for p in model.parameters()}
    out = copy.deepcopy(model, memo | {id(model.streamed_blocks): None})
    for module in out.modules():
        if hasattr(module, "lora_a"):
            module.lora_a = module.lora_b = None
    if model.streamed_blocks:
        stream(out, model.device)
    return out


# --- the embedding by rows, the output matrix by chunks -----------------------------------------------------

class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, idx):
        ctx.weight, ctx.idx = weight, idx
        return F.embedding(idx.to(weight.device), weight).to(idx.device)

    @staticmethod
    def backward(ctx, grad):
        ctx.weight.accumulate_grad(grad.reshape(-1, grad.size(-1)), ctx.idx.reshape(-1))
        return None, None


def lookup(weight, idx):
    """weight[idx], (V, C) and (...) -> (..., C), on idx's device, wherever the weight lives.

    Under OffloadedAdamW the gradient reaches the optimizer as the rows that were read; otherwise it is a
    (V, C) matrix as usual.
    """
    if torch.is_grad_enabled() and weight.requires_grad and hasattr(weight, "accumulate_grad"):
        return _Lookup.apply(weight, idx)
    return F.embedding(idx.to(weight.device), weight).to(idx.device)


def few_shapes(n, multiple):
    """n rounded up. A CPU plans each new shape of a matrix product, which takes longer than a small product
    does, and keeps the plan: sizes that differ little are made alike, with padding or spare rows."""
    return math.ceil(n / multiple) * multiple


MM_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8: products of 16-bit matrices in 32 bits


def mean_row(weight, device):
    """(V, C) -> the mean of its rows (C,), which vocab_chunks subtracts from each; None where nothing is to
    be gained. Softmax does not notice: all logits of a position lose the same number, h . mean. But GPT-2's
    lie near -100, where bfloat16 has steps of 0.5; without it they lie near 0, and are rounded a hundred
    times finer."""
    if weight.dtype == torch.float32 or device.type == "meta" or device.type == "cuda" and MM_OUT_DTYPE:
        return None
    return (weight.new_full((len(weight),), 1 / len(weight)) @ weight).to(device)


def vocab_chunks(weight, chunk, device):
    """weight (V, C) -> (index of the first row, up to `chunk` rows on the device, without mean_row), ..."""
    mean = mean_row(weight, device)
    for start in range(0, len(weight), chunk):
        w = weight[start:start + chunk].to(device, non_blocking=True)
        yield start, w if mean is None else w - mean


def logits_of(h, w):
    """h (N, C), w (c, C) -> h w^T, float32 (N, c)."""
    if h.is_cuda and h.dtype != torch.float32 and MM_OUT_DTYPE:
        return torch.mm(h, w.T, out_dtype=torch.float32)
    return (h @ w.T).float()


class _TokenLogprobs(torch.autograd.Function):
    """Of M positions N have a target t; a chunk has c tokens of the vocabulary. For one position, with max
    the largest logit in the chunk and sums over the chunk:

        z = sum exp(logit - max)        log Z_chunk = max + log z        log Z = logsumexp of all log Z_chunk
        log p(t) = logit_t - log Z      d log p(t) / d logits = onehot(t) - softmax

        E_chunk = max + sum exp(logit - max) (logit - max) / z, the mean logit under the chunk's softmax
        entropy = log Z - sum over chunks of (Z_chunk / Z) E_chunk
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_entropy):  # (M, C), (V, C), (M,)
        n = few_shapes(int((targets >= 0).sum()), 64)  # rows without a target cost nothing, but for a few
        rows = (targets < 0).sort(stable=True).indices[:n]  # (N,): those with a target first
        h, t = hidden[rows], targets[rows, None]  # (N, C), (N, 1): the few have target -1, and count as 0
        target_logit = torch.zeros(len(rows), dtype=torch.float32, device=hidden.device)
        log_z, mean_logit = [], []  # of each chunk, (N,)
        for start, w in vocab_chunks(weight, chunk, hidden.device):  # w (c, C)
            with memory_tag("logits"):
                logits = logits_of(h, w)  # (N, c)
                here = ((t >= start) & (t < start + len(w))).squeeze(1)  # (N,): is t in this chunk?
                target_logit += logits.gather(1, (t - start).clamp(0, len(w) - 1)).squeeze(1) * here
                largest = logits.amax(-1)
                logits.sub_(largest[:, None])  # in place from here on: faster, and less memory
                exp = logits.exp() if with_entropy else logits.exp_()
                z = exp.sum(-1)
                log_z.append(z.log() + largest)
                if with_entropy:
                    mean_logit.append(exp.mul_(logits).sum(-1) / z + largest)
                del logits, exp  # before the next chunk's
        logsumexp = torch.stack(log_z).logsumexp(0)  # (N,)
        logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        logprobs[rows] = (target_logit - logsumexp) * (t[:, 0] >= 0)
        if with_entropy:
            share = (torch.stack(log_z) - logsumexp).exp()  # (chunks, N)
            entropy[rows] = (logsumexp - (share * torch.stack(mean_logit)).sum(0)) * (t[:, 0] >= 0)
        ctx.save_for_backward(h, t, rows, logsumexp)
        ctx.weight, ctx.chunk, ctx.shape = weight, chunk, hidden.shape
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        h, t, rows, logsumexp = ctx.saved_tensors
        weight, grad_weight = ctx.weight, None
        g = grad[rows, None] * (t >= 0)  # (N, 1)
        grad_h = torch.zeros_like(h, dtype=torch.float32)  # (N, C)
        accumulate = getattr(weight, "accumulate_grad", None)
        if ctx.needs_input_grad[1] and not accumulate:
            grad_weight = torch.empty_like(weight)  # (V, C); with OffloadedAdamW it never exists
            accumulate = lambda grad, chunk: grad_weight[chunk].copy_(grad)
        for start, w in vocab_chunks(weight, ctx.chunk, h.device):
            with memory_tag("logits"):
                # g * (onehot - softmax), in the memory that held the logits (N, c)
                d = logits_of(h, w).sub_(logsumexp[:, None]).exp_().mul_(-g)
                here = (t >= start) & (t < start + len(w))
                d = d.scatter_add_(1, (t - start).clamp(0, len(w) - 1), g * here).to(w.dtype)
                grad_h += d @ w  # mean_row is no loss here either: over the vocabulary d adds up to 0
                if ctx.needs_input_grad[1]:
                    accumulate(d.T @ h, slice(start, start + len(w)))
        grad_hidden = torch.zeros(ctx.shape, dtype=h.dtype, device=h.device)
        grad_hidden[rows] = grad_h.to(h.dtype)
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(hidden, weight, targets, chunk=None, entropy=False):
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), `chunk` tokens of the vocabulary at a
    time, forward and backward, so the (tokens x vocabulary) matrix never exists.

    hidden (..., C), weight (V, C), on hidden's device or on the host, targets (...) with -1 where there is
    none. Returns float32 (logprobs, entropy) of targets' shape, 0 where there is no target; entropy is in
    nats, carries no gradient, and is computed on request.
    """
    # 16 MiB of logits, for 512 to 4,096 targets. At most 8,192 rows: with stream() they are copied here, too
    chunk = chunk or max(1024, 2**22 // max(512, targets.numel()))
    args = hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), chunk, entropy
    return tuple(x.view(targets.shape) for x in _TokenLogprobs.apply(*args))
