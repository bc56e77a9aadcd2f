"""What the sources claim, and what our runs say of it: the tables of the page of reproductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from comparison.settings import french_of
from comparison.tables import Report, Reports, epochs_of, present, table


class NotRunError(Exception):
    """A claim needs a run that there is no report of."""


# What was found, in words; and whether the claim holds, or None where it is no yes or no.
Finding = tuple[str, bool | None]
Claim = tuple[str, str, Callable[[Reports], Finding]]  # what is claimed, their figures, ours


def seeds(reports: Reports, *bases: str) -> list[Report]:
    """The reports of the first of these settings that was run."""
    for base in bases:
        if found := present(reports, base):
            return found
    raise NotRunError


def mean(found: Sequence[Report], key: str, part: str = "metrics") -> float:
    if not all(key in report[part] for report in found):  # of before this figure was taken
        raise NotRunError
    return fmean(float(report[part][key]) for report in found)


def length(found: Sequence[Report]) -> str:
    return f"{found[0]['args']['data']}, {epochs_of(found[0]):.0f} epochs"


def listed(values: Mapping[str, float], digits: int = 2) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


GEIST = {"eps 1": "geist-1", "eps 10": "geist-10", "eps 100": "geist-100", "GAN": "gan-geist"}


def geist(reports: Reports, *data: str) -> dict[str, list[Report]]:
    """Their four generators: at full length if all four were run so, else at the short one."""
    for suffix in (*(f"-{name}" for name in data), ""):
        found = {label: present(reports, base + suffix) for label, base in GEIST.items()}
        if all(found.values()):
            return found
    raise NotRunError


def near(key: str, theirs: Mapping[str, float], tolerance: float) -> Callable[[Reports], Finding]:
    """Whether each generator's figure is theirs within a tolerance."""

    def of(reports: Reports) -> Finding:
        runs = geist(reports, "fashion")
        found = {label: mean(runs[label], key) for label in theirs}
        held = all(abs(found[label] - value) <= tolerance for label, value in theirs.items())
        digits = 1 if tolerance > 1 else 2
        text = " / ".join(f"{value:.{digits}f}" for value in found.values())
        return f"{text} ({length(runs[next(iter(theirs))])})", held

    return of


def best_score(reports: Reports) -> Finding:
    runs = geist(reports, "fashion")
    found = {label: mean(of_run, "geist_is") for label, of_run in runs.items()}
    return listed(found), max(found, key=found.__getitem__) == "GAN"


def lower_is_better(reports: Reports) -> Finding:
    runs = geist(reports, "fashion")
    found = {label: mean(of_run, "ot") for label, of_run in runs.items()}
    floor = mean(runs["GAN"], "ot", "floors")
    return f"real images {floor:.1f}; {listed(found, 1)}", floor <= min(found.values())


def smoother(reports: Reports) -> Finding:
    runs = geist({name: r for name, r in reports.items() if "smooth" in r["metrics"]}, *DATA)
    found = {label: mean(of_run, "smooth") for label, of_run in runs.items()}
    return f"{listed(found)} ({length(runs['GAN'])})", list(found.values()) == sorted(
        found.values()
    )


DATA = ("fashion", "mnist", "digits")


def french(best: str, first: bool) -> Callable[[Reports], Finding]:
    """Whether this network has the smallest Fréchet distance, after an epoch or at the end."""

    def of(reports: Reports) -> Finding:
        runs = {label: seeds(reports, base)[0] for label, base in french_of(reports).items()}
        entry = {k: r["evaluations"][0] if first else r["metrics"] for k, r in runs.items()}
        found = {label: float(of_run["fid"]) for label, of_run in entry.items()}
        done = {label: entry[label].get("step", report["steps"]) for label, report in runs.items()}
        steps = " / ".join(f"{count:,}" for count in dict.fromkeys(done.values()))
        where = f"{runs[best]['args']['data']}, {steps} steps"
        return f"FID: {listed(found, 0)} ({where})", min(found, key=found.__getitem__) == best

    return of


def sharper(reports: Reports) -> Finding:
    runs = french_of(reports)
    found = {label: mean(seeds(reports, base), "precision") for label, base in runs.items()}
    return f"precision: {listed(found)}", found["OT-GAN"] > found["BasicGAN"]


def compared(
    labels: tuple[str, str], bases: tuple[str, str], keys: Sequence[str], digits: int = 2
) -> Callable[[Reports], Finding]:
    """Whether the first run has lower values of all keys than the second."""

    def of(reports: Reports) -> Finding:
        runs = [seeds(reports, base) for base in bases]
        values = [[mean(run, key) for key in keys] for run in runs]
        written = [" / ".join(f"{v:.{digits}f}" for v in of_run) for of_run in values]
        text = ", ".join(f"{a} {b}" for a, b in zip(labels, written, strict=True))
        return text, all(a < b for a, b in zip(*values, strict=True))

    return of


def autoencoders(reports: Reports) -> Finding:
    """At the full length if both ran so, else at the short one."""
    pairs = (("sae-15", "vae-20-15"), ("sae", "vae-20"))
    pair = next((p for p in pairs if all(present(reports, name) for name in p)), pairs[-1])
    text, held = compared(("autoencoder", "VAE"), pair, ["fid"], 0)(reports)
    return f"{text} ({length(seeds(reports, pair[0]))})", held


def unharmed(following: str, constant: str, key: str) -> Callable[[Reports], Finding]:
    """Whether a rate that follows leaves the value below that of some seed of a constant rate."""

    def of(reports: Reports) -> Finding:
        value = mean(seeds(reports, following), key)
        others = [mean([report], key) for report in seeds(reports, constant)]
        text = f"MED² following {value:.2f}, constant {min(others):.2f} to {max(others):.2f}"
        return text, value <= max(others)

    return of


def unreadable(reports: Reports) -> Finding:
    runs = {k: seeds(reports, f"otgan-mnist-{k}", f"otgan-digits-{k}") for k in (500, 100)}
    found = {f"eps 1/{k}": mean(of, "is") for k, of in runs.items()}
    text = f"IS: {listed(found)} ({runs[100][0]['args']['data']}, {runs[100][0]['steps']:,} steps)"
    return text, found["eps 1/100"] < 0.75 * found["eps 1/500"]


def share(least: float, *bases: str) -> Callable[[Reports], Finding]:
    """Whether the classifier finds the class that was asked for, in at least this share."""

    def of(reports: Reports) -> Finding:
        found = seeds(reports, *bases)
        value = mean(found, "as_asked")
        return f"{value:.1%} ({length(found)})", value >= least

    return of


def ellipses(reports: Reports) -> Finding:
    metrics = [r["metrics"] for r in seeds(reports, "ellipses-1000", "ellipses")]
    names = [name for name in metrics[0] if name.startswith(("eps", "mmd"))]
    found = {n: fmean(m[n]["diagonal"] - m[n]["off_diagonal"] for m in metrics) for n in names}
    return listed(found, 0), max(found, key=found.__getitem__) != "mmd"


def learned_cost(data: str) -> Callable[[Reports], Finding]:
    """Whether the largest eps and the maximum mean discrepancy have the best inception scores."""

    def of(reports: Reports) -> Finding:
        runs = {loss: seeds(reports, f"{data}-{loss}") for loss in LOSSES}
        found = {loss.replace("-", " "): mean(run, "is") for loss, run in runs.items()}
        mmd, *others = found.values()
        text = f"{listed(found)} ({length(runs['mmd'])})"
        return text, min(mmd, others[0]) > max(others[1:])

    return of


LOSSES = ("mmd", "eps-1000", "eps-100", "eps-10")


def best_eps(reports: Reports) -> Finding:
    (report,) = seeds(reports, "sweep-eps", "sweep-digits")
    found = report["metrics"]
    best = {
        text: choose(found, key=lambda name, key=key: found[name][key])
        for text, key, choose in (
            ("FID", "fid", min),
            ("recall", "recall", max),
            ("MED²", "med2", min),
        )
    }
    return "; ".join(f"best {text} at {name}" for text, name in best.items()), None


def modes(*bases: str, all_kept: bool) -> Callable[[Reports], Finding]:
    """Whether all eight modes are kept at the end of each run; or whether one is lost."""

    def of(reports: Reports) -> Finding:
        found = [seeds(reports, base)[0] for base in bases]
        kept = [int(report["metrics"]["modes"]) for report in found]
        near = " / ".join(f"{report['metrics']['near']:.0%}" for report in found)
        steps = " / ".join(f"{report['steps']:,}" for report in found)
        text = f"{' / '.join(map(str, kept))} of 8, {near} of the points at one ({steps} steps)"
        return text, (min(kept) == 8) == all_kept

    return of


def flow(keys: Sequence[str], digits: int) -> Callable[[Reports], Finding]:
    """Whether pairs from plans have lower figures than independent ones."""

    def of(reports: Reports) -> Finding:
        runs = {"fashion": "flow-fashion", "digits": "flow"}
        for data, base in runs.items():
            pair = (f"{base}-ot", f"{base}-independent")
            if all(present(reports, name) for name in pair):
                text, held = compared(("plans", "independent"), pair, keys, digits)(reports)
                return f"{text} ({data})", held
        raise NotRunError

    return of


CLAIMS: dict[str, list[Claim]] = {
    "geist": [
        (
            "OT distance of the generators, eps 1 / 10 / 100 (within 5)",
            "49 / 63 / 75",
            near("geist_ot", {"eps 1": 49, "eps 10": 63, "eps 100": 75}, 5),
        ),
        (
            "inception score of 200 images, eps 1 / 10 / 100 (within .6)",
            "6.8 / 7.7 / 7.5",
            near("geist_is", {"eps 1": 6.8, "eps 10": 7.7, "eps 100": 7.5}, 0.6),
        ),
        ("OT distance of the GAN (within 5)", "82", near("geist_ot", {"GAN": 82}, 5)),
        ("the GAN has the best inception score", "GAN 8.3", best_score),
        ("the smaller the OT distance, the better", "the order of their table", lower_is_better),
        (
            "the map of the latent space is smoother at a smaller eps, and roughest for the GAN",
            "pictures",
            smoother,
        ),
    ],
    "french": [
        ("after one epoch OT-GAN is best", "pictures", french("OT-GAN", first=True)),
        ("at the end DCGAN is best", "pictures", french("DCGAN", first=False)),
        ("OT-GAN is sharper than BasicGAN", "pictures", sharper),
    ],
    "li_liang": [
        ("eps 1/100 with beta_1 = .5 gives unreadable digits", "pictures", unreadable),
        (
            "trained on one label, OT-GAN draws it (≥ 90% of the images)",
            "pictures",
            share(0.9, "otgan-label"),
        ),
        (
            "their wish: a learning rate that follows the loss does not harm",
            "-",
            unharmed("otgan-follow", "otgan", "med2"),
        ),
        (
            "the same, a generator without a critic",
            "-",
            unharmed("digits-follow", "digits-constant", "med2"),
        ),
    ],
    "genevay": [
        (
            "ellipses: right minus wrong is best at a finite eps, above the MMD",
            "109 at eps .1, MMD 93",
            ellipses,
        ),
        (
            "learned cost on CIFAR-10: MMD and eps 1000 have better scores than smaller eps",
            "MMD 4.04, eps 1000: 4.14, 100: 3.09, 10: 3.11",
            learned_cost("cifar10"),
        ),
        ("the same on the digits", "-", learned_cost("digits")),
        ("their open question: which eps is best?", "-", best_eps),
    ],
    "salimans": [
        (
            "eight Gaussians: all are kept after the critic is frozen",
            "8 of 8",
            modes("mixture", all_kept=True),
        ),
        (
            "transport is better than random matching (MED² / FID)",
            "IS on CIFAR-10: 8.47 and 4.64",
            compared(("transport", "random"), ("otgan", "otgan-random"), ["med2", "fid"], 1),
        ),
    ],
    "vayer": [
        ("the GAN loses modes of a mixture", "pictures", modes("mixture-gan", all_kept=False)),
        (
            "Wasserstein GANs keep them (clipped / with a penalty)",
            "pictures",
            modes("mixture-wgan-clip", "mixture-wgan-gp", all_kept=True),
        ),
        (
            "a class on demand (≥ 85% of the images)",
            "-",
            share(0.85, "conditional-conv", "conditional-15"),
        ),
        ("the same on the digits", "-", share(0.85, "conditional-digits")),
    ],
    "patrini": [
        (
            "a Sinkhorn autoencoder's samples are at least as good as a VAE's (FID)",
            "lower FID",
            autoencoders,
        ),
    ],
    "flow": [
        (
            "with pairs from plans fewer Euler steps do (MED² after 1 / 2 / 4)",
            "lower",
            flow(["med2_1", "med2_2", "med2_4"], 2),
        ),
        ("and the paths are straighter (curvature)", "lower", flow(["curvature"], 3)),
    ],
}


def claims(source: str, reports: Reports) -> str:
    """The table of one source."""
    rows = []
    for text, theirs, find in CLAIMS[source]:
        try:
            ours, held = find(reports)
        except NotRunError:
            ours, held = "not run", None
        verdict = {True: "yes", False: "**no**", None: ""}[held]
        rows.append([text, theirs, ours, verdict])
    return table(["claim", "theirs", "ours", "held"], rows, "---")
