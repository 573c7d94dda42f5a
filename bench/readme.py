"""Write the results in README.md and docs/benchmarks.md and draw the pictures, from the records in bench/records.

    python bench/readme.py                                            # the records that docs/benchmarks.md shows
    python bench/readme.py bench/records/nvidia-h100-80gb-hbm3.json   # this one replaces that of the same device type

On each page a block of results is between the lines `<!-- NAME: bench/readme.py -->` and `<!-- /NAME -->`. NAME is
`results` for a GPU, `results-cpu` for a CPU, and `memory` and `memory-frozen` for the counts of bench/memory.py. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory
import plot
import record as records

from fastres import picture

README, BENCHMARKS = "README.md", "docs/benchmarks.md"
MEMORY = "bench/records/memory.csv"
FROZEN = "bench/records/memory-frozen.csv"
BLOCKS = {"cuda": "results", "cpu": "results-cpu"}
DTYPES = {"fp32": "fastres-optimize", "bf16": "fastres-optimize-bf16", "int8": "fastres-optimize-int8"}

Row = dict[str, Any]


def shown() -> dict[str, str]:
    """Return the record that docs/benchmarks.md shows for each device type: the path, in the repository, that the
    device's block links to."""
    text, found = (records.ROOT / BENCHMARKS).read_text(), {}
    for device, name in BLOCKS.items():
        link = re.search(r"\]\(\.\./(bench/records/[\w.-]+\.json)\)", inside(text, name, BENCHMARKS))
        if link is not None:
            found[device] = link[1]
    return found


def inside(text: str, name: str, page: str) -> str:
    """Return the block between the marks called `name`. Raises ValueError if `text` lacks them."""
    return _split(text, name, page)[1]


def written(text: str, name: str, block: str, page: str) -> str:
    """Return `text` with `block` between the marks called `name`. Raises ValueError if `text` lacks them."""
    before, _, after = _split(text, name, page)
    return before + block + after


def _split(text: str, name: str, page: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: bench/readme.py -->\n", f"<!-- /{name} -->\n"
    before, begun, rest = text.partition(begin)
    middle, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{page} lacks the line {begin.strip()} or {end.strip()}")
    return before + begin, middle, end + after


def table(head: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table, the first column left-aligned and the others right-aligned."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rules, *lines))


def times(row: Row | None, other: Row | None) -> str:
    """Return the ratio of two rows, or an empty string if one is missing."""
    return f"{records.ratio(row, other).value:.2f}" if row and other else ""


def word(row: Row) -> str:
    """Return the name of a row's backend for readers who don't know the bench."""
    return plot.WORDS.get(row["backend"], row["backend"])


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def case_of(row: Row) -> str:
    return f"{plot.MODES[row['mode']]}, {row['dtype']}, batch {row['batch']}"


def where(record: dict[str, Any], *packages: str) -> str:
    """Return device, date and the versions of `packages`."""
    environment, versions = record["environment"], record["environment"]["versions"]
    device = environment["name"]
    if environment["device"] == "cpu":
        device += f", {environment['threads']} threads"
    return f"{device}, {record['created'][:10]}, " + ", ".join(
        f"{name} {_version(versions[package])}" for package, name in _NAMES.items() if package in packages
    )


_NAMES = {"torch": "torch", "triton": "triton", "cudnn": "cuDNN", "onnxruntime": "ONNX Runtime"}


def _version(text: str) -> str:
    """Return a version with dots. cuDNN writes 9.19.0 as 91900."""
    number = int(text) if text.isdecimal() else None
    return text if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def quiet(rows: list[Row]) -> dict[str, Row]:
    """Return the rows that are ok, by backend."""
    return {row["backend"]: row for row in rows if row["status"] == "ok"}


def summary_of_gpu(record: dict[str, Any], source: str) -> str:
    """Return README.md's block of a GPU: the picture, and a line for each case in it.

    A line has the img/s of eager PyTorch, of the best other peer and of the fastest row of fastres in the case's dtype,
    and the latter's ratios to the other two.
    """
    lines = []
    for case, rows in records.by_case(plot.chosen(record)).items():
        dtype, eager = case[3], records.eager(rows)
        peer = records.best_peer(rows, dtype)
        peer = None if peer is eager else peer
        ours = [row for row in quiet(rows).values() if row["ours"] and records.arithmetic(row) == dtype]
        best = max(ours, key=lambda row: row["img_s"], default=None)
        cells = [
            f"{plot.net_of(case[0])} {case_of(rows[0])}",
            plot.figure_of(eager) if eager else "",
            f"{plot.figure_of(peer)} {word(peer)}" if peer else "",
            f"**{plot.figure_of(best)}** {word(best)}" if best else "",
        ]
        lines.append([*cells, times(best, peer), times(best, eager)])
    head = ["img/s", "eager PyTorch", "best peer", "fastres", "x best peer", "x eager PyTorch"]
    alt = f"{record['environment']['name']}: training and inference compared with the peers"
    machine = f"One {where(record, 'torch', 'triton', 'cudnn')}. "
    return f"![{alt}]({_beside(source, '-summary.svg')})\n\n{table(head, lines)}\n" + paragraph(
        f"{machine}[Every row, with its error against float64]({source})."
    )


def summary_of_cpu(record: dict[str, Any], source: str) -> str:
    """Return README.md's block of a CPU: inference, a line for each dtype of `fastres.optimize`, a column for each
    batch. Raises ValueError if the record has no inference."""
    cases = [rows for case, rows in records.by_case(record["rows"]).items() if case[1] == "infer"]
    if not cases:
        raise ValueError(f"{source} has no inference rows, which README.md shows for a CPU")
    eagers = [records.eager(rows) for rows in cases]
    lines = [["eager PyTorch, fp32", *(plot.number(row["img_s"]) if row else "" for row in eagers)]]
    for dtype, backend in DTYPES.items():
        cells = [f"`fastres.optimize`, {dtype}"]
        for rows, eager in zip(cases, eagers, strict=True):
            ours, peer = quiet(rows).get(backend), records.best_peer(rows, dtype)
            compared = [f"{times(ours, eager)} x eager"] if ours and eager else []
            compared += [f"{times(ours, peer)} x {word(peer)}"] if ours and peer else []
            cells.append(f"**{plot.number(ours['img_s'])}** ({', '.join(compared)})" if ours else "")
        lines.append(cells)
    head = [f"{plot.net_of(cases[0][0]['net'])} inference, img/s", *(f"batch {rows[0]['batch']}" for rows in cases)]
    return f"{table(head, lines)}\n" + paragraph(
        f'{where(record, "torch", "onnxruntime")}: [record]({source}). "x eager" compares with eager PyTorch in fp32, '
        "the other ratio with the best peer in the same dtype."
    )


def full(record: dict[str, Any], source: str) -> str:
    """Return a device's block of docs/benchmarks.md: the picture, and a table for each case with every measured row."""
    link = f"../{source}"
    parts = [f"![{record['environment']['name']}: img/s of every backend]({_beside(link, '.svg')})\n"]
    to_peer, to_eager = records.ratios(record["rows"]), records.ratios(record["rows"], to_eager=True)
    for rows in records.by_case(record["rows"]).values():
        mixed = len({records.arithmetic(row) for row in rows}) > 1
        peers = "x best peer in that dtype" if mixed else "x best peer"
        head = ["backend", *["dtype"] * mixed, "img/s", "slowest to fastest", "latency, ms", "first call, s"]
        lines = []
        for row in sorted((row for row in rows if "img_s" in row), key=lambda row: -row["img_s"]):
            key, status = records.key(row), "" if row["status"] == "ok" else f" ({row['status']})"
            cells = [
                f"**`{row['backend']}`**" if row["ours"] else f"`{row['backend']}`",
                *[records.arithmetic(row)] * mixed,
                plot.number(row["img_s"]) + status,
                f"{plot.number(row['img_s_min'])} to {plot.number(row['img_s_max'])}",
                f"{row['latency_ms']:.2f}",
                f"{row['first_call_s']:.1f}",
            ]
            lines.append(
                [*cells, *(f"{found[key].value:.2f}" if key in found else "" for found in (to_peer, to_eager))]
            )
        title = f"{plot.net_of(rows[0]['net'])} {case_of(rows[0])}, {rows[0]['size']}x{rows[0]['size']}"
        parts.append(f"**{title}**\n\n{table([*head, peers, 'x eager'], lines)}")
    packages = ("torch", "triton", "cudnn") if record["environment"]["device"] == "cuda" else ("torch", "onnxruntime")
    parts.append(paragraph(f"{where(record, *packages)}: [`{source}`]({link})."))
    return "\n".join(parts)


def memory_line(rows: list[Row], source: str) -> str:
    """Return README.md's sentence about memory."""
    depths = ", ".join(row["depth"] for row in rows)
    parts = ", ".join(_part(row, "fastres") for row in rows)
    least, most = (extreme(_part(row, "recompute") for row in rows) for extreme in (min, max))
    return paragraph(
        f"[Memory saved for backward]({source}) in bf16, as a fraction of eager PyTorch's: {parts} for "
        f"ResNet-{depths}; {least} to {most} with recomputation. It is counted, not measured on a GPU."
    )


def memory_table(rows: list[Row], source: str) -> str:
    """Return docs/benchmarks.md's picture and table of memory."""
    head = [
        "saved for backward, MiB per image",
        "eager PyTorch",
        "fastres",
        "x eager",
        "fastres, recomputing",
        "x eager",
    ]
    lines = []
    for row in rows:
        sizes = [f"{float(row[name]) / 2**20:.1f}" for name in ("pytorch", "fastres", "recompute")]
        parts = [_part(row, name) for name in ("fastres", "recompute")]
        lines.append([f"ResNet-{row['depth']}", *sizes[:2], parts[0], sizes[2], parts[1]])
    link = f"../{source}"
    return (
        f"![Memory that a net saves for its backward pass, by depth]({_beside(link, '.svg')})\n\n{table(head, lines)}\n"
        f"{rows[0]['size']}x{rows[0]['size']} images, bf16 autocast: [`{source}`]({link}).\n"
    )


def frozen_table(rows: list[Row], source: str) -> str:
    """Return docs/benchmarks.md's table of memory with running statistics."""
    kinds = list(dict.fromkeys(row["norms"] for row in rows))
    head = [
        "saved for backward, MiB per image: eager PyTorch, fastres, x eager",
        *(memory.NORMS[kind] for kind in kinds),
    ]
    lines = []
    for depth in dict.fromkeys(row["depth"] for row in rows):
        cells = []
        for row in (row for row in rows if row["depth"] == depth):
            theirs, ours = (f"{float(row[name]) / 2**20:.1f}" for name in ("pytorch", "fastres"))
            cells.append(f"{theirs}, {ours}, **{_part(row, 'fastres')}**")
        lines.append([f"ResNet-{depth}", *cells])
    size = rows[0]["size"]
    return f"{table(head, lines)}\n{size}x{size} images, bf16 autocast: [`{source}`](../{source}).\n"


def _part(row: Row, name: str) -> str:
    """Return a column as a fraction of eager PyTorch's bytes."""
    return f"{float(row[name]) / float(row['pytorch']):.2f}"


def _beside(source: str, end: str) -> str:
    """Return the path of a file that has `source`'s name up to its suffix, followed by `end`."""
    return str(Path(source).with_suffix("")) + end


PAGES: dict[str, dict[str, Callable[..., str]]] = {
    README: {"results": summary_of_gpu, "results-cpu": summary_of_cpu, "memory": memory_line},
    BENCHMARKS: {"results": full, "results-cpu": full, "memory": memory_table, "memory-frozen": frozen_table},
}


def pages(sources: dict[str, str]) -> dict[str, str]:
    """Return the text of each page with its blocks rewritten from `sources`, which is as in `shown`. Raises ValueError
    if a page lacks marks."""
    blocks_of: dict[str, tuple[Any, str]] = {}
    for name, source in (("memory", MEMORY), ("memory-frozen", FROZEN)):
        with (records.ROOT / source).open(newline="") as file:
            blocks_of[name] = list(csv.DictReader(file)), source
    for device, source in sources.items():
        blocks_of[BLOCKS[device]] = records.read(records.ROOT / source), source
    found = {}
    for page, blocks in PAGES.items():
        text = (records.ROOT / page).read_text()
        for name, block in blocks.items():
            if name in blocks_of:
                text = written(text, name, block(*blocks_of[name]), page)
        found[page] = text
    return found


def pictures(sources: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return, for each picture, its kind in `plot.KINDS` and the file it is drawn from."""
    found = {_beside(MEMORY, ".svg"): ("memory", MEMORY)}
    for table in (records.ROOT / "bench" / "records").glob("nvidia-h200-kernels-*.csv"):
        source = str(table.relative_to(records.ROOT))
        found[_beside(source, ".svg")] = "roofline", source
    for device, source in sources.items():
        found[_beside(source, ".svg")] = "rates", source
        found[_beside(source, "-compile.svg")] = "compile", source
        if device == "cuda":
            found[_beside(source, "-summary.svg")] = "summary", source
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="*", help="a record of bench/run.py, in bench/records")
    options = parser.parse_args(arguments)
    try:
        sources = shown()
        for path in options.record:
            device = records.read(path)["environment"]["device"]
            sources[device] = path.resolve().relative_to(records.ROOT).as_posix()
        texts = pages(sources)
        for path, (kind, source) in pictures(sources).items():
            picture.save(plot.drawn(kind, records.ROOT / source), records.ROOT / path)
    except ImportError as error:
        parser.error(f"{error}: pip install 'fastres[bench]'")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for page, text in texts.items():
        (records.ROOT / page).write_text(text)
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
