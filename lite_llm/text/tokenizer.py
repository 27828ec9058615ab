"""Text to token ids and back, through the checkpoint's own tokenizer files and chat template.

`transformers` finds and reads the files and renders the template; everything else runs on the Rust tokenizer in it,
which is never changed after `load` and so may be shared by threads.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import BadCheckpoint, ContextExceeded, EnvironmentProblem, UnsupportedModel, UsageError
from lite_llm.jsonfile import read_object
from lite_llm.text.control import ControlTokens, Marks, without_surrogates
from lite_llm.text.template import KEYS, ChatTemplate, check_messages, text_of

if TYPE_CHECKING:
    import tokenizers

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_JSON_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "config.json")

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class: transformers 5 has renamed it
_GENERIC_MODELS = ("llama", "llava", "llava_next")

_IMPORTING = threading.Lock()
"""For transformers. It puts another object in the place of its module meanwhile, and who waits for it gets the old one,
which has no names."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CALL_START, CALL_END = "<tool_call>", "</tool_call>"  # text to those who read calls, even where they are special tokens

BASE_MODEL = (
    "This is a base model (no chat template). Continuing in completion mode; add a chat_template.jinja to override."
)


class Tokenizer:
    """One checkpoint's tokenizer. `load` makes it; `notice` is what a user should be told once ("" if nothing).

    `special_ids` are skipped by `decode`; `eos_ids` is the tokenizer's own end-of-text token only, the model's configs
    may name more. `vocab_size` is one more than the highest id.
    """

    def __init__(self, hf: Any, notices: Sequence[str] = ()):
        backend: tokenizers.Tokenizer = hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        markup = {t for t, token in added.items() if token.content in (CALL_START, CALL_END)}
        special = {t for t, token in added.items() if token.special}
        self.special_ids = frozenset(special | set(hf.all_special_ids)) - markup
        self.bos_id: int | None = hf.bos_token_id
        self.eos_ids = frozenset(() if hf.eos_token_id is None else (hf.eos_token_id,))
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self._prefix = _prefix(backend)
        self._piece = lru_cache(maxsize=1 << 16)(self._read_piece)
        self._joins = _joins(backend)
        self.plain_text = lru_cache(maxsize=1 << 16)(self._plain_text)
        self._template = ChatTemplate(hf) if hf.chat_template else None
        self.has_template = self._template is not None
        source = self._template.source if self._template else ""
        self._control = ControlTokens(backend, source, unknown=hf.unk_token_id)
        self.notice = "\n".join([*notices, *(() if self.has_template else (BASE_MODEL,))])

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer of a local checkpoint directory. Opens no connection and runs no code of the checkpoint."""
        path = Path(path)
        if not path.is_dir():
            raise BadCheckpoint(f"{path}: no such directory; expected a checkpoint with tokenizer.json")
        if not any((path / name).is_file() for name in _VOCABULARIES):
            raise BadCheckpoint(
                f"{path}: no tokenizer; expected one of {', '.join(_VOCABULARIES)}",
                hint="copy the tokenizer files of the original checkpoint into this directory",
            )
        auto_map = _json(path / "tokenizer_config.json").get("auto_map")
        notices = ()
        if auto_map:
            notices = (f"tokenizer_config.json: auto_map = {auto_map!r} is ignored; no code of a checkpoint is run.",)
        hf = _load(path, custom=bool(auto_map))
        if getattr(hf, "backend_tokenizer", None) is None:
            raise UnsupportedModel(
                f"{path}: tokenizer class {type(hf).__name__} has no fast form; supported: those with tokenizer.json",
                hint="convert it with transformers (save_pretrained writes tokenizer.json)",
            )
        if not hf.chat_template:  # processors (LLaVA) keep it in a file that tokenizers do not read
            hf.chat_template = _json(path / "chat_template.json").get("chat_template")
        return cls(hf, notices)

    @staticmethod
    def prepare(path: Path | str | None) -> threading.Thread:
        """Begin to import what `load(path)` needs, in a thread: 2,000 files, which can be waited for beside torch's.

        `load` waits for it, and says what is wrong. Of a hub id, or None, only what every checkpoint needs.
        """
        thread = threading.Thread(target=_import_for, args=(path,), name="lite_llm-tokenizer")  # waited for at the end
        thread.start()
        return thread

    def encode(self, text: str, max_chars: int | None = None, bos: bool = True) -> list[int]:
        """The ids of a plain prompt, BOS added if the tokenizer does so and the text does not begin with it.

        Without `bos` nothing is added. ContextExceeded for more than `max_chars` characters.

        Special tokens written in the text are honoured, so that a template can be written by hand. Text from
        strangers belongs in `chat_ids`. Lone surrogates become U+FFFD.
        """
        if not isinstance(text, str):
            raise UsageError(f"the prompt is a {type(text).__name__}; expected a string")
        _check_length(len(text), max_chars)
        ids = self._backend.encode(without_surrogates(text), add_special_tokens=bos).ids
        if not bos:
            return ids
        added = len(self._prefix)
        return ids[added:] if added and ids[added : 2 * added] == self._prefix else ids

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_chars: int | None = None,
    ) -> list[int]:
        """The ids of a conversation in the checkpoint's chat format.

        Messages are OpenAI's: `role`, and `content` as a string or a list of parts (text parts are joined by
        newlines; image parts reach templates that take them). Text in them never becomes a control token. BOS is
        there once if the template writes it or the tokenizer adds it to plain prompts. `continue_final` leaves the
        last message, the assistant's, open to be continued. A base model gets the contents joined by newlines.
        """
        messages = check_messages(messages)
        if continue_final and messages[-1]["role"] != "assistant":
            raise UsageError(
                f"messages[{len(messages) - 1}].role = {messages[-1]['role']!r}; only an assistant message can be "
                "continued"
            )
        marks = self._control.marks()
        try:
            marked = [_mark(message, marks) for message in messages]
            marked_tools = marks.mark(list(tools)) if tools else None
        except RecursionError:
            raise UsageError("messages or tools are nested too deeply to be read") from None
        _check_length(marks.chars, max_chars)
        if self._template is None:
            if tools:
                raise UsageError("tools need a chat template; this checkpoint has none", hint="send no tools")
            texts = (text_of(message, f"messages[{index}]") for index, message in enumerate(messages))
            text = without_surrogates("\n".join(texts))
            return self._with_prefix(self._control.encode(text, self._control.marks(), written=False))
        text = self._template.render(marked, add_generation_prompt, continue_final, marked_tools)
        return self._with_prefix(self._control.encode(text, marks))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, as `transformers` decodes without cleaning up spaces. Ids outside the vocabulary are skipped."""
        if skip_special_tokens:
            ids = [token for token in ids if token not in self.special_ids]
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """As a tokenizer.json holds it."""
        return self._backend.to_str()

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary's entry; None if there is none."""
        return self._backend.token_to_id(piece)

    def piece(self, token: int) -> str | None:
        """The vocabulary's entry for an id ("Ġthe", "▁the", "<0x0A>"); None if `decode` skips the id."""
        return self._piece(token)

    def token_text(self, token: int) -> str:
        """How one token reads in the middle of a text, for log probabilities: " the", "<s>", U+FFFD for a part of a
        character; "" for ids outside the vocabulary."""
        alone = self._backend.decode([token], skip_special_tokens=False)
        return self._backend.decode([token, token], skip_special_tokens=False)[len(alone) :]

    def _plain_text(self, token: int) -> str:
        """What a token adds to any text that does not end within a character; "" if that is not always the same."""
        piece = self._read_piece(token)
        if not self._joins or piece is None or BYTE_TOKEN.fullmatch(piece):
            return ""
        text = self.token_text(token)
        return "" if "\ufffd" in text else text

    def _read_piece(self, token: int) -> str | None:
        return None if token in self.special_ids else self._backend.id_to_token(token)

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """BOS exactly once: added if the template left it out, cut if a template wrote it twice."""
        prefix = self._prefix or ([] if self.bos_id is None else [self.bos_id])
        size = len(prefix)
        while size and ids[:size] == prefix == ids[size : 2 * size]:
            ids = ids[size:]
        if self._prefix and ids[:size] != prefix:
            ids = prefix + ids
        return ids


def _mark(message: dict[str, Any], marks: Marks) -> dict[str, Any]:
    # What the assistant wrote may hold its own `<think>` or `<tool_call>`; a special token never.
    strict = message["role"] == "assistant"
    parts = [
        part | {"text": marks.mark(part["text"], strict)} if part["type"] == "text" else part
        for part in message["content"]
    ]
    extras = {key: marks.mark(message[key], strict=key == "reasoning_content") for key in KEYS if key in message}
    return message | extras | {"content": parts}


def _joins(backend: "tokenizers.Tokenizer") -> bool:
    """Whether the decoder is one of those known to put the texts of tokens behind each other, but for the first."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if decoder.get("type") == "Sequence":  # Llama-2's and its like
        return [step["type"] for step in decoder["decoders"]] == ["Replace", "ByteFallback", "Fuse", "Strip"]
    return decoder.get("type") == "ByteLevel"


def _prefix(backend: "tokenizers.Tokenizer") -> list[int]:
    """The ids that the tokenizer puts before every text: BOS for most, nothing for Qwen2.5."""
    text = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return whole[:start]
    return []


def _check_length(chars: int, max_chars: int | None) -> None:
    if max_chars is not None and chars > max_chars:
        raise ContextExceeded(
            f"the prompt has {chars:,} characters; at most {max_chars:,} are taken", hint="send a shorter prompt"
        )


def _import_for(path: Path | str | None) -> None:
    with _IMPORTING, contextlib.suppress(Exception):  # `load` says what is wrong
        from transformers import PreTrainedTokenizerFast  # noqa: F401

        if path is not None and Path(path).is_dir() and not _is_generic(Path(path)):
            from transformers import AutoTokenizer  # noqa: F401


def _is_generic(path: Path) -> bool:
    """Whether AutoTokenizer would choose PreTrainedTokenizerFast, which it takes 2,300 more files to say.

    It gives some model types their own class, whatever class is named: qwen2 is one. So only those that it does not.
    """
    named = _json(path / "tokenizer_config.json").get("tokenizer_class")
    model_type = _json(path / "config.json").get("model_type")
    return (path / "tokenizer.json").is_file() and named in _GENERIC and model_type in _GENERIC_MODELS


def _load(path: Path, custom: bool) -> Any:
    try:
        with _IMPORTING:
            from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise EnvironmentProblem(
            f"transformers cannot be imported: {error}", hint="pip install transformers"
        ) from error

    # What keeps the checkpoint's code out: with trust_remote_code=False (None would ask on the terminal) transformers
    # takes tokenizer and config classes from its own tables by name and raises for a class that only `auto_map` names.
    # A custom class with a tokenizer.json still works through the generic class, which reads nothing but that file.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if custom and (path / "tokenizer.json").is_file() or _is_generic(path):
            return PreTrainedTokenizerFast.from_pretrained(path, **options)
        from transformers import AutoTokenizer, PreTrainedConfig

        if _json(path / "tokenizer_config.json").get("tokenizer_class"):
            # Of the model's config only its type matters then; reading it whole would import the model, and take 1 s.
            options["config"] = PreTrainedConfig(name_or_path=str(path))
            options["config"].model_type = _json(path / "config.json").get("model_type", "")
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the readers of many formats raise anything
        if custom:
            raise UnsupportedModel(
                f"{path}: the tokenizer is Python code of the checkpoint (auto_map), which is never run",
                hint="convert it with transformers (save_pretrained writes tokenizer.json)",
            ) from error
        for name in _JSON_FILES:
            _json(path / name)  # names the file, if one is damaged
        if isinstance(error, ImportError):
            raise EnvironmentProblem(
                f"{path}: the tokenizer needs a package that is not installed: {_line(error)}",
                hint="install it, or convert the tokenizer to tokenizer.json",
            ) from error
        raise BadCheckpoint(
            f"{path}: the tokenizer files cannot be read: {type(error).__name__}: {_line(error)}",
            hint="compare tokenizer.json and tokenizer_config.json with the original checkpoint",
        ) from error


def _json(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is no such file."""
    return read_object(file, most_bytes=16 << 20) if file.exists() else {}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
