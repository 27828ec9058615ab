"""Tables of tiles for tests: what was read and chosen before must not stay."""

import contextlib
from collections.abc import Iterator

from lite_llm.ops.triton import tuning


@contextlib.contextmanager
def fresh_tables() -> Iterator[None]:
    """Inside, tables are read anew; what they said is forgotten on leaving."""
    caches = (tuning._rows, tuning.table, tuning.choose, tuning.choose_attend, tuning.choose_decode)
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
