"""README's results, table and picture, from the record of a GPU.

    python bench/readme.py bench/records/nvidia-h200.json

Writes the table between README's two `results` marks, and beside the record its picture, `<record>.svg`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record as records

README = records.ROOT / "README.md"
BEGIN, END = "<!-- results: bench/readme.py -->\n", "<!-- /results -->\n"
MODES = {"train": "training", "infer": "inference"}


def cases(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(title, the rows that are right, fastest first) of every case of the record, in the order measured."""
    rows = [row for row in record["rows"] if row["status"] in ("ok", "noisy")]
    for case in dict.fromkeys(records.key(row)[:-1] for row in rows):
        net, mode, batch, dtype, _ = case
        mine = [row for row in rows if records.key(row)[:-1] == case]
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
        ours = [row for row in quiet.values() if row["ours"] and row.get("agreement") is None]  # float8 has no peer
        several = sum(not row["ours"] for row in rows) > 1  # one alone is best of nothing
        peer = records.best_peer(rows) if several else None
        figures = [figure(changed, False), figure(ours[0] if ours else None), figure(peer), figure(eager, False)]
        ratios = [f"{times_faster(ours[0], row):.2f}" if ours and row else "" for row in (peer, eager)]
        lines.append(f"| {' | '.join([title, *figures, *ratios])} |")
    return "\n".join(lines) + "\n"


def block(record: dict[str, Any], picture: Path) -> str:
    """What stands between README's marks."""
    where, versions = record["environment"], record["environment"]["versions"]
    source = picture.with_suffix(".json")
    return (
        f"![{where['name']}: training and inference beside the peers]({picture})\n\n{table(record)}\n"
        f"One {where['name']}, {record['created'][:10]}, torch {versions['torch']}, triton {versions['triton']}, cuDNN "
        f"{versions['cudnn']}.\nEvery row, with its error against float64: [`{source}`]({source}).\n"
    )


def written(text: str, inside: str) -> str:
    """README's `text` with `inside` between its marks. Raises ValueError where it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the line {BEGIN.strip()} or {END.strip()}")
    return f"{before}{begin}{inside}{end}{after}"


def drawn(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the picture shows: the largest batch of each mode in the record's first dtype."""
    rows = record["rows"]
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
        text = written(README.read_text(), block(record, picture.relative_to(records.ROOT)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    import plot

    plot.draw(drawn(record), picture)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
