"""The differentiable operations: ``torch.autograd.Function`` over the registered ones.

``CostMatrices`` turns clouds into cost matrices; ``Solve`` turns cost matrices or points, and
weights, into values and potentials (``nodes``). Their gradients are operations too
(``first_order``). Where a graph of a gradient is being made, it has nodes of its own
(``second_order``): their forward is the same operation, their backward repeats the gradient in
plain torch and differentiates that. It costs nothing unless it is asked for.
"""

from otloss.autograd.empty_bins import FirstOrder, extended
from otloss.autograd.first_order import plan_product
from otloss.autograd.nodes import CostMatrices, Solve, evaluate
from otloss.autograd.second_order import refuse_higher_order
from otloss.autograd.settings import Places, Settings

__all__ = [
    "CostMatrices",
    "FirstOrder",
    "Places",
    "Settings",
    "Solve",
    "evaluate",
    "extended",
    "plan_product",
    "refuse_higher_order",
]
