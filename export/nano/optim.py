"""Optimises the small models: Muon and AdamW, averaged over processes, on a schedule that follows the clock."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from trol_edge.bundle.folder import new_file, writing
from trol_edge.errors import ExportError

WORLD = 2  # processes, one thread each: faster on two cores than one process with two threads
SEED = 20


class Muon:
    """Momentum whose update is orthogonalised (Newton-Schulz) per matrix, with matrices of one shape batched."""

    def __init__(self, params: list[nn.Parameter], lr: float, scales: list[float], decay: float = 0.1) -> None:
        self.groups: dict[tuple[int, ...], list[tuple[nn.Parameter, float]]] = {}
        for p, scale in zip(params, scales, strict=True):
            self.groups.setdefault((*p.shape, int(1000 * scale)), []).append((p, scale))
        self.momentum = {key: torch.zeros(len(v), *v[0][0].shape) for key, v in self.groups.items()}
        self.lr, self.decay = lr, decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for key, members in self.groups.items():
            grads = torch.stack([p.grad for p, _ in members])  # type: ignore[misc]
            momentum = self.momentum[key].lerp_(grads, 0.05)
            update = orthogonal(torch.lerp(grads, momentum, 0.95))
            rate = self.lr * factor * members[0][1]
            shape = math.sqrt(max(1.0, key[0] / key[1]))
            for (p, _), u in zip(members, update, strict=True):
                p.mul_(1 - rate * self.decay).add_(u, alpha=-rate * shape)


def orthogonal(g: Tensor) -> Tensor:
    """Bring the singular values of [N, a, b] to about 1 by five quintic Newton-Schulz steps."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out


class Trainer:
    """Two optimisers, averaged gradients, and a learning rate that follows the clock.

    Parameters with two axes whose name `by_muon` accepts go to Muon, the rest to AdamW; `scale` maps a name to a
    factor on its rate.
    """

    def __init__(
        self, module: nn.Module, seconds: float, by_muon: Callable[[str], bool], scale: Callable[[str], float]
    ) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        matrices = [(n, p) for n, p in named if p.dim() == 2 and by_muon(n)]
        rest = [(n, p) for n, p in named if not (p.dim() == 2 and by_muon(n))]
        self.muon = Muon([p for _, p in matrices], 0.012, [scale(n) for n, _ in matrices])
        groups = [{"params": [p], "scale": scale(n), "weight_decay": 0.05 if p.dim() > 1 else 0.0} for n, p in rest]
        self.adam = torch.optim.AdamW(groups, lr=1.1e-3, betas=(0.9, 0.98), foreach=True)
        self.seconds, self.start, self.progress, self.steps = seconds, time.monotonic(), 0.0, 0

    def step(self, loss: Tensor) -> None:
        """Run backward, average gradients and clock over the processes, clip, and update."""
        for p in self.params:
            p.grad = None
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        clock = torch.tensor([(time.monotonic() - self.start) / self.seconds])
        flat = torch.cat([g.reshape(-1) for g in grads] + [clock])
        dist.all_reduce(flat)
        flat /= WORLD
        self.progress, flat = min(1.0, float(flat[-1])), flat[:-1]
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        for p, g in zip(self.params, torch.split(flat, [p.numel() for p in self.params]), strict=True):
            p.grad = g.view_as(p)
        warm = min(1.0, (self.steps + 1) / 100)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.adam.param_groups:
            group["lr"] = 1.1e-3 * factor * group["scale"]
        self.adam.step()
        self.muon.step(factor)
        self.steps += 1

    def eta(self) -> str:
        spent = time.monotonic() - self.start
        return f"step {self.steps} {spent / 60:.1f} of {self.seconds / 60:.1f} min"


def run_parallel(stage: Callable[..., None], scratch: Path, *args: Any) -> None:
    """Run `stage(rank, scratch, *args)` in WORLD processes that can average tensors.

    Raises ExportError if one of them fails.
    """
    rendezvous = Path(tempfile.mkdtemp(dir=scratch.absolute())) / "rendezvous"  # its URL has no relative form
    try:
        mp.spawn(_process, (stage, rendezvous, scratch, args), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
    except mp.ProcessRaisedException as error:  # type: ignore[attr-defined]  # its text ends with that of the process's own exception
        raise ExportError(
            f"{scratch}: training failed in one of its processes: {str(error).splitlines()[-1]}"
        ) from error


def _process(rank: int, stage: Callable[..., None], rendezvous: Path, scratch: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # RMSNorm and LayerNorm get a bf16 input and FP32 weights here; the warning wants a fused kernel that is not needed.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(SEED)  # the same initial values everywhere; data differ by rank
    stage(rank, scratch, *args)
    dist.destroy_process_group()


def save_atomically(state: Any, path: Path) -> None:
    with writing(path, ExportError, "choose another folder"), new_file(path) as part:
        torch.save(state, part)
