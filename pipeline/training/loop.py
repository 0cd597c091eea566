"""The training loop that both objectives share.

AdamW or Muon, warm-up and cosine, clipping, EMA, checkpoints, resume; without Ray, in one process, or in one of
several that `torch.distributed` has joined.
"""

import copy
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import storage
from pipeline.errors import Diverged, TrainingDataError
from pipeline.training.config import OptimizerConfig

Losses = dict[str, torch.Tensor]
_log = logging.getLogger("everymask")
_BETA_OF_SHOWN_LOSSES: Final = 0.98
_LOG_SECONDS: Final = 10.0


class Batch(Protocol):
    """What the loop must know of a batch."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its pictures."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        ...


@dataclass
class Position:
    """How far a training is. The next batch's number is `step`."""

    step: int = 0
    seconds: float = 0.0
    """Spent training, over all starts."""
    losses: dict[str, float] = field(default_factory=dict)
    """Smoothed."""


class Training:
    """A model being trained: its objective, optimiser, average and position."""

    def __init__(self, objective: nn.Module, model: nn.Module, config: OptimizerConfig) -> None:
        """Begin.

        Args:
            objective: Called with a batch and its number, returns losses; `loss` is minimised. All its
                parameters that require gradients are trained.
            model: What is wanted of it in the end, inside the objective, on its device.
            config: How.
        """
        self.objective, self.model, self.config = objective, model, config
        self.average = copy.deepcopy(model.state_dict())
        self.position = Position()
        self.optimizers = _optimizers(objective, config)
        if self.device.type == "cpu":
            _say_if_slow(config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end: of the steps, or of the time."""
        config, position = self.config, self.position
        if config.minutes is not None:
            return min(1.0, position.seconds / (60 * config.minutes))
        return min(1.0, position.step / config.steps) if config.steps else 1.0

    def run(
        self,
        batches: Iterable[Batch],
        until: float,
        on_step: Callable[["Training"], None] = lambda _training: None,
    ) -> None:
        """Train on batches, the first of number `position.step`, until a progress is reached.

        Args:
            batches: In the order of their numbers, at least as many as are needed.
            until: Progress at which to stop, 0 to 1.
            on_step: Called after each step: checkpoints, evaluation.

        Raises:
            Diverged: a loss is not finite. The message names the batch's pictures.
        """
        self.objective.train()
        logged = 0.0
        iterator = iter(batches)
        while self.progress < until:
            start = time.monotonic()
            batch = next(iterator)
            losses = self._step(batch.to(self.device))
            self._account(losses, time.monotonic() - start)
            on_step(self)
            if time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                _log.info("%s", self.in_words())

    def in_words(self) -> str:
        """Position and losses, for a log line."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.position.losses.items())
        return f"step {self.position.step}, {100 * self.progress:.1f} %: {shown}"

    def _step(self, batch: Batch) -> dict[str, float]:
        """One update of the weights; its losses."""
        config = self.config
        rate = config.learning_rate * schedule(self.position.step, self.progress, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses: Losses = self.objective(batch, self.position.step)
        self.objective.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip or math.inf)
        values = self._over_workers(losses)
        if not math.isfinite(values["loss"]) or not math.isfinite(float(norm)):
            raise Diverged(
                f"The loss of step {self.position.step} is {values['loss']}, its gradient's norm {float(norm)}. "
                f"The batch holds {', '.join(_of_all_workers(batch.names))}. The last checkpoint is from before; "
                "lower --learning-rate, or look at these pictures."
            )
        for optimizer in self.optimizers:
            optimizer.step()
        return values

    def _over_workers(self, losses: Losses) -> dict[str, float]:
        """The means over the processes that train together, so that all of them decide alike."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(values)
            values /= distributed.get_world_size()
        return dict(zip(losses, values.tolist(), strict=True))

    def _account(self, losses: Mapping[str, float], seconds: float) -> None:
        position = self.position
        for name, value in losses.items():
            kept = _BETA_OF_SHOWN_LOSSES if name in position.losses else 0.0
            position.losses[name] = kept * position.losses.get(name, 0.0) + (1 - kept) * value
        position.step += 1
        position.seconds += seconds
        # Short at first, so that the average forgets the untrained weights.
        decay = min(self.config.ema_decay, (1 + position.step) / (10 + position.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    @property
    def _own_objective(self) -> nn.Module:
        """The objective without what averages its gradients over workers, so that their number may change."""
        objective = self.objective
        own: nn.Module = objective.module if isinstance(objective, DistributedDataParallel) else objective
        return own

    def checkpoint(self, settings: Mapping[str, Any]) -> bytes:
        """All that is needed to go on, as bytes. `settings` say what training it is of."""
        buffer = io.BytesIO()
        torch.save(
            {
                "settings": dict(settings),
                "objective": self._own_objective.state_dict(),
                "average": self.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "position": vars(self.position),
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, data: bytes, settings: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            TrainingDataError: it is of a training with other settings.
        """
        state = torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
        differing = sorted(
            f"{name} ({state['settings'].get(name)} there, {settings.get(name)} here)"
            for name in state["settings"].keys() | settings.keys()
            if state["settings"].get(name) != settings.get(name)
        )
        if differing:
            raise TrainingDataError(
                f"The checkpoint is of another training: {', '.join(differing)}. Choose another output, or pass "
                "--overwrite to start anew."
            )
        self._own_objective.load_state_dict(state["objective"])
        self.average = state["average"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.position = Position(**state["position"])


class Checkpoints:
    """Writes a training's state to one address every few minutes, whole or not at all."""

    def __init__(self, uri: str, minutes: float, settings: Mapping[str, Any]) -> None:
        self._uri, self._seconds, self._settings = uri, 60 * minutes, settings
        self._written = time.monotonic()

    def resume(self, training: Training) -> bool:
        """Go on from what is there; whether there was anything.

        Raises:
            TrainingDataError: it is of a training with other settings.
        """
        if not storage.exists(self._uri):
            return False
        training.restore(storage.read_bytes(self._uri), self._settings)
        return True

    def __call__(self, training: Training) -> None:
        """After a step: write if it is time."""
        if time.monotonic() - self._written >= self._seconds:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write now."""
        storage.write_atomic(self._uri, training.checkpoint(self._settings))
        self._written = time.monotonic()


def _of_all_workers(names: tuple[str, ...]) -> list[str]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(names)
    gathered: list[tuple[str, ...]] = [()] * distributed.get_world_size()
    distributed.all_gather_object(gathered, names)
    return [name for names in gathered for name in names]


def _say_if_slow(config: OptimizerConfig) -> None:
    """Of a CPU without instructions for bfloat16, which Muon's orthogonalisation uses at any precision."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return  # where oneDNN is missing, as on a Mac, it cannot be asked
    slow = {"--precision bf16": config.precision == "bf16", "--optimizer muon": config.optimizer == "muon"}
    if flags := [flag for flag, used in slow.items() if used]:
        _log.warning("This CPU computes bfloat16 many times slower than float32; avoid %s.", " and ".join(flags))


def _optimizers(objective: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of linear layers and AdamW for the others.

    Weights decay where they multiply what comes in. Not so biases, TinyViT's attention biases, norms, and the
    embeddings that are tokens.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        linear = {id(module.weight) for module in objective.modules() if isinstance(module, nn.Linear)}
        matrices = [parameter for parameter in trained if id(parameter) in linear]
        trained = [parameter for parameter in trained if id(parameter) not in linear]
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    kept = {id(module.weight) for module in objective.modules() if isinstance(module, nn.Embedding)}
    kept |= {id(p) for name, p in objective.named_parameters() if p.ndim <= 1 or name.endswith("attention_biases")}
    decayed = [parameter for parameter in trained if id(parameter) not in kept]
    others = [parameter for parameter in trained if id(parameter) in kept]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [*optimizers, torch.optim.AdamW(groups, lr=config.learning_rate)]


def schedule(step: int, progress: float, config: OptimizerConfig) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to `final_rate`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * (config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * progress)) / 2)
