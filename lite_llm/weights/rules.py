"""From checkpoint names to model parameters: a table per model, one engine for all."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lite_llm.errors import BadCheckpoint

Target = str | tuple[str, Callable[[Tensor], dict[str, Tensor]]] | None
Rules = dict[str, Target]
"""Pattern -> target. `{i}`-style names match one dotted component of the checkpoint name, or part of one.

A target is `module[part].tensor`; None skips the tensor; a pair (target, cut) stores each of
`cut(tensor)`'s named pieces, with the name as `{part}`.
"""


def fill(param: Tensor, tensor: Tensor) -> int:
    """Copy `tensor` into `param`, converting its dtype; returns the number of elements written."""
    if param.shape != tensor.shape:
        raise BadCheckpoint(f"the checkpoint has shape {tuple(tensor.shape)}, the model needs {tuple(param.shape)}")
    param.copy_(tensor)
    return param.numel()


@torch.no_grad()
def load(model: nn.Module, rules: Rules, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Stream a checkpoint into a model, and prove that every tensor was used and every element filled once."""
    raise NotImplementedError
