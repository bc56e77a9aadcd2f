"""The differentiable operations: ``torch.autograd.Function`` over the registered ones.

``CostMatrices`` turns clouds into cost matrices; ``Solve`` turns cost matrices or points, and
weights, into values and potentials. Their gradients are operations too (``first_order``). Where a
graph of a gradient is being made, it is computed in plain torch (``second_order``).
"""

from otloss.autograd.cost_matrices import CostMatrices
from otloss.autograd.empty_bins import FirstOrder, extended
from otloss.autograd.first_order import extend, plan_gap, plan_product
from otloss.autograd.nodes import Solve, evaluate
from otloss.autograd.second_order import refuse_higher_order
from otloss.autograd.settings import Places, Settings
from otloss.autograd.transforms import Argument, through

__all__ = [
    "Argument",
    "CostMatrices",
    "FirstOrder",
    "Places",
    "Settings",
    "Solve",
    "evaluate",
    "extend",
    "extended",
    "plan_gap",
    "plan_product",
    "refuse_higher_order",
    "through",
]
