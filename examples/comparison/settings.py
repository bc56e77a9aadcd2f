"""Which runs the page shows: their commands, what the sources report, and the bars."""

from __future__ import annotations

from collections.abc import Container

# Every run by the experiment that it belongs to, its name, and its command. A report belongs to a
# name if its own options are those of the command, wherever it lies. `reproduce.py` runs them in
# this order. Lengths and widths are such that an experiment takes the CPU hours written above it.
SHORT: dict[str, str] = {
    "classifier_fashion_5": "train_classifier.py --data fashion --epochs 5",
    "med": "train_sinkhorn.py --data fashion",
    "med-40": "train_sinkhorn.py --data fashion --epochs 40 --batch 1000 --eps 0.3",
    "geist-1": "train_sinkhorn.py --data fashion --preset geist-1 --epochs 12",
    "geist-10": "train_sinkhorn.py --data fashion --preset geist-10 --epochs 12",
    "geist-100": "train_sinkhorn.py --data fashion --preset geist-100 --epochs 14",
    "gan-geist": "train_gan.py --data fashion --preset geist --epochs 12",
    "otgan": "train_otgan.py --data fashion --preset tiny --eval-every 500",
    "otgan-random": "train_otgan.py --data fashion --preset tiny --match random --eval-every 500",
    "otgan-cifar10": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 600"
    " --eval-every 450",
    "otgan-cifar10-random": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 250"
    " --match random",
    "wgan-clip": "train_gan.py --data fashion --preset wgan-clip --epochs 1",
    "wgan-gp": "train_gan.py --data fashion --preset wgan-gp --epochs 3",
    "sae": "train_autoencoder.py --data fashion --preset sae --epochs 5",
    "vae-20": "train_autoencoder.py --data fashion --preset vae-20 --epochs 5",
    "conditional-digits": "train_sinkhorn.py --data digits --preset conditional",
    "conv": "train_sinkhorn.py --data fashion --preset conv --width 0.25 --epochs 4",
    "conv-edges": "train_sinkhorn.py --data fashion --preset conv --width 0.25 --epochs 4"
    " --edges 2",
    "digits": "train_sinkhorn.py --data digits",
    "conv-digits": "train_sinkhorn.py --data digits --preset conv --epochs 250",
    # On the images that digits-follow does not hold out.
    "digits-constant": "train_sinkhorn.py --data digits --schedule constant --steps 1500"
    " --limit-train 897",
    "digits-follow": "train_sinkhorn.py --data digits --schedule follow --steps 1500",
    **{
        f"geist-{eps}-digits": f"train_sinkhorn.py --data digits --preset geist-{eps} --epochs 300"
        for eps in (1, 10, 100)
    },
    "gan-geist-digits": "train_gan.py --data digits --preset geist --epochs 300",
    "age-digits": "score_by_age.py --data digits --epochs 60 --ages 2 4 8 15 30 60 --runs"
    " {runs}/digits {runs}/conditional-digits {runs}/geist-10-digits {runs}/gan-geist-digits",
    "sweep-digits": "sweep_eps.py --data digits --epochs 100 --seeds 2 --values 0.01 0.1 1 10",
    **{
        f"digits-{preset}": "train_learned_cost.py --data digits --width 0.5 --batch 100"
        f" --steps 800 --preset {preset}"
        for preset in ("mmd", "eps-10", "eps-100", "eps-1000")
    },
    **{
        f"flow-{pairs}": f"train_flow.py --data digits --epochs 400 --pairs {pairs}"
        for pairs in ("ot", "independent", "pot")
    },
    **{
        f"flow-plane-{pairs}": f"train_flow.py --preset plane --pairs {pairs}"
        for pairs in ("ot", "independent")
    },
    "genevay-a": "train_sinkhorn.py --data mnist --preset genevay-a",
    "genevay-b": "train_sinkhorn.py --data mnist --preset genevay-b",
    "genevay-c": "train_sinkhorn.py --data mnist --preset genevay-c",
    "mixture": "toy_mixture.py",
    "ellipses": "fit_ellipses.py",
    "ellipses-1000": "fit_ellipses.py --samples 1000 --losses mmd 'eps 1' 'eps 0.1' 'eps 0.03'",
}
GEIST_EPOCHS = {"fashion": 40, "mnist": 20}
LEARNED = "train_learned_cost.py --data cifar10 --width 0.25 --batch 64 --epochs 5"
EXPERIMENTS: dict[str, dict[str, str]] = {
    # Of the metrics of the others.
    "classifiers": {
        "classifier_fashion": "train_classifier.py --data fashion",
        "classifier_mnist": "train_classifier.py --data mnist --epochs 5",
        "classifier_cifar10": "train_classifier.py --data cifar10 --epochs 5",
    },
    # The report on OT-GAN, at an eighth of the width: 0.3
    "french": {
        **{
            f"digits-{net}": f"train_gan.py --data digits --preset {net} --width 0.125"
            " --steps 4800 --eval-every 600"
            for net in ("basic", "dcgan")
        },
        "digits-otgan": "train_otgan.py --data digits --preset tiny --batch 100 --lr 2e-4"
        " --steps 2400 --eval-every 600",
        **{
            f"mnist-{net}": f"train_gan.py --data mnist --preset {net} --width 0.125"
            f" --epochs {epochs} --eval-every 600"
            for net, epochs in (("basic", 12), ("dcgan", 6))
        },
        "mnist-otgan": "train_otgan.py --data mnist --preset tiny --batch 100 --lr 2e-4"
        " --epochs 4 --eval-every 600",
    },
    # Genevay et al. 2018: 2.5
    "genevay": {
        **{
            f"cifar10-{preset}": f"{LEARNED} --preset {preset}"
            for preset in ("mmd", "eps-10", "eps-100", "eps-1000")
        },
        "sweep-eps": "sweep_eps.py --data fashion --epochs 3 --seeds 2 --values 0.01 0.1 1 10"
        " --eval-samples 5000",
    },
    # Li & Liang 2022, at an eighth of the width: 1
    "li-liang": {
        **{
            f"otgan-{data}-{penalty}{beta}": f"train_otgan.py --data {data} --preset tiny"
            f" --batch 256 --steps {steps} --eps {1 / penalty:g}{options}"
            for data, steps in (("digits", 1000), ("mnist", 800))
            for beta, options in (("", ""), ("-beta", " --betas 0.9 0.999"))
            for penalty in (500, 100)
        },
        "otgan-label": "train_otgan.py --data mnist --preset tiny --labels 2 --steps 550",
        "genevay-b-70": "train_sinkhorn.py --data mnist --preset genevay-b --epochs 70",
        "otgan-follow": "train_otgan.py --data fashion --preset tiny --eval-every 500"
        " --schedule follow",
    },
    # Geist & Gérard 2023, at their length on FashionMNIST: 1.1
    "geist": {
        **{
            f"geist-{eps}-{data}": f"train_sinkhorn.py --data {data} --preset geist-{eps}"
            f" --epochs {epochs}"
            for data, epochs in GEIST_EPOCHS.items()
            for eps in (1, 10, 100)
        },
        **{
            f"gan-geist-{data}": f"train_gan.py --data {data} --preset geist --epochs {epochs}"
            for data, epochs in GEIST_EPOCHS.items()
        },
        "age": "score_by_age.py --data fashion --epochs 12 --ages 2 4 8 12 --runs"
        " {runs}/geist-1-fashion"
        " {runs}/geist-10-fashion {runs}/geist-100-fashion {runs}/gan-geist-fashion",
    },
    # Vayer 2018: 1
    "vayer": {
        "mixture-gan": "toy_mixture.py --preset gan --steps 10000 --freeze 10000",
        "mixture-wgan-clip": "toy_mixture.py --preset wgan-clip --steps 8000 --freeze 8000",
        "mixture-wgan-gp": "toy_mixture.py --preset wgan-gp --steps 8000 --freeze 8000",
        "sae-15": "train_autoencoder.py --data fashion --preset sae",
        "vae-2-15": "train_autoencoder.py --data fashion --preset vae-2",
        "vae-20-15": "train_autoencoder.py --data fashion --preset vae-20",
        "conditional-15": "train_sinkhorn.py --data fashion --preset conditional --batch 500",
        "conditional-conv": "train_sinkhorn.py --data fashion --preset conditional --batch 500"
        " --net conv --width 0.25 --edges 2 --epochs 28",
        "wgan-clip-10": "train_gan.py --data fashion --preset wgan-clip --epochs 10 --width 0.5",
        "wgan-gp-10": "train_gan.py --data fashion --preset wgan-gp --epochs 10 --width 0.5",
    },
    # One step past the sources: 1
    "beyond": {
        **{
            f"flow-fashion-{pairs}": f"train_flow.py --data fashion --epochs 5 --pairs {pairs}"
            " --eval-samples 2000"
            for pairs in ("ot", "independent", "pot")
        },
        "conv-15": "train_sinkhorn.py --data fashion --preset conv --width 0.25 --edges 2"
        " --epochs 28",
        "sweep-batch": "sweep_eps.py --data fashion --steps 1200 --over batch"
        " --values 100 200 500 1000 2000 --seeds 2",
    },
    "short": SHORT,
}
BASES = {name: command for part in EXPERIMENTS.values() for name, command in part.items()}
# Runs that are repeated: how often, each time with another seed.
SEEDS = {
    **dict.fromkeys(("med", "geist-1", "geist-10", "geist-100", "gan-geist", "otgan"), 3),
    **dict.fromkeys(("ellipses", "ellipses-1000", "otgan-follow"), 3),
    **dict.fromkeys(("digits", "digits-constant", "digits-follow"), 2),
}


def names_of(base: str) -> list[str]:
    """The runs of one setting, one per seed."""
    return [base, *(f"{base}-seed{seed}" for seed in range(1, SEEDS.get(base, 1)))]


def command_of(name: str) -> str:
    """Script and options of a run."""
    base, _, seed = name.partition("-seed")
    return BASES[base] + (f" --seed {seed}" if seed else "")


COMMANDS = {name: command_of(name) for base in BASES for name in names_of(base)}

# Rows of the FashionMNIST table: the setting, and what the report says.
FASHION = {
    "Sinkhorn, eps 1 (Geist & Gérard)": ("geist-1", "49 / 6.8"),
    "Sinkhorn, eps 10": ("geist-10", "63 / 7.7"),
    "Sinkhorn, eps 100": ("geist-100", "75 / 7.5"),
    "GAN (Geist & Gérard)": ("gan-geist", "82 / 8.3"),
    "**MED, ours, 15 epochs, 2 x 125**": ("med", "-"),
    "**MED, ours, 40 epochs, 2 x 500**": ("med-40", "-"),
    "**OT-GAN at 1/8 width**": ("otgan", "-"),
    "random matching, 1/8 width": ("otgan-random", "-"),
    "Wasserstein GAN, clipped, 1 epoch": ("wgan-clip", "-"),
    "Wasserstein GAN, gradient penalty, 3 epochs": ("wgan-gp", "-"),
    "Sinkhorn autoencoder, 5 epochs": ("sae", "-"),
    "VAE with 20 latent dimensions, 5 epochs": ("vae-20", "-"),
    "MED, ours, convolutions at 1/4 width, 4 epochs": ("conv", "-"),
    "the same, edges in the cost": ("conv-edges", "-"),
    "the same, edges in the cost, 28 epochs": ("conv-15", "-"),
    "Sinkhorn, eps 1, 40 epochs": ("geist-1-fashion", "49 / 6.8"),
    "Sinkhorn, eps 10, 40 epochs": ("geist-10-fashion", "63 / 7.7"),
    "Sinkhorn, eps 100, 40 epochs": ("geist-100-fashion", "75 / 7.5"),
    "GAN, 40 epochs": ("gan-geist-fashion", "82 / 8.3"),
    "Wasserstein GAN, clipped, 10 epochs at 1/2 width": ("wgan-clip-10", "-"),
    "Wasserstein GAN, gradient penalty, 10 epochs at 1/2 width": ("wgan-gp-10", "-"),
    "Sinkhorn autoencoder, 15 epochs": ("sae-15", "-"),
    "VAE with 2 latent dimensions, 15 epochs": ("vae-2-15", "-"),
    "VAE with 20 latent dimensions, 15 epochs": ("vae-20-15", "-"),
    "MED, ours, a class on demand, 15 epochs": ("conditional-15", "-"),
    "MED, ours, a class on demand, convolutions, edges in the cost": ("conditional-conv", "-"),
}
CLAIM = {"eps 1": "geist-1", "eps 10": "geist-10", "eps 100": "geist-100", "GAN": "gan-geist"}
# Rows of the tables of the other images.
MNIST = {
    "(1, 200, 10)": "genevay-a",
    "(.1, 200, 100)": "genevay-b",
    "(.1, 10, 300)": "genevay-c",
    "(.1, 200, 100), 70 epochs": "genevay-b-70",
}
LABEL = {"OT-GAN at 1/8 width, 550 steps": "otgan-label"}
LI_LIANG_RUNS = {
    f"{data}, penalty {penalty}, beta_1 {beta}": f"otgan-{data}-{penalty}{suffix}"
    for data in ("mnist", "digits")
    for beta, suffix in ((0.5, ""), (0.9, "-beta"))
    for penalty in (500, 100)
}
FOLLOW = {
    "digits, constant": "digits-constant",
    "digits, half a cosine": "digits",
    "digits, follows the held-out MED²": "digits-follow",
    "OT-GAN, constant": "otgan",
    "OT-GAN, follows the held-out MED²": "otgan-follow",
}
LEARNED_RUNS = {
    f"{data}, {loss}": f"{data}-{loss}"
    for data in ("cifar10", "digits")
    for loss in ("mmd", "eps-1000", "eps-100", "eps-10")
}
SMOOTH = {
    f"{data}, {label}": f"{run}-{data}"
    for data in ("fashion", "mnist", "digits")
    for label, run in (
        ("Sinkhorn, eps 1", "geist-1"),
        ("Sinkhorn, eps 10", "geist-10"),
        ("Sinkhorn, eps 100", "geist-100"),
        ("GAN", "gan-geist"),
    )
}
SWEEPS = ("sweep-eps", "sweep-digits", "sweep-batch")
CIFAR10 = {
    "OT-GAN, 600 steps": "otgan-cifar10",
    "random matching, 250 steps": "otgan-cifar10-random",
}
COLUMNS = {
    "geist_ot": "OT, their protocol",
    "geist_is": "IS of 200, their protocol",
    "ot": "OT",
    "ot_gap": "\\|OT - floor\\|",
    "is": "IS",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "med2": "MED²",
    "smooth": "neighbours, mean",
    "smooth_95": "neighbours, 95%",
    "as_asked": "as asked",
}
PLAIN = ("ot", "ot_gap", "is", "fid", "precision", "recall", "med2")
GEIST_COLUMNS = ("geist_ot", "geist_is", *PLAIN)
DIGITS = dict.fromkeys(
    ("precision", "recall", "is", "geist_is", "smooth", "smooth_95", "as_asked"), 2
)

# The report on OT-GAN: networks beside each other, at one width.
FRENCH = {"BasicGAN": "basic", "DCGAN": "dcgan", "OT-GAN": "otgan"}


def french_of(reports: Container[str]) -> dict[str, str]:
    """The runs of the three networks: on MNIST if all are there, else on the digits."""
    on = [{label: f"{data}-{n}" for label, n in FRENCH.items()} for data in ("mnist", "digits")]
    return next((runs for runs in on if all(name in reports for name in runs.values())), on[-1])


FRENCH_SCORES = {
    "is": "inception score",
    "fid": "Fréchet distance",
    "recall": "recall",
    "med2": "MED²",
}
# Pairs of flow matching: label, run.
FLOWS = {
    "FashionMNIST, plan": "flow-fashion-ot",
    "FashionMNIST, independent": "flow-fashion-independent",
    "FashionMNIST, exact plan of POT": "flow-fashion-pot",
    "digits, plan": "flow-ot",
    "digits, independent": "flow-independent",
    "digits, exact plan of POT": "flow-pot",
    "plane, plan": "flow-plane-ot",
    "plane, independent": "flow-plane-independent",
}
MIXTURES = {
    "OT-GAN, critic frozen on the way": "mixture",
    "GAN": "mixture-gan",
    "WGAN, clipped": "mixture-wgan-clip",
    "WGAN, gradient penalty": "mixture-wgan-gp",
}

# (setting, figure, least, most): what each run of it is expected to reach.
INF = float("inf")
BARS: list[tuple[str, str, float, float]] = [
    ("classifier_fashion_5", "accuracy", 0.915, 1),
    ("classifier_mnist", "accuracy", 0.988, 1),
    ("geist-1", "geist_ot", 44, 54),
    ("geist-10", "geist_ot", 58, 68),
    ("geist-100", "geist_ot", 70, 80),
    ("geist-1", "geist_is", 6.2, 7.4),
    ("geist-10", "geist_is", 7.1, 8.3),
    ("geist-100", "geist_is", 6.9, 8.1),
    ("gan-geist", "is", 7.2, INF),
    ("gan-geist", "geist_ot", 80, 90),
    ("med", "is", 7.8, INF),
    ("med", "fid", 0, 330),
    ("med", "recall", 0.15, 1),
    ("med", "ot_gap", 0, 3),
    ("med", "med2", -INF, 9),
    ("med-40", "is", 8.1, INF),
    ("med-40", "fid", 0, 270),
    ("conditional-15", "as_asked", 0.85, 1),
    ("conditional-conv", "as_asked", 0.85, 1),
    ("otgan-label", "as_asked", 0.9, 1),
    ("otgan-label", "recall", 0.3, 1),
    *((run, "fid", 0, 200) for run in ("conv-15", "conditional-conv")),
    *((run, "recall", 0.4, 1) for run in ("conv-15", "conditional-conv")),
    *((run, "is", 8.8, INF) for run in ("conv-15", "conditional-conv")),
    ("conditional-digits", "as_asked", 0.85, 1),
    ("digits", "is", 8, INF),
    ("digits", "med2", -INF, 1.5),
    ("otgan", "is", 7.6, INF),
    ("otgan", "recall", 0.35, 1),
    ("mixture", "modes", 8, 8),
    ("mixture", "near", 0.9, 1),
    ("ellipses", "best", 109, INF),
    ("ellipses-1000", "best", 109, INF),
    ("ellipses-1000", "above_mmd", 1, INF),
]

# Rows of the ellipses table: fit, and what the paper has for it.
ELLIPSES = {
    "mmd": "117 - 24 = 93",
    "eps 1": "147 - 74 = 73",
    "eps 0.1": "122 - 13 = 109",
    "eps 0.03": "95 - 15 = 80 (its smallest)",
    "med 1": "-",
    "med 0.1": "-",
    "med 0.03": "-",
}
# What the report on OT-GAN says of minutes.
MINUTES = {"BasicGAN": "5 (30 epochs)", "DCGAN": "27 (30 epochs)", "OT-GAN": "110 (10 epochs)"}
