"""The tables of the page, from the reports of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comparison.settings import (
    BARS,
    CIFAR10,
    CLAIM,
    COLUMNS,
    COMMANDS,
    DIGITS,
    ELLIPSES,
    FASHION,
    FLOWS,
    FOLLOW,
    GEIST_COLUMNS,
    INF,
    LABEL,
    LEARNED_RUNS,
    LI_LIANG_RUNS,
    MINUTES,
    MIXTURES,
    MNIST,
    PLAIN,
    SMOOTH,
    SWEEPS,
    french_of,
    names_of,
)

Report = dict[str, Any]
Reports = Mapping[str, Report]
SIZES = {"digits": 1297, "mnist": 60_000, "fashion": 60_000, "cifar10": 50_000}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def present(reports: Reports, base: str) -> list[Report]:
    """The reports of one setting, one per seed."""
    return [reports[name] for name in names_of(base) if name in reports]


def there(rows: Mapping[str, str], reports: Reports) -> list[tuple[str, Report]]:
    """The rows, by label, whose run has a report."""
    return [(label, reports[name]) for label, name in rows.items() if name in reports]


def spread(values: Sequence[float], digits: int) -> str:
    """The value, or mean ± deviation of several seeds; - where there is none."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def cell(reports: Sequence[Report], key: str, part: str = "metrics") -> str:
    """One figure of the runs that have it."""
    return spread([report[part][key] for report in reports if key in report[part]], digits_of(key))


def digits_of(key: str) -> int:
    """Decimals of a figure."""
    return DIGITS.get(key, 1)


def cpu_seconds(reports: Sequence[Report]) -> str:
    """What a run took of one core. Where that was not recorded the wall time bounds it."""
    if measured := [report["cpu_seconds"] for report in reports if "cpu_seconds" in report]:
        return f"{statistics.fmean(measured):.0f}"
    return f"≤ {statistics.fmean(report['seconds'] for report in reports):.0f}"


def scores(reports: Reports, rows: Mapping[str, str], columns: Sequence[str]) -> list[list[str]]:
    """Rows of figures by label, and above them the floors on each of the data sets."""
    table_rows = []
    for label, base in rows.items():
        if found := present(reports, base):
            cells = [cell(found, key) for key in columns]
            table_rows.append([label, *cells, f"{len(found)}", cpu_seconds(found)])
    found = [report for base in rows.values() for report in present(reports, base)]
    by_data = {report["args"]["data"]: report for report in reversed(found)}
    floors = []
    for data, report in sorted(by_data.items()):
        label = "real against real" + (f", {data}" if len(by_data) > 1 else "")
        floors.append([label, *(cell([report], key, "floors") for key in columns), "", ""])
    return [*floors, *table_rows]


def fashion(reports: Reports) -> str:
    """The report's table beside ours."""
    published = {label: figures for label, (_, figures) in FASHION.items()}
    rows = scores(reports, {label: base for label, (base, _) in FASHION.items()}, GEIST_COLUMNS)
    rows = [[label, published.get(label, "-"), *rest] for label, *rest in rows]
    names = [COLUMNS[key] for key in GEIST_COLUMNS]
    return table(["", "report: OT / IS", *names, "seeds", "CPU seconds"], rows)


def best_score(reports: Reports) -> str:
    """Whether the GAN has the best inception score, as Geist & Gérard found, in a sentence."""
    found = {
        label: statistics.fmean(report["metrics"]["geist_is"] for report in seeds)
        for label, base in CLAIM.items()
        if (seeds := present(reports, base))
    }
    if len(found) < len(CLAIM):
        return "not run"
    best = max(found, key=lambda label: found[label])
    verdict = "reproduced" if best == "GAN" else "not reproduced"
    listed = ", ".join(f"{label} {value:.2f}" for label, value in found.items())
    return f"Their finding that the GAN has the best inception score is {verdict}: {listed}."


def plain_scores(
    rows: Mapping[str, str], columns: Sequence[str] = PLAIN
) -> Callable[[Reports], str]:
    """These figures of the runs, a row for each."""

    def part(reports: Reports) -> str:
        header = ["", *(COLUMNS[key] for key in columns), "seeds", "CPU seconds"]
        return table(header, scores(reports, rows, columns))

    return part


def sweeps(reports: Reports) -> str:
    """The best value of each sweep by each measure."""
    rows = []
    for name in filter(reports.__contains__, SWEEPS):
        found = reports[name]["metrics"]
        cells = []
        for key, choose in (("fid", min), ("recall", max), ("med2", min)):
            best = choose(found, key=lambda setting, key=key: found[setting][key])
            cells.append(f"{best} ({found[best][key]:.{max(1, digits_of(key))}f})")
        rows.append([name, *cells])
    return table(["", "best FID", "best recall", "best MED²"], rows)


def bars(reports: Reports) -> str:
    """Every bar, what was reached, and whether that is within it."""
    rows = []
    for base, key, least, most in BARS:
        wanted = f"≥ {least:g}" if most in (INF, 1) else f"{least:g} to {most:g}"
        wanted = f"≤ {most:g}" if least in (-INF, 0) else wanted
        values = [report["metrics"][key] for report in present(reports, base)]
        reached = spread(values, 3 if key == "accuracy" else 2) if values else "not run"
        # Beyond the better side of a two-sided bar is still beyond what the source reports.
        within = sum(least <= value <= most for value in values)
        verdict = "yes" if values and least <= statistics.fmean(values) <= most else "**no**"
        if within < len(values) and len(values) > 1:
            verdict += f", {within} of {len(values)} seeds"
        rows.append([base, key, wanted, reached, f"{len(values)}", verdict if values else ""])
    return table(["run", "figure", "bar", "reached", "seeds", "within"], rows)


def ellipses(reports: Reports) -> str:
    """Right minus wrong for each fit, for both numbers of draws."""
    runs = [present(reports, base) for base in ("ellipses", "ellipses-1000")]
    rows = []
    for fit, published in ELLIPSES.items():
        found = [[r["metrics"][fit] for r in seeds if fit in r["metrics"]] for seeds in runs]
        rows.append([fit, published, *map(_right_and_wrong, found)])
    start = [report["floors"]["k-means, A = I"] for report in runs[0]]
    rows.append(["before the fit: k-means, A = I", "-", _right_and_wrong(start), ""])
    return table(["loss", "paper", "200 draws", "1000 draws"], rows)


def _right_and_wrong(fits: Sequence[Mapping[str, Any]]) -> str:
    """``right - wrong = difference`` over the seeds."""
    if not fits:
        return "-"
    right, wrong = (statistics.fmean(fit[key] for fit in fits) for key in ("diagonal", OFF))
    gains = [fit["diagonal"] - fit[OFF] for fit in fits]
    return f"{right:.0f} - {wrong:.0f} = {spread(gains, 0)}"


OFF = "off_diagonal"


def mixture(reports: Reports) -> str:
    """Modes and share along the run."""
    if "mixture" not in reports:
        return "not run"
    report = reports["mixture"]
    freeze = report["args"]["freeze"]
    rows = [
        [
            f"{e['step']}" + (" (frozen)" if e["step"] >= freeze else ""),
            f"{e['modes']}",
            f"{e['near']:.1%}",
            f"{e['least']:.1%}",
        ]
        for e in report["evaluations"]
    ]
    floor = report["floors"]
    rows.append(["real", f"{floor['modes']}", f"{floor['near']:.1%}", f"{floor['least']:.1%}"])
    return table(["step", "modes of 8", "within 3 deviations", "share of the least mode"], rows)


def matching(reports: Reports) -> str:
    """OT against random matching along the runs, by the metrics that need no classifier."""
    rows = []
    for name in filter(reports.__contains__, ("otgan", "otgan-random")):
        report = reports[name]
        seen = [*report["evaluations"], {"step": report["steps"], **report["metrics"]}]
        rows += [
            [name, f"{e['step']}", *[cell([{"metrics": e}], key) for key in ("ot", "med2")]]
            for e in seen
        ]
    return table(["run", "step", "OT", "MED²"], rows)


def times(reports: Reports) -> str:
    """Minutes of the report, and of our runs with what they did in them."""
    rows = []
    for label, report in there(french_of(reports), reports):
        epochs, minutes = epochs_of(report), float(cpu_seconds([report]).strip("≤ ")) / 60
        width = f"{report['args']['width']:g}"
        each = f"{minutes / epochs:.2f}"
        rows.append([label, MINUTES[label], f"{minutes:.1f} ({epochs:.0f} epochs)", width, each])
    return table(["", "report, minutes", "ours, minutes", "width", "minutes per epoch"], rows)


def epochs_of(report: Report) -> float:
    """How often a run went through its images."""
    args = report["args"]
    return float(report["steps"] * args["batch"] / report.get("images", SIZES[args["data"]]))


def french(reports: Reports) -> str:
    """The first and the last scores of the runs beside each other."""
    rows = []
    for label, report in there(french_of(reports), reports):
        last = {"step": report["steps"], **report["metrics"]}
        for entry in (report["evaluations"][0], last):
            done = epochs_of({**report, "steps": entry["step"]})
            cells = [cell([{"metrics": entry}], key) for key in ("is", "fid", "recall", "med2")]
            rows.append([label, f"{done:.0f}", *cells])
    return table(["", "epochs", "IS", "FID", "recall", "MED²"], rows)


def flows(reports: Reports) -> str:
    """MED² by the number of Euler steps, and how bent the paths are."""
    keys = [f"med2_{n}" for n in (1, 2, 4, 8, 100)]
    rows = []
    for label, report in there(FLOWS, reports):
        metrics = report["metrics"]
        digits = 3 if label.startswith("plane") else 2
        cells = [f"{metrics[key]:.{digits}f}" for key in keys]
        share = f"{report['loss_share']:.0%}"
        rows.append([label, *cells, f"{metrics['curvature']:.3f}", cpu_seconds([report]), share])
    steps = [f"MED², {key.removeprefix('med2_')} steps" for key in keys]
    return table(["", *steps, "curvature", "CPU seconds", "of it for the plan"], rows)


def modes(reports: Reports) -> str:
    """What each adversary covers of the mixture at the end."""
    rows = []
    for label, report in there(MIXTURES, reports):
        found = report["metrics"]
        shares = [f"{found[key]:.1%}" for key in ("near", "least")]
        rows.append([label, f"{report['steps']}", f"{found['modes']}", *shares])
    return table(
        ["", "steps", "modes of 8", "within 3 deviations", "share of the least mode"], rows
    )


def commands(reports: Reports) -> str:
    """The command of every run."""
    lines = [
        ("" if name in reports else "# not run: ")
        + f"python examples/{text.format(runs='runs')} --out runs/{name}"
        for name, text in COMMANDS.items()
    ]
    return "```sh\n" + "\n".join(lines) + "\n```"


TABLES: dict[str, Callable[[Reports], str]] = {
    "fashion": fashion,
    "mnist": plain_scores(MNIST),
    "best_score": best_score,
    "label": plain_scores(LABEL, ("as_asked", *PLAIN)),
    "li_liang": plain_scores(LI_LIANG_RUNS),
    "follow": plain_scores(FOLLOW),
    "learned_cost": plain_scores(LEARNED_RUNS),
    "smooth": plain_scores(SMOOTH, ("smooth", "smooth_95", "is", "recall", "med2")),
    "sweeps": sweeps,
    "cifar10": plain_scores(CIFAR10),
    "bars": bars,
    "ellipses": ellipses,
    "mixture": mixture,
    "modes": modes,
    "matching": matching,
    "french": french,
    "times": times,
    "flows": flows,
    "commands": commands,
}
