"""The page in headless Chromium: `python -m tests.server.browse [FOLDER]` checks it, and puts pictures into FOLDER.

No test of the suite, for it needs Playwright (`pip install playwright`) and a Chromium, whose path CHROMIUM may name.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from lite_llm.llm import DEMO, LLM
from tests.server.conftest import PARIS, Running, opened
from tests.server.test_connections import LONG, raw

VISION = DEMO.parent / "vision"


def ask(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def check(page: Page, running: Running, folder: Path | None, name: str) -> None:
    page.goto(running.url)
    expect(page.locator("#model")).to_contain_text("demo/chat")
    ask(page, "My name is Ada.")
    expect(page.locator("#figures")).to_contain_text("tok/s")
    ask(page, "What is my name?")
    expect(page.locator(".turn.assistant").last).to_have_text("Your name is Ada.")
    expect(page.locator("#flights")).to_contain_text("No requests are in flight.")

    page.click("#fresh")
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("summary").click()
    page.fill("#temperature", "100")  # babbles until it is stopped
    ask(page, "<img src=x onerror=alert(1)> Count from 1 to 20.")
    expect(page.locator(".turn.user img")).to_have_count(0)
    expect(page.locator("#flights tr.own")).to_contain_text("decoding")
    expect(page.locator("#now")).to_contain_text("1 running")
    expect(page.locator("#map i")).to_have_count(256)
    used = page.locator("#map i:not([title*=' 0 in use'])")
    expect(used.first).to_have_attribute(
        "title", re.compile(r"^slots \d+ to \d+: [1-9]\d* in use, \d+ kept, \d+ free$")
    )
    if folder:
        page.screenshot(path=folder / f"{name}-live.png")
    page.click("#go")
    expect(page.locator("#figures")).to_contain_text("stopped")
    running.settle()
    expect(page.locator("#go")).to_have_text("Send")

    page.fill("#temperature", "0")
    page.fill("#tokens", "3")
    page.click("#fresh")
    ask(page, "What is the capital of France?")
    expect(page.locator(".turn.assistant")).to_have_text("The capital of")
    expect(page.locator("#figures")).to_contain_text("no tokens left")
    page.fill("#tokens", "")
    expect(page.locator("#attach")).to_be_hidden()  # a model that takes text only
    check_mistakes(page)
    check_settings_hide_nothing(page)


def check_mistakes(page: Page) -> None:
    """What is wrong with a setting is said, and nothing is sent; also when Settings are closed."""
    turns = page.locator(".turn").count()
    for field, value, words in (
        ("#tokens", "-5", "Tokens: -5; expected a whole number, 1 or more"),
        ("#tokens", "1.5", "Tokens: 1.5; expected a whole number, 1 or more"),
        ("#temperature", "500", "Temperature: 500; expected a number from 0 to 100"),
    ):
        page.fill(field, value)
        page.locator("summary").click()
        expect(page.locator(field)).to_be_hidden()
        ask(page, "Who hears this?")
        expect(page.locator("#wrong")).to_have_text(words)
        expect(page.locator(field)).to_be_visible()
        expect(page.locator("#text")).to_have_value("Who hears this?")
        expect(page.locator(".turn")).to_have_count(turns)
        page.fill(field, "")
        expect(page.locator("#wrong")).to_be_hidden()
    page.fill("#temperature", "0.25")  # not only tenths
    ask(page, "What is the capital of France?")
    expect(page.locator(".turn")).to_have_count(turns + 2)
    expect(page.locator("#go")).to_have_text("Send")


def check_settings_hide_nothing(page: Page) -> None:
    page.locator("summary").click()
    expect(page.locator("#key")).to_be_hidden()
    for _ in range(8):
        ask(page, "What is the capital of France?")
        expect(page.locator("#go")).to_have_text("Send")
        expect(page.locator(".turn.assistant").last).to_have_text(PARIS)
    assert newest_is_seen(page)
    page.locator("summary").click()
    expect(page.locator("#key")).to_be_visible()
    page.wait_for_timeout(100)
    assert newest_is_seen(page)
    page.locator("summary").click()
    page.evaluate("document.getElementById('talk').scrollTop = 0")
    page.wait_for_timeout(100)
    page.locator("summary").click()
    page.wait_for_timeout(100)
    assert page.evaluate("document.getElementById('talk').scrollTop") == 0, "whoever reads above stays there"


def newest_is_seen(page: Page) -> bool:
    talk, last = page.locator("#talk").bounding_box(), page.locator(".turn").last.bounding_box()
    return last["y"] + last["height"] <= talk["y"] + talk["height"] + 1


def check_pictures(page: Page, running: Running) -> None:
    page.goto(running.url)
    expect(page.locator("#attach")).to_be_visible()
    page.set_input_files("#file", {"name": "README.md", "mimeType": "text/markdown", "buffer": b"# no picture"})
    expect(page.locator("#wrong")).to_contain_text("README.md is no picture that can be sent; expected PNG")
    expect(page.locator("#picture")).to_have_text("")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#picture")).to_have_text("a.png")
    expect(page.locator("#wrong")).to_be_hidden()
    ask(page, "What is this?")
    expect(page.locator(".turn.error")).to_have_count(1)
    expect(page.locator("#go")).to_have_text("Send")
    page.set_input_files("#file", VISION / "picture-1.png")
    ask(page, "What is in the picture?")  # what was refused is not sent again
    expect(page.locator(".turn.assistant").last).to_contain_text("a green heart")


def check_key(page: Page, running: Running) -> None:
    page.goto(running.url)
    expect(page.locator("#model")).to_contain_text("see Settings")
    page.locator("summary").click()
    page.fill("#key", "secret")
    page.keyboard.press("Tab")
    expect(page.locator("#model")).to_contain_text("demo/chat")
    expect(page.locator("#now")).to_contain_text("0 running")


def check_crowd(page: Page, running: Running, folder: Path | None, name: str) -> None:
    """Sixteen answers grow in a small pool beside what eight others left there."""
    running.chat(n=8, max_tokens=120, ignore_eos=True, temperature=2)
    page.goto(running.url)
    crowd = raw(running, **LONG | {"n": 16, "max_tokens": 200, "temperature": 2})
    expect(page.locator("#flights tr")).to_have_count(17)
    expect(page.locator("#map i:not([title*=' 0 in use'])").nth(100)).to_be_attached(timeout=30_000)
    expect(page.locator("#map i:not([title*=' 0 kept'])").nth(20)).to_be_attached()
    expect(page.locator("aside .card").first).to_contain_text("kept for later prompts")
    expect(page.locator("#flights .legend")).to_have_text("prompt readanswerto come")
    if folder:
        page.screenshot(path=folder / f"page-crowd-{name}.png")
    crowd.close()
    expect(page.locator("#map i:not([title*=' 0 in use'])")).to_have_count(0)
    if folder:
        page.screenshot(path=folder / f"page-idle-{name}.png")


def main(folder: Path | None) -> None:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with LLM(say=lambda text: None, device="cpu") as llm, sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 420)):
            with Running(llm) as running:
                page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
                faults: list[str] = []
                page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
                check(page, running, folder, f"page-{scheme}-{width}")
                wide = page.evaluate_handle("document.documentElement").get_property("scrollWidth").json_value()
                assert wide <= width and not faults, (wide, faults)
                if folder:
                    page.screenshot(path=folder / f"page-{scheme}-{width}.png")
                page.close()
        with Running(llm, api_key="secret") as running:
            check_key(chromium.new_page(), running)
        with opened(VISION) as seeing, Running(seeing) as running:
            check_pictures(chromium.new_page(), running)
        for scheme in ("light", "dark"):
            with opened() as small, Running(small) as running:
                check_crowd(chromium.new_page(color_scheme=scheme), running, folder, scheme)
        chromium.close()
    print("the page works: light and dark, wide and narrow, with and without a key, idle and busy")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
