"""Inner optimisers of the unroll, and the vector-Jacobian product of one of their steps.

An update is elementwise on flat vectors theta [P], so its own derivative costs next to nothing beside a gradient.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """An inner optimiser: elementwise on flat vectors, in plain differentiable torch operations."""

    affine_in_grad: bool
    """True if `step` is affine in `grad`: then the gradients need not be kept."""

    def init(self, theta: Tensor) -> tuple[Tensor, ...]:
        """The state before the first step; theta [P]."""

    def step(
        self, theta: Tensor, state: tuple[Tensor, ...], grad: Tensor, lr: Tensor, n: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """theta and state after step n (counted from 0)."""


class SGD:
    """theta - lr (g + weight_decay theta), with heavy-ball or Nesterov momentum as in torch.optim.SGD."""

    affine_in_grad = True

    def __init__(self, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False):
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov

    def init(self, theta: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(theta),) if self.momentum else ()

    def step(
        self, theta: Tensor, state: tuple[Tensor, ...], grad: Tensor, lr: Tensor, n: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.weight_decay:
            grad = grad + self.weight_decay * theta
        if self.momentum:
            (buffer,) = state
            buffer = self.momentum * buffer + grad
            state = (buffer,)
            grad = grad + self.momentum * buffer if self.nesterov else buffer
        return theta - lr * grad, state


class AdamW:
    """Adam with decoupled weight decay as in torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    affine_in_grad = False

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def init(self, theta: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def step(
        self, theta: Tensor, state: tuple[Tensor, ...], grad: Tensor, lr: Tensor, n: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        beta1, beta2 = self.betas
        m = beta1 * state[0] + (1 - beta1) * grad
        v = beta2 * state[1] + (1 - beta2) * grad * grad
        # where v = 0 so is g: the root's infinite slope there meets a zero, and their product is 0, not NaN
        root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
        direction = (m / (1 - beta1 ** (n + 1))) / (root / (1 - beta2 ** (n + 1)) ** 0.5 + self.eps)
        return theta * (1 - lr * self.weight_decay) - lr * direction, (m, v)


class Pulled(NamedTuple):
    """Cotangents of what an update step reads."""

    theta: Tensor
    grad: Tensor
    lr: Tensor
    state: tuple[Tensor, ...]


def pull_back(
    update: Update,
    n: int,
    theta: Tensor,
    state: tuple[Tensor, ...],
    grad: Tensor,
    lr: Tensor,
    v: Tensor,
    d_state: tuple[Tensor, ...],
) -> Pulled:
    """The vector-Jacobian product of one elementwise update step, by autograd."""
    with torch.enable_grad():
        read = [t.detach().requires_grad_() for t in (theta, grad, lr, *state)]
        new_theta, new_state = update.step(read[0], tuple(read[3:]), read[1], read[2], n)
        theta_c, grad_c, lr_c, *state_c = torch.autograd.grad(
            (new_theta, *new_state), read, (v, *d_state), materialize_grads=True
        )
    return Pulled(theta_c, grad_c, lr_c, tuple(state_c))
