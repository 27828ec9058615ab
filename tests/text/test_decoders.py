"""Pictures decoded in child processes (IMG-03): the same pictures, and whatever ends a child ends nothing else."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lite_llm.errors import EnvironmentProblem, UsageError
from lite_llm.text import decoders as module
from lite_llm.text.decoders import DecoderEnded, Decoders
from lite_llm.text.headers import MOST_PIXELS
from lite_llm.text.images import open_picture
from tests.text.pictures import FORMATS, QUIET, check_message, encoded, photo, pixels, png
from tests.text.test_bad_images import BOMBS, CUT, mutations

LARGEST = png(8000, 8000, 8, 2, bytes(8000 * 24001))  # takes half a second


@pytest.fixture(scope="module")
def shared():
    with Decoders() as decoders:
        yield decoders


@pytest.fixture
def fresh():
    with Decoders() as decoders:
        open_picture(encoded(photo()), decode=decoders.decode)
        yield decoders


def child_of(decoders) -> subprocess.Popen:
    (child,) = decoders._children
    return child.process


def running(pid: int) -> bool:
    """Not even a zombie is left."""
    return Path(f"/proc/{pid}").exists()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def check_works(decoders) -> None:
    picture = open_picture(encoded(photo(31, 17)), decode=decoders.decode)
    assert (pixels(picture) == np.asarray(photo(31, 17))).all()


# ---- the same as here


@pytest.mark.parametrize("kind", FORMATS)
def test_a_child_sees_what_this_process_sees(shared, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(40, 30), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    here, there = open_picture(data), open_picture(data, decode=shared.decode)
    assert (pixels(here) == pixels(there)).all() and here.image.mode == there.image.mode
    for fact in ("size", "digest", "stored_size", "stored_mode", "notes"):
        assert getattr(here, fact) == getattr(there, fact)


def test_notes_come_along(shared):
    frames = [photo(8, 8, "P"), photo(8, 8, "P").rotate(90)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(data, decode=shared.decode).notes == ("first of 2 frames",)


@pytest.mark.parametrize("name", ["png 20000", "webp lossless", "tiff most"])
def test_a_refusal_is_that_of_this_process(shared, name):
    data = BOMBS[name]()
    with pytest.raises(UsageError) as here:
        open_picture(data)
    with pytest.raises(UsageError) as there:
        open_picture(data, decode=shared.decode)
    assert str(here.value) == str(there.value) and here.value.hint == there.value.hint


@pytest.mark.parametrize("name", CUT)
@QUIET
def test_mutated_files_are_refused_or_pictures(shared, name):
    for data in mutations(CUT[name], 60, seed=29):
        try:
            picture = open_picture(data, decode=shared.decode)
        except UsageError as error:
            check_message(error)
        else:
            assert picture.image.mode == "RGB" and pixels(picture).shape == (*picture.size[::-1], 3)


def test_threads_get_their_own_pictures_and_no_more_children_than_they_are(shared):
    sizes = [(20 + n, 90 - n) for n in range(60)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda size: open_picture(encoded(photo(*size)), decode=shared.decode), sizes))
    assert [picture.size for picture in found] == sizes
    assert all((pixels(picture) == np.asarray(photo(*picture.size))).all() for picture in found)
    assert len(shared._children) <= 4


def test_a_child_is_small_and_its_memory_has_a_limit(fresh):
    pid = child_of(fresh).pid
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert (
        f"Max address space         {2 << 30}" in limits
        and "Max core file size        0                    0 " in limits
    )


def test_a_child_that_waits_for_the_next_picture_is_not_late():
    with Decoders(seconds=0.3) as decoders:
        check_works(decoders)
        time.sleep(1.5)  # longer than a child lives that hangs
        assert child_of(decoders).poll() is None


# ---- what ends a child


def test_a_crash_is_the_pictures_fault_and_nobody_elses(fresh):
    first = child_of(fresh)
    thread = ThreadPoolExecutor(1)
    asked = thread.submit(open_picture, LARGEST, decode=fresh.decode)
    until(lambda: state(first.pid) == "R")
    os.kill(first.pid, signal.SIGSEGV)
    with pytest.raises(DecoderEnded, match=r"ended its decoder \(SIGSEGV\)") as info:
        asked.result()
    check_message(info.value)
    assert not running(first.pid)
    check_works(fresh)


@pytest.mark.parametrize("data", [encoded(photo()), bytes(20 << 20)], ids=["waits for the answer", "never reads"])
def test_a_child_that_hangs_is_killed_in_time(data):
    with Decoders(seconds=0.3) as decoders:
        check_works(decoders)
        first = child_of(decoders)
        first.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(DecoderEnded, match="takes more than 0.3 s") as info:
            open_picture(data, decode=decoders.decode)
        assert time.monotonic() - start < 2 and not running(first.pid)
        check_message(info.value)
        check_works(decoders)


def test_memory_has_an_end_before_the_machine(monkeypatch):
    """A child that is refused memory says so and goes on."""
    with Decoders(memory=400 << 20) as decoders:
        check_works(decoders)
        first = child_of(decoders)
        with pytest.raises(UsageError, match="takes more memory") as info:
            open_picture(png(8000, 8000, 1, 0, bytes(8000 * 1001)), decode=decoders.decode)
        check_message(info.value)
        check_works(decoders)
        assert child_of(decoders) is first


def test_the_largest_picture_fits(shared):
    alpha = png(8000, 8000, 8, 6, bytes(8000 * 32001))
    picture = open_picture(alpha, decode=shared.decode)
    assert picture.size[0] * picture.size[1] == MOST_PIXELS and picture.notes == ("alpha laid on white",)


def test_a_child_that_was_ended_between_pictures_costs_none(fresh):
    first = child_of(fresh)
    first.kill()
    until(lambda: state(first.pid) == "Z")
    check_works(fresh)
    assert child_of(fresh).pid != first.pid and not running(first.pid)


def test_an_interrupt_takes_no_answer_for_another_pictures(fresh):
    first = child_of(fresh)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            open_picture(LARGEST, decode=fresh.decode)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not running(first.pid)
    check_works(fresh)


# ---- the end


def test_close_ends_the_children_even_those_at_work():
    decoders = Decoders()
    check_works(decoders)
    first, failed = child_of(decoders), threading.Event()

    def ask() -> None:
        with pytest.raises(DecoderEnded):
            open_picture(LARGEST, decode=decoders.decode)
        failed.set()

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: state(first.pid) == "R")
    decoders.close()
    thread.join()
    assert failed.is_set() and not running(first.pid) and not decoders._children
    with pytest.raises(UsageError, match="closed"):
        open_picture(encoded(photo()), decode=decoders.decode)


def test_children_end_with_their_process():
    code = """if True:
        import os
        from lite_llm.text.decoders import Decoders
        from tests.text.pictures import encoded, photo
        decoders = Decoders()
        decoders.decode(encoded(photo()), "it")
        print(next(iter(decoders._children)).process.pid, flush=True)
        os._exit(0)
    """
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    until(lambda: not running(pid) or state(pid) == "Z")


def test_a_decoder_that_hangs_ends_itself_if_nobody_else_does():
    """As a child does whose server was killed."""
    code = "import time\nfrom lite_llm.text import decoders\n"
    code += "decoders.decode_with_bytes = lambda data, name: time.sleep(60)\ndecoders.serve(0.1, 2 << 30)"
    ours, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs) as process:
        module._receive(ours, time.monotonic() + 30)
        module._send(ours, "it", b"data")
        assert process.wait(20) == -signal.SIGALRM
    ours.close()
    theirs.close()


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python"])
def test_a_child_that_does_not_start_is_the_machines_fault(monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    with Decoders() as decoders:
        for _ in range(2):
            with pytest.raises(EnvironmentProblem) as info:
                open_picture(encoded(photo()), decode=decoders.decode)
            assert info.value.hint and not decoders._children
