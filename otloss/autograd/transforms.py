"""Calls inside ``torch.func``: vmap, grad, vjp, jacrev and what is made of them.

A call becomes one node that torch.func knows. Where it is mapped, the mapped axis goes into the
batch axis, and the call is made once, of all problems together, on plain tensors: it checks, reads
and warns as any other. Derivatives are those that autograd takes of it: the node keeps the graph of
the call, and its backward pass is again such a node, over that graph, so that every order follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import _check

__all__ = ["Argument", "through"]

_NO_FORWARD = (
    "otloss has no forward-mode derivatives: use torch.func.jacrev in place of jacfwd and jvp, "
    "jacrev(grad(f)) in place of hessian"
)

Level = int | None  # of torch.func's transforms
Named = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


class Argument:
    """A tensor of a call: of one problem it has ``rank`` axes, of a batch the batch axis before
    them. ``shared``: one (1, ...) may serve all problems of a batch."""

    def __init__(self, value: Tensor, rank: int, *, shared: bool = False) -> None:
        self.value, self.rank, self.shared = value, rank, shared


def through(
    function: Callable[[Named], tuple[Tensor, ...]], arguments: Mapping[str, Argument]
) -> tuple[Tensor, ...]:
    """``function(tensors)``, which get them by name, inside torch.func. If the first has a batch
    axis it is the first of the results, too."""
    given = list(arguments.values())
    batch = None
    if given[0].value.dim() > given[0].rank:
        batch = max(len(x.value) for x in given if x.value.dim() > x.rank)
    tensors, kinds = list[Tensor](), list[Kind]()
    for x in given:
        t, learns = x.value, torch.is_grad_enabled() and _learns(x.value)
        if batch is not None and learns and (x.rank == 0 or t.dim() > x.rank):
            t = t.expand(batch, *t.shape[t.dim() - x.rank :])
        tensors.append(t)
        kinds.append((x.rank, learns, x.shared and not learns))

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(dict(zip(arguments, tensors, strict=True)))

    return Node.apply(Call(of_tensors, batch, kinds), *tensors)


def _learns(t: Tensor) -> bool:
    """Whether it has a derivative, at any level."""
    while not t.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(t):
            return False
        t = torch._C._functorch.get_unwrapped(t)
    return True


# Of a tensor of a call: axes without the batch, whether it has a derivative, whether one may serve
# all problems.
Kind = tuple[int, bool, bool]


class Call:
    """A function of tensors, made once; its graph, if it was made here, or the calls that were made
    in its place at the levels of vmap it was mapped at."""

    def __init__(self, function: Function | None, batch: int | None, kinds: Sequence[Kind]) -> None:
        self.function, self.batch, self.kinds = function, batch, kinds
        self.leaves: tuple[Tensor, ...] = ()
        self.results: tuple[Tensor, ...] = ()
        # By the level below the vmap: one call of all problems, or one for each.
        self.mapped: dict[Level, Call] = {}
        self.parts: dict[Level, list[Pull]] = {}

    def run(self, tensors: Sequence[Tensor]) -> None:
        assert self.function is not None
        learns = [moves for _, moves, _ in self.kinds]
        self.leaves = tuple(
            t.detach().requires_grad_(moves) for t, moves in zip(tensors, learns, strict=True)
        )
        with torch.set_grad_enabled(any(learns)):
            self.results = self.function(*self.leaves)

    def over(self, count: int, level: Level) -> Call | None:
        """The call of ``count`` times the problems; None if there has to be one after the other."""
        return Call(self.function, count * (self.batch or 1), self.kinds)

    def moved(self, t: Tensor, dim: int | None, kind: Kind, count: int) -> Tensor:
        """A tensor of this call, mapped ``count`` times along ``dim``, as that call takes it."""
        rank, learns, shared = kind
        has_batch = self.batch is not None and t.dim() - (dim is not None) > rank
        if dim is None:
            of_all = t.dim() == rank == 0 or (has_batch and len(t) == 1)
            if of_all and not learns:
                return t
            if shared and self.batch is None:
                return t.unsqueeze(0)
            t = t.expand(count, *t.shape)
        else:
            t = t.movedim(dim, 0)
        if self.batch is None:
            return t
        if not has_batch:
            t = t.unsqueeze(1)
        return t.expand(count, self.batch, *t.shape[2:]).flatten(0, 1)


class Pull(Call):
    """The gradients of some inputs of a call from those of some results; its inputs are these
    gradients and all inputs of the call."""

    def __init__(
        self, of: Call, given: Sequence[tuple[int, int]], wanted: Sequence[int], again: bool
    ) -> None:
        """``given``: results and their axes without the batch; ``again``: it has derivatives."""
        seeds = [(rank, again, False) for _, rank in given]
        super().__init__(None, of.batch, [*seeds, *of.kinds])
        self.of, self.given, self.wanted, self.again = of, given, wanted, again

    def run(self, tensors: Sequence[Tensor]) -> None:
        seeds = [t.detach().requires_grad_(self.again) for t in tensors[: len(self.given)]]
        self.leaves = (*seeds, *self.of.leaves)
        inputs = [self.of.leaves[k] for k in self.wanted]
        each = [(self.of.results[k], t) for (k, _), t in zip(self.given, seeds, strict=True)]
        moving = [pair for pair in each if pair[0].requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if moving:
            results, grads = zip(*moving, strict=True)
            found = torch.autograd.grad(
                results, inputs, grads, retain_graph=True, create_graph=self.again,
                allow_unused=True,
            )  # fmt: skip
        self.results = tuple(
            torch.zeros_like(x) if grad is None else grad
            for x, grad in zip(inputs, found, strict=True)
        )

    def is_multiple(self, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> bool:
        """Whether all that is mapped is the gradient of one number of each problem, and every input
        is that of one problem: then it multiplies one gradient."""
        inputs = [(tensors[1 + k], self.of.kinds[k][0]) for k in self.wanted]
        return (
            [rank for _, rank in self.given] == [0]
            and self.batch is not None
            and not isinstance(self.of, Pull)
            and all(dim is None for dim in dims[1:])
            and all(t.dim() > rank for t, rank in inputs)
        )

    def on(self, of: Call) -> Pull:
        return Pull(of, self.given, self.wanted, self.again)

    def over(self, count: int, level: Level) -> Call | None:
        of = self.of.mapped.get(level)
        return self.on(of) if of else None


class Node(torch.autograd.Function):
    """``(call, *tensors) -> results``."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        call.run(tensors)
        return tuple(t.detach() for t in call.results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _check.not_batched(grads)
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        axes = 0 if call.batch is None else 1
        given = [(k, g.dim() - axes) for k, g in enumerate(grads) if g is not None]
        wanted = [k for k, need in enumerate(needed) if need]
        result: list[Tensor | None] = [None] * len(needed)
        pull = Pull(call, given, wanted, torch.is_grad_enabled())
        found = Node.apply(pull, *(g for g in grads if g is not None), *ctx.saved_tensors)
        for k, grad in zip(wanted, found, strict=True):
            result[k] = grad
        return None, *result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor) -> Any:
        count, level, dims = info.batch_size, torch._C._functorch.maybe_current_level(), in_dims[1:]
        inner = call.over(count, level)
        if inner is None:
            assert isinstance(call, Pull)
            gradients = _scaled if call.is_multiple(dims, tensors) else _one_by_one
            results = gradients(call, count, level, dims, tensors)
        else:
            call.mapped[level] = inner
            moved = [
                call.moved(t, dim, kind, count)
                for t, dim, kind in zip(tensors, dims, call.kinds, strict=True)
            ]
            results = Node.apply(inner, *moved)
            if call.batch is not None:
                results = tuple(t.unflatten(0, (count, call.batch)) for t in results)
        return results, (0,) * len(results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD)


def _scaled(
    call: Pull, count: int, level: Level, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Several gradients of one call that are multiples of one, as in the Jacobian of a batch of
    values: the problems are gone back through once."""
    assert dims[0] is not None
    seeds = tensors[0].movedim(dims[0], 0)  # (count, B)
    found = Node.apply(call.on(call.of), torch.ones_like(seeds[0]), *tensors[1:])
    return tuple(seeds.reshape(count, -1, *[1] * (t.dim() - 1)) * t for t in found)


def _one_by_one(
    call: Pull, count: int, level: Level, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Several gradients of one call, as of every entry of a result in a Jacobian: the problem is
    solved once, and gone back through for each."""
    below = len(call.given)
    if isinstance(call.of, Pull) and not (call.of.leaves or level in call.of.parts):
        # What is differentiated again was a multiple of one gradient.
        _one_by_one(call.of, count, level, dims[below:], tensors[below:])
    of: Sequence[Call] = call.of.parts.get(level) or [call.of] * count
    call.parts[level] = [call.on(each) for each in of]
    every = [
        Node.apply(
            part,
            *(t if dim is None else t.select(dim, k) for t, dim in zip(tensors, dims, strict=True)),
        )
        for k, part in enumerate(call.parts[level])
    ]
    return tuple(torch.stack(each) for each in zip(*every, strict=True))
