"""The demo chat tokenizer and chat template, and dialogues as token ids with a loss mask.

`encode` builds ids turn by turn and must equal what the template renders; a test compares them.
"""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tools import demo_tokenizer
from tools.demo_data import Message, dialogue, plain_text

BOS, END, SYSTEM, USER, ASSISTANT = range(5)
SPECIAL = ["<|begin_of_text|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_ROLE = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
VOCAB = 2048
CONTEXT = 2048
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PIECES = (  # Qwen2.5's: digits stand alone, which makes arithmetic learnable
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role must be system, user or assistant') }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(dialogues: int) -> Tokenizer:
    """A byte-level BPE over the text of this many training dialogues."""
    splitting = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = (m["content"] for i in range(dialogues) for m in dialogue(f"bpe {i}"))
    return demo_tokenizer.train(texts, splitting, SPECIAL, VOCAB)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    fast = demo_tokenizer.fast(tokenizer, SPECIAL[BOS], SPECIAL[END], CONTEXT)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def encode(tokenizer: Tokenizer, dialogues: list[list[Message]]) -> list[tuple[list[int], list[int]]]:
    """Ids and loss mask of each dialogue; the mask is 1 where an answer's token is to be predicted."""
    texts = [m["content"].strip() for messages in dialogues for m in messages]
    pieces = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    out = []
    for messages in dialogues:
        ids, mask = [BOS], [0]
        for message in messages:
            body = [*next(pieces).ids, END]
            ids += [_ROLE[message["role"]], *body]
            mask += [0] + [int(message["role"] == "assistant")] * len(body)
        out.append((ids, mask))
    return out


def encode_plain(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """Text without a template; every token is to be predicted."""
    pieces = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [([BOS, *p.ids, END], [0] + [1] * (len(p.ids) + 1)) for p in pieces]


class Lessons:
    """Training batches by number: item i is a list of padded batches, the same on every machine.

    A batch is ids, int16 [rows, width], of documents of similar length, about `tokens` tokens
    together, and the flat indices of the tokens to predict. Rows start at position 0 and padding
    is on the right, so causal attention needs no mask.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, count: int, documents: int, tokens: int):
        self.tokenizer, self.seed, self.count = tokenizer, seed, count
        self.documents, self.tokens = documents, tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
        if item >= self.count:
            raise IndexError(item)
        stamps = [f"{self.seed} {item} {i}" for i in range(self.documents)]
        plain = self.documents // 16
        rows = encode(self.tokenizer, [dialogue(s) for s in stamps[plain:]])
        rows += encode_plain(self.tokenizer, [plain_text(s) for s in stamps[:plain]])
        rows = [row for row in rows if len(row[0]) <= CONTEXT]
        rows.sort(key=lambda row: len(row[0]))
        batches, batch = [], []
        for row in rows:
            if batch and (len(batch) + 1) * len(row[0]) > self.tokens:
                batches.append(_pad(batch))
                batch = []
            batch.append(row)
        return [*batches, _pad(batch)]


def _pad(rows: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), width), END, dtype=np.int16)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, (row_ids, row_mask) in enumerate(rows):
        ids[i, : len(row_ids)] = row_ids
        mask[i, : len(row_mask)] = row_mask
    return ids, np.flatnonzero(mask).astype(np.int32)
