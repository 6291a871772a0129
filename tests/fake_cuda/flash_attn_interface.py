"""Stands for FlashAttention-3 where only shapes and types are computed; takes what that takes, no more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

RECEIVED: list[tuple[torch.dtype, ...]] = []  # types of q, k and v at each call


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What the real kernels refuse."""
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"FlashAttention-3 takes q, k and v in bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if any(x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:-1]) for x in (q, k, v)):
        raise ValueError(
            "FlashAttention-3 takes heads without gaps that begin at multiples of 16 bytes"
        )
    batch, length, heads, dim = q.shape
    if (
        k.shape != v.shape
        or k.shape[:2] != (batch, length)
        or k.size(3) != dim
        or heads % k.size(2)
    ):
        raise ValueError(
            f"FlashAttention-3 cannot pair {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if dim % 8 or dim > 256:
        raise ValueError(f"FlashAttention-3 takes no heads of {dim}")


@torch.library.custom_op("stand_in::flash_forward", mutates_args=())
def flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no numbers here")


@torch.library.custom_op("stand_in::flash_backward", mutates_args=())
def flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("no numbers here")


@flash_forward.register_fake
def _(q, k, v):
    check(q, k, v)
    RECEIVED.append((q.dtype, k.dtype, v.dtype))
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


@flash_backward.register_fake
def _(gradient, q, k, v, out, row_sums):
    check(q, k, v)
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, gradient, _):
    return flash_backward(gradient, *ctx.saved_tensors)


flash_forward.register_autograd(backward, setup_context=keep)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    if not causal:
        raise ValueError("a language model must not look ahead")
    return flash_forward(q, k, v)


def causal_flops(q_shape, products: int) -> int:
    """Each product is over half of the length x length pairs."""
    batch, length, heads, dim = q_shape
    return products * batch * heads * length * length * dim


register_flop_formula(torch.ops.stand_in.flash_forward)(lambda q, *_, **__: causal_flops(q, 2))
register_flop_formula(torch.ops.stand_in.flash_backward)(
    lambda gradient, *_, **__: causal_flops(gradient, 5)
)
