"""A training run that fits the time there is, and goes on after a kill.

The learning rate follows the share of the time budget that is spent. A checkpoint is written every
few minutes, with a line of the log; a run that starts in a folder with a checkpoint resumes it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pace:
    """How long a run takes and how it moves.

    Attributes:
        minutes: time budget of the steps; checkpoint_minutes: between checkpoints.
        warm_up_steps: steps over which the learning rate rises from zero.
        largest_norm: gradients are clipped to it.
        average_decay: how much of the weights' moving average a step keeps.
        steps: what else ends the run, where the same is wanted of any machine.
    """

    minutes: float
    checkpoint_minutes: float
    warm_up_steps: int
    largest_norm: float
    average_decay: float
    steps: float = math.inf


class TimedRun:
    """Model, moving average and optimiser of a run, with its checkpoint and log.

    Attributes:
        steps: optimiser steps so far; spent_s: seconds spent on them.
    """

    def __init__(
        self,
        folder: Path,
        parts: dict[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        pace: Pace,
    ) -> None:
        """Resume what is in the folder, or begin.

        Args:
            folder: where checkpoint.pt and log.jsonl are.
            parts: "model", "average" and whatever else is trained.
            optimiser: over all that is trained.
            pace: see `Pace`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pace = folder, pace
        self.steps, self.spent_s = 0, 0.0
        self._parts, self._optimiser = parts, optimiser
        self._base_rates = [group["lr"] for group in optimiser.param_groups]
        if (folder / "checkpoint.pt").exists():
            self._resume()

    def _resume(self) -> None:
        device = next(self._parts["model"].parameters()).device
        state = torch.load(self.folder / "checkpoint.pt", device, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._optimiser.load_state_dict(state["optimiser"])
        self.steps, self.spent_s = state["steps"], state["spent_s"]

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the one before."""
        state: dict[str, object] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {
            "optimiser": self._optimiser.state_dict(),
            "steps": self.steps,
            "spent_s": self.spent_s,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    @property
    def spent(self) -> float:
        """Share of the budget that is spent, of time or of steps."""
        time_spent = self.spent_s / (60 * self.pace.minutes)
        return min(1.0, max(time_spent, self.steps / self.pace.steps))

    def rate_factor(self) -> float:
        """Share of the full learning rate: warm-up, then a cosine over the budget."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.spent))
        return min(1.0, (self.steps + 1) / self.pace.warm_up_steps) * (0.02 + 0.98 * cosine)

    def descend(self, loss: Tensor) -> None:
        """One optimiser step down a loss; the average follows."""
        for group, base in zip(self._optimiser.param_groups, self._base_rates, strict=True):
            group["lr"] = base * self.rate_factor()
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        trained = [p for group in self._optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.pace.largest_norm)
        self._optimiser.step()
        self.steps += 1
        decay = min(self.pace.average_decay, 1 - 10 / (self.steps + 10))
        average_into(self._parts["average"], self._parts["model"], decay)

    def run_until_spent(
        self, step: Callable[[], dict[str, float]], report: Callable[[], dict[str, float]]
    ) -> None:
        """Train until the budget is spent.

        Args:
            step: makes one step and returns its losses.
            report: what is measured at each checkpoint; its time does not count.
        """
        every_s = 60 * self.pace.checkpoint_minutes
        losses: list[dict[str, float]] = []
        next_save_s = self.spent_s + every_s
        while self.spent < 1.0:
            began = time.perf_counter()
            losses.append(step())
            self.spent_s += time.perf_counter() - began
            if self.spent >= 1.0 or self.spent_s >= next_save_s:
                self.save()
                self._log(losses, report())
                losses, next_save_s = [], self.spent_s + every_s

    def _log(self, losses: list[dict[str, float]], measured: dict[str, float]) -> None:
        """Print and append mean losses and what was measured."""
        means = {name: float(np.mean([x[name] for x in losses])) for name in losses[0]}
        line = {"minutes": self.spent_s / 60, **means, **measured}
        text = json.dumps({"steps": self.steps} | {n: round(v, 4) for n, v in line.items()})
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(text + "\n")


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average's weights and statistics towards the model's; copy its counters."""
    pairs = zip(
        (*average.parameters(), *average.buffers()),
        (*model.parameters(), *model.buffers()),
        strict=True,
    )
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
