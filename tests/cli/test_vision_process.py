"""cli_llava.py as a process and in a terminal, with the bundled demo: what it answers, and group IMG-14."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lite_llm.cli import llava_main, transcript
from lite_llm.cli.app import PICTURES
from lite_llm.text.images import open_picture
from tests.cli.test_terminal import PROMPT, ROOT, Terminal
from tests.text.pictures import png

FIRST = "I see a green heart, a purple ring and a red triangle on a white background.\n"
WHAT = "What is in the picture?"


@pytest.fixture
def call(capsys, monkeypatch):
    """cli_llava.py in this process, with nothing on stdin: (exit code, stdout, stderr)."""

    def run(*argv: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code = llava_main(list(argv))
        return code, *capsys.readouterr()

    return run


def sample(number: int) -> str:
    return str(PICTURES.folder / f"picture-{number}.png")


def test_one_answer_on_stdout_and_the_receipt_beside_it(call):
    code, out, err = call("-p", WHAT)
    assert (code, out) == (0, FIRST) and "\x1b" not in err
    assert "demo/vision/picture-1.png: 480 x 480 -> 64 x 64 -> 64 tokens" in err and "▀" not in err
    assert call("-q", "-i", sample(1), "-p", "How many shapes are there?") == (0, "There are three shapes.\n", "")


@pytest.mark.parametrize("argv", [["-q"], ["-q", "--json"], []])
def test_an_answer_about_a_picture_that_nobody_named_says_which(argv, call):
    """However quiet: the user may have forgotten --image, and the answer looks like one about his own picture."""
    err = call(*argv, "-p", WHAT)[2]
    assert "no --image: the question is about the demo's own picture, demo/vision/picture-1.png\n" in err
    assert len(err.splitlines()) == 1 or "-q" not in argv
    assert "no --image" not in call(*argv, "-i", sample(1), "-p", WHAT)[2]


def test_pictures_where_a_text_or_a_model_belongs(capsys, monkeypatch):
    data = Path(sample(1)).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert llava_main(["-q", "-p", WHAT]) == 2
    assert "what is piped in is no text: pass pictures with --image FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        llava_main([sample(1)])
    assert "is a file; a model is a directory or a hub id, and pictures go with --image" in capsys.readouterr().err


def test_a_full_disk_is_said_once():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "cli_llava.py", "-q", "--json", "-i", sample(1), "-p", WHAT],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (6, "error: output: No space left on device: free some space\n")


def test_several_pictures_in_one_question(call):
    code, out, err = call("-i", sample(1), "-i", sample(2), "-p", "How many pictures are there?")
    assert (code, out) == (0, "There are two pictures.\n") and err.count("64 tokens") == 2
    assert call("-q", "-i", sample(2), "-i", sample(1), "-p", "What is in the second picture?")[1] == FIRST


def test_json_and_a_conversation_that_goes_on(call, tmp_path):
    path = str(tmp_path / "talk.jsonl")
    with open(path, "w"):
        pass
    code, out, _ = call("--json", "--resume", path, "-p", "Where is the heart?")
    document = json.loads(out)
    assert code == 0 and document["output"] == "At the top left." and document["model"] == "demo/vision"
    first = {"name": "demo/vision/picture-1.png", "stored_size": [480, 480], "notes": [], "seen": "64 x 64"}
    assert document["pictures"] == [first | {"tokens": 64, "kv_bytes": 64 * 5120}]
    code, out, err = call("--resume", path, "-p", "What colour is it?")
    assert (code, out) == (0, "It is green.\n") and "480 x 480" not in err  # the file brings its picture along
    Image.new("F", (300, 20), 0.5).save(tmp_path / "wide.tif")
    code, out, err = call("--json", "--resume", path, "-i", str(tmp_path / "wide.tif"), "-p", WHAT)
    shown = json.loads(out)["pictures"]
    assert [one["name"] for one in shown] == ["demo/vision/picture-1.png", "wide.tif"]
    assert shown[1]["seen"] == "squashed to 64 x 64" and shown[1]["notes"] == [
        "values from 0 to 1 taken as black to white"
    ]
    assert "wide.tif: 300 x 20 (values from 0 to 1 taken as black to white) -> squashed to 64 x 64" in err


@pytest.fixture
def odd_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    with open(sample(1), "rb") as file:
        (tmp_path / "cut.png").write_bytes(file.read()[:700])
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    (tmp_path / "closed.png").write_bytes(b"x")
    (tmp_path / "closed.png").chmod(0)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["missing.png", ".", "fifo.png", "/dev/zero", "text.png", "empty.png", "cut.png", "bomb.png", "closed.png",
     "fehlt ünï 東京.png", "x" * 5000, "http://127.0.0.1/a.png", "http://[::1]:8000/a.png", "file:///etc/hostname",
     "data:image/png;base64,AAAA", "ftp://example.com/a.png"],
)  # fmt: skip
def test_a_bad_picture_is_one_line_before_any_model_is_opened(name, call, odd_files):
    """IMG-14, IMG-01: no hang, no warning, exit code 2; the model does not even exist."""
    began = time.monotonic()
    source = name if ":" in name or name.startswith("/") else str(odd_files / name)
    code, out, err = call("-m", "/nowhere", "-i", sample(1), "-i", source, "-p", WHAT)
    assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err), err
    assert len(err) < 300 and "0x" not in err and time.monotonic() - began < 5


def test_names_of_any_letters_and_warnings_of_none(tmp_path):
    """What Pillow warns of (EXIF data cut short) does not reach the screen."""
    path = tmp_path / "ünï cödé 東京.jpg"
    Image.new("RGB", (50, 50)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    done = subprocess.run(
        [sys.executable, "cli_llava.py", "-i", str(path), "-p", WHAT], cwd=ROOT, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith(b"I see"), done.stderr
    assert path.name in done.stderr.decode() and not re.search(b"Warn|EXIF|torchvision", done.stderr)


def test_a_text_model_takes_no_pictures(call, tmp_path):
    """Refused by its config: there are no weights that could be loaded first."""
    path, model = tmp_path / "talk.jsonl", tmp_path / "chat"
    shutil.copytree(PICTURES.folder.parent / "chat", model, ignore=shutil.ignore_patterns("*.safetensors"))
    question = transcript.with_pictures(WHAT, [open_picture(sample(1))])
    transcript.save(path, [question, {"role": "assistant", "content": "A heart."}])
    for argv in (["-i", sample(1)], ["--resume", str(path)]):
        code, out, err = call("-q", "-m", str(model), *argv, "-p", WHAT)
        assert (code, out) == (2, "") and err.endswith("takes text only: load a vision model, or send no pictures\n")
    assert call("-q", "-m", str(model), "-p", WHAT)[0] == 5


@pytest.mark.parametrize("script, seen", [("cli.py", False), ("cli_llava.py", True)])
def test_before_the_install_the_missing_packages_come_first(script, seen):
    """Without a terminal and without a prompt, as in a first try from a script; -S hides what is installed."""
    done = subprocess.run(
        [sys.executable, "-S", script], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    packages = "torch, transformers, safetensors, numpy" + ", PIL" * seen
    assert done.stderr == f"error: not installed: {packages}: pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout) == (3, "")


def kill_decoder(terminal: Terminal, folder) -> int:
    """IMG-03: while it is at a large picture, as a fault in it would."""
    (folder / "large.png").write_bytes(png(8000, 8000, 8, 2, bytes(8000 * 24001)))
    children = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children")
    (child,) = map(int, children.read_text().split())
    terminal.send(f"/image {folder / 'large.png'}\r")
    end = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "R":
        assert time.monotonic() < end, "it does not begin"
    os.kill(child, signal.SIGSEGV)
    return child


def test_a_session(tmp_path):
    with Terminal("cli_llava.py", home=tmp_path, COLORTERM="truecolor") as terminal:
        assert "▀" in terminal.wait("64 tokens") and "38;2;" in terminal.seen.decode()
        terminal.wait(PROMPT)
        terminal.send(f"{WHAT}\r")
        terminal.wait("green heart, a purple ring and a red triangle")
        terminal.wait(PROMPT)
        terminal.send("Where is the heart?\r")
        terminal.wait("At the top left")
        # the picture's 64 tokens and all around them are in the cache
        assert int(re.search(r"\((\d+) cached", terminal.wait("cached"))[1]) > 80
        terminal.wait(PROMPT)
        hurt = kill_decoder(terminal, tmp_path)
        terminal.wait(r"\(SIGSEGV\)")
        assert not os.path.exists(f"/proc/{hurt}")
        terminal.wait(PROMPT)
        terminal.send("/image /nowhere.png\r")
        terminal.wait("there is no such file")
        terminal.wait(PROMPT)
        terminal.send(f"/image {sample(2)}\r")
        terminal.wait("picture-2.png: .*?64 tokens")
        terminal.wait(PROMPT)
        terminal.send("How many pictures are there?\r")
        terminal.wait("There are two pictures")
        terminal.wait(PROMPT)
        terminal.send("/clear\r")
        terminal.wait("cleared, the pictures too")
        terminal.wait(PROMPT)
        terminal.send("What do you see?\r")
        terminal.wait("I see no picture")
        terminal.wait(PROMPT)
        terminal.send("\x04")
        assert terminal.exit_code() == 0


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_session_on_a_plain_terminal(env, tmp_path):
    with Terminal("cli_llava.py", home=tmp_path, **env) as terminal:
        shown = terminal.wait("64 tokens")
        assert not re.search("[▀▄]|38;", shown)  # █ is the loading bar's
        terminal.wait(PROMPT)
        terminal.send(f"{WHAT}\r")
        terminal.wait("green heart")
        terminal.wait(PROMPT)
        terminal.send("\x04")
        assert terminal.exit_code() == 0
