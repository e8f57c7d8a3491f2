"""The field loss against plain InfoNCE, the dense oracle, and what others offer, bounded memory or not.

    python benchmarks/loss.py [--batches 1024 4096 16384] [--dims 64 128] [--rounds 7] [--device cuda] [--out FILE]

Others: `torch.nn.functional.linear_cross_entropy` in chunks (InfoNCE, and I-Con but for a constant, as label
smoothing), sentence-transformers' cached ranking loss, open_clip's ClipLoss and SigLIP (another function: no softmax;
in chunks, each computed again in the backward pass), lightly's NTXentLoss.

Forward and backward, float32, one process. Times: all losses in alternation in one process, the median over
rounds of the ratio to plain InfoNCE of the same round (machines are noisy; ratios within a round are not).
Memory: every loss in a process of its own, the growth of its peak resident size over that before the call,
gradients included (on a GPU: of its allocated memory). Floor: the time that the matrix products, exponentials
and logarithms of RKDO would take alone, at the rates measured in the same run on data in the cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rkdo_dist import IConLoss, InfoNCELoss, RKDOLoss
from rkdo_dist.field.objectives import Objective, dense

TEMPERATURE = 0.5
CHUNK = 1024  # rows at a time, for those who ask
Loss = Callable[[Tensor, Tensor], Tensor]


def plain_infonce(u: Tensor, v: Tensor) -> Tensor:
    """What everybody writes first."""
    return cross_entropy(u @ v.T / TEMPERATURE, torch.arange(len(u), device=u.device))


def torch_chunked(label_smoothing: float = 0.0) -> Loss:
    """torch's own cross entropy of a linear map in chunks (torch 2.13 and newer): view 2 is the map."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()

    def loss(u: Tensor, v: Tensor) -> Tensor:
        own = torch.arange(len(u), device=u.device)
        return linear_cross_entropy(u / TEMPERATURE, v, own, label_smoothing=label_smoothing, options=options)

    return loss


def sentence_transformers_cached() -> Loss:
    """The ranking loss of sentence-transformers over embeddings that it holds, CHUNK rows at a time."""
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    encoder = [torch.nn.Identity()]
    loss = CachedMultipleNegativesRankingLoss(encoder, 1 / TEMPERATURE, dot_score, mini_batch_size=CHUNK)

    def both(u: Tensor, v: Tensor) -> Tensor:
        # It leaves gradients in the embeddings chunk by chunk; they are handed on when the step calls backward.
        held = [x.detach().requires_grad_() for x in (u, v)]
        value = loss.calculate_loss([[x] for x in held], with_backward=True)
        for x, h in zip((u, v), held, strict=True):
            assert h.grad is not None
            value = value + ((x - x.detach()) * h.grad).sum()
        return value

    return both


def open_clip_siglip() -> Loss:
    """SigLIP in chunks of CHUNK x CHUNK pairs."""
    from open_clip.loss import SigLipLoss
    from torch.utils.checkpoint import checkpoint

    loss = SigLipLoss()

    def chunks(u: Tensor, v: Tensor) -> Tensor:
        parts = [
            checkpoint(loss._loss, rows, columns, 1 / TEMPERATURE, -10.0, i != j, use_reentrant=False)
            for i, rows in enumerate(u.split(CHUNK))
            for j, columns in enumerate(v.split(CHUNK))
        ]
        return torch.stack(parts).sum() * (CHUNK / len(u))

    return chunks


def lightly_ntxent() -> Loss:
    """SimCLR's loss: 2B rows against 2B columns."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)


def open_clip_loss() -> Loss:
    """CLIP's loss: both directions."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda u, v: loss(u, v, 1 / TEMPERATURE)


# name -> (how to make it, B x B matrices of float32 that it holds at its peak, about)
LOSSES: dict[str, tuple[Callable[[], Loss], int]] = {
    "plain InfoNCE": (lambda: plain_infonce, 3),
    "RKDO depth 3": (lambda: RKDOLoss(), 0),
    "RKDO depth 3, parts": (lambda: lambda u, v: RKDOLoss()(u, v, parts=True)[0], 0),
    "RKDO depth 1": (lambda: RKDOLoss(depth=1), 0),
    "I-Con": (lambda: IConLoss(), 0),
    "InfoNCE": (lambda: InfoNCELoss(), 0),
    "InfoNCE symmetric": (lambda: InfoNCELoss(symmetric=True), 0),
    "InfoNCE joint": (lambda: InfoNCELoss(pairing="joint"), 0),
    "dense oracle, RKDO": (lambda: lambda u, v: dense(Objective.rkdo(), u, v)[0], 24),
    "torch chunked, InfoNCE": (torch_chunked, 0),
    "torch chunked, I-Con": (lambda: torch_chunked(0.2), 0),
    "sentence-t. cached": (sentence_transformers_cached, 0),
    "open_clip ClipLoss": (open_clip_loss, 5),
    "open_clip SigLIP": (open_clip_siglip, 0),
    "lightly NTXentLoss": (lightly_ntxent, 12),
}


def embeddings(batch: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Two views of random samples, correlated as those of an encoder in training."""
    torch.manual_seed(0)
    u = torch.randn(batch, d, device=device)
    v = u + torch.randn(batch, d, device=device)
    return normalize(u, dim=1).requires_grad_(), normalize(v, dim=1).requires_grad_()


def step(loss: Loss, u: Tensor, v: Tensor) -> None:
    """Forward and backward."""
    u.grad = v.grad = None
    loss(u, v).backward()


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time, until a GPU is done too."""
    begin = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def available(name: str, batch: int, limit: float) -> Loss | str:
    """The loss, or why it is left out."""
    make, matrices = LOSSES[name]
    if matrices * batch**2 * 4 > limit * 2**30:
        return f"needs about {matrices * batch**2 * 4 / 2**30:.0f} GiB"
    try:
        return make()
    except ImportError as error:
        return f"not installed ({error.name}); pip install 'rkdo_dist[bench]'"


def floor_seconds(batch: int, d: int, device: str, depth: int = 3) -> float:
    """Time of RKDO's arithmetic alone: 3 products, D + 1 exponentials and D logarithms of B x B numbers."""
    rows = min(batch, max(64, (2**25 if device == "cuda" else 2**20) // batch))
    a, b, x = (torch.rand(*shape, device=device) for shape in ((rows, d), (batch, d), (rows, batch)))
    out, to_rows, to_columns = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    part = torch.rand(2**23 if device == "cuda" else 2**17, device=device)
    strip = torch.empty_like(part)
    products = (
        lambda: torch.mm(a, b.T, out=out),
        lambda: torch.mm(x, b, out=to_rows),
        lambda: torch.mm(x.T, a, out=to_columns),
    )
    total = sum(min(seconds(product) for _ in range(20)) for product in products) * batch / rows
    for count, function in ((depth + 1, torch.exp), (depth, torch.log)):
        fastest = min(seconds(partial(function, part, out=strip)) for _ in range(50))
        total += count * fastest * batch**2 / part.numel()
    return total


def peak_memory(name: str, batch: int, d: int, device: str) -> float:
    """Growth of the peak in MB, measured in a process of its own."""
    here = str(Path(__file__).parent)
    call = f"loss.report_memory({name!r}, {batch}, {d}, {device!r})"
    code = f"import sys; sys.path.insert(0, {here!r}); import loss; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_memory(name: str, batch: int, d: int, device: str) -> None:
    """Print by how much the peak grows over the state after a small call."""
    loss = LOSSES[name][0]()
    step(loss, *embeddings(64, d, device))  # libraries, thread pools
    u, v = embeddings(batch, d, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, u, v)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present size
    present = _status("VmRSS")
    step(loss, u, v)
    print((_status("VmHWM") - present) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(batch: int, d: int, rounds: int, names: list[str], limit: float, device: str) -> list[dict]:
    """One row per loss: milliseconds, ratio to plain InfoNCE, extra memory."""
    candidates = {name: available(name, batch, limit) for name in names}
    losses = {name: loss for name, loss in candidates.items() if not isinstance(loss, str)}
    u, v = embeddings(batch, d, device)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for round_number in range(rounds + 1):
        for name, loss in losses.items():
            taken = seconds(partial(step, loss, u, v))
            if round_number:  # the first round warms up
                times[name].append(taken)
    floor, rows = floor_seconds(batch, d, device), []
    for name in names:
        row: dict = {"loss": name, "batch": batch, "d": d}
        if name in losses:
            plain = times.get("plain InfoNCE", [float("nan")] * rounds)
            ratios = [mine / other for mine, other in zip(times[name], plain, strict=True)]
            row |= {"ms": statistics.median(times[name]) * 1e3, "best_ms": min(times[name]) * 1e3}
            row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
            row |= {"memory_mb": peak_memory(name, batch, d, device)}
            if name == "RKDO depth 3":
                row["floor_share"] = floor / min(times[name])
        else:
            row["left_out"] = candidates[name]
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    head = f"{row['batch']:>6} {row['d']:>4}  {row['loss']:<22}"
    if "left_out" in row:
        return f"{head} left out: {row['left_out']}"
    share = f"  floor share {row['floor_share']:.2f}" if "floor_share" in row else ""
    low, high = row["ratio_range"]
    ratio = f"{row['ratio']:7.2f} x ({low:.2f} to {high:.2f})"
    return f"{head} {row['ms']:10.1f} ms (best {row['best_ms']:.1f}) {ratio:<26} {row['memory_mb']:9.1f} MB{share}"


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run and print; with --out also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit-gib", type=float, default=8.0, help="leave out what needs more memory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"date": date.today().isoformat(), "torch": torch.__version__, "threads": arguments.threads}
    machine |= {"processor": _processor(arguments.device), "python": platform.python_version()}
    print(machine)
    print(f"{'B':>6} {'d':>4}  {'loss':<22} {'median':>13} {'of plain InfoNCE':>18} {'extra peak':>19}")
    rows = []
    for d in arguments.dims:
        for batch in arguments.batches:
            rounds = arguments.rounds if batch <= 4096 or arguments.device == "cuda" else min(3, arguments.rounds)
            rows += measure(batch, d, rounds, arguments.losses, arguments.limit_gib, arguments.device)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
