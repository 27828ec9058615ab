"""What the trainings of the demos share: lessons from workers, the optimizer, and a step of it."""

import os

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def loader(lessons: Dataset, workers: int, ahead: int, sampler=None) -> DataLoader:
    """Items in their order or the sampler's; each worker makes `ahead` of them before they are asked for."""
    return DataLoader(
        lessons,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        collate_fn=_as_is,
        worker_init_fn=_one_thread,
    )


def adam(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _as_is(item):
    """Arrays travel as bytes: as tensors, each would hold a file descriptor."""
    return item


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
