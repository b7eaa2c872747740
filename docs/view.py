"""Shows a run: as a page, out/ppo/run.html, and as pictures from logs.

    python docs/view.py out/ppo             # the page; --watch writes it anew while the run goes on
    python docs/view.py learning a.png sft=out/sft reward=out/reward ppo=out/ppo
    python docs/view.py styles b.png ppo=out/ppo
    python docs/view.py calibration c.png "reward model"=out/reward
    python docs/view.py overoptimisation d.png "with penalty"=out/ppo-weak "best of n"=out/best-of
    python docs/view.py memory e.png "float32"=out/dry32 "everything on the host"=out/dry-all
    python docs/view.py kept f.png "as it comes=out/kept" "after GRPO=out/kept"

The six are pictures: what it shows, the file, label=folder of each run. They need matplotlib, which nothing
else here does.
"""
import json
import math
import sys
import time
from html import escape
from pathlib import Path

GREY = "#808080"  # legible on white and on black, as the colours are
COLOURS = "#2a78d6", "#e8743b", "#3ba55d", "#a05ac8", "#c8a415", GREY
WINDOW = 8  # logged steps in a point's average


def read(folder):
    """-> the log's lines as dicts; of a run that has ended, the last is the summary."""
    paths = [path for name in ("log.jsonl.new", "log.jsonl") if (path := Path(folder) / name).exists()]
    if not paths:
        raise SystemExit(f"{folder}/log.jsonl: no log here. The README says which command makes it.")
    lines = paths[0].read_text(encoding="utf-8").split("\n")[:-1]  # not the one that is being written
    if not lines:
        raise SystemExit(f"{paths[0]}: nothing logged yet.")
    return [json.loads(line) for line in lines]


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


def styles(plt, runs):
    """How the policy speaks, rollout by rollout: shares of its replies by the checks."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    rows = [row for row in read(runs[0][1]) if row.get("right") is not None and row.get("gold") is not None]
    good, right = (smooth([row[name] for row in rows]) for name in ("gold", "right"))
    manners = [max(0, r - g) for r, g in zip(right, good)]
    wrong = [1 - max(r, g) for r, g in zip(right, good)]
    axis.stackplot([row["step"] for row in rows], good, manners, wrong, colors=COLOURS[2::-1],
                   labels=("right, polite, to the point", "right, but curt, rude or rambling", "wrong"))
    axis.set(xlabel="PPO's rollouts", ylabel="share of replies in training", ylim=(0, 1),
             xlim=(1, rows[-1]["step"]))
    axis.legend(loc="lower right", fontsize=11)
    return figure, [axis]


def calibration(plt, runs):
    """Of the pairs that the reward model is 80 % sure of, is it right on 80 %?"""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    axis.plot([0.5, 1], [0.5, 1], "--", color=GREY, label="as sure as it should be")
    for colour, (label, folder) in zip(COLOURS, runs):
        bins = next(row["calibration"] for row in read(folder) if "calibration" in row)
        _, sure, right = zip(*bins) if bins else ((), (), ())
        axis.plot(sure, right, "o-", color=colour, linewidth=2.5, label=label)
    axis.set(xlabel="confidence: sigmoid(|score difference|)", ylabel="share of pairs in which it is right",
             ylim=(0, 1.02))
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=11)
    return figure, [axis]


def overoptimisation(plt, runs):
    """What the reward model says and what is true, as the policy leaves stage 1: Gao et al. 2022,
    arXiv:2210.10760, figure 1, for one reward model. A run may be best-of of docs/bench.py: a dot for each n.
    """
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 7.2), sharex=True)
    for colour, (label, folder) in zip(COLOURS, runs):
        steps = [row for row in read(folder) if "kl" in row and "gold" in row]
        best_of = "n" in steps[0]
        for axis, name, at_the_end in zip(axes, ("score", "gold"), ("score", "gold_after")):
            kl, y = ([row[key] for row in steps] for key in ("kl", name))
            axis.plot(*((kl, y) if best_of else map(smooth, (kl, y))), "o--" if best_of else "-",
                      color=colour, linewidth=2.5, label=label)
            end = read(folder)[-1]
            if end.get("gold_after") is not None:  # of a run that has ended, on held-out prompts
                axis.plot(end["kl"], end[at_the_end], "D", color=colour)
    axes[0].set_ylabel("learned score")
    axes[1].set(ylabel="gold score", xlabel="KL from stage 1, nats a reply", ylim=(0, 1))
    axes[0].legend(frameon=False)
    return figure, axes


def kept(plt, runs):
    """Instructions kept, by kind, from the log of docs/bench.py follow: the first policy in it has the first
    label, and so on. The lowest row of each panel is the share of all its replies, with its interval."""
    log = read(runs[0][1])
    sets = list(dict.fromkeys(row["set"] for row in log))
    kinds = [list(next(row for row in log if row["set"] == name)["kinds"]) for name in sets]
    figure, axes = plt.subplots(len(sets), 1, figsize=(7, 0.3 * sum(map(len, kinds)) + 2.8), sharex=True,
                                height_ratios=[len(names) + 1 for names in kinds])
    for axis, name, names in zip(axes, sets, kinds):
        rows = [row for row in log if row["set"] == name][:len(runs)]
        names = sorted(names, key=lambda kind: rows[-1]["kinds"][kind])
        axis.hlines(range(1, len(names) + 1), [min(row["kinds"][kind] for row in rows) for kind in names],
                    [max(row["kinds"][kind] for row in rows) for kind in names], color=GREY, alpha=0.4)
        for colour, (label, _), row in zip(COLOURS, runs, rows):
            share, low, high = row["kept"]
            axis.plot([row["kinds"][kind] for kind in names], range(1, len(names) + 1), "o", color=colour)
            axis.errorbar(share, 0, xerr=[[share - low], [high - share]], fmt="D", color=colour, capsize=3,
                          label=label)
        axis.set_yticks(range(len(names) + 1), ["all", *names])
        axis.set(title=f"{name}, {rows[0]['replies']} prompts", xlim=(-0.03, 1.03))
    axes[0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.38, 1.08), ncols=3, fontsize=11)
    axes[-1].set_xlabel("share of replies that keep the instruction")
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
        axis.barh(labels, sizes, left=left, color=colour, label=owner if max(sizes) > 0.05 else None)
        left = [a + b for a, b in zip(left, sizes)]
    for y, total in enumerate(left):
        axis.text(total, y, f" {total:.2f}", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="GiB on the device at the peak, simulated", xlim=(0, 1.15 * max(left)))
    axis.legend(frameon=False, fontsize=10)
    return figure, [axis]


# --- the page -----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark;
        --ink: #1f2328; --soft: #59636e; --line: #d0d7de; --paper: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --card: #151b23 } }
body { margin: 0 auto; max-width: 1160px; padding: 16px; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 24px; margin: 8px 0 }  h2 { font-size: 19px; margin: 32px 0 4px }
p { margin: 4px 0 12px; color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 16px }
figure, .reply { margin: 8px 0 0; background: var(--card); border: 1px solid var(--line);
                 border-radius: 8px; padding: 10px }
figcaption, .reply b { font-weight: 600; font-size: 15px }
svg { width: 100%; height: auto; display: block }  svg text { fill: var(--soft); font-size: 12px }
.key { font-size: 13px; color: var(--soft) }
.healthy { font-size: 13px; margin: 4px 0 0 }
.key span { white-space: nowrap; margin-right: 10px }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px }
input { position: absolute; opacity: 0 }  input:focus-visible + label { outline: 2px solid var(--ink) }
label { display: inline-block; padding: 3px 10px; border: 1px solid var(--line); border-radius: 14px;
        font-size: 14px; cursor: pointer; margin: 0 6px 6px 0 }
input:checked + label { background: var(--ink); color: var(--paper) }
.token { white-space: pre-wrap; padding: 2px 0; border-radius: 3px }
summary { cursor: pointer; margin: 12px 0 }
table { border-collapse: collapse; font-size: 14px }
td, th { border-top: 1px solid var(--line); padding: 5px 12px 5px 0; text-align: left; vertical-align: top }
.warning { border-left: 4px solid #e8743b; padding-left: 10px }
"""
VIEWS = {  # a token's number: how the page says it, and where its colour is full
    "kl": ("log-ratio", "how much likelier than stage 1 the policy made it", 1),
    "reward": ("reward", "what it was paid: the score on the last token, less what the distance costs", 1),
    "value": ("value", "what the critic expected from there on", 2),
    "advantage": ("advantage", "better or worse than expected: what the policy learns from", 2)}


def ticks(low, high):
    """-> four to eight round numbers from at or below low to at or above high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def chart(title, healthy, series, levels=None, low=0.0, xlabel="step", width=360, height=190):
    """{label: (x, y)}, {label: y of a dashed line} -> an SVG line chart, its key, and what is healthy there;
    "" without any point. The axis begins at `low`, or lower if a number does."""
    levels = {label: y for label, y in (levels or {}).items() if y is not None}
    series = {label: (x, y) for label, (x, y) in series.items() if x}
    if not series:
        return ""
    xs, ys = ([v for pair in series.values() for v in pair[i]] for i in (0, 1))
    marks = ticks(min([low, *ys]), max([low + 0.01, *ys, *levels.values()]))
    low, high, right = marks[0], marks[-1], max(xs) or 1
    px = lambda x: f"{44 + (width - 54) * x / right:.1f}"
    py = lambda y: f"{height - 24 - (height - 34) * (y - low) / (high - low):.1f}"
    out, key = [], []
    for y in marks:
        out.append(f'<line x1="44" x2="{width - 10}" y1="{py(y)}" y2="{py(y)}" stroke="var(--line)"/>'
                   f'<text x="40" y="{float(py(y)) + 4}" text-anchor="end">{y:g}</text>')
    for colour, (label, (x, y)) in zip(COLOURS, series.items()):
        line = " ".join(f"{px(a)},{py(b)}" for a, b in zip(x, y))
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                   + f'<circle cx="{px(x[-1])}" cy="{py(y[-1])}" r="3" fill="{colour}"/>')
        key.append((colour, f"{label} {y[-1]:.3g}"))
    for colour, (label, y) in zip(COLOURS[len(series):], levels.items()):
        out.append(f'<line x1="44" x2="{width - 10}" y1="{py(y)}" y2="{py(y)}" stroke="{colour}" '
                   'stroke-dasharray="5 4"/>')
        key.append((colour, f"{label} {y:.3g}"))
    out.append(f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">{xlabel} {right:.4g}</text>')
    keys = " ".join(f'<span><i style="background:{colour}"></i>{escape(text)}</span>' for colour, text in key)
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
            f'{"".join(out)}</svg><div class="key">{keys}</div><p class="healthy">{healthy}</p></figure>')


def column(rows, name, x="step"):
    """-> (x, y) of the steps that logged both."""
    rows = [row for row in rows if "final" not in row and None not in (row.get(name), row.get(x))]
    y = [row[name] for row in rows]
    return [row[x] for row in rows], smooth(y) if len(y) > 2 * WINDOW else y


def charts(sft, reward, ppo):
    """The logs of the three stages, [] where there is none -> what they learned, as HTML."""
    last = ppo[-1] if ppo and ppo[-1].get("final") else {}
    ceiling = {"ceiling of noisy labels": reward[-1].get("ceiling")} if reward else {}
    gold = {"held out, stage 1": last.get("gold_before"), "best of n": last.get("gold_best_of_n"),
            "after PPO": last.get("gold_after")}
    spoken = [row | {"manners": max(0, row["right"] - row["gold"]),
                     "wrong": 1 - max(row["right"], row["gold"])}
              for row in ppo if None not in (row.get("right"), row.get("gold"))]
    by_kl = sorted((row for row in ppo if row.get("kl") is not None and "final" not in row),
                   key=lambda row: row["kl"])
    series = lambda rows, *names: {name.replace("_", " "): column(rows, name) for name in names}
    out = [
        chart("Stage 1 imitates: loss, nats a token", "Falls fast, then slowly; held out stays close.",
              {"training": column(sft, "loss"), "held out": column(sft, "val_loss")}),
        chart("Stage 2 ranks: share of pairs right", "Climbs towards the ceiling; 0.5 is guessing.",
              {"training": column(reward, "accuracy"), "held out": column(reward, "val_accuracy")},
              ceiling, low=0.5),
        chart("Stage 3: what is paid", "Rises and levels off.", series(ppo, "score")),
        chart("Distance from stage 1", "Rises to a few nats a reply; far beyond, scores mean little.",
              series(ppo, "kl")),
        chart("Stage 3: what is true, by the checks", "Rises with the score. If only the score rises, it is "
              "being cheated.", series(ppo, "gold", "right"), gold),
        chart("How it speaks: shares of replies", "gold takes the place of the others.", {
            label: column(spoken, name) for label, name in (
                ("gold", "gold"), ("right, but curt, rude or rambling", "manners"), ("wrong", "wrong"))}),
        chart("Score over distance", "Bends: the same score costs ever more.", {
            "score": column(by_kl, "score", "kl")}, xlabel="KL, nats a reply:"),
        chart("Gold over distance", "Falls where the policy has outrun the reward model.", {
            "gold": column(by_kl, "gold", "kl")}, xlabel="KL, nats a reply:"),
        chart("Entropy, nats a token", "Falls slowly; near 0 the policy says one thing only.",
              series(ppo, "entropy")),
        chart("Share of clipped tokens", "Small, often 0: steps are short.", series(ppo, "clip_fraction")),
        chart("The critic's loss", "Falls, then is as noisy as the scores.", series(ppo, "value_loss")),
        chart("Length of a reply, tokens", "No trend that nobody pays for.", series(ppo, "response_length"))]
    return f'<div class="charts">{"".join(out)}</div>'


def coloured(reply, view):
    """A reply, each token coloured by one of its numbers; all of them on hover."""
    columns, out = reply["columns"], []
    if view not in columns:
        return "<i>without a critic there is none</i>"
    full = max(VIEWS[view][2], *map(abs, columns[view]))
    for i, (token, x) in enumerate(zip(reply["tokens"], columns[view])):
        told = ", ".join(f"{name} {numbers[i]:.3f}" for name, numbers in columns.items())
        rgb = "42,120,214" if x > 0 else "232,116,59"
        out.append(f'<span class="token" title="{escape(told)}" style="background:rgba({rgb},'
                   f'{0.75 * abs(x) / full:.2f})">{escape(token)}</span>')
    return "".join(out)


def table(rows, head=()):
    """-> HTML."""
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{escape(str(x))}</{tag}>" for x in row) + "</tr>"
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def numbers_of(reply):
    rows = zip(reply["tokens"], *reply["columns"].values())
    return table([(token, *(f"{round(x, 3) + 0.0:.3f}" for x in numbers)) for token, *numbers in rows],
                 ("token", *reply["columns"]))


def rollouts(rows):
    """What PPO logged every --eval_every, with a switch for what the colours mean (without scripts: each view
    is there, and the checked button's style hides the others). It opens on the advantage: of the first
    rollout the log-ratio is 0 everywhere."""
    out = ["<h2>Rollouts, token by token</h2><p>Blue is above 0, orange below, the deeper the more. All "
           "numbers of a token show on hover, and under each reply.</p>"]
    for name, (word, means, _) in VIEWS.items():
        out.append(f'<input type="radio" name="view" id="{name}"{" checked" * (name == "advantage")}>'
                   f'<label for="{name}" title="{means}">{word}</label>')
    out.append("<style>" + "".join(f"#{name}:checked ~ div .{other} {{ display: none }} "
                                   for name in VIEWS for other in VIEWS if other != name) + "</style>")
    for name, (word, means, _) in VIEWS.items():
        out.append(f'<div><p class="{name}">{word}: {means}</p></div>')
    for k, row in enumerate(rows):
        replies = "".join(
            f'<div class="reply"><b>{escape(reply["question"])}</b> (score {reply["score"]:+.2f})<br>'
            + "".join(f'<span class="{view}">{coloured(reply, view)}</span>' for view in VIEWS)
            + f"<details><summary>numbers</summary>{numbers_of(reply)}</details></div>"
            for reply in row["rollouts"])
        opened = " open" * (k in (0, len(rows) - 1))
        out.append(f"<div><details{opened}><summary>rollout {row['step']}</summary>{replies}</details></div>")
    return "".join(out)


def result(last):
    """The summary in a sentence."""
    pairs = [f"{name} {last[f'{name}_before']:.2f} → {last[f'{name}_after']:.2f}"
             for name in ("gold", "right") if last.get(f"{name}_after") is not None]
    words = {"win_rate": "win rate over stage 1", "kl": "KL from stage 1, nats a reply",
             "val_accuracy": "pairs right", "ceiling": "of at most", "val_loss": "loss, nats a token"}
    pairs += [f"{word} {last[name]:.2f}" for name, word in words.items() if last.get(name) is not None]
    return "Held out: " + ", ".join(pairs) if pairs else ""


def page(folder, reload):
    """-> a run of any stage as HTML: one file, nothing from the network, no script."""
    log = read(folder)
    first = next((row for row in log if "rollouts" in row), {"flags": {}, "machine": ""})
    flags, last = first["flags"], log[-1] if log[-1].get("final") else {}
    has_log = lambda folder: (path := Path(folder) / "log.jsonl").is_file() and path.stat().st_size
    other = lambda flag: read(flags[flag]) if flag in flags and has_log(flags[flag]) else []
    logged = {key for row in log for key in row}
    stage = "ppo" if "kl" in logged else "reward" if "accuracy" in logged else "sft"
    logs = {"sft": other("init"), "reward": other("reward"), "ppo": []} | {stage: log}
    said = [row for row in log if "rollouts" in row]
    number = lambda x: f"{x:.4g}" if isinstance(x, float) else x
    names = {"sft": "Stage 1", "reward": "Stage 2", "ppo": "Stage 3"}
    out = [f"<h1>{names[stage]}: {escape(str(folder))}</h1>", f"<p>{result(last)}</p>"]
    if not last:
        out.append(f"<p>not finished: step {log[-1].get('step', 0)} of {flags.get('steps', '?')}</p>")
    for row in log:
        if "warning" in row:
            out.append(f'<p class="warning">step {row["step"]}: {escape(row["warning"])}</p>')
    out += ["<h2>What it learned</h2>", charts(**logs)]
    out.append(rollouts(said) if said else "")
    for row in log:
        if "samples" in row:
            out += ["<h2>Before and after, on held-out prompts</h2>", table(
                [(x["question"], f"{x['before']} ({x['score_before']:+.2f})",
                  f"{x['after']} ({x['score_after']:+.2f})") for x in row["samples"]],
                ("question", "stage 1 (its score)", "after PPO"))]
        if "sets" in row:
            heads = [*next(iter(row["sets"].values()))]
            cells = [(name, *map(number, shares.values())) for name, shares in row["sets"].items()]
            out += ["<h2>Every held-out set</h2>", table(cells, ("set", *heads))]
    summary = [(k, number(v)) for k, v in last.items() if k not in ("final", "step") and v is not None]
    for title, rows in (("summary", summary), ("flags", [(f"--{k}", v) for k, v in flags.items()])):
        out.append(f"<details><summary>{title}</summary>{table(rows)}</details>" if rows else "")
    out.append(f"<p>{escape(first['machine'])}</p>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content='
            f'"width=device-width, initial-scale=1">{reload}<title>{escape(str(folder))}</title>'
            f"<style>{STYLE}</style></head><body>{''.join(out)}</body></html>")


def write_page(folder, watch):
    """Write folder/run.html; with watch again and again, until the run has ended. The page reloads itself."""
    path, ended = Path(folder) / "run.html", False
    while not ended:
        ended = not watch or bool(read(folder)[-1].get("final"))
        html = page(folder, "" if ended else '<meta http-equiv="refresh" content="5">')
        path.with_suffix(".tmp").write_text(html, encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
        print(f"{path}: written", flush=True)
        time.sleep(0 if ended else 5)


# --- the command line ---------------------------------------------------------------------------------------

def draw(kind, picture, runs):
    kinds = {f.__name__: f for f in (learning, styles, calibration, overoptimisation, kept, memory)}
    if kind not in kinds:
        raise SystemExit(f"{kind}: no such picture. Choose from {', '.join(kinds)}.")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 13, "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
                     "axes.titlecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    figure, axes = kinds[kind](plt, runs)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, transparent=True, dpi=110)
    print(f"{picture}: drawn")


if __name__ == "__main__":
    arguments = [arg for arg in sys.argv[1:] if arg != "--watch"]
    if len(arguments) == 1 and "=" not in arguments[0]:
        write_page(arguments[0], watch="--watch" in sys.argv)
    elif len(arguments) > 2 and all("=" in arg for arg in arguments[2:]):
        draw(*arguments[:2], [arg.rsplit("=", 1) for arg in arguments[2:]])
    else:
        raise SystemExit(__doc__)
