"""A backbone in bfloat16 throughout, for training on a GPU with few and cheap kernels.

Autocast casts each weight where it is used, computes normalisations in float32, and casts their
results for every matrix product: a fifth of a step on short sentences. Here all weights are cast at
once and activations stay in bfloat16, as in PyTorch FSDP's mixed precision. The normalisation
kernels accumulate in float32, and the optimiser updates the float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Embedding tables up to this size (positions, token types) are read by a matrix product.
_SMALL_TABLE = 1024


@contextmanager
def in_bfloat16(backbone: nn.Module) -> Iterator[None]:
    """Within the block, a module computes with bfloat16 copies of its float32 weights.

    Gradients reach the weights in float32, even after the block; only gradient checkpointing must
    recompute within it.
    """
    slots = [
        (module, name, weight)
        for module in backbone.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dtype == torch.float32
    ]
    weights = list({id(weight): weight for *_, weight in slots}.values())
    copies = dict(zip(map(id, weights), _Cast.apply(*weights), strict=True))  # type: ignore[no-untyped-call]
    ones: dict[int, Tensor] = {}
    forwards: dict[type[nn.Module], Callable[..., Tensor]] = {
        nn.Linear: partial(_linear, ones),
        nn.LayerNorm: _layer_norm,
        nn.Embedding: _embedding,
    }
    # A forward that other code has replaced is left alone.
    replaced = [
        module
        for module in backbone.modules()
        if type(module) in forwards and "forward" not in vars(module)
    ]
    try:
        for module, name, weight in slots:
            module._parameters[name] = copies[id(weight)]
        for module in replaced:
            module.forward = partial(forwards[type(module)], module)
        yield
    finally:
        for module, name, weight in slots:
            module._parameters[name] = weight
        for module in replaced:
            del module.forward


class _Cast(torch.autograd.Function):
    """Casts all weights to bfloat16 and their gradients to float32, in a few kernels each way."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(copies, weights)
        frozen = [c for c, w in zip(copies, weights, strict=True) if not w.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        narrow = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in narrow]
        torch._foreach_copy_(wide, narrow)
        remaining = iter(wide)
        return tuple(None if gradient is None else next(remaining) for gradient in gradients)


class _Linear(torch.autograd.Function):
    """`functional.linear` with the bias's gradient from a matrix product.

    PyTorch's kernel that sums it over the tokens takes as long as the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, ones: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, ones)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, ones = ctx.saved_tensors
        (gradient,) = gradients
        flat = gradient.reshape(-1, gradient.shape[-1])
        needs_inputs, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            gradient @ weight if needs_inputs else None,
            flat.t() @ inputs.reshape(-1, inputs.shape[-1]) if needs_weight else None,
            (ones @ flat)[0] if needs_bias else None,
            None,
        )


def _linear(ones: dict[int, Tensor], module: nn.Linear, inputs: Tensor) -> Tensor:
    inputs = inputs.to(module.weight.dtype)
    if module.bias is None or not (torch.is_grad_enabled() and module.bias.requires_grad):
        return functional.linear(inputs, module.weight, module.bias)
    num_tokens = inputs.numel() // inputs.shape[-1]
    if num_tokens not in ones:
        ones[num_tokens] = inputs.new_ones(1, num_tokens)
    output: Tensor = _Linear.apply(inputs, module.weight, module.bias, ones[num_tokens])  # type: ignore[no-untyped-call]
    return output


def _layer_norm(module: nn.LayerNorm, inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return functional.layer_norm(
            inputs.to(torch.bfloat16),
            module.normalized_shape,
            module.weight,
            module.bias,
            module.eps,
        )


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    """Rows of a table; of a small one as a product with zeros and ones, to the same bits.

    The gradient of a look-up is summed token by token: 15 times slower for positions.
    """
    if module.num_embeddings > _SMALL_TABLE or module.padding_idx is not None:
        return functional.embedding(ids, module.weight, module.padding_idx)
    one_hot = ids[..., None] == torch.arange(module.num_embeddings, device=ids.device)
    return one_hot.to(module.weight.dtype) @ module.weight
