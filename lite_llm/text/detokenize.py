"""Token ids to text, a few at a time: what has been returned never changes and joins to the batch decode.

The trap is that decoding is not per token. A character may be spread over several byte-level tokens; a decoder may
drop the first space of a text, so a token reads differently at the start; and a byte-fallback decoder (Llama-2) looks
at a whole run of `<0xNN>` tokens: one invalid byte turns the run, already valid characters included, into U+FFFD.
So text is the difference of two decodes over a short window of past tokens, and two things are held back: a run of
byte tokens until another token ends it, and one trailing U+FFFD, which may be the start of a character. Most tokens
are whole characters, though, and where the last text was whole too, what they add is looked up.
"""

from collections.abc import Sequence

from lite_llm.text.tokenizer import BYTE_TOKEN, Tokenizer

# Past tokens decoded along with new ones. An unfinished UTF-8 sequence has at most 3 bytes and a token at least one,
# so a decode that starts mid-character 8 tokens back agrees with the full decode long before the new tokens.
_WINDOW = 8


class Detokenizer:
    """One request's stream of output ids as text; special tokens and ids outside the vocabulary are skipped.

    The chunks join to `tokenizer.decode(output_ids)`. With `continuation`, they join to the text that follows the
    prompt: `tokenizer.decode(prompt_ids + output_ids)` without its start `tokenizer.decode(prompt_ids)`. The two
    differ by the first space in tokenizers of the Llama-2 family ("time" or " time"). Byte tokens at the very end of
    the prompt are not looked at, so a character is not continued across the border in that family.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), continuation: bool = False):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window, then tokens whose text has not been returned
        if continuation:
            self._ids = self._context(prompt_ids)
        self._done = len(self._ids)  # the text of the tokens before it is returned, but for a trailing U+FFFD
        self._before: str | None = tokenizer.decode(self._ids)  # their text; None: not decoded, no U+FFFD at its end
        self._open = False  # the last token is a byte token
        self._whole = _whole(self._before)  # some text has been returned, and nothing is held back

    def add(self, token_ids: Sequence[int]) -> str:
        """Take the next output ids; returns the new text that no later token can change, often none."""
        shown, ids = "", self._ids
        for at, token in enumerate(token_ids):
            text = self._tokenizer.plain_text(token) if self._whole else ""
            if not text:
                return shown + self._add(token_ids[at:])
            if len(ids) >= 2 * _WINDOW:
                del ids[:_WINDOW]
            ids.append(token)
            self._done, self._before = len(ids), None
            shown += text
        return shown

    def finish(self) -> str:
        """The output has ended: returns what was held back. Nothing may be added after it."""
        text = self._tokenizer.decode(self._ids)[_settled(self._decoded()) :]
        self._ids, self._before = [], ""
        return text

    def _decoded(self) -> str:
        if self._before is None:
            self._before = self._tokenizer.decode(self._ids[: self._done])
        return self._before

    def _add(self, token_ids: Sequence[int]) -> str:
        for token in token_ids:
            piece = self._tokenizer.piece(token)
            if piece is not None:
                self._ids.append(token)
                self._open = BYTE_TOKEN.fullmatch(piece) is not None
        if self._open or len(self._ids) == self._done:
            self._whole = self._whole and not self._open
            return ""
        after = self._tokenizer.decode(self._ids)
        text = after[_settled(self._decoded()) : _settled(after)]
        self._before = after
        if len(self._ids) > _WINDOW:
            window = self._tokenizer.decode(self._ids[-_WINDOW:])
            if window:  # without text it would not show whether the decoder has dropped the first space
                self._ids, self._before = self._ids[-_WINDOW:], window
        self._done, self._whole = len(self._ids), _whole(self._before)
        return text

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        pieces = [(token, self._tokenizer.piece(token)) for token in prompt_ids[-4 * _WINDOW :]]
        pieces = [(token, piece) for token, piece in pieces if piece is not None]
        while pieces and BYTE_TOKEN.fullmatch(pieces[-1][1]):
            pieces.pop()
        return [token for token, _ in pieces][-_WINDOW:]


def _whole(text: str) -> bool:
    return bool(text) and not text.endswith("\ufffd")


def _settled(text: str) -> int:
    """How much of a decode stays when more tokens follow: all but one U+FFFD at the end.

    One is enough: a decoder writes one U+FFFD for the longest valid beginning of a character, and earlier ones
    belong to bytes that no byte after them can repair.
    """
    return len(text) - text.endswith("\ufffd")
