"""Tiny random LLaVA checkpoints with tokenizer, template and processor, and what transformers answers with them."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.models.test_llava import LLAVA, NEXT, TEXT, VISION, their_model
from tests.text import build
from tests.text.test_processor import CLIP
from tests.text.test_processor import LLAVA as TEMPLATE

SIDE, GRIDS = VISION["image_size"], NEXT["image_grid_pinpoints"]


def make(folder: Path, next_: bool = False, eos: int = 1) -> Path:
    """A checkpoint directory, without generation_config.json."""
    tokenizer = build.byte_level()
    build.write(folder, tokenizer, TEMPLATE)
    ids = {"image_token_index": tokenizer.token_to_id("<image>")}
    text = TEXT | {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": eos}
    model = their_model(copy.deepcopy((NEXT if next_ else LLAVA) | ids | {"text_config": text}))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    settings = CLIP | {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if next_:
        settings |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": GRIDS, "do_pad": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class Theirs:
    """transformers on the same checkpoint, from messages with PIL images to greedy token ids."""

    def __init__(self, folder: Path, device: str = "cpu"):
        raw = json.loads((folder / "config.json").read_text())
        self.kind = getattr(transformers, raw["architectures"][0])
        self.model = self.kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
        next_ = "image_grid_pinpoints" in raw
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = (LlavaNextProcessor if next_ else LlavaProcessor)(
            AutoImageProcessor.from_pretrained(folder, backend="pil"), tokenizer, patch_size=VISION["patch_size"],
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=(folder / "chat_template.jinja").read_text(),
        )  # fmt: skip
        self.device = device

    def inputs(self, messages: list[dict]) -> dict[str, torch.Tensor]:
        bare = [
            {**m, "content": [{"type": "image"} if p["type"] == "image" else p for p in parts(m)]} for m in messages
        ]
        text = self.processor.apply_chat_template(bare, add_generation_prompt=True)
        images = [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]
        return self.processor(images=images or None, text=text, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def answer(self, messages: list[dict], tokens: int = 12, **wishes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the prompt, and of the answer."""
        inputs = self.inputs(messages)
        options = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        out = self.model.generate(**inputs, **options, **wishes)[0].tolist()
        asked = inputs["input_ids"].shape[1]
        return tuple(out[:asked]), tuple(out[asked:])


def parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng((width, height, seed))
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


def ask(text: str, *pictures: Image.Image) -> dict:
    """A question about pictures, as a message."""
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
    }
