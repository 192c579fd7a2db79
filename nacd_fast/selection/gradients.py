"""The gradient of every sample of a packed batch with respect to the adapters, from one backward pass.

A LoRA layer adds s (x A^T) B^T. Of one sample, whose rows of the batch are i, with g = s dy B and h = x A^T,

    dA = sum over i of g_i^T x_i        dB = s sum over i of dy_i^T h_i

so all that a sample needs are two small products of its own rows. Samples do not see each other in a packed batch, and
the loss of each is the mean over its own supervised tokens, as LESS has it.

B samples, P adapter parameters in the order of Student.flatten, R LoRA rank.
"""

from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from nacd_kernels import frozen_linear

from ..data import IGNORE, Packed
from ..forwards import ADAPTER, GATES, gated_mlp_forward, weight_of
from ..student import Student

Sinks = tuple[Tensor, Tensor, list[int]]  # room for dA [B, R, D_in] and dB [B, D_out, R], borders of the samples


class Recorded(torch.autograd.Function):
    """s (x A^T) B^T on rows x [T, D_in]; its backward writes every sample's dA [R, D_in] and dB [D_out, R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, sinks: Sinks) -> Tensor:
        wide = x.to(a.dtype)
        h = wide @ a.T
        ctx.save_for_backward(x, h, a, b)
        ctx.scale, ctx.sinks = scale, sinks
        return (h @ b.T).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        sink_a, sink_b, borders = ctx.sinks
        wide, dy = x.to(a.dtype), dy.to(a.dtype)
        g = (dy @ b).mul_(ctx.scale)
        for i, (start, stop) in enumerate(pairwise(borders)):
            rows = slice(start, stop)
            torch.mm(g[rows].T, wide[rows], out=sink_a[i])
            torch.mm(dy[rows].T, h[rows], out=sink_b[i])
        sink_b.mul_(ctx.scale)
        dx = (g @ a).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def recorded_forward(layer: Any, x: Tensor) -> Tensor:
    """A LoRA layer in place of forwards.lora_forward; `layer.sinks` is where its gradients go."""
    base, (a, b) = layer.base_layer, layer.factors
    low = Recorded.apply(x.flatten(0, -2), a, b, layer.scaling[ADAPTER], layer.sinks)
    return frozen_linear(x, weight_of(base), base.bias) + low.view(*x.shape[:-1], -1)


def separate_mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """A gated MLP whose layers are called, one by one, in place of forwards.gated_mlp_forward."""
    return mlp.down_proj(GATES[type(mlp.act_fn)](mlp.gate_proj(x), mlp.up_proj(x)))


class SampleGradients:
    """Takes a student over: its LoRA layers record gradients from now on, and its `loss` is for this class alone."""

    def __init__(self, student: Student):
        self.student = student
        for module in student.model.modules():
            if isinstance(module, LoraLinear):
                module.forward = MethodType(recorded_forward, module)
            elif getattr(module.forward, "__func__", None) is gated_mlp_forward:
                module.forward = MethodType(separate_mlp_forward, module)

    def __call__(self, theta: Tensor, batch: Packed, out: Tensor) -> Tensor:
        """Write the gradient of every sample of a packed batch without prompts to out [B, P], and return it.

        theta [P]: the adapters; out has their type.
        """
        student = self.student
        adapters = {name: t.detach().requires_grad_() for name, t in student.unflatten(theta).items()}
        places = dict(zip(adapters, out.split([t.numel() for t in adapters.values()], 1), strict=True))
        for name, layer in student.lora_layers.items():
            keys = [f"{name}.lora_{factor}.{ADAPTER}.weight" for factor in "AB"]
            sink_a, sink_b = (places[key].unflatten(1, adapters[key].shape) for key in keys)
            layer.sinks = sink_a, sink_b, batch.cu_seqlens
        loss = student.loss(adapters, None, batch)
        torch.autograd.grad(loss, list(adapters.values()), allow_unused=True)
        supervised = batch.targets != IGNORE
        tokens = torch.stack([part.sum() for part in supervised.split(sizes(batch))]).to(out.dtype)
        # the batch's loss is the mean over all its tokens; a sample's that over its own
        return out.mul_((tokens.sum() / tokens)[:, None])


def sizes(batch: Packed) -> list[int]:
    """Rows of every sample."""
    return [stop - start for start, stop in pairwise(batch.cu_seqlens)]
