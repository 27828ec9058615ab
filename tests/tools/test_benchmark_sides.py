"""Every side answers the same work with the same tokens, and a worker that fails leaves a message and nothing else."""

import dataclasses
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lite_llm.cli.flight import FRAME, SHARE
from lite_llm.errors import LiteLLMError, UsageError
from lite_llm.llm import DEMO, LLM
from lite_llm.outputs import InFlight, SlotMap
from tools.benchmark import ours, sides, theirs, worker
from tools.benchmark.sides import Arrivals, Limits, Model, Opening, Process, Side, SideFailed, fault
from tools.benchmark.work import Answer, Ask, Run, Work

LIMITS = Limits(max_requests=4, context=128)
SHAPE = "tiny-llama-3.2-1b"


def mixed(count: int = 9, gap: float = 0.0, vocab: int = 2048, **wishes) -> Work:
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(5, vocab) for _ in range(draw.choice((1, 2, 7, 30, 60)))) for _ in range(count)]
    return Work("mixed", tuple(Ask(ids, draw.randint(1, 20), gap * i) for i, ids in enumerate(prompts)), **wishes)


def tokens(run: Run) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in run.answers]


def checked(side, work: Work) -> Run:
    run = side.run(work)
    assert fault(work, run, side.vocab) is None and run.compiles == 0
    return Run.from_json(run.to_json())


def variant() -> dict:
    return {"step_tokens": 48}


def no_dict() -> None:
    pass


@pytest.fixture(scope="module")
def us():
    with Side("lite_llm", limits=LIMITS, variant=f"{__name__}:variant") as side:
        yield side


@pytest.fixture(scope="module")
def them():
    with Side("transformers", limits=dataclasses.asdict(LIMITS)) as side:
        yield side


@pytest.fixture(scope="module")
def eager():
    return theirs.Eager(Opening("transformers", limits=LIMITS))


def ending_at_once() -> tuple[int, ...]:
    """A conversation that the demo ends after a few tokens."""
    with LLM(device="cpu", max_requests=1, context=256) as llm:
        said = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
        assert said.finish_reason == "stop"
        return said.prompt_ids + said.token_ids[:-1]


def test_both_give_equal_tokens_and_nobody_ends_early(us, them):
    work = mixed()
    work = Work("eos", (*work.asks, Ask(ending_at_once(), 12)))
    for side in (us, them):
        side.warm(work)
    one, other = us.run(work), them.run(work)
    assert tokens(one) == tokens(other) and [len(answer) for answer in tokens(one)] == [ask.new for ask in work.asks]
    assert set(tokens(one)[-1]) & us.special  # it would have ended
    assert us.vocab == them.vocab == 2048 and 0 < us.info["import_s"] < us.ready_s < 60 and them.special <= us.special
    assert us.info["options"]["step_tokens"] == 48, "the variant was not called"
    gaps, right = them.score([(ask.ids, answer) for ask, answer in zip(work.asks, tokens(one), strict=True)])
    assert [len(row) for row in gaps] == [ask.new for ask in work.asks] and max(map(max, gaps)) < 1e-3
    long = max(range(len(work.asks)), key=lambda i: work.asks[i].new)
    told = us.run(dataclasses.replace(work, logprobs=True))
    assert tokens(told) == tokens(one) and not any(answer.logprobs for answer in one.answers)
    for answer, row in zip(told.answers, right, strict=True):
        assert answer.logprobs == pytest.approx(row, abs=1e-3) and max(row) <= 0
    wrong = list(tokens(one)[long])
    wrong[2] = (wrong[2] + 1) % 2048
    (row,), _ = them.score([(work.asks[long].ids, wrong)])
    assert row[2] > 0.5 and max(row[:2]) < 1e-3


def test_nobody_is_sent_early_and_nobody_is_known_before_the_end(us, them):
    work = Work("late", (Ask((9, 8), 3, 0.3), Ask((7,), 4), Ask((5, 6, 7), 1, 0.15)))
    for side in (us, them):
        run = side.run(work)
        assert [len(answer.times) for answer in run.answers] == [3, 4, 1]
        for ask, answer in zip(work.asks, run.answers, strict=True):
            # transformers' generate takes nobody in while it is at work, however long that is on a busy machine
            at_work = [other.ended for other in run.answers if side is them and other.sent < answer.sent]
            assert ask.at <= answer.sent < max([ask.at, *at_work]) + 0.2
            assert answer.sent < answer.times[0] <= answer.times[-1] == answer.ended <= run.seconds
        assert 0.3 < run.seconds < max(answer.ended for answer in run.answers) + 0.2


def test_a_command_that_fails_does_not_end_the_worker(us, them):
    with pytest.raises(SideFailed, match="lite_llm: the prompt has 200 tokens") as failed:
        us.run(Work("long", (Ask((5,), 3), Ask((5,) * 200, 3))))
    assert failed.value.kind == "usage" and failed.value.exit_code == 2 and not failed.value.hint, "a message says all"
    with pytest.raises(SideFailed, match="lite_llm does not score"):
        us.score([((5,), (6,))])
    with pytest.raises(SideFailed, match="do = 'sing'") as failed:
        us._ask({"do": "sing"}, 10)
    assert failed.value.kind == "bug" and failed.value.exit_code == 1 and "its log ends with" in failed.value.hint
    assert tokens(us.run(mixed(3))) == tokens(them.run(mixed(3)))


def test_an_answer_that_is_too_short_is_no_figure(us):
    with pytest.raises(SideFailed, match="request 0 has 68 tokens; 99 were asked for"):
        us.run(Work("too much", (Ask((5,) * 60, 99),)))


@pytest.mark.parametrize("kind, cudnn", [(theirs.Eager, False), (theirs.Compiled, True)])
def test_cudnn_computes_attention_where_all_lengths_are_one(kind, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert kind(Opening("transformers", limits=LIMITS)).info["cudnn"] is cudnn
        assert torch.backends.cuda.cudnn_sdp_enabled() is cudnn
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_what_is_not_compiled_on_a_cpu_says_so():
    info = theirs.Compiled(Opening("transformers-compile", limits=LIMITS)).info
    assert info["compile"] is None and "nothing is compiled on a CPU" in info["note"]


@pytest.mark.parametrize("kind", [theirs.Compiled, theirs.ContinuousBatching])
def test_the_others_of_transformers_say_the_same(kind, eager):
    side, work = kind(Opening("transformers", limits=LIMITS)), mixed(5)
    try:
        assert tokens(checked(side, work)) == tokens(checked(eager, work))
        late = mixed(5, gap=0.03)
        assert tokens(checked(side, late)) == tokens(checked(eager, work))
        sampled = mixed(3, temperature=0.8, top_k=9, top_p=0.9)
        assert len(tokens(checked(side, sampled))) == 3
        assert tokens(checked(side, work)) == tokens(checked(eager, work))  # and greedy is greedy again
    finally:
        side.close()


def test_sampling_is_that_of_the_work_and_not_of_the_checkpoint(eager):
    mine = ours.Ours(Opening("lite_llm", limits=LIMITS))
    greedy = checked(eager, mixed(3))
    for side in (eager, mine):
        hot = [checked(side, mixed(3, temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
        assert tokens(hot[0]) == tokens(hot[1]) != tokens(hot[2])
        assert tokens(checked(side, mixed(3, temperature=5.0, top_k=1))) == tokens(greedy)
    mine.close()


@pytest.mark.parametrize("seed", [0, 3])
def test_random_weights_are_the_same_on_both_sides(seed):
    fields = dict(model=Model(shape=SHAPE, seed=seed), limits=LIMITS)
    one, other = ours.Ours(Opening("lite_llm", **fields)), theirs.Eager(Opening("transformers", **fields))
    params, wanted = dict(one.llm.engine.model.named_parameters()), dict(other.model.named_parameters())
    assert torch.equal(params["blocks.1.mlp.down.weight"], wanted["model.layers.1.mlp.down_proj.weight"])
    work = mixed(4, vocab=512)
    run = checked(one, work)
    assert tokens(run) == tokens(checked(other, work))
    asks = [{"prompt": ask.ids, "answer": answer} for ask, answer in zip(work.asks, tokens(run), strict=True)]
    assert max(map(max, other.score(asks)["gaps"])) < 1e-3
    one.close()


def test_many_requests_are_forgotten_and_none_is_lost():
    side = ours.Ours(Opening("lite_llm", limits=Limits(max_requests=32, context=16), prefix_cache=True))
    run = checked(side, Work("many", tuple(Ask((5 + i % 7, 9, 11), 1 + i % 3) for i in range(150))))
    assert not side.llm.in_flight().requests and run.notes["slots_peak"] > 32 and run.notes["cached_tokens"] > 100
    side.close()


def test_requests_in_flight_are_told_seldom_and_telling_takes_no_time(monkeypatch):
    """Steps of a millisecond; whoever is told takes 20 of them."""
    now, told = [0.0], []
    monkeypatch.setattr(ours.time, "perf_counter", lambda: now[0])
    moment = InFlight((), 0, 0, 0, 0, 1, 0, SlotMap(1, (0,), (0,)))
    llm = SimpleNamespace(in_flight=lambda: moment)

    def tells(takes):
        def tell(progress):
            told.append(progress)
            now[0] += takes

        start, frames = now[0], ours._Frames(tell)
        told.clear()
        for _ in range(20_000):
            frames.update(llm)
            now[0] += 0.001
        return len(told), now[0] - start

    count, seconds = tells(0.0)
    assert count <= seconds / FRAME + 1
    count, seconds = tells(0.020)
    assert count > 5 and count * 0.020 <= SHARE * seconds + 0.020


def test_prompts_come_in_order_and_not_before_their_time():
    arrivals = Arrivals(Work("w", tuple(Ask((1,), 1, at) for at in (0.05, 0.0, 0.0, 9.0))))
    assert arrivals.take(1) == [1] and arrivals.take() == [2] and arrivals.take() == []
    assert 0.0 < arrivals.wait() <= 0.05
    time.sleep(arrivals.wait())
    assert arrivals.take() == [0] and arrivals and 8 < arrivals.wait() < 9


# ---- answers and workers that are wrong


RIGHT = Run(1.0, (Answer((3, 4), 0.5, (0.6, 0.7), 0.7),), 0, None, {})


@pytest.mark.parametrize("changes, message", [
    ({}, None),
    ({"times": ()}, None),
    ({"tokens": (3,)}, "1 tokens; 2 were asked for"),
    ({"tokens": (3, 4, 4)}, "3 tokens"),
    ({"tokens": (3, 10)}, "token id 10"),
    ({"tokens": (-1, 3)}, "token id -1"),
    ({"times": (0.6,)}, "1 times for 2 tokens"),
    ({"times": (0.7, 0.6)}, "backwards"),
    ({"times": (0.4, 0.7)}, "backwards"),
    ({"ended": 1.5}, "backwards"),
    ({"sent": 0.2}, "before 0.25 s"),
    ({"logprobs": (-1.0, -2.0)}, "2 log-probabilities; 0 were asked for"),
])  # fmt: skip
def test_a_fault_is_found(changes, message):
    run = dataclasses.replace(RIGHT, answers=(dataclasses.replace(RIGHT.answers[0], **changes),))
    found = fault(Work("w", (Ask((1,), 2, 0.25),)), run, 10)
    assert found is None if message is None else message in found
    told = dataclasses.replace(run, answers=(dataclasses.replace(run.answers[0], logprobs=(-1.0, float("nan"))),))
    work = Work("w", (Ask((1,), 2, 0.25),), logprobs=True)
    if message is None:
        assert "0 log-probabilities; 2 were asked for" in fault(work, run, 10)
        assert "a log-probability that is no number" in fault(work, told, 10)
    assert "1 answers to 2" in fault(Work("w", (Ask((1,), 2),) * 2), run, 10)


CHILD = "import subprocess, sys, time; c = subprocess.Popen(['sleep', '60']); print(c.pid, file=sys.stderr, flush=True)"


@pytest.mark.parametrize("does, message, kind", [
    ("sys.exit(3)", "ended during 'open' with exit code 3", "bug"),
    ("import os; os.kill(os.getpid(), 9)", "signal 9.*memory", "memory"),
    ("time.sleep(60)", "no answer to 'open' after 2 s", "bug"),
    ("input(); print('hello'); time.sleep(60)", "b'hello', which is no answer", "bug"),
    ("input(); print('[1, 2]', flush=True)", "which is no answer", "bug"),
    ("print('no end', end='', flush=True); time.sleep(60)", "no answer", "bug"),
])  # fmt: skip
def test_a_worker_that_goes_wrong_is_told_about_and_ended(does, message, kind):
    process = Process("x", [sys.executable, "-u", "-c", f"{CHILD}\n{does}"])
    with pytest.raises(SideFailed, match=f"(?s)x: .*{message}.*its log ends with") as failed:
        process.ask({"do": "open", "padding": "x" * 300_000}, 2.0)
    assert failed.value.kind == kind and not process.alive
    child = int(failed.value.hint.split()[-1])
    assert gone(process.id) and gone(child)
    with pytest.raises(SideFailed, match="its process ended"):
        process.ask({"do": "run"}, 1.0)
    process.kill()


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # whoever reaps it: not ours to wait for
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_a_worker_that_hears_no_more_ends_by_itself():
    process = Process("x", [sys.executable, "-m", "tools.benchmark.worker"])
    process._process.stdin.close()
    assert process._process.wait(30) == 0
    process.kill()


def test_a_side_that_cannot_be_opened_says_why_and_is_gone():
    with pytest.raises(UsageError, match="'llama.cpp' is not known; known: lite_llm"):
        Side("llama.cpp")
    with pytest.raises(UsageError, match="cannot be opened with.*colour"):
        Side("lite_llm", colour="red")
    with pytest.raises(UsageError, match="no variants"):
        Side("transformers", variant="a:b")
    with pytest.raises(UsageError, match="dtype = 'auto'"):
        Side("lite_llm", dtype="auto")
    why = sides.available()
    assert why["lite_llm"] is None and why["transformers"] is None
    if why["vllm"]:
        with pytest.raises(SideFailed, match="vllm cannot be imported") as failed:
            Side("vllm")
        assert failed.value.kind == "missing"


def test_an_error_of_a_library_is_one_line_that_ends_behind_a_word():
    said = worker._one_line(ValueError("Unrecognized configuration\n" + "NameConfig, " * 99))
    assert said.startswith("ValueError: Unrecognized configuration NameConfig,") and said.endswith("NameConfig, ...")
    assert len(said) < 330 and worker._one_line(ValueError("short")) == "ValueError: short"
    assert "x" * 300 in worker._one_line(ValueError("x" * 500))


@pytest.mark.parametrize("name, message", [
    ("nothing", "expected module:function"), ("no.such:thing", "No module named"), (f"{__name__}:no", "no attribute"),
    (f"{__name__}:no_dict", "gave a NoneType"),
])  # fmt: skip
def test_a_variant_that_cannot_be_used_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        ours.Ours(Opening("lite_llm", limits=LIMITS, variant=name))


def test_a_directory_of_the_user_is_found_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    with Side("lite_llm", model={"path": "model"}, limits=LIMITS) as side:
        assert side.vocab == 2048
    side.close()
    assert not side.process.alive
    with pytest.raises(LiteLLMError, match="its process ended"):
        side.run(mixed(1))
