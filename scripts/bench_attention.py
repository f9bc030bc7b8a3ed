"""Time NSA, whole and by part, beside torch's full attention: python scripts/bench_attention.py

Writes results.json, results.md and results.png. Every number, of whatever side, is the median over
groups of calls, the spread the interquartile range. A group's calls are queued between two CUDA
events without a synchronisation among them, as training queues its layers: where the device is
slower than the host the gaps between launches are hidden, where the host is slower they count.
"CUDA graph" is the same forward and the same backward captured as one graph each, which the host
only starts. The selection is computed and timed like everything else, and then replaced by one in
which neighbouring queries share a known part of their blocks, since random weights choose at random.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import json
import re
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.config import command_line, from_config, resolve_path
from eval.speed import SHAPES, save_figure, tables
from kernels.nsa import ops
from kernels.nsa.compress import gated_pool
from kernels.nsa.decode import nsa_decode
from kernels.nsa.geometry import Geometry, causal_pairs
from train.telemetry import measurement

FULL = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
GEOMETRY = Geometry()
GROUPS = 5  # of calls, for one number
GRAPHED = "nsa 85 %"  # what is captured in CUDA graphs too,
GRAPH_TOKENS = 16384  # up to this length; beyond, launches hide behind the kernels


@dataclass(frozen=True)
class BenchSettings:
    """conf/bench_attention.yaml"""

    shapes: list
    lengths: list
    part_lengths: list
    overlaps: list
    decode_batches: list
    seconds: float
    checkpoint: str | None
    text_path: str
    output_dir: str
    redraw_path: str | None


def synthetic_selection(tokens: int, kv_heads: int, share: float, device="cuda") -> torch.Tensor:
    """Selected blocks int32 [Hkv, T, n] in which a query keeps `share` of its predecessor's.

    The forced blocks are in; the other places divide the past into equal stretches and hold one
    block of theirs each, drawn anew with probability 1 - share at every token.
    """
    geo, generator = GEOMETRY, torch.Generator(device).manual_seed(0)
    places = geo.num_selected - geo.num_initial - geo.num_local
    t = torch.arange(tokens, device=device)[:, None]
    own = t // geo.select_block
    place = torch.arange(places, device=device)
    rows = []
    for _ in range(kv_heads):
        drawn = torch.rand(tokens, places, device=device, generator=generator)
        anew = torch.rand(tokens, places, device=device, generator=generator) >= share
        # A place that fits only a few blocks is drawn again when another comes within reach.
        anew |= (t % geo.select_block == 0) & (own <= 2 * geo.num_selected)
        source = torch.where(anew, t, 0).cummax(0).values
        past = (source // geo.select_block - geo.num_initial - geo.num_local + 1).clamp(min=0)
        block = geo.num_initial + ((place + drawn.gather(0, source)) / places * past).long()
        block = torch.where(block <= own - geo.num_local, block, -1)
        block[:, 1:][block[:, 1:] == block[:, :-1]] = -1
        forced = [own - i for i in range(geo.num_local)]
        forced += [torch.full_like(own, i) for i in range(geo.num_initial)]
        for i in range(geo.num_local, len(forced)):  # an initial block that is local already
            forced[i] = torch.where(forced[i] <= own - geo.num_local, forced[i], -1)
        row = torch.cat([block, *forced], 1)
        row = torch.where(row < 0, tokens, row).sort(1).values
        rows.append(torch.where(row == tokens, -1, row))
    return torch.stack(rows).int()


def shared_part(indices: torch.Tensor) -> float:
    """The mean part of a query's blocks that its predecessor has too, forced ones aside."""
    same = count = 0
    for low in range(1, indices.shape[1], 8192):
        here = indices[:, low : low + 8192]
        before = indices[:, low - 1 : low - 1 + here.shape[1]]
        own = here.amax(-1, keepdim=True)
        free = (here >= GEOMETRY.num_initial) & (here <= own - GEOMETRY.num_local)
        same += int(((here[..., None] == before[..., None, :]).any(-1) & free).sum())
        count += int(free.sum())
    return same / max(count, 1)


def trained_selection(settings: BenchSettings, tokens: int) -> torch.Tensor | None:
    """Selected blocks [Hkv, tokens, n] of the checkpoint's middle layer while it reads the text."""
    from model.checkpoint import load_checkpoint

    loaded = load_checkpoint(resolve_path(settings.checkpoint), "cuda", torch.bfloat16)
    text = resolve_path(settings.text_path).read_text(encoding="utf-8")
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < tokens:
        return None
    x = torch.tensor(ids[:tokens], device="cuda")
    position = torch.arange(tokens, device="cuda")
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    layers = []
    with replaced_selection(lambda indices: layers.append(indices) or indices), torch.no_grad():
        loaded.model(x, position, cu_seqlens, tokens)
    return layers[len(layers) // 2]


@contextmanager
def replaced_selection(replace):
    """Within it the operator selects as always, and goes on with replace(indices)."""
    kernels = ops._triton()
    select = kernels.select_blocks
    kernels.select_blocks = lambda *args: replace(select(*args))
    original, ops._triton = ops._triton, lambda: kernels
    try:
        yield
    finally:
        ops._triton = original


def timed(call, seconds: float) -> dict[str, float]:
    """Median and quartiles in ms of a call, over groups of calls that last `seconds` together.

    Calls of more than seconds / GROUPS are groups of their own, at least three.
    """
    call()
    once = _group(call, 1)
    size = max(int(1e3 * seconds / GROUPS / once), 1)
    times = [once] if size == 1 else []
    begin = time.monotonic()
    while len(times) < 3 or (len(times) < GROUPS and time.monotonic() - begin < seconds):
        times.append(_group(call, size))
    low, median, high = statistics.quantiles(times, n=4)
    return dict(ms=median, low=low, high=high)


def _group(call, size: int) -> float:
    """ms of one of `size` calls that are queued one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(size):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / size


class Inputs:
    """Random tensors of one shape and length, one document, bf16."""

    def __init__(self, shape: str, tokens: int):
        self.heads, self.kv_heads, self.dim = SHAPES[shape]
        self.tokens, self.rows = tokens, GEOMETRY.capacity(tokens)
        torch.manual_seed(0)

        def random(*size):
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        self.q = random(tokens, self.heads, self.dim)
        self.raw_k, self.raw_v, self.k, self.v, self.k_win, self.v_win = (
            random(tokens, self.kv_heads, self.dim) for _ in range(6)
        )
        self.score, self.position = (
            random(tokens, self.kv_heads),
            random(GEOMETRY.compress_block, self.kv_heads),
        )
        gates = torch.rand(tokens, self.heads, 3, device="cuda", dtype=torch.bfloat16)
        self.gates = gates.requires_grad_()
        self.dout = torch.randn_like(self.q)
        self.docs = (torch.tensor([0, tokens], dtype=torch.int32, device="cuda"), tokens)
        self.scale = self.dim**-0.5

    def leaves(self):
        return [
            self.q, self.raw_k, self.raw_v, self.k, self.v, self.k_win, self.v_win, self.score,
            self.position, self.gates,
        ]  # fmt: skip

    def pool(self):
        return [
            gated_pool(x, self.score, self.position, self.docs[0], GEOMETRY)
            for x in (self.raw_k, self.raw_v)
        ]

    def nsa(self):
        """The complete operator: pooling, three branches, gates."""
        kernel = ops.nsa_attention(
            self.q, *self.pool(), self.k, self.v, self.k_win, self.v_win, self.gates, *self.docs,
            GEOMETRY,
        )  # fmt: skip
        return kernel[0]

    def full(self, backend):
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def bytes(self, queries: int = 0, keys: int = 0, compressed: int = 0) -> int:
        """Size of so many tensors of q's, k's and k_cmp's shape."""
        heads = queries * self.heads + keys * self.kv_heads
        return 2 * self.dim * (self.tokens * heads + compressed * self.rows * self.kv_heads)


def measure_whole(x: Inputs, indices, seconds: float):
    """(direction, timing, memory in GB above the inputs) of the whole operator."""
    with replaced_selection(lambda _: indices):
        forward = timed(lambda: x.nsa(), seconds)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        out = x.nsa()
        torch.autograd.grad(out, x.leaves(), x.dout)
        memory = (torch.cuda.max_memory_allocated() - base) / 1e9
        out = x.nsa()
        backward = timed(
            lambda: torch.autograd.grad(out, x.leaves(), x.dout, retain_graph=True), seconds
        )
    return forward, backward, memory


def measure_graph(x: Inputs, indices, seconds: float):
    """Forward and backward of the whole operator, each captured in a CUDA graph.

    No autograd graph that was made outside may hold on to x's leaves: their gradients would go
    through its stream.
    """
    with replaced_selection(lambda _: indices):
        torch.autograd.grad(x.nsa(), x.leaves(), x.dout)  # compiles, which a capture must not
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            out = x.nsa()
        with torch.cuda.graph(backward, pool=forward.pool()):
            # What the forward saved stays, for the next replay of the backward.
            torch.autograd.grad(out, x.leaves(), x.dout, retain_graph=True)
    forward.replay()
    return timed(forward.replay, seconds), timed(backward.replay, seconds)


def measure_full(x: Inputs, backend, seconds: float):
    forward = timed(lambda: x.full(backend), seconds)
    out, dout = x.full(backend), x.dout.transpose(0, 1)[None]
    leaves = [x.q, x.k, x.v]
    backward = timed(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), seconds)
    return forward, backward


@torch.no_grad()
def measure_parts(x: Inputs, indices, seconds: float):
    """Yields (part, direction, timing, operations, bytes that must move)."""
    from kernels.nsa.window import window_forward  # needs a working Triton

    run, geo, docs, scale = ops._triton(), GEOMETRY, x.docs, x.scale
    flops = ops.attention_flops(x.tokens, x.heads, 2 * x.dim, geo)
    k_cmp, v_cmp = x.pool()
    cmp = x.q, k_cmp, v_cmp
    sel, win = (x.q, x.k, x.v), (x.q, x.k_win, x.v_win)
    o_cmp, lse_cmp = run.compressed_forward(*cmp, *docs, geo, scale)
    o_sel, lse_sel = run.selected_forward(*sel, indices, *docs, geo, scale)
    o_win, lse_win = window_forward(*win, *docs, geo.window, scale)
    outs, lses = (o_cmp, o_sel, o_win), (lse_cmp, lse_sel, lse_win)
    _, lse, delta = run.gate_backward(x.dout, x.gates, outs, lses)
    dq = torch.zeros_like(x.q)
    forwards = {
        "compressed": lambda: run.compressed_forward(*cmp, *docs, geo, scale),
        "select": lambda: run.select_blocks(x.q, k_cmp, lse_cmp, *docs, geo, scale),
        "selected": lambda: run.selected_forward(*sel, indices, *docs, geo, scale),
        "window": lambda: window_forward(*win, *docs, geo.window, scale),
        "window + gate": lambda: run.window_and_merge(
            *win, x.gates, o_cmp, o_sel, *docs, geo.window, scale
        ),
        "pool": x.pool,
    }
    backwards = {
        "compressed": lambda: run.compressed_backward(
            x.dout, *cmp, lse[0], delta[0], *docs, geo, scale, dq
        ),
        "selected": lambda: run.selected_backward(
            x.dout, *sel, lse[1], delta[1], indices, *docs, geo, scale
        ),
        "window": lambda: run.window_backward(
            x.dout, *win, lse[2], delta[2], *docs, geo.window, scale, dq
        ),
        "gate": lambda: run.gate_backward(x.dout, x.gates, outs, lses),
    }
    moved = {
        ("compressed", "forward"): x.bytes(queries=2, compressed=2),
        ("select", "forward"): x.bytes(queries=1, compressed=1),
        ("selected", "forward"): x.bytes(queries=2, keys=2),
        ("window", "forward"): x.bytes(queries=2, keys=2),
        ("window + gate", "forward"): x.bytes(queries=5, keys=2),
        ("pool", "forward"): x.bytes(keys=2, compressed=2),
        ("compressed", "backward"): x.bytes(queries=4, compressed=4),
        ("selected", "backward"): x.bytes(queries=3, keys=4),
        ("window", "backward"): x.bytes(queries=4, keys=4),
        ("gate", "backward"): x.bytes(queries=4),
        ("pool", "backward"): x.bytes(keys=4, compressed=4),
    }
    work = {(part, "forward"): count for part, count in flops.items()}
    work |= {(part, "backward"): 5 * count // 2 for part, count in flops.items()}
    work["select", "forward"] = flops["compressed"] // 2
    work["window + gate", "forward"] = flops["window"]
    for direction, calls in (("forward", forwards), ("backward", backwards)):
        for part, call in calls.items():
            key = part, direction
            yield *key, timed(call, seconds), work.get(key, 0), moved[key]
    with torch.enable_grad():
        pooled = x.pool()
        grads = [torch.randn_like(y) for y in pooled]
        leaves = [x.raw_k, x.raw_v, x.score, x.position]
        timing = timed(
            lambda: torch.autograd.grad(pooled, leaves, grads, retain_graph=True), seconds
        )
    yield "pool", "backward", timing, 0, moved["pool", "backward"]


@torch.no_grad()
def measure_decode(
    shape: str, tokens: int, batch: int, seconds: float
) -> dict[str, dict[str, float]]:
    """One step over caches of `tokens` tokens in a CUDA graph, µs, for NSA and SDPA flash.

    Both take turns over several caches, so that none waits in the L2 cache.
    """
    heads, kv_heads, dim = SHAPES[shape]
    rows = GEOMETRY.capacity(tokens)

    def random(*size):
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    copies = 8 if batch == 1 else 2
    q, gates = random(batch, heads, dim), random(batch, heads, 3).sigmoid()
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    caches = [
        [random(batch, n, kv_heads, dim) for n in (rows, rows, tokens, tokens, tokens, tokens)]
        for _ in range(copies)
    ]

    def nsa(cache):
        return nsa_decode(q, *cache, gates, lengths, GEOMETRY)

    def flash(cache):
        k, v = (x.transpose(1, 2) for x in cache[2:4])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    result = {}
    for name, step in (("nsa", nsa), ("flash", flash)):
        step(caches[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for cache in caches:
                step(cache)
        times = timed(graph.replay, seconds)
        result[name] = {key: 1e3 * ms / copies for key, ms in times.items()}
    return result


def ceilings() -> dict[str, float]:
    """What this card reaches now: bf16 matmul in TFLOP/s, copy in TB/s."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul = timed(lambda: a @ a, 1.0)["ms"]
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    copy = timed(lambda: big.clone(), 0.5)["ms"]
    return dict(tflops=2 * 8192**3 / matmul / 1e9, tb_per_s=2 * big.numel() / copy / 1e9)


def measure(settings: BenchSettings, path: Path) -> dict:
    """All numbers, which are in the JSON file `path` as soon as a shape and length is done."""
    results = measurement(torch.device("cuda")) | dict(
        geometry=asdict(GEOMETRY),
        ceilings=ceilings(), whole=[], parts=[], decode=[],
    )  # fmt: skip
    peak, bandwidth = results["ceilings"]["tflops"], results["ceilings"]["tb_per_s"]
    print(f"{results['device']}: matmul {peak:.0f} TFLOP/s, copy {bandwidth:.2f} TB/s")

    def note(table, timing, operations, **row):
        row |= timing
        if operations:
            row["tflops"] = operations / row["ms"] / 1e9
        results[table].append(row)
        words = [str(value) for key, value in row.items() if isinstance(value, (str, int))]
        print(f"{' '.join(words)}: {row['ms']:.3f} ms", flush=True)

    for shape, tokens in product(settings.shapes, settings.lengths):
        x = Inputs(shape, tokens)
        case = dict(shape=shape, tokens=tokens)
        pairs = 4 * x.heads * x.dim * causal_pairs(tokens, tokens)
        for name, backend in FULL.items():
            forward, backward = measure_full(x, backend, settings.seconds)
            note("whole", forward, pairs, **case, what=name, direction="forward")
            note("whole", backward, 5 * pairs // 2, **case, what=name, direction="backward")
        asked = sum(ops.attention_flops(tokens, x.heads, 2 * x.dim, GEOMETRY).values())
        selections = {
            f"nsa {share} %" if share else "nsa random": synthetic_selection(
                tokens, x.kv_heads, share / 100
            )
            for share in settings.overlaps
        }
        if settings.checkpoint:
            trained = trained_selection(settings, tokens)
            if trained is not None:
                heads = [h % len(trained) for h in range(x.kv_heads)]
                selections["nsa trained"] = trained[heads].contiguous()
        for name, indices in selections.items():
            shared = shared_part(indices)
            forward, backward, memory = measure_whole(x, indices, settings.seconds)
            extra = dict(what=name, shared=shared, memory_gb=memory)
            note("whole", forward, asked, **case, **extra, direction="forward")
            note("whole", backward, 5 * asked // 2, **case, **extra, direction="backward")
            if name == GRAPHED and tokens <= GRAPH_TOKENS:
                forward, backward = measure_graph(Inputs(shape, tokens), indices, settings.seconds)
                graph = dict(what=f"{name}, CUDA graph", shared=shared)
                note("whole", forward, asked, **case, **graph, direction="forward")
                note("whole", backward, 5 * asked // 2, **case, **graph, direction="backward")
            if tokens not in settings.part_lengths:
                continue
            for part, direction, timing, operations, moved in measure_parts(
                x, indices, settings.seconds / 2
            ):
                floor = max(operations / peak, moved / bandwidth) / 1e9
                note(
                    "parts", timing, operations, **case, what=name, part=part,
                    direction=direction, floor_ms=floor, floor_share=floor / timing["ms"],
                )  # fmt: skip
        del x, selections
        torch.cuda.empty_cache()
        _write(path, results)
    for shape, tokens, batch in product(settings.shapes, settings.lengths, settings.decode_batches):
        for name, timing in measure_decode(shape, tokens, batch, settings.seconds).items():
            timing = {key: us / 1e3 for key, us in timing.items()}
            note("decode", timing, 0, shape=shape, tokens=tokens, batch=batch, what=name)
        torch.cuda.empty_cache()
        _write(path, results)
    return results


def _write(path: Path, results: dict) -> None:
    """As JSON, a row of a table in one line."""
    text = json.dumps(results, indent=1)
    row = re.compile(r"\{([^{}]*)\}")
    path.write_text(row.sub(lambda found: "{" + " ".join(found[1].split()) + "}", text) + "\n")


@hydra.main(version_base=None, config_path="../conf", config_name="bench_attention")
def main(config: DictConfig) -> None:
    try:
        settings = from_config(BenchSettings, config)
        if unknown := set(settings.shapes) - set(SHAPES):
            raise ValueError(f"shapes: {', '.join(sorted(unknown))}; choose from a, b, c and d.")
        if settings.redraw_path:
            results = json.loads(resolve_path(settings.redraw_path).read_text())
        elif not torch.cuda.is_available():
            raise ValueError("bench_attention.py needs a CUDA device; there is none here.")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    output = resolve_path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not settings.redraw_path:
        results = measure(settings, output / "results.json")
    (output / "results.md").write_text(tables(results))
    print(tables(results))
    save_figure(results, output / "results.png")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
