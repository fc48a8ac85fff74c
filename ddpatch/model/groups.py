"""Groups of patches: what is not kept for all patches at once is computed group by group, and again in the backward pass, or
differentiated at once.

A model that keeps the features of every patch until the backward pass needs memory for the whole field at the width of the
network. Here the features of one group live at a time; what passes between groups, tokens and predictions, is as small as the
field. Chen, Xu, Zhang, Guestrin, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpatch.model.ferry import Ferry


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


def group_by_group(
    function: Callable[..., Tensor],
    groups: Sequence[Sequence[Any]],
    parameters: Iterable[Tensor],
    order: Iterable[int] | None = None,
    home: torch.device | None = None,
) -> Tensor:
    """The results of all groups, side by side; gradients are those of one call for all patches.

    Groups are computed where the parameters are. With several groups nothing that ``function`` makes on the way to its result is
    kept: the backward pass calls it again, for one group after the other, the last one first.

    Arguments:
        function: From the members of a group to ``[sample, patch of the group, ...]``, the same numbers whenever it is called.
            It must not communicate, for ranks have different numbers of groups.
        groups: One or more; the tensors among their members may need gradients. The first has shape ``[sample, patch, ...]``.
        parameters: What ``function`` depends on besides, and more.
        order: Numbers of the groups as they are to be computed, if there are several. Default: one after the other.
        home: Where the result belongs; it may be elsewhere where no gradients are wanted (:class:`Ferry`). Default: there too.

    Returns:
        Shape ``[sample, patch, ...]``.
    """
    order, shared = range(len(groups)) if order is None else order, list(parameters)
    ferry = Ferry(shared[0].device, home or shared[0].device)
    if len(groups) == 1:
        return function(*ferry.take(groups[0])).to(ferry.home)
    if not torch.is_grad_enabled():
        return _fill(function, groups, order, ferry)
    found = {i: _Recomputed.apply(function, len(groups[i]), *groups[i], *shared) for i in order}
    return torch.cat([found[i] for i in range(len(groups))], dim=1)


class _Differentiated(torch.autograd.Function):
    """Forward: the sum of the numbers of all groups, and its gradients at once. Backward: these, times what comes in."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], members: Sequence[int], *inputs: Any) -> Tensor:
        flat = iter(inputs)
        groups, parameters = [[next(flat) for _ in range(count)] for count in members], list(flat)
        needed = {id(x) for x, needs in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needs}
        ctx.keys, ctx.found, numbers = [id(x) for x in inputs], {}, []
        for group in groups:
            leaves = {id(x): x.detach().requires_grad_() for x in group if id(x) in needed}
            with torch.enable_grad():
                number = function(*(leaves.get(id(x), x) for x in group))
            wanted = leaves | {id(p): p for p in parameters if id(p) in needed}
            for key, grad in zip(wanted, torch.autograd.grad(number, list(wanted.values()), allow_unused=True), strict=True):
                if grad is not None:
                    ctx.found[key] = ctx.found[key] + grad if key in ctx.found else grad
            numbers.append(number.detach())
        return torch.stack(numbers).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = {key: grad * grads[0] for key, grad in ctx.found.items()}
        return None, None, *(found.pop(key, None) for key in ctx.keys)  # once for what is a member of several groups


class Objective(NamedTuple):
    """A number that is a sum over patches, such as a loss.

    Attributes:
        number: From a result on some patches, with shape ``[sample, patch, ...]``, and the fields there, to their share.
        fields: Shapes ``[sample, patch, ...]``, on all own patches.
    """

    number: Callable[..., Tensor]
    fields: Sequence[Tensor]


def sum_of_groups(
    function: Callable[..., Tensor], groups: Sequence[Sequence[Any]], parameters: Iterable[Tensor], objective: Objective
) -> Tensor:
    """An objective of the results of all groups; gradients are those of one call for all patches.

    Since a sum hands every group the same gradient, those of a group are computed right after its number, while its features
    are there, and wait for the backward pass: with several groups the function is called once for each.

    Arguments:
        function, groups, parameters: As in :func:`group_by_group`.
        objective: Of the results; its fields are split as the groups are.
    """
    fields = zip(*(field.split(_sizes(groups), dim=1) for field in objective.fields), strict=True)
    parts, known = [[*group, *own] for group, own in zip(groups, fields, strict=True)], len(groups[0])

    def number(*members: Any) -> Tensor:
        return objective.number(function(*members[:known]), *members[known:])

    if len(groups) == 1:
        return number(*parts[0])
    if not torch.is_grad_enabled():
        return torch.stack([number(*part) for part in parts]).sum()
    return _Differentiated.apply(number, [len(part) for part in parts], *(x for part in parts for x in part), *parameters)


def _fill(function: Callable[..., Tensor], groups: Sequence[Sequence[Any]], order: Iterable[int], ferry: Ferry) -> Tensor:
    """The results of all groups in one tensor, beside which those of one group live: no second copy of what is like the field."""
    sizes, filled, land = _sizes(groups), None, None
    for i in order:
        result = function(*ferry.take(groups[i]))
        if land is None:
            filled = torch.empty(len(result), sum(sizes), *result.shape[2:], dtype=result.dtype, device=ferry.home)
            places = filled.split(sizes, dim=1)
        else:
            land()  # what the device made of the group before, while it computes this one
        land = ferry.bring(result, places[i])
    assert filled is not None and land is not None
    land()
    return filled


def _sizes(groups: Sequence[Sequence[Any]]) -> list[int]:
    """Patches of every group."""
    return [next(x.shape[1] for x in group if isinstance(x, Tensor)) for group in groups]
