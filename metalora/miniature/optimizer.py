"""What all the small models are trained with: Muon beside AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from metalora.miniature.training import TrainingConfig


class Muon:
    """Momentum whose steps for matrices have all their singular values near one, scaled to the size of AdamW's.

    Source: "Muon is scalable for LLM training" (Liu et al. 2025); the polynomial is Keller Jordan's. torch.optim.Muon computes
    the same in bfloat16; `orthogonal` takes two fifths of its time on a CPU.
    """

    COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

    def __init__(self, matrices: list[torch.Tensor], weight_decay: float, momentum: float = 0.95):
        self.matrices, self.weight_decay, self.momentum = matrices, weight_decay, momentum
        self.moments = [torch.zeros_like(matrix) for matrix in matrices]
        self.alike = [[k for k, each in enumerate(matrices) if each.shape == shape] for shape in dict.fromkeys(matrix.shape for matrix in matrices)]

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """Moves the matrices against their gradients (both (rows, columns)), with Nesterov's look ahead."""
        if self.matrices and self.matrices[0].is_cuda:
            self.step_together(gradients, learning_rate)
            return
        for matrix, moment, gradient in zip(self.matrices, self.moments, gradients, strict=True):
            moment.lerp_(gradient, 1 - self.momentum)
            step = self.orthogonal(gradient.lerp(moment, self.momentum))
            matrix.mul_(1 - learning_rate * self.weight_decay).sub_(step, alpha=0.2 * max(matrix.shape) ** 0.5 * learning_rate)

    @torch.no_grad()
    def step_together(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """The same, all matrices of a shape at once: a GPU is done with a small product before the next is given to it."""
        torch._foreach_lerp_(self.moments, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, self.moments, self.momentum)
        torch._foreach_mul_(self.matrices, 1 - learning_rate * self.weight_decay)
        for numbers in self.alike:
            steps = self.orthogonal(torch.stack([ahead[k] for k in numbers]))
            torch._foreach_add_([self.matrices[k] for k in numbers], steps.unbind(), alpha=-0.2 * max(steps.shape[1:]) ** 0.5 * learning_rate)

    @classmethod
    def orthogonal(cls, matrix: torch.Tensor) -> torch.Tensor:
        """U V' of the matrix U S V', roughly: singular values become 0.7 to 1.2. Also of several, (n, rows, columns).

        Newton and Schulz's iteration is X <- p(X X') X. Of a matrix at least twice as long as wide only the small square X X' is
        iterated, along with the product of all p.
        """
        rows, columns = matrix.shape[-2:]
        if rows > columns:
            return cls.orthogonal(matrix.mT).mT
        a, b, c = cls.COEFFICIENTS
        several = matrix.ndim == 3
        times, plus_times = (torch.bmm, torch.baddbmm) if several else (torch.mm, torch.addmm)
        x = matrix / (matrix.norm(dim=(1, 2), keepdim=True) if several else matrix.norm()).clamp(min=1e-7)
        gram, whole = times(x, x.mT), None
        for _ in range(cls.ITERATIONS):
            p = plus_times(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            if columns < 2 * rows:
                x = times(p, x)
                gram = times(x, x.mT)
            else:
                whole, gram = p if whole is None else times(p, whole), times(times(p, gram), p)
        return x if whole is None else times(whole, x)


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) or (out, in, h, w), or its gradient, as (out, all else) in the order of its memory, which the two share."""
    kernel = kernel.detach()
    if kernel.ndim == 4 and not kernel.is_contiguous():  # channels last; a flattened copy would be trained in the kernel's stead
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.view(len(kernel), -1)


class Optimizer:
    """Muon for the matrices of linear and convolutional layers, AdamW for all else: embeddings, norms, biases.

    One learning rate serves both.
    Measured on the transformer: as good after 400 steps as AdamW after 700.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig):
        layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        kernels = {layer.weight for layer in layers if layer.weight.requires_grad and min(layer.weight.flatten(1).shape) >= 16}
        self.kernels = [p for p in module.parameters() if p in kernels]
        others = [p for p in module.parameters() if p.requires_grad and p not in kernels]
        groups = [{"params": [p for p in others if p.ndim > 1]}, {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True,
                                       weight_decay=config.weight_decay)
        self.muon = Muon([as_matrix(kernel) for kernel in self.kernels], config.weight_decay)

    def step(self, learning_rate: float) -> None:
        """Updates from the gradients and clears them."""
        self.muon.step([as_matrix(kernel.grad) for kernel in self.kernels], learning_rate)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        for kernel in self.kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for moment, saved in zip(self.muon.moments, state["muon"], strict=True):
            moment.copy_(saved)
