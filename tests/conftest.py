"""Every test starts from seed 0 with fresh memory full of NaN; without a GPU kernels run in Triton's interpreter."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported
torch.set_num_threads(1)  # tests run side by side, and tiny tensors lose far more to threads than they gain

SKIPS = Path(__file__).parent / "skips.txt"
"""How many tests are skipped on a machine without a GPU; with one, none is."""
WITH_RAY = 10
"""How many more are skipped where Ray is not installed."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory is NaN, so a kernel that leaves part of its output unwritten fails loudly."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

        return wrapped

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_collection_modifyitems(config, items):
    if find_spec("ray") is None:
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip(reason="needs Ray: pip install -r requirements-ray.txt"))
    if torch.cuda.is_available():
        nothing = ["cpu"] + ["hopper"] * (torch.cuda.get_device_capability() != (9, 0))  # that they say here
        left_out = [item for item in items if any(item.get_closest_marker(name) for name in nothing)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    else:
        for item in items:
            if item.get_closest_marker("gpu") or item.get_closest_marker("hopper"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """A run of the whole suite fails if it skips another number of tests than was recorded."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    whole = config.args == config.getini("testpaths") and not config.option.keyword and not config.option.markexpr
    if reporter is None or not whole or hasattr(config, "workerinput") or session.exitstatus != 0:
        return
    skipped = len(reporter.stats.get("skipped", []))
    expected = 0 if torch.cuda.is_available() else int(SKIPS.read_text())
    expected += 0 if find_spec("ray") else WITH_RAY
    if skipped != expected:
        reporter.write_line(
            f"{skipped} tests were skipped; expected were {expected} ({SKIPS.name}): find out why", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
