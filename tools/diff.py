"""Compare lite_llm with transformers on one model: logits and, layer by layer, the hidden states.

    python tools/diff.py path/to/checkpoint
    python tools/diff.py --shape llama-3.2-1b --shape qwen2.5-7b --json docs/results/parity.json     (random weights)

The yardstick is transformers in float32 with the same rounded weights (float64 for --dtype float32). Both sides are
judged in the model's dtype: ratio = our error / transformers' own error in that dtype. Up to 2 is rounding; more is a
bug, and the exit code is 1. Each side loads a checkpoint by itself, so the loaders are compared too; random weights are
transformers', given to our side through the model's RULES. A vision model sees pictures of random pixels in two of the
prompts, whose features are what comes into layer 0.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm.batch import Batch, KVPool
from lite_llm.config import HFConfig, ModelConfig
from lite_llm.errors import BadCheckpoint, LiteLLMError, UsageError
from lite_llm.layers import LayerFactory
from lite_llm.models import registry, shapes, tiling
from lite_llm.weights import load_weights, open_checkpoint, rules
from tools.environment import environment

LIMIT = 2.0
FLOOR = 5e-7  # errors below a few roundings of float32 are nobody's fault
LENGTHS = (512, 37, 129, 1)
PICTURES = {0: (336, 336), 2: (500, 290)}  # height and width, by prompt
DTYPES = ("float32", "bfloat16", "float16")


class Prompt(NamedTuple):
    ids: Tensor
    pixels: Tensor | None = None  # of one picture, in tiles
    size: tuple[int, int] | None = None  # its height and width


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="*", type=Path, help="directories in Hugging Face format")
    parser.add_argument("--shape", action="append", default=[], help="a named shape with random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and random weights")
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if not args.checkpoint and not args.shape:
        parser.error("name a checkpoint, or a --shape")
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for name in [*args.checkpoint, *args.shape]:
        try:
            result = compare(name, getattr(torch, args.dtype), torch.device(args.device), args.layers, args.seed)
        except LiteLLMError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        results.append(result)
        print(
            f"{result['model']:<24} {args.dtype}: logits error ours {result['ours']:.3e}, transformers "
            f"{result['theirs']:.3e}, ratio {result['ratio']:.2f} (largest row {result['worst_row_ratio']:.2f}); "
            f"argmax as the yardstick's: ours {result['argmax_ours']:.4f}, transformers {result['argmax_theirs']:.4f}; "
            f"{'ok' if result['ok'] else 'PARTS at layer ' + str(result['parts_at'])}",
            flush=True,
        )
    if args.json:
        record = environment() | {"limit": LIMIT, "prompt_lengths": LENGTHS, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results) else 1


@torch.inference_mode()
def compare(name: Path | str, dtype: torch.dtype, device: torch.device, show_layers: bool, seed: int = 0) -> dict:
    """Errors of both sides against float32, as norms relative to float32's; see the file's head."""
    started = time.monotonic()
    checkpoint = open_checkpoint(name) if isinstance(name, Path) else None
    if checkpoint is not None and checkpoint.fused:
        raise UsageError(f"{name} was converted and transformers cannot read it", "compare the directory it came from")
    hf = HFConfig(shapes.shape_config(name)) if checkpoint is None else HFConfig.load(name)
    cfg = registry.parse(hf)
    module, cls = registry.find(cfg.architecture)
    auto = transformers.AutoModelForImageTextToText if cfg.vision else transformers.AutoModelForCausalLM
    if checkpoint is None:
        theirs = _random_model(auto, name, dtype, device, seed)
    else:
        theirs = _their_model(auto, name, dtype, device)
    ours = cls(LayerFactory(dtype, device), cfg)
    if checkpoint is None:
        rules.load(ours, module.RULES, theirs.state_dict().items())
    else:
        load_weights(ours, checkpoint, module.RULES)
    ours.eval()

    torch.manual_seed(seed)
    prompts = [_draw(cfg, row, length, dtype, device) for row, length in enumerate(LENGTHS)]
    got, got_layers = _our_forward(ours, cfg, prompts, dtype, device)
    rounded, rounded_layers = _their_forward(theirs, prompts)
    del ours
    exact, exact_layers = _their_forward(theirs.double() if dtype == torch.float32 else theirs.float(), prompts)

    layers = [(_error(a, c), _error(b, c)) for a, b, c in zip(got_layers, rounded_layers, exact_layers, strict=True)]
    parts = next((i for i, (a, b) in enumerate(layers) if a > LIMIT * b + FLOOR), None)
    if show_layers:
        for i, (a, b) in enumerate(layers):
            print(f"  into layer {i:>3}: ours {a:.3e}, transformers {b:.3e}")
    ours_error, their_error = _error(got, exact), _error(rounded, exact)
    got, rounded, exact = got.double(), rounded.double(), exact.double()
    rows = (got - exact).norm(dim=-1) / (rounded - exact).norm(dim=-1).clamp(min=FLOOR * exact.norm(dim=-1))
    return {
        "model": str(name),
        "dtype": str(dtype),
        "ours": ours_error,
        "theirs": their_error,
        "ratio": ours_error / max(their_error, FLOOR),
        "worst_row_ratio": rows.max().item(),
        "max_abs_ours": (got - exact).abs().max().item(),
        "max_abs_theirs": (rounded - exact).abs().max().item(),
        "argmax_ours": (got.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "argmax_theirs": (rounded.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "parts_at": parts,
        "ok": parts is None and ours_error <= LIMIT * their_error + FLOOR,
        "seconds": round(time.monotonic() - started, 1),
    }


def _draw(cfg: ModelConfig, row: int, length: int, dtype: torch.dtype, device: torch.device) -> Prompt:
    """Random tokens, in some prompts of a vision model with a picture among them."""
    ids = torch.randint(0, cfg.vocab, (min(length, cfg.max_len),), device=device)
    if cfg.vision is None:
        return Prompt(ids)
    ids[ids == cfg.vision.image_token] += 1 if cfg.vision.image_token == 0 else -1
    if row not in PICTURES:
        return Prompt(ids)
    size, side = PICTURES[row], cfg.vision.image_size
    placeholders = torch.full((tiling.tokens(cfg.vision, size),), cfg.vision.image_token, device=device)
    pixels = torch.randn(tiling.tiles(cfg.vision, size), 3, side, side, device=device, dtype=dtype)
    return Prompt(torch.cat([ids[:5], placeholders, ids[5:]])[: cfg.max_len], pixels, size)


def _their_model(auto, path: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    model, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
        raise BadCheckpoint(f"{path}: transformers did not load it as it is: {str(wrong)[:500]}")
    return model.to(device).eval()


def _random_model(auto, shape: str, dtype: torch.dtype, device: torch.device, seed: int) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(**shapes.shape_config(shape))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = auto.from_config(config, dtype=dtype).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(seed)
    for key, parameter in model.named_parameters():  # biases and norms too, which transformers would leave at 0 and 1
        parameter.data.normal_(1.0 if "norm" in key else 0.0, 0.1 if "norm" in key else 0.02, generator=generator)
    return model


def _their_forward(model: torch.nn.Module, prompts: list[Prompt]) -> tuple[Tensor, list[Tensor]]:
    outs = [
        model(prompt.ids[None], output_hidden_states=True, use_cache=False, **_seen(model, prompt))
        for prompt in prompts
    ]
    depth = len(outs[0].hidden_states) - 1  # the last one is behind the final norm
    hidden = [torch.cat([out.hidden_states[i][0] for out in outs]) for i in range(depth)]
    return torch.cat([out.logits[0] for out in outs]), hidden


def _seen(model: torch.nn.Module, prompt: Prompt) -> dict[str, Tensor]:
    """The picture as transformers wants it."""
    if prompt.pixels is None:
        return {}
    pixels = prompt.pixels.to(model.dtype)
    if model.config.model_type == "llava":
        return {"pixel_values": pixels}
    return {"pixel_values": pixels[None], "image_sizes": torch.tensor([prompt.size], device=pixels.device)}


def _our_forward(model, cfg: ModelConfig, prompts: list[Prompt], dtype, device) -> tuple[Tensor, list[Tensor]]:
    """All prompts in one ragged batch but for their last tokens, which follow as one batch of decodes."""
    lengths = [len(prompt.ids) for prompt in prompts]
    text = model.text if cfg.vision else model
    shown = _features(model, cfg, prompts, dtype) if cfg.vision else None
    pool = (cfg.num_layers, sum(lengths) + 1, cfg.kv_heads, cfg.head_dim)
    kv = KVPool(
        torch.full(pool, torch.nan, dtype=dtype, device=device), torch.full(pool, torch.nan, dtype=dtype, device=device)
    )
    slots = 1 + torch.randperm(sum(lengths), device=device)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    table = torch.zeros(len(prompts), max(lengths), dtype=torch.int32, device=device)
    for row, n in enumerate(lengths):
        table[row, :n] = slots[starts[row] : starts[row] + n].int()
    captured: list[Tensor] = []
    keep = lambda _, given: captured.append(given[0].to(torch.float32, copy=True))  # noqa: E731 (blocks write to it)
    hooks = [block.register_forward_pre_hook(keep) for block in text.blocks]
    whole: dict[int, list[Tensor]] = {}
    for pieces in ([(0, n - 1) for n in lengths], [(n - 1, 1) for n in lengths]):
        pieces = [(row, done, n) for row, (done, n) in enumerate(pieces) if n]
        captured.clear()
        logits = model(_batch(prompts, shown, pieces, table, device), kv)
        at = 0
        for row, _, n in pieces:
            whole.setdefault(row, []).append(torch.stack([t[at : at + n] for t in captured]).transpose(0, 1))
            whole.setdefault(row + len(prompts), []).append(logits[at : at + n].float())
            at += n
    for hook in hooks:
        hook.remove()
    hidden = torch.cat([torch.cat(whole[row]) for row in range(len(prompts))])
    logits = torch.cat([torch.cat(whole[row + len(prompts)]) for row in range(len(prompts))])
    return logits, list(hidden.unbind(1))


def _features(model, cfg: ModelConfig, prompts: list[Prompt], dtype) -> list[Tensor]:
    """Of each prompt [tokens, hidden], zero where it has no picture."""
    rows = []
    for prompt in prompts:
        rows.append(torch.zeros(len(prompt.ids), cfg.hidden, dtype=dtype, device=prompt.ids.device))
        if prompt.pixels is not None:
            [found] = model.encode(prompt.pixels, [prompt.size])
            at = (prompt.ids == cfg.vision.image_token).nonzero()[:, 0]
            rows[-1][at] = found[: len(at)]
    return rows


def _batch(prompts: list[Prompt], shown: list[Tensor] | None, pieces, table: Tensor, device) -> Batch:
    ints = dict(dtype=torch.int32, device=device)
    counts = [n for _, _, n in pieces]
    rows = torch.repeat_interleave(torch.tensor([r for r, _, _ in pieces]), torch.tensor(counts)).to(device)
    positions = torch.cat([torch.arange(done, done + n) for _, done, n in pieces]).to(device)
    features = None
    if shown is not None:
        features = torch.cat([shown[row][done : done + n] for row, done, n in pieces])
    return Batch(
        tokens=torch.cat([prompts[row].ids[done : done + n] for row, done, n in pieces]),
        positions=positions,
        slots=table[rows, positions].long(),
        q_start=torch.tensor([0, *counts]).cumsum(0).to(**ints),
        kv_len=torch.tensor([done + n for _, done, n in pieces], **ints),
        table=table,
        rows=torch.tensor([row for row, _, _ in pieces], **ints),
        logits_at=None,
        decodes=len(pieces) if max(counts) == 1 else 0,
        features=features,
        pictured=None if features is None else features.any(-1),
    )


def _error(a: Tensor, exact: Tensor) -> float:
    return ((a.double() - exact.double()).norm() / exact.double().norm()).item()


if __name__ == "__main__":
    sys.exit(main())
