"""The location of the cache folder, and that all cached files are in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastres.kernels import tables, tiles
from fastres.ops import extension
from fastres.paths import cache_folder
from fastres.train import data


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("FASTRES_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_the_cache_is_in_the_home_folder(home: Path) -> None:
    assert cache_folder() == home / ".cache" / "fastres"


def test_xdg_moves_it_and_fastres_cache_dir_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastres"
    for given, found in (("~/fr", home / "fr"), ("fr", tmp_path / "fr"), (str(tmp_path / "abs"), tmp_path / "abs")):
        monkeypatch.setenv("FASTRES_CACHE_DIR", given)
        assert cache_folder() == found


@pytest.mark.parametrize("invalid", ["", "relative", "~/x"])
def test_a_relative_xdg_folder_counts_as_none(monkeypatch: pytest.MonkeyPatch, home: Path, invalid: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", invalid)
    assert cache_folder() == home / ".cache" / "fastres"


def test_one_folder_for_tables_libraries_and_mean_images(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No file is created outside the folder, or in a folder named `~`."""
    monkeypatch.setenv("FASTRES_CACHE_DIR", "~/fr")
    tables.write_table({}, tables.table_file(tiles.H200.name), tiles.H200)
    assert extension._recipe("cpu", None).library.parent == home / "fr"
    found = {}
    monkeypatch.setattr(data, "_photographs", lambda *given: found.update(cache=given[4]))
    data.load("folder", None, Path())  # type: ignore[arg-type]
    assert found == {"cache": home / "fr"}
    assert [str(path.relative_to(home)) for path in home.rglob("*.json")] == ["fr/tables/nvidia-h200.json"]
    assert os.listdir() == ["home"]


def test_without_a_home_nothing_is_kept_and_reading_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the case in a container whose user has neither a passwd entry nor HOME."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert tables.read_table(tables.table_file("any")) == {}
    moments = data.Moments(1, *(data.torch.zeros(shape) for shape in ((3, 2, 2), (3, 3))))
    with pytest.warns(UserWarning, match="can't be cached in /dev/null"):
        data.keep_moments(cache_folder() / "statistics.npz", moments)
    with pytest.raises(extension.BuildError, match="set FASTRES_CACHE_DIR to a folder that can be written"):
        extension.build("cpu")
    assert os.listdir() == []
