"""Stands for FlashAttention-3 where only shapes and types are computed.

It takes what that takes, and refuses what that refuses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Types of q, k and v at each call.
RECEIVED: list[tuple[torch.dtype, ...]] = []


def check_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    """TypeError unless all are of one type, which has 16 bits."""
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"FlashAttention-3 takes q, k and v in bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
        )


def check_strides(x: Tensor) -> None:
    """ValueError unless heads have no gaps and begin where 16 bytes do."""
    *outer, innermost = x.stride()
    if innermost != 1 or any(stride % 8 for stride in outer):
        raise ValueError(
            "FlashAttention-3 takes heads without gaps that begin at multiples of 16 bytes"
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless keys serve queries evenly, in heads of a size that has a kernel."""
    batch, length, heads, dim = q.shape
    kv_heads = k.size(2)
    if k.shape != v.shape or k.shape != (batch, length, kv_heads, dim) or heads % kv_heads:
        raise ValueError(
            f"FlashAttention-3 cannot pair {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if dim % 8 or dim > 256:
        raise ValueError(f"FlashAttention-3 takes no heads of {dim}")


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise an error for what the real kernels refuse."""
    check_types(q, k, v)
    for x in (q, k, v):
        check_strides(x)
    check_shapes(q, k, v)


@torch.library.custom_op("stand_in::flash_forward", mutates_args=())
def flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of each row's sum."""
    raise NotImplementedError("no numbers here")


@torch.library.custom_op("stand_in::flash_backward", mutates_args=())
def flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
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
    """Keep for the backward pass what that needs."""
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, gradient, _):
    """The gradients of q, k and v from that of the output."""
    return flash_backward(gradient, *ctx.saved_tensors)


flash_forward.register_autograd(backward, setup_context=keep)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """What the package's function gives."""
    if not causal:
        raise ValueError("a language model must not look ahead")
    return flash_forward(q, k, v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the package's function for sequences of several lengths, end to end, gives.

    Here they count as sequences of the greatest length.
    """
    for ends, longest, x in ((ends_q, longest_q, q), (ends_k, longest_k, k)):
        if ends.dtype != torch.int32 or ends.dim() != 1 or ends.device != x.device:
            raise TypeError(f"FlashAttention-3 takes ends in int32, not {ends.dtype}")
        if x.dim() != 3 or not isinstance(longest, int):
            raise ValueError(f"FlashAttention-3 takes sequences end to end, not {x.shape}")
    rows = [x.unflatten(0, (-1, longest_q)) for x in (q, k, v)]
    out, row_sums = flash_attn_func(*rows, causal=causal)
    return out.flatten(0, 1), row_sums


def causal_flops(q_shape, products: int) -> int:
    """Operations of products that each are over half of the length x length pairs."""
    batch, length, heads, dim = q_shape
    return products * batch * heads * length * length * dim


@register_flop_formula(torch.ops.stand_in.flash_forward)
def forward_flops(q_shape, *_, **__) -> int:
    """Operations of the forward pass."""
    return causal_flops(q_shape, products=2)


@register_flop_formula(torch.ops.stand_in.flash_backward)
def backward_flops(gradient_shape, *_, **__) -> int:
    """Operations of the backward pass."""
    return causal_flops(gradient_shape, products=5)
