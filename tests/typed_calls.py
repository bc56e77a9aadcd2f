"""Calls that a type checker refuses. `make lint` checks this file: where mypy would accept one, it
reports that its `type: ignore` is not needed."""

import torch

import otloss

x, y = torch.rand(3, 2), torch.rand(4, 2)

otloss.SinkhornDivergence(0.1, cost="euclidean", method="dense", unbalanced=(1.0, None))(x, y)
otloss.SinkhornDivergence(0.1, costt="euclidean")  # type: ignore[call-arg]
otloss.SinkhornLoss(0.1, method="dens")  # type: ignore[arg-type]
otloss.MinibatchEnergyDistance(0.1, objective="transported")  # type: ignore[arg-type]
otloss.EnergyDistance(method="dens")  # type: ignore[arg-type]
otloss.sinkhorn_divergence(x, y, 0.1, backward="envelop")  # type: ignore[arg-type]
otloss.solve_sample(x, y, "0.1")  # type: ignore[arg-type]
