"""The training loop: a run that can stop after any step, and goes on as if it had not.

A step depends on the weights and on (seed, epoch, step, process) alone: the order of the pictures, their augmentation,
dropout, stochastic depth and mixing are drawn from seeds made of these. So a checkpoint holds the tensors and the
position, and no state of a random generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmbconv._version import __version__
from fastmbconv.sources.contents import Contents
from fastmbconv.sources.facts import RUN_FORMAT
from fastmbconv.synchronised import synchronise
from fastmbconv.training import checkpoint
from fastmbconv.training.config import Config, to_dict, toml
from fastmbconv.training.data import Samples, open_data
from fastmbconv.training.distributed import World
from fastmbconv.training.errors import Interrupted, TrainingError
from fastmbconv.training.evaluate import Evaluation, evaluate
from fastmbconv.training.loader import (
    Batch,
    Order,
    Pictures,
    eval_transform,
    loader,
    look,
    mixing,
    seed_of,
    shard,
    train_transform,
)
from fastmbconv.training.model import build, graphed, path_taken, precision, prepare, train_mode
from fastmbconv.training.progress import Log, Scalars
from fastmbconv.training.recipe import Average, optimizer_for, peak_rate, rate
from fastmbconv.training.signals import SIGNALS, Wish
from fastmbconv.training.weights import load_weights, settle_weights

LOOK_EVERY = 20  # steps on a GPU, which each look at loss and signals makes wait
STEP = 1  # tells its seeds from the pictures'


class Trainer:
    """One run: data, model, recipe and position.

    Args:
        config: what to do; `config.output` must be there.
        world: the processes that share the work.
        log: where to talk.
        wish: a signal that came.
        fresh: False for a run that goes on by `restore`: `--weights` are not read again.

    Attributes:
        notes: what was chosen or assumed on the way, a sentence each.

    Raises:
        TrainingError: if data, model and recipe don't fit together, or as of now can't go on.
    """

    def __init__(self, config: Config, world: World, log: Log, wish: Wish, fresh: bool = True) -> None:
        weights: Contents | None = None
        self.notes: list[str] = []
        if config.weights and fresh:
            config, weights, self.notes = settle_weights(config)
        self.config, self.world, self.log, self.wish = config, world, log, wish
        self.output = Path(config.output)
        train, val = open_data(config)
        self.notes += train.notes
        self.classes = train.classes
        self.batch_size = batch_size(config, len(train), world.size)
        sharing = config.sync_bn and world.size > 1
        if config.graph and sharing:
            raise TrainingError(
                f"--graph and --sync-bn are both set, on {world.size} processes: BatchNorms that talk to each other "
                "can't be part of a captured step"
            )
        _refuse_lonely_values(config, self.batch_size // config.accumulate // (1 if sharing else world.size))

        network = build(config, len(self.classes))
        if weights is not None:
            self.notes += load_weights(network, weights, str(config.weights), "--weights", self.classes)
        self.look = look(config, network.resolution, network.coefficients.lite)
        self.network = prepare(network, config, world.device)
        self.average = Average(self.network, config.ema) if config.ema else None
        trains = any(p.requires_grad for p in self.network.parameters())
        self.amp = precision(config, world.device)
        if world.device.type == "cuda":
            torch.backends.cudnn.deterministic = True
        trained = self._graphed() if config.graph else self.network
        self.model: nn.Module = DistributedDataParallel(trained) if world.size > 1 and trains else trained
        if sharing:
            synchronise(self.network)
        self.peak = peak_rate(config, self.batch_size)
        self.optimizer = optimizer_for(self.network, config, self.peak)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp is torch.float16)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.mix = mixing(config, len(self.classes))
        self._make_loaders(train, val)
        self.epoch = self.position = self.step = 0
        self.history: list[dict[str, float]] = []
        self.best = -1.0
        self.broken: dict[str, str] = {}
        # Loss, right answers and pictures of this epoch: of this process, and at the last look of all of them.
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.total = [0.0, 0.0, 0.0]
        self.look_every = 1 if world.device.type == "cpu" else LOOK_EVERY
        self.evaluation: Evaluation | None = None
        self._saved = time.monotonic()

    def _make_loaders(self, train: Samples, val: Samples) -> None:
        config, world = self.config, self.world
        pin = world.device.type == "cuda"
        self.order = Order(len(train), self.batch_size, config.accumulate, config.seed, world.rank, world.size)
        self.train_loader = loader(
            Pictures(train, train_transform(config, self.look), replace=True), self.order, config.workers, pin
        )
        batches = shard(len(val), self.order.batch_size // config.accumulate // world.size, world.rank, world.size)
        self.val_loader = loader(Pictures(val, eval_transform(self.look), replace=False), batches, config.workers, pin)
        self.sizes = len(train), len(val)

    def _graphed(self) -> nn.Module:
        """What runs the network's steps: every forward pass of a run has the same shape."""
        train_mode(self.network, self.config)
        pictures, side = self.batch_size // self.config.accumulate // self.world.size, self.look.resolution
        with _told_of_full_memory(self.config), self.autocast():
            return graphed(self.network, torch.zeros(pictures, 3, side, side, device=self.world.device))

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and kept as the best: the average, where there is one."""
        return self.average.module if self.average is not None else self.network

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.amp, enabled=self.amp is not None)

    def describe(self) -> str:
        """Lines on what is about to run."""
        c, world = self.config, self.world
        parameters = sum(p.numel() for p in self.network.parameters())
        processes = f", {world.size} processes" if world.size > 1 else ""
        amp = str(self.amp).removeprefix("torch.") if self.amp else "float32"
        path = path_taken(self.network, world.device) + ", as CUDA graphs" * c.graph
        return (
            f"{self.sizes[0]} pictures to train on, {self.sizes[1]} held out, {len(self.classes)} classes\n"
            f"{'phi ' + format(c.phi, 'g') if c.phi is not None else c.model}, {parameters / 1e6:.2f} M parameters, "
            f"{self.look.resolution} px\n"
            f"{path}, {amp}, on {world.device}{processes}\n"
            f"{c.optimizer}, peak rate {self.peak:g}, {c.epochs} epochs of {self.order.steps} steps of "
            f"{self.batch_size} pictures"
        )

    def run(self) -> None:
        """Train to the end, from wherever this run is.

        Raises:
            Interrupted: after a checkpoint, on Ctrl-C or SIGTERM.
            TrainingError: for a loss that is no number, a full disk, or pictures that can't be read.
        """
        first = self.world.first
        if first:
            checkpoint.write(self.output / "config.toml", toml(self.config).encode(errors="surrogateescape"))
        folder = self.output / "tensorboard" if first and self.config.tensorboard else None
        self.scalars = Scalars(folder, self.step)
        try:
            with _told_of_full_memory(self.config):
                while self.epoch < self.config.epochs:
                    self._train_epoch()
                    self._judge()
        except Interrupted:
            self.save()
            raise
        finally:
            self.log.end()
            self.scalars.close()

    def _train_epoch(self) -> None:
        train_mode(self.network, self.config)
        self.order.epoch, self.order.start = self.epoch, self.position
        self.log.epoch(f"epoch {self.epoch + 1}/{self.config.epochs}", self.order.steps, self.position, self.batch_size)
        if self.position >= self.order.steps:
            return
        batches = iter(self.train_loader)
        while self.position < self.order.steps:
            self._step(batches)
            self.position += 1
            self.step += 1
            if self.step % self.look_every == 0 or self.position == self.order.steps:
                self._look_up()

    def _step(self, batches: Iterator[Batch]) -> None:
        """One step of the optimizer, over `accumulate` forward passes."""
        config, device = self.config, self.world.device
        now = rate(config, self.peak, self.step, self.order.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = now
        self.optimizer.zero_grad()
        for part in range(config.accumulate):
            batch = self._usable(next(batches))
            images = batch.images.to(device, non_blocking=True)
            labels = targets = batch.labels.to(device, non_blocking=True)
            torch.manual_seed(seed_of(config.seed, STEP, self.world.rank, self.step, part))
            if self.mix is not None:
                images, targets = self.mix(images, labels)
            waits = part < config.accumulate - 1 and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    logits = self.model(images)
                loss = self.criterion(logits.float(), targets)
                self.scaler.scale(loss / config.accumulate).backward()
            right = (logits.detach().argmax(1) == labels).sum()
            count = len(labels)
            self.sums += torch.stack(
                [loss.detach().double() * count, right.double(), loss.new_full((), count).double()]
            )
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _usable(self, batch: Batch) -> Batch:
        self._note(dict(batch.broken))
        if len(batch.labels) < self.batch_size // self.world.size // self.config.accumulate:
            name, reason = batch.broken[-1]
            raise TrainingError(
                f"too many pictures in a row can't be read; the last one is {name}: {reason}; replace them"
            )
        return batch

    def _note(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if name not in self.broken:
                self.broken[name] = reason
                self.log.say(f"skipped {name}: {reason}")

    def _look_up(self) -> None:
        """Look at the loss and at signals, all processes together; move the bar; write a checkpoint if it is time."""
        heard = self.sums.new_tensor([self.wish.signal == each for each in SIGNALS])
        *signals, loss, right, count = self.world.sum(torch.cat([heard, self.sums])).tolist()
        if not math.isfinite(loss):
            raise TrainingError(self._lost())
        self.total = [loss, right, count]
        loss /= count
        now = self.optimizer.param_groups[0]["lr"]
        self.log.step(self.position, f"loss {loss:.4f}")
        if self.step % 10 == 0:
            self.scalars.add(self.step, train__loss=loss, train__rate=now)
        if any(signals):
            raise Interrupted(next(each for each, count in zip(SIGNALS, signals, strict=True) if count))
        if time.monotonic() - self._saved > self.config.save_minutes * 60:
            self.save()

    def _lost(self) -> str:
        last = self.output / checkpoint.LAST
        kept = (
            f"the last good checkpoint is {last}, and --resume goes on from it" if last.exists() else "nothing is saved"
        )
        return (
            f"the loss is no number any more, in epoch {self.epoch + 1}, step {self.position}, at the rate "
            f"{self.optimizer.param_groups[0]['lr']:g}: lower --lr (now {self.peak:g}), lengthen --warmup-epochs or "
            f"set --clip-grad 1; {kept}"
        )

    def _judge(self) -> None:
        """Evaluate, write down, and keep what is best."""
        speed = self.log.images_per_second(self.position)
        self.log.end()
        self.world.send_buffers(self.judged)
        result = evaluate(self.judged, self.val_loader, len(self.classes), self.world, self.autocast, self.wish)
        loss, right, count = self.total
        self._note(self.world.gather({**self.broken, **result.broken}))
        row = {
            "epoch": self.epoch + 1,
            "rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_top1": right / count,
            "val_loss": result.loss,
            "val_top1": result.top1,
            "val_top5": result.top5,
            "images_per_second": speed,
        }
        self.history.append(row)
        self.evaluation = result
        self.epoch, self.position = self.epoch + 1, 0
        self.sums.zero_()
        self.total = [0.0, 0.0, 0.0]
        better = math.isfinite(result.loss) and result.top1 > self.best
        self.best = max(self.best, result.top1) if better else self.best
        if better and self.world.first:
            checkpoint.save(self.output / checkpoint.BEST, self.kept(row))
        self.save()
        self.scalars.add(
            self.step,
            epoch__train_loss=row["train_loss"],
            epoch__val_loss=result.loss,
            epoch__val_top1=result.top1,
            epoch__val_top5=result.top5,
            epoch__images_per_second=speed,
        )
        self.log.say(
            f"epoch {self.epoch}/{self.config.epochs}: loss {row['train_loss']:.4f}, held out: loss {result.loss:.4f}, "
            f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}{' (best)' if better else ''}; {speed:.0f} images/s"
        )

    def _about(self) -> dict[str, Any]:
        """What every checkpoint says of its run."""
        return {
            "format": RUN_FORMAT,
            "version": __version__,
            "config": to_dict(self.config),
            "classes": list(self.classes),
            "look": self.look._asdict(),
        }

    def kept(self, row: dict[str, float]) -> dict[str, Any]:
        """What evaluation, prediction and fine-tuning need, and nothing of the optimizer."""
        return {
            **self._about(),
            "metrics": row,
            "state_dict": self.judged.state_dict(),
        }

    def save(self) -> None:
        """Write last.pt, which `restore` takes.

        Raises:
            TrainingError: if a weight is no number (the file that is there stays), or the disk is full.
        """
        if not self.world.first:
            return
        if not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            raise TrainingError(self._lost())
        checkpoint.save(self.output / checkpoint.LAST, self.state())
        self._saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {
            **self._about(),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "history": self.history,
            "best": self.best,
            "broken": self.broken,
            "sums": self.total,
            "sizes": list(self.sizes),
            "model": self.network.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            TrainingError: if the data are others than they were, or the state is not that of such a run.
        """
        if list(self.classes) != state["classes"] or list(self.sizes) != state["sizes"]:
            raise TrainingError(
                f"DATA has {len(self.classes)} classes and {self.sizes[0]} + {self.sizes[1]} pictures, and had "
                f"{len(state['classes'])} and {state['sizes'][0]} + {state['sizes'][1]} when the run was saved: "
                "restore the folder, or start a new run with --weights and another --output"
            )
        try:
            self.network.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(f"{checkpoint.LAST} is damaged: its state doesn't fit this run ({first})") from error
        self.epoch, self.position, self.step = state["epoch"], state["position"], state["step"]
        self.history, self.best, self.broken = state["history"], state["best"], state["broken"]
        self.total = state["sums"]
        if self.world.first:
            self.sums.copy_(self.sums.new_tensor(self.total))

    def agree(self) -> None:
        """Make sure that all processes stand at the same step: otherwise they would wait for each other.

        Raises:
            TrainingError: if they found other checkpoints, on machines that don't share the folder.
        """
        places = self.world.gather({str(self.world.rank): f"epoch {self.epoch + 1}, step {self.position}"})
        if len(set(places.values())) > 1:
            told = "; ".join(f"process {rank}: {place}" for rank, place in places.items())
            raise TrainingError(
                f"--output is {self.output}: not all processes find the same {checkpoint.LAST} there ({told}); it must "
                "be a folder that all machines share"
            )


@contextmanager
def _told_of_full_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is full: raise --accumulate (now {config.accumulate}), or try --memory lean, "
            "--checkpointing, a lower --batch-size or --resolution"
        ) from error


def batch_size(config: Config, pictures: int, processes: int) -> int:
    """Pictures per step.

    Raises:
        TrainingError: if there are not that many, or they can't be cut into equal parts.
    """
    parts = processes * config.accumulate
    size = config.batch_size or max(min(64, pictures) // parts * parts, parts)
    if size > pictures:
        raise TrainingError(
            f"--batch-size is {size} and there are {pictures} pictures to train on: allowed are up to that"
        )
    if size % parts:
        raise TrainingError(
            f"--batch-size is {size}: it must be a multiple of {parts}, for {processes} processes and "
            f"--accumulate {config.accumulate}"
        )
    return size


def _refuse_lonely_values(config: Config, pictures: int) -> None:
    if pictures == 1 and not config.freeze_bn and (config.resolution or 224) <= 32:
        raise TrainingError(
            "a forward pass has one picture, and at --resolution 32 BatchNorm gets one value per channel: raise "
            "--batch-size, lower --accumulate, set --sync-bn, or use fewer processes"
        )
