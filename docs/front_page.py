"""The pictures of the front page: ``python docs/front_page.py``.

``images/flow.gif`` is a gradient flow. ``images/{peers,accuracy,scaling}.png`` are drawn from
``benchmarks/results/cpu/*.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import make_moons

import otloss

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
RESULTS = DOCS.parent / "benchmarks" / "results" / "cpu"
NAMES = {"otloss": "otloss", "geomloss": "GeomLoss", "pot": "POT", "ott": "OTT-JAX"}
COLOURS = dict(zip(NAMES, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
SHARP = ("shapes_3d", 2000, 5e-3)  # workload, n, eps


def result(suite: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{suite}.json").read_text())["result"]


def cases() -> list[dict[str, Any]]:
    return [case for case in result("accuracy")["cases"] if case["threads"] == 1]


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", dpi=110)


def flow() -> None:
    """A blob becomes two moons, sixty frames."""
    torch.manual_seed(0)
    n = 400
    target = torch.from_numpy(make_moons(n, noise=0.04, random_state=0)[0]).float()
    x = 0.25 * torch.randn(n, 2) + torch.tensor([-1.2, -0.8])
    order, frames = x[:, 1].argsort(), []
    for _ in range(60):
        frames.append(x[order])
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(otloss.sinkhorn_divergence(x, target, eps=0.02), x)
        x = (x - 0.06 * n * slope).detach()
    figure = Figure(figsize=(4.8, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.set(aspect="equal", xlim=(-2.1, 2.2), ylim=(-1.5, 1.3))
    axes.axis("off")
    axes.scatter(*target.T, s=6, color="lightgrey")
    moving = axes.scatter(*frames[0].T, s=8, c=range(n), cmap="viridis")
    animation = FuncAnimation(figure, lambda k: moving.set_offsets(frames[k]), frames=len(frames))
    animation.save(IMAGES / "flow.gif", writer=PillowWriter(fps=15), dpi=90)


def peers() -> None:
    """Time to a gradient error of 1% over that of otloss, in the cases where a peer gets there."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes, found = figure.subplots(), {}
    for case in cases():
        times = {t["peer"]: t["seconds"] for t in case["targets"] if t["target"] == 0.01}
        for name in ("pot", "ott", "geomloss"):
            if times.get(name) and times.get("otloss"):
                ratio = times[name]["median"] / times["otloss"]["median"]
                found.setdefault(name, []).append(ratio)
    for row, (name, ratios) in enumerate(found.items()):
        axes.scatter(ratios, [row] * len(ratios), alpha=0.7, color=COLOURS[name])
    axes.axvline(1, color="black", lw=1)
    labels = [f"{NAMES[name]} ({len(ratios)} of {len(cases())})" for name, ratios in found.items()]
    axes.set_yticks(range(len(found)), labels)
    axes.set(xscale="log", xlabel="CPU time to a gradient error of 1% / that of otloss")
    save(figure, "peers")


def accuracy() -> None:
    """Error of the gradient against time, one problem."""
    (case,) = (c for c in cases() if (c["workload"], c["n"], c["eps"]) == SHARP)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for peer, label in NAMES.items():
        rungs = [rung for f in case["families"] if f["peer"] == peer for rung in f["rungs"]]
        errors = [rung["gradient_error"] for rung in rungs]
        seconds = [rung["rough_seconds"] for rung in rungs]
        axes.scatter(seconds, errors, s=14, label=label, color=COLOURS[peer])
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="error of the gradient")
    axes.set_title(f"{case['title']}, n = {case['n']}, eps {case['eps']:g}", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(NAMES), fontsize=8)
    save(figure, "accuracy")


def scaling() -> None:
    """CPU time against the number of points: a colour for each problem, a line for each method."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes, curves = figure.subplots(), {}
    for row in result("large")["rows"]:
        if "cpu_seconds" in row and "float64" not in row["method"]:
            method = row["method"].split(",")[0].replace("geomloss", "GeomLoss")
            name = (f"{row['title']}, eps {row['eps']:g}", method)
            curves.setdefault(name, []).append((row["n"], row["cpu_seconds"]))
    problems, methods = (list(dict.fromkeys(part)) for part in zip(*sorted(curves), strict=True))
    methods.sort(reverse=True)
    colours = dict(zip(problems, ("tab:blue", "tab:cyan", "tab:red", "tab:orange"), strict=False))
    styles = dict(zip(methods, ("o-", "s--", "^:"), strict=False))
    for (problem, method), points in curves.items():
        of_line = {"color": colours[problem], "ms": 5}
        axes.loglog(*zip(*sorted(points), strict=True), styles[method], **of_line)
    keys = [Line2D([], [], color=colours[problem], lw=4, label=problem) for problem in problems]
    for method in methods:
        line = {"linestyle": styles[method][1:], "marker": styles[method][0]}
        keys.append(Line2D([], [], color="grey", label=method, **line))
    axes.set(xlabel="points in each cloud", ylabel="CPU seconds")
    figure.legend(handles=keys, loc="outside lower center", fontsize=7, ncols=2)
    save(figure, "scaling")


if __name__ == "__main__":
    for picture in (flow, peers, accuracy, scaling):
        picture()
