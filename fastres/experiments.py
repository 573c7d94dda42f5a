"""The paper's experiments: `python -m fastres experiment degradation | shortcuts | responses`.

    degradation   Fig. 6 (Fig. 4 for ImageNet): training and validation error of plain and residual nets by depth
    shortcuts     Table 3: the shortcuts A, B and C
    responses     Fig. 7: standard deviations of the responses of the 3x3 layers

An experiment trains its nets one after another, each in its own folder under runs/. A training can be resumed, and
experiments with the same output folder share the trainings that they have in common. The results are <experiment>.csv,
a report <experiment>.md (with the paper's numbers and the differences in the setup) and a picture <experiment>.svg.
<experiment>-curves.csv has the errors by iteration. `--redraw` draws the picture again from these tables.
"""

from __future__ import annotations

import csv
import io
import math
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres import picture
from fastres.models import families
from fastres.models.flops import PAPER_TABLE
from fastres.train import checkpoint, data
from fastres.train.checkpoint import write_atomically
from fastres.train.loop import Run, default_dtype, train
from fastres.train.process import device_named
from fastres.train.recipe import RECIPES, RISE, STUDY_RECIPES, Recipe, Study

EXPERIMENTS = {
    "degradation": "plain and residual nets of growing depth (Fig. 6)",
    "shortcuts": "the shortcuts A, B and C (Table 3)",
    "responses": "standard deviations of layer responses (Fig. 7)",
}
PLAIN = {"cifar": "cifar-plain", "paper": "plain"}  # residual family -> the same family without shortcuts
PAPER_RECIPE = {"cifar": "cifar-2015", "paper": "imagenet-2015"}
SEEN = "The paper's claim is seen: all deeper plain nets train worse, no deeper residual net does."
TAIL = 1 / 8  # the training error is averaged over this last part of the iterations

Row = dict[str, Any]


@dataclass(frozen=True)
class Net:
    """A net of an experiment: the arguments of `fastres.models.families.build`."""

    family: str
    depth: int
    shortcut: str | None = None

    @property
    def plain(self) -> bool:
        return self.family in PLAIN.values()

    @property
    def residual_family(self) -> str:
        return next((family for family, plain in PLAIN.items() if plain == self.family), self.family)

    def __str__(self) -> str:
        """Return the paper's name of the net: plain-20, ResNet-56, ResNet-34 B."""
        name = f"{'plain' if self.plain else 'ResNet'}-{self.depth}"
        return f"{name} {self.shortcut}" if self.shortcut else name

    def errors_of_paper(self) -> str:
        """Return the first error that the paper prints for this net, in per cent, e.g. "24.52/7.46 (Table 3)".

        Two numbers are top-1 and top-5. Returns "none printed" if there is no error.
        """
        for row in PAPER_TABLE:
            if (row.family, row.depth, row.shortcut) == (self.family, self.depth, self.shortcut) and row.errors:
                error = row.errors[0]
                rates = "/".join(str(rate) for rate in (error.top1, error.top5) if rate is not None)
                return f"{', '.join(part for part in (rates, error.note) if part)} ({error.source})"
        return "none printed"


@dataclass(frozen=True)
class Trained:
    """A finished training run. Errors are fractions in [0, 1].

    history: the rows of the training's log and evaluations. train_error: the mean over the last `TAIL` of the
    iterations.
    """

    net: Net
    seed: int
    folder: Path
    history: Sequence[Mapping[str, float]]

    @property
    def train_error(self) -> float:
        rows = [row for row in self.history if "train_error" in row]
        tail = [row["train_error"] for row in rows if row["iteration"] > (1 - TAIL) * rows[-1]["iteration"]]
        return statistics.fmean(tail)

    @property
    def val_error(self) -> float:
        return [row["val_error"] for row in self.history if "val_error" in row][-1]

    @property
    def val_error_top5(self) -> float | None:
        """The last top-5 validation error; None for fewer than five classes."""
        return next((row["val_error_top5"] for row in reversed(self.history) if "val_error_top5" in row), None)

    @property
    def seconds(self) -> float:
        """Training time up to the end of the last evaluation, summed over all interrupted runs; nan if not recorded."""
        return self.history[-1].get("seconds", math.nan)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a number over seeds. The deviation for a single seed is nan."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan)

    def percent(self) -> str:
        return f"{100 * self.mean:.2f}" + ("" if math.isnan(self.std) else f" ± {100 * self.std:.2f}")


@dataclass(frozen=True)
class Plan:
    """An experiment on one data set: the nets, their recipe and study, the output folder, further options of `Run`."""

    name: str
    data: str
    recipe: Recipe
    nets: tuple[Net, ...]
    study: Study
    out: Path
    options: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """The device of all trainings."""
        return device_named(self.options.get("device"))

    def runs(self) -> list[tuple[Net, Run]]:
        """Return (net, training) for every seed and net: all nets of the first seed, then of the next."""
        every = max(1, self.recipe.total(1) // self.study.points)
        pairs = []
        for seed in range(self.study.seeds):
            for net in self.nets:
                parts = (net.family, str(net.depth), net.shortcut, f"seed{seed}")
                folder = self.out / "runs" / "-".join(part for part in parts if part)
                where: Row = {"family": net.family, "depth": net.depth, "shortcut": net.shortcut, "data": self.data}
                how: Row = {"seed": seed, "log_every": every, "eval_every": every, "resume": True, **self.options}
                pairs.append((net, Run(STUDY_RECIPES[self.data], self.recipe, folder, **where, **how)))
        return pairs

    def differences(self) -> dict[str, str]:
        """Return the differences from the paper's training of these nets: name -> "ours (the paper's)"."""
        paper = RECIPES[PAPER_RECIPE[self.nets[0].residual_family]]
        found = {}
        if self.data != paper.data:
            found["images"] = f"{data.DATA[self.data]} ({data.DATA[paper.data]})"
        for field in fields(Recipe):
            ours, theirs = getattr(self.recipe, field.name), getattr(paper, field.name)
            if field.name not in ("source", "data", "family", "depth", "size", "val_size", "resize") and ours != theirs:
                found[field.name] = f"{ours} ({theirs})"
        if paper.data == "imagenet":
            found["testing"] = "one centre crop (10 crops)"
        if self.options.get("holdout"):
            found["validation"] = f"on {self.options['holdout']} of the training images (the test or validation set)"
        dtype = self.options.get("dtype") or default_dtype(self.device)
        if dtype != "fp32":
            found["dtype"] = f"{dtype} by autocast (fp32)"
        return found


@dataclass(frozen=True)
class Finding:
    """The result of an experiment.

    rows: for the CSV file. head, body: the table of the report. words: the sentences of the report. seen: whether the
    paper's claim holds here; None if no claim was tested.
    """

    rows: Sequence[Row]
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    words: Sequence[str]
    seen: bool | None = None


def trainings(wanted: Plan) -> list[Trained]:
    """Run all trainings of the plan. Interrupted runs are resumed, and finished runs are not repeated."""
    runs = wanted.runs()
    found = []
    for number, (net, run) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {net}, seed {run.seed}", file=sys.stderr)
        train(run)
        history = checkpoint.load(run.out / checkpoint.LAST)["history"]
        found.append(Trained(net, run.seed, run.out, history))
    return found


def by_net(trained: Sequence[Trained]) -> dict[Net, list[Trained]]:
    found: dict[Net, list[Trained]] = {}
    for run in trained:
        found.setdefault(run.net, []).append(run)
    return found


def degraded(shallowest: float, deeper: Sequence[float]) -> list[bool]:
    """Return for each deeper net whether its mean training error exceeds the shallowest net's by more than `RISE`."""
    return [error > shallowest + RISE for error in deeper]


def degradation(wanted: Plan, trained: Sequence[Trained]) -> Finding:
    """Compare training errors as in Fig. 6.

    The paper's claim: all deeper plain nets train worse than the shallowest plain net, and no deeper residual net
    trains worse than the shallowest residual net.
    """
    means = {net: statistics.fmean(run.train_error for run in runs) for net, runs in by_net(trained).items()}
    words, verdicts = [], []
    for plain, kind in ((True, "plain"), (False, "residual")):
        first, *deeper = sorted((net for net in means if net.plain == plain), key=lambda net: net.depth)
        worse = degraded(means[first], [means[net] for net in deeper])
        names = [str(net) for net, bad in zip(deeper, worse, strict=True) if bad]
        words.append(
            f"Deeper {kind} nets whose mean training error is more than {100 * RISE:g} percentage points above that of "
            f"{first}: {', '.join(names) or 'none'}."
        )
        verdicts.append(all(worse) if plain else not any(worse))
    seen = all(verdicts) if len(wanted.study.depths) > 1 else None
    if seen is not None:
        claims = ("all deeper plain nets train worse", "no deeper residual net does")
        missing = [claim for claim, verdict in zip(claims, verdicts, strict=True) if not verdict]
        words.append(f"The paper's claim was not confirmed. Not true here: {'; '.join(missing)}." if missing else SEEN)
        if missing:
            words.append(_why_unseen(means))
    return _errors(wanted, trained, words, seen)


def _why_unseen(means: Mapping[Net, float]) -> str:
    """Return the likely reason why the claim was not seen, judged by the mean training errors alone."""
    best, worst = min(means.values()), max(means.values())
    if best > 0.5:
        return "The likely reason: too few iterations. Even the best of these nets gets most training images wrong."
    if worst < RISE:
        return "The likely reason: the images are too easy. Every net learns almost all of them."
    return "These errors don't show the reason; the curves of each training are in runs/."


def shortcuts(wanted: Plan, trained: Sequence[Trained]) -> Finding:
    """Compare the validation errors of shortcuts A, B and C, as in Table 3.

    There C is slightly better than B, and B than A.
    """
    words = ["In the paper C is slightly better than B, and B than A; all are far better than the plain net."]
    nets = by_net(trained)
    for depth in wanted.study.depths:
        errors = {
            str(net.shortcut): statistics.fmean(run.val_error for run in runs)
            for net, runs in nets.items()
            if net.depth == depth
        }
        order = ", ".join(f"{name} {100 * errors[name]:.2f}" for name in sorted(errors, key=lambda name: errors[name]))
        words.append(f"Here, {depth} layers, by mean validation error in per cent: {order}.")
    return _errors(wanted, trained, words, None)


def _errors(wanted: Plan, trained: Sequence[Trained], words: Sequence[str], seen: bool | None) -> Finding:
    rows = [
        {
            "net": str(run.net),
            "family": run.net.family,
            "depth": run.net.depth,
            "shortcut": run.net.shortcut,
            "data": wanted.data,
            "iterations": wanted.recipe.total(1),
            "seed": run.seed,
            "train_error": run.train_error,
            "val_error": run.val_error,
            "val_error_top5": run.val_error_top5,
        }
        for run in trained
    ]
    head = ("net", "paper, error %", "ours, training error %", "ours, validation error %", "ours, top-5 %", "dataset")
    columns = ("train_error", "val_error", "val_error_top5")
    body = []
    for net, runs in by_net(trained).items():
        figures = [[getattr(run, column) for run in runs] for column in columns]
        cells = ["-" if None in values else Spread.of(values).percent() for values in figures]
        body.append((str(net), net.errors_of_paper(), *cells, wanted.data))
    return Finding(rows, head, body, words, seen)


@torch.no_grad()
def layer_responses(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Return the standard deviation of each 3x3 layer's response, over images, channels and positions (Fig. 7).

    A response is the output of the BatchNorm after a 3x3 convolution, before the ReLU or the addition.

    model: a ResNet or plain net of `fastres.models`, in the mode (train or eval) whose responses are wanted.
    batches: inputs of the net, [N, C, H, W].

    Returns name of the convolution -> standard deviation, in the order of the layers.
    """
    names = {module: name for name, module in model.named_modules()}
    sums: dict[str, Tensor] = {}
    handles = []
    part: Any  # a net, a block, or any other module
    for part in model.modules():
        pairs = part.parts().pairs if hasattr(part, "parts") else ()
        for conv, norm in pairs:
            if conv.kernel_size != (3, 3):
                continue
            total = sums[names[conv]] = torch.zeros(3, dtype=torch.float64, device=conv.weight.device)

            def add(module: nn.Module, args: object, y: Tensor, total: Tensor = total) -> None:
                z = y.double()
                total += torch.stack([z.sum(), z.square().sum(), z.new_tensor(z.numel())])

            handles.append(norm.register_forward_hook(add))
    try:
        for x in batches:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, total in sums.items():
        first, second, count = total.tolist()
        found[name] = math.sqrt(max(0.0, second / count - (first / count) ** 2))
    return found


def responses(wanted: Plan, trained: Sequence[Trained]) -> Finding:
    """Measure the responses of Fig. 7 on the validation images, with BN's running statistics.

    The paper prints no numbers for Fig. 7.
    """
    device = wanted.device
    options = {name: wanted.options[name] for name in ("root", "holdout", "cache", "workers")}
    dataset = data.load(wanted.data, wanted.recipe, **options, device=device)
    stream = data.Stream(len(dataset.train), wanted.recipe.batch, 1, 0)
    loader = data.Loader(dataset, wanted.recipe, stream, device, wanted.options["workers"])
    rows: list[Row] = []
    for run in trained:
        net = run.net
        sizes = {"num_classes": len(dataset.classes), "in_channels": dataset.channels}
        model = families.build(net.family, net.depth, net.shortcut, **sizes).to(device).eval()
        model.load_state_dict(checkpoint.load(run.folder / checkpoint.LAST)["model"])
        with closing(loader.validation()) as batches:
            stds = layer_responses(model, (x for x, _ in batches))
        for index, (layer, std) in enumerate(stds.items(), 1):
            rows.append({"net": str(net), "seed": run.seed, "layer": index, "name": layer, "std": std})
    nets = by_net(trained)
    means = {net: Spread.of(row["std"] for row in rows if row["net"] == str(net)).mean for net in nets}
    body = []
    for net in nets:
        stds_of_net = [row["std"] for row in rows if row["net"] == str(net)]
        layers = max(row["layer"] for row in rows if row["net"] == str(net))
        figures = (f"{figure:.3f}" for figure in (means[net], min(stds_of_net), max(stds_of_net)))
        body.append((str(net), "drawn in Fig. 7, not printed", str(layers), *figures, wanted.data))
    words = [
        "In the paper, the responses of residual nets are generally smaller than those of plain nets, and those of "
        "deeper residual nets are smaller than those of shallower ones."
    ]
    for net in nets:
        other = next(other for other in nets if other.plain and other.depth == net.depth)
        if not net.plain:
            relation = "smaller" if means[net] < means[other] else "not smaller"
            words.append(f"Here the responses of {net} are on average {relation} than those of {other}.")
    residual = sorted((net for net in nets if not net.plain), key=lambda net: net.depth)
    for shallower, deeper in pairwise(residual):
        relation = "smaller" if means[deeper] < means[shallower] else "not smaller"
        words.append(f"Here the responses of {deeper} are on average {relation} than those of {shallower}.")
    head = ("net", "paper", "3x3 layers", "ours, mean std", "ours, least", "ours, largest", "dataset")
    return Finding(rows, head, body, words)


def report(wanted: Plan, finding: Finding, seconds: float) -> str:
    """Return the report in Markdown: table, results, differences from the paper, machine and versions."""
    differences = wanted.differences()
    differing = ", ".join(name.replace("_", " ") for name in differences) or "nothing known"
    head = [*finding.head, "what differs"]
    lines = [f"# {wanted.name}: {EXPERIMENTS[wanted.name]}, on {wanted.data}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join([*row, differing]) + " |" for row in finding.body]
    seeds = wanted.study.seeds
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread"
    lines += ["", f"Ours: {spread}; {wanted.recipe.total(1):,} iterations of {wanted.recipe.batch} images."]
    if wanted.name != "responses":
        lines.append(f"Training error: of augmented images, over the last {TAIL:.1%} of the iterations.")
    else:
        lines.append(
            "Responses: after BN, before ReLU or addition, of all validation images at the end of training, by"
        )
        lines.append("BN's running statistics. BN starts every layer near 1; only training moves it from there.")
    lines += ["", *finding.words, ""]
    if differences:
        lines += ["Differences from the paper, whose value is in brackets:", ""]
        lines += [f"- {name.replace('_', ' ')}: {text}" for name, text in differences.items()]
        lines.append("")
    took = "" if math.isnan(seconds) else f"; the trainings took {seconds:,.0f} s"
    lines.append(f"{_environment(wanted.device)}{took}.")
    return "\n".join(lines) + "\n"


def curves(trained: Sequence[Trained]) -> list[Row]:
    """Return the errors, in [0, 1], of all trainings by iteration: the rows that `draw` takes."""
    rows: list[Row] = []
    for run in trained:
        points: dict[float, Row] = {}
        for row in run.history:
            point = points.setdefault(row["iteration"], {"train_error": None, "val_error": None})
            point.update({name: row[name] for name in point if name in row})
        rows += [{"net": str(run.net), "seed": run.seed, "iteration": at, **point} for at, point in points.items()]
    return rows


def redraw(name: str, folder: Path) -> Path:
    """Draw an experiment's picture from the table in `folder` into that folder, and return the picture's path.

    Raises ValueError if the table is missing or damaged.
    """
    table, target = folder / drawn_from(name), folder / f"{name}.svg"
    try:
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("it has no rows, or an incomplete row")
        drawn = draw(name, rows)
    except OSError as error:
        raise ValueError(f"{table} can't be read: {error.strerror}; leave out --redraw to train") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{table} is damaged ({error}); leave out --redraw to write it again") from error
    write_atomically(target, drawn)
    return target


def draw(name: str, rows: Sequence[Row]) -> bytes:
    """Return an experiment's picture as an SVG.

    rows: those of `curves` or, for the experiment "responses", those of its `Finding`. Values may be numbers or text,
    as read from a CSV.
    """
    with picture.style():
        return picture.encode(draw_responses(rows) if name == "responses" else draw_errors(rows), "svg")


def draw_errors(rows: Sequence[Row]) -> Any:
    """Return a figure like Fig. 6: errors by iteration, with one panel for plain and one for residual nets.

    Lines are means over seeds, thin for training errors and bold for validation errors. The range of the validation
    errors over seeds is shaded.
    """
    nets = list(dict.fromkeys(row["net"] for row in rows))
    kinds = {"plain": [net for net in nets if net.startswith("plain")]}
    kinds |= {"residual": [net for net in nets if net not in kinds["plain"]]}
    kinds = {kind: names for kind, names in kinds.items() if names}
    figure = picture.figure(8.3 if len(kinds) > 1 else 5, 3.4)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (kind, names) in zip(panels, kinds.items(), strict=True):
        for number, net in enumerate(names):
            colour, marker = picture.series(number)
            for column in ("train_error", "val_error"):
                points: dict[float, list[float]] = {}
                for row in rows:
                    if row["net"] == net and row[column] not in (None, ""):
                        points.setdefault(float(row["iteration"]), []).append(100 * float(row[column]))
                where = sorted(points)
                means = [statistics.fmean(points[i]) for i in where]
                if column == "train_error":
                    axes.plot(where, means, color=colour, lw=0.8)
                    continue
                axes.plot(where, means, color=colour, lw=2, marker=marker, ms=4.5, label=net)
                low, high = ([extreme(points[i]) for i in where] for extreme in (min, max))
                axes.fill_between(where, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="iteration", title=f"{kind} nets")
        axes.set_ylim(bottom=0)
        axes.grid()
        axes.tick_params(labelleft=True)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_ylabel("error, %; thin: training, bold: validation")
    return figure


def draw_responses(rows: Sequence[Row]) -> Any:
    """Return a figure like Fig. 7: standard deviations by layer in the upper panel, sorted by size in the lower panel.

    Values are means over seeds. Lines of plain nets are dashed.
    """
    figure = picture.figure(8.3, 5.4)
    above, below = figure.subplots(2, 1)
    layers: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        layers.setdefault(row["net"], {}).setdefault(int(row["layer"]), []).append(float(row["std"]))
    depths = list(dict.fromkeys(name.partition("-")[2] for name in layers))
    for name, found in layers.items():
        stds = [statistics.fmean(found[index]) for index in sorted(found)]
        number = depths.index(name.partition("-")[2])
        colour, marker = picture.series(number)
        line = "--" if name.startswith("plain") else "-"
        for axes, values in ((above, stds), (below, sorted(stds, reverse=True))):
            at = range(1, len(values) + 1)
            axes.plot(
                at, values, line, color=colour, lw=1.4, marker=marker, ms=4, markevery=(2 * number, 6), label=name
            )
    above.set(xlabel="layer, in order", title="Responses of the 3x3 layers, standard deviation")
    below.set(xlabel="layer, by size of response")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid()
    above.legend(ncols=2)
    return figure


def drawn_from(name: str) -> str:
    """Return the file name of the table with the data of an experiment's picture."""
    return f"{name}.csv" if name == "responses" else f"{name}-curves.csv"


def table(rows: Sequence[Row]) -> str:
    """Return rows as CSV text. All rows have the columns of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _environment(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({_cpu()}), threads: {torch.get_num_threads()}"
    versions = f"fastres {fastres.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{datetime.now(timezone.utc):%Y-%m-%d}, {name}, {versions}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
