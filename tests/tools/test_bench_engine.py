"""tools/bench_engine.py counts steps, bytes and idle time right, and times nothing whose tokens are wrong."""

import dataclasses
import json
from functools import partial

import pytest

from lite_llm import LLM
from lite_llm.engine.request import TokenLogprobs
from tools import bench_engine, bench_peers
from tools.bench_engine import Answers, Effort, Flight, Steps
from tools.bench_peers import GATE_TOP_K, Peer, gate, gate_answers, in_own_process, random_prompts, wish
from tools.idle import idle_shares

SHAPE = "tiny-llama-3.2-1b"
tiny = partial(LLM, shape=SHAPE, random_weights=True, dtype="float32", max_requests=4, context=128, prefix_cache=False)


@pytest.fixture(scope="module")
def llm():
    with tiny() as llm:
        yield llm


def test_a_run_times_every_case_and_records_it(tmp_path, capsys):
    record = tmp_path / "record.json"
    assert bench_engine.main(["--shape", SHAPE, "--batch", "1", "3", "--quick", "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    assert [row["case"] for row in found["rows"]] == [f"{SHAPE}/b1/c512", f"{SHAPE}/b3/c512"]
    assert found["copy_gate"]["equal"] == 48 and found["demo_gate"]["wrong"] is None
    for row in found["rows"]:
        assert row["ms"] > 0 and row["ratio"] == row["against_ms"] / row["ms"]
        assert row["against_ms"] == pytest.approx(row["bytes"] / found["copy_tb_s"] / 1e9)
        assert abs(row["tokens"] - row["steps"]) <= 2 and abs(row["mean_context"] - 512) < 8
        assert row["gate"]["wrong"] is None
    if found["device"] == "cuda":
        assert 0 <= found["rows"][0]["idle_between_launches"] <= found["rows"][0]["idle"] < 1
        assert 0 < found["rows"][0]["gpu_ms"] < 2 * found["rows"][0]["ms"]
    assert f"{SHAPE}/b3/c512" in capsys.readouterr().out


def test_the_floor_is_what_a_step_reads(llm):
    found = Steps(SHAPE, 3, 40).measure(llm, Effort(rounds=1, steps=4, warm=2), bandwidth=1e9)
    # Of the tied embedding each request's row is read once more than the head reads it all.
    rows = 3 * llm.cfg.hidden * 4
    assert found["bytes"] == llm.plan.weights + rows + 3 * llm.plan.kv_token * round(found["mean_context"])
    assert found["against_ms"] == pytest.approx(found["bytes"] / 1e6)


def test_whole_answers_are_counted_and_compared(llm):
    case = Answers(SHAPE, 2, their_ms=1000.0, reach=1.0, prompt_len=8, new_len=6)
    found = case.measure(llm, Effort(answers=2), 0.0)
    assert len(found["ms_rounds"]) == 2 and found["ratio"] == 1000.0 / found["ms"]


def test_a_case_that_fails_leaves_nothing_behind(llm):
    with pytest.raises(ZeroDivisionError):
        with Flight(llm, random_prompts(llm, 2, 8), [wish(False, 20)] * 2) as flight:
            flight.step()
            raise ZeroDivisionError
    while not llm.engine.idle:
        assert llm.step() == []


def test_an_answer_of_another_length_is_an_error(llm):
    with Flight(llm, random_prompts(llm, 1, 8), [wish(False, 4)]) as flight:
        flight.wanted = 5
        with pytest.raises(RuntimeError, match="4 tokens, length; expected 5"):
            flight.finish()


@pytest.mark.parametrize("asked", [(1, False), (3, False), (3, True)], ids=str)
def test_the_gate_tells_another_model_apart(llm, asked):
    right = gate_answers(llm, asked, logprobs=True)
    same = gate(gate_answers(llm, asked), right, sampled=asked[1])
    assert same == {"answers": asked[0], "equal": asked[0], "widest_gap": 0.0, "wrong": None}
    with tiny(seed=1) as other:
        assert "parts at token 0" in gate(gate_answers(other, asked), right, sampled=asked[1])["wrong"]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("gap, right", [(0.1, True), (0.3, False)])
def test_the_gate_forgives_rounding_alone(llm, gap, right, sampled):
    """Just below the best token, or, of sampled answers, just below the last one of top-k."""
    [answer] = gate_answers(llm, (1, sampled), logprobs=True)
    [choice] = answer.choices
    at, second = 7, (choice.token_ids[7] + 1) % llm.cfg.vocab
    before = [(choice.token_ids[at], -1.0)] + [(-1, -2.0)] * (GATE_TOP_K - 1) * sampled
    gap += before[0][1] - before[-1][1]
    top = TokenLogprobs(choice.token_ids[at], -1.0, (*before, (second, before[0][1] - gap)))
    logprobs = (*choice.logprobs[:at], top, *choice.logprobs[at + 1 :])
    want = dataclasses.replace(answer, choices=(dataclasses.replace(choice, logprobs=logprobs),))
    tokens = (*choice.token_ids[:at], second, *choice.token_ids[at + 1 :])
    got = dataclasses.replace(answer, choices=(dataclasses.replace(choice, token_ids=tokens),))
    found = gate([got], [want], sampled)
    assert found["equal"] == 0 and (found["wrong"] is None) == right
    assert found["widest_gap"] == pytest.approx(gap if right else 0)


def test_a_wrong_case_is_shown_as_failed_and_has_no_time(tmp_path, capsys):
    record = tmp_path / "record.json"
    code = bench_engine.main(["--shape", SHAPE, "--context", "1000", "5000", "--quick", "--json", str(record)])
    rows = json.loads(record.read_text())["rows"]
    assert code == 1 and all("ms" not in row for row in rows) and len(rows) == 2
    assert all(row["failed"].startswith("context = ") for row in rows), "a message, not the error's repr"
    assert "FAILED" in capsys.readouterr().out


def test_a_wrong_shape_is_one_line(tmp_path, capsys):
    record = tmp_path / "record.json"
    assert bench_engine.main(["--shape", "demo", "--quick", "--json", str(record)]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: shape 'demo' is not known: ") and error.count("\n") == 1
    assert not out and not record.exists()


def test_idle_is_what_no_kernel_covers():
    early = [(float(i), i + 1.0, 0) for i in range(-3, 0)]
    # 4 us between two launches, 1 us inside one, an overlap, and a kernel inside another
    kernels = [(0.0, 10.0, 1), (5.0, 8.0, 1), (11.0, 20.0, 1), (24.0, 30.0, 2), (29.0, 34.0, 2), (34.0, 40.0, 2)]
    assert idle_shares(kernels) == {"idle": 5 / 40, "idle_between_launches": 4 / 40}
    many = [*early, *((float(i), i + 0.5, i) for i in range(27))]
    assert idle_shares(many[::-1])["idle"] == pytest.approx(26 * 0.5 / 26.5)
    assert idle_shares([]) == {"idle": None, "idle_between_launches": None}


def test_every_figure_of_the_issue_has_its_case():
    names = [case.name for case in bench_engine.cases()]
    assert len(set(names)) == len(names) == 25
    assert {f"llama-3.2-1b/b{b}/c512" for b in (1, 8, 16, 32, 64)} | {"llama-3.2-1b/b256/c1024"} <= set(names)
    assert {f"vllm/{shape}/b{b}" for shape in bench_peers.VLLM_MS for b in (1, 8, 32, 128)} <= set(names)
    assert {"transformers/eager/b1", "transformers/eager/b32", "transformers/compiled/b1"} <= set(names)


def test_names_choose_cases_and_what_they_are_compared_with(capsys):
    assert bench_engine.main(["--only", "nothing"]) == 2
    assert "no case has such a name" in capsys.readouterr().err
    for arguments, names in (
        (["llama-3.2-1b/b1/*"], ["llama-3.2-1b/b1/c512", "llama-3.2-1b/b1/c512/sampled"]),
        (["transformers/*"], ["llama-3.2-1b/b1/c512", "llama-3.2-1b/b32/c512", *_peers("eager/b1", "eager/b32")]),
        (["transformers/c*", "--compile"], ["llama-3.2-1b/b1/c512", *_peers("compiled/b1")]),
    ):
        args = bench_engine.parser().parse_args(["--only", *arguments])
        assert [case.name for case in bench_engine.choose(args)] == names


def _peers(*names):
    return [f"transformers/{name}" for name in names]


@pytest.mark.cpu
def test_full_shapes_need_a_gpu(capsys):
    assert bench_engine.main([]) == 3
    assert capsys.readouterr().err == "error: no GPU that torch can use\n"


def test_transformers_is_timed_in_its_own_process():
    found = in_own_process(SHAPE, 2, 40, compiled=False, limit=300)
    assert found["ms"] > 0 and found["repeats"] and (found["batch"], found["prompt"], found["new"]) == (2, 8, 64)
    ours = {f"{SHAPE}/b2/c40": {"ms": 0.5, "ms_rounds": [0.5], "gpu_ms": None}}
    row = Peer(SHAPE, 2, 40, 3.0).measure(ours)
    assert row["ratio"] == row["theirs"]["ms"] / 0.5 and row["ms"] == 0.5


@pytest.mark.parametrize("shape, limit, why", [("nothing", 300, "exit code 1"), (SHAPE, 0.01, "not done after 0.01 s")])
def test_a_peer_that_fails_is_missing_with_its_reason(shape, limit, why):
    assert why in in_own_process(shape, 1, 40, compiled=False, limit=limit)["missing"]


def test_transformers_without_a_figure_of_ours_is_missing():
    assert "no figure of ours" in Peer(SHAPE, 1, 40, 3.0).measure({})["missing"]
