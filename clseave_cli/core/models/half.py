"""A backbone in bfloat16 throughout, for training on a GPU with few and cheap kernels.

Autocast casts each weight where it is used, computes normalisations in float32, and casts their
results again for every matrix product: a fifth of a step on short sentences. In the block below all
weights are cast at once and activations stay in bfloat16, as in PyTorch FSDP's mixed precision.
Normalisations still compute in float32, and the optimiser updates the float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF = torch.bfloat16
#: Tables of at most so many vectors (positions, kinds of token) are read by a matrix product.
_SMALL_TABLE = 1024


@contextmanager
def in_half(backbone: nn.Module) -> Iterator[None]:
    """Within the block, a module computes with bfloat16 copies of its float32 weights.

    Their gradients reach the weights in float32, also when the backward pass comes after the block
    (but what gradient checkpointing computes again must come within it).
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
    # A forward that somebody else has put into a module stays.
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
    """All weights in bfloat16, and their gradients in float32: a few kernels each way."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=_HALF) for weight in weights]
        torch._foreach_copy_(copies, weights)
        frozen = [c for c, w in zip(copies, weights, strict=True) if not w.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        torch._foreach_copy_(wide, given)
        widened = iter(wide)
        return tuple(None if gradient is None else next(widened) for gradient in gradients)


class _Linear(torch.autograd.Function):
    """`functional.linear`, whose bias has its gradient from a matrix product.

    PyTorch sums over the tokens in a kernel that takes as long as the product for the weight's.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor, ones: Tensor) -> Tensor:
        ctx.save_for_backward(given, weight, ones)
        return functional.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, ones = ctx.saved_tensors
        (gradient,) = gradients
        flat = gradient.reshape(-1, gradient.shape[-1])
        needs_given, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            gradient @ weight if needs_given else None,
            flat.t() @ given.reshape(-1, given.shape[-1]) if needs_weight else None,
            (ones @ flat)[0] if needs_bias else None,
            None,
        )


def _linear(ones: dict[int, Tensor], module: nn.Linear, given: Tensor) -> Tensor:
    given = given.to(module.weight.dtype)
    if module.bias is None or not (torch.is_grad_enabled() and module.bias.requires_grad):
        return functional.linear(given, module.weight, module.bias)
    num_tokens = given.numel() // given.shape[-1]
    if num_tokens not in ones:
        ones[num_tokens] = given.new_ones(1, num_tokens)
    output: Tensor = _Linear.apply(given, module.weight, module.bias, ones[num_tokens])  # type: ignore[no-untyped-call]
    return output


def _layer_norm(module: nn.LayerNorm, given: Tensor) -> Tensor:
    with torch.autocast(given.device.type, enabled=False):
        return functional.layer_norm(
            given.to(_HALF), module.normalized_shape, module.weight, module.bias, module.eps
        )


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    """The rows of a table; few of them as a product with ones and zeros, to the bit the same.

    The gradient of a look-up is summed token by token, for positions 15 times slower.
    """
    if module.num_embeddings > _SMALL_TABLE or module.padding_idx is not None:
        return functional.embedding(ids, module.weight, module.padding_idx)
    chosen = ids[..., None] == torch.arange(module.num_embeddings, device=ids.device)
    return chosen.to(module.weight.dtype) @ module.weight
