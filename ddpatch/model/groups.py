"""Groups of patches: what is not kept for all patches at once is computed group by group, and again in the backward pass.

A model that keeps the features of every patch until the backward pass needs memory for the whole field at the width of the
network. Here the features of one group live at a time; what passes between groups, tokens and predictions, is as small as the
field. Chen, Xu, Zhang, Guestrin, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Group = TypeVar("Group")


def group_by_group(function: Callable[[Group], Tensor], groups: Sequence[Group]) -> Tensor:
    """The results of all groups, side by side; gradients are those of one call for all patches.

    With several groups nothing that ``function`` makes on the way to its result is kept: the backward pass calls it again, for
    one group after the other, the last one first.

    Arguments:
        function: From a group to ``[sample, patch of the group, ...]``, the same numbers whenever it is called. It must not
            communicate, for ranks have different numbers of groups.
        groups: One or more.

    Returns:
        Shape ``[sample, patch, ...]``.
    """
    if len(groups) == 1:
        return function(groups[0])
    return torch.cat([checkpoint(function, group, use_reentrant=False) for group in groups], dim=1)
