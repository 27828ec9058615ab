"""What callers ask, as token ids and pictures: the tokenizer, the chat template and the image processor in front."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lite_llm.config import ModelConfig, VisionConfig
from lite_llm.engine.request import Tiles
from lite_llm.errors import SourceProblem, UsageError
from lite_llm.text.images import MOST_TOGETHER, Picture, open_picture, take_pictures
from lite_llm.text.processor import Processor, Receipt, Tower, expand
from lite_llm.text.tools import takes_tools

if TYPE_CHECKING:
    from lite_llm.text import Tokenizer
    from lite_llm.text.fetch import Fetcher, Gone
    from lite_llm.text.images import Decode, Source

_CHARS_A_TOKEN = 256
"""More than any token has, so that a text far beyond the context is refused before it is tokenized."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt that needs no more work: each picture stands in `ids` as its placeholders."""

    ids: Sequence[int]
    pictures: tuple[tuple[int, Tiles], ...] = ()  # and the first of each one's placeholders; in order


Message = Mapping[str, object]
Prompt = str | Sequence[int] | Sequence[Message] | Encoded
"""Text, token ids, a conversation in OpenAI's form, or what `LLM.read` has made of one of these."""


def tower_of(cfg: VisionConfig) -> Tower:
    """What an image processor has to know of a model."""
    return Tower(cfg.image_token, cfg.image_size, cfg.patch_size, cfg.class_token, cfg.resolutions)


class Reader:
    """Reads prompts for one model; may be used by several threads."""

    def __init__(
        self,
        name: str,
        cfg: ModelConfig,
        tokenizer: "Tokenizer | None" = None,
        processor: Processor | None = None,
        fetcher: "Fetcher | None" = None,
        decode: "Decode | None" = None,
    ):
        """`name` is for messages. Without a `fetcher` no URL is opened; without `decode`, pictures are decoded here."""
        self._name, self._cfg, self._tokenizer = name, cfg, tokenizer
        self._processor, self._fetcher, self._decode = processor, fetcher, decode
        self._tiles: WeakKeyDictionary[Picture, Tiles] = WeakKeyDictionary()

    @classmethod
    def of(
        cls, folder: Path, name: str, cfg: ModelConfig, tokenizer: "Tokenizer", fetcher: "Fetcher | None" = None,
        decode: "Decode | None" = None,
    ) -> "Reader":  # fmt: skip
        """With the image processor of a checkpoint, if it has one."""
        processor = Processor.load(folder, tower_of(cfg.vision)) if cfg.vision is not None else None
        return cls(name, cfg, tokenizer, processor, fetcher, decode)

    def read(self, prompt: Prompt, tools: Sequence[Mapping[str, object]] = (), gone: "Gone | None" = None) -> Encoded:
        """Everything that the engine needs of a prompt. UsageError for one that cannot be used, or takes no `tools`."""
        if tools and not (isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)):
            raise UsageError("tools are for conversations", "pass messages, or leave tools out")
        if isinstance(prompt, Encoded):
            return prompt
        ids, pictures = self._take(prompt, tools, gone)
        made = []
        for i, (start, picture) in enumerate(pictures, 1):
            with _naming(i, len(pictures)):
                made.append((start, self._prepare(picture)))
        return Encoded(ids, tuple(made))

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; prepares no pixels."""
        return list(prompt.ids) if isinstance(prompt, Encoded) else self._take(prompt)[0]

    def open(self, source: "Source | Picture", gone: "Gone | None" = None) -> Picture:
        """One picture, decoded. UsageError for what is none, or if this model takes none."""
        self.check_vision()
        return source if isinstance(source, Picture) else open_picture(source, self._fetcher, self._decode, gone)

    def receipt(self, picture: Picture, kv_bytes: int) -> Receipt:
        """What was sent, what the model sees of it, and what that costs at `kv_bytes` per token."""
        return self.check_vision().receipt(picture, kv_bytes)

    def check_vision(self) -> Processor:
        """UsageError if this model takes no pictures."""
        if self._cfg.vision is None:
            raise UsageError(f"{self._name} takes text only", "load a vision model, or send no pictures")
        if self._processor is None:
            raise UsageError(f"{self._name} has random weights and no image processor", "pass prepared pixels")
        return self._processor

    def _take(
        self, prompt: Prompt, tools: Sequence[Mapping[str, object]] = (), gone: "Gone | None" = None
    ) -> tuple[list[int], list[tuple[int, Picture]]]:
        """Token ids with placeholders for pictures, and where each picture begins."""
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], int):
            return list(prompt), []
        if self._tokenizer is None:
            raise UsageError(f"{self._name} has random weights and no tokenizer", "pass token ids")
        most = self._cfg.max_len * _CHARS_A_TOKEN
        if isinstance(prompt, str):
            return self._place(self._tokenizer.encode(prompt, max_chars=most), [])
        if tools and not self._takes_tools:
            raise UsageError(f"the chat template of {self._name} takes no tools", "leave tools out")
        messages, sources = take_pictures(prompt)
        if sources:
            self.check_vision()
        ids = self._tokenizer.chat_ids(messages if sources else prompt, tools=tools, max_chars=most)
        return self._place(ids, self._open_all(sources, gone))

    def _open_all(self, sources: "Sequence[Source | Picture]", gone: "Gone | None") -> list[Picture]:
        """UsageError as soon as those that are decoded for this have too many pixels together."""
        pictures, left = [], MOST_TOGETHER
        for i, source in enumerate(sources, 1):
            with _naming(i, len(sources)):
                pictures.append(picture := self.open(source, gone))
            if picture is not source:
                left -= picture.size[0] * picture.size[1]
            if left < 0:
                raise UsageError(f"the pictures have more than {MOST_TOGETHER:,} pixels together", "send them smaller")
        return pictures

    @cached_property
    def _takes_tools(self) -> bool:
        return takes_tools(self._tokenizer)

    def _place(self, ids: list[int], pictures: list[Picture]) -> tuple[list[int], list[tuple[int, Picture]]]:
        if self._cfg.vision is None:
            return ids, []
        counts = [self.check_vision().tokens(picture) for picture in pictures]
        ids, places = expand(ids, self._cfg.vision.image_token, counts)
        return ids, [(place.start, picture) for place, picture in zip(places, pictures, strict=True)]

    def _prepare(self, picture: Picture) -> Tiles:
        """As long as somebody holds a picture, this is done once."""
        if picture not in self._tiles:
            made = self.check_vision().prepare(picture)
            self._tiles[picture] = Tiles(made.pixels, made.size, made.tokens, picture.digest)
        return self._tiles[picture]


@contextlib.contextmanager
def _naming(number: int, count: int) -> Iterator[None]:
    """Of several pictures, an error says which one it is about."""
    try:
        yield
    except (UsageError, SourceProblem) as error:
        if count == 1:
            raise
        raise type(error)(f"picture {number} of {count}: {error.message}", error.hint) from error
