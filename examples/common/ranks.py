"""The processes that torchrun starts for one run, each on a GPU of its own if there are any.

    torchrun --nproc_per_node 8 examples/train_otgan.py --preset cifar10 --out runs/cifar

All draw the random numbers of the whole batch and take their share of it, and all take the step of
the summed gradients. So a run is, to rounding, that of one process with this batch, and the first
process, which writes the folder of the run, writes for all. They read it when they resume.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

_alone = False


@contextmanager
def started(args: argparse.Namespace) -> Iterator[None]:
    """While a script runs; only this process unless torchrun has started it."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.device(args.device).type == "cuda"
    if on_gpus:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """What is inside concerns this process only."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def count() -> int:
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def number() -> int:
    return dist.get_rank() if count() > 1 else 0


def share(batch: Tensor, parts: int) -> Tensor:
    """This process's rows of each of the equal ``parts`` of a batch, which stay of equal size."""
    return torch.cat([part[number() :: count()] for part in batch.chunk(parts)])


def add_up(weights: Iterable[nn.Parameter]) -> None:
    """The sums of gradients over the processes."""
    for weight in weights if count() > 1 else ():
        dist.all_reduce(weight.grad)


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    flags = [flag] * count()
    if count() > 1:
        dist.all_gather_object(flags, flag)
    return any(flags)
