"""Which runs the page shows: their commands, what the sources report, and the bars."""

from __future__ import annotations

# Every run by name, and its command. A report belongs to a name if its own options are those of the
# command, wherever it lies.
BASES = {
    "classifier_fashion": "train_classifier.py --data fashion",
    "classifier_fashion_5": "train_classifier.py --data fashion --epochs 5",
    "classifier_mnist": "train_classifier.py --data mnist --epochs 5",
    "classifier_cifar10": "train_classifier.py --data cifar10 --epochs 5",
    "med": "train_sinkhorn.py --data fashion",
    "med-40": "train_sinkhorn.py --data fashion --epochs 40 --batch 1000 --eps 0.3",
    "geist-1": "train_sinkhorn.py --data fashion --preset geist-1 --epochs 12",
    "geist-10": "train_sinkhorn.py --data fashion --preset geist-10 --epochs 12",
    "geist-100": "train_sinkhorn.py --data fashion --preset geist-100 --epochs 14",
    "gan-geist": "train_gan.py --data fashion --preset geist --epochs 12",
    "otgan": "train_otgan.py --data fashion --preset tiny --eval-every 500",
    "otgan-random": "train_otgan.py --data fashion --preset tiny --match random --eval-every 500",
    "otgan-label": "train_otgan.py --data mnist --preset tiny --labels 2 --steps 300",
    "otgan-cifar10": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 600"
    " --eval-every 450",
    "otgan-cifar10-random": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 250"
    " --match random",
    "mnist-basic": "train_gan.py --data mnist --preset basic --width 0.125 --eval-every 3000",
    "mnist-dcgan": "train_gan.py --data mnist --preset dcgan --width 0.125 --eval-every 3000",
    "mnist-otgan": "train_otgan.py --data mnist --preset tiny --batch 100 --lr 2e-4 --steps 6000"
    " --eval-every 600",
    "wgan-clip": "train_gan.py --data fashion --preset wgan-clip --epochs 1",
    "wgan-gp": "train_gan.py --data fashion --preset wgan-gp --epochs 3",
    "sae": "train_autoencoder.py --data fashion --preset sae --epochs 5",
    "vae-20": "train_autoencoder.py --data fashion --preset vae-20 --epochs 5",
    "conditional": "train_sinkhorn.py --data fashion --preset conditional --epochs 8",
    "conv": "train_sinkhorn.py --data fashion --preset conv --width 0.5 --epochs 4",
    "digits": "train_sinkhorn.py --data digits",
    "flow-ot": "train_flow.py --data digits",
    "flow-independent": "train_flow.py --data digits --pairs independent",
    "flow-plane-ot": "train_flow.py --preset plane",
    "flow-plane-independent": "train_flow.py --preset plane --pairs independent",
    "genevay-a": "train_sinkhorn.py --data mnist --preset genevay-a",
    "genevay-b": "train_sinkhorn.py --data mnist --preset genevay-b",
    "genevay-c": "train_sinkhorn.py --data mnist --preset genevay-c",
    "mixture": "toy_mixture.py",
    "mixture-gan": "toy_mixture.py --preset gan --steps 20000 --freeze 20000",
    "mixture-wgan-clip": "toy_mixture.py --preset wgan-clip --steps 8000 --freeze 8000",
    "mixture-wgan-gp": "toy_mixture.py --preset wgan-gp --steps 8000 --freeze 8000",
    "ellipses": "fit_ellipses.py",
    "ellipses-1000": "fit_ellipses.py --samples 1000 --losses mmd 'eps 1' 'eps 0.1' 'eps 0.03'",
}
# Runs that are repeated: how often, each time with another seed.
SEEDS = {
    **dict.fromkeys(("med", "geist-1", "geist-10", "geist-100", "gan-geist", "otgan"), 3),
    **dict.fromkeys(("ellipses", "ellipses-1000"), 3),
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
    "MED, ours, a class on demand, 8 epochs": ("conditional", "-"),
    "MED, ours, convolutions, 4 epochs": ("conv", "-"),
}
# Rows of the tables of the other images.
MNIST = {
    "(1, 200, 10)": "genevay-a",
    "(.1, 200, 100)": "genevay-b",
    "(.1, 10, 300)": "genevay-c",
}
LABEL = {"OT-GAN at 1/8 width, 300 steps": "otgan-label"}
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
}
DIGITS = {"fid": 1, "precision": 2, "recall": 2, "is": 2, "geist_is": 2}

# The report on OT-GAN: the runs beside each other, at one width.
FRENCH = {"BasicGAN": "mnist-basic", "DCGAN": "mnist-dcgan", "OT-GAN": "mnist-otgan"}
# Pairs of flow matching: label, run.
FLOWS = {
    "digits, plan": "flow-ot",
    "digits, independent": "flow-independent",
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
    ("conditional", "as_asked", 0.85, 1),
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
