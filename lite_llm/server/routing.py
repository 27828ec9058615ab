"""Which replica answers a request: one that has computed the beginning of its prompt before, if it is not too busy.

Every request passes here, so what was sent where is known and nobody needs to be asked.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lite_llm.server import schema
from lite_llm.server.refusals import Refusal

_BLOCK, _LONGEST = 64, 16384  # characters that a prefix grows by, and that are looked at
_MOST_PREFIXES = 1 << 16  # that are remembered of one replica, 10 MB
_SLACK = 4  # requests that a replica may always have more than the least loaded


@dataclass
class Known:
    """Of one replica."""

    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # the last used at the end
    load: int = 0  # requests there
    last: int = 0  # which request was the last to go there


class PrefixRouter(RequestRouter):
    """To the replica that has seen the longest part of a prompt, unless it is much busier than the least loaded."""

    def initialize_state(self) -> None:
        self._known: dict[ReplicaID, Known] = {}
        self._count = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen one, then all the others, for when it takes no more."""
        known = {replica.replica_id: self._of(replica.replica_id) for replica in candidate_replicas}
        if not known:
            return []
        self._known = known  # nothing is kept of the dead
        prefixes = pending_request.args[2] if pending_request else ()
        best = choose(known, prefixes)
        self._count += 1
        known[best].last = self._count
        seen = known[best].prefixes
        for prefix in prefixes:
            seen[prefix] = None
            seen.move_to_end(prefix)
        while len(seen) > _MOST_PREFIXES:
            seen.popitem(last=False)
        ranks = [[], []]
        for replica in candidate_replicas:
            ranks[replica.replica_id != best].append(replica)
        return ranks

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._of(replica_id).load += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        known = self._of(replica_id)
        known.load = max(known.load - 1, 0)

    def _of(self, replica_id: ReplicaID) -> Known:
        return self._known.setdefault(replica_id, Known())


def choose(known: dict[Any, Known], prefixes: Sequence[bytes]) -> Any:
    """The key of the replica for a prompt: of those that know as much of it the least loaded, then the longest idle."""

    def worth(of: Known) -> tuple[int, int, int]:
        shared = next((i for i, prefix in enumerate(prefixes) if prefix not in of.prefixes), len(prefixes))
        return shared, -of.load, -of.last

    most = 2 * min(of.load for of in known.values()) + _SLACK
    return max((key for key, of in known.items() if of.load <= most), key=lambda key: worth(known[key]))


class _Asked(schema.TokenizeRequest):
    """What a prompt's beginning is made of; other fields are left to the replica."""

    prompt: Any = None
    cache_salt: Any = None


def prefixes_of(body: bytes) -> list[bytes]:
    """Names of the beginnings of a request's prompt, short ones first; requests share those that begin alike, and have
    the same salt, as the prefix cache wants it. [] for what has no prompt, or one that is shorter than a block."""
    try:
        asked = schema.read(_Asked, body)
    except Refusal:  # the replica says so
        return []
    text = json.dumps([asked.cache_salt, asked.tools, asked.messages or asked.prompt])[:_LONGEST]
    digest, found = hashlib.blake2b(digest_size=8), []
    for end in range(_BLOCK, len(text) + 1, _BLOCK):
        digest.update(text[end - _BLOCK : end].encode())
        found.append(digest.digest())
    return found
