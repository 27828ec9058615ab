"""What one forward pass sees. Tensors only: no requests, no text, no policy."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

PAD_SLOT = 0
"""The slot that pad rows write to and read from. Never handed to a request."""


@dataclass(frozen=True)
class Batch:
    """T tokens of B requests, laid end to end; request b advances by q_start[b + 1] - q_start[b] tokens.

    One token when decoding, a chunk of the prompt: there is no phase. The first `decodes` requests advance by exactly
    one token, so that attention may use its kernel for that. Among them several may share a row: a request's last token
    and the drafts behind it, each of which sees those before it. They may stand in any order; longest first is fastest.
    Pads are requests of kv_len 0, and tokens that belong to no request.
    """

    tokens: Tensor  # [T]    int32 token ids
    positions: Tensor  # [T]    int32 position of each token within its request
    slots: Tensor  # [T]    int32 KV slot each token is written to
    q_start: Tensor | None  # [B+1]  int32 first token of each request; None: request b has token b
    kv_len: Tensor  # [B]    int32 cached tokens of each request, this step included
    table: Tensor  # [R, L] int32 resident: slot of position p of the request in row r
    rows: Tensor  # [B]    int32 row of the table that belongs to each request
    logits_at: Tensor | None  # [B] int32 last token of each request, whose logits are wanted; None: those of all
    decodes: int
    features: Tensor | None = None  # [T, hidden] embeddings of picture tokens, in the model's dtype; None: no pictures
    pictured: Tensor | None = None  # [T]    bool tokens whose embedding is their row of `features`

    def last(self) -> "Batch":
        """The tokens at `logits_at` alone, as attention sees them: each request decodes its last one.

        For layers behind the keys and values; what is embedded, turned and stored is still that of all tokens.
        """
        return dataclasses.replace(self, q_start=None, logits_at=None, decodes=len(self.rows))


@dataclass(frozen=True)
class KVPool:
    """Keys and values of every cached token, one slot per token; slot 0 is the pad slot."""

    k: Tensor  # [layers, slots, kv_heads, head_dim]
    v: Tensor  # [layers, slots, kv_heads, head_dim]
