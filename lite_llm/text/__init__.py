"""Text in and out: the checkpoint's tokenizer and chat template, incremental detokenizing, stop strings, escaping.

Nothing heavy is imported here: `transformers` is loaded by `Tokenizer.load`, when a checkpoint is opened.
"""

from lite_llm.text.detokenize import Detokenizer
from lite_llm.text.escape import visible
from lite_llm.text.stops import StopMatcher
from lite_llm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopMatcher", "Tokenizer", "visible"]
