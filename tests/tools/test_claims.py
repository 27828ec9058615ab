"""The claims with sides that answer by rule, the arithmetic of waiting, what is refused, and the page."""

import dataclasses
import json
from pathlib import Path

import pytest

from lite_llm.errors import UsageError
from tests.tools.test_benchmark_modes import ROOF, FakeSide
from tools import claims
from tools.benchmark import claims_page, claims_peers, claims_serving
from tools.benchmark import record as results
from tools.benchmark.bench import JUDGE, OURS, Bench, Facts
from tools.benchmark.claims_page import render
from tools.benchmark.claims_peers import Ladder, Shape, Versus, long_prompts
from tools.benchmark.claims_record import ClaimRow, Document, load
from tools.benchmark.claims_run import COMPILED, Clock, Gates, Stage, expect, forgiving, shortened
from tools.benchmark.claims_serving import ALONE, FIFO, PACKED, SORTED, Energon, Flover, fixed_batches, padded, waste
from tools.benchmark.claims_texts import CLAIMS
from tools.benchmark.record import spread
from tools.benchmark.sides import Limits, SideFailed
from tools.benchmark.work import Ask, Work, batch

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
ON_A_GPU = {"gpu": "NVIDIA H200", "commit": "0123456789", "date": "2026-11-21", "torch": "2.11", "driver": "580"}


class Side(FakeSide):
    """Batches as fast as one request; a process that lives."""

    process = type("Process", (), {"alive": True})

    def warm(self, work, timeout=None):
        super().warm(work)


def document(**environment):
    return Document(environment, {"quick": False, "argv": []}, {"copy_tb_s": 4.2, "matmul_tflops": 800.0})


@pytest.fixture
def staged(monkeypatch):
    """A stage of a claim with so many seconds; Run.seconds are told by rule, so nothing here really takes any."""

    def make(seconds=1e4, most=8, name="ll-1b", **sides):
        found = {OURS: Side(OURS, 0.010), JUDGE: Side(JUDGE, 0.040), COMPILED: Side(COMPILED, 0.005)}
        found |= {label.replace("rs_", "rs-"): side for label, side in sides.items()}

        def fresh(self, label, prefix_cache=False, variant=None):
            if isinstance(found[label], Exception):
                raise found[label]
            return found[label]

        monkeypatch.setattr(Bench, "fresh", fresh)
        facts = Facts.find(None, None, 0, "float32", "cpu")
        made, said, claim = document(), [], next(claim for claim in CLAIMS if claim.name == name)
        gates, clock = Gates(made, facts.name), Clock(seconds, {name: 1.0}, now=lambda: 0.0)
        clock.begin(name)
        bench = Bench(facts, gates, ROOF, Limits(most, 64), 1, said.append)
        return Stage(claim, bench, gates, clock, made, "python tools/claims.py", "one NVIDIA H200"), made

    return make


def median(row, side, against):
    (one,) = [one for one in row.ratios if (one["side"], one["against"]) == (side, against)]
    return one["ratio"]["median"]


# ---- time


def test_seconds_flow_to_later_claims():
    now = [0.0]
    clock = Clock(100, {"a": 1, "b": 2, "c": 1}, now=lambda: now[0])
    assert clock.begin("a") == 25
    now[0] = 10.0
    assert clock.left() == 15
    assert clock.begin("b") == 60  # two thirds of the 90 that are there
    now[0] = 95.0  # overrun: the last has what is left of all
    assert clock.left() < 0
    assert clock.begin("c") == 5


def test_what_a_run_will_take_is_known_from_a_short_one():
    work = batch(100, 2, 8, 500, seed=1)
    assert expect(Side(OURS, 0.010), shortened(work, 8), 500) == pytest.approx(0.010 * 509)


def test_the_longest_answer_that_fits_is_measured_and_the_others_are_left_out(staged):
    stage, made = staged(seconds=110)
    plan = Versus((Shape(3, "2-6", (1900, 950, 475), 1),), compiled=0)
    claims_peers.versus(stage, plan)
    (row,) = made.rows
    assert "950 new tokens" in row.work and row.sides[OURS]["tokens"] == row.sides[JUDGE]["tokens"] == 3 * 950
    assert "1900 new tokens" in made.left_out[0]["what"] and "and 110 s of its time are left" in made.left_out[0]["why"]
    assert median(row, OURS, JUDGE) == pytest.approx(4.0) and not row.ratios[0]["differs"]  # one pair says no more


def test_what_cannot_run_is_left_out_and_the_rest_goes_on(staged):
    gone = SideFailed("transformers-compile: out of memory", kind="memory")
    stage, made = staged(transformers_compile=gone)
    claims_peers.versus(stage, Versus((Shape(2, "4", (6,), 2), Shape(1, "4", (6,), 2)), compiled=2))
    assert len(made.rows) == 2 and all(row.ratios for row in made.rows)
    assert made.left_out == [{"claim": "ll-1b", "what": COMPILED, "why": gone.message}]
    with forgiving(stage, "more"):
        raise SideFailed("its process ended")
    assert made.left_out[-1] == {"claim": "ll-1b", "what": "more", "why": "its process ended"}


# ---- against transformers


def test_eager_and_compiled_are_rows_of_their_own(staged):
    stage, made = staged()
    claims_peers.versus(stage, claims.MEASURES["ll-1b"].quick)
    assert [median(row, OURS, other) for row, other in zip(made.rows, (JUDGE, COMPILED, JUDGE))] == pytest.approx(
        [4.0, 0.5, 4.0]
    )
    assert all(row.refused is None and row.original and row.may_not and row.hardware for row in made.rows)
    assert {gate["side"] for gate in made.gates} == {OURS, COMPILED}


def test_a_compiled_side_that_compiles_nothing_is_not_called_compiled(staged):
    plain = Side(COMPILED, 0.005)
    plain.info = plain.info | {"note": "static cache; nothing is compiled on a CPU"}
    for side, said in ((Side(COMPILED, 0.005), "new tokens, compiled"), (plain, "nothing is compiled on a CPU")):
        stage, made = staged(transformers_compile=side)
        claims_peers.versus(stage, claims.MEASURES["ll-1b"].quick)
        (line,) = [line for line in claims.summary(made) if COMPILED in line and " s, " in line]
        assert said in line and said in made.rows[1].work


def test_transformers_meets_every_length_before_it_is_timed(staged):
    """Its libraries plan their kernels for each length of the cache, which takes longer than a step."""
    theirs = Side(JUDGE, 0.040)
    stage, _ = staged(transformers=theirs)
    claims_peers.versus(stage, Versus((Shape(3, "2-6", (16,), 2),), compiled=0))

    def lengths(work):
        longest = max(len(ask.ids) for ask in work.asks)
        return range(longest, longest + max(ask.new for ask in work.asks))

    *_, (kind, warmed), (_, first), (_, second) = theirs.ran
    assert kind == "warm" and all(ask.new == 16 for ask in first.asks + second.asks)
    assert {*lengths(first), *lengths(second)} <= set(lengths(warmed))


def test_on_a_gpu_compiling_is_only_begun_where_there_is_time(staged):
    for seconds, new, rows in ((300, 1900, 6), (230, 1900, 6), (200, 950, 6), (70, 475, 5)):
        stage, made = staged(seconds=seconds)  # the clock stands still: these are the seconds before each decision
        stage.bench.facts = dataclasses.replace(stage.bench.facts, device="cuda")
        claims_peers.versus(stage, claims.MEASURES["ll-1b"].plan)
        assert len(made.rows) == rows and f"{new} new tokens" in made.rows[0].work
        assert (COMPILED in made.rows[1].sides) == (rows == 6) == all(one["what"] != COMPILED for one in made.left_out)


def test_a_compiled_warm_up_has_the_same_cache():
    work = Work("w", (Ask((1, 2, 3), 90), Ask((4, 5), 90)))
    long = long_prompts(work, 4)
    assert [len(ask.ids) + ask.new for ask in long.asks] == [93, 92] and {ask.new for ask in long.asks} == {4}


def test_a_wrong_token_refuses(staged):
    stage, made = staged(transformers=Side(JUDGE, 0.040, gap=0.3))
    claims_peers.versus(stage, claims.MEASURES["ll-1b"].quick)
    assert made.rows and all("0.3 nats" in row.refused and not row.ratios for row in made.rows)


def test_a_rung_is_compared_with_what_it_differs_from(staged):
    stage, made = staged(name="ladder", most=2)
    claims_peers.ladder(stage, Ladder(2, "4-8", 4, 2))
    rows = {row.work.partition(":")[0]: row for row in made.rows}
    assert set(rows) == {"static batching", "prefix cache"}  # the others need a GPU
    assert median(rows["static batching"], "as it is", "static batching") > 1
    assert median(rows["prefix cache"], "as it is", "prefix cache") == 1


# ---- waiting


def test_fixed_batches_by_hand():
    asks = [Ask((1,), 5, at) for at in (0.0, 1.0, 3.0, 3.5)]
    serve = lambda group: (2.0, [2.0] * len(group))  # noqa: E731
    assert fixed_batches(asks, 0.0, 1, serve) == [2, 4, 6, 8]
    assert fixed_batches(asks, 0.0, 4, serve) == [2, 4, 6, 6]  # at 2 only one waits; at 4 two do
    assert fixed_batches(asks, 1.5, 4, serve) == [3.5, 3.5, 6.5, 6.5]  # the third waits since 3, until 4.5
    assert fixed_batches(asks, 9.0, 2, serve) == [3, 3, 5.5, 5.5]  # full ones do not wait


def test_flover_one_at_a_time_and_windows(staged):
    stage, made = staged(name="fl")
    plan = Flover(4, 3, 10, 0.5, 0.022, (0.5,), (0.01,), "5-10", 2)
    claims_serving.flover(stage, plan)
    alone = 0.010 * 11
    rows = {row.work: row for row in made.rows}
    assert len(rows) == 5 and all(row.refused is None for row in made.rows)
    half = rows["a request every 0.5 latencies"]
    assert half.sides[OURS]["seconds"]["median"] == pytest.approx(2.5 * alone)  # the arrivals and one latency
    assert half.sides[ALONE]["seconds"]["median"] == pytest.approx(4 * alone)
    assert median(half, OURS, ALONE) == pytest.approx(1.6)
    # The first two have come when the window ends, the others while these run, and so they need not wait again.
    assert half.sides["windows of 0.5 latencies"]["seconds"]["median"] == pytest.approx(2.5 * alone)
    assert "one request alone 0.110 s" in half.notes[0] and "bound by the arrivals for" in half.notes[1]
    assert half.sides[OURS]["mean_latency_s"]["median"] == pytest.approx(alone)


def test_arrival_bound_rows_say_that_all_tie():
    assert "everything ties" in claims_serving._tied(10, {OURS: 10.2, ALONE: 10.5})
    assert "nobody is bound" in claims_serving._tied(10, {OURS: 15.0, ALONE: 20.0})
    assert claims_serving._tied(10, {OURS: 10.1, ALONE: 30.0}).count(ALONE) == 0


def test_padding_costs_what_theory_says():
    assert [waste("1-256", size) for size in (8, 32)] == pytest.approx([1.7747, 1.9357], abs=1e-4)
    work = Work("w", tuple(Ask(tuple(range(1, n + 1)), 2) for n in (3, 1, 2, 5)))
    assert [len(ask.ids) for ask in padded(work, 2).asks] == [3, 3, 5, 5]
    assert padded(work, 2).asks[1].ids == (1, 1, 1) and padded(work, 2).asks[2].ids == (1, 1, 1, 1, 2)
    assert [len(ask.ids) for ask in claims_serving.by_length(work).asks] == [1, 2, 3, 5]


def test_energon_orders_and_ratios(staged):
    class Computes(Side):
        """A millisecond for each token of a prompt, and 2 for each step."""

        def run(self, work, watch=None):
            run = super().run(work)
            seconds = 0.001 * sum(len(ask.ids) for ask in work.asks) + 0.002 * max(ask.new for ask in work.asks)
            answers = tuple(dataclasses.replace(a, times=(), ended=seconds) for a in run.answers)
            return dataclasses.replace(run, seconds=seconds, answers=answers)

    stage, made = staged(name="en", lite_llm=Computes(OURS, 0.01))
    claims_serving.energon(stage, Energon("1-16", ((4, 1, 12),), 2))
    (row,) = made.rows
    assert row.refused is None and "theory" in row.notes[-1]
    assert median(row, SORTED, FIFO) > 1 and median(row, PACKED, SORTED) > 1 and median(row, OURS, FIFO) > 1
    work = Work("w", (Ask((1, 1), 3), Ask((1,), 1)))
    run = claims_serving._in_order(work, Side(OURS, 0.01).run(claims_serving.by_length(work)))
    assert [len(answer.tokens) for answer in run.answers] == [3, 1]


# ---- the document and its page


def row(**changes):
    interval = spread(2.0, 1.9, 2.1)
    side = {"seconds": interval, "tokens_per_second": interval, "tokens": 60, "of_limit": 0.5, "limit": "memory"}
    ratio = {"side": OURS, "against": JUDGE, "ratio": spread(3.0, 2.9, 3.1), "differs": True}
    found = ClaimRow(
        "ll-1b", "batch 15", {"name": "llama-3.2-1b", "dtype": "bfloat16", "random_weights": True}, "one NVIDIA H200",
        "python tools/claims.py --json a.json", "claimed", ["may not"], {OURS: side, JUDGE: side}, [ratio], 3,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def judged(**changes):
    made = document(**ON_A_GPU)
    made.add_gate({"name": "greedy tokens", "side": OURS, "model": "llama-3.2-1b", "wrong": None} | changes)
    return made


@pytest.mark.parametrize("made, changes, why", [
    (judged(), {}, None),
    (judged(model="another"), {}, "nobody looked"),
    (judged(wrong="1 nat below"), {}, "1 nat below"),
    (judged(), {"compiles": 2}, "2 kernels"),
    (judged(), {"sides": {OURS: row().sides[OURS], JUDGE: row().sides[OURS] | {"tokens": 59}}}, "different numbers"),
])  # fmt: skip
def test_what_refuses_a_row(made, changes, why):
    found = made.add(row(**changes))
    assert (found.refused is None and found.ratios) if why is None else (why in found.refused and not found.ratios)
    with pytest.raises(ValueError, match="there already"):
        made.add(row())


def test_a_document_comes_back(tmp_path):
    made = dataclasses.replace(judged(), path=tmp_path / "a.json")
    made.add(row(gpu={}))
    made.leave_out("ll-3b", "all of it", "no time")
    back = load(tmp_path / "a.json")
    assert (back.rows, back.gates, back.left_out) == (made.rows, made.gates, made.left_out)
    for text, message in (("[]", "not a document"), ("{", "not a JSON"), ('{"kind": "claims"}', "not a document")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            load(tmp_path / "b.json")


@pytest.fixture
def withdrawn(monkeypatch):
    """Two claims that were measured once, ll-1b and ll-3b, and no other."""
    texts = {"ll-1b": "Measured in May and withdrawn: the clock stood.", "ll-3b": "Withdrawn: another model."}
    made = [dataclasses.replace(claim, withdrawn=texts.get(claim.name, "")) for claim in CLAIMS]
    monkeypatch.setattr(claims_page, "CLAIMS", made)


def test_the_page_without_figures_says_so(withdrawn):
    page = render([])
    assert "No figure below is ours" in page and page.count("Not measured yet") == len(CLAIMS) - 2
    assert page.count("the clock stood") == page.count("another model") == 1


def test_the_page_with_figures(withdrawn):
    made = judged()
    made.add(row(gpu={}))
    made.add(row(work="batch 1", refused="2 kernels", gpu={}))
    made.leave_out("ll-1b", "batch 15 of 1900", "no time")
    page = render([judged(), made])
    assert "No figure below is ours" not in page and page.count("Not measured yet") == len(CLAIMS) - 2
    assert "the clock stood" not in page and "another model" in page  # figures take the place of what was withdrawn
    assert "lite_llm is 3.00 (2.90-3.10) times as fast as transformers" in page
    assert "batch 1: refused: 2 kernels" in page and "batch 15 of 1900: no time" in page
    assert "one NVIDIA H200, llama-3.2-1b, bfloat16, random weights" in page and "commit 0123456," in page
    assert "within 3% of 1" in page and "held back" not in page


def test_the_page_says_what_held_the_clocks_back_and_where_nothing_differs():
    made, same = judged(), [row().ratios[0] | {"ratio": spread(0.98, 0.95, 0.99), "differs": False}]
    made.add(row(gpu={"throttle_reasons": ["sw_power_cap", "gpu_idle"]}, ratios=same))
    made.add(row(work="batch 1", gpu={"throttle_reasons": ["gpu_idle"]}))
    apart = [same[0] | {"ratio": spread(13.9, 0.98, 26.9)}]
    made.add(row(work="batch 8", gpu={"throttle_reasons": ["gpu_idle"]}, ratios=apart))
    page = " ".join(render([made]).split())
    assert "the GPU's clocks were held back after 1 of 3 rows: sw_power_cap." in page
    assert "0.98 (0.95-0.99, no difference) times" in page and page.count("no difference)") == 1
    assert "13.90 (0.98-26.90, not told apart) times" in page and page.count("told apart)") == 1


def test_all_documents_of_a_claim_are_shown(withdrawn):
    first, last = judged(), judged()
    first.add(row(work="batch 8", gpu={}))
    first.leave_out("ll-1b", "batch 16", "no time")
    last.add(row(work="batch 16", gpu={}))
    page = render([first, last])
    assert page.index("batch 8: lite_llm") < page.index("batch 16: lite_llm") and "no time" not in page


def test_a_rehearsal_is_no_page():
    rehearsed = document(**ON_A_GPU)
    rehearsed.arguments["quick"] = True
    for made in (rehearsed, document(cpu_name="x")):
        with pytest.raises(UsageError, match="rehearsal"):
            render([made])


def test_the_page_in_the_tree_is_that_of_the_documents_beside_it():
    assert PAGE.read_text() == render([load(path) for path in sorted((PAGE.parent / "results").glob("claims-*.json"))])


@pytest.mark.parametrize("path", sorted((PAGE.parent / "results").glob("latency-*.json")), ids=lambda path: path.name)
def test_the_results_page_says_where_the_clocks_were_held_back(path):
    rows = results.load(path).rows
    held = sum("sw_power_cap" in (row.gpu["throttle_reasons"] or ()) for row in rows)
    name = path.name.removeprefix("latency-").removesuffix("-h200.json")
    page = " ".join((PAGE.parent / "results" / "README.md").read_text().split())
    text = page[page.index("held back by its power limit") :].partition("##")[0]
    assert f"{held} of {len(rows)} rows of {name}" in text or f"{held} of {len(rows)} of {name}" in text or not held


def test_the_page_in_the_tree_has_every_claim():
    page = " ".join(PAGE.read_text().split())
    for claim in CLAIMS:
        for text in (claim.title, claim.original, claim.here, *claim.never):
            assert " ".join(text.split()) in page


# ---- the program


def test_the_tables_name_the_same_claims():
    assert list(claims.SECONDS) == list(claims.MEASURES) == [claim.name for claim in CLAIMS]


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(claims.torch.cuda, "is_available", lambda: False)
    assert claims.main([]) == 3 and "--quick" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        claims.main(["--only", "vllm"])


@pytest.mark.cpu
def test_quick_runs_for_real(tmp_path, capsys):
    out = tmp_path / "a.json"
    assert claims.main(["--quick", "--only", "en", "ci-13b", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["claim"] for row in found["rows"]] == ["en", "en", "ci-13b", "ci-13b"]
    assert not found["left_out"] and all(row["ratios"] and not row["refused"] for row in found["rows"])
    assert claims.main(["--render", str(out), "--page", str(tmp_path / "page.md")]) == 2
    assert "rehearsal" in capsys.readouterr().err and not (tmp_path / "page.md").exists()
