"""The examples run from another folder and with small settings, refuse wrong input, and can be interrupted."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from binary import record
from PIL import Image
from tolerances import SERVED

import fastres
from fastres.models import families
from fastres.ops import conv_bn, dispatch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {"serve.py": ("fastapi", "uvicorn"), "train_loop.py": ("sklearn",), "timm_resnet.py": ("timm",)}
ON_A_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
if "PYTEST_XDIST_WORKER" in os.environ:
    ON_A_CPU["OMP_NUM_THREADS"] = "1"


def run(folder: Path, *command: str | Path, status: int = 0) -> str:
    """Run `python examples/...` (or -m fastres). Return its stdout, or its stderr if it should fail."""
    first, *rest = map(str, command)
    program = ["-m", "fastres", first] if first in ("eval", "predict") else [str(EXAMPLES / first)]
    words = [sys.executable, *program, *rest]
    done = subprocess.run(words, cwd=folder, env=ON_A_CPU, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def ended(monkeypatch: pytest.MonkeyPatch, folder: Path, *command: str) -> Any:
    """Return the exit status of an example that does no work. It runs in this process, where torch is loaded."""
    for package in NEEDS.get(command[0], ()):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / command[0]), *command[1:]])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ending:
        module(command[0].removesuffix(".py")).main()
    return ending.value.code


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_the_page_names_every_example() -> None:
    named = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_tells_commands_and_defaults(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, tmp_path, path.name, "--help") == 0
    said = capsys.readouterr().out
    assert f"python examples/{path.name}" in said
    options = re.findall(r"^  (--\w.*(?:\n {10,}.*)*)", said, re.MULTILINE)
    assert options
    assert [each for each in options if "default" not in each and not each.startswith("--torchvision")] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("first_look.py --batch 0", "--batch must be at least 1"),
        ("train_loop.py --lr 0", "--lr positive"),
        ("finetune.py --data nowhere", "--data nowhere: .*it must contain train/<class>/ and val/<class>/"),
        ("finetune.py --weights nowhere", "nowhere does not exist, neither as a file nor as torchvision weights"),
        ("finetune.py --weights text", "text is truncated, damaged or not a file of weights"),
        ("finetune.py --freeze", "--freeze needs --weights"),
        ("finetune.py --out text", "can't write checkpoints to text: File exists"),
        ("serve.py --weights text", "text is truncated, damaged or not a file of weights"),
        ("serve.py --model resnet18", "--model needs --weights"),
        ("serve.py --port 65536", "--port from 0 to 65535"),
        ("serve.py --batch 0", "--batch must be from 1 to 128"),
        ("detector.py --size 8", "--size at least 128"),
        ("timm_resnet.py --model resnet19", "timm has no such net"),
        ("compile_backend.py --inner clang", "invalid choice: 'clang'"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("root:x:0:0:root:/root:/bin/bash\nthis is a text\n")
    assert ended(monkeypatch, tmp_path, *command.split()) == 2
    error = capsys.readouterr().err
    assert re.search(f"^{command.split()[0]}: error: .*{said}", error, re.MULTILINE), error


def test_first_look_says_what_runs_fused_and_what_it_saves(tmp_path: Path) -> None:
    few = "--depth 18 --batch 2 --size 64 --rounds 4"
    said = run(tmp_path, "first_look.py", *few.split())
    assert "9 of 9 blocks and stems of resnet18: plain PyTorch" in said
    assert "eager PyTorch: 45 (20 BatchNorms, 17 ReLUs, 8 additions)" in said
    assert "fastres.optimize: 0\n" in said
    assert "layer1.0.conv1" in said
    eager, fused = numbers(said, r"(?:eager PyTorch|fused): (\S+) MiB")
    assert 0.5 * eager < fused < 0.75 * eager
    assert re.search(r"fastres.optimize is \d+\.\d+ x as fast \(median", said)


def test_first_look_counts_the_passes_of_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without oneDNN, `optimize` folds only the BatchNorms, and the other operations stay separate."""
    monkeypatch.setattr(
        sys, "argv", ["first_look.py", "--depth", "18", "--batch", "1", "--size", "64", "--rounds", "4"]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.backends.mkldnn.flags(enabled=False):
        module("first_look").main()
    assert "fastres.optimize: 25\n" in capsys.readouterr().out


@pytest.mark.parametrize("depth", [18, 50])
def test_first_look_counts_what_the_fused_path_keeps(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for machines without a GPU agrees with the tensors that the fused blocks save for autograd."""
    look = module("first_look")

    def built() -> list[Any]:
        with torch.device("meta"):
            net, images = getattr(fastres, f"resnet{depth}")(), torch.empty(4, 3, 224, 224)
        return [each.to(torch.bfloat16, memory_format=torch.channels_last) for each in (net, images)]

    counted = look.kept_when_fused(*built())
    conv_bn.conv_bn.cache_clear()
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    net, images = built()
    net.fc = torch.nn.Identity()
    with record():
        kept = look.kept_by_autograd(net, images)
    conv_bn.conv_bn.cache_clear()
    assert 0.99 * kept < counted <= kept


def test_one_import_changed_and_the_same_losses(tmp_path: Path) -> None:
    few = ("train_loop.py", "--epochs", "1", "--batch", "128")
    ours, theirs = run(tmp_path, *few), run(tmp_path, *few, "--torchvision")
    assert ours == theirs
    assert numbers(ours, r"loss (\S+),")[0] < np.log(10)


@pytest.mark.extra
def test_train_loop_learns(tmp_path: Path) -> None:
    said = run(tmp_path, "train_loop.py")
    losses = numbers(said, r"loss (\S+),")
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert numbers(said, r"accuracy (\S+)%")[-1] > 90


def test_finetune_writes_what_eval_and_predict_read(tmp_path: Path) -> None:
    few = ("finetune.py", "--size", "48", "--epochs", "1", "--out")
    said = run(tmp_path, *few, "a")
    data, best = Path("a/photographs"), Path("a/best.pt")
    (accuracy,) = numbers(said, r"best epoch: (\S+)%")
    told = run(tmp_path, "eval", "--checkpoint", best, "--data", data)
    assert numbers(told, r"top-1 accuracy (\S+)%") == [accuracy]
    assert "center crop of 48, shorter side 55" in told
    told = run(tmp_path, "predict", data / "val" / "rings" / "97.jpg", "--weights", best, "--top", "3")
    assert sorted(re.findall(r"%  (\w+)", told)) == ["checks", "rings", "stripes"]

    # Start from these weights with everything frozen except the classifier, including the BatchNorm statistics.
    run(tmp_path, *few, "b", "--data", data, "--weights", best, "--freeze")
    before, after = (torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in "ab")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.extra
def test_finetune_starts_from_a_state_dict_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state dict has a thousand classes. Then a broken image, and a class that only val/ has, are refused."""
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    for part, name in ((part, name) for part in ("train", "val") for name in ("a", "b")):
        (tmp_path / "data" / part / name).mkdir(parents=True)
        Image.effect_noise((64, 64), 90).save(tmp_path / "data" / part / name / "1.png")
    options = "--size 32 --epochs 1 --data data --weights theirs.pth --freeze"
    few = ("finetune.py", *options.split())
    run(tmp_path, *few)
    trained = torch.load(tmp_path / "out/finetune/best.pt", weights_only=True)
    assert trained["meta"]["classes"] == ["a", "b"]
    assert torch.equal(trained["model"]["conv1.weight"], net.conv1.weight)
    assert trained["model"]["fc.weight"].shape == (2, 512)
    (tmp_path / "data/train/b/2.png").write_text("no image")
    error = run(tmp_path, *few, "--workers", "1", status=2)
    assert "2.png is not a readable image" in error.splitlines()[-1]
    (tmp_path / "data/val/c").mkdir()
    Image.effect_noise((64, 64), 90).save(tmp_path / "data/val/c/1.png")
    assert ended(monkeypatch, tmp_path, *few) == 2
    assert "val/ has ['a', 'b', 'c']" in capsys.readouterr().err


def test_an_interrupted_finetune_leaves_a_whole_file(tmp_path: Path) -> None:
    """Ctrl-C after the first epoch gives one line and status 130, and leaves a complete checkpoint."""
    words = [sys.executable, EXAMPLES / "finetune.py", "--size", "32", "--epochs", "10000"]
    started: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=ON_A_CPU, **started) as process:
        assert process.stdout is not None
        while "epoch 1 of" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "finetune.py: interrupted"
    assert "model" in torch.load(tmp_path / "out/finetune/best.pt", weights_only=True)
    assert [path.name for path in (tmp_path / "out/finetune").glob(".*")] == []


@pytest.mark.extra
def test_an_interrupted_example_shows_no_traceback(tmp_path: Path) -> None:
    words = [sys.executable, EXAMPLES / "train_loop.py", "--epochs", "10000"]
    started: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=ON_A_CPU, **started) as process:
        assert process.stdout is not None
        assert "epoch 1" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (-signal.SIGINT, "")


def test_the_detector_keeps_losses_boxes_and_scores(tmp_path: Path) -> None:
    said = run(tmp_path, "detector.py", "--images", "1", "--size", "128")
    assert "converted: 17, kept: 0" in said  # 16 blocks, and the container for the stem
    assert "restored: 17, kept: 0" in said
    assert "backbone.body.layer4.2" in said
    assert "17 of them run plain PyTorch" in said
    assert "same losses, same boxes and scores" in said
    assert len(numbers(said, r"loss_\w+: (\S+) converted")) == 4


def test_timms_nets_are_converted_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    said = run(tmp_path, "timm_resnet.py", "--model", "resnet18", "--size", "64")
    assert "resnet18, converted: 9, kept: 0" in said
    assert numbers(said, r"convert: scores differ from timm's by (\S+)") == [0.0]
    assert re.search(r"seresnet50 +1 converted, 16 stay timm's: it contains SEModule", said)
    assert ended(monkeypatch, tmp_path, "timm_resnet.py", "--model", "vit_tiny_patch16_224", "--size", "224") == 2
    assert "error: --model vit_tiny_patch16_224: optimize() does not support" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--rewrite always --inner eager", marks=pytest.mark.extra),
        "--train --rewrite always --inner eager",
        pytest.param("", marks=pytest.mark.extra),
        pytest.param("--train --rewrite always", marks=pytest.mark.extra),
    ],
)
def test_compile_backend_shows_what_is_rewritten(options: str, tmp_path: Path) -> None:
    said = run(tmp_path, "compile_backend.py", *options.split())
    assert "blocks.0.conv1" in said
    assert said.count("differ from eager PyTorch's") == (2 if "--train" in options else 1)


# serve.py over real HTTP.


class Server:
    """A running serve.py. url: its address, once it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found is not None, line
        self.url = found[0]

    def ask(self, path: str, data: bytes | None = None) -> tuple[int, Any]:
        """Send a request and return (status, JSON)."""
        try:
            with urllib.request.urlopen(self.url + path, data, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def health(self) -> Any:
        return self.ask("/health")[1]

    def until(self, waiting: int) -> None:
        """Wait until the given number of requests is in flight."""
        end = time.monotonic() + 30
        while self.health()["waiting"] != waiting:
            assert time.monotonic() < end, self.health()
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out, error


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    words = [sys.executable, EXAMPLES / "serve.py", "--port", "0", *options]
    started: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, env=ON_A_CPU, **started) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.pt, a small net that distinguishes its images, and the images 0.png to 11.png."""
    for package in NEEDS["serve.py"]:
        pytest.importorskip(package)
    where = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    net = families.named("cifar-20").train()
    for _ in range(3):  # so that the BatchNorm statistics match the weights
        net(torch.randn(16, 3, 32, 32))
    meta = {"family": "cifar", "depth": 20, "classes": [f"class {k}" for k in range(10)], "val_size": 32, "resize": 36}
    preprocess = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.3)}
    torch.save({"model": net.state_dict(), "meta": meta, "preprocess": preprocess}, where / "net.pt")
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 50)).save(where / f"{i}.png")
    return where


def test_served_answers_are_those_of_predict_and_come_in_batches(folder: Path) -> None:
    files = [folder / f"{i}.png" for i in range(12)]
    run(folder, "predict", *files, "--weights", "net.pt", "--top", "10", "--csv", "said.csv")
    want: dict[str, dict[str, float]] = {}
    for line in (folder / "said.csv").read_text().splitlines()[1:]:
        path, _, _, name, score = line.split(",")
        want.setdefault(path, {})[name] = float(score)
    with served(folder, "--weights", "net.pt", "--wait", "1000") as server, ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda file: server.ask("/classify?top=10", file.read_bytes()), files))
        health = server.health()
        assert health["images"] == 12
        assert health["calls"] <= 4, "12 images that came at once took more calls than 8 + 4 and a late one or two"
        for file, (status, said) in zip(files, answers, strict=True):
            assert status == 200
            scores = [each["score"] for each in said["classes"]]
            assert scores == sorted(scores, reverse=True)
            got = {each["name"]: each["score"] for each in said["classes"]}
            assert got == pytest.approx(want[str(file)], abs=SERVED)
        assert len({max(each, key=each.__getitem__) for each in want.values()}) > 1, "all images are of one class"
        status, out, error = server.end(signal.SIGINT)
    assert (status, error) == (0, "")
    assert f"stopped after 12 images in {health['calls']} calls" in out


def test_a_server_refuses_with_status_and_words(folder: Path) -> None:
    """Every kind of bad request gets its status and a JSON message. The server keeps running, with an empty log."""
    picture = (folder / "0.png").read_bytes()
    huge, large, thin, small = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "png")
    Image.new("1", (8_000, 8_000)).save(large, "png")
    Image.new("1", (10_000_000, 2)).save(thin, "png")
    Image.new("RGB", (1, 1)).save(small, "png")
    assert len(huge.getvalue()) < 2**20
    with served(folder, "--weights", "net.pt", "--limit", "1", "--wait", "0") as server:
        for data, code, said in [
            (b"no image", 400, "the upload is not a readable image"),
            (b"", 400, "the upload is not a readable image"),
            (picture[: len(picture) // 2], 400, "the upload is not a readable image"),
            (huge.getvalue(), 400, "exceeds limit"),
            (large.getvalue(), 400, "8000x8000: up to 50,000,000 pixels"),
            (thin.getvalue(), 400, "10000000x2: up to 50,000,000 pixels and sides up to 20:1 are accepted"),
            (bytes(2**20), 400, "not a readable image"),
            (bytes(2**20 + 1), 413, "more than 1 MiB"),
            (bytes(2**25), 413, "more than 1 MiB"),
        ]:
            status, answer = server.ask("/classify", data)
            assert (status, said in answer["detail"]) == (code, True), answer
        assert server.ask("/classify?top=0", picture)[0] == 422
        assert server.ask("/nowhere")[0] == 404
        assert len(server.ask("/classify?top=99", small.getvalue())[1]["classes"]) == 10

        # A client that disconnects in the middle of its upload frees its place in the queue.
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
            server.until(waiting=1)
        server.until(waiting=0)
        assert server.ask("/classify", picture)[0] == 200
        status, _, error = server.end(signal.SIGTERM)
    assert (status, error) == (0, "")


def test_a_full_server_turns_away_and_a_stopped_one_ends_its_calls(folder: Path) -> None:
    """While two requests fill the queue, a third is refused. After SIGTERM, the two are answered and no new ones are
    accepted."""
    picture = (folder / "0.png").read_bytes()
    with (
        served(folder, "--weights", "net.pt", "--queue", "2", "--wait", "2000") as server,
        ThreadPoolExecutor(2) as clients,
    ):
        two = [clients.submit(server.ask, "/classify", picture) for _ in range(2)]
        server.until(waiting=2)
        status, answer = server.ask("/classify", picture)
        assert (status, answer["detail"]) == (503, "2 requests are waiting already; try again")
        server.process.send_signal(signal.SIGTERM)
        assert [each.result()[0] for each in two] == [200, 200]
        out, error = server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        assert error == ""
        assert "stopped after 2 images in 1 calls" in out
        with pytest.raises(urllib.error.URLError):
            server.health()


def test_serve_may_be_stopped_before_uvicorn_runs(folder: Path) -> None:
    early = "import os, signal, runpy, uvicorn; run = uvicorn.Server.run; uvicorn.Server.run = lambda *a, **k: "
    early += f"(os.kill(os.getpid(), signal.SIGTERM), run(*a, **k)); runpy.run_path({str(EXAMPLES / 'serve.py')!r}, "
    early += "run_name='__main__')"
    words = [sys.executable, "-c", early, "--weights", "net.pt", "--port", "0"]
    done = subprocess.run(words, cwd=folder, env=ON_A_CPU, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stopped after 0 images" in done.stdout


def test_serve_says_that_the_port_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before the weights are read: they don't exist here."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert ended(monkeypatch, tmp_path, "serve.py", "--weights", "nowhere", "--port", port) == 3
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.extra
def test_serve_says_that_weights_are_random(folder: Path) -> None:
    with served(folder) as server:
        status, answer = server.ask("/classify?top=1", (folder / "0.png").read_bytes())
        assert (status, len(answer["classes"])) == (200, 1)
        assert server.health()["model"] == "resnet18 with random weights"


def test_serve_without_fastapi_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit, match=r"needs FastAPI and uvicorn .*: pip install 'fastres\[serve\]'"):
        module("serve")
