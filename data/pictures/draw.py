"""Draws the README's picture from PPO's logs: what the reward model says and what is true, as the policy
leaves stage 1.

    python data/pictures/draw.py overoptimisation.png "with penalty"=out/ppo "without"=out/ppo-free

Each line is a run (Gao et al. 2022, arXiv:2210.10760, figure 1, for a single reward model); the star is stage
1's best of 16 by the same reward model, from the first run. Needs matplotlib, which nothing else here does.
"""
import json
import math
import sys
from pathlib import Path

WINDOW = 8  # rollouts in a point's average


def read(folder):
    """-> (log lines of the training steps, the summary)."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise SystemExit(f"{path}: no log here. Run \"python ppo.py --out={folder}\" first.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps, final = [row for row in rows if "kl_k3" in row], [row for row in rows if row.get("final")]
    if not steps or not final:
        raise SystemExit(f"{path}: the run has not ended. Go on with --resume.")
    return steps, final[-1]


def smooth(numbers):
    return [sum(part) / len(part) for part in (numbers[max(0, i - WINDOW + 1):i + 1] for i in range(len(numbers)))]


def main(picture, runs, n=16):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    grey = "#808080"  # legible on white and on black
    plt.rcParams |= {"font.size": 13, "text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey,
                     "xtick.color": grey, "ytick.color": grey}
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 7.2), sharex=True)
    for colour, (label, folder) in zip(("#2a78d6", "#e8743b", "#3ba55d"), runs):
        steps, _ = read(folder)
        kl = smooth([row["kl"] for row in steps])
        for axis, name in zip(axes, ("score", "gold")):
            axis.plot(kl, smooth([row[name] for row in steps]), color=colour, linewidth=2.5, label=label)
    final = read(runs[0][1])[1]
    best_kl = math.log(n) - (n - 1) / n  # of best-of-n: Stiennon et al. 2020, appendix G.3
    axes[0].plot(best_kl, final["score_best_of_n"], "*", color=grey, markersize=16, label=f"best of {n}")
    axes[1].plot(best_kl, final["gold_best_of_n"], "*", color=grey, markersize=16)
    axes[0].set_ylabel("learned score")
    axes[1].set_ylabel("gold score")
    axes[1].set_xlabel("KL from stage 1, nats a reply")
    axes[1].set_ylim(0, 1)
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, transparent=True, dpi=110)
    print(f"{picture}: drawn")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in arg for arg in sys.argv[2:]):
        raise SystemExit(__doc__)
    main(sys.argv[1], [arg.split("=", 1) for arg in sys.argv[2:]])
