"""What the user wants (`EngineConfig`), what a model is (`ModelConfig`), and how config.json is read (`HFConfig`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import UnsupportedModel, UsageError, shown
from lite_llm.jsonfile import read_object

if TYPE_CHECKING:
    from lite_llm.rope import Rope

_MISSING = object()
_MOST = 1 << 24  # no size of a real model is larger
MOST_DRAFTS = 15
"""Of a request in a step: with the token before them they fill 16 rows, as many as a tensor core takes."""

# Keys that describe training, files or defaults of generation, not the function that the weights compute.
_HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation_autoset architectures attention_dropout auto_map bos_token_id dtype
    eos_token_id hidden_dropout initializer_range model_type pad_token_id problem_type return_dict torch_dtype
    torchscript transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache id2label
    label2id finetuning_task task_specific_params tokenizer_class prefix output_attentions output_hidden_states
    output_scores return_dict_in_generate chunk_size_feed_forward do_sample temperature top_k top_p max_length
    min_length num_beams num_return_sequences repetition_penalty length_penalty no_repeat_ngram_size
    early_stopping bad_words_ids diversity_penalty num_beam_groups typical_p epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens encoder_no_repeat_ngram_size remove_invalid_values sep_token_id decoder_start_token_id
    tf_legacy_loss max_sequence_length attn_implementation _attn_implementation gradient_checkpointing
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class EngineConfig:
    """What the user wants of the engine. Sizes are in tokens; None lets the engine choose from the memory it finds."""

    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto takes a GPU if there is one
    dtype: str = "auto"  # "float32", "bfloat16", "float16"; auto: the checkpoint's on a GPU, float32 on a CPU
    context: int | None = None  # longest prompt + answer; None: what model and pool allow
    kv_tokens: int | None = None  # slots of the KV pool
    max_requests: int = 64  # requests that advance together
    step_tokens: int = 2048  # most tokens of prompts in one step; beside decodes a GPU mostly takes 512 in all
    max_slowdown: float | None = None  # a step with prompts takes at most this many times one without; None: any time
    drafts: int = 0  # tokens guessed from what prompt and answer already said, verified together in a step; 0: none
    prefix_cache: bool = True  # keep the KV of finished requests for prompts that begin alike
    cuda_graphs: bool = True  # on a GPU: record each shape of step once, and replay it
    memory_fraction: float = 0.9  # share of the device's free memory that weights, workspace and pool may take
    threads: int | None = None  # of the CPU, for the whole process; None: one for small models, else torch's choice
    ignore_config: tuple[str, ...] = ()  # config.json keys that the user declares harmless

    @classmethod
    def of(cls, options: Mapping[str, object]) -> "EngineConfig":
        """From fields by name. UsageError for a name that is none."""
        if unknown := options.keys() - cls.__dataclass_fields__.keys():
            raise UsageError(f"unknown option {min(unknown)!r}; known: {', '.join(sorted(cls.__dataclass_fields__))}")
        return cls(**options)

    def __post_init__(self):
        for name in ("context", "kv_tokens", "max_requests", "step_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} = {value!r}; expected a whole number of at least 1")
        if type(self.drafts) is not int or not 0 <= self.drafts <= MOST_DRAFTS:
            raise UsageError(f"drafts = {self.drafts!r}; expected a whole number from 0 to {MOST_DRAFTS}")
        if type(self.memory_fraction) not in (int, float) or not 0 < self.memory_fraction <= 1:
            raise UsageError(f"memory_fraction = {self.memory_fraction!r}; expected more than 0 and at most 1")
        slow = self.max_slowdown
        if slow is not None and (type(slow) not in (int, float) or not 1 <= slow <= 1e6):
            raise UsageError(f"max_slowdown = {slow!r}; expected a number of at least 1")
        if not isinstance(self.ignore_config, (tuple, list)) or not all(type(k) is str for k in self.ignore_config):
            raise UsageError(f"ignore_config = {self.ignore_config!r}; expected a tuple of config.json keys")
        for name in ("prefix_cache", "cuda_graphs"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} = {getattr(self, name)!r}; expected True or False")
        if self.step_tokens < self.max_requests:
            raise UsageError(
                f"step_tokens = {self.step_tokens} is less than max_requests = {self.max_requests}",
                "every running request advances by a token each step",
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f"dtype = {self.dtype!r}; supported: auto, float32, bfloat16, float16")


@dataclass(frozen=True)
class VisionConfig:
    """Facts of a vision tower, and of what becomes of its features. Sizes of pictures are in pixels."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    image_size: int  # height and width of what the tower sees at once, a tile
    patch_size: int
    norm_eps: float
    quick_gelu: bool
    feature_layers: tuple[int, ...]  # whose outputs lie side by side in a feature; 0 is the embedding
    class_token: bool  # whether the class token's feature is one of a tile's
    projector_bias: bool
    image_token: int  # stands in the prompt for each feature of a picture
    resolutions: tuple[tuple[int, int], ...] = ()  # height and width of the grids of tiles; none: a picture is a tile

    def __post_init__(self):
        for name in ("num_layers", "hidden", "ffn", "heads", "image_size", "patch_size"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UnsupportedModel(f"config.json: vision {name} = {getattr(self, name)}; expected 1 to {_MOST}")
        if self.hidden % self.heads:
            raise UnsupportedModel(
                f"config.json: vision_config.num_attention_heads = {self.heads} does not divide its hidden_size = "
                f"{self.hidden}"
            )
        if self.image_size % self.patch_size:
            raise UnsupportedModel(
                f"config.json: vision_config.patch_size = {self.patch_size} does not divide its image_size = "
                f"{self.image_size}"
            )
        if not (0 < self.norm_eps < 1):
            raise UnsupportedModel(
                f"config.json: vision_config.layer_norm_eps = {self.norm_eps}; expected between 0 and 1"
            )
        for size in self.resolutions:
            if any(side < 1 or side % self.image_size for side in size):
                raise UnsupportedModel(
                    f"config.json: image_grid_pinpoints has {list(size)}; expected multiples of {self.image_size}"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def side(self) -> int:
        """Patches in a row of a tile, and rows of patches."""
        return self.image_size // self.patch_size

    @property
    def tile_features(self) -> int:
        return self.side**2 + self.class_token


@dataclass(frozen=True)
class ModelConfig:
    """Facts of the checkpoint, after every default and alias has been resolved."""

    architecture: str
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    max_len: int  # positions that the checkpoint is made for
    rope: "Rope"
    windows: tuple[int | None, ...]  # by layer: how many positions attention looks back; None is all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    dtype: str = "float32"  # of the stored weights, as config.json states it
    vision: VisionConfig | None = None

    def __post_init__(self):
        for name in ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_len"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UnsupportedModel(f"config.json: {name} = {getattr(self, name)}; expected 1 to {_MOST}")
        if self.heads % self.kv_heads:
            raise UnsupportedModel(
                f"config.json: num_key_value_heads = {self.kv_heads} does not divide num_attention_heads = {self.heads}"
            )
        if self.head_dim % 2 or self.head_dim > 256:
            raise UnsupportedModel(f"config.json: head_dim = {self.head_dim}; supported: even, at most 256")
        if not (0 < self.norm_eps < 1):
            raise UnsupportedModel(f"config.json: rms_norm_eps = {self.norm_eps}; expected between 0 and 1")
        if len(self.windows) != self.num_layers:
            raise UnsupportedModel(f"config.json: {len(self.windows)} layer_types for {self.num_layers} layers")
        if self.vision is not None and not 0 <= self.vision.image_token < self.vocab:
            raise UnsupportedModel(
                f"config.json: image_token_index = {self.vision.image_token}; the vocabulary has {self.vocab} tokens"
            )
        if any(w is not None and w < 1 for w in self.windows):
            raise UnsupportedModel(f"config.json: sliding_window of {self.windows}; expected at least 1")


class HFConfig:
    """A `config.json` read with types: nothing is defaulted or ignored by accident.

    Reading a key marks it as understood; `finish` refuses the keys that nobody understood.
    """

    def __init__(self, raw: dict[str, Any], ignore: tuple[str, ...] = (), where: str = ""):
        self._raw, self._ignore, self._where = raw, frozenset(ignore), where
        self._read: set[str] = set()

    @classmethod
    def load(cls, directory: Path, ignore: tuple[str, ...] = ()) -> "HFConfig":
        """Reads `directory/config.json`. BadCheckpoint if it is missing, not an object, or has a key twice."""
        return cls(read_object(directory / "config.json"), ignore)

    def section(self, key: str, defaults: dict[str, Any], **given: Any) -> "HFConfig":
        """The object at `key` as a config of its own: over `defaults`, under `given`. Its reader calls its `finish`."""
        return HFConfig(defaults | self.get(dict, key, {}) | given, tuple(self._ignore), f"{self._where}{key}.")

    def get(self, kind: type, key: str, default: Any = _MISSING) -> Any:
        """The value at `key`, checked to be a finite `kind`. "a.b" is nested, "a|b" is a or else b; null is absent."""
        value = next((v for k in key.split("|") if (v := self._find(k)) is not None), None)
        if value is None:
            if default is _MISSING:
                raise UnsupportedModel(f"config.json has no {self._where + key!r}, which this model needs")
            return default
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if kind is not object and type(value) is not kind:
            raise UnsupportedModel(
                f"config.json: {self._where}{key} = {shown(value)} is a {type(value).__name__}; "
                f"expected {kind.__name__}"
            )
        if kind is float and not math.isfinite(value):
            raise UnsupportedModel(f"config.json: {self._where}{key} = {value}; expected a finite number")
        return value

    def between(self, kind: type, key: str, low: float, high: float, default: Any = _MISSING) -> Any:
        """A number from `low` to `high`, these included; the default need not be."""
        value = self.get(kind, key, default)
        if value is not default and not low <= value <= high:
            raise UnsupportedModel(f"config.json: {self._where}{key} = {shown(value)}; expected {low} to {high}")
        return value

    def size(self, key: str, default: Any = _MISSING) -> Any:
        """A whole number of at least 1, and no larger than that of any real model."""
        return self.between(int, key, 1, _MOST, default)

    def agree(self, kind: type, one: str, other: str, default: Any) -> Any:
        """The value at either key. UnsupportedModel if they contradict each other."""
        a, b = self.get(kind, one, None), self.get(kind, other, None)
        if a is not None and b is not None and a != b:
            raise UnsupportedModel(f"config.json: {self._where}{one} = {shown(a)}, but {other} = {shown(b)}")
        return a if a is not None else b if b is not None else default

    def __contains__(self, key: str) -> bool:
        """Whether the file mentions a key at all: some defaults differ between an absent key and a null."""
        return key in self._raw

    def _find(self, key: str) -> Any:
        value: Any = self._raw
        self._read.add(key.split(".")[0])
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a checkpoint whose `key` is set to something we would silently get wrong; absent is allowed."""
        value = self.get(object, key, allowed[0])
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise UnsupportedModel(
                f"config.json: {self._where}{key} = {shown(value)}; supported: {', '.join(map(repr, allowed))}"
            )

    def finish(self) -> None:
        """Refuse keys that nothing has read and that are set to something: they may change what the model computes."""
        unknown = [
            key if key.isidentifier() else shown(key)
            for key, value in self._raw.items()
            if key not in self._read | _HARMLESS | self._ignore and value not in (None, False, 0, "", [], {})
        ]
        if unknown:
            value = f" = {shown(self._raw[unknown[0]])}" if unknown[0] in self._raw else ""
            raise UnsupportedModel(
                f"config.json: {self._where}{unknown[0]}{value} is not known"
                + (f", nor are {', '.join(unknown[1:20])}" if unknown[1:] else ""),
                "if it does not change what the model computes, pass --ignore-config " + ",".join(unknown[:20]),
            )
