"""The chat with a real server of ours: the same answers as with the model here, in a terminal too, and no torch."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from lite_llm.cli import chat_main, llava_main
from lite_llm.engine.request import SamplingParams
from tests.cli.test_terminal import Terminal
from tests.llm.llava import make, noise
from tests.server.conftest import PARIS, Running, opened

ROOT = Path(__file__).parents[2]
FRANCE = "What is the capital of France?"
PROMPT = r"\[[\d.]+k/2k\]"
NO_TORCH = """
import sys
from lite_llm.cli import chat_main
code = chat_main(sys.argv[1:])
print(sorted(sys.modules.keys() & {"torch", "numpy", "transformers", "httpx", "PIL"}), file=sys.stderr)
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def running():
    with opened() as llm, Running(llm, api_key="secret") as found:
        yield found


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("LITE_LLM_API_KEY", "secret")
    monkeypatch.setattr(sys, "stdin", None)
    yield running
    running.settle()


def test_one_answer_and_its_document(server, capsys):
    assert chat_main(["--connect", server.url, "-p", FRANCE]) == 0
    out, err = capsys.readouterr()
    assert out == PARIS + "\n" and "model demo/chat, context 2,048 tokens" in err and "prompt tokens (" in err
    wishes = ["--temperature", "0.8", "--seed", "5", "--max-tokens", "12"]
    assert chat_main(["--connect", server.url, "-p", "Count from 1 to 20.", "--json", *wishes]) == 0
    document = json.loads(capsys.readouterr().out)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12)
    here = server.llm.chat([{"role": "user", "content": "Count from 1 to 20."}], params)
    assert document["output"] == here.text and document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 12 and document["params"]["seed"] == 5
    assert document["usage"]["prompt_tokens"] == here.usage.prompt_tokens and document["model"] == "demo/chat"


def test_errors_of_a_real_server(server, capsys, monkeypatch):
    assert chat_main(["--connect", server.url, "-p", "word " * 5000]) == 2
    assert "2048" in capsys.readouterr().err
    monkeypatch.setenv("LITE_LLM_API_KEY", "wrong")
    assert chat_main(["--connect", server.url, "-p", FRANCE]) == 6
    assert "401: the API key is missing or wrong: set LITE_LLM_API_KEY" in capsys.readouterr().err


def test_it_starts_without_torch(server):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "--connect", server.url, "-q", "-p", FRANCE],
        cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, PARIS + "\n", "[]\n")
    assert time.perf_counter() - start < 5  # 0.3 s on an idle machine


def test_a_dialogue_in_a_terminal(server, tmp_path, monkeypatch):
    step = server.llm.step
    monkeypatch.setattr(server.llm, "step", lambda: (time.sleep(0.03), step())[1])  # it counts to 20 in half a second
    with Terminal("cli.py", "--connect", server.url, home=tmp_path) as terminal:
        terminal.wait(PROMPT)
        terminal.send("Count from 1 to 20.\r")
        terminal.wait("1, 2, 3, ")
        terminal.send("\x03")
        said = terminal.wait("stopped; the part said so far is kept.*?" + PROMPT)
        assert "18, 19" not in said
        server.settle()  # nobody computes what nobody reads
        terminal.send("My name is Ada.\r")
        terminal.wait(r"Ada.*?prompt tokens.*?" + PROMPT)
        terminal.send("What is my name?\r")
        assert int(re.search(r"\((\d+) cached", terminal.wait(r"Ada.*?cached"))[1]) > 0
        terminal.wait(PROMPT)
        terminal.send("/undo\r")
        terminal.wait("taken back.*?" + PROMPT)
        terminal.send("/why\r")
        terminal.wait("the model runs in a server")
        terminal.send("/top\r")
        terminal.wait("0 running.*?q or Ctrl-C leaves")
        with ThreadPoolExecutor(1) as other:  # its request is seen while it runs, and what follows it
            asked = other.submit(another, server)
            terminal.wait("1 running.*?decoding.*?0 running")
            assert asked.result().completion_tokens == 24
        terminal.send("q")
        terminal.wait(PROMPT)
        terminal.send("/top\r")
        terminal.wait("0 running")
        terminal.send("\x03")
        terminal.wait(PROMPT)
        terminal.send("/exit\r")
        assert terminal.exit_code() == 0
    assert b"Traceback" not in terminal.seen


def another(server):
    """What a stranger's request used."""
    client = server.openai.with_options(api_key="secret")
    wish = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="demo/chat", prompt="Hello", **wish).usage


def test_pictures_go_as_data_urls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.delenv("LITE_LLM_API_KEY", raising=False)
    picture: Image.Image = noise(40, 30)
    picture.save(tmp_path / "it.png")
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    with opened(make(tmp_path / "llava"), kv_tokens=400, max_requests=4, step_tokens=64) as llm:
        here = llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=8))
        argv = ["-i", str(tmp_path / "it.png"), "--temperature", "0", "--max-tokens", "8", "-p", "What is it?"]
        with Running(llm) as running:
            assert llava_main(["--connect", running.url, "--json", *argv]) == 0
            out, err = capsys.readouterr()
    assert json.loads(out)["output"] == here.text and json.loads(out)["usage"]["prompt_tokens"] > 16
    assert "it.png: 40 x 30, sent as 0.0 MB of PNG" in err
    (shown,) = json.loads(out)["pictures"]
    assert shown["name"] == "it.png" and shown["size"] == [40, 30] and 1000 < shown["png_bytes"] < 5000
