"""The dry run: a script's own code on tensors without data, to see what it would take in memory.

    python ppo.py --init=gpt2-xl --dry_run --offload=all

counts every tensor's bytes as it comes and goes, for any size, without a GPU, without weights, in seconds.
"""
import json
import weakref
from collections import Counter
from itertools import repeat
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memory import MEMORY_TAGS, TRACKERS

# In a dry run torch's "meta" plays the GPU. (A FakeTensor can have any device, but autograd runs only on
# those that this build of torch knows.)
DEVICE, HOST = torch.device("meta"), torch.device("cpu")


def _map(function, x):
    """function of each tensor in nested lists and tuples. (torch's tree_map is slower.)"""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)(_map(function, y) for y in x) if isinstance(x, (list, tuple)) else x


def _flash(q, k, v, attn_mask=None, is_causal=False):
    """What attention keeps on a GPU, whatever the mask: its output and one number a row, no (T, T) matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class dry_run(TorchDispatchMode):
    """with dry_run() as count: code whose tensors are on DEVICE and HOST runs without data, and its bytes are
    counted.

    Every tensor becomes torch's FakeTensor, which knows shape, type and device but holds no data. Integers
    and booleans carry their real `value` along, so that code which branches on lengths and masks runs as
    usual; sampled tokens are 0, so replies have full length.

    Left out: the CUDA context, the allocator's rounding, the workspaces of libraries, together some 0.5 GiB
    on a GPU. `phases`: {name: {"peak_device_bytes", "peak_host_bytes", "owners": {tag: bytes on the device
    at its peak}}}.
    """
    def __init__(self):
        super().__init__()
        self.fake, self.storages, self.phases = FakeTensorMode(), {}, {}
        self.bytes, self.total = Counter(), Counter()  # by (device, tag), by device
        self.phase("setup")

    def __enter__(self):
        TRACKERS.append(self)
        self.patch = mock.patch.object(F, "scaled_dot_product_attention", _flash)
        self.patch.start()
        # module.to() has to exchange parameters: assigning to .data would forget a fake tensor's device
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *exception):
        TRACKERS.remove(self)
        self.patch.stop()
        torch.__future__.set_swap_module_params_on_conversion(False)
        return super().__exit__(*exception)

    def phase(self, name):
        self.peak = self.phases.setdefault(name, {"peak_device_bytes": 0, "peak_host_bytes": 0, "owners": {}})
        self.add(DEVICE, "activations", 0)  # the peak begins at what is there now

    def add(self, device, tag, size):
        self.bytes[device, tag] += size
        self.total[device] += size
        if self.total[DEVICE] > self.peak["peak_device_bytes"]:
            self.peak["peak_device_bytes"] = self.total[DEVICE]
            self.peak["owners"] = {t: n for (d, t), n in self.bytes.items() if d == DEVICE and n}
        self.peak["peak_host_bytes"] = max(self.peak["peak_host_bytes"], self.total[HOST])

    def wrap(self, tensor, device, value=None):
        """-> the FakeTensor in tensor's place, its storage counted on `device` for as long as it lives."""
        if not isinstance(tensor, FakeTensor):
            tensor = FakeTensor(self.fake, tensor.to(DEVICE), device)
        if not tensor.is_floating_point():  # integers made from floats, such as sampled tokens, become 0
            tensor.value = torch.zeros(tensor.shape, dtype=tensor.dtype) if value is None else value
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            tag, size = MEMORY_TAGS[-1], storage.nbytes()
            self.add(device, tag, size)

            def freed(_):
                del self.storages[key]
                self.add(device, tag, -size)
            self.storages[key] = weakref.ref(storage, freed)
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """torch calls this for every operation, in place of running it."""
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = []

        def collect(t):  # torch.tensor() and the like bring real tensors, made on the host
            tensors.append(t if isinstance(t, FakeTensor) else self.wrap(t, HOST, t))
            return tensors[-1]
        args, kwargs = _map(collect, list(args)), {k: _map(collect, x) for k, x in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        known = all(hasattr(t, "value") for t in tensors)  # every input has its value, so the result has one
        if function is torch.ops.aten._local_scalar_dense.default:  # .item()
            return args[0].value.item() if known else 0.0
        if not tensors:  # zeros, randn, arange ...: no value if they make floats
            integers = function.overloadpacket in (torch.ops.aten.arange, torch.ops.aten.randperm)
            dtype = kwargs.get("dtype") or (torch.int64 if integers else torch.float32)
            known = not dtype.is_floating_point
        in_place, values = function._schema.is_mutable, None
        if known:  # run it on the values
            value = lambda t: t.value
            real = {k: HOST if k == "device" else _map(value, x) for k, x in kwargs.items()}
            values = function(*_map(value, args), **real)
            if not (in_place or function.is_view):
                # where its arguments are; numbers (0-dimensional) from the host mix with any device
                places = [t.device for t in sorted(tensors, key=torch.Tensor.dim, reverse=True)] or [HOST]
                device = torch.device(kwargs.get("device") or places[0])
                return _map(lambda v: self.wrap(v, device, v), values)
        if in_place and known or function is torch.ops.aten.copy_.default:  # copy_ may cross devices
            return args[0]
        if "generator" in kwargs:
            kwargs["generator"] = None  # it draws nothing
        with self.fake:  # only shape, type and device; raises if the arguments are on different devices
            out = function(*args, **kwargs)
        self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()  # or module.to() refuses to swap
        if in_place:
            return args[0] if function._schema.returns else None
        values = iter(values if isinstance(values, (list, tuple)) else [values]) if known else repeat(None)
        return _map(lambda t: self.wrap(t, t.device, next(values)), out)

    def report(self):
        """Print the table, what takes most first; return what goes into log.jsonl."""
        phases = {name: peak for name, peak in self.phases.items() if name != "setup"}
        print("dry run: simulated, on tensors without data; peaks in GiB\n"
              "phase       device     host    on the device at its peak")
        for name, peak in phases.items():
            owners = sorted(peak["owners"].items(), key=lambda owner: -owner[1])
            device, host = (peak[f"peak_{side}_bytes"] / 2**30 for side in ("device", "host"))
            print(f"{name:9} {device:8.3f} {host:8.2f}    "
                  + ", ".join(f"{tag} {size / 2**30:.3f}" for tag, size in owners))
        totals = {key: max(peak[key] for peak in phases.values())
                  for key in ("peak_device_bytes", "peak_host_bytes")}
        return {"dry_run": True, **totals, "phases": phases}


def run_dry(cfg, iteration):
    """--dry_run: iteration(cfg, device, dtype) on tensors without data -> the count, which is also logged."""
    with dry_run() as count:
        iteration(cfg, DEVICE, torch.float32 if cfg.dtype == "float32" else torch.bfloat16)
    result = count.report()
    if cfg.dtype == "auto":
        print("--dtype=auto: weights are counted in bfloat16; for a processor without it use --dtype=float32")
    path = Path(cfg.out) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text() if path.exists() else ""
    if earlier and not earlier.startswith('{"dry_run"'):
        print(f"{path} is a run's and stays as it is; another --out logs this dry run")
    else:
        path.write_text(json.dumps(result) + "\n")
    return result
