"""python .gpu/ws_check.py TOKENS: is stream_ws right, and what does a layer take."""
import sys, torch, statistics, importlib
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, ".gpu")
from lite_llm.config import HFConfig
from lite_llm.models import registry, shapes
from lite_llm.ops import reference
from lite_llm.ops.triton import decode
from lite_llm.ops.triton.decode import Tiles
from tools import tune as T
from tools.chain import PARTS, Chain, Weights
@torch.inference_mode()
def main():
    dev = torch.device("cuda", 0); G = torch.cuda.get_device_properties(0).multi_processor_count
    w = Weights(registry.parse(HFConfig(shapes.shape_config("llama-3.2-1b"))), dev, torch.bfloat16)
    cfg, L, eps = w.cfg, len(w.layers), w.cfg.norm_eps
    tokens = int(sys.argv[1]); t = max(tokens, 8); chain = Chain(w, tokens, 512, 4096)
    present = {p: T.present(w, p, tokens) for p in PARTS}
    timer = T.Timer(chain, present, 16)
    gr = timer.graph(present, "qkv"); print(f"T={tokens} present {1e6 * statistics.median(timer.sample(gr) for _ in range(7)) / L:.2f} us a layer with attention", flush=True)
    where = (chain.positions, chain.slots, w.cos, w.sin)
    ws, wa, wd = (importlib.import_module(n) for n in ("stream_ws", "stream_wa", "stream_wd"))
    seen = w.random(tokens, cfg.heads * cfg.head_dim); res = chain.start.clone(); layer = w.layers[0]
    want = res.float()
    reference.linear_add_(want, seen.float(), layer["out"].float())
    yy = reference.linear(want, layer["gate_up"].float(), None, w.norm.float(), eps, True)
    reference.linear_add_(want, yy, layer["down"].float())
    pools = [p.clone() for p in chain.pools[0]]; rp = [p.float().clone() for p in pools]
    wq = reference.project_qkv_(*rp, want, w.layers[1]["qkv"].float(), None, w.norm.float(), eps, *where)
    torch.cuda.synchronize()
    got = res.clone(); torch.cuda.synchronize()
    with torch.cuda.stream(timer.stream):
        q = ws.stream_(got, seen, layer["out"], w.norm, layer["gate_up"], layer["down"], eps, ws.Plan(t, 128, 6, 3), (*pools, w.layers[1]["qkv"], w.bias, w.norm, *where), G)
    torch.cuda.synchronize()
    err = lambda a, b: ((a.float() - b).norm() / b.norm()).item()
    print(f"   errors: residual {err(got, want):.4f} q {err(q, wq):.4f} k {err(pools[0][chain.slots], rp[0][chain.slots]):.4f} v {err(pools[1][chain.slots], rp[1][chain.slots]):.4f}", flush=True)
    best = Tiles(128, 8, 3, 1, 1, 2, 2)
    def run(m, plan, tile):
        x = chain.x.copy_(chain.start); q = chain.qkv(present["qkv"], x, 0)
        for i, layer in enumerate(w.layers):
            if tile is None: out = q
            else:
                out = torch.empty_like(q)
                decode.decode(q, *chain.pools[i], out, chain.table, chain.rows, chain.kv_len, tokens, cfg.head_dim**-0.5, window=None, shape=tile)
            nxt = (i + 1) % L
            q = m.stream_(x, out.flatten(1), layer["out"], w.norm, layer["gate_up"], layer["down"], eps, plan, (*chain.pools[nxt], w.layers[nxt]["qkv"], w.bias, w.norm, *where), G)
    def cost(m, plan, tile):
        g = torch.cuda.CUDAGraph()
        with torch.cuda.stream(timer.stream):
            run(m, plan, tile); torch.cuda.synchronize(); g.capture_begin(pool=timer.memory); run(m, plan, tile); g.capture_end()
        return 1e6 * statistics.median(timer.sample(g) for _ in range(5)) / L
    K = (4, 1, 4, 2)
    plans = []
    for cols, st, inp, fl in [(128, 7, 4, f) for f in (2, 3, 4, 7)] + [(128, 12, 3, f) for f in (2, 3, 4, 6, 12)] + [(256, 4, 2, f) for f in (1, 2, 4)] + [(256, 6, 2, f) for f in (1, 2, 3, 6)] + [(64, 14, 6, f) for f in (4, 6, 14)] + [(64, 24, 6, f) for f in (4, 6, 10)]:
        if (64 * st + t * inp) * cols * 2 > 222e3: continue
        plans.append(ws.Plan(t, cols, st, inp, K, fl))
    jobs = [(ws, p) for p in plans] + [(m, ws.Plan(t, c, s, i, K, f)) for m in (wa, wd) for c, s, i, f in ((128, 7, 4, 3), (128, 12, 3, 3), (128, 12, 3, 12), (256, 6, 2, 2))]
    jobs += [(ws, ws.Plan(t, 128, 7, 4, K, 3, r)) for r in (96, 168)]
    def warm(job):
        torch.cuda.set_device(0)
        try:
            with torch.inference_mode(), torch.cuda.stream(timer.stream): run(job[0], job[1], None)
            return None
        except Exception as e: return repr(e)[:200]
    with ThreadPoolExecutor(15) as pool: failed = list(pool.map(warm, jobs))
    torch.cuda.synchronize()
    for (m, p), f in zip(jobs, failed):
        if f: print("   ERR", m.__name__, p, f, flush=True); continue
        print(f"   {m.__name__} cols {p.columns} stages {p.stages} inputs {p.inputs} flight {p.flight} regs {p.regs}: {cost(m, p, None):.2f} alone" + (f" {cost(m, p, best):.2f} with attention" if m is ws else ""), flush=True)
main()
