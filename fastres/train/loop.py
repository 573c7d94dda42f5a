"""The training loop, for one process or several under torchrun; it can be resumed at every iteration.

    micro-batches ─► forward, backward (x accumulate) ─► SGD ─► EMA        every iteration
                     training error ─► log.csv, warm-up rule               every `log_every`
                     validation error ─► curves, plateau rule, checkpoint  every `eval_every`

The GPU itself checks whether the loss and the gradient are finite, and skips the update if they aren't. The host reads
the result one iteration later, so that it never waits for the current iteration. If it finds a bad iteration, it
restores the buffers and counters that the iteration has changed, saves a checkpoint and raises NonFiniteError.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fastres
from fastres.classes import difference, out_of_order
from fastres.cuda_graph import graphed
from fastres.models import families
from fastres.terminal import duration
from fastres.train import checkpoint, dali
from fastres.train.data import Folder, Loader, Pairs, ReadError, Stream, WorkerError, hearing_workers, load
from fastres.train.process import Clock, Place, Signals, average, place, usable_cpus
from fastres.train.recipe import GRAPHS, LOADERS, Recipe
from fastres.train.report import CURVES, LOG, TENSORBOARD, Report, require_tensorboard
from fastres.train.schedule import LearningRate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE = ("none", "inductor", "fastres")
# What a run may write to `out`.
FILES = (LOG, CURVES, checkpoint.LAST, checkpoint.BEST, checkpoint.WEIGHTS, TENSORBOARD)


def default_dtype(device: torch.device) -> str:
    """Return the default key of `DTYPES`: "bf16" on a GPU, "fp32" elsewhere."""
    return "bf16" if device.type == "cuda" else "fp32"


class NonFiniteError(RuntimeError):
    """The loss or gradient was not finite. The message names the iteration and the checkpoint from before it."""


FAILURES = (checkpoint.CheckpointError, NonFiniteError, torch.OutOfMemoryError)  # shown without a traceback


class Interrupted(Exception):
    """A signal arrived during a validation, which is abandoned."""


@dataclass(frozen=True)
class Run:
    """The settings of one training: a recipe, its net and images, and how to run it on this machine.

    name: the recipe's name, for the metadata. out: the folder to write to. family, depth, data: None for the recipe's.
    shortcut: None for the family's default. root: the folder of the images. holdout: how many training images to
    validate on instead of the validation images. download, cache: see `data.load`. seed: of the weights and of the
    images' order and augmentation. device: None for a GPU if there is one. dtype: a key of `DTYPES`; None for bf16 on a
    GPU and fp32 elsewhere. compile: an entry of `COMPILE`. cuda_graph: a key of `GRAPHS`. deterministic: use only cuDNN
    algorithms that give the same bits each time. micro_batch: images per forward pass, None for the recipe's. workers:
    processes that read photographs, None for one per CPU. loader: a key of `LOADERS`. log_every, eval_every,
    save_every: iterations between two rows of the log, evaluations and checkpoints; None is one epoch for eval_every
    and the value of eval_every for save_every. tensorboard: also write the log for TensorBoard. resume: continue from
    out/last.pt if it exists.

    Raises ValueError for values out of range and for unknown keys.
    """

    name: str
    recipe: Recipe
    out: Path
    family: str | None = None
    depth: int | None = None
    shortcut: str | None = None
    data: str | None = None
    root: Path | None = None
    holdout: int = 0
    download: bool = False
    cache: Path | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    compile: str = "none"
    cuda_graph: str = "auto"
    deterministic: bool = False
    micro_batch: int | None = None
    workers: int | None = None
    loader: str = "auto"
    log_every: int = 50
    eval_every: int | None = None
    save_every: int | None = None
    tensorboard: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "holdout", "workers"):
            _at_least(name, getattr(self, name), 0)
        for name in ("micro_batch", "log_every", "eval_every", "save_every"):
            _at_least(name, getattr(self, name), 1)
        if self.seed >= 2**63:  # NumPy's Philox would round it
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1: got {self.seed}")
        choices = {"dtype": [None, *DTYPES], "compile": COMPILE, "loader": LOADERS, "cuda_graph": GRAPHS}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; accepted: {', '.join(map(str, accepted))}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}: got {value}")


@dataclass(frozen=True)
class Summary:
    """The result of a training; `str` gives it as text.

    error, top5: validation errors in [0, 1] at the end, of the averaged weights if the recipe averages. top5 is None
    for fewer than five classes. best: the lowest top-1 validation error. out: the folder of the run. seconds: duration,
    including the processes before a resumption; nan if unknown. then: a command that tests the best weights.
    """

    iterations: int
    error: float
    top5: float | None
    best: float
    out: Path
    seconds: float
    then: str

    def __str__(self) -> str:
        files = ", ".join(name for name in FILES if (self.out / name).exists())
        took = "" if math.isnan(self.seconds) else f", {duration(self.seconds)}"
        five = "" if self.top5 is None else f" (top-5 {self.top5:.2%})"
        return (
            f"{self.iterations} iterations, validation error {self.error:.2%}{five}, "
            f"best {self.best:.2%}{took}; {self.out} holds {files}\nnext: {self.then}"
        )


@dataclass(frozen=True)
class Errors:
    """Mean loss, and top-1 and top-5 error in [0, 1], over `count` images. top5 is None for fewer than five classes."""

    loss: float
    top1: float
    top5: float | None
    count: int


@torch.no_grad()
def errors(
    net: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, classes: int
) -> Errors:
    """Return the mean loss and the errors of a net over `batches`.

    Under torch.distributed, they are means over the batches of all processes.

    net: in eval mode; maps images to logits [n, classes]. batches: (images, labels [n]) on `device`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for x, y in batches:
        scores = net(x).float()
        hits = scores.topk(min(5, classes)).indices == y[:, None]
        loss = F.cross_entropy(scores, y, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(y))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, first, five, count = sums.tolist()
    return Errors(loss / count, 1 - first / count, None if classes < 5 else 1 - five / count, int(count))


class Trainer:
    """The state of a training between two iterations, and the methods that advance, save and restore it.

    Raises ValueError (DataError is one) if the settings don't fit each other, the images or this machine.
    """

    def __init__(self, run: Run, place: Place, signals: Signals) -> None:
        self.run, self.place, self.signals = run, place, signals
        recipe = self.recipe = run.recipe
        self.family = run.family or recipe.family
        self.depth = recipe.depth if run.depth is None else run.depth
        self.dtype = DTYPES[run.dtype or default_dtype(place.device)]
        micro, self.accumulate = micro_batches(recipe, run.micro_batch, place.world)
        checked_compile(run.compile)
        self.graphs, self.why_graphs = graph_choice(run, place)
        torch.backends.cudnn.benchmark = not run.deterministic
        torch.backends.cudnn.deterministic = run.deterministic
        torch.manual_seed(run.seed)
        data = run.data or recipe.data
        workers = usable_cpus() if run.workers is None else run.workers
        where = {"cache": run.cache, "workers": workers, "device": place.device}
        dataset = load(data, recipe, run.root, holdout=run.holdout, download=run.download, **where)  # type: ignore[arg-type]
        sizes = {"num_classes": len(dataset.classes), "in_channels": dataset.channels}
        model = families.build(self.family, self.depth, run.shortcut, **sizes)
        self.model = model.to(place.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        stream = Stream(len(dataset.train), recipe.batch, recipe.batch // micro, run.seed, recipe.repeats)
        self.decoder = dali.chosen(run.loader, dataset, recipe, place.device)
        decode = dali.decoded if self.decoder == "dali" else None
        self.loader = Loader(dataset, recipe, stream, place.device, workers, place.rank, place.world, decode)
        self.steps_per_epoch = max(1, len(dataset.train) // recipe.batch)
        self.total = recipe.total(self.steps_per_epoch)
        self.eval_every = run.eval_every or self.steps_per_epoch
        self.save_every = run.save_every or self.eval_every
        self.lr = LearningRate(recipe, self.depth, self.steps_per_epoch)
        self.optimizer = sgd(self.model, recipe)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.dtype == torch.float16)
        self.ema: AveragedModel | None = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema.decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.iteration = 0
        self.evaluated = 0
        self.best = math.inf
        self.latest: Errors | None = None
        self.history: list[dict[str, float]] = []
        self.clock = Clock()
        # sums since the last log: loss, errors, images
        self.meter = torch.zeros(3, dtype=torch.float64, device=place.device)
        self.losses = [0.0, 0.0]  # loss and images since the last evaluation, without those still in the meter
        self.held = torch.zeros((), device=place.device)  # becomes 1 at the first bad iteration, and stays 1
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.touched = [*self.model.buffers(), self.meter]  # changed by a forward pass, even of a bad iteration
        self.before = [[tensor.clone() for tensor in self.touched] for _ in range(2)]
        # iterations until the host reads whether the loss was finite
        self.lag = 1 if place.device.type == "cuda" and not self.scaler.is_enabled() else 0
        self.stopping = 0
        self.meta = {
            "fastres": fastres.__version__,
            "recipe": run.name,
            "family": self.family,
            "depth": self.depth,
            "shortcut": run.shortcut,
            **sizes,
            "data": data,
            "classes": list(dataset.classes),
            "size": recipe.size,
            "val_size": recipe.val_size,
            "resize": recipe.resize,
        }
        self.identity = {
            **{name: self.meta[name] for name in ("family", "depth", "shortcut", "num_classes", "in_channels", "data")},
            "training images": len(dataset.train),
            "holdout": run.holdout,
            "seed": run.seed,
            "dtype": str(self.dtype),
            "micro-batches": recipe.batch // micro,
            **{
                f"recipe.{name}": value
                for name, value in _plain(dataclasses.asdict(recipe)).items()
                if name != "source"
            },
        }
        if run.compile != "none":
            self.model.compile(backend=run.compile)
        self.net: nn.Module = self.model
        self.micro: Callable[..., Any] = self._micro
        if self.graphs:
            for tensor in self.model.state_dict().values() if place.world > 1 else ():
                dist.broadcast(tensor, 0)
            self.micro = graphed(self._micro, self.model, scaler=self.scaler)
        elif place.world > 1:
            ids = [place.device] if place.device.type == "cuda" else None
            self.net = DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and messages: rank 0."""
        return self.place.rank == 0

    @property
    def last(self) -> Path:
        """The path of the last checkpoint."""
        return self.run.out / checkpoint.LAST

    def _autocast(self) -> AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.place.device.type, self.dtype)

    def _micro(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Run forward and backward of one micro-batch; return its mean loss and the number of wrong predictions.

        x: float32 [n, C, H, W]. y: labels [n], or probabilities [n, classes], of which the likeliest counts as right.
        """
        with self._autocast():
            scores = self.net(x)
        loss = F.cross_entropy(scores.float(), y, label_smoothing=self.recipe.label_smoothing)
        self.scaler.scale(loss / self.accumulate).backward()
        labels = y if y.dim() == 1 else y.argmax(1)
        return loss.detach(), (scores.argmax(1) != labels).sum()

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Run one iteration: `accumulate` micro-batches in each process, then one update.

        Raises NonFiniteError if the loss or gradient of this iteration or, on a GPU, of the one before isn't finite.
        """
        torch._foreach_copy_(self.before[self.iteration % 2], self.touched)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.iteration)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.place.device)
        for k in range(self.accumulate):
            x, y = next(batches)
            partial = isinstance(self.net, DistributedDataParallel) and k < self.accumulate - 1
            with self.net.no_sync() if partial else nullcontext():  # type: ignore[operator]
                loss, wrong = self.micro(x, y)
            total += loss
            self.meter += torch.stack([loss * len(x), wrong, torch.full_like(loss, len(x))])
        if self.graphs and self.place.world > 1:
            average(self.model.parameters())
        self._update(total)
        self.iteration += 1
        self._read_flags(self.lag)
        self._average()

    def _update(self, loss: Tensor) -> None:
        """Take the optimizer's step, which the device skips if the loss or the gradient isn't finite.

        It also shares with all processes whether that happened and whether a signal was received; `_read_flags` reads
        the result later.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not self.scaler.is_enabled():  # the scaler handles overflow of gradients itself
            loss = loss + torch.nn.utils.get_total_norm(gradients)
        flags = torch.stack([1 - loss.isfinite().float(), torch.full_like(loss, self.signals.received)])
        if self.place.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.held = torch.maximum(self.held, flags[0])
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = self.held  # type: ignore[attr-defined]  # read by torch's fused optimizers
            self.optimizer.step()
        event = None
        if flags.is_cuda:
            flags = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((self.iteration, flags, event))

    def _read_flags(self, lag: int) -> None:
        """Read the reports of all but the last `lag` iterations: set `stopping`, or raise NonFiniteError.

        Before it raises, it restores the state from before the bad iteration and saves it.
        """
        while len(self.pending) > lag:
            iteration, flags, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            bad, self.stopping = (int(flag) for flag in flags.tolist())
            if bad:
                torch._foreach_copy_(self.touched, self.before[iteration % 2])
                self.iteration = iteration
                self.pending.clear()
                self.save()
                other = "A lower lr" if self.dtype == torch.float32 else "A lower lr or --dtype fp32"
                raise NonFiniteError(
                    f"the loss of iteration {iteration} is not finite (lr {self.lr(iteration):g}); {self.last} has the "
                    f"weights from before it. {other} may help, but that is another run: start it with another --out"
                )

    def _average(self) -> None:
        """Update the moving average of the weights, if the recipe has one and it is due."""
        rule, done = self.recipe.ema, self.iteration - 1
        if self.ema is None or rule is None or done % rule.every:
            return
        self._read_flags(0)
        self.ema.update_parameters(self.model)
        if done < rule.warm * self.steps_per_epoch:
            self.ema.n_averaged.zero_()

    def _gather_meter(self) -> None:
        """Replace each process's meter by the sum over all. All but the main process must then zero theirs."""
        if self.place.world > 1:
            dist.all_reduce(self.meter)

    def log(self, seconds: float, images: int) -> dict[str, float]:
        """Record the mean training loss and error since the last call; return the row for log.csv.

        It also passes the error to the warm-up rule. seconds, images: the training time and the images of all
        processes since then, for the rate in the row. Collective under torch.distributed.
        """
        self._gather_meter()
        loss, wrong, count = self.meter.tolist()
        self.meter.zero_()
        self.losses = [self.losses[0] + loss, self.losses[1] + count]
        self.lr.training_error(wrong / count)
        row = {**self._where(), "train_loss": loss / count, "train_error": wrong / count}
        self.history.append({**row, "images_per_second": images / seconds})
        return self.history[-1]

    def _where(self) -> dict[str, float]:
        lr = self.optimizer.param_groups[0]["lr"]
        epoch, seconds = self.iteration / self.steps_per_epoch, self.clock.total()
        return {"iteration": self.iteration, "epoch": epoch, "lr": lr, "seconds": seconds}

    def _validation(self) -> Pairs:
        """Yield the validation batches. Raises Interrupted after a signal, if this is the only process."""
        with closing(self.loader.validation()) as batches:
            for batch in batches:
                if self.signals.received and self.place.world == 1:
                    raise Interrupted
                yield batch

    def evaluate(self) -> Errors:
        """Return the validation errors of the averaged weights, or of the trained ones if the recipe doesn't average.

        It also records the errors and passes them to the plateau rule. Collective under torch.distributed, where rank
        0's BatchNorm statistics are sent to all processes first. Raises Interrupted.
        """
        if self.place.world > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        model = self.ema.module if self.ema is not None else self.model
        model.eval()
        try:
            with self._autocast(), closing(self._validation()) as batches:
                found = errors(model, batches, self.place.device, len(self.loader.dataset.classes))
        finally:
            model.train()
        self.evaluated, self.latest = self.iteration, found
        self.lr.validation_error(found.top1)
        row = {"val_loss": found.loss, "val_error": found.top1}
        if found.top5 is not None:
            row["val_error_top5"] = found.top5
        self.history.append({**self._where(), **row})
        return found

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which `restore` continues from. Collective under torch.distributed."""
        self._gather_meter()
        rng = [checkpoint.rng_state()]
        if self.place.world > 1:
            if not self.main:
                self.meter.zero_()
            everyone: list[Any] = [None] * self.place.world
            dist.all_gather_object(everyone, rng[0])
            rng = everyone
        return {
            "meta": {**self.meta, "iteration": self.iteration, "averaged": self.ema is not None, "best": self.best},
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "averaged": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr.state_dict(),
            "scaler": self.scaler.state_dict(),
            "preprocess": self.loader.preprocess.state_dict(),
            "iteration": self.iteration,
            "evaluated": self.evaluated,
            "best": self.best,
            "latest": None if self.latest is None else dataclasses.asdict(self.latest),
            "meter": self.meter,
            "losses": self.losses,
            "rng": rng,
            "history": self.history,
            "seconds": self.clock.total(),
            "run": self.identity,
        }

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint; all processes wait until it is written. Raises CheckpointError."""
        state = self.state()
        if self.main:
            checkpoint.save(self.run.out, state, best=best)
        if self.place.world > 1:
            dist.barrier()

    def restore(self, path: Path) -> None:
        """Restore the state of a checkpoint.

        Raises CheckpointError if the file can't be read, and ValueError if it belongs to a run with other settings.
        """
        state = checkpoint.load(path)
        checkpoint.require_equal(path, state["run"], self.identity)
        classes = self.loader.dataset.classes
        differing = difference(state["meta"]["classes"], classes, ("the checkpoint", "the data"))
        if differing is not None:
            raise ValueError(
                f"{path} belongs to another run: {differing}. Resume with its images, or choose another --out"
            )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.preprocess.load_state_dict(state["preprocess"])
        self.iteration, self.evaluated, self.best = state["iteration"], state["evaluated"], state["best"]
        self.latest = None if state["latest"] is None else Errors(**state["latest"])
        self.history = state["history"]
        self.clock = Clock(state.get("seconds", math.nan))  # nan: an old checkpoint without this entry
        self.meter.copy_(state["meter"] if self.main else torch.zeros(3))
        self.losses = state.get("losses", self.losses)
        if self.iteration == self.evaluated:
            self._mean_loss()  # starts the mean again, after the evaluation
        if len(state["rng"]) == self.place.world:
            checkpoint.set_rng_state(state["rng"][self.place.rank])

    def report(self) -> Report:
        """Return a `Report` that shows and writes the progress from the current iteration on."""
        title = f"{self.family}-{self.depth} on {self.meta['data']}"
        span = (self.recipe.batch, self.iteration, self.total, self.total / self.steps_per_epoch)
        return Report(self.run.out, title, *span, self.history, self.clock, tensorboard=self.run.tensorboard)

    def introduction(self) -> str:
        """Return two lines that describe the net, the data, the length and the device of this training."""
        dataset, recipe, place = self.loader.dataset, self.recipe, self.place
        net = "-".join(str(part) for part in (self.family, self.depth, self.run.shortcut) if part is not None)
        parameters = sum(p.numel() for p in self.model.parameters())
        device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "the CPU"
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        several = f", {place.world} processes" if place.world > 1 else ""
        return (
            f"training {net}, {parameters:,} parameters, on {self.meta['data']}: {len(dataset.train):,} images, "
            f"{len(dataset.val):,} to validate on; recipe {self.run.name}\n"
            f"{self.total:,} iterations of {recipe.batch:,} images, {self.total / self.steps_per_epoch:.1f} epochs, "
            f"in {dtype} on {device}{several}; files in {self.run.out}"
        )

    def fit(self, report: Report | None = None) -> Summary:
        """Train to the end and return a summary.

        Raises NonFiniteError, CheckpointError or ReadError if the training fails, and SystemExit after a signal.
        """
        with closing(self.loader.training(self.iteration, self.total)) as batches:
            self._train(batches, report)
        assert self.latest is not None
        figures = (self.iteration, self.latest.top1, self.latest.top5, self.best)
        return Summary(*figures, self.run.out, self.clock.total(), self._then())

    def _train(self, batches: Iterator[tuple[Tensor, Tensor]], report: Report | None) -> None:
        self.model.train()
        self.clock.start()
        start, logged = self.clock.training(), self.iteration
        while True:
            self._visit(report)
            if self.iteration == self.total:
                break
            self.step(batches)
            if report is not None:
                report.advance()
            every = self._log_every()
            if self.iteration % every == 0 or self.iteration == self.total:
                self._read_flags(0)
                now = self.clock.training()
                row = self.log(now - start, (self.iteration - logged) * self.recipe.batch)
                start, logged = now, self.iteration
                if report is not None:
                    report.row(row)
            if self.stopping:
                self._leave(self.stopping)

    def _then(self) -> str:
        """Return a command that tests the best weights on the data set's validation or test images.

        With a holdout, those are not the images that the training validated on.
        """
        words = ["python", "-m", "fastres", "eval", "--checkpoint", str(self.run.out / checkpoint.BEST)]
        if self.run.root is not None:
            words += ["--data" if isinstance(self.loader.train, Folder) else "--root", str(self.run.root)]
        return shlex.join(words)

    def _log_every(self) -> int:
        """Return the iterations between two rows of the log; during the warm-up, the window of its rule."""
        warmup = self.recipe.warmup
        return warmup.window if warmup is not None and self.lr.warming else self.run.log_every

    def _visit(self, report: Report | None) -> None:
        """Between two iterations, run a validation and save a checkpoint, or only save one, if that is due."""
        if not self.iteration:
            return
        if self.iteration != self.evaluated and (self.iteration % self.eval_every == 0 or self.iteration == self.total):
            self._read_flags(0)
            with self.clock.pause():
                if report is not None:
                    report.evaluating()
                try:
                    found = self.evaluate()
                except Interrupted:
                    self._leave(self.signals.received)
                better = found.top1 < self.best
                self.best = min(self.best, found.top1)
                self.save(best=better)
                loss = self._mean_loss()
                if report is not None:
                    report.evaluated(loss)
        elif self.iteration % self.save_every == 0:
            self._read_flags(0)
            with self.clock.pause():
                self.save()

    def _mean_loss(self) -> float | None:
        """Return the mean loss of the training images since the last call, or None if there were none.

        Its result is valid in the main process, after `_gather_meter`.
        """
        loss, _, count = self.meter.tolist()
        before, images = self.losses
        self.losses = [-loss, -count]
        return (before + loss) / (images + count) if images + count else None

    def _leave(self, number: int) -> None:
        """Save a checkpoint and raise SystemExit with 128 + the signal's number."""
        self._read_flags(0)
        self.save()
        if self.main:
            how = "the same command" if self.run.resume else "--resume"
            message = f"stopped at iteration {self.iteration}, saved {self.last}; {how} continues from it"
            tqdm.write(message, file=sys.stderr)  # above the progress bar, if there is one
        raise SystemExit(128 + number)


def micro_batches(recipe: Recipe, asked: int | None, world: int) -> tuple[int, int]:
    """Return (images per forward pass, forward passes per iteration and process).

    asked: images per forward pass, None for the recipe's. world: the number of processes. Raises ValueError unless the
    batch is a multiple of `world` micro-batches.
    """
    micro = recipe.micro_batch(world) if asked is None else asked
    if micro < 1 or recipe.batch % (micro * world):
        raise ValueError(
            f"the batch must be a multiple of micro-batch times processes: got batch {recipe.batch}, "
            f"micro-batch {max(micro, 1)}, {world} process(es)"
        )
    return micro, recipe.batch // (micro * world)


def graph_choice(run: Run, place: Place) -> tuple[bool, str]:
    """Return whether forward and backward run as a CUDA graph, and the reason.

    Raises ValueError if `run` asks for a graph on a CPU.
    """
    if run.cuda_graph == "off":
        return False, "--cuda-graph off"
    if place.device.type != "cuda":
        if run.cuda_graph == "on":
            raise ValueError(
                f"--cuda-graph on requires a GPU, but this training runs on {place.device}: use auto or off"
            )
        return False, f"{place.device} has no CUDA graphs"
    if run.cuda_graph == "on":
        return True, "--cuda-graph on" + "; gradients are averaged after it" * (place.world > 1)
    if place.world > 1:
        return False, "DistributedDataParallel exchanges gradients during the backward pass, which a graph can't"
    if run.compile != "none":
        return False, f"--compile {run.compile} launches the kernels itself"
    return True, "one process on a GPU"


def checked_compile(backend: str) -> None:
    """Raise ValueError unless `backend` is "none" or a backend of torch.compile that is available here."""
    if backend == "none":
        return
    known = torch._dynamo.list_backends()
    if backend not in known:
        raise ValueError(f"torch.compile has no backend {backend!r} here; available are {', '.join(known)}")


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return fused SGD for `model`.

    BatchNorm's parameters use the recipe's `norm_decay` if it is set, all others its `weight_decay`. The momentum
    buffers are created here as zeros: if the device skips the first update, fused SGD would leave them uninitialised.
    """
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    apart = norms if recipe.norm_decay is not None else set()
    groups = [{"params": [p for p in model.parameters() if p not in apart], "weight_decay": recipe.weight_decay}]
    if apart:
        groups.append({"params": [p for p in model.parameters() if p in apart], "weight_decay": recipe.norm_decay})
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with tuples as lists, at any depth of dicts, so that it equals its copy read from JSON."""
    return {
        name: _plain(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v for name, v in data.items()
    }


def train(run: Run) -> Summary:
    """Run a training; write checkpoints, log.csv and curves.png to run.out.

    Before the training starts, it raises ValueError (DataError is one) for settings that can't be used. If the training
    fails, it raises CheckpointError, NonFiniteError, torch.OutOfMemoryError, or the OSErrors ReadError, WorkerError and
    PeerError. After SIGTERM it writes a checkpoint and raises SystemExit with status 143, after Ctrl-C with 130. No
    worker process outlives the call.
    """
    try:
        with hearing_workers(), Signals() as signals, place(run.device) as here:
            return _train(run, here, signals)  # a function, so that DDP is freed before the process group
    except ReadError as error:
        raise ReadError(f"{error}; {_going_on(run, ' with the same number of training images')}") from error
    except WorkerError as error:
        raise WorkerError(f"{error}; {_going_on(run)}") from error
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{error}; {_going_on(run)}; a smaller --micro-batch uses less memory, but that is another run: start it "
            "with another --out"
        ) from error


def _going_on(run: Run, condition: str = "") -> str:
    """Return how to resume the run after a failure, for the end of an error message."""
    last = run.out / checkpoint.LAST
    if not last.exists():
        return f"there is no checkpoint in {run.out} yet"
    return f"{'the same command' if run.resume else '--resume'} continues from {last}{condition}"


def _train(run: Run, here: Place, signals: Signals) -> Summary:
    last = run.out / checkpoint.LAST
    resuming = last.exists()
    if resuming and not run.resume:
        raise ValueError(
            f"{last} exists already: use --resume to continue from it, or another --out to start a new run"
        )
    if run.tensorboard:
        require_tensorboard()
    trainer = Trainer(run, here, signals)
    if resuming:
        trainer.restore(last)
    if trainer.main:
        checkpoint.prepare(run.out)  # only now, so that a rejected run leaves no folder
    if trainer.main and run.resume:
        begun = f"{last}: resuming at iteration {trainer.iteration} of {trainer.total}"
        print(begun if resuming else f"no checkpoint in {run.out}: starting from the beginning", file=sys.stderr)
    if trainer.main:
        print(trainer.introduction(), file=sys.stderr)
    if trainer.main and isinstance(trainer.loader.train, Folder):
        print(f"photographs are decoded by {LOADERS[trainer.decoder]}", file=sys.stderr)
        if (order := out_of_order(trainer.loader.dataset.classes)) is not None:
            print(f"note: {order}", file=sys.stderr)
    if trainer.main and here.device.type == "cuda":
        print(
            f"forward and backward in a CUDA graph: {'yes' if trainer.graphs else 'no'} ({trainer.why_graphs})",
            file=sys.stderr,
        )
    report = trainer.report() if trainer.main else None
    try:
        return trainer.fit(report)
    finally:
        if report is not None:
            report.close()
        del trainer.micro  # breaks the reference cycle, so that the trainer's GPU memory is freed immediately
