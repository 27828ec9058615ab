"""vLLM as a side: its engine's step API, with its own choices where nothing was said.

Written by its documentation and never run here: it is not installed where this was made.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import vllm
from vllm.sampling_params import RequestOutputKind

from lite_llm.weights.hub import Source
from tools.benchmark.sides import ROOT, Arrivals, Meter, Opening
from tools.benchmark.work import Answer, Run, Work
from tools.make_checkpoint import make_checkpoint

_BLOCK = 16  # KV tokens


class VLLM:
    def __init__(self, opening: Opening):
        limits, self.device = opening.limits, opening.device
        self._made = tempfile.TemporaryDirectory()
        wished = {
            "max_num_seqs": limits.max_requests, "max_model_len": limits.context,
            "max_num_batched_tokens": limits.step_tokens,
            "num_gpu_blocks_override": None if limits.kv_tokens is None else math.ceil(limits.kv_tokens / _BLOCK),
            "block_size": None if limits.kv_tokens is None else _BLOCK,
        }  # fmt: skip
        options = {name: value for name, value in wished.items() if value is not None}
        directory = self._directory(opening)
        self._llm = vllm.LLM(
            model=str(directory), dtype=opening.dtype, seed=opening.model.seed, disable_log_stats=True,
            enable_prefix_caching=opening.prefix_cache, generation_config="vllm", **options,
        )  # fmt: skip
        self._runs = 0
        self.vocab = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        named = opening.model.shape is None
        self.special = sorted(self._llm.get_tokenizer().all_special_ids) if named else []
        self.info = {"vllm": vllm.__version__, "options": options}

    def _directory(self, opening: Opening) -> Path:
        """vLLM reads files only, so a shape's random weights are written to some: those that the others have."""
        model = opening.model
        if model.shape is None:
            return Source(str(model.path or ROOT / "lite_llm" / "demo" / "chat")).directory()
        out = Path(self._made.name) / "model"
        make_checkpoint(model.shape, out, opening.dtype, model.seed, 5 * 10**9, opening.device)
        return out

    def warm(self, work: Work) -> None:
        self.run(work)

    def run(self, work: Work, tell: object = None) -> Run:
        """`peak_bytes` is not known: the engine's own process has the memory. Nor are its compilations."""
        engine, self._runs = self._llm.llm_engine, self._runs + 1
        sent: dict[int, float] = {}
        tokens: list[list[int]] = [[] for _ in work.asks]
        times: list[list[float]] = [[] for _ in work.asks]
        with Meter("cpu") as meter:
            arrivals = Arrivals(work)
            try:
                while arrivals or engine.has_unfinished_requests():
                    for index in arrivals.take():
                        sent[index] = arrivals.now()
                        prompt = {"prompt_token_ids": list(work.asks[index].ids)}
                        engine.add_request(self._name(index), prompt, self._wish(work, index))
                    if not engine.has_unfinished_requests():
                        time.sleep(arrivals.wait())
                        continue
                    news = engine.step()
                    now = arrivals.now()
                    for output in news:
                        index = int(output.request_id.rpartition("/")[2])
                        fresh = output.outputs[0].token_ids if output.outputs else ()
                        tokens[index] += fresh
                        times[index] += [now] * len(fresh)
            except BaseException:
                engine.abort_request([self._name(index) for index in sent])
                raise
            seconds = arrivals.now()
        answers = (
            Answer(tuple(mine), sent[index], tuple(known), known[-1] if known else seconds)
            for index, (mine, known) in enumerate(zip(tokens, times, strict=True))
        )
        return Run(seconds, tuple(answers), meter.compiles, None, {})

    def _name(self, index: int) -> str:
        return f"{self._runs}/{index}"

    def _wish(self, work: Work, index: int) -> vllm.SamplingParams:
        ask = work.asks[index]
        return vllm.SamplingParams(
            max_tokens=ask.new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            temperature=work.temperature, top_k=work.top_k or -1, top_p=work.top_p, seed=work.seed + index,
        )  # fmt: skip

    def score(self, asks: list[dict]) -> list[list[float]]:
        raise NotImplementedError("vllm does not score; transformers does")

    def close(self) -> None:
        """The engine's process goes with ours."""
        self._made.cleanup()
