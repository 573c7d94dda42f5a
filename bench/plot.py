"""Draw what the bench measured and counted, each picture from the file with the numbers.

    python bench/plot.py out/record.json out/record.svg                # img/s of every row, with intervals
    python bench/plot.py out/record.json out/summary.svg summary       # fastres, the best peer and eager PyTorch
    python bench/plot.py out/record.json out/compile.svg compile       # time of the first call against img/s
    python bench/plot.py out/kernels-50.csv out/roofline.svg roofline  # of bench/kernels.py on an H200, in 16 bits
    python bench/plot.py out/memory.csv out/memory.svg memory          # of bench/memory.py

The suffix may also be .png or .pdf. `python bench/readme.py` redraws the pictures in bench/records.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import record as records

from fastres import picture
from fastres.kernels.problem import H200
from fastres.picture import FAINT, INK, LINE, OURS, PEER

Row = dict[str, Any]
MODES = {"infer": "inference", "train": "training"}
PASSES = {
    "infer": "inference",
    "fprop": "forward",
    "dgrad": "input gradient",
    "wgrad": "weight gradient",
}
# Names of backends for readers who don't know bench/backends.py.
WORDS = {
    "eager": "eager PyTorch, contiguous",
    "eager-channels-last": "eager PyTorch",
    "eager-channels-last-bf16": "eager PyTorch in bf16",
    "inductor": "torch.compile",
    "reduce-overhead": "torch.compile, reduce-overhead",
    "max-autotune": "torch.compile, max-autotune",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-int8": "ONNX Runtime in int8",
    "openvino": "OpenVINO",
    "fastres": "fastres, one import changed",
    "fastres-graph": "fastres, step in a CUDA graph",
    "fastres-optimize": "fastres.optimize",
    "fastres-optimize-bf16": "fastres.optimize in bf16",
    "fastres-optimize-int8": "fastres.optimize in int8",
    "fastres-optimize-fp8": "fastres.optimize in float8",
}
FIGURES = ("us", "tflops", "gbs", "roofline", "cudnn_us")  # columns of bench/kernels.py that the roofline needs
WIDTH = 8.3  # inches
LABEL = 8  # points


@picture.style()
def rates(record: dict[str, Any], in_words: bool = False) -> Any:
    """Draw a panel for each case of `record`.

    A bar shows the median of a row's windows, the line on it the slowest and the fastest. With `in_words`, rows are
    named as in `WORDS`, and the multiply-adds are left out.
    """
    nets = sorted({row["net"] for row in record["rows"]}, key=_natural)
    settings = list(dict.fromkeys(_setting(row) for row in record["rows"]))
    panels = [(net, s, rows) for net in nets for s in settings if (rows := _panel(record["rows"], net, s))]
    environment, code = record["environment"], record["code"]
    commit = (code["commit"] or "unknown commit")[:10] + (" with changes" if code["dirty"] else "")
    lines = [
        f"Images a second on {environment['name']}, {record['created'][:10]}: median and range of the windows; "
        f"torch {environment['versions']['torch']}, fastres {environment['versions']['fastres']} ({commit})",
        *([] if in_words else filter(None, (_flops(record, net) for net in nets))),
    ]
    figure = picture.figure(WIDTH, 0.2 + 0.15 * len(lines) + sum(0.42 + 0.19 * len(rows) for *_, rows in panels))
    _say(figure, "\n".join(lines))
    heights = [len(rows) + 0.5 for *_, rows in panels]
    grid = figure.subplots(len(panels) or 1, squeeze=False, gridspec_kw={"height_ratios": heights or [1]})[:, 0]
    for axes, (net, setting, rows) in zip(grid, panels, strict=False):
        mode, batch, dtype, size = setting
        axes.set_title(f"{net_of(net)} {MODES[mode]}, {dtype}, batch {batch}, {size}x{size}")
        most = max(row.get("img_s_max", 0) for row in record["rows"] if _setting(row) == setting)
        axes.set_xlim(0, 2 * most or 1)  # leaves as much space for the text next to the bars
        _draw_rates(axes, rows, WORDS if in_words else {})
    return figure


def summary(record: dict[str, Any]) -> Any:
    """Draw `rates` of the cases and rows that README.md shows, with names in words."""
    return rates(record | {"rows": chosen(record)}, in_words=True)


def chosen(record: dict[str, Any]) -> list[Row]:
    """Return the rows that README.md shows: in each case those of fastres, eager PyTorch and the fastest peer in each
    dtype.

    The cases are training with the largest batch and inference with the largest and the smallest, in the record's first
    dtype.
    """
    kept = []
    for (_, mode, batch, dtype, _), rows in records.by_case(record["rows"]).items():
        batches = [row["batch"] for row in record["rows"] if row["mode"] == mode]
        extremes = {max(batches), min(batches)} if mode == "infer" else {max(batches)}
        if dtype == record["rows"][0]["dtype"] and batch in extremes:
            # The fastest peer is kept even if it is noisy. Without it, the second fastest would look like the best.
            shown = [records.fastest_peer(rows, dtype) for dtype in {records.arithmetic(row) for row in rows}]
            kept += [row for row in rows if row["ours"] or row in shown or row is records.eager(rows)]
    return kept


@picture.style()
def compile_times(record: dict[str, Any]) -> Any:
    """Draw the seconds of the first call, which builds and compiles, against img/s, a panel for each case of `record`.
    Raises ValueError if no row has a rate."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    if not rows:
        raise ValueError("no row of the record has a rate to draw")
    cases = records.by_case(rows)
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure = picture.figure(WIDTH, 0.4 + 2.9 * lines)
    _say(figure, f"The first call, compiling included, against throughput on {record['environment']['name']}")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes in grid[len(cases) :]:
        axes.set_axis_off()
    for axes, ((net, mode, batch, dtype, _), of_case) in zip(grid, cases.items(), strict=False):
        for row in of_case:
            style = {"marker": "o", "color": OURS} if row["ours"] else {"marker": "s", "color": PEER}
            axes.scatter(row["first_call_s"], row["img_s"], s=30, **style)
        axes.set_title(f"{net_of(net)} {MODES[mode]}, {dtype}, batch {batch}")
        axes.set_xscale("log")
        axes.margins(x=0.3)
        axes.set_ylim(0, 1.2 * max(row["img_s"] for row in of_case))
        axes.set_xlabel("first call, s")
        axes.set_ylabel("img/s")
        axes.grid()
        axes.tick_params(labelbottom=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _plain_numbers(axes.xaxis)
    figure.draw_without_rendering()
    for axes, of_case in zip(grid, cases.values(), strict=False):
        _label(axes, of_case)
    return figure


@picture.style()
def roofline(rows: Sequence[Row]) -> Any:
    """Draw TFLOP/s against arithmetic intensity for each convolution that bench/kernels.py measured on an H200 in 16
    bits.

    Each convolution has two points, fastres' kernel and the library at the same work. Raises ValueError if the table
    was written for another GPU or dtype.
    """
    peak, bandwidth = H200.flops_16bit / 1e12, H200.bandwidth / 1e12
    figure = picture.figure(WIDTH, 6.6)
    _say(figure, f"Every convolution of the net on its own, on an {H200.name} in 16 bits, and what bounds it")
    grid = figure.subplots(2, 2, sharex=True, sharey=True, subplot_kw={"xscale": "log", "yscale": "log"})
    intensities, reached = [], []
    for axes, (pass_, title) in zip(grid.ravel(), PASSES.items(), strict=True):
        of_pass = [{name: float(row[name]) for name in FIGURES} for row in rows if row["pass"] == pass_]
        for row in of_pass:
            if abs(max(row["tflops"] / peak, row["gbs"] / bandwidth / 1e3) / row["roofline"] - 1) > 0.01:
                raise ValueError(f"this table's roofline is not that of an {H200.name} in 16 bits")
        at = [1e3 * row["tflops"] / row["gbs"] for row in of_pass]
        ours = [row["tflops"] for row in of_pass]
        library = [row["tflops"] * row["us"] / row["cudnn_us"] for row in of_pass]
        axes.vlines(at, ours, library, color=LINE, lw=1.2, zorder=1)
        axes.scatter(at, library, marker="s", s=26, facecolors="none", edgecolors=PEER, label="cuDNN, the same work")
        axes.scatter(at, ours, marker="o", s=22, color=OURS, label="fastres")
        won = sum(row["us"] <= row["cudnn_us"] for row in of_pass)
        axes.set_title(f"{title}: fastres faster in {won} of {len(of_pass)}")
        intensities += at
        reached += ours + library
        axes.grid()
        _plain_numbers(axes.xaxis, axes.yaxis)
        axes.tick_params(labelbottom=True, labelleft=True)
    left, right = 0.7 * min(intensities), 1.4 * max(*intensities, peak / bandwidth)
    grid[0, 0].set(xlim=(left, right), ylim=(0.7 * min(reached), 2 * peak))
    for axes in grid.ravel():
        axes.plot([left, peak / bandwidth, right], [bandwidth * left, peak, peak], color=INK, lw=1.2, zorder=1)
    words: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": LABEL}
    grid[0, 0].annotate(f"{bandwidth:.1f} TB/s", (5 * left, 5 * bandwidth * left), (-6, 4), **words)
    grid[0, 0].annotate(f"{peak:.0f} TFLOP/s", (right, peak), (-6, 4), **words)
    grid[0, 0].legend(loc="lower right")
    for axes in grid[-1]:
        axes.set_xlabel("FLOP per byte moved")
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s")
    return figure


@picture.style()
def memory(rows: Sequence[Row]) -> Any:
    """Draw the memory per image that a net saves for its backward pass, three bars for each depth. `rows` are those of
    bench/memory.py."""
    figure = picture.figure(WIDTH, 3.2)
    axes = figure.subplots()
    kinds = (
        ("pytorch", "eager PyTorch", {"color": PEER}),
        ("fastres", "fastres, of eager PyTorch's", {"color": OURS}),
        ("recompute", "fastres recomputing, of eager PyTorch's", {"fc": "none", "ec": OURS, "lw": 1.2}),
    )
    for k, (column, label, look) in enumerate(kinds):
        places = [i + 0.27 * (k - 1) for i in range(len(rows))]
        values = [float(row[column]) / 2**20 for row in rows]
        bars = axes.bar(places, values, width=0.24, label=label, **look)
        parts = [f"{float(row[column]) / float(row['pytorch']):.2f}" for row in rows]
        sizes = [f"{value:.0f} MiB" for value in values]
        weight = "bold" if k else "normal"
        axes.bar_label(bars, parts if k else sizes, padding=1, fontsize=LABEL, color=INK, fontweight=weight)
    axes.set_xticks(range(len(rows)), [f"ResNet-{row['depth']}" for row in rows], color=INK)
    axes.tick_params(length=0)
    axes.set_ylabel("MiB per image")
    axes.set_title(f"Saved for backward, bf16, {rows[0]['size']}x{rows[0]['size']}")
    axes.legend(loc="upper left")
    axes.grid(axis="y")
    return figure


def _read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a CSV file. Raises ValueError if there are none, or if one lacks a value in `columns`."""
    with path.open(newline="") as source:
        rows = list(csv.DictReader(source))
    lacking = [name for name in columns if not all(row.get(name) for row in rows)]
    if lacking or not rows:
        raise ValueError(f"{path} is not a table of this kind: it lacks {', '.join(lacking) or 'rows'}")
    return rows


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {
    "rates": (records.read, rates),
    "summary": (records.read, summary),
    "compile": (records.read, compile_times),
    "roofline": (partial(_read_csv, columns=("pass", *FIGURES)), roofline),
    "memory": (partial(_read_csv, columns=("depth", "size", "pytorch", "fastres", "recompute")), memory),
}


def drawn(kind: str, source: Path) -> Any:
    """Draw the figure of that kind from the file `source`.

    Raises ImportError if matplotlib is missing, and OSError or ValueError if the file can't be drawn.
    """
    read, draw = KINDS[kind]
    return draw(read(source))


def number(rate: float) -> str:
    """Return img/s as text: whole numbers from 100, below that with one decimal."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def figure_of(row: Row) -> str:
    """Return a row's img/s as text, with the latency if the batch is a single image."""
    return f"{number(row['img_s'])} ({row['latency_ms']:.2f} ms)" if row["batch"] == 1 else number(row["img_s"])


def _setting(row: Row) -> tuple[Any, ...]:
    """Return the fields of a row's case other than the net."""
    return (row["mode"], *records.key(row)[2:-1])


def _natural(name: str) -> list[Any]:
    """Return a sort key that puts resnet50 before resnet101."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def net_of(name: str) -> str:
    """Return a net's name for readers: resnet50 becomes ResNet-50."""
    return re.sub(r"^resnet(\d+)$", r"ResNet-\1", name)


def _panel(rows: Sequence[Row], net: str, setting: tuple[Any, ...]) -> list[Row]:
    """Return the rows of one panel, slowest first, since bars are drawn from bottom to top. Rows that aren't ok come
    before these; those that aren't available are left out."""
    of_panel = [
        row for row in rows if row["net"] == net and _setting(row) == setting and row["status"] != "not available"
    ]
    return sorted(of_panel, key=lambda row: row["img_s"] if row["status"] == "ok" else -1)


def _flops(record: dict[str, Any], net: str) -> str:
    """Return a line with the multiply-adds per image in 10⁹ by our count, and the paper's figure for its net of that
    kind if there is one. The line is empty if the record has no count for the net."""
    measured = next((row for row in record["flops"] if row["net"] == net and row["paper"] is None), None)
    if measured is None:
        return ""
    paper = [row for row in record["flops"] if row["net"] == measured["beside"] and row["paper"] is not None]
    compared = "".join(f"; the paper's {row['net']} {row['ours']:.2f}, printed {row['paper']:.1f}" for row in paper)
    return f"{net_of(net)}: {measured['ours']:.2f}·10⁹ multiply-adds an image{compared}"


def _say(figure: Any, text: str) -> None:
    """Write small print at the top of the figure."""
    figure.suptitle(text, fontsize=LABEL, color=FAINT, x=0.01, ha="left")


def _draw_rates(axes: Any, rows: list[Row], words: dict[str, str]) -> None:
    """Draw the bars of one panel, each with its img/s and, for fastres, its ratios to the best peer and to eager
    PyTorch."""
    to_peer, to_eager = records.ratios(rows), records.ratios(rows, to_eager=True)
    mixed = len({records.arithmetic(row) for row in rows}) > 1
    note = partial(axes.annotate, textcoords="offset points", va="center", fontsize=LABEL)
    for i, row in enumerate(rows):
        if row["status"] != "ok":
            note(row["status"], (0, i), (4, 0), color=FAINT, style="italic")
            continue
        rate, low, high = row["img_s"], row["img_s_min"], row["img_s_max"]
        axes.barh(i, rate, color=OURS if row["ours"] else PEER, height=0.7)
        axes.errorbar(rate, i, xerr=[[rate - low], [high - rate]], color=INK, lw=1, capsize=2)
        note(figure_of(row), (high, i), (5, 0), fontweight=_weight(row))
        key, dtype = records.key(row), f"{records.arithmetic(row)} " if mixed else ""
        compared = {f"best {dtype}peer": to_peer, f"{row['dtype']} eager" if mixed else "eager": to_eager}
        times = [f"{found[key].value:.2f} x {other}" for other, found in compared.items() if key in found]
        if row["ours"]:
            note(", ".join(times), (1, i), (0, 0), xycoords=("axes fraction", "data"), ha="right")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(range(len(rows)), [words.get(row["backend"], row["backend"]) for row in rows], color=INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight(_weight(row))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, labelsize=8.5)


def _weight(row: Row) -> str:
    return "bold" if row["ours"] else "normal"


def _plain_numbers(*lines: Any) -> None:
    """Label a logarithmic axis with plain numbers: 1, 10, 100."""
    for line in lines:
        line.set_major_formatter(lambda value, _: f"{value:g}")
        line.set_minor_formatter(lambda value, _: "")


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """Write each row's name next to its point, where it overlaps no other name, as close to the point as possible.

    A line connects a name to its point if the name is further away, or closer to another point. The figure must have
    been laid out before.
    """
    scale = axes.figure.dpi / 72  # pixels in a point
    inside, taken = axes.get_window_extent(), []
    dots = axes.transData.transform([(row["first_call_s"], row["img_s"]) for row in rows])
    directions = [math.radians(degrees) for degrees in (0, 180, 90, 270, 30, 150, 210, 330, 60, 120, 240, 300)]
    write = partial(axes.annotate, textcoords="offset points", ha="center", va="center", fontsize=LABEL)
    for number, row in enumerate(rows):
        at = row["first_call_s"], row["img_s"]
        name = write(row["backend"], at, (0, 0), fontweight=_weight(row))
        centred = name.get_window_extent()
        places = []
        for reach, angle in itertools.product(range(7, 90, 3), directions):
            dx = (reach + centred.width / scale / 2) * math.cos(angle)
            dy = (reach + centred.height / scale / 2) * math.sin(angle)
            box = centred.translated(dx * scale, dy * scale)
            away = [_distance(box, dot) / scale for dot in dots]
            within = inside.contains(*box.min) and inside.contains(*box.max)
            fits = within and min(away) > 4 and not box.padded(scale).count_overlaps(taken)
            astray = away[number] - min(away) > 2
            places.append((not fits, reach + 20 * astray, reach > 7 or astray, dx, dy, box))
        *_, apart, dx, dy, box = min(places, key=lambda place: place[:2])
        name.set_position((dx, dy))
        taken.append(box)
        if apart:
            x, y = (min(max(dot, low), high) for dot, low, high in zip(dots[number], box.min, box.max, strict=True))
            end = (x - dots[number][0]) / scale, (y - dots[number][1]) / scale
            line = {"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
            write("", at, end, arrowprops=line)


def _distance(box: Any, point: Any) -> float:
    """Return the distance from the point to the box, 0 if it is inside."""
    return math.hypot(*(max(box.min[i] - point[i], 0, point[i] - box.max[i]) for i in (0, 1)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="what to draw: a record of bench/run.py, or a CSV table")
    parser.add_argument(
        "picture", type=Path, help=f"where to draw it: a name that ends in {', '.join(picture.SUFFIXES)}"
    )
    parser.add_argument("kind", choices=list(KINDS), nargs="?", default="rates", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.picture.suffix not in picture.SUFFIXES:
        parser.error(f"the picture must be a name that ends in {', '.join(picture.SUFFIXES)}: got {options.picture}")
    try:
        picture.save(drawn(options.kind, options.source), options.picture)
    except ImportError as error:
        parser.error(f"{error}: pip install 'fastres[bench]'")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
