"""README's results, table and picture, from the record of a GPU or of a CPU.

    python bench/readme.py bench/records/nvidia-h200.json
    python bench/readme.py bench/records/cpu-epyc.json

Writes the table between README's two `results` marks, or `results-cpu` marks, and beside the record its picture,
`<record>.svg`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record as records

README = records.ROOT / "README.md"
MARKS = {
    "cuda": ("<!-- results: bench/readme.py -->\n", "<!-- /results -->\n"),
    "cpu": ("<!-- results-cpu: bench/readme.py -->\n", "<!-- /results-cpu -->\n"),
}
MODES = {"train": "training", "infer": "inference"}


def cases(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, the rows that are right, fastest first) of every case of the record, in the order measured."""
    rows = [row for row in record["rows"] if row["status"] in ("ok", "noisy")]
    for (net, mode, batch, dtype, _), mine in records.by_case(rows).items():
        title = f"{net.replace('resnet', 'ResNet-')} {MODES[mode]}, {dtype}, batch {batch}"
        yield title, sorted(mine, key=lambda row: -row["img_s"])


def figure(row: dict[str, Any] | None, named: bool = True) -> str:
    """A row's rate, for single images its latency; and its name."""
    if row is None:
        return ""
    value = f"{row['latency_ms']:.2f} ms" if row["batch"] == 1 else f"{row['img_s']:,.0f}"
    return f"{value} (`{row['backend']}`)" if named else value


def times_faster(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """By latency for single images, else by the windows that were taken in turns."""
    if ours["batch"] == 1:
        return other["latency_ms"] / ours["latency_ms"]
    return records.ratio(ours, other).value


def table(record: dict[str, Any]) -> str:
    """A line a case: one import changed, the fastest of ours, the best of several peers, eager PyTorch, and ratios."""
    lines = [
        "| img/s | one import changed | fastest of ours | best peer | eager, channels_last | x best peer | x eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, rows in cases(record):
        quiet = {row["backend"]: row for row in rows if row["status"] == "ok"}
        changed, eager = quiet.get("fastres"), quiet.get("eager-channels-last")
        dtype = rows[0]["dtype"]
        ours = [row for row in quiet.values() if row["ours"] and records.arithmetic(row) == dtype]
        several = sum(not row["ours"] for row in rows) > 1  # one alone is best of nothing
        peer = records.best_peer(rows, dtype) if several else None
        figures = [figure(changed, False), figure(ours[0] if ours else None), figure(peer), figure(eager, False)]
        ratios = [f"{times_faster(ours[0], row):.2f}" if ours and row else "" for row in (peer, eager)]
        lines.append(f"| {' | '.join([title, *figures, *ratios])} |")
    return "\n".join(lines) + "\n"


def table_of_dtypes(record: dict[str, Any]) -> str:
    """Inference on a CPU, a line a case: eager PyTorch, then for each dtype `fastres.optimize`, what it is in multiples
    of eager PyTorch, and of the best peer that computes in that dtype."""
    names = {"fp32": "fastres-optimize", "bf16": "fastres-optimize-bf16", "int8": "fastres-optimize-int8"}
    heads = [f"`fastres.optimize`, {dtype} | x eager | x best {dtype} peer" for dtype in names]
    lines = [f"| img/s | eager, channels_last | {' | '.join(heads)} |", "|---" * (2 + 3 * len(names)) + "|"]
    for title, rows in cases(record):
        if rows[0]["mode"] != "infer":
            continue
        quiet = {row["backend"]: row for row in rows if row["status"] == "ok"}
        eager = quiet.get("eager-channels-last")
        cells = [title.replace(f", {rows[0]['dtype']}", ""), rate(eager)]
        for dtype, name in names.items():
            ours, peer = quiet.get(name), records.best_peer(rows, dtype)
            cells += [rate(ours), times(ours, eager), times(ours, peer)]
            cells[-1] += f" (`{peer['backend']}`)" if ours and peer else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rate(row: dict[str, Any] | None) -> str:
    return f"{row['img_s']:,.0f}" if row else ""


def times(ours: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    return f"{records.ratio(ours, other).value:.2f}" if ours and other else ""


def block_of_cpu(record: dict[str, Any], picture: Path) -> str:
    """What stands between README's marks of a CPU."""
    where, versions = record["environment"], record["environment"]["versions"]
    source = picture.with_suffix(".json")
    return (
        f"![{where['name']}: inference beside the peers]({picture})\n\n{table_of_dtypes(record)}\n"
        f"{where['name']}, {where['threads']} threads, {record['created'][:10]}, torch {versions['torch']}, "
        f"ONNX Runtime {versions['onnxruntime']}.\nEvery row, with its error against float64: [`{source}`]({source}).\n"
    )


def block(record: dict[str, Any], picture: Path) -> str:
    """What stands between README's marks."""
    if record["environment"]["device"] == "cpu":
        return block_of_cpu(record, picture)
    where, versions = record["environment"], record["environment"]["versions"]
    source = picture.with_suffix(".json")
    return (
        f"![{where['name']}: training and inference beside the peers]({picture})\n\n{table(record)}\n"
        f"One {where['name']}, {record['created'][:10]}, torch {versions['torch']}, triton {versions['triton']}, cuDNN "
        f"{versions['cudnn']}.\nEvery row, with its error against float64: [`{source}`]({source}).\n"
    )


def written(text: str, inside: str, device: str = "cuda") -> str:
    """README's `text` with `inside` between the marks of `device`. Raises ValueError where it lacks them."""
    begin, end = MARKS[device]
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"README.md lacks the line {begin.strip()} or {end.strip()}")
    return f"{before}{begin}{inside}{end}{after}"


def drawn(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the picture shows: of a GPU the largest batch of each mode in the record's first dtype,
    of a CPU inference with the smallest and the largest batch."""
    rows = record["rows"]
    if record["environment"]["device"] == "cpu":
        rows = [row for row in rows if row["mode"] == "infer"]
        batches = [row["batch"] for row in rows]
        return record | {"rows": [row for row in rows if row["batch"] in (min(batches), max(batches))]}
    most = {mode: max(row["batch"] for row in rows if row["mode"] == mode) for mode in {row["mode"] for row in rows}}
    shown = [row for row in rows if row["batch"] == most[row["mode"]] and row["dtype"] == rows[0]["dtype"]]
    return record | {"rows": shown}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a record of bench/run.py, in bench/records")
    options = parser.parse_args(arguments)
    try:
        record = records.read(options.record)
        picture = options.record.resolve().with_suffix(".svg")
        inside = block(record, picture.relative_to(records.ROOT))
        text = written(README.read_text(), inside, record["environment"]["device"])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    import plot

    plot.draw(drawn(record), picture)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
