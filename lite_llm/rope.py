"""Rotary position embeddings: how far each pair of features turns at each position, as cos and sin tables.

The scalings are those of Hugging Face checkpoints (`rope_parameters`, formerly `rope_scaling`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lite_llm.config import HFConfig
from lite_llm.errors import UnsupportedModel, shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """NTK-aware scaling that begins where a sequence outgrows `original_len`.

    A token at position p >= original_len turns by the base for p + 1 tokens, as in a sequence that grows token by
    token. So K depends on the position alone, and neither on chunks nor on the batch nor on the prefix cache.
    """

    factor: float
    original_len: int


@dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): interpolation below `beta_slow` turns, none above `beta_fast`; cos and sin scaled."""

    factor: float
    original_len: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True)
class Rope:
    """`rotary` features of each head turn (the first ones), with wavelengths from 2 pi to 2 pi theta positions."""

    theta: float
    rotary: int
    scaling: Linear | Dynamic | Llama3 | Yarn | None = None

    def tables(self, max_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [max_len, rotary / 2], on the CPU; row p is position p."""
        import torch

        positions = torch.arange(max_len, dtype=torch.float32)
        if isinstance(self.scaling, Dynamic):
            # float64: fp32 powers differ in the last bit with the place in a vector, so with the length of the table
            seen = (positions.double() + 1).clamp(min=self.scaling.original_len)
            factor, original = self.scaling.factor, self.scaling.original_len
            growth = (factor * seen / original) - (factor - 1)
            bases = self.theta * growth ** (self.rotary / (self.rotary - 2))
            angle = positions[:, None] * _inverse_frequencies(bases[:, None], self.rotary).float()
            return angle.cos(), angle.sin()
        frequency = _inverse_frequencies(self.theta, self.rotary)
        scale = 1.0
        match self.scaling:
            case Linear(factor):
                frequency = frequency / factor
            case Llama3():
                frequency = _llama3(frequency, self.scaling)
            case Yarn():
                frequency, scale = _yarn(self, self.scaling), self.scaling.attention_factor
        angle = positions[:, None] * frequency
        return angle.cos() * scale, angle.sin() * scale


def _inverse_frequencies(theta: float | Tensor, rotary: int) -> Tensor:
    import torch

    return 1.0 / theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)


def _llama3(frequency: Tensor, s: Llama3) -> Tensor:
    import torch

    wavelength = 2 * math.pi / frequency
    ramp = (s.original_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - ramp) * frequency / s.factor + ramp * frequency
    low, high = s.original_len / s.low_freq_factor, s.original_len / s.high_freq_factor
    scaled = torch.where(wavelength > low, frequency / s.factor, frequency)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn(rope: Rope, s: Yarn) -> Tensor:
    import torch

    def dim_of(turns: float) -> float:
        """The feature that makes this many turns over the original length."""
        return rope.rotary * math.log(s.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(rope.rotary // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequency = _inverse_frequencies(rope.theta, rope.rotary)
    return frequency / s.factor * interpolated + frequency * (1 - interpolated)


_KEYS = {
    "default": {},
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def parse_rope(hf: HFConfig, head_dim: int, max_positions: int) -> tuple[Rope, int]:
    """The rotary embedding of a config.json, and the positions that it serves; refuses what it would get wrong."""
    new, old = (hf.get(dict, name, {}) for name in ("rope_parameters", "rope_scaling"))
    if new and old:
        raise UnsupportedModel("config.json has both rope_parameters and rope_scaling; expected one of them")
    block, given = ("rope_parameters", new) if new else ("rope_scaling", old)
    kind = hf.agree(str, f"{block}.rope_type", f"{block}.type", "default")
    if kind not in _KEYS:
        raise UnsupportedModel(f"config.json: {block}.rope_type = {shown(kind)}; supported: {', '.join(_KEYS)}")
    for place in (f"{block}.partial_rotary_factor", "partial_rotary_factor"):
        hf.expect(place, 1.0, 1)
    for key in sorted(given.keys() - _KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        if given[key] is not None:
            name = key if key.isidentifier() else shown(key)
            raise UnsupportedModel(f"config.json: {block}.{name} = {shown(given[key])} is not known for type {kind!r}")
    theta = hf.agree(float, f"{block}.rope_theta", "rope_theta", 10000.0)
    if not 1 < theta <= 1e15:
        raise UnsupportedModel(f"config.json: rope_theta = {theta}; expected more than 1 and at most 1e15")
    if kind == "default":
        return Rope(theta, head_dim), max_positions

    factor = hf.between(float, f"{block}.factor", 1, 1e6)
    original = hf.size(f"{block}.original_max_position_embeddings", max_positions)
    reach = max_positions * factor if kind in ("linear", "dynamic") else original * factor if kind == "yarn" else 0
    if reach > 1 << 24:  # beyond, positions are not exact in fp32
        raise UnsupportedModel(f"config.json: {block}.factor = {factor} makes {reach:.0f} positions; at most 2**24")
    max_len = max(max_positions, int(reach))
    match kind:
        case "linear":
            return Rope(theta, head_dim, Linear(factor)), max_len
        case "dynamic":  # transformers grows the base from max_position_embeddings on
            if head_dim == 2:
                raise UnsupportedModel("config.json: rope type 'dynamic' with head_dim = 2; expected at least 4")
            return Rope(theta, head_dim, Dynamic(factor, max_positions)), max_len
        case "llama3":
            low, high = (hf.between(float, f"{block}.{name}_freq_factor", 1e-6, 1e6) for name in ("low", "high"))
            if not low < high:
                raise UnsupportedModel(
                    f"config.json: {block}.low_freq_factor = {low}; expected less than high_freq_factor = {high}"
                )
            return Rope(theta, head_dim, Llama3(factor, low, high, original)), max_len
    return Rope(theta, head_dim, _parse_yarn(hf, block, factor, original)), max_len


def _parse_yarn(hf: HFConfig, block: str, factor: float, original: int) -> Yarn:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = (hf.between(float, f"{block}.{name}", 0, 1e6, 0.0) for name in ("mscale", "mscale_all_dim"))
    attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    slow = hf.between(float, f"{block}.beta_slow", 1e-6, 1e6, 1.0)
    return Yarn(
        factor=factor,
        original_len=original,
        attention_factor=hf.between(float, f"{block}.attention_factor", 1e-6, 1e6, attention),
        beta_fast=hf.between(float, f"{block}.beta_fast", slow, 1e6, 32.0),
        beta_slow=slow,
        truncate=hf.get(bool, f"{block}.truncate", True),
    )
