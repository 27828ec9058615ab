"""Pictures in requests: as data URLs they are seen, and nothing else is opened."""

import base64
import io
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lite_llm.server.remote import RemoteLLM
from lite_llm.text.decoders import Decoders
from lite_llm.text.fetch import Fetcher
from tests.llm.llava import make, noise
from tests.server.conftest import Running, opened
from tests.server.test_refusals import refusal
from tests.text.pictures import encoded, png
from tests.text.test_decoders import state
from tests.text.test_fetch import HEAD, stall, web


@pytest.fixture(scope="module")
def site():
    """A picture at /a.png; /b.png never comes."""
    found = web(HEAD + b"\r\n" + encoded(noise(40, 30)))
    found.pages["example.com/b.png"] = stall(HEAD + b"\r\n" + encoded(noise(40, 30))[:100])
    return found


@pytest.fixture(scope="module")
def decoders():
    with Decoders(seconds=5) as found:
        yield found


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, decoders, site):
    folder = make(tmp_path_factory.mktemp("server") / "llava")
    options = dict(kv_tokens=400, max_requests=4, step_tokens=64, decode=decoders.decode)
    options["fetcher"] = Fetcher(resolve=site.resolve, dial=site.dial)
    with opened(folder, RemoteLLM, **options) as llm, Running(llm, max_body=8 << 20) as running:
        yield running


def asked(*urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_whether_a_model_takes_pictures_is_told(seeing, server):
    for running, found in ((seeing, ["text", "image"]), (server, ["text"])):
        assert httpx.get(running.url + "/v1/models").json()["data"][0]["input_modalities"] == found


def test_a_picture_is_seen(seeing):
    """A random model says something else of each picture."""
    wishes = dict(temperature=0, max_tokens=8, ignore_eos=True)
    texts = []
    for picture in (noise(40, 30), noise(30, 40), noise(40, 30)):
        answer = seeing.chat(messages=asked(data_url(picture)), **wishes).json()
        assert answer["usage"]["prompt_tokens"] == len(seeing.llm.read(asked(data_url(picture))).ids) > 16
        texts.append(answer["choices"][0]["message"]["content"])
    seeing.settle()
    assert texts[0] == texts[2] != texts[1]


def test_what_is_no_picture_and_what_is_elsewhere_is_refused(seeing):
    for url in ("data:image/png;base64,AAAA", "data:image/png;base64,%%", "data:,", "http://127.0.0.1:8000/a.png",
                "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd"):  # fmt: skip
        error = refusal(seeing.chat(messages=asked(url)))
        assert "root:" not in error["message"] and error["param"].startswith("messages")
    for key in ("path", "image"):
        message = {"role": "user", "content": [{"type": "image", key: "/etc/hostname"}]}
        assert "files of this machine" in refusal(seeing.chat(messages=[message]))["message"]
    many = asked(*[data_url(noise(8, 8))] * 100)
    assert refusal(seeing.chat(messages=many))["param"] == "messages"
    seeing.settle()


def test_a_client_that_leaves_takes_its_download_along(seeing, site):
    """IMG-11, IMG-12: downloads hold up nobody else, and none goes on for nobody."""
    wishes = dict(temperature=0, max_tokens=8, ignore_eos=True)
    want = seeing.chat(messages=asked(data_url(noise(40, 30))), **wishes).json()["choices"]
    assert seeing.chat(messages=asked("http://example.com/a.png"), **wishes).json()["choices"] == want
    before = len(site.sockets)
    with ThreadPoolExecutor(3) as threads:
        body = {"messages": asked("http://example.com/b.png")}
        leaving = [threads.submit(httpx.post, f"{seeing.url}/v1/chat/completions", json=body, timeout=1) for _ in "abc"]
        seeing.until(lambda: len(site.sockets) == before + 3)
        for _ in range(10):
            start = time.monotonic()
            assert httpx.get(f"{seeing.url}/health").status_code == 200 and time.monotonic() - start < 0.5
        assert all(isinstance(one.exception(), httpx.ReadTimeout) for one in leaving)
    seeing.until(lambda: all(one.fileno() < 0 for one in site.sockets), 1.0)
    seeing.settle()


def png_url(width, height) -> str:
    """Black, one bit a pixel: as little to send for its size as can be."""

    return (
        "data:image/png;base64,"
        + base64.b64encode(png(width, height, 1, 0, bytes(height * (1 + (width + 7) // 8)))).decode()
    )


def test_small_requests_do_not_become_gigabytes(seeing):
    """Each picture is within its limit; together they are not."""
    assert "pixels; at most" in refusal(seeing.chat(messages=asked(png_url(20_000, 20_000))))["message"]
    error = refusal(seeing.chat(messages=asked(*[png_url(8000, 8000)] * 20)))
    assert "128,000,000 pixels together" in error["message"]
    seeing.settle()


@pytest.mark.parametrize("way, said", [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGSTOP, "takes more than 5 s")])
def test_a_decoder_that_dies_or_hangs_takes_one_request_with_it(seeing, decoders, caplog, way, said):
    """FLT-05. Meanwhile others are answered, with pictures and without."""
    wishes = dict(temperature=0, max_tokens=8, ignore_eos=True)
    want = seeing.chat(messages=asked(data_url(noise(40, 30))), **wishes).json()["choices"]
    heard = []
    seeing.until(lambda: decoders._idle)
    victim = decoders._idle[-1].process  # the next one that is asked
    thread = threading.Thread(target=lambda: heard.append(seeing.chat(messages=asked(png_url(8000, 8000)))))
    with caplog.at_level(logging.WARNING, "lite_llm"):
        thread.start()
        seeing.until(lambda: state(victim.pid) == "R")
        os.kill(victim.pid, way)
        others = [seeing.chat(messages=asked(data_url(noise(40, 30))), **wishes) for _ in range(3)]
        assert seeing.chat(max_tokens=2).status_code == 200
        thread.join(20)
    error = refusal(heard[0])
    assert said in error["message"] and "data URL" in error["message"] and "\n" not in error["message"]
    assert [answer.json()["choices"] == want for answer in others] == [True] * 3
    assert said in caplog.text and "Traceback" not in caplog.text
    assert victim.poll() is not None
    seeing.settle()
