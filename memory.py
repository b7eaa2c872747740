"""Where the bytes live.

Training a weight with Adam in float32 takes 16 bytes: 4 for the weight, 4 for its gradient, 4 for each of two moments.
In bfloat16 the device needs 2 + 2 and everything that wants 32 bits (the master copy, the gradient sum, the moments)
can wait in host memory, 16 bytes of it, because it is touched once a step. Beside the weights there are the
activations, about 34 C bytes per token and block in half precision, and the logits, 4 V bytes per token, which for a
small model with a large vocabulary are the largest of all.

Each trick stands alone and is exact:

    checkpoint(function, *inputs)              forget a block's activations, compute them again in backward
    OffloadedAdamW(params, lr, ...)            32-bit masters and moments on the host
    token_logprobs(hidden, weight, targets)    log-probabilities without the (tokens, vocabulary) matrix
"""
from functools import partial

import torch


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
        inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad]
        torch.autograd.backward(*zip(*pairs))  # adds to the .grad of the function's parameters, too
        return None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in inputs)


def checkpoint(function, *inputs):
    """function(*inputs) with the same value and the same gradients, bit for bit, keeping only the inputs for backward.

    `function` returns a tensor or a tuple of tensors and must be deterministic (this code base has no dropout, so
    no random state needs to be kept). Costs one more forward pass.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Backward is only called if some input needs a gradient. A block's parameters hide inside `function`, so behind a
    # frozen embedding nothing would: the anchor always does.
    anchor = torch.empty(0, requires_grad=True)
    return _Checkpoint.apply(function, anchor, *inputs)


# --- AdamW with its 32-bit state on the host: ZeRO-Offload, arXiv:2101.06840 --------------------------------

class OffloadedAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) for weights of any type, with float32 masters on `host`.

    A hook takes each gradient away from the device the moment backward has finished it, so that they never exist there
    together; the gradients of micro-batches add up on the host in float32. Same trajectory as torch.optim.AdamW on
    float32 weights. Weight decay applies to matrices, not to biases and LayerNorm.

    host="cpu" offloads; host=None keeps masters and moments beside the weights.
    """
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, host="cpu"):
        self.params = [p for p in params if p.requires_grad]
        # .to() copies only if it has to: float32 weights that are on the host already are their own masters.
        self.masters = [p.detach().to(host or p.device, torch.float32) for p in self.params]
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]
        self.adam = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                       {"params": vectors, "weight_decay": 0.0}], lr, betas, eps, fused=True)
        for p, master in zip(self.params, self.masters):
            p.register_post_accumulate_grad_hook(partial(self._collect, master))

    @staticmethod
    def _collect(master, p):
        grad = p.grad.to(master.device, torch.float32)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    @torch.no_grad()
    def step(self, lr, grad_clip=0.0):
        """Clip by the global norm (0: no clipping), update, hand the weights back. Returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, grad_clip or float("inf"))
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self._publish()
        return norm.item()

    def _publish(self):
        for p, master in zip(self.params, self.masters):
            if p.data_ptr() != master.data_ptr():
                p.copy_(master)

    def state_dict(self):
        return {"masters": self.masters, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.adam.load_state_dict(state["adam"])  # moves the moments to where the masters are: the host
        self._publish()


# --- log-probabilities without the logits -------------------------------------------------------------------

class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_entropy):
        logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        logsumexp = torch.zeros_like(logprobs)
        rows = (targets >= 0).nonzero().squeeze(1)  # rows without a target cost nothing
        for r in rows.split(chunk):
            logits = (hidden[r] @ weight.T).float()
            logsumexp[r] = logits.logsumexp(-1)
            logprobs[r] = logits.gather(1, targets[r, None]).squeeze(1) - logsumexp[r]
            if with_entropy:  # H = log Z - E[logit]
                entropy[r] = logsumexp[r] - (logits.softmax(-1) * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, rows, logsumexp)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, rows, logsumexp = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for r in rows.split(ctx.chunk):
            h, g = hidden[r], grad[r, None]
            # d logprob / d logits = onehot - softmax, built in the place where the logits were
            d = (h @ weight.T).float().sub_(logsumexp[r, None]).exp_().mul_(-g)
            d = d.scatter_add_(1, targets[r, None], g).to(weight.dtype)
            grad_hidden[r] = d @ weight
            grad_weight += d.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, chunk=None, entropy=False):
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), a chunk of rows at a time.

    hidden (..., C), weight (V, C), targets (...) with -1 where there is none. Returns float32 (logprobs, entropy) of
    targets' shape, 0 where there is no target; entropy is in nats, carries no gradient, and is computed on request.
    """
    chunk = chunk or max(1, 2**23 // len(weight))  # 32 MiB of float32 logits
    flat = hidden.reshape(-1, hidden.size(-1)), weight, targets.reshape(-1), chunk, entropy
    return tuple(x.view(targets.shape) for x in _TokenLogprobs.apply(*flat))
