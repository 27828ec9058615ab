"""config.json is read strictly: whatever we would compute wrongly is refused by name."""

import json
import os
import re

import pytest

from lite_llm.config import HFConfig
from lite_llm.errors import BadCheckpoint, UnsupportedModel
from lite_llm.jsonfile import read_object
from lite_llm.models import registry

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
MISTRAL = LLAMA | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=8)
QWEN2 = LLAMA | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=True, sliding_window=8,
    max_window_layers=1,
)  # fmt: skip
QWEN3 = QWEN2 | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, attention_bias=True)
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN_ROPE = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.1, beta_fast=32, beta_slow=1,
    mscale=1.0, mscale_all_dim=1.0, truncate=True,
)  # fmt: skip
ABSENT = object()
NAN, HUGE = float("nan"), 10**400


def parse(raw, **changes):
    raw = {key: value for key, value in (raw | changes).items() if value is not ABSENT}
    return registry.parse(HFConfig(raw))


def refused(key):
    """A refusal that names the key."""
    return pytest.raises(UnsupportedModel, match=rf"\b{re.escape(key)}\b")


SIZES = {
    "hidden_size": LLAMA, "intermediate_size": LLAMA, "num_hidden_layers": LLAMA, "num_attention_heads": LLAMA,
    "num_key_value_heads": LLAMA, "vocab_size": LLAMA, "max_position_embeddings": LLAMA, "head_dim": QWEN3,
    "sliding_window": MISTRAL, "max_window_layers": QWEN2,
}  # fmt: skip
NO_SIZE = {
    "text": "64", "-1": -1, "0": 0, "fraction": 64.5, "float": 64.0, "nan": NAN, "inf": float("inf"), "true": True,
    "list": [64], "object": {"a": 64}, "huge": 10**12, "beyond float": HUGE,
}  # fmt: skip


@pytest.mark.parametrize("value", NO_SIZE)
@pytest.mark.parametrize("field", SIZES)
def test_sizes_are_whole_and_of_a_sane_magnitude(field, value):
    if (field, value) == ("max_window_layers", "0"):
        return  # windows from the first layer on
    with refused(field):
        parse(SIZES[field], **{field: NO_SIZE[value]})


@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
@pytest.mark.parametrize("field", sorted(LLAMA.keys() - {"num_key_value_heads", "model_type"}))  # these have a default
def test_what_has_no_default_must_be_there(field, value):
    with refused(field):
        parse(LLAMA, **{field: value})


@pytest.mark.parametrize("raw", [MISTRAL, QWEN2, QWEN3], ids=lambda raw: raw["model_type"])
def test_kv_heads_have_a_default_in_llama_only(raw):
    """transformers fills in 8 or 32 for the others, whatever the number of heads."""
    with refused("num_key_value_heads"):
        parse(raw, num_key_value_heads=ABSENT)
    assert parse(LLAMA, num_key_value_heads=ABSENT).kv_heads == 4


ROPED, YARNED = LLAMA | dict(rope_parameters=LLAMA3_ROPE), LLAMA | dict(rope_scaling=YARN_ROPE)
NUMBERS = {
    "rms_norm_eps": (LLAMA, (0, -1, 1, 1e30)),
    "rope_theta": (LLAMA, (0, -1, 1, 1e30)),
    "partial_rotary_factor": (LLAMA, (0, -1, 0.5, 1e30)),
    "rope_parameters.rope_theta": (ROPED, (0, -1, 1, 1e30)),
    "rope_parameters.partial_rotary_factor": (ROPED, (0, -1, 0.5, 1e30)),
    "rope_parameters.factor": (ROPED, (0, -1, 0.5, 1e30)),
    "rope_parameters.low_freq_factor": (ROPED, (0, -1, 4, 1e30)),
    "rope_parameters.high_freq_factor": (ROPED, (0, -1, 1, 1e30)),
    "rope_scaling.original_max_position_embeddings": (YARNED, (0, -1, 1.5, 10**12)),
    **{f"rope_scaling.{key}": (YARNED, (0, -1, 1e30)) for key in ("attention_factor", "beta_fast", "beta_slow")},
    **{f"rope_scaling.{key}": (YARNED, (-1, 1e30)) for key in ("mscale", "mscale_all_dim")},
}


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_are_finite_and_in_range(path):
    raw, wrong = NUMBERS[path]
    for value in (*wrong, "1.0", True, NAN, float("-inf"), HUGE, [1.0], {"a": 1.0}):
        *outer, key = path.split(".")
        changes = {outer[0]: raw[outer[0]] | {key: value}} if outer else {key: value}
        with refused(key):
            parse(raw, **changes)


def test_a_factor_that_makes_too_many_positions_is_refused():
    with refused("factor"):
        parse(LLAMA, rope_scaling=dict(type="linear", factor=1e6))


FLAGS = {
    "attention_bias": LLAMA, "mlp_bias": LLAMA, "tie_word_embeddings": LLAMA, "use_sliding_window": QWEN2,
    "is_encoder_decoder": LLAMA, "tie_encoder_decoder": LLAMA, "add_cross_attention": LLAMA, "is_causal": LLAMA,
    "is_decoder": LLAMA,
}  # fmt: skip


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", ["true", 1, 0, -1, NAN, [True], {"a": True}], ids=str)
def test_flags_are_true_or_false(field, value):
    with refused(field):
        parse(FLAGS[field], **{field: value})


@pytest.mark.parametrize("field, value", [
    ("hidden_act", "gelu"), ("hidden_act", 1), ("pretraining_tp", 2), ("pretraining_tp", True),
    ("is_encoder_decoder", True), ("tie_encoder_decoder", True), ("add_cross_attention", True),
    ("cross_attention_hidden_size", 64), ("is_causal", False), ("model_type", "mistral"), ("model_type", 3),
    ("dtype", "int8"), ("dtype", "float8_e4m3fn"), ("torch_dtype", 16), ("partial_rotary_factor", 0.5),
    ("architectures", "LlamaForCausalLM"), ("architectures", {}), ("rope_scaling", "linear"), ("rope_scaling", []),
    ("rope_parameters", 8), ("rope_parameters", False), ("quantization_config", "awq"),
    ("original_max_position_embeddings", 32), ("sliding_window", 16), ("pruned_heads", {"0": [1]}),
])  # fmt: skip
def test_settings_that_we_would_compute_wrongly_are_refused(field, value):
    with refused(field):
        parse(LLAMA, **{field: value})


@pytest.mark.parametrize("architectures, message", [
    ([], "architectures = []; expected one name"),
    (["LlamaForCausalLM", "MistralForCausalLM"], "expected one name"),
    ([None], "expected one name"),
    (["x\x1b[31m"], "expected one name"),
    (["MixtralForCausalLM"], "MixtralForCausalLM is not supported; supported: LlamaForCausalLM"),
    (["Qwen2MoeForCausalLM"], "Qwen2MoeForCausalLM is not supported"),
    (["LlamaForSequenceClassification"], "LlamaForSequenceClassification is not supported"),
    (["LLaMAForCausalLM"], "LLaMAForCausalLM is not supported"),
])  # fmt: skip
def test_unknown_architectures_are_named(architectures, message):
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        parse(LLAMA, architectures=architectures)


@pytest.mark.parametrize("config", [
    dict(quant_method="awq", bits=4), dict(quant_method="fp8"), dict(bits=8), {},
])  # fmt: skip
def test_quantized_checkpoints_are_refused(config):
    with refused("quantization_config"):
        parse(LLAMA, quantization_config=config)
    assert parse(LLAMA, quantization_config=None)


@pytest.mark.parametrize("changes, key", [
    (dict(num_attention_heads=5), "num_attention_heads"),
    (dict(num_attention_heads=65), "num_attention_heads"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(num_key_value_heads=8), "num_key_value_heads"),
    (dict(head_dim=15), "head_dim"),
    (dict(head_dim=258), "head_dim"),
    (dict(hidden_size=2048), "head_dim"),
    (dict(rope_parameters=LLAMA3_ROPE, rope_scaling=YARN_ROPE), "rope_scaling"),
    (dict(rope_parameters=LLAMA3_ROPE | dict(rope_theta=2.0), rope_theta=3.0), "rope_theta"),
    (dict(rope_scaling=LLAMA3_ROPE | dict(type="yarn")), "type"),
    (dict(rope_scaling=dict(type="linear")), "factor"),
    (dict(rope_scaling=dict(factor=2.0)), "factor"),
    (dict(rope_scaling=dict(type="longrope", factor=2.0)), "rope_type"),
    (dict(rope_scaling=dict(rope_type=3, factor=2.0)), "rope_type"),
    (dict(rope_scaling=dict(type="mrope", mrope_section=[1, 2])), "rope_type"),
    (dict(rope_scaling=dict(type="linear", factor=2.0, mscale=1.0)), "mscale"),
    (dict(rope_scaling=LLAMA3_ROPE | dict(low_freq_factor=None)), "low_freq_factor"),
    (dict(rope_scaling=YARN_ROPE | dict(truncate=1)), "truncate"),
    (dict(rope_scaling=YARN_ROPE | dict(long_factor=[1.0])), "long_factor"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0), head_dim=2), "head_dim"),
])  # fmt: skip
def test_facts_that_contradict_each_other_are_refused(changes, key):
    with refused(key):
        parse(LLAMA, **changes)


# Windows


def test_mistrals_window_is_for_every_layer():
    assert parse(MISTRAL).windows == (8, 8)
    assert parse(MISTRAL, sliding_window=None).windows == (None, None)
    assert parse(MISTRAL, sliding_window=ABSENT).windows == (4096, 4096)  # the default of transformers
    with refused("layer_types"):
        parse(MISTRAL, layer_types=["full_attention"] * 2)


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=lambda raw: raw["model_type"])
def test_qwens_window_is_for_late_or_listed_layers(raw):
    assert parse(raw).windows == (None, 8)
    assert parse(raw, max_window_layers=0).windows == (8, 8)
    assert parse(raw, max_window_layers=70).windows == (None, None)
    assert parse(raw, use_sliding_window=False).windows == (None, None)
    assert parse(raw, use_sliding_window=ABSENT).windows == (None, None)
    assert parse(raw, layer_types=["sliding_attention", "full_attention"]).windows == (8, None)
    unused = dict(use_sliding_window=False, layer_types=["full_attention"] * 2, sliding_window=None)
    assert parse(raw, **unused).windows == (None, None)


@pytest.mark.parametrize("changes, key", [
    (dict(sliding_window=None), "sliding_window"),
    (dict(sliding_window=ABSENT), "sliding_window"),
    (dict(max_window_layers=ABSENT), "max_window_layers"),
    (dict(layer_types=["full_attention"]), "layer_types"),
    (dict(layer_types=["full_attention"] * 3), "layer_types"),
    (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types"),
    (dict(layer_types=["full_attention", 3]), "layer_types"),
    (dict(layer_types="full_attention"), "layer_types"),
    (dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=False), "layer_types"),
])  # fmt: skip
def test_unclear_windows_are_refused(changes, key):
    with refused(key):
        parse(QWEN2, **changes)


# Keys


@pytest.mark.parametrize("key, value", [
    ("num_experts", 8), ("logits_scaling", 2.0), ("embedding_multiplier", 12.0), ("rope_interleaved", True),
    ("attention_chunk_size", 8192), ("final_logit_softcapping", 30.0), ("dual_chunk_attention_config", {"a": 1}),
    ("use_mrope", True), ("mlp_bais", True), ("x\n\x1b[31m", 1), ("k" * 5000, NAN),
])  # fmt: skip
def test_unknown_keys_are_refused_unless_the_user_says_so(key, value):
    with pytest.raises(UnsupportedModel, match="is not known") as refusal:
        parse(LLAMA, **{key: value})
    assert refusal.value.message.isprintable() and "--ignore-config" in refusal.value.hint
    assert registry.parse(HFConfig(LLAMA | {key: value}, ignore=(key,))) == parse(LLAMA)


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(
        UnsupportedModel, match="one = 1 is not known, nor are two, three.*--ignore-config one,two,three"
    ):
        parse(LLAMA, one=1, two=2, three=3)


def test_ignoring_a_key_does_not_ignore_what_is_understood():
    with refused("hidden_act"):
        registry.parse(HFConfig(LLAMA | dict(hidden_act="gelu"), ignore=("hidden_act",)))


@pytest.mark.parametrize("key, value", [
    ("eos_token_id", [128001, 128008]), ("bos_token_id", None), ("pad_token_id", -1), ("rope_scaling", None),
    ("rope_scaling", {}), ("rope_parameters", {}), ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    ("rope_theta", 10000), ("attention_dropout", 0.1), ("auto_map", {"AutoConfig": "x.Y"}), ("use_cache", True),
    ("torch_dtype", "bfloat16"), ("dtype", "float16"), ("transformers_version", "4.31.0"), ("head_dim", None),
    ("initializer_range", 0.02), ("pretraining_tp", 1), ("hidden_act", "silu"), ("use_mrope", False),
    ("partial_rotary_factor", 1.0), ("partial_rotary_factor", 1), ("max_sequence_length", 2048),
    ("_attn_implementation", "sdpa"), ("model_type", ABSENT), ("attention_bias", None), ("mlp_bias", False),
    ("tie_word_embeddings", None), ("quantization_config", None), ("is_decoder", True), ("sliding_window", None),
])  # fmt: skip
def test_harmless_settings_change_nothing(key, value):
    want = {**vars(parse(LLAMA)), "dtype": parse(LLAMA, **{key: value}).dtype}
    assert vars(parse(LLAMA, **{key: value})) == want


# The file


def written(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / "config.json"


@pytest.mark.parametrize("data, message", [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ('{"a": 1} x', "not valid JSON"),
    ("[1]", "holds a list; expected an object"),
    ("null", "holds a NoneType"),
    ('"x"', "holds a str"),
    ('{"a": 1, "a": 2}', "'a' stands there twice"),
    ('{"b": {"a": 1, "c": 3, "a": 1}}', "'a' stands there twice"),
    (b'{"a": "\xff"}', "not valid JSON"),
    ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ("[" * 1_000_000, "nested too deeply"),
    (b'{"a": "' + b"x" * (4 << 20) + b'"}', "expected at most"),
    ("{" + ",".join(f'"{i}":1' for i in (*range(300_000), 299_999)) + "}", "'299999' stands there twice"),  # no n**2
], ids=range(15))  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(BadCheckpoint, match=re.escape(message)) as refusal:
        read_object(path)
    assert str(path) in str(refusal.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="is missing: a model directory in Hugging Face format"):
        HFConfig.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadCheckpoint, match="is not a file"):
        HFConfig.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadCheckpoint, match="is not a file"):
        read_object(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(BadCheckpoint, match="is not a file"):
        read_object(tmp_path / "endless")


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadCheckpoint, match="has 1073741824 bytes; expected at most 4194304"):
        HFConfig.load(tmp_path)


@pytest.mark.parametrize("depth", [100, 900])
def test_a_deep_value_is_refused_without_a_deep_message(tmp_path, depth):
    path = written(tmp_path, json.dumps(LLAMA)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises((UnsupportedModel, BadCheckpoint)) as refusal:
        registry.parse(HFConfig.load(path.parent))
    assert len(str(refusal.value)) < 300


# HFConfig


HF = HFConfig({"hidden_size": 64, "rope": {"theta": 1}, "act": "gelu", "head_dim": None, "flag": True})


def test_values_are_typed_nested_and_aliased():
    assert HF.get(int, "hidden_size") == 64
    assert HF.get(float, "rope.theta|rope_theta") == 1.0
    assert HF.get(float, "rope_theta|rope.theta") == 1.0
    assert HF.get(int, "head_dim", 8) == 8
    assert "head_dim" in HF and "heads" not in HF


@pytest.mark.parametrize("ask, message", [
    (lambda: HF.get(int, "num_layers"), "config.json has no 'num_layers', which this model needs"),
    (lambda: HF.get(int, "act"), "config.json: act = 'gelu' is a str; expected int"),
    (lambda: HF.get(int, "flag"), "config.json: flag = True is a bool; expected int"),
    (lambda: HF.between(int, "hidden_size", 1, 63), "config.json: hidden_size = 64; expected 1 to 63"),
    (lambda: HF.expect("act", "silu", "swish"), "config.json: act = 'gelu'; supported: 'silu', 'swish'"),
    (lambda: HF.agree(int, "hidden_size", "rope.theta", 0), "config.json: hidden_size = 64, but rope.theta = 1"),
])  # fmt: skip
def test_errors_name_the_key_the_value_and_the_remedy(ask, message):
    with pytest.raises(UnsupportedModel) as error:
        ask()
    assert str(error.value) == message


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        parse(LLAMA).hidden = 5


def test_biases_go_where_each_architecture_has_them():
    def biases(cfg):
        return cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias

    assert biases(parse(LLAMA, attention_bias=True)) == (True, True, False)
    assert biases(parse(LLAMA, mlp_bias=True)) == (False, False, True)
    assert biases(parse(QWEN2)) == (True, False, False)
    assert biases(parse(QWEN2, attention_bias=True)) == (True, False, False)  # transformers does not read it
    assert biases(parse(QWEN3)) == (True, True, False)
    for raw, key in ((MISTRAL, "attention_bias"), (MISTRAL, "mlp_bias"), (QWEN2, "mlp_bias"), (QWEN3, "mlp_bias")):
        with refused(key):
            parse(raw, **{key: True})


def test_qwen3_without_head_dim_has_the_default_of_transformers():
    assert parse(QWEN3, head_dim=ABSENT).head_dim == 128
