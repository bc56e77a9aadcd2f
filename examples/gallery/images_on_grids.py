"""
Images as measures
==================

Between densities on a regular grid the cost is a sum over the axes, and so are the steps of the
solver: no matrix of all pairs of pixels is made. The result tells where mass goes, and the average
of two images is one whose mass is halfway.
"""

import matplotlib.pyplot as plt
import torch

import otloss

SIZE = 96
y, x = torch.meshgrid(*(2 * [torch.linspace(-1, 1, SIZE)]), indexing="ij")
ring = torch.exp(-(((x.hypot(y) - 0.6) / 0.08) ** 2))
blobs = sum(torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.02) for u, v in ((-0.5, 0.4), (0.4, -0.5)))
a, b = (image / image.sum() for image in (ring, blobs))

# %%
# The displacement field from one image to the other, in pixels.

eps = 2 * 1.5**2  # a blur of a pixel and a half
result = otloss.solve_grid(a[None], b[None], eps, max_iters=5000)
pixel = torch.stack(torch.meshgrid(*(2 * [torch.arange(SIZE)]), indexing="ij"), -1)
flow = result.barycentric_map()[0] - pixel
figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.6), layout="constrained")
axes[0].set_title("from")
axes[0].imshow(a.numpy(), cmap="Blues")
axes[1].imshow(a.numpy(), cmap="Blues")
shown = torch.zeros(SIZE, SIZE, dtype=torch.bool)
shown[4::8, 4::8] = a[4::8, 4::8] > 0.1 * a.max()
(rows, columns), (down, right) = pixel[shown].T, flow[shown].T
axes[1].quiver(columns, rows, right, down, angles="xy", scale_units="xy", scale=1, color="tab:red")
axes[1].set_title("moves along")
# sphinx_gallery_defer_figures

# %%
# Halfway is a density, not the two images on top of each other.

halfway = otloss.barycenter_grid(torch.stack([a, b]), torch.tensor([0.5, 0.5]), eps)
axes[2].imshow(halfway.numpy(), cmap="Blues")
axes[2].set_title("halfway")
axes[3].imshow(b.numpy(), cmap="Blues")
axes[3].set_title("to")
for panel in axes:
    panel.set(xticks=[], yticks=[])
plt.show()

# %%
# As a loss it has a gradient in the pixels.

pixels = a[None].clone().requires_grad_()
loss = otloss.sinkhorn_divergence_grid(pixels, b[None], eps, max_iters=5000)
loss.sum().backward()
print(f"divergence {loss.item():.1f} squared pixels, gradient {tuple(pixels.grad.shape)}")
