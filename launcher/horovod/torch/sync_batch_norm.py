"""Batch normalization over the batches of all ranks."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.horovod.torch.autograd import run
from launcher.horovod.torch.basics import size
from launcher.horovod.torch.process_sets import global_process_set
from launcher.horovod.torch.requests import Sum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class SyncBatchNorm(_BatchNorm):  # type: ignore[misc]
    """As torch's BatchNorm, of N x C x ... input; mean and variance are those of all ranks' batches together.

    Ranks may have batches of different sizes. On CPUs as well as on GPUs. In evaluation mode it is a BatchNorm.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: found an input of {input.dim()} dimensions; expected N x C or more")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes ``input``; in training all ranks must call it."""
        self._check_input_dim(input)
        if size() == 1 or not (self.training or not self.track_running_stats):
            return super().forward(input)
        momentum = self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        keep = self.training and self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if keep else (None, None)
        return _Normalize.apply(input, self.weight, self.bias, mean, var, self.eps, momentum or 0.0)


class _Normalize(torch.autograd.Function):  # type: ignore[misc]
    """Statistics in float32 at least; ranks' means and variances are combined pairwise exact (Chan et al., 1979)."""

    @staticmethod
    def forward(
        ctx: Any, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float, momentum: float
    ) -> Any:
        values = input if input.dtype == torch.float64 else input.float()
        others = [dimension for dimension in range(input.dim()) if dimension != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() // input.shape[1]
        if count:
            var, mean = torch.var_mean(values, dim=others, unbiased=False)
        else:
            var = mean = values.new_zeros(input.shape[1])
        own = torch.cat([mean, var, mean.new_tensor([count])]).unsqueeze(0)
        (everybody,) = run("allgather", [own], global_process_set, None)
        channels = input.shape[1]
        means, variances, counts = everybody[:, :channels], everybody[:, channels:-1], everybody[:, -1:]
        total = counts.sum()
        if total <= 1:
            raise ValueError("SyncBatchNorm: expected more than one value a channel over all ranks when training")
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(momentum * mean)
            running_var.mul_(1 - momentum).add_(momentum * var * (total / (total - 1)))
        inverse = torch.rsqrt(var + eps)
        normal = (values - mean.view(shape)) * inverse.view(shape)
        ctx.save_for_backward(normal, weight, inverse, total)
        ctx.others, ctx.shape = others, shape
        if weight is not None:
            return (normal * weight.view(shape) + bias.view(shape)).to(input.dtype)
        return normal.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        normal, weight, inverse, total = ctx.saved_tensors
        values = gradient.to(normal.dtype)
        sums = torch.stack([values.sum(ctx.others), (values * normal).sum(ctx.others)])
        # The gradients of weight and bias are this rank's: the optimizer reduces them, like all others.
        weight_gradient = sums[1].to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        bias_gradient = sums[0].to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None
        input_gradient = None
        if ctx.needs_input_grad[0]:
            (reduced,) = run("allreduce", [sums], global_process_set, None, op=Sum)
            along, across = (reduced / total).unbind()
            scale = inverse if weight is None else inverse * weight
            input_gradient = values - along.view(ctx.shape) - normal * across.view(ctx.shape)
            input_gradient = (input_gradient * scale.view(ctx.shape)).to(gradient.dtype)
        return input_gradient, weight_gradient, bias_gradient, None, None, None, None
