"""tools/convert.py: one message and an exit code, never a traceback."""

import json
import sys

import pytest
import torch

from lite_llm.errors import LiteLLMError
from lite_llm.weights import open_checkpoint
from tests.weights.tiny import config_of, tensors_of, write
from tools import convert


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", config_of(), shards=2)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_it_converts_and_verifies(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--verify") == 0
    assert run("--verify", tmp_path / "out") == 0
    assert "verified" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)]
)
def test_it_converts_the_dtype(name, dtype, source, tmp_path):
    assert run(source, tmp_path / "out", "--dtype", name) == 0
    assert open_checkpoint(tmp_path / "out").dtype == dtype


def test_it_keeps_the_stored_dtype_where_config_json_is_wrong(tmp_path):
    source = write(tmp_path / "source", config_of(), tensors_of(config_of(), torch.float32))
    assert run(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_errors_are_one_line_and_an_exit_code(source, tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 5
    assert run(source, source) == 2
    assert run(source) == 2
    assert run(source, "/proc/out") == 6
    assert run(source, tmp_path / "out") == 0 == run(source, tmp_path / "out", "--overwrite")
    assert run(source, tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    with pytest.raises(LiteLLMError):
        run(source, tmp_path / "out", "--debug")


def test_a_damaged_tensor_is_named(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    entry = open_checkpoint(tmp_path / "out").entries["blocks.0.mlp.down.weight"]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 10)
        file.write(b"\x01\x02\x03")
    assert run(tmp_path / "out", "--verify") == 5
    assert "blocks.0.mlp.down.weight" in capsys.readouterr().err


def test_code_in_the_source_neither_runs_nor_travels(tmp_path):
    facts = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    source = write(tmp_path / "source", config_of(**facts))
    (source / "modeling_mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Tok", None]}}))
    assert run(source, tmp_path / "out", "--verify") == 0
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*.py"))
    assert "modeling_mine" not in sys.modules
