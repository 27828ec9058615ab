import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 256)
MAX_GROUP = 16
"""What `attend`'s kernels serve, in features of a head and query heads of a KV head; the reference takes any."""


def store_kv_(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write the K and V `[T, kv_heads, head_dim]` of each token to its slot of the pools `[slots, kv_heads, head_dim]`.

    Slots in one call are distinct, the pad slot excepted.
    """
    k_pool[slots] = k
    v_pool[slots] = v


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    rows: Tensor,
    q_start: Tensor | None,
    kv_len: Tensor,
    decodes: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Causal attention of each request's new tokens over all its cached tokens, these included.

    q is [T, heads, head_dim]; the pools are [slots, kv_heads, head_dim]. Request b owns tokens
    q_start[b] to q_start[b + 1] of q (int32 [B + 1]) and the last of them sits at position kv_len[b] - 1 (int32 [B]).
    Position p of request b is cached in slot table[rows[b], p] (int32 [R, L]; int32 [B]). Query head h reads KV head
    h // (heads // kv_heads). The first `decodes` requests own exactly one token each; the op's result does not depend
    on it, its choice of kernel does. Where they own all of q, `q_start` may be None. `window` limits each token to its
    last `window` positions, itself included. A request with kv_len 0 gets zeros. Returns [T, heads, head_dim] in q's
    dtype; softmax and sums in fp32.

    Without `causal` every new token sees all kv_len cached tokens, as in an encoder: then there may be no window, and
    `decodes` is 0.
    """
    out = torch.zeros_like(q)
    kv_heads = k_pool.shape[1]
    starts = range(len(q) + 1) if q_start is None else q_start.tolist()
    for b, length in enumerate(kv_len.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        if length == 0 or tokens.start == tokens.stop:
            continue
        slots = table[rows[b], :length].long()
        k, v = k_pool[slots].float(), v_pool[slots].float()
        heads = q[tokens].float().unflatten(1, (kv_heads, -1))  # [tokens, kv_heads, group, head_dim]
        scores = torch.einsum("qhgd,khd->hgqk", heads, k) * scale
        if causal:
            key = torch.arange(length, device=q.device)
            query = key[length - scores.shape[2] :, None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            scores.masked_fill_(~visible, float("-inf"))
        out[tokens] = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v).flatten(1, 2).to(q.dtype)
    return out
