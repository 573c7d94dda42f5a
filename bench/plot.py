"""Pictures of a record: img/s by net and backend beside the paper's FLOPs; compile time against img/s.

python bench/plot.py out/record.json out/record.png
python bench/plot.py out/record.json out/compile.png compile
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import record as records

SUFFIXES = (".png", ".svg", ".pdf")
OURS, PEER, PAPER, INK, FAINT = "#d1495b", "#8ea9c1", "#c9b27c", "#22303c", "#b8c0c7"
TITLES = {"infer": "inference", "train": "training"}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw `record` to `path`: a row of panels per net; multiply-adds left, then img/s for each mode and setting.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = record["rows"]
    nets = sorted({row["net"] for row in rows}, key=_natural)
    settings = list(dict.fromkeys((row["mode"], *records.key(row)[2:-1]) for row in rows))
    panels = {(n, s): _panel(rows, n, s) for n in nets for s in settings}
    heights = [1 + max(3, *(len(panels[n, s]) for s in settings)) for n in nets]
    figure = Figure(figsize=(3.6 + 5.2 * len(settings), 1.3 + 0.235 * sum(heights)), layout="constrained", dpi=150)
    grid = figure.subplots(
        len(nets),
        1 + len(settings),
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": heights, "width_ratios": [2, *[5] * len(settings)]},
    )
    versions = record["environment"]["versions"]
    code = record["code"]
    commit = (code["commit"] or "unknown commit")[:10] + (" with changes" if code["dirty"] else "")
    figure.suptitle(
        f"ResNet throughput on {record['environment']['name']}\n"
        f"torch {versions['torch']}, fastres {versions['fastres']} ({commit}), {record['created'][:10]}",
        fontsize=10,
        color=INK,
    )
    for line, net in zip(grid, nets, strict=True):
        _draw_flops(line[0], record["flops"], net, max(len(panels[net, s]) for s in settings))
        for axes, setting in zip(line[1:], settings, strict=True):
            _draw_rates(axes, panels[net, setting])
    grid[0][0].set_title("multiply-adds, 10⁹", fontsize=9, color=INK)
    for axes, setting in zip(grid[0][1:], settings, strict=True):
        mode, batch, dtype, size = setting
        shown = "" if any(_mixed(panels[net, setting]) for net in nets) else f" {dtype},"  # else each bar has its own
        axes.set_title(f"{TITLES[mode]}, img/s (batch {batch},{shown} {size}²)", fontsize=9, color=INK)
    with rc_context({"svg.hashsalt": "fastres"}):  # the same record gives the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_compile(record: dict[str, Any], path: Path) -> None:
    """Draw seconds of the first call (building and compiling included) against img/s: a panel a case of `record`.

    Raises ImportError where matplotlib is missing, ValueError where no row has a rate.
    """
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["status"] == "ok"]
    if not rows:
        raise ValueError("no row of the record has a rate to draw")
    cases = list(dict.fromkeys(records.key(row)[:-1] for row in rows))
    figure = Figure(figsize=(6.4 * len(cases), 4.6), layout="constrained", dpi=150)
    figure.suptitle(f"First call and throughput on {record['environment']['name']}", fontsize=10, color=INK)
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for row in (row for row in rows if records.key(row)[:-1] == case):
            at = (row["first_call_s"], row["img_s"])
            axes.scatter(*at, color=OURS if row["ours"] else PEER, s=28)
            axes.annotate(f"  {row['backend']}", at, **_TEXT)
        net, mode, batch, dtype, size = case
        axes.set_title(f"{net}, {TITLES[mode]} (batch {batch}, {dtype}, {size}²)", fontsize=9, color=INK)
        axes.set_xscale("log")
        axes.set_xlabel("first call, s", fontsize=8, color=INK)
        axes.set_ylabel("img/s", fontsize=8, color=INK)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.3)
    figure.savefig(path)


def _natural(name: str) -> list[Any]:
    """Sorts resnet50 before resnet101."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _panel(rows: list[dict[str, Any]], net: str, setting: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The rows of one panel, slowest first: bars grow upwards. Rows without a rate come first of all."""
    mine = [row for row in rows if row["net"] == net and (row["mode"], *records.key(row)[2:-1]) == setting]
    mine = [row for row in mine if row["status"] != "not available"]
    return sorted(mine, key=lambda row: row["img_s"] if row["status"] == "ok" else -1)


def _mixed(rows: list[dict[str, Any]]) -> bool:
    """Whether they compute in several dtypes."""
    return len({records.arithmetic(row) for row in rows}) > 1


def _draw_flops(axes: Any, table: list[dict[str, Any]], net: str, slots: int) -> None:
    """Up to three bars in the middle of the height that `slots` bars of the other panels take."""
    measured = next(row for row in table if row["net"] == net and row["paper"] is None)
    bars = [(f" measured net {measured['ours']:.2f}", measured["ours"], INK)]
    for row in (row for row in table if row["net"] == measured["beside"] and row["paper"] is not None):
        bars.append((f" our count {row['ours']:.2f}", row["ours"], FAINT))
        bars.append((f" paper {row['paper']:.1f}", row["paper"], PAPER))
    slots = max(slots, len(bars))
    for i, (label, value, colour) in enumerate(bars, start=(slots - len(bars)) // 2):
        axes.barh(i, value, color=colour, height=0.72)
        axes.annotate(label, (value, i), **_TEXT)
    axes.set_ylim(-0.8, slots - 0.2)
    axes.margins(x=0.9)
    axes.set_yticks([])
    axes.set_ylabel(net, fontsize=10, color=INK)
    _clean(axes)


_TEXT: dict[str, Any] = {"va": "center", "fontsize": 7, "color": INK}


def _draw_rates(axes: Any, rows: list[dict[str, Any]]) -> None:
    if not rows:
        axes.set_axis_off()
    ratios, to_eager, mixed = records.ratios(rows), records.ratios(rows, to_eager=True), _mixed(rows)
    for i, row in enumerate(rows):
        if row["status"] != "ok":
            axes.annotate(f" {row['status']}", (0, i), **_TEXT | {"color": OURS, "style": "italic"})
            continue
        rate, low, high = row["img_s"], row["img_s_min"], row["img_s_max"]
        axes.barh(i, rate, color=OURS if row["ours"] else PEER, height=0.72)
        axes.errorbar(rate, i, xerr=[[rate - low], [high - rate]], color=INK, lw=0.8, capsize=1.5)
        beside = f"  {rate:,.4g}" if rate < 1e4 else f"  {rate:,.0f}"
        if mixed:
            beside += f" {records.arithmetic(row)}"
        compared = {"best peer": ratios} | ({"eager": to_eager} if mixed else {})
        key = records.key(row)
        times = [f"{found[key].value:.2f} x {other}" for other, found in compared.items() if key in found]
        if row["ours"] and times:
            beside += f"  ({', '.join(times)})"
        axes.annotate(beside, (high, i), **_TEXT)
    axes.set_ylim(-0.8, max(len(rows), 1) - 0.2)
    axes.margins(x=0.5 if mixed else 0.28)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [row["backend"] for row in rows], fontsize=7.5, color=INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    _clean(axes)


def _clean(axes: Any) -> None:
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(length=0, labelbottom=False)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["compile"]) or Path(sys.argv[2]).suffix not in SUFFIXES:
        sys.exit(f"usage: python bench/plot.py RECORD PICTURE [compile], a picture that ends in {', '.join(SUFFIXES)}")
    draw_picture = draw_compile if sys.argv[3:] else draw
    draw_picture(records.read(Path(sys.argv[1])), Path(sys.argv[2]))
