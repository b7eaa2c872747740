"""Draws the README's pictures from logs. Needs matplotlib, which nothing else here does.

    python docs/view.py learning.png sft=out/sft reward=out/reward ppo=out/ppo
    python docs/view.py calibration.png "reward model"=out/reward
    python docs/view.py overoptimisation.png "with penalty"=out/ppo-weak "best of n"=out/best-of
    python docs/view.py memory.png "float32"=out/dry32 "everything on the host"=out/dry-all

The picture's name says which of the four it is; label=folder are the runs.
"""
import json
import sys
from pathlib import Path

GREY = "#808080"  # legible on white and on black, as the colours are
COLOURS = "#2a78d6", "#e8743b", "#3ba55d", "#a05ac8", "#c8a415", GREY
WINDOW = 8  # logged steps in a point's average


def read(folder):
    """-> the log's lines as dicts, the last of them the summary."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise SystemExit(f"{path}: no log here. The README says which command makes it.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows or not (rows[-1].get("final") or rows[-1].get("dry_run")):
        raise SystemExit(f"{path}: the run has not ended. Go on with --resume.")
    return rows


def smooth(numbers):
    parts = (numbers[max(0, i - WINDOW + 1):i + 1] for i in range(len(numbers)))
    return [sum(part) / len(part) for part in parts]


def curve(axis, rows, name, colour, label=None):
    steps = [(row["step"], row[name]) for row in rows if row.get(name) is not None and not row.get("final")]
    x, y = zip(*steps) if steps else ((), ())
    axis.plot(x, smooth(y), color=colour, linewidth=2.5, label=label)


def learning(plt, runs):
    """The three stages, one above the other."""
    figure, axes = plt.subplots(3, 1, figsize=(6.4, 9))
    sft, reward, ppo = (read(folder) for _, folder in runs)
    curve(axes[0], sft, "loss", COLOURS[0])
    axes[0].set(ylabel="loss", title="stage 1: demonstrations", ylim=(0, 3))
    curve(axes[1], reward, "accuracy", COLOURS[0], "pairs in training")
    held_out = [(row["step"], row["val_accuracy"]) for row in reward if "val_accuracy" in row]
    axes[1].plot(*zip(*held_out), "o", color=COLOURS[1], label="held-out pairs")
    if reward[-1]["ceiling"]:
        axes[1].axhline(reward[-1]["ceiling"], color=GREY, linestyle="--", label="ceiling of noisy labels")
    axes[1].set(ylabel="accuracy", title="stage 2: preferences", ylim=(0.5, 1))
    axes[1].legend(frameon=False, loc="lower right")
    curve(axes[2], ppo, "gold", COLOURS[0], "rollouts in training")
    for name, style in (("gold_before", ":"), ("gold_best_of_n", "--"), ("gold_after", "-")):
        if ppo[-1].get(name) is not None:
            axes[2].axhline(ppo[-1][name], color=COLOURS[1], linestyle=style,
                            label="held out, " + name.removeprefix("gold_").replace("_", " "))
    axes[2].set(xlabel="step", ylabel="gold score", title="stage 3: PPO", ylim=(0, 1))
    axes[2].legend(frameon=False, loc="center right")
    return figure, axes


def calibration(plt, runs):
    """Of the pairs that the reward model is 80 % sure of, is it right on 80 %?"""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    axis.plot([0.5, 1], [0.5, 1], "--", color=GREY, label="as sure as it should be")
    for colour, (label, folder) in zip(COLOURS, runs):
        bins = next(row["calibration"] for row in read(folder) if "calibration" in row)
        _, sure, right = zip(*bins)
        axis.plot(sure, right, "o-", color=colour, linewidth=2.5, label=label)
    axis.set(xlabel="confidence: sigmoid(|score difference|)", ylabel="right on held-out pairs",
             ylim=(0.45, 1.02))
    axis.legend(frameon=False)
    return figure, [axis]


def overoptimisation(plt, runs):
    """What the reward model says and what is true, as the policy leaves stage 1: Gao et al. 2022,
    arXiv:2210.10760, figure 1, for one reward model. A run may be best-of of docs/bench.py: a dot for each n.
    """
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 7.2), sharex=True)
    for colour, (label, folder) in zip(COLOURS, runs):
        steps = [row for row in read(folder) if "kl" in row and "gold" in row]
        best_of = "n" in steps[0]
        for axis, name in zip(axes, ("score", "gold")):
            kl, y = ([row[key] for row in steps] for key in ("kl", name))
            axis.plot(*((kl, y) if best_of else map(smooth, (kl, y))), "o--" if best_of else "-",
                      color=colour, linewidth=2.5, label=label)
    axes[0].set_ylabel("learned score")
    axes[1].set(ylabel="gold score", xlabel="KL from stage 1, nats a reply", ylim=(0, 1))
    axes[0].legend(frameon=False)
    return figure, axes


def memory(plt, runs):
    """The device's peak by owner, from dry runs."""
    figure, axis = plt.subplots(figsize=(6.4, 1.6 + 0.6 * len(runs)))
    peaks = [max(read(folder)[-1]["phases"].values(), key=lambda phase: phase["peak_device_bytes"])["owners"]
             for _, folder in runs]
    left, labels = [0.0] * len(runs), [label for label, _ in runs]
    owners = "weights", "gradients", "optimizer", "activations", "KV cache", "logits"
    for colour, owner in zip(COLOURS, owners):
        sizes = [peak.get(owner, 0) / 2**30 for peak in peaks]
        axis.barh(labels, sizes, left=left, color=colour, label=owner)
        left = [a + b for a, b in zip(left, sizes)]
    for y, total in enumerate(left):
        axis.text(total, y, f" {total:.2f}", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="GiB on the device at the peak, simulated", xlim=(0, 1.15 * max(left)))
    axis.legend(frameon=False, fontsize=10)
    return figure, [axis]


def main(picture, runs):
    kinds = {f.__name__: f for f in (learning, calibration, overoptimisation, memory)}
    if Path(picture).stem not in kinds:
        raise SystemExit(f"{picture}: the name has to be one of {', '.join(kinds)} and .png.")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 13, "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
                     "axes.titlecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    figure, axes = kinds[Path(picture).stem](plt, runs)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, transparent=True, dpi=110)
    print(f"{picture}: drawn")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in arg for arg in sys.argv[2:]):
        raise SystemExit(__doc__)
    main(sys.argv[1], [arg.rsplit("=", 1) for arg in sys.argv[2:]])
