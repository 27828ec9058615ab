"""The JSON document of tools/claims.py: a row per claim and work, and what time or memory left out.

A ratio says how many times as fast `side` is as `against`, over whole runs. A row that a gate, unequal tokens or a
compilation refuses loses its ratios here, so that nothing after it can show one.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lite_llm.errors import UsageError
from tools.benchmark.record import replace_file
from tools.environment import environment, gpu_state

SCHEMA = 1
KIND = "claims"


@dataclass(frozen=True)
class ClaimRow:
    """`sides` are figures by name: intervals ({"median", "low", "high"}) of "seconds" and others, and plain numbers.

    "tokens" are those that the side made in one run; sides that are compared made as many. `ratios` are objects of
    "side", "against", "ratio" (an interval) and "differs".
    """

    claim: str
    work: str
    model: dict
    hardware: str
    command: str
    original: str  # what was claimed, on which hardware
    may_not: list[str]  # be concluded
    sides: dict[str, dict]
    ratios: list[dict]
    rounds: int
    notes: list[str] = field(default_factory=list)
    compiles: int = 0
    refused: str | None = None
    gpu: dict | None = None


@dataclass
class Document:
    """`gates` are those of Bench with the "model" that they are about; `left_out` has objects of claim, what, why."""

    environment: dict
    arguments: dict
    limits: dict
    gates: list[dict] = field(default_factory=list)
    rows: list[ClaimRow] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    path: Path | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        self._began = self.clock() - self.seconds

    @classmethod
    def begin(cls, arguments: dict, limits: dict, path: Path | None) -> "Document":
        """Written at once, so that a path that cannot be written fails before the work."""
        found = cls(environment(), arguments, limits, path=path)
        found.write()
        return found

    @property
    def rehearsed(self) -> bool:
        """Whether its figures say nothing about any claim."""
        return bool(self.arguments["quick"]) or not self.environment.get("gpu")

    def add(self, row: ClaimRow) -> ClaimRow:
        """The row as it stands in the document."""
        if any((row.claim, row.work) == (there.claim, there.work) for there in self.rows):
            raise ValueError(f"row: {row.claim}, {row.work} is there already")
        refused = self._refusal(row)
        if "gpu" in self.environment and row.gpu is None:
            row = replace(row, gpu=gpu_state())
        row = replace(row, refused=refused, ratios=[] if refused else row.ratios)
        self.rows.append(row)
        self._tick()
        return row

    def add_gate(self, gate: dict) -> None:
        self.gates.append(gate)
        self._tick()

    def leave_out(self, claim: str, what: str, why: str) -> None:
        self.left_out.append({"claim": claim, "what": what, "why": why})
        self._tick()

    def write(self) -> None:
        if self.path:
            names = ("environment", "arguments", "limits", "gates", "left_out", "seconds")
            found = {"schema_version": SCHEMA, "kind": KIND} | {name: getattr(self, name) for name in names}
            found["rows"] = [asdict(row) for row in self.rows]
            replace_file(self.path, json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")

    def _refusal(self, row: ClaimRow) -> str | None:
        if row.refused:
            return row.refused
        mine = [gate for gate in self.gates if gate["model"] == row.model["name"] and gate["side"] in row.sides]
        if wrong := next((gate for gate in mine if gate["wrong"]), None):
            return f"{wrong['name']}, {wrong['side']}: {wrong['wrong']}"
        if row.ratios and not mine:
            return "nobody looked whether the tokens are right"
        if row.compiles:
            return f"{row.compiles} kernels were compiled inside the timing"
        tokens = {name: side["tokens"] for name, side in row.sides.items()}
        if len(set(tokens.values())) > 1:
            return "the sides made different numbers of tokens: " + ", ".join(f"{n} {t}" for n, t in tokens.items())
        return None

    def _tick(self) -> None:
        self.seconds = self.clock() - self._began
        self.write()


def load(path: str | Path) -> Document:
    """A document as it was written, bound to no file."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "expected a document that --json wrote") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON document: {error}", "expected one that --json wrote") from None
    kind = (found.get("kind"), found.get("schema_version")) if isinstance(found, dict) else None
    if kind != (KIND, SCHEMA):
        raise UsageError(f"{path}: not a document of claims that this version reads", "measure again")
    try:
        rows = [ClaimRow(**row) for row in found.pop("rows")]
        return Document(**{name: found[name] for name in found.keys() - {"kind", "schema_version"}}, rows=rows)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: {error}", "expected a document that --json wrote") from None
