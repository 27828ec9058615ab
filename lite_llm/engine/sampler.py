"""From a step's logits to its tokens, each row by its own request's parameters."""

import torch
from torch import Tensor

from lite_llm import ops
from lite_llm.engine.request import Request, TokenLogprobs
from lite_llm.ops.reference.sampling import PROMPT


class Sampler:
    """Owns the token counts that penalties need, by row of the slot table."""

    def __init__(self, max_requests: int, vocab: int, usable_vocab: int, device: torch.device):
        """`vocab` is the width of the logits; ids from `usable_vocab` on are padding and never sampled."""
        self.vocab, self.usable, self.device = vocab, usable_vocab, device
        self.counts = torch.zeros(max_requests, vocab, dtype=torch.int32, device=device)

    def join(self, request: Request) -> None:
        """Count the tokens of a request that has just got a row."""
        if request.params.penalized:
            prompt, output = (
                torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=self.vocab)
                for ids in (request.ids[: request.prompt_len], request.output)
            )
            self.counts[request.row] = (output + PROMPT * (prompt > 0)).int().to(self.device)

    def __call__(self, logits: Tensor, requests: list[Request]) -> list[int]:
        """One token per row of `logits[N, vocab]`; -1 where a row is unusable. Notes logprobs in the requests."""
        if not requests:
            return []
        logits = logits.float()
        raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else None
        logits[:, self.usable :] = -torch.inf
        self._penalize_(logits, requests)
        self._bias_(logits, requests)
        params = [r.params for r in requests]
        heat = self._floats([[0.0 if p.greedy else p.temperature, p.top_p, p.min_p] for p in params])
        whole = torch.tensor([[r.params.seed, len(r.ids), r.params.top_k] for r in requests])
        seeds, positions, top_k = whole.T.contiguous().to(self.device)
        chosen = ops.sample(logits, heat[0], top_k.int(), heat[1], heat[2], seeds, positions)
        self._count_(chosen, requests)
        tokens = chosen.tolist()
        if raw is not None:
            self._note_logprobs(raw, tokens, requests)
        return tokens

    def _floats(self, rows: list[list[float]]) -> Tensor:
        """[N][k] numbers to k contiguous vectors of N on the device."""
        return torch.tensor(rows, dtype=torch.float32).T.contiguous().to(self.device)

    def _penalize_(self, logits: Tensor, requests: list[Request]) -> None:
        at = [i for i, r in enumerate(requests) if r.params.penalized]
        if at:
            params = [requests[i].params for i in at]
            rows = torch.tensor([requests[i].row for i in at], device=self.device)
            index = torch.tensor(at, device=self.device)
            penalties = self._floats([[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params])
            some = logits[index]
            ops.penalize_(some, self.counts, rows, *penalties)
            logits[index] = some

    def _bias_(self, logits: Tensor, requests: list[Request]) -> None:
        entries = [(i, token, bias) for i, r in enumerate(requests) for token, bias in r.params.logit_bias.items()]
        entries += [
            (i, token, -torch.inf)
            for i, r in enumerate(requests)
            if r.output_len < r.params.min_tokens
            for token in r.stop_ids
        ]
        if entries:
            rows, tokens, biases = zip(*entries)
            where = (torch.tensor(rows, device=self.device), torch.tensor(tokens, device=self.device))
            logits.index_put_(where, torch.tensor(biases, dtype=logits.dtype, device=self.device), accumulate=True)

    def _count_(self, chosen: Tensor, requests: list[Request]) -> None:
        at = [i for i, r in enumerate(requests) if r.params.penalized]
        if at:
            rows = torch.tensor([requests[i].row for i in at], device=self.device)
            tokens = chosen[torch.tensor(at, device=self.device)]
            self.counts[rows, tokens.clamp(min=0)] += (tokens >= 0).int()

    def _note_logprobs(self, raw: Tensor, tokens: list[int], requests: list[Request]) -> None:
        at = [i for i, r in enumerate(requests) if r.params.logprobs is not None and tokens[i] >= 0]
        if at:
            own = torch.tensor([tokens[i] for i in at], device=self.device)
            logprobs = raw[torch.tensor(at, device=self.device)].log_softmax(-1)
            chosen = logprobs.gather(1, own[:, None])[:, 0].tolist()
            most = min(max(requests[i].params.logprobs for i in at), self.vocab)
            values, ids = (t.tolist() for t in logprobs.topk(most))
            for i, logprob, value, token in zip(at, chosen, values, ids, strict=True):
                k = requests[i].params.logprobs
                top = tuple(zip(token[:k], value[:k], strict=True))
                requests[i].logprobs.append(TokenLogprobs(tokens[i], logprob, top))
