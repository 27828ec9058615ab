"""tools/diff.py says ok where nothing is wrong, and names the layer where something is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lite_llm.llm import DEMO
from lite_llm.models.llava import Llava
from lite_llm.rope import Rope
from tools import diff

CPU = torch.device("cpu")
ROOT = Path(diff.__file__).resolve().parents[1]


MODELS = [DEMO, DEMO.parent / "copy", "tiny-qwen2.5-0.5b", "tiny-llava-1.5-7b", "tiny-llava-1.6-mistral-7b"]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_right_model_is_within_rounding(model):
    for dtype in (torch.float32, torch.bfloat16):
        found = diff.compare(model, dtype, CPU, show_layers=False)
        assert found["ok"] and found["parts_at"] is None and found["ratio"] < 2, found


def test_a_wrong_rotation_is_found_at_its_layer(monkeypatch):
    right = Rope.tables
    monkeypatch.setattr(Rope, "tables", lambda rope, n: (right(rope, n)[0], -right(rope, n)[1]))
    found = diff.compare(DEMO, torch.bfloat16, CPU, show_layers=False)
    assert not found["ok"] and found["parts_at"] == 1


def test_a_picture_upside_down_is_found_before_the_first_layer(monkeypatch):
    right = Llava.encode
    monkeypatch.setattr(Llava, "encode", lambda net, *args: [part.flip(0) for part in right(net, *args)])
    found = diff.compare("tiny-llava-1.5-7b", torch.float32, CPU, show_layers=False)
    assert not found["ok"] and found["parts_at"] == 0


@pytest.mark.parametrize("arguments, code", [
    ([], 2), (["--dtype", "int8", str(DEMO)], 2), (["--shape", "nothing"], 2), (["no such directory"], 5),
], ids=str)  # fmt: skip
def test_bad_arguments_get_one_message(arguments, code):
    command = [sys.executable, str(ROOT / "tools" / "diff.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr and "error: " in done.stderr
