"""What the demos' tokenizers share. The first two special tokens of a byte-level one begin and end a text."""

from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def train(
    texts: Iterator[str], splitting: pre_tokenizers.PreTokenizer, special: Sequence[str], vocab: int
) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 0)]
    )
    assert tokenizer.get_vocab_size() == vocab
    return tokenizer


def fast(tokenizer: Tokenizer, begin: str, end: str, context: int, **tokens) -> PreTrainedTokenizerFast:
    """As transformers has it; `tokens` are further arguments. Padding is the end's token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **tokens,
    )
