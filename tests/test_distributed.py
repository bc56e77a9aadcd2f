"""The loss of points spread over processes against one process with all of them."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from helpers import COSTS
from torch import Tensor, multiprocessing, nn

import otloss
import otloss.distributed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")

Case = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


def skewed(x: Tensor, y: Tensor) -> Tensor:
    """A cost with c(x, y) != c(y, x)."""
    return (x.unsqueeze(-2) - 1.3 * y.unsqueeze(-3)).square().sum(-1) + 0.1 * x[..., :1]


class Learned(nn.Module):
    """A cost with a parameter."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, d, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x * self.scale, y * self.scale).square()


CASES: list[Case] = [
    *(
        {"cost": cost, "objective": objective, "n_iters": n_iters}
        for cost, objective, n_iters in itertools.product(
            COSTS, ["regularized", "transport"], [None, 3]
        )
    ),
    {"dtype": torch.float32},
    {"dtype": torch.float32, "d": 40, "eps": 20.0},
    {"dtype": torch.bfloat16, "n_iters": 5},
    {"weighted": True},
    {"weighted": True, "n_iters": 4, "cost": "euclidean"},
    {"weighted": True, "objective": "transport", "empty": True},
    {"weighted": True, "unbalanced": 0.7, "mass": 1.6},
    {"weighted": True, "unbalanced": (0.5, None), "mass": 1.6, "cost": "euclidean"},
    {"weighted": True, "unbalanced": (None, 2.0), "mass": 0.6, "n_iters": 5},
    {"unbalanced": 1.0, "objective": "transport", "cost": "cosine", "empty": True},
    {"cost": skewed, "eps": 0.5},
    {"cost": skewed, "weighted": True, "unbalanced": (0.5, 1.0), "eps": 0.5, "empty": True},
    {"cost": Learned(3), "weighted": True, "symmetric": True, "objective": "transport"},
    {"cost": Learned(3), "n_iters": 3, "batch": 2},
    {"batch": 3, "weighted": True, "empty": True},
    {"minibatches": True},
    {"minibatches": True, "cost": Learned(3), "eps": 0.5},
    {"eps": 0.02},
    {"weighted": True, "apart": 30.0},
    {"weighted": True, "apart": 30.0, "unbalanced": (1e4, None)},
    {"n": 3, "m": 50},
    {"empty": True, "dtype": torch.float32, "cost": "euclidean"},
    *({"n": 6, "m": 6, "near": 1e-6, "batch": 20, **case} for case in ({}, {"unbalanced": 1.0})),
]


def clouds(case: Case) -> list[Tensor]:
    """x, y, and their weights or, for minibatches, another x and y."""
    n, m, d = case.get("n", 41), case.get("m", 34), case.get("d", 3)
    make = torch.Generator().manual_seed(n * m + d)
    batch = (case["batch"],) if "batch" in case else ()

    def draw(*shape: int) -> Tensor:
        return torch.rand(*batch, *shape, generator=make, dtype=torch.float64) + 0.1

    made = [draw(n, d), 1.5 * draw(m, d)]
    if "near" in case:
        made[1] = made[0][..., :m, :] + case["near"] * made[1]
    for z in made:  # every other point far from the rest
        z[..., ::2, 0] += case.get("apart", 0.0)
    if case.get("minibatches"):
        made += [draw(n, d) ** 2, 1.5 * draw(m, d)]
    if case.get("weighted"):
        a, b = draw(n), draw(m)
        a[..., :2], b[..., 2] = 0, 0  # of some ranks all
        made += [a / a.sum(-1, True), case.get("mass", 1.0) * b / b.sum(-1, True)]
    return [t.to(case.get("dtype", torch.float64)).requires_grad_() for t in made]


def loss_of(module: Any, case: Case, tensors: list[Tensor]) -> Tensor:
    """Of all points by ``otloss``, of a rank's by ``otloss.distributed``."""
    names = ("cost", "objective", "n_iters", "unbalanced", "symmetric")
    kept = {k: case[k] for k in names if k in case}
    tol = 1e-3 if "near" in case else 1e-9 if "dtype" not in case else 1e-5
    settings = {"tol": tol, "max_iters": 5000, "backward": "envelope", **kept}
    eps = case.get("eps", 0.1)
    if case.get("minibatches"):
        x1, y1, x2, y2 = tensors
        return module.minibatch_energy_distance(x1, x2, y1, y2, eps, **settings)
    if case.get("weighted"):
        weights = ["a", "b"] if module is otloss else ["a_local", "b_local"]
        settings |= dict(zip(weights, tensors[2:], strict=True))
    return module.sinkhorn_divergence(*tensors[:2], eps, **settings)


def parameters(case: Case) -> list[Tensor]:
    return [*case["cost"].parameters()] if isinstance(case.get("cost"), nn.Module) else []


def gradients(loss: Tensor, case: Case, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.arange(1, 1 + loss.numel(), dtype=loss.dtype).view_as(loss)
    return [*torch.autograd.grad((weights * loss).sum(), leaves + parameters(case))]


def cut(case: Case, whole: list[Tensor], rank: int, ranks: int) -> list[Tensor]:
    """Uneven shards: the first rank has one point of each cloud, or none of x."""
    parts = []
    for index, t in enumerate(whole):
        dim, least = 1 if "batch" in case else 0, int(not (case.get("empty") and index % 2 == 0))
        rest = t.shape[dim] - least
        cuts = [0, least, *(least + rest * k // (ranks - 1) for k in range(1, ranks))]
        part = t.detach().narrow(dim, cuts[rank], cuts[rank + 1] - cuts[rank])
        parts.append(part.requires_grad_())
    return parts


# What one rank, of many, may do differently, and what all of them say to that.
REFUSED: list[tuple[Case, str]] = [
    ({"eps": 0.2}, "ValueError: eps must be the same on every rank, got 0.1"),
    ({"cost": "euclidean"}, "ValueError: cost must be the same on every rank"),
    ({"cost": torch.cdist}, "ValueError: cost must be the same on every rank, got sqeuclidean"),
    ({"objective": "transport"}, "ValueError: objective must be the same on every rank"),
    ({"unbalanced": 1.0}, "ValueError: unbalanced must be the same on every rank"),
    ({"n_iters": 4}, "ValueError: n_iters must be the same on every rank"),
    ({"max_iters": 4}, "ValueError: max_iters must be the same on every rank"),
    ({"tol": 1e-2}, "ValueError: tol must be the same on every rank"),
    ({"dtype": torch.float32}, "ValueError: the dtype must be the same on every rank"),
    ({"d": 2}, "ValueError: the dimension d must be the same on every rank"),
    ({"batch": (1,)}, "ValueError: the batch size B must be the same on every rank"),
    ({"weighted": True}, "ValueError: whether weights are given must be the same on every rank"),
    ({"eps": -1.0}, "ValueError: {}eps must be finite and > 0, got -1.0"),
    ({"backward": "implicit"}, "NotImplementedError: {}backward='implicit' is not available"),
    ({"y": None}, "TypeError: {}y_local must be a torch.Tensor"),
    ({"first": math.nan}, "ValueError: {}x_local must be finite, but x_local[0, 0] is nan"),
    ({"first": 1e200}, "ValueError: costs overflow torch.float64"),
    ({"first": 1e30}, "ValueError: eps=0.1 is below what torch.float64 can resolve"),
]


def refusal(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused(case: Case, group: Any = None) -> str:
    """What a call raises on a rank that differs from the others by ``case``."""
    shape = (*case.get("batch", ()), 4, case.get("d", 3))
    x, y = (torch.rand(shape, dtype=case.get("dtype")) for _ in range(2))
    x[..., 0, 0] = case.get("first", 0.5)
    others = {"eps": 0.1, "y_local": y}
    names = ("eps", "cost", "objective", "unbalanced", "n_iters", "max_iters", "tol", "backward")
    others |= {k: case[k] for k in names if k in case}
    others |= {"y_local": case["y"]} if "y" in case else {}
    others |= {"a_local": torch.full((4,), 0.25)} if case.get("weighted") else {}
    return refusal(lambda: otloss.distributed.sinkhorn_divergence(x, group=group, **others))


def failing_cost(fails: bool) -> str:
    """A cost function that fails on one rank."""

    def cost(x: Tensor, y: Tensor) -> Tensor:
        if fails and len(x) == 4:
            raise ZeroDivisionError("of this function")
        return torch.cdist(x, y)

    x = torch.rand(4, 3)
    return refusal(lambda: otloss.distributed.sinkhorn_divergence(x, x, 0.1, cost=cost))


def interrupted(rank: int) -> str:
    """A signal on one rank, in the middle of a long solve, whose handler raises."""

    def handler(*_: Any) -> None:
        raise TimeoutError("of the handler")

    x = torch.rand(50, 3)
    previous = signal.signal(signal.SIGALRM, handler)
    if rank == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    call = otloss.distributed.sinkhorn_divergence
    said = refusal(lambda: call(x, x, 0.01, n_iters=10**6))
    assert signal.getsignal(signal.SIGALRM) is handler
    signal.signal(signal.SIGALRM, previous)
    return said


def start(rank: int, ranks: int, folder: str, limit: float = 600) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=limit)
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=timeout)


def work(rank: int, ranks: int, folder: str) -> None:
    """Every case on one rank: the loss and the gradients of its points."""
    start(rank, ranks, folder)
    results = []
    for case in CASES:
        leaves = cut(case, clouds(case), rank, ranks)
        loss = loss_of(otloss.distributed, case, leaves)
        results.append((loss.detach(), gradients(loss, case, leaves)))
    torch.set_default_dtype(torch.float64)
    refusals = [refused(case if rank == ranks - 1 else {}) for case, _ in REFUSED]
    refusals += [
        failing_cost(rank == 1),
        interrupted(rank),
        refused({}, dist.new_group(range(1, ranks))),
    ]
    torch.save((results, refusals), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


RANKS = [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 8))]


@pytest.fixture(scope="module", params=RANKS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of every rank. The workers of pytest-xdist share them: the first to ask runs the ranks."""
    run, base = os.environ.get("PYTEST_XDIST_TESTRUNUID"), tmp_path_factory.getbasetemp()
    folder = base.parent / f"{run}-{request.param}" if run else base / f"ranks-{request.param}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "begun").exists():
            (folder / "begun").touch()
            arguments = (request.param, str(folder))
            multiprocessing.start_processes(
                work, arguments, request.param, start_method="forkserver"
            )
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def named(case: Case) -> str:
    """The same in every process, where the repr of a function is not."""
    return str({key: getattr(value, "__name__", value) for key, value in case.items()})


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: named(CASES[number]))
def test_is_the_loss_of_one_process(results, number):
    case = CASES[number]
    leaves = clouds(case)
    loss = loss_of(otloss, case, leaves)
    expected = gradients(loss, case, leaves)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}.get(leaves[0].dtype, 1e-6)
    ranks = [cases[number] for cases, _ in results]
    for value, _ in ranks:
        assert bool((value == ranks[0][0]).all())
        assert bool((value >= 0).all()) or "near" not in case
        torch.testing.assert_close(value, loss.detach(), rtol=tolerance, atol=tolerance)
    for side, grad in enumerate(expected):
        parts = [grads[side] for _, grads in ranks]
        found = torch.cat(parts, int("batch" in case)) if side < len(leaves) else sum(parts)
        assert found.dtype == grad.dtype
        scale = float(grad.abs().max()) or 1.0
        torch.testing.assert_close(found / scale, grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "number", range(len(REFUSED)), ids=lambda number: named(REFUSED[number][0])
)
def test_every_rank_refuses(results: list[Any], number: int) -> None:
    for rank, (_, refusals) in enumerate(results):
        where = "" if rank == len(results) - 1 else f"on rank {len(results) - 1} of the group: "
        assert refusals[number].startswith(REFUSED[number][1].format(where))


def test_every_rank_fails_where_one_does(results):
    for rank, (_, refusals) in enumerate(results):
        cost, interrupt, _ = refusals[len(REFUSED) :]
        where = "" if rank == 1 else "RuntimeError: on rank 1 of the group: "
        assert cost == f"{where}ZeroDivisionError: of this function"
        assert interrupt == f"{where}TimeoutError: of the handler"


def test_ranks_outside_the_group_are_refused(results: list[Any]) -> None:
    outside, *inside = (refusals[-1] for _, refusals in results)
    assert "group must contain this process" in outside
    assert not any(inside)


# What the ranks' processes are forked from: it has imported these.
multiprocessing.set_forkserver_preload(["torch", "otloss"])
LIMIT = 10.0  # seconds, of a group in which a rank dies


def two_clouds() -> tuple[Tensor, Tensor]:
    x = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    return x, x**2


def solve_for_ever(rank: int, ranks: int, folder: str) -> None:
    """One problem again and again; its values, and how that ended."""
    start(rank, ranks, folder, LIMIT)
    x, y = two_clouds()
    own, values, said = slice(rank, None, ranks), list[float](), ""
    call = otloss.distributed.sinkhorn_divergence
    while not said:
        said = refusal(lambda: values.append(float(call(x[own], y[own], 0.05))))
        Path(folder, f"begun{rank}").touch()
    torch.save((values, said), f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "death", [*[signal.SIGKILL] * 10, signal.SIGSTOP], ids=lambda death: death.name
)
def test_where_a_rank_dies_the_others_get_an_error(tmp_path, rng, death):
    ranks, dies = 3, int(torch.randint(3, (), generator=rng))
    arguments = (ranks, str(tmp_path))
    workers = multiprocessing.start_processes(
        solve_for_ever, arguments, ranks, join=False, start_method="forkserver"
    ).processes
    while not all((tmp_path / f"begun{rank}").exists() for rank in range(ranks)):
        time.sleep(0.05)
    time.sleep(0.5 * float(torch.rand((), generator=rng)))
    os.kill(workers[dies].pid, death)
    died = time.monotonic()
    for rank, worker in enumerate(workers):
        if rank != dies:
            worker.join(3 * LIMIT)
    took = time.monotonic() - died
    workers[dies].kill()
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks) if rank != dies]
    assert took < 2 * LIMIT
    (value,) = {value for values, _ in ends for value in values}
    assert value == pytest.approx(float(otloss.sinkhorn_divergence(*two_clouds(), 0.05)), rel=1e-3)
    for _, said in ends:
        assert said.startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))


def train(ranks: int, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """OT-GAN on digits, by torchrun if over ranks, with the solver's steps that these take."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launch = launch if ranks > 1 else []
    small = ["--data", "digits", "--width", "0.0625", "--latent", "5", "--batch", "50"]
    script = [str(ROOT / "examples" / "train_otgan.py"), *small, "--flip", "--eps", "0.05"]
    command = [sys.executable, *launch, *script, "--steps", "100000", "--out", str(out), *options]
    environment = {"OTLOSS_NEWTON": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE)


def assert_same_training(one: Path, two: Path) -> None:
    expected, found = (torch.load(folder / "ckpt.pt") for folder in (one, two))
    assert found["step"] == expected["step"]
    for network in ("generator", "critic"):
        torch.testing.assert_close(
            found["state"][network], expected["state"][network], rtol=0, atol=1e-5
        )
    losses = [[row["loss"] for row in run["rows"]] for run in (expected, found)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert torch.equal(found["rng"], expected["rng"])


@pytest.mark.slow
def test_otgan_over_two_processes_is_that_of_one(tmp_path):
    runs = [train(ranks, tmp_path / str(ranks), "--stop-at", "10") for ranks in (1, 2)]
    for run in runs:
        assert run.wait(300) == 0, run.communicate()[1].decode()
    assert_same_training(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_otgan_goes_on_after_a_process_was_killed(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    for ranks, out, stop in ((1, one, "20"), (2, two, "10")):
        assert train(ranks, out, "--stop-at", stop, "--chunk", "10").wait(300) == 0
    killed = train(2, two, "--resume", "--chunk", "10")
    said = b""
    while not re.search(rb"\d(step/s|s/step)", said):  # the bar after the first steps
        said += killed.stderr.read1()
        assert killed.poll() is None, said
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert killed.wait(100) != 0
    assert train(2, two, "--resume", "--stop-at", "20", "--chunk", "10").wait(300) == 0
    assert_same_training(one, two)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of one rank, in this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bad_input(alone):
    loss = otloss.distributed.sinkhorn_divergence
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    with pytest.raises(TypeError, match="cost must be a name"):
        loss(x, y, 0.1, cost=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps must be finite"):
        loss(x, y, 0.0)
    with pytest.raises(ValueError, match="x_local must not be empty on every rank"):
        loss(x[:0], y, 0.1)
    with pytest.raises(ValueError, match="a_local must have a positive total"):
        loss(x, y, 0.1, a_local=torch.zeros(5), unbalanced=1.0)
    with pytest.raises(ValueError, match="same total mass"):
        loss(x, y, 0.1, a_local=torch.ones(5))
    with pytest.raises(ValueError, match=r"y_local\[1, 0\] is nan"):
        loss(x, y.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.nan)), 0.1)
    with pytest.raises(ValueError, match=r"underflow torch.float32: points of x_local and y_local"):
        loss(1e-23 * x, 1e-23 * y, 0.1)
    with pytest.warns(otloss.ConvergenceWarning, match="max_iters"):
        loss(x, y, 0.01, tol=1e-7, max_iters=3)
    with pytest.raises(NotImplementedError, match=r"inside torch.func"):
        torch.func.grad(lambda x: loss(x, y, 0.1))(x)
    compiled = torch.compile(lambda x: 2 * loss(x, y, 0.1), backend="eager")
    assert compiled(x) == 2 * loss(x, y, 0.1)
    with pytest.raises(TypeError, match="eps must be a number over several processes"):
        loss(x, y, torch.tensor(0.1))  # type: ignore[arg-type]
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, y, 0.1), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
