"""Summarize pytest's logs from a machine in one record of its tests.

    python -m pytest -v -n 14 -k every_tile 2>&1 | tee out/tiles.log
    python bench/pytest_logs.py out/tiles.log out/nets.log --record bench/records

Reads logs of `pytest -v`, with or without pytest-xdist, in the order of the dates in them. If a test ran several times,
its last result counts, except that a skip never replaces another result. Tests that failed earlier and passed later are
listed. A file that pytest could not collect counts as failed. tests/conftest.py prints the number of tests in each file
at the end of a run; if a run was killed before that, the number is unknown. The text of the record from the heading "##
Failures and their mends" on is written by hand and is kept.

The exit status is 1 if the last result of a test is a failure or if a run ended before its last test, else 0.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

BY_HAND = "## Failures and their mends"
RESULTS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped", "XFAIL": "skipped"}
RESULTS["XPASS"] = "passed"
# With pytest-xdist a line is "[gw3] [ 12%] PASSED tests/x.py::y ", without it "tests/x.py::y PASSED   [ 12%]".
SHARED = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({'|'.join(RESULTS)}) (tests/\S+?\.py::.*?) *$")
ALONE = re.compile(rf"^(tests/\S+?\.py::.*?) ({'|'.join(RESULTS)})\b.*\[ *\d+%\] *$")
COLLECTED = re.compile(r"^(?:collecting \.\.\. )?collected (\d+) items?(?:.* (\d+) selected)?")
WORKERS = re.compile(r"^\d+ workers? \[(\d+) items?\]")
UNCOLLECTED = re.compile(r"^ERROR (tests/\S+?\.py)(?: - |$)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Run:
    """One log.

    where: the machine, versions, commit and date, as tests/conftest.py prints them.
    items: the number of tests that were to run.
    results: the result of each test.
    in_files: the number of tests in each file.
    """

    name: str
    where: dict[str, str] = field(default_factory=dict)
    items: int = 0
    results: dict[str, str] = field(default_factory=dict)
    in_files: dict[str, int] = field(default_factory=dict)


def read(path: Path) -> Run:
    """Read a log. Raises ValueError if it contains no results or lacks the line of tests/conftest.py that says where it
    ran."""
    run = Run(path.stem)
    for line in COLOUR.sub("", path.read_text(errors="replace")).splitlines():
        if line.startswith("tested on: "):
            run.where = json.loads(line.partition(": ")[2])
        elif line.startswith("tests in files: "):
            run.in_files = json.loads(line.partition(": ")[2])
        elif found := SHARED.match(line):
            note(run, found[2], found[1])
        elif found := ALONE.match(line):
            note(run, found[1], found[2])
        elif found := UNCOLLECTED.match(line):
            note(run, found[1], "ERROR")
            run.items += 1
        elif found := COLLECTED.match(line):
            run.items += int(found[2] or found[1])
        elif found := WORKERS.match(line):
            run.items += int(found[1])
    if not (run.where and run.items and run.results):
        raise ValueError(f"{path} is not a log of `pytest -v` with results and the line 'tested on: ...'")
    return run


def note(run: Run, test: str, outcome: str) -> None:
    """Add a result. A test that passed but whose teardown failed counts as failed."""
    if run.results.get(test) != "failed":
        run.results[test] = RESULTS[outcome]


def render(runs: list[Run]) -> str:
    """Return the generated part of the record. Raises ValueError if the runs differ in device or versions."""
    first = runs[0].where
    for run in runs:
        for name in first.keys() | run.where.keys():
            if name not in ("date", "commit") and run.where.get(name) != first.get(name):
                raise ValueError(f"{run.name} ran with {name} {run.where.get(name)}, {runs[0].name} {first.get(name)}")
    versions = ", ".join(f"{name} {first[name]}" for name in first if name not in ("device", "date", "commit"))
    lines = [f"# Tests on {first['device']}", "", f"Written by `bench/pytest_logs.py`. {versions}.", ""]
    lines += [
        "| run | began | commit | tests | passed | failed | skipped | not reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        count = Counter(run.results.values())
        numbers = (run.items, count["passed"], count["failed"], count["skipped"], missing(run))
        row = " | ".join(map(str, numbers))
        lines.append(f"| {run.name} | {run.where['date'][:16]} | {run.where['commit'][:10]} | {row} |")
    last, failed_once = final(runs)
    files: dict[str, Counter[str]] = {}
    for test, result in last.items():
        files.setdefault(test.partition("::")[0], Counter())[result] += 1
    lines += ["", "Every test once, by its last run:", ""]
    lines += ["| file | tests | passed | failed | skipped | not run |", "|---|---|---|---|---|---|"]
    held = held_by(runs)
    rows = [(file, files.get(file, Counter()), held.get(file)) for file in sorted(files.keys() | held.keys())]
    for file, count, tests in rows:
        lines.append(f"| {file} | {' | '.join(cells(count, tests))} |")
    known = [tests for _, _, tests in rows if tests is not None]
    total = cells(Counter(last.values()), sum(known) if len(known) == len(rows) else None)
    lines.append(f"| **all** | {' | '.join(f'**{cell}**' for cell in total)} |")
    for title, tests in (
        ("Failed", [test for test, result in last.items() if result == "failed"]),
        ("Failed first, passed after a mend", [test for test in failed_once if last[test] == "passed"]),
    ):
        if tests:
            lines += ["", f"{title}:", "", *(f"- `{test}`" for test in sorted(tests))]
    return "\n".join(lines) + "\n"


def held_by(runs: list[Run]) -> dict[str, int]:
    """Return the number of tests in each file: the largest of all runs, since a run may have collected only some of
    them."""
    held: Counter[str] = Counter()
    for run in runs:
        held |= Counter(run.in_files)
    return dict(held)


def cells(count: Counter[str], tests: int | None) -> list[str]:
    """Return the numbers of tests, in total, passed, failed, skipped and not run; "unknown" if the total isn't
    known."""
    numbers = [count["passed"], count["failed"], count["skipped"]]
    total, rest = ("unknown", "unknown") if tests is None else (tests, tests - sum(numbers))
    return [str(cell) for cell in (total, *numbers, rest)]


def missing(run: Run) -> int:
    """Return the number of tests that a run did not reach before it was stopped."""
    return max(0, run.items - len(run.results))


def final(runs: list[Run]) -> tuple[dict[str, str], set[str]]:
    """Return the last result of every test, and the tests that failed at least once."""
    last: dict[str, str] = {}
    failed: set[str] = set()
    for run in runs:
        last |= {test: result for test, result in run.results.items() if result != "skipped" or test not in last}
        failed |= {test for test, result in run.results.items() if result == "failed"}
    return last, failed


def named_by_gpu(folder: Path, run: Run) -> Path:
    """Return the record's path in `folder`, with the GPU's name written as in tables of tiles."""
    from fastres.kernels.tables import table_file

    return folder / f"{table_file(run.where['device']).stem}-tests.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs of pytest -v")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write the record to FILE, or to <gpu>-tests.md in a folder; default: print it",
    )
    options = parser.parse_args(arguments)
    try:
        runs = sorted(map(read, options.logs), key=lambda run: run.where["date"])
        text = render(runs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.record is None:
        print(text, end="")
    else:
        record = named_by_gpu(options.record, runs[0]) if options.record.is_dir() else options.record
        record.parent.mkdir(parents=True, exist_ok=True)
        old = record.read_text() if record.exists() else ""
        record.write_text(text + ("\n" + BY_HAND + old.partition(BY_HAND)[2] if BY_HAND in old else ""))
    failed = [test for test, result in final(runs)[0].items() if result == "failed"]
    return int(bool(failed) or any(missing(run) for run in runs))


if __name__ == "__main__":
    sys.exit(main())
