"""Checkpoints: `files` opens and checks them, `loading` fills a model, `fused` converts, `random` makes them up."""

from lite_llm.weights.files import Checkpoint, open_checkpoint
from lite_llm.weights.loading import load_weights

__all__ = ["Checkpoint", "load_weights", "open_checkpoint"]
