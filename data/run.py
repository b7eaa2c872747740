"""How a script starts and what it leaves behind: flags and their checks, device, log.jsonl, state.pt."""
import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from data import hub
from data.prepare import lock_folder
from memory import QUIET, RANK, WORLD, all_reduce_sum


# --- flags --------------------------------------------------------------------------------------------------

def parse_flags(cls, argv=None):
    """The command line -> a cls. Every field is a flag of the same name; its trailing comment is the help."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a character that a console lacks must end no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=inspect.getmodule(cls).__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        kind = {"const": True, "nargs": "?", "type": to_bool} if f.type is bool else {"type": f.type}
        words = "; ".join(filter(None, (comments.get(f.name), f.name in RANGES and in_words(f.name))))
        parser.add_argument("--" + f.name, default=f.default, metavar=f.type.__name__,
                            help=f"{words} [{f.default}]".replace("%", "%%"), **kind)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(cls)], 1)
        hint = f"Did you mean --{near[0]}?" if near else "Try --help."
        raise SystemExit(f"{unknown[0]}: no such flag. {hint}")
    return cls(**vars(known))


def to_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text}: true or false")
    return text.lower() in ("true", "1", "yes")


def require(condition, message):
    """Stop with `message`, which names the value and the remedy, unless the condition holds."""
    if not condition:
        raise SystemExit(message)


RANGES = {  # a bracket's end is allowed, a parenthesis' is not
    "steps batch minibatch epochs kl_horizon best_of_n eval_prompts log_every eval_every save_every":
        "[1, inf)",
    "microbatch warmup weight_decay grad_clip seed lora_rank kl_coef kl_target value_coef ptx_coef group "
    "missing_eos_penalty target_kl top_k temperature": "[0, inf)",
    "n_layer n_head": "[1, 1000]", "n_embd": "[1, 100000]", "block_size": "[2, 1000000]",
    "max_new_tokens": "[0, 1000000]", "score_clip clip value_clip beta": "(0, inf)", "gamma lam": "[0, 1]",
    "top_p": "(0, 1]", "lr": "(0, 1)"}
RANGES = {name: interval for names, interval in RANGES.items() for name in names.split()}
CHOICES = {"tokenizer": (*hub.VOCAB_SIZE,), "offload": ("none", "optimizer", "all"),
           "dtype": ("auto", "float32", "bfloat16")}
DIVISIONS = [("n_embd", "n_head"), ("batch", "minibatch")]  # the first has to be a multiple of the second


def in_range(x, interval):
    low, high = map(float, interval[1:-1].split(", "))
    return low <= x <= high and (x > low or interval[0] == "[") and (x < high or interval[-1] == "]")


def in_words(name):
    """What a flag's value may be; "" where that is not known."""
    if name in CHOICES:
        return f"{', '.join(CHOICES[name][:-1])} or {CHOICES[name][-1]}"
    if name not in RANGES:
        return ""
    low, high = RANGES[name][1:-1].split(", ")
    lower = f"{'at least' if RANGES[name][0] == '[' else 'above'} {low}"
    upper = f", {'at most' if RANGES[name][-1] == ']' else 'below'} {high}"
    return lower + upper * (high != "inf")


def check_flags(cfg):
    """Refuse what cannot work, before any compute is spent. A rule applies to whoever has the flag."""
    flags = dataclasses.asdict(cfg)
    for name, value in flags.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"--{name}={value}: not a finite number.")
        require(name not in RANGES or in_range(value, RANGES[name]), f"--{name}={value}: {in_words(name)}.")
        require(value in CHOICES.get(name, (value,)), f"--{name}={value}: unknown. Choose {in_words(name)}.")
    for whole, part in DIVISIONS:
        if flags.keys() >= {whole, part} and flags[part]:
            require(flags[whole] % flags[part] == 0,
                    f"--{whole}={flags[whole]} does not divide by --{part}={flags[part]}.")
    for name in filter(flags.__contains__, ("batch", "minibatch")):
        require(flags[name] % WORLD == 0, f"--{name}={flags[name]} does not divide by {WORLD} processes.")
    for name in ("init", "reward"):
        if flags.keys() >= {"out", name}:
            require(Path(cfg.out).resolve() != Path(flags[name]).resolve(),
                    f"--out={cfg.out} would overwrite --{name}.")
    require(WORLD == 1 or flags.get("offload") != "all" and not flags.get("dry_run"),
            "--offload=all and --dry_run are for one process; torchrun shards the weights instead.")
    if "kl_coef" in flags:
        check_ppo_flags(cfg)
    if "out" in flags and not RANK:
        lock_folder(cfg.out).close()  # what Run would refuse, but before the data are read


def check_ppo_flags(cfg):
    require(0 < cfg.max_new_tokens < cfg.block_size,
            f"--max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in "
            f"--block_size={cfg.block_size}.")
    require(cfg.kl_coef > 0 or not cfg.kl_target,
            f"--kl_target={cfg.kl_target} multiplies --kl_coef={cfg.kl_coef}, which would stay 0.")
    if cfg.group:
        require(cfg.group > 1 and cfg.minibatch % cfg.group == 0,
                f"--group={cfg.group}: two or more replies, and whole groups in --minibatch={cfg.minibatch}.")
        require(cfg.gamma == 1, f"--gamma={cfg.gamma} discounts for a critic; with --group there is none.")
    require(cfg.group or not cfg.group_norm, "--group_norm says how groups are compared: give --group=8.")
    require(cfg.temperature > 0, f"--temperature={cfg.temperature}: above 0, a policy needs probabilities.")


def linear_lr(step, cfg):
    """The learning rate of step `step`: a line up to lr within `warmup` steps, at most half of them all, then
    a line down to 0."""
    warmup = min(cfg.warmup, cfg.steps // 2)
    return cfg.lr * min((step + 1) / max(1, warmup), (cfg.steps - step) / max(1, cfg.steps - warmup))


# --- device -------------------------------------------------------------------------------------------------

def init_distributed(kind):
    """Join the other processes -> this process's device. Only the first process prints."""
    if WORLD == 1:
        return torch.device(kind)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise SystemExit(f"torch {torch.__version__} is too old for several processes; 2.13 will do.")
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    sys.excepthook = _report_lost_process
    return device


def _report_lost_process(kind, error, trace):
    """One line instead of a traceback when another process of the job has died."""
    if not (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)):
        return sys.__excepthook__(kind, error, trace)
    print(f"process {RANK}: another process of this job has ended. The last good checkpoint is whole; the "
          "same command with --resume goes on.", file=sys.stderr)


def exit_distributed():
    """The job is done: wait for the others, then exit at once. (In Python's ordinary exit gloo's threads
    abort about one time in twenty.)"""
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def pick_device(device, dtype):
    """Two names, or "auto" -> (torch.device, torch.dtype); prints what it chose and why."""
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if not os.environ.get(name)]
    require(WORLD == 1 or not missing, f"WORLD_SIZE={WORLD} is set, {', '.join(missing)} not: start several "
                                       "processes with torchrun, or unset WORLD_SIZE.")
    try:
        device = init_distributed(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SystemExit(f"--device={device}: not usable here ({str(error).splitlines()[0]}).") from None
    kind = device.type
    if kind == "cuda":
        torch.cuda.set_device(device)  # streams and memory counts are the current device's
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for tens of milliseconds, at each shape
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can_ask = kind == "cpu" and hasattr(torch.cpu, "get_capabilities")
        features = torch.cpu.get_capabilities() if can_ask else {}
        has_bf16 = features.get("avx512_bf16") or features.get("amx_bf16")
    found = f"the processor has {'' if has_bf16 else 'no '}bfloat16 in hardware"
    reason = found if dtype == "auto" else "asked for"
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16 else "float32"
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {device} ({name}), {dtype} ({reason})" + f", {WORLD} processes" * (WORLD > 1))
    return device, getattr(torch, dtype)


def machine(device):
    """What it runs on, in words."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def memory_gb(device):
    """The peak so far, in 10^9 bytes: allocated on a GPU, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def seconds_since(start):
    """By time.perf_counter(). A clock may stand still between two steps; what divides by this never fails."""
    return max(time.perf_counter() - start, 1e-9)


# --- log, checkpoint, resume --------------------------------------------------------------------------------

MAY_CHANGE = {"resume", "log_every", "eval_every", "save_every", "trace"}  # no number depends on these flags


def input_digests(flags):
    """{flag: SHA-256 of the names and bytes of the files that it names}, where there are any."""
    digests = {}
    for name in ("init", "reward", "data"):
        path = Path(flags.get(name) or os.devnull)
        files = [path] if path.is_file() else [
            p for p in sorted(path.glob("*")) if p.name == "config.json" or p.name != "log.jsonl"
            and p.suffix in (".safetensors", ".bin", ".jsonl")]
        if files:
            known = [(p.name, p.stat().st_size and hub.sha256(p)) for p in files]  # no mmap of an empty file
            digests[name] = hashlib.sha256(repr(known).encode()).hexdigest()
    return digests


def read_state(path, flags, digests):
    """What Run.save wrote, if these are the flags and inputs that it was written with."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        state.setdefault("inputs", {})  # an earlier version's state has none
        kinds = [type(state[name]) for name in ("step", "cfg", "log", "inputs")]
        if kinds != [int, dict, list, dict]:
            raise TypeError("another program's file")
    except Exception as error:  # pickle's are many
        raise SystemExit(f"{path}: not a state to resume from ({type(error).__name__}). Delete it, or omit "
                         "--resume, to begin anew.") from None
    for name, was in state["cfg"].items():
        now = flags.get(name)
        require(name in MAY_CHANGE or was == now,
                f"--resume: {path} was made with --{name}={was}, not {now}. Use the same, or omit --resume.")
    for name, was in state["inputs"].items():
        require(digests.get(name, was) == was, f"--{name}={flags.get(name)}: its content has changed since "
                f"{path} was made. Use the same, or omit --resume.")
    return state


class Run:
    """A training run's folder: log.jsonl, state.pt and the model. A kill never damages the last two.

    state.pt alone decides a resume. It holds the step, the flags, digests of the inputs, the log up to that
    step, and what save() was given: the optimizer's state, with the 32-bit weights in it. There are no random
    states, as every draw is a function of the seed and the step. Of many processes only the first one writes.
    An earlier run's files stay until the first save(); until then the log is log.jsonl.new.

        with Run(cfg, device) as run:                    # Ctrl-C lets the step finish, saves, ends the run
            for step in run.steps("sft"):
                ...
                run.end_step(tokens, loss=loss)          # stops here where loss is not finite
                if run.due("log"):
                    run.report(f"loss {loss:.4f}", loss=loss)
                if run.due("save"):
                    run.save(config, tensors, optimizer=optimizer)
        return run.finish(val_loss=val_loss)
    """
    def __init__(self, cfg, device=torch.device("cpu")):
        self.cfg = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "resume"}
        self.device, self.out = device, Path(cfg.out)
        self.lock = None if RANK else lock_folder(self.out)
        self.inputs = {} if RANK else input_digests(self.cfg)
        self.state, self.start, self.lines = None, 0, []
        self.ctrl_c, self.stop = False, False
        path = self.out / "state.pt"
        if cfg.resume and path.exists():
            self.state = read_state(path, self.cfg, self.inputs)
            self.start, self.lines = self.state["step"], self.state["log"]
            print(f"resuming {self.out} after step {self.start}")
        elif cfg.resume:
            print(f"nothing to resume in {self.out}: starting at step 0")
        self.done = self.start  # steps
        self.clock = time.perf_counter()
        self.tokens, self.busy = 0, 0.0  # of the steps since the last report
        self.log_path = self.out / ("log.jsonl.new" if path.exists() and not self.state else "log.jsonl")
        if not RANK:
            hub.write_file(self.log_path, lambda path: path.write_text("".join(self.lines)))

    def __enter__(self):
        try:
            self.old_handler = signal.signal(signal.SIGINT, self._on_ctrl_c)
        except ValueError:  # not in the main thread: nobody presses keys there
            self.old_handler = None
        return self

    def _on_ctrl_c(self, *_):
        self.ctrl_c = True
        signal.signal(signal.SIGINT, self.old_handler)  # a second Ctrl-C stops at once, as Python does
        if not RANK:
            print("\nfinishing this step, then saving; Ctrl-C again to stop at once", file=sys.stderr)

    def __exit__(self, *_):
        if self.old_handler:
            signal.signal(signal.SIGINT, self.old_handler)

    def steps(self, name):
        """The steps that are left, counted from 0, with a progress bar in a terminal."""
        total = self.cfg["steps"]
        for step in tqdm(range(self.start, total), name, initial=self.start, total=total, disable=QUIET):
            self.began = time.perf_counter()
            yield step

    def end_step(self, tokens, **numbers):
        """The step is over, it had so many tokens. If a loss or a gradient's norm is not a number, stop
        before anything is saved. (With such a norm OffloadedAdamW.step changes no weight.)"""
        self.done += 1
        for name, value in numbers.items():
            require(math.isfinite(value), f"step {self.done}: {name} is {value}. Lower --lr or raise "
                                          f"--warmup. {self.out} keeps the last good checkpoint.")
        self.tokens += tokens
        self.busy += seconds_since(self.began)

    def due(self, what):
        """Is it time to "log", "eval" or "save"? The last step is always logged and saved; a Ctrl-C in any
        process asks for a save, which then ends the run."""
        if what == "save":
            self.stop = all_reduce_sum(self.ctrl_c)[0] > 0
        last = what != "eval" and self.done == self.cfg["steps"]
        return last or self.done % self.cfg[f"{what}_every"] == 0 or what == "save" and self.stop

    def report(self, line, **numbers):
        """Print the line and log the numbers, with the speed of the steps since the last report."""
        seconds, total = seconds_since(self.clock), self.cfg["steps"]
        step = f"step {self.done:{len(str(total))}}/{total}"
        numbers |= {"tokens_per_s": self.tokens / self.busy, "seconds": seconds,
                    "memory_gb": memory_gb(self.device)}
        self.tokens, self.busy = 0, 0.0
        minutes, rest = divmod(round(seconds / (self.done - self.start) * (total - self.done)), 60)
        tqdm.write(f"{step} | {line} | {numbers['tokens_per_s']:,.0f} tok/s | "
                   f"{numbers['memory_gb']:.2f} GB | {minutes}:{rest:02} left")
        self.log(**numbers)

    def report_evaluation(self, **numbers):
        shown = " | ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        tqdm.write(f"step {self.done}/{self.cfg['steps']} | {shown}")
        self.log(**numbers)

    def log(self, **numbers):
        self.lines.append(json.dumps({"step": self.done} | numbers) + "\n")
        if RANK:
            return
        try:
            with open(self.log_path, "a") as f:
                f.write(self.lines[-1])
        except OSError as error:
            raise SystemExit(f"{self.log_path}: could not be written ({error}). The last good "
                             "checkpoint is untouched; free some space and go on with --resume.") from None

    def save(self, config, tensors, **state):
        """config, tensors: the model, as hub.write takes it. state: what else a resume needs, optimizers or
        plain values. state.pt is written first: the model can be made from it, not the other way round."""
        # all processes ask, for a sharded state_dict() is put together from all of them
        state = {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}
        if not RANK:
            state |= {"step": self.done, "cfg": self.cfg, "log": self.lines, "inputs": self.inputs}
            hub.write_file(self.out / "state.pt", lambda path: torch.save(state, path))
            if self.log_path.suffix == ".new":
                self.log_path = self.log_path.replace(self.out / "log.jsonl")
        self.save_model(config, tensors)
        require(not self.stop, "stopped and saved. The same command with --resume goes on.")

    def save_model(self, config, tensors):
        if not RANK:
            hub.write(self.out, config, tensors)

    def finish(self, **summary):
        """Print the summary, make it the log's last line and return it. (Under torchrun: exit.)"""
        shown = " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
        print(f"{self.out}: {shown} | {seconds_since(self.clock):.0f} s")
        self.log(**summary, final=True)
        if self.lock:
            self.lock.close()
        exit_distributed()
        return summary
