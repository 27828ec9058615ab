"""Loading, plain prompts and ids: BOS once, hostile or damaged files refused by name, no code of a checkpoint run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_llm.errors import BadCheckpoint, LiteLLMError, UnsupportedModel, UsageError
from lite_llm.text import Tokenizer
from tests.text import build

ROOT = Path(__file__).parents[2]
families = pytest.mark.parametrize("family", build.FAMILIES)


def load(folder, family="byte_level", **config) -> Tokenizer:
    return Tokenizer.load(build.write(folder, build.FAMILIES[family](), **config))


@families
def test_a_plain_prompt_is_encoded_as_transformers_does(family, tmp_path):
    from transformers import AutoTokenizer

    ours = load(tmp_path, family)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(st.text(), st.text("ab <s>|/_eot_id\n 好🙂")))
    def equal(text):
        assert ours.encode("x" + text) == theirs("x" + text).input_ids

    equal()
    for text in ["", " ", "\0", "a\0b", *build.TEXT]:
        assert ours.encode(text) == theirs(text).input_ids


@families
def test_bos_of_a_prompt_is_not_doubled_and_special_text_is_honoured(family, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load(tmp_path, family)
    ids = tokenizer.encode("<s>Hello world<|eot_id|>")
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode("<s>Hello world<|eot_id|>", add_special_tokens=False)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids[-1] in tokenizer.eos_ids
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_a_tokenizer_without_bos_adds_none(tmp_path):
    tokenizer = Tokenizer.load(build.write(tmp_path, build.byte_level(adds_bos=False), bos_token=None))
    assert tokenizer.bos_id is None
    assert not tokenizer.special_ids & set(tokenizer.encode("Hello"))


def test_ids_and_sizes(tmp_path):
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == len(tokenizer._backend.get_vocab())
    assert tokenizer.special_ids == {tokenizer._backend.token_to_id(text) for text in build.SPECIALS}
    assert tokenizer.bos_id in tokenizer.special_ids and tokenizer.encode("a")[-1] not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<|eot_id|>")) == "a"
    assert tokenizer.decode(tokenizer.encode("a<|eot_id|>"), skip_special_tokens=False) == "<s>a<|eot_id|>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path):
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"
    assert tokenizer.decode(tokenizer.chat_ids([{"role": "user", "content": "\udc00"}])).count("\ufffd") == 1


def test_a_cap_refuses_before_tokenizing(tmp_path):
    tokenizer = load(tmp_path)
    assert tokenizer.encode("a" * 10, max_chars=10)
    with pytest.raises(UsageError, match="11 characters; at most 10"):
        tokenizer.encode("a" * 11, max_chars=10)
    with pytest.raises(UsageError, match="12 characters; at most 10"):
        tokenizer.chat_ids([{"role": "user", "content": "abcdef"}] * 2, max_chars=10)
    assert len(tokenizer.encode("a" * 100_000)) > 100  # no quadratic time
    with pytest.raises(UsageError, match="expected a string"):
        tokenizer.encode(None)


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    backend = build.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(build.write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("Hello world, how are you")) == "Hello world, how are you"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(BadCheckpoint, match=r"no tokenizer; expected one of tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "\udcff", "[" * 200_000],
    ids=["empty", "cut", "list", "not-utf8", "deep"],
)
def test_damaged_json_is_named(name, content, tmp_path):
    build.write(tmp_path, build.byte_level())
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(BadCheckpoint, match=name):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_json_but_no_tokenizer_is_refused(tmp_path):
    build.write(tmp_path, build.byte_level())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": -1}}}')
    with pytest.raises(LiteLLMError, match="tokenizer files cannot be read"):
        Tokenizer.load(tmp_path)


AUTO_MAP = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}


@pytest.mark.parametrize("known_class", [True, False])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_of_the_checkpoint_never_runs(where, known_class, tmp_path):
    folder = build.write(tmp_path / "model", build.byte_level())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if not known_class:
        config["tokenizer_class"] = "Evil"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama" if known_class else "evil"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    changed = json.loads((folder / where).read_text()) | {"auto_map": AUTO_MAP}
    (folder / where).write_text(json.dumps(changed))
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert ("auto_map" in tokenizer.notice) == (where == "tokenizer_config.json")
    assert not marker.exists()


def test_a_tokenizer_that_is_only_code_is_refused(tmp_path):
    config = {"tokenizer_class": "Evil", "auto_map": AUTO_MAP}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedModel, match="auto_map"):
        Tokenizer.load(tmp_path)


def test_importing_the_package_loads_neither_transformers_nor_torch():
    code = "import sys, lite_llm.text; print({'transformers', 'tokenizers', 'torch', 'jinja2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("model_type", ["llama", "llava", "llava_next", "mistral", "qwen2", "qwen3"])
@families
def test_the_short_way_gives_the_tokenizer_that_autotokenizer_gives(family, model_type, name, tmp_path):
    from transformers import AutoTokenizer

    build.write(tmp_path, build.FAMILIES[family](), tokenizer_class=name, extra_special_tokens=["<image>", "<new>"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, hf = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    theirs = Tokenizer(hf)
    assert type(ours._template._hf) is type(hf)
    assert ours.to_json() == theirs.to_json()
    for fact in ("special_ids", "bos_id", "eos_ids", "vocab_size", "notice"):
        assert getattr(ours, fact) == getattr(theirs, fact)
    messages = [{"role": "user", "content": build.TEXT[0]}, {"role": "assistant", "content": build.TEXT[1]}]
    assert ours.chat_ids(messages) == theirs.chat_ids(messages)
    for text in build.TEXT:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids)


def test_the_demo_needs_neither_autotokenizer_nor_torch():
    code = """
import sys
from lite_llm.text import Tokenizer
assert Tokenizer.load("lite_llm/demo/chat").encode("Hello")
found = {"torch", "transformers.models", "transformers.models.auto.tokenization_auto"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("wait", [0, 0.02, 0.2, 1])
def test_load_beside_a_preparation(wait):
    code = f"""
import sys, time
from lite_llm.text import Tokenizer
Tokenizer.prepare("lite_llm/demo/chat")
time.sleep({wait})
assert Tokenizer.load("lite_llm/demo/chat").encode("Hello")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_load_waits_while_transformers_is_imported(tmp_path):
    """transformers puts another module in its place while it is imported: who has asked for it before gets the old."""
    (tmp_path / "transformers.py").write_text(
        "import sys, time, types\nnew = types.ModuleType(__name__)\nnew.__spec__ = __spec__\n"
        "time.sleep(0.5)\nsys.modules[__name__] = new\n"
        "class PreTrainedTokenizerFast:\n    def from_pretrained(*_, **__): raise RuntimeError('found')\n"
        "new.PreTrainedTokenizerFast = PreTrainedTokenizerFast\ndel PreTrainedTokenizerFast\n"
    )
    code = """
import time
from lite_llm.errors import BadCheckpoint
from lite_llm.text import Tokenizer
Tokenizer.prepare(None)
time.sleep(0.1)
try:
    Tokenizer.load("lite_llm/demo/chat")
except BadCheckpoint as error:
    assert "found" in str(error), error
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_with(tmp_path), check=True)


def test_load_says_that_transformers_is_missing_and_its_preparation_nothing(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('broken')")
    code = """
from lite_llm.errors import EnvironmentProblem
from lite_llm.text import Tokenizer
Tokenizer.prepare("lite_llm/demo/chat").join()
try:
    Tokenizer.load("lite_llm/demo/chat")
except EnvironmentProblem as error:
    assert "broken" in str(error) and "pip install transformers" in str(error)
else:
    raise SystemExit("nothing was said")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_with(tmp_path), stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_preparation_says_nothing_of_damaged_files(tmp_path, capfd):
    for content in ("{", '{"tokenizer_class": ["a"]}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        Tokenizer.prepare(tmp_path).join()
    assert capfd.readouterr().err == ""


def _with(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
