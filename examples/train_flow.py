"""Flow matching with pairs from a transport plan, against independent pairs.

    python examples/train_flow.py --data digits --out runs/flow-ot
    python examples/train_flow.py --data digits --pairs independent --out runs/flow-independent
    python examples/train_flow.py --data gaussians                         # in the plane

A network v(x, t) learns the velocity x1 - x0 of straight lines from noise x0 to data x1, at the
points (1 - t) x0 + t x1 (Lipman et al. 2023); the flow of v carries noise to data. With independent
pairs the lines cross, so the flow is bent and takes many steps to follow. Pairs drawn from the
optimal plan of a minibatch hardly cross (Tong et al. 2024, Pooladian et al. 2023): the flow is
nearly straight and few Euler steps do.

Metrics: ``med2_<n>`` is MED² after n Euler steps, ``curvature`` the mean of |v - (x1 - x0)|² along
the flow over that of |x1 - x0|², 0 for straight lines.

Presets: ``images``, and ``plane`` for eight Gaussians.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import data, generate, options, run
from common.data import to_float
from common.figures import save_grid
from common.metrics import OT_BATCH, OT_REPEATS, Evaluator, med2
from common.models import Generator, moving_average, widths
from torch import Tensor, nn
from toy_mixture import draw_mixture, picture, score

import otloss

IMAGES: dict[str, Any] = {
    "batch": 256,
    "epochs": 15.0,
    "schedule": "cosine",
    "ema": 0.99,
    "by_data": {
        "digits": {"epochs": 1000.0},
        "gaussians": {"steps": 3000, "hidden": [128, 128, 128]},
    },
}
PRESETS: dict[str, dict[str, Any]] = {"images": IMAGES, "plane": {**IMAGES, "data": "gaussians"}}
OF_IMAGES = ("epochs", "labels", "limit_train", "eval_every", "eval_samples", "protocol")
NEEDS: options.Needs = {
    "eps": ("pairs", ["ot"]),
    **dict.fromkeys((*OF_IMAGES, "classifier", "classifier_preset"), ("data", data.NAMES)),
}
EULER_STEPS = (1, 2, 4, 8, 100)
MOST = EULER_STEPS[-1]


class Velocity(nn.Module):
    """A perceptron of x and t, plus a multiple of x that depends on t.

    The velocity contains minus the noise, which layers narrower than an image do not pass through.
    """

    def __init__(self, shape: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.shape, size = tuple(shape), torch.Size(shape).numel()
        layers: list[nn.Module] = []
        fan_in = size + 1
        for fan_out in hidden:
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
            fan_in = fan_out
        self.net = nn.Sequential(*layers, nn.Linear(fan_in, size))
        self.factor = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocities of points x (n, d) at times t (n, 1)."""
        return self.net(torch.cat((x, t), 1)) + self.factor(t) * x


class Flow(Generator):
    """Images from noise, by Euler steps along the velocity."""

    def __init__(self, velocity: Velocity) -> None:
        super().__init__(velocity, torch.Size(velocity.shape).numel(), "normal")
        self.shape = velocity.shape

    def path(self, x: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Where points x (n, d) arrive, and their velocities on the way."""
        velocities = []
        for k in range(steps):
            velocities.append(self.net(x, x.new_full((len(x), 1), k / steps)))
            x = x + velocities[-1] / steps
        return x, velocities

    def forward(self, z: Tensor, steps: int = MOST) -> Tensor:
        return self.path(z, steps)[0].clamp(-1, 1).unflatten(1, self.shape)


class PlaneFlow(Flow):
    """Points of the plane, which have no bounds."""

    def forward(self, z: Tensor, steps: int = MOST) -> Tensor:
        return self.path(z, steps)[0]


def paired(args: argparse.Namespace, noise: Tensor, data: Tensor) -> Tensor:
    """The rows of ``data`` in an order in which they are partners of ``noise``."""
    if args.pairs == "independent":
        return data
    if args.pairs == "pot":
        import ot  # the exact plan, for comparison

        plan = ot.emd([], [], ot.dist(noise.numpy(), data.numpy()))
        return data[torch.from_numpy(plan.argmax(1))]
    spread = (noise.square().sum(1).mean() + data.square().sum(1).mean()).item()  # E |x0 - x1|²
    _, j = otloss.solve_sample(noise, data, args.eps * spread).sample()
    return data[j]


@torch.no_grad()
def flow_metrics(flow: Flow, real: Tensor) -> dict[str, float]:
    """MED² by number of Euler steps, against ``real``, and how bent the paths are."""
    count = 2 * OT_BATCH
    metrics = {}
    z = flow.draw(count * 5)
    for steps in EULER_STEPS:
        made = torch.cat([flow(part, steps) for part in z.split(1000)])
        pick = [torch.randperm(len(real))[:count] for _ in range(OT_REPEATS // 5)]
        looks = [med2(real[p], g) for p, g in zip(pick, made.split(count), strict=True)]
        metrics[f"med2_{steps}"] = sum(looks) / len(looks)
    end, velocities = flow.path(z[:count], MOST)
    chord = end - z[:count]
    bent = torch.stack([(v - chord).square().sum(1).mean() for v in velocities]).mean()
    return {**metrics, "curvature": float(bent / chord.square().sum(1).mean())}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = generate.parser(__file__, __doc__ or "", PRESETS, also=("gaussians",), latent=False)
    add = parser.add_argument
    add("--pairs", choices=("ot", "independent", "pot"), default="ot", help="how x0 finds its x1")
    add("--eps", type=float, default=0.01, help="regularisation, in units of the mean cost")
    add("--hidden", type=int, nargs="+", default=[512, 512, 512], help="layers of the velocity")
    args = options.parse(parser, PRESETS, argv, NEEDS)
    if args.data == "gaussians" and args.schedule == "follow":
        raise options.UsageError("--schedule follow needs images, and --data is gaussians")
    if args.pairs == "pot" and args.device != "cpu":
        raise options.UsageError(f"--pairs pot needs the CPU, and --device is {args.device}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    in_plane = args.data == "gaussians"
    if in_plane:
        options.begin(args)
    else:
        images, batches = options.begin_images(args)
    kind, shape = (PlaneFlow, (2,)) if in_plane else (Flow, images.shape)
    flow = kind(Velocity(shape, widths(args.hidden, args.width))).to(args.device)
    average = moving_average(flow, args.ema)
    optimiser = torch.optim.Adam(flow.parameters(), args.lr)
    state = {"flow": flow, "average": average, "optimiser": optimiser}
    if in_plane:
        training = run.Run(args, state)
    else:
        training = generate.Training(args, images, average.module, state, strips(average.module))

    for i in training:
        if in_plane:
            data = draw_mixture(args.batch).to(args.device)
        else:
            data = to_float(images.train[batches(i)]).flatten(1)
        noise = torch.randn_like(data)
        data = training.timed(paired, args, noise, data)
        t = torch.rand(len(data), 1, device=data.device)
        with options.autocast(args):
            velocity = flow.net(torch.lerp(noise, data, t), t).float()
        loss = (velocity - (data - noise)).square().sum(1).mean()
        training.set_rate(optimiser)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(flow)
        training.log(loss=loss)

    if isinstance(training, generate.Training):
        training.conclude()
    elif training.finished:
        finish_plane(training, average.module)


def strips(flow: Flow) -> generate.Extra:
    """Pictures from one noise after few and many steps, and the metrics of the flow."""

    def extra(folder: Path, evaluator: Evaluator) -> Mapping[str, float]:
        z = flow.draw(10)
        rows = torch.cat([flow(z, steps).detach() for steps in EULER_STEPS])
        save_grid(rows, folder / "euler.png", 10)
        return flow_metrics(flow, to_float(evaluator.test))

    return extra


def finish_plane(training: run.Run, flow: Flow) -> None:
    """The same for points in the plane."""
    with run.own_randomness(training.args.seed), torch.no_grad():
        real, z = draw_mixture(2000), flow.draw(2000)
        clouds = {f"{n} Euler steps": flow(z, n) for n in EULER_STEPS}
        metrics = {**score(clouds[f"{MOST} Euler steps"]), **flow_metrics(flow, real)}
    picture({"real": real, **clouds}, training.out / "euler.png")
    training.finish(metrics=metrics, floors=score(real))
    for name, value in metrics.items():
        print(f"{name:>12}: {value:.4g}")
    print(f"written to {training.out}")


if __name__ == "__main__":
    options.run_from_shell(main)
