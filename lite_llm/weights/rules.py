"""From checkpoint names to model parameters: a table per model, one engine for all.

The engine proves that a checkpoint and a model are the same thing: every tensor has a place, and every element of every
parameter is filled exactly once. Meta tensors and a meta model make it a proof about shapes that reads no data.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lite_llm.errors import BadCheckpoint

Target = str | tuple[str, Callable[[Tensor], dict[str, Tensor]]] | None
Rules = dict[str, Target]
"""Pattern -> target. `{i}`-style names match one dotted component of the checkpoint name, or part of one.

A target is `module[part].tensor`; None skips the tensor; a pair (target, cut) stores each of
`cut(tensor)`'s named pieces, with the name as `{part}`.
"""

_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # convertible without scales


@runtime_checkable
class Fused(Protocol):
    """A layer whose parameters hold several checkpoint tensors side by side."""

    parts: dict[str, int]


@dataclass(frozen=True)
class Piece:
    """A tensor on its way to `part` of the parameter `leaf` of the module at `path`."""

    path: str
    part: str
    leaf: str
    tensor: Tensor

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.leaf}"

    def __str__(self) -> str:
        return f"{self.path}[{self.part}].{self.leaf}" if self.part else self.parameter


def fill(param: Tensor, tensor: Tensor) -> int:
    """Copy `tensor` into `param`, converting its dtype; returns the number of elements written."""
    if param.shape != tensor.shape:
        raise BadCheckpoint(f"the checkpoint has shape {tuple(tensor.shape)}, the model needs {tuple(param.shape)}")
    param.copy_(tensor)
    return param.numel()


@torch.no_grad()
def load(
    model: nn.Module, rules: Rules, tensors: Iterable[tuple[str, Tensor]], *, allow_nonfinite: bool = False
) -> None:
    """Stream a checkpoint into a model, and prove that every tensor was used and every element filled once.

    BadCheckpoint names the first tensor that has no place, comes twice, has another shape, or holds NaN, Inf or values
    beyond the model's dtype; or the tensors that never came. Of tied parameters any one may come; if several come
    they must be equal.
    """
    filling = Filling(model, rules, allow_nonfinite)
    for name, tensor in tensors:
        for piece in place(name, tensor, rules):
            filling.add(name, piece)
    filling.finish()


def place(name: str, tensor: Tensor, rules: Rules) -> list[Piece]:
    """Where a checkpoint tensor goes; nowhere if its rule is None. BadCheckpoint if it has no rule."""
    for pattern, target in rules.items():
        if match := _compile(pattern).fullmatch(name):
            if target is None:
                return []
            target, cut = target if isinstance(target, tuple) else (target, lambda whole: {"": whole})
            pieces = cut(tensor).items()
            return [Piece(*_split(target.format(**match.groupdict(), part=part)), piece) for part, piece in pieces]
    raise BadCheckpoint(f"no rule for checkpoint tensor {name!r}; add one to the model's RULES (None skips it)")


class Filling:
    """Which tensors have come and how much of each parameter they filled. Tied parameters count as one."""

    def __init__(self, model: nn.Module, rules: Rules, allow_nonfinite: bool = False):
        self.model, self.rules, self.allow_nonfinite = model, rules, allow_nonfinite
        named = {id(param): name for name, param in model.named_parameters()}
        self.canonical = {name: named[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
        self.came: dict[tuple[str, str], tuple[str, str]] = {}  # parameter, part -> piece, checkpoint tensor
        self.filled = dict.fromkeys(named.values(), 0)

    def add(self, name: str, piece: Piece) -> None:
        if piece.parameter not in self.canonical:
            raise BadCheckpoint(f"{name}: the model that config.json describes has no parameter {piece.parameter}")
        param, owner = self.model.get_parameter(piece.parameter), self.canonical[piece.parameter]
        if piece.tensor.dtype not in (_FLOATS if param.dtype in _FLOATS else {param.dtype}):
            raise BadCheckpoint(
                f"{name} -> {piece}: stored as {_short(piece.tensor.dtype)}; needed: {_short(param.dtype)}"
            )
        if not self.allow_nonfinite:
            _require_finite(name, piece.tensor, param.dtype)
        if first := self.came.get((owner, piece.part)):
            return self._compare(name, piece, param, *first)
        self.came[owner, piece.part] = str(piece), name
        try:
            self.filled[owner] += self.model.get_submodule(piece.path).load(piece.leaf, piece.tensor, piece.part)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{name} -> {piece}: {error}") from None
        except KeyError:  # a fused layer looks its parts up by name
            raise BadCheckpoint(f"{name} -> {piece}: {piece.path} has no part {piece.part!r}") from None

    def _compare(self, name: str, piece: Piece, param: Tensor, target: str, other: str) -> None:
        """A second tensor for what `other` has filled: right if they are tied and equal."""
        if target == str(piece):
            raise BadCheckpoint(f"{name} -> {piece}: {other} is stored there already")
        tensor = piece.tensor
        if param.shape != tensor.shape:
            raise BadCheckpoint(
                f"{name}: shape {tuple(tensor.shape)}, but {other}, tied to it, has {tuple(param.shape)}"
            )
        if not (param.is_meta or tensor.is_meta) and not torch.equal(param, tensor.to(param)):
            raise BadCheckpoint(
                f"{name} and {other} differ, but config.json ties them (tie_word_embeddings)",
                "one of the two is wrong; set tie_word_embeddings to false if both are meant",
            )

    def finish(self) -> None:
        missing = []
        for name, param in self.model.named_parameters():
            path, _, leaf = _split(name)
            module = self.model.get_submodule(path)
            for part in module.parts if isinstance(module, Fused) else [""]:
                if (name, part) not in self.came:
                    missing.append(_checkpoint_name(Piece(path, part, leaf, param), self.rules))
        if missing:
            raise BadCheckpoint(f"the checkpoint lacks {len(missing)} tensors of the model: {_some(missing)}")
        for name, param in self.model.named_parameters():
            if self.filled[name] != param.numel():
                raise BadCheckpoint(f"{name}: {self.filled[name]} of {param.numel()} elements filled")


def _require_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.is_meta or not tensor.is_floating_point() or not dtype.is_floating_point or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # one pass, no temporary; both are NaN if any element is
    limit = torch.finfo(dtype).max
    if not (-limit <= low.item() and high.item() <= limit):
        bad = tensor.numel() - int((tensor.float().abs() <= limit).sum())
        raise BadCheckpoint(
            f"{name}: {bad} of {tensor.numel()} elements are NaN, infinite or beyond {_short(dtype)}",
            "the file is damaged, or the model was trained in a dtype with a wider range",
        )


def _compile(pattern: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^.]+?)", re.escape(pattern)))


def _split(target: str) -> tuple[str, str, str]:
    return re.fullmatch(r"(.+?)(?:\[(\w*)\])?\.(\w+)", target).groups("")


def _checkpoint_name(piece: Piece, rules: Rules) -> str:
    """The checkpoint tensor that would fill a piece, by the rules read backwards; else the piece itself."""
    for pattern, target in rules.items():
        target, whole = (target[0], False) if isinstance(target, tuple) else (target, True)
        match = target and _compile(target.replace("[]", "")).fullmatch(str(piece))
        if match and set(re.findall(r"{(\w+)}", pattern)) <= match.groupdict().keys():
            name = pattern.format(**match.groupdict())
            if not whole or [str(p) for p in place(name, piece.tensor, rules)] == [str(piece)]:
                return name
    return str(piece)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
