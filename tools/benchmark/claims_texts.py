"""What the ancestors of this project claimed, on which hardware, and what a figure of ours may not say of it."""

from dataclasses import dataclass

_NOT_THEM = "None of the original programs was run: a ratio here is lite_llm over what stands beside it in the table."
_RANDOM = (
    "Weights are random in the model's true sizes: nothing is said of answers, or of the lengths that real ones have."
)
_LAUNCHES = (
    "Eager transformers takes about as long per step whatever the batch and the GPU, for Python launches its "
    "kernels: a ratio over it alone says little. Read the one over the compiled model, and the share of the limit."
)
_GPU = "The original's figures stand beside ours for the record only: another GPU, other software, other years."


@dataclass(frozen=True)
class Claim:
    name: str
    title: str
    original: str
    here: str
    never: tuple[str, ...]  # what may not be concluded
    withdrawn: str = ""  # why figures that were measured are not there; shown while there are no others


_VERSUS = (
    "Wall-clock seconds of whole batches, `generate` against our step API: the same token ids in, exactly as many "
    "tokens out on both sides with stop ids off (counted, not assumed), greedy instead of sampled, sides in "
    "processes of their own by turns. transformers pads its prompts on the left; lite_llm does not pad. "
)
_LONG = (
    "1,900 tokens once, for eager transformers needs minutes for them: one pair of runs has no interval. Where even "
    "that does not fit into the time, fewer tokens are made on both sides, and the row says how many. The other "
    "batch sizes make 128 tokens. Compiled transformers (static cache, CUDA graphs) is a row of its own."
)

_WITHDRAWN = (
    "Measured on 2026-11-21 on one NVIDIA H200, and all rows withdrawn: transformers met lengths of its cache for the "
    'first time while it was timed, where a step takes several times as long as later (docs/results, "What did not '
    'work"). Its warm-up has made whole answers since.'
)


def _lite_llama(name: str, model: str, original: str) -> Claim:
    return Claim(
        name,
        f"lite_llama: four times as fast as transformers, {model}",
        original,
        _VERSUS + _LONG,
        (
            _NOT_THEM,
            _RANDOM,
            _LAUNCHES,
            _GPU,
            "That 4x was or was not right on its hardware: it was 4x of unequal tokens.",
        ),
        _WITHDRAWN,
    )


CLAIMS = (
    Claim(
        "ci-7b",
        "Colossal-Inference: Llama 7B against transformers",
        "One A100, Llama 7B, fp16, 1,024 tokens in, 128 out, tokens/s = batch x 128 / total at batch 8 / 16 / 32: "
        "transformers 199.12 / 246.56 / 278.40, Colossal-Inference 326.40 / 582.72 / 816.64 (1.64x / 2.36x / 2.93x).",
        _VERSUS + "Llama-2-7B has the sizes of the first Llama 7B.",
        (_NOT_THEM, _RANDOM, _LAUNCHES, _GPU),
        _WITHDRAWN,
    ),
    Claim(
        "fl",
        "Flover: requests that arrive over time",
        "A GPU that is not named, GPT-J 6B, 32 requests of 8 tokens, 512 in all with the answer. One every 500 "
        "ms: 21.2 s, 10.9x of one FasterTransformer instance per request; alone a request took 5.6 s, so the "
        "arrivals (31 x 0.5 s) and one latency explain all of it. Poisson with 20 / 200 / 1,000 ms between "
        "requests on average: 11.2x / 9.1x / 4.2x. Random lengths up to 512 on a 13B: 172.8 s against 21.5 s.",
        "Llama-2-7B, of about GPT-J's size, all on our engine: continuous batching (by the wall clock) against one "
        "request at a time and against batches that are gathered for a fixed time and that nobody joins. Batches are "
        "measured once each; one request at a time, and when a server of batches waits, is arithmetic over arrivals. "
        "Gaps are given as in the claim, and in latencies of one request here (500 ms were 0.09 of theirs): on a "
        "faster GPU the same 500 ms are more of them. A row says how many runs of ours it has.",
        (
            _NOT_THEM,
            _RANDOM,
            _GPU,
            "Anything about FasterTransformer, or about many instances on one GPU: no such thing was run.",
            "That continuous batching is worth a ratio where a row says that it is bound by the arrivals: there "
            "all that keep up tie.",
        ),
    ),
    Claim(
        "en",
        "Energon-AI: dynamic batching of unequal lengths",
        "A100s, GPT-3 sizes, fp16, uniform lengths up to 256: batches chosen by a cost table serve 34.7 % more "
        "than FIFO. Elsewhere 8.5x on 8 GPUs compares unpadded work with padded work of twice the tokens; equal "
        "work is about 4.25x.",
        "Llama-2-7B, prompts of 1 to 256 tokens, all there at once, one new token and 64, all on our engine with "
        "the same kernels: batches in order padded to their longest with tokens that are computed like others; "
        "the same of the whole queue sorted by length (more than a scheduler can know, and so as little padding "
        "as batches of that size can have); batches in order unpadded; and ours, up to 32 at a time, joined at "
        "every step.",
        (
            _NOT_THEM,
            _RANDOM,
            _GPU,
            "Anything about FasterTransformer, several GPUs, or 8.5x: one GPU, and padding is told apart from speed.",
            "That a real queue would save as much: all requests are known here before the first starts.",
        ),
    ),
    _lite_llama(
        "ll-1b",
        "Llama-3.2-1B",
        "A quarter of an RTX 3090, sampling on, 1,900 new tokens, a batch called 16 that had 15 prompts: 67.9 s, "
        "411.04 tokens/s, against 131.9 s, 104.70: 3.93x. It credited itself 27,900 tokens and transformers "
        "13,807; by the seconds it was 1.94x.",
    ),
    Claim(
        "ladder",
        "lite_llama: the ladder of its optimisations",
        "8 prompts padded to 115 tokens, the GPU not said beside them (elsewhere an RTX 3090): CUDA graphs 17.22 "
        "-> 8.24 ms (not on when the 4x was measured); 97.71 tokens/s with standard attention, 114.87 with "
        "FlashAttention 1, 146.45 with 2, 187.64 with flash-decoding, 217.84 with its token-level cache.",
        "Llama-3.2-1B, 8 prompts of 10 to 115 ids, 40 new tokens: our engine, and the same with one thing taken "
        "away from outside; a ratio says how many times as fast it is with that thing. All rungs take turns in "
        "processes of their own.",
        (
            _NOT_THEM,
            _RANDOM,
            _GPU,
            "What a rung of theirs is worth: ours are other parts of another engine, and none is the same change.",
            "That rungs multiply: each was taken away alone.",
        ),
    ),
    _lite_llama(
        "ll-3b",
        "Llama-3.2-3B",
        "An RTX 3090, sampling on, batch 12, 1,900 new tokens: 31.3 s, 730.45 tokens/s, against 69.1 s, 183.95: "
        "3.97x. It credited itself 22,897 tokens and transformers 12,719; by the seconds it was 2.21x.",
    ),
    _lite_llama(
        "ll-qwen",
        "Qwen2.5-3B",
        "Its documents, sampling on, batch 15: 38.4 s, 735.73 tokens/s, against 70.3 s, 215.62: 3.41x; by the "
        "seconds 1.83x. The GPU is not said beside the figures.",
    ),
    Claim(
        "ci-13b",
        "Colossal-Inference: Llama 13B against transformers",
        "Nothing: its table has 7B models. 13B stands here because issue 4 asks for it.",
        _VERSUS + "An H200; both models and their caches do not fit on an H100 together.",
        (_NOT_THEM, _RANDOM, _LAUNCHES),
        _WITHDRAWN,
    ),
)
