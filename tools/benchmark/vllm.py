"""vLLM as a side: `VLLM` steps its engine, `Server` asks its server, with its own choices where nothing was said.

Written by its documentation and never run here: it is not installed where this was made. The client of `Server` was
run with our own server in its place.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import vllm
from vllm.sampling_params import RequestOutputKind

from tools.benchmark.served import Served, checkpoint
from tools.benchmark.sides import Arrivals, Opening
from tools.benchmark.work import Answer, Run, Work

_BLOCK = 16  # KV tokens
_MOST = 0.9  # of the GPU's memory: its own choice
_SPARE = 0.95  # of what others have left; it refuses to start where less is free than it was promised


def _options(opening: Opening) -> dict[str, object]:
    """Of the engine, as `LLM` and the server's command line know them; what is not said is up to vLLM."""
    limits = opening.limits
    found = {
        "dtype": opening.dtype, "seed": opening.model.seed, "generation_config": "vllm",
        "max_num_seqs": limits.max_requests, "max_model_len": limits.context,
        "max_num_batched_tokens": limits.step_tokens,
        "num_gpu_blocks_override": None if limits.kv_tokens is None else math.ceil(limits.kv_tokens / _BLOCK),
        "block_size": None if limits.kv_tokens is None else _BLOCK,
    }  # fmt: skip
    if opening.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        found["gpu_memory_utilization"] = round(min(_MOST, _SPARE * free / total), 3)
    return {name: value for name, value in found.items() if value is not None}


class VLLM:
    def __init__(self, opening: Opening):
        self.device = opening.device
        self._made = tempfile.TemporaryDirectory()
        directory, options = checkpoint(opening, Path(self._made.name) / "model"), _options(opening)
        self._llm = vllm.LLM(
            model=str(directory), disable_log_stats=True, enable_prefix_caching=opening.prefix_cache, **options
        )
        self._runs = 0
        self.vocab = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        named = opening.model.shape is None
        self.special = sorted(self._llm.get_tokenizer().all_special_ids) if named else []
        self.info = {"vllm": vllm.__version__, "options": options}

    def warm(self, work: Work) -> None:
        self.run(work)

    def run(self, work: Work, tell: object = None) -> Run:
        """`peak_bytes` is not known: the engine's own process has the memory. Nor are its compilations."""
        engine, self._runs = self._llm.llm_engine, self._runs + 1
        sent: dict[int, float] = {}
        tokens: list[list[int]] = [[] for _ in work.asks]
        times: list[list[float]] = [[] for _ in work.asks]
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
        return Run(seconds, tuple(answers), None, None, {})

    def _name(self, index: int) -> str:
        return f"{self._runs}/{index}"

    def _wish(self, work: Work, index: int) -> vllm.SamplingParams:
        ask = work.asks[index]
        return vllm.SamplingParams(
            max_tokens=ask.new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            temperature=work.temperature, top_k=work.top_k or -1, top_p=work.top_p, seed=work.seed + index,
        )  # fmt: skip

    def score(self, asks: list[dict]) -> dict[str, list[list[float]]]:
        raise NotImplementedError("vllm does not score; transformers does")

    def close(self) -> None:
        """The engine's process goes with ours."""
        self._made.cleanup()


class Server(Served):
    """`vllm serve`, started as a module so that it is that of this Python."""

    def __init__(self, opening: Opening):
        self._options, self._prefix_cache = _options(opening), opening.prefix_cache
        super().__init__(opening, {"vllm": vllm.__version__, "options": dict(self._options)})

    def command(self, directory: Path) -> list[str]:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in self._options.items()]
        words += ["--enable-prefix-caching" if self._prefix_cache else "--no-enable-prefix-caching"]
        words += ["--host=127.0.0.1", f"--port={self._port}", "--disable-log-stats", "--disable-uvicorn-access-log"]
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory), *words]
