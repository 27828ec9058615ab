"""Sides that are servers: one client for ours and vLLM's, which is not installed here: ours answers in its place."""

import asyncio
import contextlib
import importlib
import json
import os
import re
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lite_llm.errors import LiteLLMError, UsageError
from lite_llm.text import Tokenizer
from tests.tools.test_benchmark_sides import LIMITS, SHAPE, gone, mixed, tokens
from tools import make_checkpoint
from tools.benchmark import main as program
from tools.benchmark import served, streams
from tools.benchmark.record import load
from tools.benchmark.sides import CLASSES, Limits, Model, Opening, Side, SideFailed
from tools.benchmark.work import Ask, Work

ONLINE = ["online", "--device", "cpu", "--input", "4-12", "--output", "3-9", "--requests", "6", "--rounds", "2"]
ONLINE += ["--arrivals", "poisson:20", "--ttft", "30", "--tpot", "30"]


@pytest.fixture(scope="module")
def asked():
    with Side("lite_llm", limits=LIMITS, http=True) as side:
        yield side


# ---- our own server


def test_a_server_says_the_tokens_of_the_engine(asked):
    work = mixed()
    asked.warm(work)
    found = asked.run(work)
    with Side("lite_llm", limits=LIMITS) as engine:
        assert tokens(found) == tokens(engine.run(work)) and asked.special == engine.special
        told, right = ([a.logprobs for a in side.run(replace(work, logprobs=True)).answers] for side in (asked, engine))
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(told, right, strict=True)) and all(told)
        hot = mixed(4, temperature=2.0, top_k=50, top_p=0.9, seed=7)
        assert tokens(asked.run(hot)) == tokens(engine.run(hot)) != tokens(asked.run(mixed(4)))
    assert all(len(answer.times) == len(answer.tokens) for answer in found.answers) and found.compiles == 0
    assert asked.info["note"].startswith("asked over HTTP") and asked.info["options"]["context"] == LIMITS.context


def test_nobody_is_sent_early_and_tokens_are_known_as_they_come(asked):
    run = asked.run(Work("late", (Ask((9, 8), 30, 0.3), Ask((7,), 4), Ask((5, 6, 7), 1, 0.15))))
    for at, answer in zip((0.3, 0.0, 0.15), run.answers, strict=True):
        assert at <= answer.sent < at + 0.2 and answer.sent < answer.times[0]
    assert len(set(run.answers[0].times)) > 5, "all came at the end"


def test_a_request_that_is_refused_is_said_and_the_server_goes_on(asked):
    with pytest.raises(SideFailed, match="lite_llm: request 1: the server answered 400: the prompt has 200 tokens"):
        asked.run(Work("long", (Ask((5,), 3), Ask((5,) * 200, 3))))
    with pytest.raises(SideFailed, match="a server does not score"):
        asked.score([((5,), (6,))])
    assert len(asked.run(mixed(3)).answers) == 3


def test_a_shape_is_written_down_with_a_word_for_each_id():
    work = mixed(4, vocab=512)
    fields = dict(model=Model(shape=SHAPE, seed=3), limits=LIMITS)
    with Side("lite_llm", http=True, **fields) as asked, Side("lite_llm", **fields) as engine:
        assert tokens(asked.run(work)) == tokens(engine.run(work)) and asked.vocab == engine.vocab


def test_an_answer_of_any_ids_is_text(tmp_path, monkeypatch):
    """What a tokenizer does not know, our engine does not draw, and other servers may not survive."""
    train = make_checkpoint.train_tokenizer
    monkeypatch.setattr(make_checkpoint, "train_tokenizer", lambda vocab, special: train(vocab - 100, special))
    found = Tokenizer.load(served.checkpoint(Opening("lite_llm", model=Model(shape=SHAPE)), tmp_path / "model"))
    assert found.vocab_size == 512 and found.decode([411, 412, 511]).split()[-2:] == ["w412", "w511"]
    known = train(412, [])
    assert found.decode(found.encode("w412 w511 Paris", bos=False)) == "w412 w511 Paris"
    assert max(found.encode("w412 w511 Paris", bos=False)) < 412 == known.get_vocab_size()


def test_kernels_that_our_server_compiled_inside_the_timing_are_counted(monkeypatch):
    told = 'lite_llm_compiles_total{how="compiled"} %d.0\nlite_llm_compiles_total{how="loaded"} 1.0\n# HELP x\n'
    side, answers = object.__new__(served.Ours), iter([told % 2, told % 5, "nothing"])
    side._port, side._model = 0, "m"
    monkeypatch.setattr(side, "get", lambda path: (200, next(answers).encode()))

    async def answer(*_):
        return 1.0, ()

    monkeypatch.setattr(streams, "answer", answer)
    assert side.run(Work("w", ())).compiles == 3
    with pytest.raises(LiteLLMError, match="without compiles_total"):
        side.compiles()


@pytest.mark.parametrize("fields, message", [
    ({"side": "transformers"}, "transformers has no server"), ({"side": "lite_llm", "variant": "a:b"}, "a variant has"),
])  # fmt: skip
def test_what_has_no_server(fields, message):
    with pytest.raises(UsageError, match=message):
        Opening(http=True, **fields)


@pytest.mark.parametrize("how", ["the benchmark is killed", "Ctrl-C"])
def test_a_server_ends_with_whoever_asked_for_it(how):
    side = Side("lite_llm", limits=LIMITS, http=True)
    (server,) = children(side.process.id)
    engines = children(server)
    assert engines
    if how == "Ctrl-C":
        side.process.kill()  # what `ask` does with any exception
    else:
        side.process._process.stdin.close()
        assert side.process._process.wait(30) == 0
    assert gone(server) and all(map(gone, engines))
    side.process.kill()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


# ---- vLLM's, played by ours

STUB = {
    "__init__.py": "__version__ = '0.0.stub'\nSamplingParams = LLM = object\n",
    "sampling_params.py": "class RequestOutputKind:\n    DELTA = 1\n",
    "entrypoints/__init__.py": "",
    "entrypoints/cli/__init__.py": "",
    "entrypoints/cli/main.py": """\
        import json, os, sys
        assert sys.argv[1] == "serve", sys.argv
        told = dict(word.removeprefix("--").split("=") for word in sys.argv[3:] if "=" in word)
        assert told["host"] == "127.0.0.1" and told["generation-config"] == "vllm", told
        assert {"--no-enable-prefix-caching", "--disable-log-stats"} <= set(sys.argv), sys.argv
        how = os.environ["STUB"]
        if how == "dies":
            print("the root cause", file=sys.stderr)
            sys.exit(3)
        from lite_llm.server import answers
        if how == "no ids":
            answers.Document._add_ids = lambda *_: None
        if how == "dies later":
            answers.Document.events = lambda *_: os._exit(7)
        from tools.benchmark import serve
        blocks = int(told["num-gpu-blocks-override"]) * int(told["block-size"])
        options = {"device": "cpu", "dtype": told["dtype"], "kv_tokens": blocks, "prefix_cache": False}
        options |= {"max_requests": int(told["max-num-seqs"]), "context": int(told["max-model-len"])}
        sys.exit(serve.main(json.dumps({"model": sys.argv[2], "port": int(told["port"]), "options": options})))
    """,
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    for name, text in STUB.items():
        path = tmp_path / "stub" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path / "stub")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stub"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("tools.benchmark.bench.available", lambda device: dict.fromkeys(CLASSES))
    return lambda how: monkeypatch.setenv("STUB", how)


def test_online_against_vllm_asks_two_servers(vllm, tmp_path, capsys):
    vllm("serves")
    out = tmp_path / "a.json"
    code, seen = program.main([*ONLINE, "--against", "vllm", "--json", str(out)]), capsys.readouterr()
    assert code == 0, seen
    record = load(out)
    assert [row.side for row in record.rows] == ["lite_llm", "vllm"]
    assert [one.side for one in record.comparisons(record.rows[0])] == ["vllm"]
    assert [(gate["wrong"], gate["worst_gap_nats"] < 1e-3) for gate in record.gates] == [(None, True)] * 3
    assert record.gates[0]["side"] == "lite_llm" and record.gates[0]["worst_logprob_nats"] < 1e-3
    assert [row.compiles for row in record.rows] == [0, None]
    for row in record.rows:
        assert row.refused is None and row.note.startswith("asked over HTTP") and row.runs == 2
        assert row.work["over_http"] == ["lite_llm", "vllm"]
        figures = row.figures
        assert 0 < figures["ttft_ms"]["p50"]["median"] <= figures["e2e_ms"]["p50"]["median"]
        assert figures["tpot_ms"]["p99"]["median"] > 0 and figures["goodput_per_second"]["median"] > 0
    infos = record.arguments["sides"]
    assert infos["vllm"]["vllm"] == "0.0.stub" and infos["vllm"]["options"]["block_size"] == 16
    assert str(tmp_path) not in out.read_text() and "vllm: asked over HTTP" in seen.out


def test_a_server_that_dies_is_left_out_with_the_end_of_its_log(vllm, tmp_path, capfd):
    vllm("dies")
    out = tmp_path / "a.json"
    assert program.main([*ONLINE, "--against", "vllm", "--json", str(out)]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert re.search("left out vllm: vllm: its server ended with exit code 3: its log ends with .*the root cause", said)
    assert [row.side for row in load(out).rows] == ["lite_llm"] and not load(out).rows[0].against


@pytest.mark.parametrize("how, message", [
    ("dies later", "vllm: its server ended with exit code 7"),
    ("no ids", "vllm: request 0: the server gives no token ids: it does not know return_token_ids"),
])  # fmt: skip
def test_a_server_that_is_of_no_use_is_no_figure(vllm, how, message):
    vllm(how)
    with Side("vllm", limits=Limits(4, 64, 512), http=True) as side:
        servers = children(side.process.id)
        with pytest.raises(SideFailed, match=message):
            side.warm(mixed(1))
    assert servers and all(map(gone, servers))


def test_what_vllm_is_told_on_a_gpu(vllm, monkeypatch):
    """Others have a part of the memory: it would not start if it wanted more than is free."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (56 << 30, 80 << 30))
    module = importlib.import_module("tools.benchmark.vllm")
    limits = Limits(max_requests=8, context=640, kv_tokens=5000)
    found = module._options(Opening("vllm", dtype="bfloat16", device="cuda", limits=limits))
    assert (found["num_gpu_blocks_override"], found["block_size"], found["max_num_seqs"]) == (313, 16, 8)
    assert found["gpu_memory_utilization"] == 0.665 and "max_num_batched_tokens" not in found
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (79 << 30, 80 << 30))
    assert module._options(Opening("vllm", device="cuda"))["gpu_memory_utilization"] == 0.9
    monkeypatch.delitem(sys.modules, "tools.benchmark.vllm")


def test_other_modes_and_opponents_step_engines():
    args = program.arguments.parse([*ONLINE, "--against", "transformers"])
    assert not program._over_http(args) and program._over_http(program.arguments.parse([*ONLINE, "--against", "vllm"]))
    assert not program._over_http(program.arguments.parse(["throughput", "--against", "vllm"]))


# ---- the client


def chunk(*ids: int, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": "é" * len(ids), "token_ids": ids, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
REFUSED = b"HTTP/1.1 429 Busy\r\ncontent-length: %d\r\n\r\n%s"
BUSY = b'{"error": {"message": "too many answers are running"}}'


def in_chunks(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def run(said: bytes, new: int = 3, piece: int = 1 << 16, count: int = 1):
    """What the client makes of a server that says this to each request, in pieces of so many bytes."""
    heard = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        heard.append(json.loads(await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))))
        with contextlib.suppress(OSError):
            for start in range(0, len(said), piece):
                writer.write(said[start : start + piece])
                await writer.drain()
                await asyncio.sleep(0)
            writer.close()

    async def both():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await streams.answer(port, "m", Work("w", tuple(Ask((4, 5 + i), new) for i in range(count))))

    return asyncio.run(both()), heard


@pytest.mark.parametrize("size, piece", [(1 << 16, 1 << 16), (7, 1 << 16), (1 << 16, 5), (3, 1)])
def test_events_are_whole_however_they_are_cut(size, piece):
    body = b": a comment\n\n" + chunk(7) + chunk() + chunk(8, 9) + chunk(reason="length") + DONE
    (seconds, answers), heard = run(in_chunks(body, size), piece=piece, count=3)
    assert [answer.tokens for answer in answers] == [(7, 8, 9)] * 3
    assert all(0 <= a.sent < a.times[0] <= a.times[1] == a.times[2] == a.ended <= seconds for a in answers)
    wanted = {"prompt": [4, 6], "max_tokens": 3, "ignore_eos": True, "return_token_ids": True, "seed": 1, "top_k": -1}
    (mine,) = [one for one in heard if one["prompt"] == [4, 6]]
    assert wanted.items() <= mine.items() and (mine["temperature"], mine["min_p"]) == (0.0, 0.0)


@pytest.mark.parametrize("said, message", [
    (REFUSED % (len(BUSY), BUSY), "request 0: the server answered 429: too many answers are running"),
    (REFUSED % (4, b"oh! "), "the server answered 429: 'oh! '"),
    (in_chunks(chunk(7) + b"data: " + BUSY + b"\n\n" + DONE, 99), "the server ended it: too many answers"),
    (in_chunks(chunk(7), 99)[:-5], "the connection ended after 1 tokens"),
    (in_chunks(chunk(7), 99), "the connection ended after 1 tokens"),
    (in_chunks(chunk(7, 8, reason="stop") + DONE, 99), "it ended as 'stop' after 2 tokens, not by length"),
    (in_chunks(b'data: {"choices": [{"text": "x"}]}\n\n' + DONE, 99), "gives no token ids"),
    (in_chunks(b"data: {]\n\n", 99), "what cannot be read"), (in_chunks(b"data: []\n\n", 99), "what cannot be read"),
    (b"220 smtp.example.org\r\n", "what cannot be read"), (b"", "the connection ended after 0 tokens"),
])  # fmt: skip
def test_what_is_no_answer_is_said(said, message):
    with pytest.raises(streams.StreamFailed, match=re.escape(message)):
        run(said)


def test_the_first_failure_ends_the_rest():
    """Of a work that would take long."""
    work = Work("w", (Ask((4,), 3), Ask((4,), 3, 60.0)))
    start = time.monotonic()
    with pytest.raises(streams.StreamFailed, match="request 0: the server cannot be reached"):
        asyncio.run(streams.answer(served._free_port(), "m", work))
    assert time.monotonic() - start < 10
