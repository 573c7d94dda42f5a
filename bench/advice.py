"""Say which backend to use on this machine, in one line per net and batch, from the rows that were measured."""

from __future__ import annotations

from typing import Any

import record as records
from backends import BACKENDS

Row = dict[str, Any]


def advice(rows: list[Row]) -> str:
    """Return a line for each net, batch, dtype and size among the rows. Only rows that are ok are considered."""
    cases: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for (net, mode, *rest), mine in records.by_case(rows).items():
        cases.setdefault((net, *rest), {})[mode] = mine
    return "\n".join(_line(case, modes) for case, modes in cases.items())


def _line(case: tuple[Any, ...], modes: dict[str, list[Row]]) -> str:
    """Return the line of one net, batch, dtype and size; `modes` maps each mode to its rows."""
    net, batch, dtype, size = case
    sentences = [{"infer": _inference, "train": _training}[mode](mine, dtype) for mode, mine in modes.items()]
    return f"What to use on this machine for {net}, batch {batch}, {dtype}, {size}x{size}. {' '.join(sentences)}"


def _inference(rows: list[Row], dtype: str) -> str:
    """Recommend the fastest row of fastres, then the fastest that needs no calibration and the fastest in the case's
    dtype, if they are others."""
    if (why := _unknown(rows)) is not None:
        return f"Inference: {why}."
    ours = [row for row in rows if row["ours"] and row["status"] == "ok"]
    fits = {
        "Inference": ours,
        "Without calibration": [row for row in ours if not BACKENDS[row["backend"]].quantises],
        f"In {dtype}": [row for row in ours if records.arithmetic(row) == dtype],
    }
    sentences, named = [], set[str]()
    for when, some in fits.items():
        best = max(some, key=lambda row: row["img_s"], default=None)
        if best is not None and best["backend"] not in named:
            named.add(best["backend"])
            sentences.append(f"{when}: {_worth(best, rows)}.")
    return " ".join(sentences)


def _training(rows: list[Row], dtype: str) -> str:
    """Recommend the fastest row of fastres."""
    if (why := _unknown(rows)) is not None:
        return f"Training: {why}."
    best = max((row for row in rows if row["ours"] and row["status"] == "ok"), key=lambda row: row["img_s"])
    if "fused in" not in best["path"] and not BACKENDS[best["backend"]].compile:
        gain = records.ratio(best, records.eager(rows))
        return (
            f"Training: fastres runs PyTorch's own operations here, at {gain.value:.2f} x the speed of eager PyTorch."
        )
    return f"Training: {_worth(best, rows)}."


def _unknown(rows: list[Row]) -> str | None:
    """Return why the rows of a case allow no recommendation, or None."""
    if records.eager(rows) is None:
        return "unknown, because there is no steady measurement of eager-channels-last to compare with"
    if not any(row["ours"] and row["status"] == "ok" for row in rows):
        return "unknown, because there is no steady measurement of fastres"
    return None


def _worth(row: Row, rows: list[Row]) -> str:
    """Return what to write to get a row, its rate, and the rate relative to eager PyTorch, or that nothing is reliably
    faster than that. If the row is reliably slower than the best peer, that ratio is added."""
    eager, peer = records.eager(rows), records.best_peer(rows, records.arithmetic(row))
    gain = records.ratio(row, eager)
    rate = f"{row['img_s']:,.4g}" if row["img_s"] < 1e4 else f"{row['img_s']:,.0f}"
    text = f"{BACKENDS[row['backend']].use}, {rate} img/s"
    if gain.low <= 1:
        return f"nothing is reliably faster than eager PyTorch in channels_last ({text}, {gain.value:.2f} x)"
    text += f", {gain.value:.2f} x eager PyTorch in channels_last"
    if peer is not None and peer is not eager and records.ratio(row, peer).high < 1:
        text += f", but {records.ratio(row, peer).value:.2f} x {peer['backend']}"
    if (agreement := row.get("agreement")) is not None:
        text += f" ({100 * agreement:.1f} % of {row['agreement_images']} images get the same class)"
    return text
