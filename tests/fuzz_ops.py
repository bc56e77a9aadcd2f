"""Operations called with wrong arguments: each call raises or ends with a result, and none crashes.

    python tests/fuzz_ops.py --calls 2000 --seed 1

A call takes valid arguments of an operation and spoils a few. The first line says the seed, the
last how calls ended; a crash is seen by the status of the process, and the line before it names the
call (`--verbose`).
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import warnings
from collections.abc import Callable
from typing import Any

import torch
from test_kernels import operation_named, sample_arguments, without_memory
from torch import Tensor

SECONDS = 20.0  # of the processor, for a call, which is small, and the imports of the first
SECONDS_ENDLESS = 0.5  # where an endless number of iterations is asked for
INTEGERS = (-(2**63), -(2**32), -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e-320, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"))


class Late(BaseException):
    pass


def fill(value: float) -> Callable[[Tensor, random.Random], Tensor]:
    def change(t: Tensor, pick: random.Random) -> Tensor:
        t = t.clone()
        t.view(-1)[pick.randrange(max(1, t.numel())) :] = value
        return t

    return change


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128)
TENSORS: list[Callable[[Tensor, random.Random], Any]] = [
    *(fill(value) for value in NUMBERS),
    *(lambda t, _, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    lambda t, _: t.to("meta"),
    lambda t, _: t.to_sparse(),
    lambda t, _: t.mT if t.dim() > 1 else t.repeat(2)[::2],
    lambda t, _: t[..., None],
    lambda t, _: t[0] if t.dim() else t,
    lambda t, pick: t.narrow(pick.randrange(t.dim()), 0, 0) if t.dim() else t[None][:0],
    lambda t, pick: t.narrow(pick.randrange(t.dim()), 0, 1) if t.dim() else t[None],
    lambda t, pick: torch.cat([t, t], pick.randrange(t.dim())) if t.dim() else t.repeat(2),
    lambda t, _: t.new_ones(()).expand(t.shape),
    lambda t, _: t.clone().requires_grad_(),
    lambda t, _: torch.empty(0, dtype=t.dtype),
    lambda t, _: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t, _: without_memory(t),
]


def spoiled_list(values: list[Any], pick: random.Random) -> list[Any]:
    values = list(values)
    kind = pick.randrange(6)
    if kind == 0 or not values:
        return values + values[:1] if values else [0]
    if kind == 1:
        return []
    if kind == 2:
        return values[:-1]
    if kind == 3:
        return values[::-1]
    at = pick.randrange(len(values))
    values[at] = spoiled(values[at], pick)
    return values


def spoiled(value: Any, pick: random.Random) -> Any:
    if isinstance(value, Tensor):
        return pick.choice(TENSORS)(value, pick)
    if isinstance(value, (list, tuple)):
        return spoiled_list(list(value), pick)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick.choice(INTEGERS)
    if isinstance(value, float):
        return pick.choice(NUMBERS)
    return pick.choice([None, torch.ones(2), 1, "x"])


def described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(described, value)) + "]"
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} {value.layout} {value.device}"


def ended(operation: str, arguments: list[Any]) -> str:
    """How a call ends: with a result, or which exception."""

    def late(*_: Any) -> None:
        raise Late

    endless = any(isinstance(v, int) and v >= 2**31 for v in arguments)
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_ENDLESS if endless else SECONDS)
    try:
        operation_named(operation)(*arguments)
        return "result"
    except Late:
        return "endless, as asked" if endless else "TOO LONG"
    except Exception as error:
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(calls: int, seed: int, verbose: bool) -> collections.Counter[str]:
    pick = random.Random(seed)
    samples = sample_arguments()
    endings: collections.Counter[str] = collections.Counter()
    for call in range(calls):
        operation = pick.choice(list(samples))
        arguments = list(samples[operation])
        for at in pick.sample(range(len(arguments)), pick.choice([1, 1, 1, 2, 3])):
            arguments[at] = spoiled(arguments[at], pick)
        names = [argument.name for argument in operation_named(operation)._schema.arguments]
        if verbose:
            given = zip(names, arguments, strict=True)
            print(call, operation, *(f"{k}={described(v)}" for k, v in given), flush=True)
        ending = ended(operation, arguments)
        endings[ending] += 1
        if ending == "TOO LONG":
            print(call, operation, [described(v) for v in arguments], flush=True)
    return endings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--verbose", action="store_true", help="name each call before it is made")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"seed {given.seed}", flush=True)
    endings = run(given.calls, given.seed, given.verbose)
    print(*(f"{k} {count}," for k, count in sorted(endings.items())))
    raise SystemExit(endings["TOO LONG"] > 0)


if __name__ == "__main__":
    main()
