"""Log-probabilities, for whoever asked: gathered on the device, and read by the CPU when their step has landed."""

import torch
from torch import Tensor

from lite_llm.engine.request import TokenLogprobs


def gather(logits: Tensor, tokens: Tensor, most: int) -> Tensor:
    """Numbers for `read` of each row of logits [n, vocab], on their way to the CPU: [n, 1 + 2 * most] fp32.

    The logprob of the row's token (`tokens`, [n] int), those of the `most` best ones, and their ids as bits of int32.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, tokens.clamp(min=0).long()[:, None])
    values, ids = logprobs.topk(min(most, logits.shape[1]))
    numbers = torch.cat([own, values, ids.int().view(torch.float32)], 1)
    there = torch.empty(numbers.shape, dtype=torch.float32, pin_memory=logits.device.type == "cuda")
    return there.copy_(numbers, non_blocking=True)


def read(token: int, numbers: Tensor, k: int) -> TokenLogprobs:
    """One row of `gather`, with the k best."""
    most = len(numbers) // 2
    values, ids = numbers[1 : 1 + most], numbers[1 + most :].view(torch.int32)
    return TokenLogprobs(token, numbers[0].item(), tuple(zip(ids[:k].tolist(), values[:k].tolist(), strict=True)))
