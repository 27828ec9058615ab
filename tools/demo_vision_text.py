"""Tokenizer, chat template and processor of the demo vision model, and dialogues as ids.

`Writer` builds ids exchange by exchange and must equal what the template renders, each placeholder repeated; a test
compares them.
"""

import json
import re
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers

from tools import demo_tokenizer
from tools.demo_vision_data import Dialogue, Exchange, dialogue

BOS, END, SYSTEM, USER, ASSISTANT, IMAGE = range(6)
SPECIAL = ["<|begin_of_text|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]
VOCAB = 768
CONTEXT = 1024
SIDE, PATCH = 64, 8  # pixels
TOKENS = (SIDE // PATCH) ** 2  # of a picture
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role must be system, user or assistant') }}
    {%- endif %}
    {%- if message.content is string %}
        {{- raise_exception('content must be a list of parts of type image or text') }}
    {%- endif %}
    {{- '<|' + message.role + '|>' }}
    {%- for part in message.content %}
        {{- '<image>' if part.type == 'image' else part.text | trim }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(dialogues: int) -> Tokenizer:
    """A byte-level BPE over the text of this many training dialogues."""
    lessons = (dialogue(f"bpe {i}") for i in range(dialogues))
    texts = (text for lesson in lessons for e in lesson.exchanges for text in (e.user, e.answer))
    return demo_tokenizer.train(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL, VOCAB)


def save_text(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files, chat_template.jinja, and the processor's as files of LLaVA have it."""
    image = {"image_token": SPECIAL[IMAGE]}
    fast = demo_tokenizer.fast(tokenizer, SPECIAL[BOS], SPECIAL[END], CONTEXT, extra_special_tokens=image)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},  # the whole picture, squeezed: no shape is cut off
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    whole = {
        "processor_class": "LlavaProcessor",
        "image_token": SPECIAL[IMAGE],
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,  # the class token, which the select strategy takes off again
        "vision_feature_select_strategy": "default",
    }
    for name, content in (("preprocessor_config.json", picture), ("processor_config.json", whole)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# what the tokenizer's own pattern finds in a text, for Python's re; no piece depends on those beside it
_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Writer:
    """Dialogues as ids; remembers those of each word, which is ten times as fast as asking the tokenizer again."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """What the tokenizer gives for the whole text."""
        out: list[int] = []
        for piece in _PIECE.findall(text):
            found = self._known.get(piece)
            if found is None:
                found = self._known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
            out += found
        return out

    def opening(self, system: str | None) -> list[int]:
        return [BOS, SYSTEM, *self.ids(system.strip()), END] if system else [BOS]

    def exchange(self, one: Exchange) -> tuple[list[int], list[int]]:
        """Ids of the question, up to where the answer begins, and of the answer."""
        asked = [USER, *[IMAGE] * (TOKENS * len(one.pictures)), *self.ids(one.user.strip()), END, ASSISTANT]
        return asked, [*self.ids(one.answer.strip()), END]

    def dialogue(self, one: Dialogue) -> list[int]:
        return [*self.opening(one.system), *(i for e in one.exchanges for part in self.exchange(e) for i in part)]
