"""What only a GPU can tell, checked in nine minutes at most.

    python docs/gpu_check.py                    # all parts, each in a process of its own
    python docs/gpu_check.py decode train       # these parts only
    python docs/gpu_check.py --smoke            # tiny, on a CPU: finds plain errors, measures nothing

    kernels   which attention kernel runs; attend() against the formula
    stream    --offload=all equals --offload=optimizer bit for bit, 50 times, with delays that would show a
              race, and with controls in which a wait is left out
    memory    the real peak against the dry run, for the README's flags
    stages    the three stages in float32 and bfloat16 against float32 on the CPU
    repeat    is a repeated run bit-identical?
    decode, train, ppo    speed, the first two beside transformers where it is installed
    syncs     where the host waits for the device
    tests     test_all.py on this machine

A part that fails or takes too long is reported and the others go on. The last lines are the summary; all of
it also goes to gpu_check.txt in $OUT, or else in the folder for temporary files. Sizes are GPT-2 124M's,
weights random, nothing is downloaded. So far it has run on a CPU only, with --smoke.
"""
import contextlib
import copy
import gc
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import memory
import model as m
import ppo
import reward
import sft
from data import dry_run, hub
from data.batches import rng
from data.run import pick_device, require, seconds_since

START, BUDGET = time.time(), 530  # seconds
SMOKE = "--smoke" in sys.argv
CUDA = not SMOKE
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16, F32 = torch.bfloat16, torch.float32
LIMITS = {"kernels": 40, "stream": 75, "memory": 110, "stages": 100, "repeat": 45,  # seconds at most
          "decode": 95, "train": 70, "ppo": 60, "syncs": 40, "tests": 300}
TIMED = "decode", "train", "ppo", "syncs"  # these want the machine to themselves
SIZES = (512, 256, 2, 2, 64) if SMOKE else (50304, 1024, 12, 12, 768)  # V, positions, layers, heads, C
SMALL = SIZES if SMOKE else (50304, 1024, 6, 12, 768)


# --- the driver ---------------------------------------------------------------------------------------------

def start(name, limit):
    """-> (process, the file that takes its output)."""
    command = [sys.executable, __file__, "--part", name, *["--smoke"] * SMOKE]
    if name == "tests":
        command = [sys.executable, "test_all.py", *["streaming_changes", "token_logprobs_equal"] * SMOKE]
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
             "HF_HUB_DISABLE_PROGRESS_BARS": "1", "GPU_CHECK_UNTIL": str(time.time() + limit - 3)}
    output = tempfile.TemporaryFile("w+", errors="replace")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                            cwd=ROOT, start_new_session=True, env=os.environ | quiet), output


def finish(process, output, limit):
    """Wait; beyond the limit end it and what it started -> (outcome, lines)."""
    try:
        outcome = "FAILED" if process.wait(max(1, limit)) else "ok"
    except subprocess.TimeoutExpired:
        outcome = "TIMEOUT"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output.seek(0)
    lines = [line for line in output.read().splitlines() if not line.startswith("USDT:")]  # the profiler's
    return "; ".join([outcome, *(line for line in lines if line.startswith("skipped: "))]), lines


def drive(names):
    """-> the exit code."""
    folder = Path(os.environ.get("OUT") or tempfile.gettempdir())
    outcomes, failures, tests = {}, [], None
    with open(folder / "gpu_check.txt", "w") as report:
        def tell(line):
            print(line, flush=True)
            print(line, file=report, flush=True)

        def close(name, process, output, since, limit):
            outcomes[name], lines = finish(process, output, limit)
            if name == "tests":  # one line each; of a failure the traceback, too
                lines = [line for line in lines if not line.endswith(" s") or " ok " not in line]
            tell(f"\n== {name}: {outcomes[name].split(';')[0]}, after {time.time() - since:.0f} s")
            for line in lines[-60:]:
                tell("   " + line[:200])
            failures.extend(f"{name}: {line}" for line in lines if line.startswith("FAIL "))
        if shutil.which("nvidia-smi"):
            fields = "name,memory.total,driver_version,clocks.sm,temperature.gpu"
            tell(subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                                capture_output=True, text=True).stdout.strip())
        left = lambda: BUDGET - (time.time() - START)
        if "tests" in names:  # beside the first parts, which need little of the CPU
            tests = ("tests", *start("tests", left()), time.time())
        for name in names:
            if name in TIMED and tests:
                close(*tests, min(LIMITS["tests"], left() - 200))
                tests = None
            limit = min(LIMITS[name], left() - 4)
            if name != "tests" and limit < 8:
                outcomes[name] = "skipped: no time left"
            elif name != "tests":
                since = time.time()
                close(name, *start(name, limit), since, limit)
        if tests:
            close(*tests, left() - 4)
        tell(f"\n== summary, {time.time() - START:.0f} s; also in {report.name}")
        for line in [f"{name:8} {outcome}" for name, outcome in outcomes.items()] + failures:
            tell(line)
    return int(any(outcome.startswith(("FAILED", "TIMEOUT")) for outcome in outcomes.values()))


# --- what the parts use -------------------------------------------------------------------------------------

FAILED = []


def check(condition, text):
    print("PASS" if condition else "FAIL", text, flush=True)
    if not condition:
        FAILED.append(text)


def say(text):
    print(text, flush=True)


def skip(what, why):
    say(f"skipped: {what} ({why})")


def time_left():
    return float(os.environ.get("GPU_CHECK_UNTIL", "inf")) - time.time()


def enough_time(seconds, what):
    """Is there? If not, say what is left out."""
    if time_left() < seconds:
        skip(what, "no time left")
    return time_left() >= seconds


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(function):
    synchronize()
    since = time.perf_counter()
    function()
    synchronize()
    return seconds_since(since)


def median_seconds(function, warmup=2, n=3):
    for _ in range(0 if SMOKE else warmup):
        function()
    return statistics.median(seconds_of(function) for _ in range(1 if SMOKE else n))


def forget_peaks():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_bytes(peak=False):
    if not CUDA:
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


class Tracker:
    """For memory.TRACKERS, as the dry run is one: each phase's seconds, and its peak above what was there."""
    def __init__(self):
        forget_peaks()
        self.base, self.name, self.since = device_bytes(), "setup", time.perf_counter()
        self.seconds, self.peaks = defaultdict(list), Counter()

    def phase(self, name):
        synchronize()
        now = time.perf_counter()
        self.seconds[self.name].append(now - self.since)
        self.peaks[self.name] = max(self.peaks[self.name], device_bytes(peak=True) - self.base)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        self.name, self.since = name, now

    def __enter__(self):
        memory.TRACKERS.append(self)
        return self

    def __exit__(self, *_):
        memory.TRACKERS.remove(self)


def cudnn_attention(on):
    """cuDNN plans its attention for every new shape, which takes long: most parts go without."""
    torch.backends.cuda.enable_cudnn_sdp(on)


def network(cls=m.GPT, dtype=BF16, sizes=SIZES, seed=0):
    return cls(m.GPTConfig(*sizes, "tiny")).initialize(rng(seed)).to(dtype)


def ids(*shape, seed=0):
    return torch.randint(3, SIZES[0] - 64, shape, generator=rng(seed, "ids")).tolist()


def examples(B, T, seed=0):
    return [(row[:-1], row[1:]) for row in ids(B, T + 1, seed=seed)]


def in_transformers(net):
    """transformers' model with net's weights, as it reads the folder that we write; None without it."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        skip("the comparison with transformers", error)
        return None
    with tempfile.TemporaryDirectory() as folder:
        hub.write(folder, *m.exported(net))
        return GPT2LMHeadModel.from_pretrained(folder).to(net.device, net.ln_f.weight.dtype)


# --- the parts ----------------------------------------------------------------------------------------------

def kernels():
    say(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, {os.cpu_count()} cores")
    pick_device(DEVICE.type, "auto")
    B, H, T, D = (2, 2, 16, 16) if SMOKE else (16, 12, 128, 64)
    for dtype, cudnn in itertools.product((BF16, F32), (True, False)):
        cudnn_attention(cudnn)
        q, k, v = torch.randn(3, B, T, H, D, dtype=dtype, device=DEVICE).transpose(2, 3)
        mask = torch.zeros(B, 1, 1, T - 5, dtype=dtype, device=DEVICE)
        calls = {"training": lambda: m.attend(q, k, v),
                 "decoding": lambda: m.attend(q[:, :, :1], k[:, :, :-5], v[:, :, :-5], mask)}
        for name, call in calls.items():
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                call()
            used = {event.key.split("_product_")[-1] for event in profile.key_averages()
                    if "_scaled_dot_product_" in event.key}
            say(f"{name}, {dtype}, cuDNN {'allowed' if cudnn else 'off'}: {', '.join(used) or 'the formula'}")
    q, k, v = torch.randn(3, 2, 12, 77, 64, device=DEVICE)
    future = torch.ones(77, 77, dtype=torch.bool, device=DEVICE).triu(1)
    for K, (dtype, allowed) in itertools.product((12, 4), ((F32, 1e-4), (BF16, 0.03))):
        k_, v_ = (x[:, :K].repeat_interleave(12 // K, 1) for x in (k, v))  # K heads of keys, shared
        want = (q @ k_.mT / 8).masked_fill(future, -math.inf).softmax(-1) @ v_
        q_, k_, v_ = (x.to(dtype) for x in (q, k[:, :K], v[:, :K]))
        mask = torch.zeros(2, 1, 1, 77, dtype=dtype, device=DEVICE)
        for name, got in (("all", m.attend(q_, k_, v_)), ("last", m.attend(q_[:, :, -1:], k_, v_, mask))):
            gap = (got.float() - want[:, :, -got.size(2):]).abs().max().item()
            check(gap < allowed, f"attend(), {K} heads of keys, {name}, {dtype}: {gap:.1e} off the formula")


class Delays:
    """Replaces the two waits of StreamedBlock: each can be left out, and either side can be made late."""
    def __init__(self):
        self.copies = self.compute = 0  # GPU cycles
        self.without = ""
        if not CUDA:
            return
        wait_event = torch.cuda.Stream.wait_event

        def late_wait_stream(stream, other):  # fetch(): the copies wait for what was queued before
            if self.without != "wait_stream":
                wait_event(stream, other.record_event())
            with torch.cuda.stream(stream):
                self.sleep(self.copies)

        def maybe_wait_event(stream, event):  # __call__(): the block waits for its copies
            if self.without != "wait_event":
                wait_event(stream, event)
        torch.cuda.Stream.wait_stream, torch.cuda.Stream.wait_event = late_wait_stream, maybe_wait_event

    def sleep(self, cycles):
        if CUDA and cycles:
            torch.cuda._sleep(cycles)


def stream():
    cudnn_attention(False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fused attention's backward in a fixed order
    base, delays = network(sizes=SMALL), Delays()
    B, T, steps = (2, 16, 3) if SMOKE else (4, 128, 50)

    def learner(offload, lora_rank):
        cfg = sft.Config(offload=offload, checkpoint=True, lora_rank=lora_rank)
        net = m.setup_training(copy.deepcopy(base), cfg, DEVICE)
        if offload == "all":
            for block in net.h:
                block.register_forward_pre_hook(lambda *_: delays.sleep(delays.compute))
        return net, memory.make_optimizer(net, cfg)

    def result(net, adam, step):
        losses = []
        for part in range(2):  # micro-batches
            nll = m.negative_log_likelihood(net, examples(B, T, seed=2 * step + part), DEVICE)
            loss = nll.sum() / (2 * B * T)
            loss.backward()
            losses.append(loss.item())
        norm, prompts = adam.step(1e-3, 1.0), ids(B, 8, seed=step)
        with torch.no_grad():
            hidden = net(torch.tensor(prompts).to(DEVICE))
        replies = m.generate(net, prompts, 6, -1, generator=rng(step)) if step % 5 == 0 else []
        return {"losses": losses, "norm": norm, "hidden": hidden, "replies": replies,
                "weights": [x.clone() for x in adam.masters]}

    def differences(lora_rank, steps, cycles):
        """-> {what: in how many steps it differed}, steps done."""
        learners, bad = [learner(offload, lora_rank) for offload in ("optimizer", "all")], Counter()
        for step in range(steps):
            delays.copies, delays.compute = cycles[step % len(cycles)]
            plain, streamed = (result(*each, step) for each in learners)
            bad["losses"] += plain["losses"] != streamed["losses"]
            bad["norm"] += plain["norm"] != streamed["norm"]
            bad["hidden"] += not torch.equal(plain["hidden"], streamed["hidden"])
            bad["weights"] += not all(map(torch.equal, plain["weights"], streamed["weights"]))
            bad["replies"] += plain["replies"] != streamed["replies"]
            if delays.without and bad.total() or time_left() < 20:
                break
        delays.copies = delays.compute = 0
        return {what: n for what, n in bad.items() if n}, step + 1

    either = [(0, 0), (1_000_000, 0), (0, 1_000_000), (300_000, 700_000)]
    for lora_rank, n in ((0, steps), (4, max(2, steps // 5))):
        bad, done = differences(lora_rank, n, either)
        if bad.pop("replies", 0):  # streamed logits are products of 8,192 rows each: other roundings
            say("some replies differ")
        check(not bad, f"lora_rank={lora_rank}: streamed as unstreamed in {done} steps, differences: {bad}")
    if not CUDA:
        return skip("the controls", "they need a GPU")
    for without, cycles in (("wait_event", (3_000_000, 0)), ("wait_stream", (0, 3_000_000))):
        delays.without = without
        try:
            bad, _ = differences(0, 6, [cycles])
        except (Exception, SystemExit) as error:  # garbage may end in nan, or out of range
            bad = type(error).__name__
        delays.without = ""
        seen = f"noticed, {bad}" if bad else "NOT noticed, so the above proves less"
        say(f"control without {without}: {seen}")


def memory_peaks():
    cudnn_attention(False)
    if CUDA:  # cuBLAS allocates its workspaces once a thread, and backward has a thread of its own
        for dtype in (BF16, F32):
            x = torch.randn(256, 256, device=DEVICE, dtype=dtype, requires_grad=True)
            F.linear(F.linear(x, x, x[0]), x).square().sum().backward()
        del x
    one = {"init": "gpt2", "batch": 1, "minibatch": 1, "block_size": 512, "max_new_tokens": 112}
    card = {"init": "gpt2", "batch": 32, "microbatch": 8, "block_size": 512, "offload": "optimizer"}
    medium, xl = {"init": "gpt2-medium"}, {"init": "gpt2-xl", "microbatch": 4, "checkpoint": True}
    replies = {"minibatch": 16, "max_new_tokens": 128}
    cases = [("ppo 400+112, offload=all", ppo, one | {"offload": "all"}, 10),
             ("ppo 400+112, offload=optimizer", ppo, one | {"offload": "optimizer"}, 10),
             ("ppo 400+112, float32", ppo, one | {"dtype": "float32"}, 10),
             ("ppo 400+112, bfloat16", ppo, one, 10),
             ("ppo 400+112, LoRA 16", ppo, one | {"lora_rank": 16}, 10),
             ("sft, 4 GB card", sft, card, 10), ("reward, 4 GB card", reward, card, 10),
             ("ppo, 4 GB card", ppo, card | replies, 10),
             ("sft, 8 GB card", sft, card | medium, 18), ("reward, 8 GB card", reward, card | medium, 18),
             ("sft, 24 GB card", sft, card | xl, 45)]
    if SMOKE:
        cases = cases[4:8]
        skip("real peaks", "they need a GPU")
    for label, stage, flags, needs in cases:
        if not enough_time(needs, label):
            continue
        if SMOKE:
            flags = flags | {"block_size": 32, "init": "scratch", "n_layer": 2, "n_embd": 64}
            flags |= {"max_new_tokens": 8} if stage is ppo else {}
        flags = flags | ({"target_kl": 0.0} if stage is ppo else {})  # no pass is left out
        cfg = stage.Config(dry_run=True, lr=1e-6, **{"dtype": "bfloat16"} | flags)
        dtype, generate = getattr(torch, cfg.dtype), m.generate
        # as in the dry run, every reply has its full length
        endless = lambda net, prompts, n, end, *rest, **more: generate(net, prompts, n, -1, *rest, **more)
        try:
            with contextlib.redirect_stdout(io.StringIO()), dry_run.dry_run() as count:
                stage.dry_iteration(cfg, dry_run.DEVICE, dtype)
            if CUDA:
                torch.cuda.reset_peak_host_memory_stats()
            with contextlib.redirect_stdout(io.StringIO()), Tracker() as tracker, \
                    mock.patch.object(m, "generate", endless):
                stage.dry_iteration(cfg, DEVICE, dtype)
                tracker.phase("end")
        except Exception as error:  # the next row may do better
            check(False, f"{label}: {type(error).__name__}: {str(error)[:150]}")
            continue
        dry = {name: x["peak_device_bytes"] for name, x in count.phases.items() if name != "setup"}
        host = max(x["peak_host_bytes"] for x in count.phases.values()) / 2**30
        if SMOKE:
            say(f"{label}: ran; the dry run says {max(dry.values()) / 2**20:.2f} MiB")
            continue
        said, real = max(dry.values()), max(tracker.peaks[name] for name in dry)
        pinned = torch.cuda.host_memory_stats()["active_bytes.peak"] / 2**30
        phases = ", ".join(f"{name} {tracker.peaks[name] / 2**30:.3f}/{n / 2**30:.3f}"
                           for name, n in dry.items())
        check(real < max(1.1 * said, said + 2**24), f"{label:31} {real / 2**30:.3f} GiB, dry run "
              f"{said / 2**30:.3f}; pinned on the host {pinned:.2f}, dry run {host:.2f}; {phases}")


def stages():
    flags, n = "--log_every=1 --eval_every=10000 --save_every=10000", 2 if SMOKE else 20
    ppo_flags = f"--best_of_n=1 --steps={2 if SMOKE else 4} --eval_prompts={4 if SMOKE else 64}"
    if SMOKE:
        flags += " --batch=8 --n_layer=1 --n_embd=32 --n_head=2"
        ppo_flags += " --minibatch=4 --max_new_tokens=8"
    runs = {"cpu": "--device=cpu --dtype=float32", "float32": f"--device={DEVICE} --dtype=float32",
            "auto": f"--device={DEVICE} --dtype=auto"}
    if SMOKE:
        del runs["float32"], runs["auto"]
        skip("float32 and bfloat16 against the CPU", "it needs a GPU")
    logs, processes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = ROOT / "data/tiny"
        if SMOKE:  # a few rows of it
            data = Path(folder)
            for path in (ROOT / "data/tiny").glob("*.jsonl"):
                (data / path.name).write_text("".join(open(path).readlines()[:40]))
        # the environment variable: as cudnn_attention(False)
        environment = os.environ | {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
                                    "OMP_NUM_THREADS": "1" if SMOKE else "4"}
        for name, where in runs.items():
            out, python, more = f"{folder}/{name}", f'"{sys.executable}"', f'{flags} {where} --data="{data}"'
            command = (f"{python} sft.py {more} --steps={n} --out={out}/sft && "
                       f"{python} reward.py {more} --steps={n} --init={out}/sft --out={out}/reward && "
                       f"{python} ppo.py {more} {ppo_flags} --init={out}/sft --reward={out}/reward "
                       f"--out={out}/ppo")
            processes[name] = subprocess.Popen(command, shell=True, stdout=subprocess.DEVNULL,
                                               env=environment)
        for name, process in processes.items():
            check(process.wait() == 0, f"{name}: three stages ran")
            for stage in ("sft", "reward", "ppo"):
                path = Path(folder) / name / stage / "log.jsonl"
                rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
                logs[name, stage] = [row for row in rows if "lr" in row]
    for name, stage in logs:
        key, allowed = "value_loss" if stage == "ppo" else "loss", 1e-3 if name == "float32" else 5e-2
        gaps = [abs(ours[key] / theirs[key] - 1)
                for ours, theirs in zip(logs[name, stage], logs["cpu", stage])]
        if name == "cpu" or not gaps:
            continue
        first = max(gaps[:1 if stage == "ppo" else 5])
        text = (f"{stage}, {name} against the CPU: {first:.1e} apart at first, {max(gaps):.1e} in all "
                f"{len(gaps)} steps")
        if (stage, name) == ("ppo", "auto"):
            say(text)  # other replies, so other values
        else:
            check(first < allowed, text)
    for name in runs:
        for row in logs[name, "ppo"][:1]:
            off, allowed = abs(row["ratio_first"] - 1), 1e-2 if name == "auto" else 1e-4
            check(off < allowed, f"ppo, {name}: the first ratio is {off:.1e} off 1")


def repeat():
    base, T = network(sizes=SMALL), 16 if SMOKE else 512

    def weights_after(T, offload):
        cfg = sft.Config(batch=8, offload=offload)
        net = m.setup_training(copy.deepcopy(base), cfg, DEVICE)
        adam = memory.make_optimizer(net, cfg)
        for step in range(2 if SMOKE else 5):
            sft.learn(net, examples(8, T, seed=step), 8 * T, cfg, DEVICE)
            adam.step(1e-3, 1.0)
        return [x.float().cpu() for x in adam.masters]
    for name, length, offload, deterministic, cudnn in (
            ("as shipped", T, "none", False, True), ("cuDNN attention off", T, "none", False, False),
            ("short rows", T // 8, "none", False, False), ("offload=optimizer", T, "optimizer", False, False),
            ("deterministic algorithms", T, "none", True, False),
            ("offload=optimizer, deterministic algorithms", T, "optimizer", True, False)):
        if not enough_time(6, name):
            continue
        cudnn_attention(cudnn)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        gaps = [(x - y).abs().max().item()
                for x, y in zip(weights_after(length, offload), weights_after(length, offload))]
        text = f"differs: the embedding by {gaps[0]:.1e}, the rest by {max(gaps[1:]):.1e}"
        say(f"{name}, {length} tokens: {text if any(gaps) else 'bit-identical'}")


def decode():
    cudnn_attention(False)
    P, N = (8, 6) if SMOKE else (64, 64)
    net = network(dtype=F32).to(DEVICE)
    theirs = in_transformers(net)
    if theirs:
        x = torch.tensor(ids(2, P)).to(DEVICE)
        with torch.no_grad():
            gap = (net.logits(net(x)) - theirs(x).logits).abs().max().item()
        check(gap < 2e-3, f"float32 logits are {gap:.1e} off transformers'")
        theirs = theirs.to(BF16)
    net, speeds = net.to(BF16), {}

    def ends_sometimes(logits, u, *rest):  # replies of 32 tokens on average, so rows leave the batch
        return torch.where(u < 1 / 32, 2, sample(logits, u, *rest).clamp(min=3))
    sample = m.sample
    for B, cudnn in ((2, False),) if SMOKE else ((16, False), (128, False), (16, True)):
        if not enough_time(12, f"{B} rows, cuDNN attention {cudnn}"):
            continue
        cudnn_attention(cudnn)
        prompts = ids(B, P)
        ours = lambda end=-1: m.generate(net, prompts, N, end, generator=rng(0))
        cold = seconds_of(ours)
        seconds = median_seconds(ours, warmup=0) if time_left() > 4 * cold else cold
        speeds[B, cudnn] = B * N / seconds
        say(f"ours, {B} rows x {N}, cuDNN attention {'allowed' if cudnn else 'off'}: "
            f"{B * N / seconds:,.0f} tok/s, {1000 * seconds / N:.2f} ms a token, the first call {cold:.2f} s")
        if time_left() > 8 + 2 * cold:
            with mock.patch.object(m, "sample", ends_sometimes):
                said = sum(map(len, ours(end=2)))
                say(f"    with rows that end: {said / seconds_of(lambda: ours(end=2)):,.0f} tok/s")
    cudnn_attention(False)
    for B in {B for B, _ in speeds} if theirs else ():
        if not enough_time(10, f"transformers, {B} rows"):
            continue
        x = torch.tensor(ids(B, P)).to(DEVICE)
        seconds = median_seconds(lambda: theirs.generate(
            x, attention_mask=torch.ones_like(x), do_sample=True, top_k=0, temperature=1.0, max_new_tokens=N,
            min_new_tokens=N, pad_token_id=0), warmup=1)
        ratio = speeds[B, False] * seconds / B / N
        say(f"transformers, {B} rows x {N}: {B * N / seconds:,.0f} tok/s; ours is {ratio:.2f} times as fast")
    if CUDA and enough_time(8, "profile"):
        activity, prompts = torch.profiler.ProfilerActivity, ids(16, P)
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
            m.generate(net, prompts, 16, -1)
            synchronize()
        events = profile.key_averages()
        counts = [sum(event.count for event in events if name in event.key) / 16
                  for name in ("LaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync")]
        say("a token of 16 rows: {:.0f} kernels, {:.1f} waits, {:.1f} copies, ".format(*counts)
            + f"device busy {sum(event.self_device_time_total for event in events) / 16:.0f} us")


def train():
    B, T = (2, 16) if SMOKE else (32, 512)
    batch, eight = examples(B, T), {"microbatch": 1 if SMOKE else 8}
    for name, flags, dtype, cudnn in (("plain", {}, BF16, False), ("micro-batch 8", eight, BF16, False),
                                      ("checkpoint", {"checkpoint": True}, BF16, False),
                                      ("offload=optimizer", eight | {"offload": "optimizer"}, BF16, False),
                                      ("offload=all", eight | {"offload": "all"}, BF16, False),
                                      ("cuDNN attention allowed", {}, BF16, True),
                                      ("float32", eight, F32, False)):
        if not enough_time(14, name):
            continue
        cudnn_attention(cudnn)
        forget_peaks()
        cfg = sft.Config(batch=B, **flags)
        net = m.setup_training(network(dtype=dtype), cfg, DEVICE)
        adam, weights = memory.make_optimizer(net, cfg), sum(p.numel() for p in net.parameters())
        seconds = median_seconds(lambda: (sft.learn(net, batch, B * T, cfg, DEVICE), adam.step(1e-5, 1.0)))
        say(f"ours, {name}: {B * T / seconds:,.0f} tok/s, {1000 * seconds:.0f} ms, "
            f"{6 * weights * B * T / seconds / 1e12:.0f} TFLOP/s, "
            f"peak {device_bytes(peak=True) / 2**30:.2f} GiB")
        del net, adam  # before the next is made
    forget_peaks()
    cudnn_attention(False)
    theirs = in_transformers(network(dtype=F32).to(DEVICE))
    if theirs:
        adam = torch.optim.AdamW(theirs.train().parameters(), 1e-5, fused=True)
        x = torch.tensor([row for row, _ in batch]).to(DEVICE)

        def step():
            with torch.autocast(DEVICE.type, BF16):
                loss = theirs(input_ids=x, labels=x).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        seconds = median_seconds(step)
        say(f"transformers, autocast, fused AdamW: {B * T / seconds:,.0f} tok/s, {1000 * seconds:.0f} ms, "
            f"peak {device_bytes(peak=True) / 2**30:.2f} GiB")


def four_models(cfg):
    actor, critic = (m.setup_training(network(cls), cfg, DEVICE) for cls in (m.GPT, m.Scorer))
    models = ppo.Models(actor, memory.frozen_copy(actor), critic, memory.frozen_copy(critic))
    return models, ppo.make_optimizers(models, cfg)


def roll_out(models, cfg, step=0):
    rows = [{"ids": row} for row in ids(cfg.batch, cfg.block_size - cfg.max_new_tokens)]
    return ppo.rollout(step, rows, models, SimpleNamespace(end=-1), cfg, cfg.kl_coef)


def ppo_speed():
    cudnn_attention(False)
    B, N, minibatch, microbatch = (4, 6, 2, 1) if SMOKE else (128, 64, 32, 8)
    offloaded = {"offload": "optimizer", "microbatch": microbatch}
    for name, flags in (("plain", {"microbatch": 0}), ("offload=optimizer", offloaded)):
        if not enough_time(15, name):
            continue
        cfg = ppo.Config(batch=B, minibatch=minibatch, max_new_tokens=N, block_size=2 * N, temperature=1.0,
                         target_kl=0.0, **flags)
        with Tracker() as tracker:
            models, adams = four_models(cfg)
            for step in range(1 if SMOKE else 4):
                batch = roll_out(models, cfg, step)
                log = ppo.update(step, batch, models, adams, 1e-6, None, cfg)
                tracker.phase("rest")
                if time_left() < 8:
                    break
        seconds = {phase: statistics.median(x[1:] or x) for phase, x in tracker.seconds.items()
                   if phase not in ("setup", "rest")}  # the first iteration warms up
        total, off = sum(seconds.values()), abs(log["ratio_first"] - 1)
        say(f"{name}: {B * N / total:,.0f} new tok/s, {total:.2f} s ("
            + ", ".join(f"{phase} {x:.2f}" for phase, x in seconds.items())
            + f"), peak {max(tracker.peaks.values()) / 2**30:.2f} GiB")
        check(off < 0.01, f"{name}: the last rollout's first ratio is {off:.1e} off 1")
        del models, adams, batch


def syncs():
    if not CUDA:
        skip("counting", "on a CPU nothing waits")
    cudnn_attention(False)
    P, N = (8, 4) if SMOKE else (64, 8)
    cfg = sft.Config(batch=8)
    ppo_cfg = ppo.Config(batch=8, minibatch=4, max_new_tokens=N, block_size=P + N, epochs=1,
                         target_kl=0.0)
    net, batch, (models, adams) = network().to(DEVICE), examples(8, P), four_models(ppo_cfg)
    adam, rolled = memory.make_optimizer(net, cfg), roll_out(models, ppo_cfg)
    calls = (("generate, a token", N, lambda: m.generate(net, ids(8, P), N, -1)),
             ("an SFT step", 1, lambda: (sft.learn(net, batch, 8 * P, cfg, DEVICE), adam.step(1e-6, 1.0))),
             (f"ppo.rollout, {N} tokens and the scoring", 1, lambda: roll_out(models, ppo_cfg)),
             ("ppo.update, a gradient step", 2,
              lambda: ppo.update(0, rolled, models, adams, 1e-6, None, ppo_cfg)))
    for name, per, call in calls:
        call()
        synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if CUDA:
                torch.cuda.set_sync_debug_mode("warn")
            call()
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
        where = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught
                        if "synchroniz" in str(w.message))
        say(f"{name}: {where.total() / per:.1f} waits  "
            + ", ".join(f"{line} x{n}" for line, n in where.most_common(12)))


PARTS = {"kernels": kernels, "stream": stream, "memory": memory_peaks, "stages": stages, "repeat": repeat,
         "decode": decode, "train": train, "ppo": ppo_speed, "syncs": syncs, "tests": None}


def main(arguments):
    """-> the exit code."""
    names = [x for x in arguments if x not in ("--smoke", "--part")]
    for name in names:
        require(name in PARTS, f"{name}: no such part. Choose from {', '.join(PARTS)}.")
    require(SMOKE or torch.cuda.is_available(), "no GPU that torch can use: on a CPU only --smoke runs.")
    if "--part" not in arguments:
        return drive([name for name in PARTS if name in names or not names])
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    PARTS[names[0]]()
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
