"""Pictures in requests: as data URLs they are seen, and nothing else is opened."""

import base64
import io

import pytest

from tests.llm.llava import make, noise
from tests.server.conftest import Running, opened
from tests.server.test_refusals import refusal


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("server") / "llava")
    with opened(folder, kv_tokens=400, max_requests=4, step_tokens=64) as llm, Running(llm) as running:
        yield running


def asked(*urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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
    for url in ("data:image/png;base64,AAAA", "data:image/png;base64,%%", "data:,", "http://127.0.0.1/a.png",
                "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd"):  # fmt: skip
        error = refusal(seeing.chat(messages=asked(url)))
        assert "root:" not in error["message"]
    for key in ("path", "image"):
        message = {"role": "user", "content": [{"type": "image", key: "/etc/hostname"}]}
        assert "files of this machine" in refusal(seeing.chat(messages=[message]))["message"]
    many = asked(*[data_url(noise(8, 8))] * 100)
    refusal(seeing.chat(messages=many))
    seeing.settle()
