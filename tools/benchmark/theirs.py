"""transformers as a side: `generate` on padded batches, the same compiled, and its own continuous batching.

`generate` batches statically: those that are there go together, the others wait for the whole batch.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, StaticCache, StoppingCriteria
from transformers.generation import ContinuousBatchingConfig

from lite_llm.errors import BadCheckpoint, UsageError
from lite_llm.models.shapes import shape_config
from lite_llm.weights.files import open_checkpoint
from lite_llm.weights.hub import Source
from lite_llm.weights.random import random_hf_tensors
from tools.benchmark.sides import ROOT, Arrivals, Meter, Model, Opening, traced
from tools.benchmark.work import Answer, Run, Work

_SPARE = 64
DEMO = ROOT / "lite_llm" / "demo" / "chat"


class Eager:
    CUDNN = False
    """Whether cuDNN may compute attention. It plans for every length of the cache that it has not met of late, some
    50 ms on an H200. A static cache has one length; in two runs its steps took 4.7 ms with it and 6.6 without."""

    def __init__(self, opening: Opening):
        """As large batches as `limits.max_requests` says; transformers has no use for the other limits here."""
        self.most, self.device = opening.limits.max_requests, opening.device
        if opening.limits.threads:
            torch.set_num_threads(opening.limits.threads)
        torch.backends.cuda.enable_cudnn_sdp(self.CUDNN)
        self.model, self.special = load(opening)
        self.vocab = self.model.config.vocab_size
        self.info = {
            "transformers": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation, "cudnn": self.CUDNN,
        }  # fmt: skip

    def warm(self, work: Work) -> None:
        self.run(work)

    def run(self, work: Work, tell: object = None) -> Run:
        torch.manual_seed(work.seed)
        with Meter(self.device) as meter:
            answers, seconds, notes = self._serve(work)
        found = tuple(answers[index] for index in range(len(work.asks)))
        return Run(seconds, found, meter.compiles, meter.peak_bytes, notes)

    def _serve(self, work: Work) -> tuple[dict[int, Answer], float, dict]:
        arrivals, answers, batches = Arrivals(work), {}, 0
        while arrivals:
            if not (batch := arrivals.take(self.most)):
                time.sleep(arrivals.wait())
                continue
            sent, batches = arrivals.now(), batches + 1
            tokens, times = self._generate(work, batch)
            for index, row in zip(batch, tokens, strict=True):
                mine = tuple(moment - arrivals.start for moment in times[: len(row)])
                answers[index] = Answer(tuple(row), sent, mine, mine[-1])
        return answers, arrivals.now(), {"batches": batches}

    def _generate(self, work: Work, batch: Sequence[int]) -> tuple[list[list[int]], list[float]]:
        """The new tokens of those asks, and for each step when it was done, by time.perf_counter."""
        asks = [work.asks[index] for index in batch]
        rows, length = self._size(work, batch)
        ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        for row, ask in enumerate(asks):
            ids[row, length - len(ask.ids) :] = torch.tensor(ask.ids)
            mask[row, : length - len(ask.ids)] = 0
        ids, mask = ids.to(self.device), mask.to(self.device)
        steps = _Steps(length, [ask.new for ask in asks] + [1] * (rows - len(asks)), self.device)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=max(ask.new for ask in asks), eos_token_id=None, pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([steps]), **sampling(work), **self._cache(work),
        )  # fmt: skip
        tokens = out[:, length:].tolist()
        return [row[: ask.new] for row, ask in zip(tokens, asks)], steps.seconds()

    def _size(self, work: Work, batch: Sequence[int]) -> tuple[int, int]:
        """Rows and prompt length of a batch."""
        return len(batch), max(len(work.asks[index].ids) for index in batch)

    def _cache(self, work: Work) -> dict[str, Any]:
        return {}

    @torch.inference_mode()
    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]:
        gaps, logprobs = [], []
        for ask in asks:
            prompt, answer = ask["prompt"], ask["answer"]
            ids = torch.tensor([[*prompt, *answer[:-1]]], device=self.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
            picked = logits.gather(1, torch.tensor(answer, device=self.device)[:, None])[:, 0]
            gaps.append((logits.amax(1) - picked).tolist())
            logprobs.append((picked - logits.logsumexp(1)).tolist())
        return {"gaps": gaps, "logprobs": logprobs}

    def close(self) -> None:
        pass


class Compiled(Eager):
    """A static cache and torch.compile with CUDA graphs; on a CPU the cache alone, where transformers compiles nothing.

    All batches of a work have one number of rows, some of padding, and so the work decides what is compiled, not who
    comes when. The cache is kept between calls, for recorded graphs hold on to its memory, and is a little longer than
    it must be, for works whose lengths are drawn at random.
    """

    CUDNN = True

    def __init__(self, opening: Opening):
        super().__init__(opening)
        self._fits = 0, 0  # rows and length of the cache
        self._static: StaticCache | None = None
        self._how = {} if self.device == "cpu" else {"compile_config": CompileConfig(mode="reduce-overhead")}
        self.info["compile"] = self._how["compile_config"].mode if self._how else None
        if not self._how:
            self.info["note"] = "static cache; nothing is compiled on a CPU"

    def _size(self, work: Work, batch: Sequence[int]) -> tuple[int, int]:
        return min(self.most, len(work.asks)), max(len(ask.ids) for ask in work.asks)

    def _cache(self, work: Work) -> dict[str, Any]:
        rows, prompt = self._size(work, ())
        need = prompt + max(ask.new for ask in work.asks)
        if rows != self._fits[0] or not need <= self._fits[1] < need + 2 * _SPARE:
            torch.compiler.reset()  # after some sizes torch would give up and run uncompiled
            self._fits, self._static = (rows, -(-need // _SPARE) * _SPARE), None
            self._static = StaticCache(config=self.model.config, max_cache_len=self._fits[1])
        self._static.reset()
        return {"past_key_values": self._static, **self._how}

    def run(self, work: Work, tell: object = None) -> Run:
        found = super().run(work)
        if self._how and max(ask.new for ask in work.asks) > 1 and not traced():  # prompts are never compiled
            raise RuntimeError("transformers compiled nothing")
        return found

    def warm(self, work: Work) -> None:
        for _ in range(3):  # traced, then recorded, then settled
            self.run(work)


class _Steps(StoppingCriteria):
    """Ends each row at its length, and notes when each step was done: by events on a GPU, so that nothing waits."""

    def __init__(self, prompt: int, news: list[int], device: str):
        self._gpu = device != "cpu"
        self._ends = torch.tensor(news, device=device) + prompt
        self._going = None if len(set(news)) > 1 else torch.zeros(len(news), dtype=torch.bool, device=device)
        self._marks: list[Any] = []
        if self._gpu:
            torch.cuda.synchronize()
            self._first = self._event()
        self._start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self._marks.append(self._event() if self._gpu else time.perf_counter())
        return self._going if self._going is not None else self._ends <= input_ids.shape[1]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """By time.perf_counter; call it when all is done."""
        if not self._gpu:
            return self._marks
        torch.cuda.synchronize()
        return [self._start + self._first.elapsed_time(mark) / 1e3 for mark in self._marks]


class ContinuousBatching(Eager):
    """transformers' own scheduler and paged cache, with its defaults where `limits` are silent."""

    def __init__(self, opening: Opening):
        super().__init__(opening)
        self._limits, self._prefix_cache = opening.limits, opening.prefix_cache
        self._manager, self._wish = None, None
        self._ready({"do_sample": False})
        self.info["attention"] = self.model.config._attn_implementation  # it may have chosen another
        config = self._manager.continuous_batching_config
        self.info["continuous_batching"] = {
            name: value for name, value in dataclasses.asdict(config).items() if type(value) in (int, float, bool, str)
        }

    def _config(self) -> ContinuousBatchingConfig:
        known = {field.name: field.default for field in dataclasses.fields(ContinuousBatchingConfig)}
        page = known.get("page_size") or known["block_size"]  # the older name
        tokens, step, pages = self._limits.kv_tokens, self._limits.step_tokens, None
        if self.device == "cpu":  # it cannot ask how much memory there is
            longest = min(self._limits.context or 4096, self.model.config.max_position_embeddings)
            tokens, step = tokens or self._limits.max_requests * longest, step or 2048
        if tokens is not None:  # every request leaves part of a page empty, and the scheduler keeps 15 % of them free
            pages = math.ceil((tokens / page + self._limits.max_requests) / 0.85)
        wished = {
            "max_requests_per_batch": self._limits.max_requests, "max_batch_tokens": step,
            "num_blocks": pages, "allow_block_sharing": self._prefix_cache,
        }  # fmt: skip
        return ContinuousBatchingConfig(**{name: value for name, value in wished.items() if name in known})

    def _ready(self, wish: dict[str, Any]) -> None:
        """A manager for one way of sampling."""
        if self._wish == wish and self._manager.is_running():
            return
        self.close()
        generation = GenerationConfig(eos_token_id=-1, pad_token_id=0, **wish)
        self._manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=self._config()
        )
        with torch.no_grad():
            self._manager.warmup()
        self._manager.start()
        self._wish = wish

    def run(self, work: Work, tell: object = None) -> Run:
        self._ready(sampling(work))
        try:
            return super().run(work)
        except BaseException:
            self.close()  # what it has not answered must not come back as an answer to the next work
            raise

    def _serve(self, work: Work) -> tuple[dict[int, Answer], float, dict]:
        arrivals, sent, answers, untimed = Arrivals(work), {}, {}, 0
        while len(answers) < len(work.asks):
            for index in arrivals.take():
                sent[index] = arrivals.now()
                self._manager.add_request(
                    list(work.asks[index].ids), f"{work.name}/{index}", max_new_tokens=work.asks[index].new,
                    record_timestamps=True, eos_token_id=-1,
                )  # fmt: skip
            found = self._manager.get_result(timeout=min(arrivals.wait(), 1.0) if arrivals else 1.0)
            if found is None:
                if not self._manager.is_running():
                    raise RuntimeError(f"its thread ended: {self._manager.background_thread_status.fatal_error}")
                continue
            if not found.is_finished():
                continue
            if found.error is not None:
                raise RuntimeError(f"{found.request_id}: {found.error}")
            index, tokens = int(found.request_id.rpartition("/")[2]), tuple(found.generated_tokens)
            times = tuple(moment - arrivals.start for moment in found.timestamps or ())
            if len(times) != len(tokens):  # it forgets them when it preempts
                times, untimed = (), untimed + 1
            answers[index] = Answer(tokens, sent[index], times, times[-1] if times else arrivals.now())
        return answers, arrivals.now(), {"untimed": untimed}

    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]:
        raise NotImplementedError("the model of transformers-cb attends to pages; ask the side transformers")

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=10.0)
            self._manager.destroy()
            self._manager, self._wish = None, None


def sampling(work: Work) -> dict[str, Any]:
    if work.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": work.temperature, "top_k": work.top_k, "top_p": work.top_p}


def load(opening: Opening) -> tuple[Any, list[int]]:
    """The model with none of its checkpoint's wishes for generation, and the tokenizer's special ids."""
    dtype = getattr(torch, opening.dtype)
    if opening.model.shape is not None:
        model, special = _random(opening.model, dtype, opening.device), []
    else:
        directory = Source(str(opening.model.path or DEMO)).directory()
        if open_checkpoint(directory).fused:
            raise UsageError(f"{directory} was converted and transformers cannot read it", "name what it came from")
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
            raise BadCheckpoint(f"{directory}: transformers did not load it as it is: {str(wrong)[:300]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        special = sorted(set(tokenizer.all_special_ids))
    model.generation_config = GenerationConfig()
    return model.to(opening.device).eval(), special


@torch.no_grad()
def _random(model: Model, dtype: torch.dtype, device: str) -> Any:
    """The weights that `LLM(shape=..., random_weights=True)` has for the same seed, dtype and kind of device."""
    config = shape_config(model.shape)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa"
        )
    empty = dict(made.named_parameters())
    for name, tensor in random_hf_tensors(config, model.seed, dtype, device):
        empty.pop(name).copy_(tensor)
    if empty:
        raise BadCheckpoint(f"{model.shape}: transformers' model also has {', '.join(sorted(empty))[:300]}")
    return made
