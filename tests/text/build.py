"""Tokenizer directories for the tests: small, made on the spot, one for each family of the field."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "Hello world, how are you today? I'm fine. The quick brown fox jumps over the lazy dog 1234567890 times.",
    "def f(x):\n    return x + 1  # <b>not special</b> [INST] {json: true}\n\n",
    "你好，世界。こんにちは 안녕하세요 Привет, мир! 🙂🙃👩‍👩‍👧 e\u0301 naïve café",
]
SPECIALS = ["<s>", "</s>", "<|eot_id|>", "<|start|>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TRIMMING = TEMPLATE.replace("m['content']", "m['content'] | trim")
BOS = "{{ bos_token }}"


def byte_level(adds_bos: bool = True, split: bool = True) -> Tokenizer:
    """GPT-2, Llama-3, Qwen2.5: `split` as GPT-2's regex does; `<think>` is an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    _add(tokenizer, adds_bos)
    return tokenizer


def byte_fallback(adds_bos: bool = True) -> Tokenizer:
    """Llama-2: ▁ for a space, bytes for what is not in the vocabulary, a decoder that drops the first space."""
    words = ["▁", "▁the", "▁Hello", "▁world", "▁a", "lo", "He", "▁▁", "▁▁▁▁", "你", "é"]
    letters = sorted(
        set("".join(words)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?<>|_/\n")
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            left, right, both = word[: end - 1], word[end - 1], word[:end]
            if both not in pieces:
                pieces.append(both)
                merges.append((left, right))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", normalized=False)])
    _add(tokenizer, adds_bos)
    return tokenizer


def metaspace(adds_bos: bool = True) -> Tokenizer:
    """As `byte_fallback`, with the pre-tokenizer and decoder of newer exports."""
    tokenizer = byte_fallback(adds_bos)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def plain_metaspace(adds_bos: bool = True) -> Tokenizer:
    """T5-like: the Metaspace decoder, no bytes."""
    tokenizer = metaspace(adds_bos)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_level(adds_bos: bool = True) -> Tokenizer:
    """One id a word, no decoder: words are joined by spaces."""
    words = sorted({word for text in TEXT for word in text.split()} | {"user", "assistant", "system", "hi"})
    vocab = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>"])
    _add(tokenizer, adds_bos)
    return tokenizer


FAMILIES = {f.__name__: f for f in (byte_level, byte_fallback, metaspace, plain_metaspace, word_level)}


def _add(tokenizer: Tokenizer, adds_bos: bool) -> None:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if adds_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])


def write(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE, **config) -> Path:
    """Save a checkpoint's tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|eot_id|>"}
    if tokenizer.token_to_id("<unk>") is not None:
        settings["unk_token"] = "<unk>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
