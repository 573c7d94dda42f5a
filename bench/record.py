"""Records of measurements: one JSON file each, replaced as a whole after every new result.

bench/records/README.md documents the fields.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import nvidia_smi

from fastres.kernels import tables

SCHEMA = "fastres.bench/3"
ROOT = Path(__file__).resolve().parent.parent
CASE = ("net", "mode", "batch", "dtype", "size")  # rows with the same values of these fields are compared
PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "onnxruntime", "openvino", "fastres")
DONE = {"ok", "wrong", "out of memory", "not available"}  # --resume measures noisy, unfinished and failed rows again


def new(device: torch.device, options: dict[str, Any], flops: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a record without rows."""
    return {
        "schema": SCHEMA,
        "created": now(),
        "code": code(),
        "environment": environment(device),
        "options": options,
        "flops": flops,
        "rows": [],
    }


def now(timespec: str = "seconds") -> str:
    """Return the current time in UTC, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec=timespec)


def code() -> dict[str, Any]:
    """Return the state of the code: the commit, whether the tree differs from it, and a digest of sources and tables.

    The commit is the environment variable FASTRES_COMMIT if it is set, else git's. "commit" and "dirty" are None if
    they are not known.
    """
    head, stated = _git("rev-parse", "HEAD"), os.environ.get("FASTRES_COMMIT")
    commit, changes = stated or head, None
    if commit == head:
        changes = _git("status", "--porcelain", "--", "fastres", "kernels", "csrc", "bench", ":!bench/records")
    return {"commit": commit, "dirty": None if changes is None else bool(changes), "sources": _digest()}


def _git(*arguments: str) -> str | None:
    """Return git's output, or None if it fails."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _digest() -> str:
    """Return the SHA-256 of the sources, the shipped tile tables and those in the user's cache folder."""
    digest = hashlib.sha256()
    for folder in ("fastres", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".h", ".json"} and "records" not in path.parts:
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    for path in sorted(tables.table_file("any").parent.glob("*.json")):  # tiles measured on this machine
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device and its name, the number of CPU threads, the platform and the versions of packages; on a GPU
    also its driver, maximum clocks and power limit."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"device": device.type, "name": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["name"] = torch.cuda.get_device_name(device)
        found["gpu"] = nvidia_smi(device, "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return found | {"platform": platform.platform(), "versions": versions}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(record: dict[str, Any], path: Path) -> None:
    """Replace `path` atomically, so that a reader never sees, and a killed run never leaves, half a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> dict[str, Any]:
    """Return the record in `path`. Raises ValueError if it isn't a record of this schema or lacks fields."""
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a record: {error}") from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this bench reads and writes {SCHEMA!r}")
    if damage := _damage(record):
        raise ValueError(f"{path} is a damaged record: {damage}")
    return record


def _damage(record: dict[str, Any]) -> str | None:
    """Return a message if a field that readers rely on is missing from a record or has the wrong type, else None."""
    kinds = {"created": str, "code": dict, "environment": dict, "options": dict, "flops": list, "rows": list}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            return f"{name} is missing or has the wrong type"
    named = {"environment": ("device", "name"), "code": ("sources",)}
    if lacking := [f"{part}.{name}" for part, names in named.items() for name in names if name not in record[part]]:
        return f"{', '.join(lacking)} is missing"
    for number, row in enumerate(record["rows"]):
        if not isinstance(row, dict):
            return f"row {number} is not a row"
        measured = ("img_s", "img_s_min", "img_s_max", "first_call_s") if row.get("status") in ("ok", "noisy") else ()
        wrong = [name for name in (*CASE, "backend", "ours", "status") if name not in row]
        wrong += [name for name in measured if not isinstance(row.get(name), (int, float))]
        if wrong:
            return f"row {number} lacks {', '.join(wrong)}"
    return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each field that affects measurements and differs between two records. If there is none, the
    records' rows can be compared."""

    def deciding(record: dict[str, Any]) -> dict[str, Any]:
        return {part: record[part] for part in ("environment", "options")} | {"sources": record["code"]["sources"]}

    before, after = _flat(deciding(old)), _flat(deciding(new))
    return [
        f"{name}: {before.get(name)} then, {after.get(name)} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the nested fields as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the fields that identify a row in a record: `CASE` and the backend."""
    return (*(row[name] for name in CASE), row["backend"])


def put(record: dict[str, Any], row: dict[str, Any]) -> None:
    """Add `row` and remove an earlier row with the same key."""
    record["rows"] = [other for other in record["rows"] if key(other) != key(row)] + [row]


class Ratio(NamedTuple):
    """A row's rate divided by that of another row, with the interval from `low` to `high` (see `ratio`)."""

    value: float
    low: float
    high: float


def arithmetic(row: dict[str, Any]) -> str:
    """Return the dtype that the row computes in."""
    old = "fp8" if row.get("agreement") is not None else row["dtype"]  # old records lack the field
    return row.get("arithmetic", old)


def best_peer(rows: list[dict[str, Any]], computing_in: str) -> dict[str, Any] | None:
    """Return `fastest_peer`, or None if that row is noisy."""
    best = fastest_peer(rows, computing_in)
    return best if best is not None and best["status"] == "ok" else None


def fastest_peer(rows: list[dict[str, Any]], computing_in: str) -> dict[str, Any] | None:
    """Return the fastest peer by median img/s, noisy or not, among the rows of one case that compute in the dtype
    `computing_in`. Returns None if there is no such peer."""
    peers = [row for row in rows if not row["ours"] and row["status"] in ("ok", "noisy")]
    return max((row for row in peers if arithmetic(row) == computing_in), key=lambda row: row["img_s"], default=None)


def eager(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of eager PyTorch in channels_last among the rows of one case if it is ok, else None. Rows of all
    dtypes are compared with it."""
    return next((row for row in rows if row["backend"] == "eager-channels-last" and row["status"] == "ok"), None)


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Group the rows by case: the values of `CASE`."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(key(row)[:-1], []).append(row)
    return cases


def ratios(rows: list[dict[str, Any]], to_eager: bool = False) -> dict[tuple[Any, ...], Ratio]:
    """Return a dict from the `key` of each ok row to the ratio of its img/s to that of `best_peer` in its case and
    dtype, or with `to_eager` to that of the row `eager` of its case. Rows without such a row are left out."""
    found = {}
    for of_case in by_case(rows).values():
        for row in (row for row in of_case if row["status"] == "ok"):
            other = eager(of_case) if to_eager else best_peer(of_case, arithmetic(row))
            if other is not None:
                found[key(row)] = ratio(row, other)
    return found


def ratio(row: dict[str, Any], peer: dict[str, Any]) -> Ratio:
    """Return the ratio of the two rows' img/s.

    If the rows took turns, their windows are compared pairwise: the median of the ratios, and as the interval the
    smallest and the largest ratio. With seven independent windows this interval contains the true median in 98 of 100
    cases, whatever the distribution (1 - 2 / 2^7). Otherwise the result is the ratio of the medians, with an interval
    from the row's worst window against the peer's best to the row's best against the peer's worst.
    """
    a, b = row["window_img_s"], peer["window_img_s"]
    if row.get("began") is not None and row.get("began") == peer.get("began"):
        paired = [x / y for x, y in zip(a, b, strict=True)]
        return Ratio(statistics.median(paired), min(paired), max(paired))
    return Ratio(row["img_s"] / peer["img_s"], min(a) / max(b), max(a) / min(b))
