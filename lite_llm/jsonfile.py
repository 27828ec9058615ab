"""The one way in which a JSON file of a checkpoint is read: an object, each key once, of a bounded size."""

import json
from pathlib import Path
from typing import Any

from lite_llm.errors import BadCheckpoint, shown

MOST_BYTES = 4 << 20


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a file of at most `most_bytes`. BadCheckpoint, naming the file, if it is anything else."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never ends
            raise BadCheckpoint(f"{path} is not a file")
        if path.stat().st_size > most_bytes:
            raise BadCheckpoint(f"{path} has {path.stat().st_size} bytes; expected at most {most_bytes}")
        return parse_object(path.read_bytes(), path)
    except FileNotFoundError:
        raise BadCheckpoint(
            f"{path} is missing", "a model directory in Hugging Face format has config.json and *.safetensors"
        ) from None
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """The object in `text`, which comes from `path`. BadCheckpoint, naming the file, if it is anything else."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise BadCheckpoint(f"{path} is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadCheckpoint(f"{path} is not valid JSON: {error}", "download the file again") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return table
