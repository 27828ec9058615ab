"""tools/bench_pictures.py times what is right, and says so where it is not."""

import json

import pytest

from lite_llm.models.llava import Llava
from tools import bench_pictures


@pytest.mark.parametrize("shape", ["tiny-llava-1.5-7b", "tiny-llava-1.6-mistral-7b"])
def test_all_cases_are_timed_on_both_sides(shape, tmp_path, capsys):
    record = tmp_path / "record.json"
    arguments = ["--shape", shape, "--device", "cpu", "--rounds", "2", "--text", "8", "--json", str(record)]
    assert bench_pictures.main(arguments) == 0
    found = json.loads(record.read_text())
    assert found["wrong"] is None and [case["pictures"] for case in found["cases"]] == [1, 0, 2]
    assert found["cases"][0]["tokens"] == found["cases"][1]["tokens"] < found["cases"][2]["tokens"]
    assert all(len(case["ms_rounds"]) == len(case["transformers_ms_rounds"]) == 2 for case in found["cases"])
    assert all(case["ms"] > case["floor_ms"] > 0 for case in found["cases"])
    assert "transformers' own, up to rounding" in capsys.readouterr().out


def test_a_wrong_picture_is_told_and_fails(monkeypatch, capsys):
    right = Llava.encode_tiles
    monkeypatch.setattr(Llava, "encode_tiles", lambda net, pixels: right(net, -pixels))
    assert bench_pictures.main(["--shape", "tiny-llava-1.5-7b", "--device", "cpu", "--rounds", "1"]) == 1
    assert "nats below transformers' best" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--shape", "llama-3.2-1b"], ["--text", "1"], ["--rounds", "0"]], ids=str)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_pictures.main(arguments)
    assert "error: " in capsys.readouterr().err
