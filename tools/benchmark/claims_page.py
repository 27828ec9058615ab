"""docs/claims.md from documents of tools/claims.py: every claim as it was made, and figures only where there are."""

import textwrap
from collections.abc import Iterator, Sequence

from lite_llm.errors import UsageError
from tools.benchmark.claims_record import ClaimRow, Document
from tools.benchmark.claims_texts import CLAIMS, Claim
from tools.benchmark.stats import SAME, SCATTER, alike
from tools.benchmark.table import held_back, number

_TITLES = {
    "seconds": "seconds", "tokens_per_second": "tokens/s", "requests_per_second": "requests/s",
    "mean_latency_s": "mean latency, s",
}  # fmt: skip
_COLUMNS = {
    "fl": ("seconds", "tokens_per_second", "mean_latency_s"),
    "en": ("seconds", "requests_per_second"),
}
"""Of the other claims: seconds and tokens."""
_SUBJECTS = {"as it is": "the engine as users run it"}
"""Sides by their place in a sentence, where their name is none."""
_VERSIONS = ("driver", "torch", "triton", "transformers")
_HEAD = """\
# Claims of the ancestors, measured again

This project took ideas from lite_llama, Colossal-Inference, Energon-AI and Flover. Each of them published a speed-up;
this page says what was claimed, on which hardware, how the same work is measured here, and what may not be
concluded from it. It is written by `tools/claims.py` from its own JSON.
"""
_NOTHING = """\
**No figure below is ours:** those in the text are the originals', on their hardware.
"""
_HOW = f"""\
A ratio is that of the seconds of whole runs, taken by turns: how many times as fast the first is as the second; the
median, and in brackets the interval that holds the true one 95 times in 100. One run has none. "No difference" stands
where the ratio is within {SAME:.0%} of 1, for two processes of one program differ by as much, and its interval within
{SCATTER:.0%}; "not told apart" where the runs scatter too much to say. "Limit" is the least time that the
weights, keys and values and flops of the work allow at the copy and matmul rates of the same machine, as a share of the
time that was measured. Greedy tokens of every side are scored by eager transformers, the judge; where one is wrong,
where sides made unequal numbers of tokens, or where a kernel was compiled inside the timing, the row is refused and
shows no ratio.

**Eager transformers is as fast as a host's CPU launches kernels.** On the hosts that were lent, a step of Llama-3.2-1B
took it from 9 to 20 ms, with the same GPU and software, so a ratio over it says as much of the host. Two to four
benchmarks ran on a host at a time, and how often a row ran stands in it: some of the long ones once. Up to commit
931109e (Llama 2) it ran with cuDNN's attention, which stops for some 50 ms at a length of the cache that it has not met
of late; warm-ups met most lengths there.

**Not repeated of the originals:** fp16 (bf16 alone ran), the ladder at 2,000 and 8,000 tokens, batch 1 and 64 of
Colossal-Inference's table, more than one seed of arrivals, latencies under Poisson arrivals of Energon-AI's batches,
transformers or a 13B under Flover's arrivals.
"""


def render(documents: Sequence[Document]) -> str:
    """What was left out is said by the last document of a claim. UsageError for a rehearsal."""
    for document in documents:
        if document.rehearsed:
            raise UsageError(
                f"the document of {document.environment.get('date')} is a rehearsal without a GPU or with --quick",
                "its figures say nothing about a claim; measure on a GPU",
            )
    parts = [_HEAD, _HOW if any(document.rows for document in documents) else _NOTHING]
    for claim in CLAIMS:
        mine = [d for d in documents if any(one["claim"] == claim.name for one in d.left_out) or _rows(claim, d)]
        parts.append("\n".join(_claim(claim, mine)) + "\n")
    return "\n".join(parts)


def _rows(claim: Claim, document: Document) -> list[ClaimRow]:
    return [row for row in document.rows if row.claim == claim.name]


def _claim(claim: Claim, documents: Sequence[Document]) -> Iterator[str]:
    having = [document for document in documents if _rows(claim, document)]
    yield f"## {claim.title}"
    yield "\n" + _wrapped(f"**Claimed.** {claim.original}")
    yield "\n" + _wrapped(f"**Here.** {claim.here}")
    for document in having:
        rows = _rows(claim, document)
        yield f"\n**Command.** `{rows[0].command}`\n"
        yield _where(document, rows[0]) + "\n"
        yield from _table(rows)
    if not having:
        yield f"\n**Command.** `python tools/claims.py --only {claim.name} --json {claim.name}.json`\n"
        yield _wrapped(f"**Figures.** {claim.withdrawn or 'Not measured yet.'}")
    left = [one for document in documents[-1:] for one in document.left_out if one["claim"] == claim.name]
    if left:
        yield "\n**Left out.**\n"
        yield from (_item(f"{one['what']}: {one['why']}") for one in left)
    yield "\n**May not be concluded.**\n"
    yield from map(_item, claim.never)


def _where(document: Document, row: ClaimRow) -> str:
    env, limits = document.environment, document.limits
    versions = ", ".join(f"{name} {env[name]}" for name in _VERSIONS if env.get(name))
    weights = "random weights" if row.model["random_weights"] else "its own weights"
    return _wrapped(
        f"**Figures.** {row.hardware}, {row.model['name']}, {row.model['dtype']}, {weights}; {versions}; commit "
        f"{(env.get('commit') or 'unknown')[:7]}, {env.get('date')}; copy {limits['copy_tb_s']:.2f} TB/s, matmul "
        f"{limits['matmul_tflops']:.0f} TFLOP/s."
    )


def _table(rows: Sequence[ClaimRow]) -> Iterator[str]:
    columns = _COLUMNS.get(rows[0].claim, ("seconds", "tokens_per_second"))
    yield "| work | side | " + " | ".join(_TITLES[name] for name in columns) + " | limit | runs |"
    yield "| --- | --- |" + " --- |" * (len(columns) + 2)
    for row in rows:
        for i, (label, side) in enumerate(row.sides.items()):
            cells = [_spread(side[name]) if name in side else "" for name in columns]
            share = f"{side['of_limit']:.0%} {side['limit']}" if "of_limit" in side and not row.refused else ""
            yield f"| {row.work if not i else ''} | {label} | " + " | ".join(cells) + f" | {share} | {row.rounds} |"
    yield ""
    for row in rows:
        said = [_faster(one) for one in row.ratios]
        if row.refused:
            said = [f"refused: {row.refused}"]
        if said or row.notes:
            yield _item(f"{row.work}: " + "; ".join([*said, *row.notes]) + ".")
    if held := held_back([row.gpu for row in rows]):
        yield _item(f"{held}.")


def _item(text: str) -> str:
    return _wrapped(f"- {text}", "  ")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _faster(one: dict) -> str:
    side, other = (_SUBJECTS.get(one[name], one[name]) for name in ("side", "against"))
    return f"{side} is {_ratio(one)} times as fast as {other}"


def _spread(figure: dict) -> str:
    if figure["low"] == figure["high"]:
        return number(figure["median"])
    return f"{number(figure['median'])} ({number(figure['low'])}-{number(figure['high'])})"


def _ratio(one: dict) -> str:
    ratio = one["ratio"]
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    same = f", {alike(ratio)}" if one["differs"] is False else ""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}{same})"
