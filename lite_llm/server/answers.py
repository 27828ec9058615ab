"""OpenAI's documents: whole answers and the chunks of a stream, for chats and for completions."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import lite_llm
from lite_llm.engine.request import TokenLogprobs
from lite_llm.outputs import Choice, Output
from lite_llm.server.job import Piece
from lite_llm.server.tools import Calls
from lite_llm.text import Tokenizer

FINGERPRINT = f"lite_llm-{lite_llm.__version__}"
_encoded = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder each time


class Vocabulary:
    """Tokens as logprobs show them; remembers those that it was asked for. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.text = functools.lru_cache(maxsize=1 << 16)(tokenizer.token_text if tokenizer else _nameless)

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """`bytes` is null for a token that is a part of a character."""
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _nameless(token: int) -> str:
    return f"token_id:{token}"


class Form(Protocol):
    """One kind of document. The choice that a piece or an answer belongs to is `index`."""

    def shown(self, output: Output) -> Output: ...

    def whole(self, index: int, choice: Choice, output: Output) -> dict[str, Any]: ...

    def first(self, index: int) -> dict[str, Any] | None: ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]: ...


@dataclass
class ChatForm:
    """`calls`: makes what reads the tool calls of one answer; None without tools. Made for one request."""

    vocabulary: Vocabulary
    calls: Callable[[], Calls] | None = None
    _calls: dict[int, Calls] = field(default_factory=dict)  # of each choice that has begun
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def shown(self, output: Output) -> Output:
        return output

    def whole(self, index: int, choice: Choice, output: Output) -> dict[str, Any]:
        message, reason = {"role": "assistant", "content": choice.text, "refusal": None}, choice.finish_reason
        if self.calls:
            reader = self.calls()
            content, calls = reader.add(choice.text, last=True)
            if calls:
                told = [{key: value for key, value in call.items() if key != "index"} for call in calls]
                message |= {"content": content or None, "tool_calls": told}
            reason = reader.reason(reason)
        logprobs = self._logprobs(_shown(choice)) if choice.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs} | _ending(reason)

    def first(self, index: int) -> dict[str, Any] | None:
        return _chat_chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        index, text, calls, reason = piece.index, piece.text, [], piece.finish_reason
        if self.calls:
            reader = self._calls.setdefault(index, self.calls())
            text, calls = reader.add(text, last=reason is not None)
            reason = reason and reader.reason(reason)
        parts = []
        if text or piece.logprobs or reason is None and not self.calls:  # with tools, text may be held back for long
            logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
            parts.append(_chat_chunk(index, {"content": text}, logprobs))
        for call in calls:  # at first without arguments, as clients know it
            head = call | {"function": call["function"] | {"arguments": ""}}
            rest = {"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}
            parts += [_chat_chunk(index, {"tool_calls": [part]}) for part in (head, rest)]
        if reason is not None:
            parts.append(_chat_chunk(index, {}, reason=reason))
        return parts

    def _logprobs(self, tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
        entry = self.vocabulary.entry
        content = [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}


def _chat_chunk(index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs} | _ending(reason)


@dataclass
class TextForm:
    """`echo`: the prompts of all choices, to stand before their answers; "" each without. `mute`: there are no
    answers, as far as the client is concerned. Made for one request."""

    vocabulary: Vocabulary
    echo: Sequence[str]
    mute: bool = False
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of a choice so far, for logprobs
    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def shown(self, output: Output) -> Output:
        """What the client is to see of it."""
        if not self.mute:
            return output
        choices = tuple(
            dataclasses.replace(
                choice, text="", token_ids=(), finish_reason="length" if choice.token_ids else choice.finish_reason
            )
            for choice in output.choices
        )
        usage = dataclasses.replace(output.usage, completion_tokens=0)
        return dataclasses.replace(output, choices=choices, usage=usage)

    def whole(self, index: int, choice: Choice, output: Output) -> dict[str, Any]:
        logprobs = self._logprobs(index, () if self.mute else _shown(choice)) if choice.logprobs else None
        if logprobs and self.echo[index] and output.params.prompt_logprobs is not None:
            logprobs = {key: value + logprobs[key] for key, value in self._prompt(index, output).items()}
        return _text_choice(index, self.echo[index] + choice.text, logprobs, choice.finish_reason)

    def first(self, index: int) -> dict[str, Any] | None:
        return _text_choice(index, self.echo[index]) if self.echo[index] else None

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        index, parts = piece.index, []
        if piece.finish_reason is None or piece.text or piece.logprobs:
            logprobs = self._logprobs(index, piece.logprobs) if piece.logprobs else None
            parts.append(_text_choice(index, piece.text, logprobs))
        if piece.finish_reason is not None:
            parts.append(_text_choice(index, "", reason=piece.finish_reason))
        return parts

    def _prompt(self, index: int, output: Output) -> dict[str, Any]:
        """Of the first token nothing is known. A BOS that the prompt did not have takes no room in the text."""
        text, known = self.vocabulary.text, output.prompt_logprobs
        names = [text(token) for token in output.prompt_ids]
        ends = list(itertools.accumulate(reversed([len(name) for name in names])))[::-1]  # before the answer
        return {
            "tokens": names,
            "token_logprobs": [None, *(one.logprob for one in known)],
            "top_logprobs": [None, *({text(token): logprob for token, logprob in one.top} for one in known)],
            "text_offset": [max(len(self.echo[index]) - end, 0) for end in ends],
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        text = self.vocabulary.text
        names, offsets = [text(one.token) for one in tokens], []
        at = self._offsets.get(index, len(self.echo[index]))
        for name in names:
            offsets.append(at)
            at += len(name)
        self._offsets[index] = at
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{text(token): logprob for token, logprob in one.top} for one in tokens],
            "text_offset": offsets,
        }


def _text_choice(index: int, text: str, logprobs: dict | None = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs} | _ending(reason)


def _ending(reason: str | None) -> dict[str, Any]:
    """OpenAI's word, and what it cannot say. Clients take a reason that they do not know for "stop", or object."""
    if reason == "timeout":
        return {"finish_reason": "length", "finish_details": {"type": "timeout"}}
    return {"finish_reason": reason}


def _shown(choice: Choice) -> Sequence[TokenLogprobs]:
    """Those of the answer's tokens; a stop token is none of it."""
    return choice.logprobs[:-1] if isinstance(choice.stop, int) else choice.logprobs


def usage_of(outputs: Sequence[Output]) -> dict[str, Any]:
    prompt = sum(output.usage.prompt_tokens for output in outputs)
    completion = sum(output.usage.completion_tokens for output in outputs)
    cached = sum(output.usage.cached_tokens for output in outputs)
    return _usage(prompt, completion) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Document:
    """The answer to one HTTP request in one form: whole, or as the events of a stream."""

    def __init__(self, form: Form, id: str, model: str, prompt_tokens: int, token_ids: bool = False):
        """`token_ids`: choices say theirs, those of a stream what is new."""
        self._form, self._prompt_tokens, self._token_ids = form, prompt_tokens, token_ids
        self._head = {"id": id, "created": int(time.time()), "model": model, "system_fingerprint": FINGERPRINT}
        # All chunks begin alike, and are too many to encode that each time.
        self._opening = "data: " + _encoded(self._head | {"object": form.chunk_object})[:-1]
        self._begun: set[int] = set()
        self._tokens = 0
        self._unsaid: dict[int, list[int]] = {}  # of each choice, ids whose chunk has not come

    def whole(self, outputs: Sequence[Output]) -> bytes:
        outputs = [self._form.shown(output) for output in outputs]
        choices = [(choice, output) for output in outputs for choice in output.choices]
        forms = [self._form.whole(index, *found) for index, found in enumerate(choices)]
        if self._token_ids:
            forms = [form | {"token_ids": choice.token_ids} for form, (choice, _) in zip(forms, choices, strict=True)]
        content = self._head | {"object": self._form.object, "choices": forms, "usage": usage_of(outputs)}
        return json.dumps(content).encode()

    def events(self, pieces: Iterable[Piece], usage: bool, running_usage: bool) -> bytes:
        """`usage`: it will come at the end, so that chunks say null; `running_usage`: chunks say what it is by now."""
        form, parts = self._form, []
        for piece in pieces:
            self._tokens += len(piece.tokens)
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                if first := form.first(piece.index):
                    parts.append(first)
            chunks = form.chunks(piece)
            if self._token_ids:
                self._add_ids(chunks, piece)
            parts += chunks
        opening = self._opening
        if running_usage:
            opening += f',"usage":{_encoded(_usage(self._prompt_tokens, self._tokens))}'
        elif usage:
            opening += ',"usage":null'
        return "".join(f'{opening},"choices":[{_encoded(choice)}]}}\n\n' for choice in parts).encode()

    def _add_ids(self, chunks: list[dict[str, Any]], piece: Piece) -> None:
        """To the first chunk: text that may become a call of a tool has none yet, and its ids go with the next."""
        unsaid = self._unsaid.setdefault(piece.index, [])
        unsaid += piece.tokens
        if chunks:
            chunks[0]["token_ids"] = self._unsaid.pop(piece.index)

    def final_usage(self, outputs: Sequence[Output]) -> bytes:
        return event(self._head | {"object": self._form.chunk_object, "choices": [], "usage": usage_of(outputs)})


def event(content: dict[str, Any]) -> bytes:
    return f"data: {_encoded(content)}\n\n".encode()
