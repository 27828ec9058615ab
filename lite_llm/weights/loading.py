"""A checkpoint into a model: Hugging Face tensors by the model's rules, fused ones as they are."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lite_llm.errors import BadCheckpoint
from lite_llm.weights.files import Checkpoint
from lite_llm.weights.rules import Rules, load
from lite_llm.weights.stream import Range, stream

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    rules: Rules,
    progress: Progress | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Fill every parameter of a model. BadCheckpoint, before any data is read, if the names or shapes do not fit.

    On a CPU a fused checkpoint of the model's dtype is not copied: its parameters become views of the mapped file.
    """
    report = _Report(checkpoint, progress)
    if checkpoint.fused:
        require_same(model, checkpoint)
        return _load_fused(model, checkpoint, report)
    device = next(model.parameters()).device
    try:
        require_fit(model, checkpoint, rules)
        load(model, rules, report.each(checkpoint.tensors(device)), allow_nonfinite=allow_nonfinite)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{checkpoint.directory}: {error.message}", error.hint) from None


def require_fit(model: nn.Module, checkpoint: Checkpoint, rules: Rules) -> None:
    """BadCheckpoint unless every tensor has its place in the model and nothing is missing; reads no data."""
    metas: dict[int, nn.Parameter | Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        metas[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    twin = copy.deepcopy(model, metas)  # the memo puts each meta tensor where deepcopy would copy the data
    load(twin, rules, checkpoint.metas())


def require_same(model: nn.Module, checkpoint: Checkpoint) -> None:
    """BadCheckpoint unless a fused checkpoint holds the model's parameters; reads no data."""
    shapes, params = checkpoint.shapes, dict(model.named_parameters())
    wrong = [f"it lacks {name}" for name in params.keys() - shapes.keys()]
    wrong += [f"it has {name}, the model has not" for name in shapes.keys() - params.keys()]
    wrong += [
        f"{name} is {list(shapes[name])}, the model needs {list(params[name].shape)}"
        for name in params.keys() & shapes.keys()
        if shapes[name] != tuple(params[name].shape)
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise BadCheckpoint(f"{checkpoint.directory} does not fit its config.json: {shown}", "convert the source again")


@torch.no_grad()
def _load_fused(model: nn.Module, checkpoint: Checkpoint, report: "_Report") -> None:
    params = dict(model.named_parameters())
    device = next(iter(params.values())).device
    direct = all(params[name].dtype == entry.dtype for name, entry in checkpoint.entries.items())
    if direct and device.type == "cuda":
        ranges = (
            Range(name, entry.file, entry.start, params[name].data.view(-1).view(torch.uint8))
            for name, entry in checkpoint.entries.items()
        )
        for name in stream(ranges, device):
            report.add(name)
        return
    for name, tensor in report.each(checkpoint.tensors(device)):
        if direct and tensor.data_ptr() % 16 == 0:
            params[name].data = tensor
        else:
            params[name].copy_(tensor)


class _Report:
    def __init__(self, checkpoint: Checkpoint, progress: Progress | None):
        self.entries, self.progress = checkpoint.entries, progress
        self.done, self.total = 0, checkpoint.nbytes

    def add(self, name: str) -> None:
        self.done += self.entries[name].nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def each(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each reported once it has been used."""
        for name, tensor in tensors:
            yield name, tensor
            self.add(name)
