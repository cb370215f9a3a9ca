"""Seconds an image, and memory of each plan: `python benchmarks/sample.py --compile`.

Joint sampling under guidance, by `mofo.sampler.sample` and by the loop that one would write
oneself, of one random network; with the share of the device's own matmul rate that its arithmetic
reaches. On CUDA: the 9B in bfloat16 at 512x512, then each plan's peak, where the text encoder is as
many bytes as Qwen3-8B's and there is no autoencoder. On a CPU: a small network in float32. Appends
to benchmarks/RESULTS.md.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mofo import memory
from mofo.depth import DepthCodec
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.sampler import sample
from mofo.schedule import Schedule

TEXT_LENGTH, CFG_SCALE, REPEATS, PLAN_STEPS = 512, 4.0, 3, 5
TEXT_BYTES = 11_663_767_040  # of Qwen3-8B's embeddings and first 27 layers in bfloat16


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="klein_9b" if cuda else "s", help="of configs/model/")
    parser.add_argument("--size", type=int, default=512 if cuda else 128, help="side in pixels")
    parser.add_argument("--steps", type=int, default=50, help="(50)")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    release = random_release(args.model, device, dtype)
    text = measure_speed(release, args.size, args.steps, args.compile)
    if cuda:
        del release
        text += "\n\n" + measure_plans(args.model, dtype, args.size)
    print(text)
    if not args.dry:
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True)
        machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write(f"\n## Sampling: {args.model} at {args.size}x{args.size}, {dtype}\n\n")
            results.write(f"`python {' '.join(sys.argv)}`, commit {commit.strip()}, {machine}, ")
            results.write(f"torch {torch.__version__}\n\n{text}\n")


def random_release(model: str, device: str, dtype: torch.dtype) -> Release:
    """Random weights of a model's size; the depth head stays float32."""
    lines = Path(f"configs/model/{model}.yaml").read_text().splitlines()
    pairs = (line.split(": ", 1) for line in lines if line[:1] not in "#_")
    with torch.device("meta"):
        dit = ThreeStreamDiT(DiTConfig(**{key: json.loads(value) for key, value in pairs}))
    dit.to(dtype).depth_final_layer.float()
    dit.to_empty(device=device).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.02)
    side = round(dit.config.depth_channels**0.5)
    return Release(dit=dit, codec=DepthCodec(patch_size=side), schedule=Schedule())


def inputs(release: Release, size: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Text, its null text and the grid."""
    like = {"device": release.dit.img_in.weight.device, "dtype": release.dit.dtype}
    text, null = torch.randn(2, 1, TEXT_LENGTH, release.dit.config.context_in_dim, **like)
    return text, null, (size // release.codec.patch_size,) * 2


def ours(release: Release, size: int, steps: int) -> None:
    text, null, grid = inputs(release, size)
    made = sample(
        release.dit,
        release.schedule,
        text,
        grid=grid,
        null_text=null,
        num_steps=steps,
        cfg_scale=CFG_SCALE,
        log2_alpha=5.0,
    )
    made[0].cpu()  # waits for the device


@torch.no_grad()
def plain(release: Release, size: int, steps: int) -> None:
    """The loop as one writes it: a batched guided forward and two Euler updates a step."""
    text, null, grid = inputs(release, size)
    both, num_tokens = torch.cat([null, text]), grid[0] * grid[1]
    config, device = release.dit.config, text.device
    image = torch.randn(1, num_tokens, config.in_channels, device=device)
    depth = torch.randn(1, num_tokens, config.depth_channels, device=device)
    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, s in zip(times, times[1:], strict=False):
        at = torch.full((2,), t, device=device)
        v, x = release.dit(both, image.repeat(2, 1, 1), depth.repeat(2, 1, 1), at, at, grid=grid)
        (v_null, v_text), (x_null, x_text) = v.float().chunk(2), x.float().chunk(2)
        v_image = v_null + CFG_SCALE * (v_text - v_null)
        v_depth = (depth - (x_null + CFG_SCALE * (x_text - x_null))) / max(t, 0.05)
        image, depth = image + (s - t) * v_image, depth + (s - t) * v_depth
    image.cpu()


def measure_speed(release: Release, size: int, steps: int, compiles: bool) -> str:
    """A table of loops: median seconds an image, beside the plain loop's and the matmul rate."""
    rate, work = matmul_rate(release), steps * flops(release, size)
    medians = race({"plain loop": plain, "sample": ours}, release, size, steps)
    if compiles:
        memory.compile_blocks(release.dit)
        medians |= race({"sample, compiled": ours}, release, size, steps)
    rows = [
        f"{steps} steps, {work / 1e12:.3g} TFLOP an image, matmul {rate / 1e12:.3g} TFLOP/s\n",
        "| loop | seconds an image | plain / this | share of the matmul rate |",
        "|---|---|---|---|",
    ]
    for name, median in medians.items():
        ratio, share = medians["plain loop"] / median, work / median / rate
        rows.append(f"| {name} | {median:.3f} | {ratio:.3f} | {share:.0%} |")
    return "\n".join(rows)


def race(
    loops: dict[str, Callable[[Release, int, int], None]], release: Release, size: int, steps: int
) -> dict[str, float]:
    """Median seconds, run in turns: what slows the machine down slows all of them down."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(release, size, 1)
    for _ in range(REPEATS):
        for name, loop in loops.items():
            seconds[name].append(timed(lambda loop=loop: loop(release, size, steps)))
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def measure_plans(model: str, dtype: torch.dtype, size: int) -> str:
    """A table of plans: peak memory, its estimate, seconds a step."""
    rows = ["| plan | peak GiB | estimate | seconds a step |", "|---|---|---|---|"]
    release = random_release(model, "cuda", dtype)
    call = {"dtype": dtype, "size": (size, size), "cfg_scale": CFG_SCALE}
    needs = memory.measure(release, text=TEXT_BYTES, autoencoder=0, **call)
    for plan in memory.PLANS:
        release.dit.to("cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # by what ran earlier
        encoder = torch.empty(TEXT_BYTES, dtype=torch.uint8, device="cuda")
        if plan == "offload":
            memory.stream_blocks(release.dit, "cuda")
        encoder = encoder if plan == "resident" else None
        if plan != "offload":
            release.dit.to("cuda")
        ours(release, size, 1)
        taken = timed(lambda: ours(release, size, PLAN_STEPS)) / PLAN_STEPS
        peak, estimate = torch.cuda.max_memory_allocated() - before, needs.peak(plan)
        rows.append(f"| {plan} | {peak / 2**30:.1f} | {estimate / 2**30:.1f} | {taken:.3f} |")
        del encoder
    return "\n".join(rows)


def flops(release: Release, size: int) -> int:
    """Of one guided forward: projections and attention; what is done once a token is left out."""
    config, n = release.dit.config, (size // release.codec.patch_size) ** 2
    d, wide, length = config.hidden_size, int(config.mlp_ratio * config.hidden_size), TEXT_LENGTH
    block = 4 * d * d + 3 * d * wide  # weights that a token meets, in a block of either kind

    def stack(num_blocks: int, tokens: int) -> int:
        return num_blocks * (2 * block * tokens + 4 * tokens**2 * d)

    ends = config.context_in_dim * length + 2 * (config.in_channels + config.depth_channels) * n
    joint = stack(config.depth_double + config.depth_single, length + 2 * n)
    return 2 * (joint + stack(config.depth_decoder_num_layers, n) + 2 * d * ends)


def matmul_rate(release: Release) -> float:
    """FLOP/s of a large product in the network's dtype."""
    weight = release.dit.img_in.weight
    side = 8192 if weight.is_cuda else 1024
    a, b = torch.randn(2, side, side, device=weight.device, dtype=weight.dtype)
    runs = [timed(lambda: [a @ b for _ in range(10)][-1][0, 0].item()) for _ in range(6)]
    return 10 * 2 * side**3 / statistics.median(runs[1:])


def timed(run: Callable[[], object]) -> float:
    """Seconds; `run` ends when the device has."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
