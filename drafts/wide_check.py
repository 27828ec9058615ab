"""Wide matmuls on a GPU: right on the shapes of two models, and faster than cuBLAS where? From the repo root, < 60 s."""
import os, sys, time
START = time.time()
sys.path.insert(0, os.getcwd())
from concurrent.futures import ThreadPoolExecutor
import torch
from lite_llm.config import HFConfig
from lite_llm.engine.roofline import copy_rate
from lite_llm.models import registry, shapes
from lite_llm.ops.triton import wide
from lite_llm.ops.triton.decode import capability
from lite_llm.ops.triton.tuning import CUBLAS, Choice
from tools import tune
from tools.chain import PARTS, Chain, Weights

BUDGET = float(os.environ.get("BUDGET", 58))
left = lambda: BUDGET - (time.time() - START)
dev = torch.device("cuda", 0)
torch.manual_seed(0)
GPU = capability(dev)
COPY = copy_rate(dev)
a = torch.randn(8192, 8192, device=dev).bfloat16()
for _ in range(3): a @ a
t0, t1 = (torch.cuda.Event(enable_timing=True) for _ in range(2))
t0.record(); [a @ a for _ in range(10)]; t1.record(); t1.synchronize()
RATE = 10 * 2 * 8192**3 / (t0.elapsed_time(t1) / 1e3); del a
print(f"{torch.cuda.get_device_name()} sm {GPU}: copy {COPY / 1e12:.2f} TB/s, matmul {RATE / 1e12:.0f} TFLOP/s, {time.time() - START:.1f} s", flush=True)
BASE = [  # tokens, rows of the weight, columns, warps, stages, tma
    (128, 256, 64, 8, 4, 1), (128, 256, 64, 8, 4, 0), (256, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 3, 0),
    (128, 128, 128, 8, 3, 1), (128, 128, 64, 4, 3, 1), (64, 256, 64, 4, 4, 1), (64, 128, 64, 4, 4, 1), (128, 64, 64, 4, 4, 1),
    (256, 64, 64, 8, 4, 1), (64, 64, 128, 4, 3, 1),
]

def tiles(key, T):
    op, K, N = key
    for tok, rows, col, warps, stages, tma in BASE:
        programs = -(-T // tok) * -(-N // rows)
        splits = {1}
        while op != "linear" and programs * max(splits) < 100 and 2 * max(splits) * T <= wide.MOST_PARTIAL and max(splits) < 8:
            splits = {max(splits) * 2} | ({1} if programs > 60 else set())
        for s in sorted(splits):
            tile = wide.Tile(tok, rows // 2 if op == "gated" else rows, col, warps, stages, s, bool(tma), 0, 256)
            if wide.fits(tile, K, N, T, 2, op == "gated", GPU): yield Choice("wide", tile)

def brief(choice):
    if choice.kernel != "wide": return choice.kernel
    t = choice.tile
    return f"{t.tokens}x{t.rows}x{t.columns} w{t.warps} s{t.stages} k{t.splits} {'tma' if t.tma else 'ptr'} rel{t.release} own{t.own} ahead{t.ahead >> 20}M"

def alone(timer, chain, part, choice):
    """us of one call, in a graph that runs this part on the weights of all layers, which L2 cannot hold."""
    w = chain.weights
    def go():
        for i, layer in enumerate(w.layers):
            if part == "qkv": chain.qkv(choice, chain.start, i)
            elif part == "head": chain.matmul(part, choice, chain.start, w.head, None)
            else: chain.matmul(part, choice, chain.start if part == "gate_up" else chain.wide[part], layer[part], None, None if part == "gate_up" else chain.x)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.stream(timer.stream):
        go(); torch.cuda.synchronize(); g.capture_begin(pool=timer.memory)
        try: go()
        finally: g.capture_end()
    return 1e6 * min(timer.sample(g) for _ in range(4)) / len(w.layers)

wrong = 0
FIRST = float(os.environ.get("FIRST", 0.6))  # share of the time for the 1B model

def compiled(timer, chain, wanted):
    """Those of (part, choice) that compile and run; all at the same time, for compiling takes longest."""
    def one(pair):
        try:
            with torch.inference_mode(), torch.cuda.stream(timer.stream): chain.once(*pair)
            return True
        except Exception as error:
            print("LEFT OUT", pair[0], brief(pair[1]), f"{type(error).__name__}: {error}"[:160], flush=True)
            return False
    with ThreadPoolExecutor(timer.workers, initializer=torch.cuda.set_device, initargs=(dev,)) as pool:
        good = [pair for pair, ok in zip(wanted, pool.map(one, wanted)) if ok]
    torch.cuda.synchronize()
    return good

def right(chain, shape, T, part, choice):
    global wrong
    if choice.kernel != "wide" or chain.right(part, choice): return True
    wrong += 1; print("WRONG", shape, T, part, brief(choice), flush=True)
    return False

def study(shape, w, T, until):
    begin = time.time()
    chain, n = Chain(w, T, 64), len(w.layers)
    start = {part: tune.present(w, part, T) for part in PARTS}
    best = dict(start)
    timer = tune.Timer(chain, start, min(os.cpu_count() or 1, 16))
    wanted = [(part, c) for part in PARTS for c in dict.fromkeys([start[part], CUBLAS, *tiles(w.key(part), T)])]
    good = compiled(timer, chain, wanted)
    print(f"{shape} T={T}: {len(good)} kernels ready in {time.time() - begin:.1f} s", flush=True)
    for k, part in enumerate(PARTS):
        stop = time.monotonic() + (until - time.monotonic()) / (len(PARTS) - k)
        op, K, N = w.key(part)
        floor = 1e6 * max(2 * T * K * N / RATE, 2 * (K * N + T * (K + N)) / COPY)
        found = []
        def look(choices):
            for c in choices:
                if c != start[part] and time.monotonic() > stop: break
                if right(chain, shape, T, part, c):
                    g = timer.graph(best | {part: c}, part)
                    found.append((1e6 * min(timer.sample(g) for _ in range(3)), c))
            found.sort(key=lambda f: f[0])
        look([c for p, c in good if p == part])
        top = found[0][1]
        if top.kernel == "wide" and T in (256, 1024) and time.monotonic() < stop:
            more = [Choice("wide", top.tile._replace(**v)) for v in ({"own": 0}, {"release": 2}, {"ahead": 8 << 20})]
            look([c for _, c in compiled(timer, chain, [(part, c) for c in more])])
        best[part] = found[0][1]
        per = 1 if part == "head" else n
        base = next(us for us, c in found if c == start[part])
        print(f"{shape} T={T} {part}: floor {floor:.1f} us; alone: now {alone(timer, chain, part, start[part]):.1f} ({brief(start[part])}), cublas {alone(timer, chain, part, CUBLAS):.1f}, best {alone(timer, chain, part, best[part]):.1f}; {len(found)} tried", flush=True)
        pointers = [f for f in found[4:] if f[1].kernel == "wide" and not f[1].tile.tma][:1]
        for us, c in [*found[:4], *pointers, *(f for f in found[4:] if f[1].kernel != "wide")]:
            print(f"    {(base - us) / per:+6.2f} us saved in the chain  {brief(c)}", flush=True)
    print(f"== {shape} T={T}: now  {timer.summary(start, COPY)}\n==      best {timer.summary(best, COPY)}  ({time.time() - START:.0f} s)", flush=True)

with torch.inference_mode():
    for shape, counts in (("llama-3.2-1b", (256, 128, 1024, 512)), ("llama-3.1-8b", (256, 1024, 128, 512))):
        until_shape = time.monotonic() + left() * (FIRST if shape == "llama-3.2-1b" else 1.0)
        w = Weights(registry.parse(HFConfig(shapes.shape_config(shape))), dev, torch.bfloat16)
        for j, T in enumerate(counts):
            until = time.monotonic() + (until_shape - time.monotonic()) / (len(counts) - j) * (1.4 if j < 2 else 1.0)
            if until - time.monotonic() < 2: print(f"{shape} {T}: no time", flush=True); continue
            study(shape, w, T, until)
        del w
print("WRONG:", wrong, f"{time.time() - START:.1f} s")
