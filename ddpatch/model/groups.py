"""Groups of patches: what is not kept for all patches at once is computed group by group, and again in the backward pass.

A model that keeps the features of every patch until the backward pass needs memory for the whole field at the width of the
network. Here the features of one group live at a time; what passes between groups, tokens and predictions, is as small as the
field. Chen, Xu, Zhang, Guestrin, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    """Forward: the result, without a graph. Backward: the result again, with a graph of its own, and the gradients through it.

    One node for all of it, unlike ``torch.utils.checkpoint``: there the small objects of a graph come to lie between large
    temporary ones, and memory that one group has freed is too scattered for the next.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], members: int, *inputs: Any) -> Tensor:
        ctx.function, ctx.members, ctx.inputs = function, members, inputs
        return function(*inputs[:members])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, parameters = ctx.inputs[: ctx.members], ctx.inputs[ctx.members :]
        leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in group]
        with torch.enable_grad():
            result = ctx.function(*leaves)
        needed = ctx.needs_input_grad[2:]
        wanted = [x for x, needs in zip([*leaves, *parameters], needed, strict=True) if needs]
        found = iter(torch.autograd.grad(result, wanted, grads, allow_unused=True))
        return None, None, *(next(found) if needs else None for needs in needed)


def group_by_group(function: Callable[..., Tensor], groups: Sequence[Sequence[Any]], parameters: Iterable[Tensor]) -> Tensor:
    """The results of all groups, side by side; gradients are those of one call for all patches.

    With several groups nothing that ``function`` makes on the way to its result is kept: the backward pass calls it again, for
    one group after the other, the last one first.

    Arguments:
        function: From the members of a group to ``[sample, patch of the group, ...]``, the same numbers whenever it is called.
            It must not communicate, for ranks have different numbers of groups.
        groups: One or more; the tensors among their members may need gradients. The first has shape ``[sample, patch, ...]``.
        parameters: What ``function`` depends on besides, and more.

    Returns:
        Shape ``[sample, patch, ...]``.
    """
    if len(groups) == 1:
        return function(*groups[0])
    if not torch.is_grad_enabled():
        return _fill(function, groups)
    shared = list(parameters)
    return torch.cat([_Recomputed.apply(function, len(group), *group, *shared) for group in groups], dim=1)


def _fill(function: Callable[..., Tensor], groups: Sequence[Sequence[Any]]) -> Tensor:
    """The results of all groups in one tensor, beside which those of one group live: no second copy of what is like the field."""
    sizes = [next(x.shape[1] for x in group if isinstance(x, Tensor)) for group in groups]
    first = function(*groups[0])
    filled = first.new_empty(len(first), sum(sizes), *first.shape[2:])
    for i, part in enumerate(filled.split(sizes, dim=1)):
        part.copy_(function(*groups[i]) if i else first)
    return filled
