"""Where the bytes live.

Training one weight with AdamW in float32 takes 16 bytes: 4 for the weight, 4 for its gradient, 4 for each of
two moments. PPO trains two networks of four, which makes 16 + 16 + 4 + 4 = 40 bytes: for GPT-2 124M 4.6 GiB,
before a single activation. But for bfloat16's rounding and LoRA's few weights, these moves change no result;
each stands alone:

    bfloat16                                 2 bytes a weight on the device; 32 bits, if at all, on the host
    OffloadedAdamW(params, lr, ...)          there: 4 master + 4 gradient + 8 moments, touched once a step
    stream(model, device)                    the 2 bytes on the host, too; two blocks at a time are visitors
    checkpoint(function, *inputs)            of a block's activations, 34 C bytes a token, keep its input, 2 C
    token_logprobs(hidden, weight, targets)  no (tokens x vocabulary) matrix: 4 V bytes a token, 200 kB
    lookup(weight, idx)                      no (vocabulary x C) gradient for the rows that a batch has read
    LoRA (in model.py)                       16 bytes for adapters only, and four models stand on two trunks
    shard(model, device)                     under torchrun: each of N processes keeps an N-th of all of it

`dry_run` counts all of it, for any size, without a GPU and without the memory.
"""
import os
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from itertools import cycle, islice
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import TorchDispatchMode

# --- names for bytes, for whoever is counting ---------------------------------------------------------------

METERS = []               # the counts in progress: usually none
OWNER = ["activations"]   # to whom new bytes belong


@contextmanager
def owner(name):
    """New tensors belong to `name`: weights, optimizer, KV cache, logits."""
    OWNER.append(name)
    try:
        yield
    finally:
        OWNER.pop()


def phase(name):
    """What follows is the rollout, the scoring, the update."""
    for meter in METERS:
        meter.phase(name)


# --- many processes: torch's FSDP, Zhao et al. 2023, arXiv:2304.11277 ---------------------------------------

# torchrun starts N processes. Each draws the same batches from the same seed and works on its rows,
# [RANK::WORLD]. Sums over a batch are sums over processes, so N of them follow one's course.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = True if RANK else None  # tqdm's `disable`: one bar is enough, and only where somebody looks


def join(kind):
    """Take part in the job -> this process's device. Only the first process prints."""
    if WORLD == 1:
        return torch.device(kind)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise SystemExit(f"torch {torch.__version__} is too old for several processes; 2.13 will do.")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    sys.excepthook = _alone
    return device


def _alone(kind, error, trace):
    """What is left to say when another process of the job has died."""
    if not (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)):
        return sys.__excepthook__(kind, error, trace)
    print(f"process {RANK}: another process of this job has ended. The last good checkpoint is whole; the "
          "same command with --resume goes on.", file=sys.stderr)


def leave():
    """The job is done: wait for the others and go at once. (Python's own way out takes its objects apart, and
    one in twenty times gloo's threads then abort.)"""
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


SUMS = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # gradients add up in 32 bits


@cache
def mesh(kind):
    return dist.init_device_mesh(kind, (WORLD,))


@contextmanager
def first_alone():
    """The first process goes ahead, the others follow when it is done."""
    if RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


def shard(model, device):
    """Under torchrun: this process keeps its rows of each matrix; a block is whole only while it computes."""
    if WORLD > 1:
        for module in (*model.h, model):
            fully_shard(module, mesh=mesh(device.type), mp_policy=SUMS)
            module.set_force_sum_reduction_for_comms(True)  # losses are divided by the whole batch already
            module.set_gradient_divide_factor(1.0)
    return model


@contextmanager
def gathered(model):
    """The whole model on every process, for replies: each takes as many steps as it likes, on its own."""
    modules = (*model.h, model) if isinstance(model, FSDPModule) else ()
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def spread(function, items):
    """[function(x) for x in items], the work divided among the processes, the results known to all. The last
    items are done twice where they do not divide: all have to meet in the same number of collective steps."""
    if WORLD == 1:
        return [function(x) for x in items]
    rounds, results = -(-len(items) // WORLD), [None] * WORLD
    mine = [function(x) for x in list(islice(cycle(items), rounds * WORLD))[RANK::WORLD]]
    dist.all_gather_object(results, _map(torch.Tensor.cpu, mine))
    return [x for round in zip(*results) for x in round][:len(items)]


def summed(*numbers):
    """Each number's sum over the processes."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def part_of(tensor, p):
    """What this process keeps of a tensor that is laid out as the parameter p."""
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None).to_local()


def whole(part, p):
    """The opposite of part_of, on the CPU. All processes have to ask for it."""
    if not isinstance(p, DTensor):
        return part
    sharded = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    return sharded.full_tensor().cpu()


def local(tensor):
    """The part that lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- gradient checkpointing: Chen et al. 2016, arXiv:1604.06174 ---------------------------------------------

class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, anchor, *inputs):
        ctx.function = function
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.other = [x for x in inputs if not isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        return function(*inputs)  # autograd records nothing inside forward: the intermediate results die here

    @staticmethod
    def backward(ctx, *grads):
        tensors, other = iter(ctx.saved_tensors), iter(ctx.other)
        inputs = [next(tensors) if is_tensor else next(other) for is_tensor in ctx.is_tensor]
        inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                  for x in inputs]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad]
        torch.autograd.backward(*zip(*pairs))  # adds to the .grad of the function's parameters, too
        return None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in inputs)


def checkpoint(function, *inputs):
    """function(*inputs) with the same value and the same gradients, bit for bit, keeping only the inputs for
    backward.

    `function` returns a tensor or a tuple of tensors and must be deterministic (this code base has no
    dropout, so no random state needs to be kept). Costs one more forward pass.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Backward is only called if some input needs a gradient. A block's parameters hide inside `function`, so
    # behind a frozen embedding nothing would: the anchor always does.
    anchor = torch.empty(0, requires_grad=True)
    return _Checkpoint.apply(function, anchor, *inputs)


# --- AdamW with its 32-bit state on the host: ZeRO-Offload, arXiv:2101.06840 --------------------------------

class OffloadedAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) for weights of any type, with float32 masters on `host`.

    Each gradient leaves the device the moment backward has finished it, so that they never exist there
    together; the gradients of micro-batches add up on the host in float32. Same trajectory as
    torch.optim.AdamW on float32 weights. Weight decay applies to matrices, not to biases and LayerNorm.

    host="cpu" offloads; host=None keeps masters, moments and gradients beside the weights. Of a sharded model
    it has this process's part only; its state_dict() has the whole.
    """
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, host="cpu"):
        self.params = [p for p in params if p.requires_grad]
        self.parts = [local(p.detach()) for p in self.params]  # the same memory
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        with owner("optimizer"):
            # .to() copies only if it has to: float32 weights on the host are their own masters.
            self.masters = [p.to(host or p.device).float() for p in self.parts]
            self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(m) for m in self.masters] for _ in range(2))
            self.steps = [torch.zeros((), device=m.device) for m in self.masters]
            self.staging = torch.empty(0)
        for p, master in zip(self.params, self.masters):
            with owner("gradients"):
                master.grad = torch.zeros_like(master)
            p.collect = partial(self._collect, master)
            p.register_post_accumulate_grad_hook(partial(hand_over, p))

    def _staged(self, like):
        """What crosses the bus does so through one buffer on the host, pinned if there is a GPU. Copies to it
        and from it block until they are done, which is all the synchronization that it needs."""
        if self.staging.numel() < like.numel() or self.staging.dtype != like.dtype:
            with owner("optimizer"):
                pinned = like.device.type == "cuda"
                self.staging = torch.empty(like.numel(), dtype=like.dtype, pin_memory=pinned)
        return self.staging[:like.numel()].view(like.shape)

    def _collect(self, master, grad, rows=None):
        """Add a finished gradient, or that of some rows (a slice, or indices that may repeat), to the sum."""
        grad = local(grad)
        if grad.device != master.device:
            grad = self._staged(grad).copy_(grad)
        if isinstance(rows, torch.Tensor):
            master.grad.index_add_(0, rows.to(master.device), grad.float())
        else:
            (master.grad if rows is None else master.grad[rows]).add_(grad)

    @torch.no_grad()
    def step(self, lr, grad_clip=0.0):
        """Clip by the global norm (0: do not), update, hand the weights back -> the norm before clipping."""
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters])
        if WORLD > 1:
            norm = norm.new_tensor(summed(norm.item() ** 2)[0] ** 0.5)
        torch.nn.utils.clip_grads_with_norm_(self.masters, grad_clip or float("inf"), norm)
        for decay in (True, False):  # torch's fused kernel does the arithmetic
            group = [i for i, m in enumerate(self.masters) if (m.dim() >= 2) == decay]
            pick = lambda tensors: [tensors[i] for i in group]
            adamw(pick(self.masters), [m.grad for m in pick(self.masters)], pick(self.exp_avgs),
                  pick(self.exp_avg_sqs), [], pick(self.steps), fused=True, amsgrad=False, maximize=False,
                  lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                  weight_decay=self.weight_decay if decay else 0.0)
        for master in self.masters:
            master.grad.zero_()
        self._publish()
        return norm.item()

    def _publish(self):
        for part, master in zip(self.parts, self.masters):
            if part.device != master.device:
                part.copy_(self._staged(part).copy_(master))
            elif part.dtype != master.dtype:
                part.copy_(master)

    STATE = "masters", "exp_avgs", "exp_avg_sqs"

    @torch.no_grad()
    def state_dict(self):
        state = {name: list(map(whole, getattr(self, name), self.params)) for name in self.STATE}
        return state | {"steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copies into the tensors that are there: nothing changes its type or its place."""
        for name in self.STATE:
            for tensor, saved, p in zip(getattr(self, name), state[name], self.params, strict=True):
                tensor.copy_(part_of(saved, p))
        for step, saved in zip(self.steps, state["steps"], strict=True):
            step.copy_(saved)
        self._publish()


def hand_over(p, leaf):
    """The gradient of p has arrived at `leaf`, p itself or its copy on the device: pass it on, free it."""
    if leaf.grad is not None:  # None: an embedding's, which went by the row
        p.collect(leaf.grad)
        leaf.grad = None


# --- streaming: weights visit the device for as long as they are at work ------------------------------------

class _Visit:
    """A block whose weights live on the host. A call runs it on copies and fetches the next one meanwhile."""
    def __init__(self, blocks, i, device, lane, ahead):
        self.blocks, self.i, self.device, self.lane, self.ahead = blocks, i, device, lane, ahead

    def fetch(self, i):
        """-> (copies by name, event: they have arrived)."""
        weights = {name: p.detach() for name, p in self.blocks[i].named_parameters()}
        with owner("weights"):
            if self.lane is None:
                return {name: w.to(self.device) for name, w in weights.items()}, None
            copies = {name: torch.empty_like(w, device=self.device) for name, w in weights.items()}
        # The allocator may have given us memory that kernels queued earlier still read: the copy waits for
        # those. It does not wait for the block that is about to be queued, and so overlaps with it.
        self.lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.lane):
            for name, w in weights.items():
                copies[name].copy_(w, non_blocking=True)
        return copies, self.lane.record_event()

    def __call__(self, *inputs):
        copies, arrived = self.ahead.pop(self.i, None) or self.fetch(self.i)
        if arrived:  # protects the copies from being read before they are there
            torch.cuda.current_stream().wait_event(arrived)
        # Backward comes from the other end: checkpoint() runs blocks again there, with gradients on.
        following = self.i + (-1 if torch.is_grad_enabled() else 1)
        if 0 <= following < len(self.blocks):
            self.ahead[following] = self.fetch(following)
        if torch.is_grad_enabled():
            for name, p in self.blocks[self.i].named_parameters():
                if p.requires_grad:
                    leaf = copies[name].requires_grad_()
                    leaf.register_post_accumulate_grad_hook(partial(hand_over, p))
        # The copies die with the last reference, here or at the end of backward. Their memory was allocated
        # for the current stream and was last used there: whoever gets it next is queued behind.
        return torch.func.functional_call(self.blocks[self.i], copies, inputs)


def stream(model, device):
    """Keep the weights of model's blocks and its embedding in (pinned) host memory; the rest moves to
    `device`.

    On the device are then two blocks, one at work and one being fetched, whatever the depth. Embeddings cross
    over as the rows that a batch reads (`lookup`) and as the pieces that a chunk of logits needs
    (`token_logprobs`). For training, use checkpoint() around each block, or the graph keeps all copies until
    backward, and OffloadedAdamW.
    """
    cuda = device.type == "cuda"
    for name, child in model.named_children():
        if name not in ("h", "wte"):
            child.to(device)
    for p in [*model.h.parameters(), model.wte.weight]:
        if cuda and not p.is_pinned():
            p.data = p.data.pin_memory()
    lane, ahead = torch.cuda.Stream(device) if cuda else None, {}
    model.visits = [_Visit(model.h, i, device, lane, ahead) for i in range(len(model.h))]


# --- the embedding, as rows and as pieces -------------------------------------------------------------------

class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, idx):
        ctx.weight, ctx.idx = weight, idx
        return F.embedding(idx.to(weight.device), weight).to(idx.device)

    @staticmethod
    def backward(ctx, grad):
        ctx.weight.collect(grad.reshape(-1, grad.size(-1)), ctx.idx.reshape(-1))
        return None, None


def lookup(weight, idx):
    """weight[idx], (V, C) and (...) -> (..., C), on idx's device, wherever the weight lives.

    An optimizer that takes gradients by the row (OffloadedAdamW) gets them so; otherwise they are as usual.
    """
    if torch.is_grad_enabled() and weight.requires_grad and hasattr(weight, "collect"):
        return _Lookup.apply(weight, idx)
    return F.embedding(idx.to(weight.device), weight).to(idx.device)


def pieces(weight, n, device):
    """(first row, n rows on the device), ... of weight (V, C)."""
    for start in range(0, len(weight), n):
        yield start, weight[start:start + n].to(device, non_blocking=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_entropy):
        rows = (targets >= 0).nonzero().squeeze(1)  # rows without a target cost nothing
        h, t = hidden[rows], targets[rows, None]
        picked, sums, means = torch.zeros(len(rows), dtype=torch.float32, device=hidden.device), [], []
        for start, w in pieces(weight, chunk, hidden.device):
            with owner("logits"):
                logits = (h @ w.T).float()
                here = ((t >= start) & (t < start + len(w))).squeeze(1)
                picked += logits.gather(1, (t - start).clamp(0, len(w) - 1)).squeeze(1) * here
                largest = logits.amax(-1)
                logits.sub_(largest[:, None])  # from here on in place: what is not allocated takes no time
                exp = logits.exp() if with_entropy else logits.exp_()
                total = exp.sum(-1)
                sums.append(total.log() + largest)
                if with_entropy:
                    means.append(exp.mul_(logits).sum(-1) / total + largest)
                del logits, exp
        logsumexp = torch.stack(sums).logsumexp(0)
        logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        logprobs[rows], entropy = picked - logsumexp, torch.zeros_like(logprobs)
        if with_entropy:  # H = log Z - E[logit], the mean over all pieces
            entropy[rows] = logsumexp - ((torch.stack(sums) - logsumexp).exp() * torch.stack(means)).sum(0)
        ctx.save_for_backward(h, t, rows, logsumexp)
        ctx.weight, ctx.chunk, ctx.shape = weight, chunk, hidden.shape
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        (h, t, rows, logsumexp), weight = ctx.saved_tensors, ctx.weight
        g, grad_h, grad_weight = grad[rows, None], torch.zeros_like(h, dtype=torch.float32), None
        collect = getattr(weight, "collect", None)
        if ctx.needs_input_grad[1] and collect is None:
            grad_weight = torch.empty_like(weight)
        for start, w in pieces(weight, ctx.chunk, h.device):
            with owner("logits"):
                # d logprob / d logits = onehot - softmax, built in the place where the logits were
                d = (h @ w.T).float().sub_(logsumexp[:, None]).exp_().mul_(-g)
                here = (t >= start) & (t < start + len(w))
                d = d.scatter_add_(1, (t - start).clamp(0, len(w) - 1), g * here).to(w.dtype)
                grad_h += d @ w
                if collect and ctx.needs_input_grad[1]:
                    collect(d.T @ h, slice(start, start + len(w)))  # no gradient of the whole matrix exists
                elif grad_weight is not None:
                    grad_weight[start:start + len(w)] = d.T @ h
        grad_hidden = torch.zeros(ctx.shape, dtype=h.dtype, device=h.device)
        grad_hidden[rows] = grad_h.to(h.dtype)
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(hidden, weight, targets, chunk=None, entropy=False):
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), `chunk` words of the vocabulary at a
    time.

    hidden (..., C), weight (V, C), on hidden's device or on the host, targets (...) with -1 where there is
    none. Returns float32 (logprobs, entropy) of targets' shape, 0 where there is no target; entropy is in
    nats, carries no gradient, and is computed on request.
    """
    chunk = chunk or max(1024, 2**22 // max(1, targets.numel()))  # 16 MiB of float32 logits
    flat = hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), chunk, entropy
    return tuple(x.view(targets.shape) for x in _TokenLogprobs.apply(*flat))


# --- the dry run: the same code on tensors without data -----------------------------------------------------

DEVICE, HOST = torch.device("meta"), torch.device("cpu")


class _Ghost(torch.Tensor):
    """A tensor that says it lives on DEVICE or HOST. `value` is a real tensor if it holds integers, so that
    lengths and masks decide as they would; for floats it has no data (it is on PyTorch's meta device)."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value, place):
        ghost = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, device=DEVICE, dispatch_device=True)
        ghost.value, ghost.place = value, place
        return ghost

    def tolist(self):
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise RuntimeError(f"{function}: a dry run's tensor was used after it")


def _map(function, x, kind=torch.Tensor):
    """function of each tensor (or what `kind` says) in nested lists and tuples."""
    if isinstance(x, kind):
        return function(x)
    return type(x)(_map(function, y, kind) for y in x) if isinstance(x, (list, tuple)) else x


def _frozen(x):
    """What decides the shape of a result, as a key."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_frozen, x)) if isinstance(x, (list, tuple)) else x


def _flash(q, k, v, attn_mask=None, is_causal=False):
    """What a GPU runs: it keeps its output and one number a row, no (T, T) matrix, whatever the mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class dry_run(TorchDispatchMode):
    """with dry_run() as count: code whose tensors are on DEVICE and HOST runs without data, and its bytes are
    counted.

    Left out: the CUDA context, the allocator's rounding, the workspaces of libraries: together some 0.5 GiB
    on a GPU. `phases`: {name: {"peak_device_bytes", "peak_host_bytes", "owners": {owner: bytes on the device
    at its peak}}}.
    """
    def __init__(self):
        super().__init__()
        self.now, self.total, self.storages, self.known, self.phases = Counter(), Counter(), {}, {}, {}
        self.phase("setup")

    def __enter__(self):
        METERS.append(self)
        self.patch = mock.patch.object(F, "scaled_dot_product_attention", _flash)
        self.patch.start()
        # module.to() must exchange a parameter's contents: assigning to .data would forget a ghost's place
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *exception):
        METERS.remove(self)
        self.patch.stop()
        torch.__future__.set_swap_module_params_on_conversion(False)
        return super().__exit__(*exception)

    def phase(self, name):
        self.peak = self.phases.setdefault(name, {"peak_device_bytes": 0, "peak_host_bytes": 0, "owners": {}})
        self.add(DEVICE, "activations", 0)

    def add(self, place, name, size):
        self.now[place, name] += size
        self.total[place] += size
        if self.total[DEVICE] > self.peak["peak_device_bytes"]:
            self.peak["peak_device_bytes"] = self.total[DEVICE]
            self.peak["owners"] = {n: size for (p, n), size in self.now.items() if p == DEVICE and size}
        self.peak["peak_host_bytes"] = max(self.peak["peak_host_bytes"], self.total[HOST])

    def wrap(self, value, place):
        if value.is_floating_point():
            value = value.to(DEVICE)
        elif value.is_meta:  # integers that follow from floats, as sampled tokens do, are 0
            value = torch.zeros(value.shape, dtype=value.dtype)
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            name, size = OWNER[-1], storage.nbytes()
            self.add(place, name, size)

            def freed(_):
                del self.storages[key]
                self.add(place, name, -size)
            self.storages[key] = weakref.ref(storage, freed)
        return _Ghost(value, place)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].place
        kwargs, ghosts = dict(kwargs or {}), []
        _map(lambda t: isinstance(t, _Ghost) and ghosts.append(t), [args, list(kwargs.values())])
        place = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        if function is torch.ops.aten.copy_.default:  # the one operation that may cross over
            if not args[0].value.is_meta:
                args[0].value.copy_(args[1].value)
            return args[0]
        places = {g.place for g in ghosts if g.dim()} or {g.place for g in ghosts} or {HOST}
        if len(places) > 1:
            raise RuntimeError(f"{function}: tensors on the device and on the host")
        made = place is not None and not ghosts  # from nothing: without data, if of floats
        place = torch.device(place) if place is not None else places.pop()
        real = all(not g.value.is_meta for g in ghosts)
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].value.item() if real else 0.0
        if not real:
            kwargs.pop("generator", None)
        counts = function.overloadpacket is torch.ops.aten.arange  # of whole numbers, unless told otherwise
        if made and (kwargs.get("dtype") or (torch.int64 if counts else torch.float32)).is_floating_point:
            kwargs["device"] = DEVICE
        value = lambda t: (t.value if real else t.value.to(DEVICE)) if isinstance(t, _Ghost) else t
        in_place, key = function._schema.is_mutable, None
        # Layers and tokens are alike: shapes are worked out once.
        if not (real or in_place or function.is_view):
            key = function, _frozen(args), _frozen(list(kwargs.items()))
        if key in self.known:
            out = _map(lambda make: make(), self.known[key], partial)
        elif real or not in_place:
            out = function(*_map(value, list(args)), **{name: _map(value, x) for name, x in kwargs.items()})
        if in_place:
            return args[0] if function._schema.returns else None
        if key and key not in self.known:
            self.known[key] = _map(lambda t: partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype,
                                                     device=DEVICE), out)
        return _map(lambda t: self.wrap(t, place), out)

    def report(self):
        """Print the table, what takes most first; return the numbers of log.jsonl's one line."""
        phases = {name: peak for name, peak in self.phases.items() if name != "setup"}
        print("dry run: simulated, on tensors without data; peaks in GiB\n"
              "phase       device     host    on the device at its peak")
        for name, peak in phases.items():
            parts = sorted(peak["owners"].items(), key=lambda part: -part[1])
            device, host = (peak[f"peak_{place}_bytes"] / 2**30 for place in ("device", "host"))
            print(f"{name:9} {device:8.3f} {host:8.2f}    "
                  + ", ".join(f"{part} {size / 2**30:.3f}" for part, size in parts))
        totals = {key: max(peak[key] for peak in phases.values())
                  for key in ("peak_device_bytes", "peak_host_bytes")}
        return {"dry_run": True, **totals, "phases": phases}
