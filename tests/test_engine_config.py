"""The user's wishes are checked before anything is opened."""

import pytest

from lite_llm.config import EngineConfig
from lite_llm.errors import UsageError

NAN = float("nan")


@pytest.mark.parametrize("field", ["context", "kv_tokens", "max_requests", "step_tokens", "threads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, NAN], ids=str)
def test_engine_sizes_are_whole_numbers(field, value):
    with pytest.raises(UsageError, match=field):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("changes, key", [
    (dict(memory_fraction=0), "memory_fraction"), (dict(memory_fraction=1.1), "memory_fraction"),
    (dict(memory_fraction=NAN), "memory_fraction"),
    (dict(memory_fraction="0.5"), "memory_fraction"), (dict(prefix_cache=1), "prefix_cache"),
    (dict(ignore_config="key"), "ignore_config"),
    (dict(dtype="int8"), "dtype"),
    (dict(max_slowdown=0.9), "max_slowdown"), (dict(max_slowdown=NAN), "max_slowdown"),
    (dict(max_slowdown="2"), "max_slowdown"), (dict(max_slowdown=True), "max_slowdown"),
    (dict(drafts=-1), "drafts = -1; expected a whole number from 0 to 15"), (dict(drafts=16), "drafts = 16"),
    (dict(drafts=True), "drafts"), (dict(drafts=2.0), "drafts"), (dict(drafts="4"), "drafts"),
    (dict(drafts=None), "drafts"), (dict(step_tokens=8, max_requests=9), "step_tokens"),
])  # fmt: skip
def test_engine_settings_out_of_range_are_refused(changes, key):
    with pytest.raises(UsageError, match=key):
        EngineConfig(**changes)


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        EngineConfig().context = 5
