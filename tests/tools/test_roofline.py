"""tools/roofline.py: which kernel is whose, what overlapping kernels add to a step, and the report without a GPU."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from tools import roofline
from tools.roofline import BETWEEN, INSIDE, OTHER, Kernel, attribute, classify

FAT = ["_gemv_qkv_kernel", "_decode_kernel", "_gemv_kernel", "_gemv_kernel", "_gemv_kernel"]
FAT_CLASSES = ["qkv", "attention", "out", "gate_up", "down"]
PLAIN = [
    "_rms_norm_kernel", "nvjet_hsh_64x8", "_rope_store_kv_kernel", "_decode_kernel", "_merge_kernel", "nvjet_hsh_64x8",
    "cublasLt::splitKreduce_kernel<32>", "_rms_norm_kernel", "nvjet_hsh_64x8", "_silu_mul_kernel",
    "void cutlass::Kernel2<x>(y)", "cublasLt::splitKreduce_kernel<32>",
]  # fmt: skip
PLAIN_CLASSES = ["qkv"] * 3 + ["attention"] * 2 + ["out"] * 2 + ["gate_up"] * 3 + ["down"] * 2
SKINNY = ["_rms_norm_kernel", "_skinny_qkv_kernel", "_decode_kernel", "_skinny_kernel", "_rms_norm_kernel",
          "_skinny_kernel", "_skinny_kernel"]  # fmt: skip
SKINNY_CLASSES = ["qkv", "qkv", "attention", "out", "gate_up", "gate_up", "down"]

STEP = dict(model="x", batch=1, context=512, device="a GPU", copy_tb_s=4.2, matmul_tflop_s=790.0, step_us=90.0,
            floor_us=45.0, bytes=240_000_000)  # fmt: skip


def step(layer: list[str], layers: int, norm: bool = False) -> list[str]:
    head = ["_rms_norm_kernel"] * norm + ["_gemv_kernel"]
    return ["_decode_inputs_kernel", "_embed_kernel", *layer * layers, *head, "_scan_kernel", "_pick_kernel",
            "_advance_kernel"]  # fmt: skip


@pytest.mark.parametrize(
    "layer, classes, norm", [(FAT, FAT_CLASSES, False), (PLAIN, PLAIN_CLASSES, True), (SKINNY, SKINNY_CLASSES, True)]
)
def test_matmuls_are_known_by_their_place(layer, classes, norm):
    one = ["state", "embed", *classes * 3, *["head"] * (1 + norm), "sampling", "sampling", "state"]
    assert classify(step(layer, 3, norm) * 2, layers=3) == one * 2


def test_copies_stand_anywhere_and_change_nothing():
    names = step(FAT, 2)
    names.insert(4, "Memcpy HtoD (Pinned -> Device)")
    found = classify(names, layers=2)
    assert found.pop(4) == "state" and found == classify(step(FAT, 2), layers=2)


def test_edits_between_two_steps_are_state():
    edits = ["void at::native::index_elementwise_kernel<128>(long)", "void at::native::CatArrayBatchedCopy<int>(int)"]
    found = classify([*step(FAT, 2), *edits, *step(FAT, 2)], layers=2)
    assert found == [*classify(step(FAT, 2), 2), "state", "state", *classify(step(FAT, 2), 2)]


def test_a_kernel_of_a_step_that_began_before_the_trace_is_nobodys():
    assert classify(["_gemv_kernel", "_embed_kernel"], layers=2) == [OTHER, "embed"]


def stream(steps: int, gap: float) -> list[Kernel]:
    """Kernels of 10 us that each start 4 us before the one before them ends; `gap` us between steps."""
    kernels, now = [], 0.0
    for _ in range(steps):
        for i, name in enumerate(step(FAT, 2)):
            start = now - 4.0 if i else now + gap
            now = start + 10.0
            kernels.append(Kernel(name, start, now))
    return kernels


def test_overlapping_kernels_add_up_to_the_step():
    split = attribute(stream(5, gap=7.0), layers=2)
    assert split.us[BETWEEN] == pytest.approx(7.0) and split.us[INSIDE] == 0
    assert split.us["gate_up"] == pytest.approx(2 * 6.0) and split.runs["gate_up"] == 2
    assert split.us["state"] == pytest.approx(10.0 + 6.0) and split.names["attention"] == ["_decode_kernel"]
    kernels = len(step(FAT, 2))
    assert sum(split.us.values()) == pytest.approx(7.0 + 10.0 + 6.0 * (kernels - 1))


def test_gaps_inside_a_step_are_their_own():
    kernels = [Kernel(k.name, 3 * k.start, 3 * k.start + 10.0) for k in stream(3, gap=4.0)]
    split = attribute(kernels, layers=2)
    assert split.us[INSIDE] > 0 and split.us[BETWEEN] > 0
    first, last = (k for i, k in enumerate(k for k in kernels if "embed" in k.name) if i in (0, 2))
    assert sum(split.us.values()) == pytest.approx((last.start - first.start) / 2)


def test_a_kernel_inside_another_adds_nothing():
    kernels = stream(3, gap=4.0)
    kernels.append(Kernel("_gemv_kernel", kernels[20].start + 1, kernels[20].end - 1))
    assert sum(attribute(kernels, 2).us.values()) == pytest.approx(sum(attribute(stream(3, 4.0), 2).us.values()))


def test_a_trace_without_steps_is_empty():
    assert not attribute([], 2).us and not attribute([Kernel("_embed_kernel", 0.0, 1.0)], 2).us


def test_a_share_of_the_limit_is_the_floor_over_what_it_took():
    row = roofline.Row("qkv", 16, 60.0, 240_000_000, 45.0, ["_gemv_kernel"])
    assert row.of_limit == 0.75
    assert roofline.Row("qkv", None, None, 8, 45.0, []).of_limit is None, "not timed"
    assert roofline.Row(OTHER, 2, 3.0, 0, 0.0, []).of_limit is None, "nothing that it must do"
    console = Console(width=150, file=io.StringIO())
    console.print(roofline.table(STEP, [row]))
    found = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["qkv", "16", "60.0", "100.0%", "240.0", "4.00", "45.0", "75", "_gemv_kernel"] in found
    assert ["step", "90.0", "240.0", "2.67", "45.0", "50"] in [cells[:6] for cells in found]


def test_the_report_without_a_gpu(tmp_path, capsys):
    target = tmp_path / "step.json"
    options = ["--shape", "tiny-qwen3-0.6b", "--batch", "2", "--context", "40", "--steps", "2", "--device", "cpu"]
    assert roofline.main([*options, "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert record["step_us"] > record["floor_us"] > 0 and record["bytes"] == sum(r["bytes"] for r in record["rows"])
    assert all(row["us"] is None for row in record["rows"])
    shown = capsys.readouterr().out
    assert "no GPU: floors only" in shown and "gate_up" in shown


def test_a_wrong_shape_is_one_line(capsys):
    assert roofline.main(["--shape", "llama-9", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: shape 'llama-9'")


@pytest.mark.gpu
def test_every_kernel_of_a_step_has_a_class(tmp_path):
    target = tmp_path / "step.json"
    assert roofline.main(["--shape", "llama-3.2-1b", "--context", "64", "--steps", "8", "--json", str(target)]) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert OTHER not in rows
    assert [rows[name]["runs"] for name in ("attention", "out", "down", "head")] == [16, 16, 16, 1]


def test_the_picture_or_what_it_needs(tmp_path, capsys):
    row = roofline.Row("qkv", 16, 60.0, 200_000_000, 47.0, ["_gemv_kernel"])
    code = roofline.picture(tmp_path / "step.png", STEP, [row])
    if importlib.util.find_spec("matplotlib"):
        assert code == 0 and (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert code == 3 and "pip install matplotlib" in capsys.readouterr().err
