"""`python -m fastres summary`: the paper's Table 1."""

from __future__ import annotations

import pytest

from fastres.cli.main import main
from fastres.models.families import FAMILIES


def rows(text: str) -> dict[str, list[str]]:
    """Return the lines of the table as cells, split at two or more spaces, by their first cell."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_resnet_34_is_table_1_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--depth", "34"]) == 0
    printed, said = capsys.readouterr()
    assert not said
    table = rows(printed)
    assert table["conv1"] == ["112x112", "7x7, 64, stride 2", "118,013,952", "9,536"]
    assert "3x3 max pool, stride 2" in table
    assert table["conv2_x"][:2] == ["56x56", "[3x3, 64; 3x3, 64] x 3"]
    assert table["conv3_x"][:2] == ["28x28", "[3x3, 128; 3x3, 128] x 4"]
    assert table["conv4_x"][:2] == ["14x14", "[3x3, 256; 3x3, 256] x 6"]
    assert table["conv5_x"][:2] == ["7x7", "[3x3, 512; 3x3, 512] x 3"]
    assert table["1x1"] == ["average pool, 1000-d fc", "512,000", "513,000"]
    assert table["total"][0] == "3,644,493,824"
    assert "FLOPs (multiply-adds): 3.644e9, paper 3.6e9, +1.2%" in printed
    assert "top-1 25.03%, top-5 7.76%" in printed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_columns_of_every_family_add_up(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    depth = FAMILIES[family].depths[1]
    assert main(["summary", "--family", family, "--depth", str(depth)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{depth} layers, family {family}" in lines[0]
    table = lines[2 : [*lines, ""].index("", 2)]
    shares = [line.split() for line in table[2:-2] if "max pool" not in line]
    assert len({len(line) for line in table if "max pool" not in line}) == 1  # all lines end in the same column
    for column in (-1, -2):
        numbers = [int(cells[column].replace(",", "")) for cells in [*shares, table[-1].split()]]
        assert sum(numbers[:-1]) == numbers[-1]


def test_options_reach_the_net(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", "--depth", "50", "--shortcut", "C", "--size", "65"])
    text = capsys.readouterr().out
    assert "50 layers, family paper, shortcut C, images 65x65" in text
    assert rows(text)["conv5_x"][0] == "3x3"
    assert rows(text)["conv2_x"][1] == "[1x1, 64; 3x3, 64; 1x1, 256] x 3"
    assert "paper 3.8e9" not in text
