"""Control tokens: which texts are turn markers and the like, and how to encode content without ever making one.

A message that quotes "<|eot_id|>" must not end its turn. Such text is replaced by an unguessable placeholder before
the template is rendered. The rendered prompt is then encoded by a twin of the tokenizer that knows the control tokens
only by unguessable aliases: the template's own are spelled by alias, the ones in content stay ordinary text, and one
pass of the real tokenizer over the whole prompt does the rest, in context, with nothing re-implemented.
"""

import json
import re
import secrets
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lite_llm.errors import BadCheckpoint, UsageError

if TYPE_CHECKING:
    import tokenizers

# Some fine-tunes add their turn markers as ordinary tokens: anything of this shape counts as one.
_MARKER_SHAPE = re.compile(r"<\|.*\|>|<[｜].*[｜]>", re.DOTALL)


class ControlTokens:
    """The control tokens of one tokenizer with its chat template (source text, "" if none).

    Two grades. Strict: the special tokens and whatever looks like a marker; text in any content. Soft: further added
    tokens that the template writes, such as `<think>` and `<tool_call>`; text in content too, except in assistant
    messages, because there the model itself wrote them.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", template: str, unknown: int | None = None):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        strict = {t.content for t in added.values() if t.special or _MARKER_SHAPE.fullmatch(t.content)}
        soft = {
            t.content
            for t in added.values()
            # digits, words and runs of spaces may be added tokens as well, and are no markup
            if t.content in template and len(t.content) > 1 and not t.content.isspace() and not t.content.isalnum()
        }
        self._all = strict | soft
        self._strict_text, self._any_text = _any_of(strict), _any_of(self._all)
        self._beginnings = {text[:end] for text in self._all for end in range(1, len(text))}
        self._longest = max(map(len, self._all), default=0)
        # The unknown token is special, and ordinary text rightly turns into it.
        self._ids = {token for token, t in added.items() if t.content in self._all and token != unknown}

    def marks(self) -> "Marks":
        """A fresh set of placeholders, for one prompt."""
        return Marks(self)

    def encode(self, text: str, marks: "Marks", written: bool = True) -> list[int]:
        """The ids of a rendered prompt, without BOS; placeholders of `marks` become ordinary text.

        With `written`, control tokens outside placeholders are meant (the template wrote them); else nothing is.
        """
        meant = 0
        if not marks.texts and (written or not self._any_text.search(text)):
            meant = len(self._any_text.findall(text))
            ids = self._backend.encode(text, add_special_tokens=False).ids
        else:
            twin, aliases, true_ids = self._twin
            pattern = re.compile(f"{marks.nonce}(?P<mark>\\d{{6}})|{self._any_text.pattern}")

            def spell(match: re.Match) -> str:
                nonlocal meant
                if match["mark"]:
                    return marks.texts[int(match["mark"])]
                meant += 1
                return aliases[match[0]]

            text = pattern.sub(spell, text) if written else text
            ids = [true_ids.get(token, token) for token in twin.encode(text, add_special_tokens=False).ids]
        # Normalizers (full-width forms) and vocabularies that hold "<s>" as a word can still produce one from text.
        if sum(token in self._ids for token in ids) > meant:
            raise UsageError(
                "a message contains text that this tokenizer turns into a control token",
                hint="remove or rewrite text that looks like a special token, for example " + min(self._all, key=len),
            )
        return ids

    @cached_property
    def _twin(self) -> tuple["tokenizers.Tokenizer", dict[str, str], dict[int, int]]:
        """The tokenizer with renamed control tokens; text -> alias; the twin's ids of added tokens -> the true ones.

        Costs about a second for a vocabulary of 128k, once, and only if some content looks like a control token.
        """
        from tokenizers import Tokenizer

        spec = json.loads(self._backend.to_str())
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None
        nonce, aliases, names = secrets.token_hex(16), {}, {}
        for number, token in enumerate(spec["added_tokens"]):
            name = text = token["content"]
            if text in self._all:
                # private-use characters: no normalizer touches them and no word character joins them
                name = aliases[text] = token["content"] = f"\ue000{nonce}{number}\ue001"
            names[name] = token["id"]
        twin = Tokenizer.from_str(json.dumps(spec))
        true_ids = {twin.token_to_id(name): token for name, token in names.items()}
        for alias in aliases.values():
            if self._backend.model.id_to_token(twin.token_to_id(alias)) is not None:
                raise BadCheckpoint(
                    "tokenizer.json: the vocabulary's ids have holes; expected 0 to size - 1, without which special "
                    "tokens in messages cannot be kept apart",
                    hint="remove special-token text from the messages, or repair the vocabulary",
                )
        return twin, aliases, true_ids


class Marks:
    """The placeholders of one prompt and the texts that they stand for."""

    def __init__(self, control: ControlTokens):
        self._control = control
        # Digits only: they survive every filter of a template (upper, trim, tojson, escape).
        self.nonce = str(10**23 + secrets.randbelow(9 * 10**23))
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}
        self.chars = 0  # characters seen so far, for a cap on the whole input

    def mark(self, value: Any, strict: bool = False) -> Any:
        """A copy of a string, or of lists and dicts of strings, with placeholders for control-token text.

        Lone surrogates become U+FFFD. `strict` leaves the soft grade in place. The beginning of a control token at
        the end of a string is replaced as well, so that no string that the template writes next can complete it.
        """
        if isinstance(value, str):
            self.chars += len(value)
            value = without_surrogates(value)
            pattern = self._control._strict_text if strict else self._control._any_text
            return self._mark_end(pattern.sub(lambda match: self._place(match[0]), value))
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item, strict) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, strict) for item in value]
        return value

    def _mark_end(self, text: str) -> str:
        for length in range(min(self._control._longest, len(text)), 0, -1):
            if text[-length:] in self._control._beginnings:
                return text[:-length] + self._place(text[-length:])
        return text

    def _place(self, text: str) -> str:
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return f"{self.nonce}{number:06d}"


def without_surrogates(text: str) -> str:
    """`text` with halves of surrogate pairs, which no tokenizer takes, replaced by U+FFFD (whole pairs are joined)."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _any_of(texts: set[str]) -> re.Pattern:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
