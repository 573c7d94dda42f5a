"""Serve a net over HTTP: POST an image, get classes and scores as JSON.

    python examples/serve.py --weights out/finetune/best.pt
    curl --data-binary @IMAGE http://127.0.0.1:8000/classify
    curl http://127.0.0.1:8000/health
    python examples/serve.py --self-test   # starts, sends itself 16 images at once, prints what came back, stops

Requests that arrive together are answered in one call of the net: a batch is closed when it is full, or --wait ms after
its first image. One thread owns the net, which `fastres.optimize` has made ready for every batch size before the port
opens. SIGTERM and Ctrl-C stop the server: it accepts no more connections, answers the requests in flight and exits with
status 0. Without --weights the net is a ResNet-18 with random weights.
"""

import argparse
import asyncio
import io
import json
import queue
import signal
import socket
import sys
import threading
import time
import urllib.request
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

import fastres
from fastres.evaluate import Views
from fastres.images import ImageError, read_image
from fastres.models import families
from fastres.train.data import Preprocess, by_channel
from fastres.weights import Weights, load_into, read

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from starlette.requests import ClientDisconnect
except ImportError as error:
    sys.exit(f"serve.py needs FastAPI and uvicorn ({error}): pip install 'fastres[serve]'")

READ_S = 30  # seconds that a client may take to send its image
FINISH_S = 30  # seconds that requests in flight are given when the server stops
TRIED = 16  # images that --self-test sends
PIXELS = 50_000_000  # that an image may have: a small file can hold many


class Upload(io.BytesIO):
    def __str__(self):
        return "the upload"  # as error messages of fastres.images name it


class Net:
    """A net behind a queue. `submit` takes an image and gives a Future of its scores; one thread calls the net."""

    def __init__(self, source, model, batch, wait):
        """source, model: as `python -m fastres predict` takes them; None for random weights. wait: in seconds."""
        known = Weights("random weights", {}) if source is None else read(source, model)
        told = [known.meta.get(key) for key in ("family", "depth", "shortcut") if known.meta.get(key) is not None]
        if source is not None and model is None and len(told) < 2:
            raise ValueError(f"{source} doesn't say which net it is of: give --model")
        self.name = model or "-".join(map(str, told)) or "resnet18"
        self.channels = known.channels or 3
        net = families.named(self.name, num_classes=known.classes or 1000, in_channels=self.channels)
        if source is not None:
            load_into(net, known, self.name)
        self.classes = known.names or [str(k) for k in range(known.classes or 1000)]
        self.views = Views("center", **{"size": 224, "resize": 256} | known.preset)
        self.before = by_channel()
        if known.preprocess:
            mean, std = known.preprocess["mean"], known.preprocess["std"]
            self.before = Preprocess(mean, std, torch.zeros(len(mean), len(mean)))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.before.to(self.device)
        net.to(self.device, memory_format=torch.channels_last).eval()
        self.net = fastres.optimize(net, dtype=torch.bfloat16 if self.device.type == "cuda" else None)
        self.sizes = sorted({min(2**k, batch) for k in range(8)})  # a batch is filled up to the next of these
        for size in self.sizes:
            images = torch.zeros(size, self.channels, self.views.size, self.views.size, dtype=torch.uint8)
            self.net.ready(self.before(images.to(self.device)))
        self.wait, self.images, self.calls = wait, 0, 0
        self.queue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def decode(self, data):
        """The bytes of an image file -> uint8 [C, size, size]. Raises ImageError or ValueError."""
        image = read_image(Upload(data), "L" if self.channels == 1 else "RGB")
        return self.views.prepare(tvf.pil_to_tensor(image))

    def submit(self, image):
        future = Future()
        self.queue.put((image, future))
        return future

    def stop(self):
        """Returns when all that was submitted is answered."""
        self.queue.put(None)
        self.thread.join()

    def _work(self):
        while (item := self.queue.get()) is not None:
            batch, end = [], time.monotonic() + self.wait
            while item is not None:
                batch.append(item)
                if len(batch) == self.sizes[-1]:
                    break
                try:
                    item = self.queue.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
            if item is None:
                self.queue.put(None)  # after this batch
            batch = [(image, future) for image, future in batch if future.set_running_or_notify_cancel()]
            try:
                scores = self._call([image for image, _ in batch]) if batch else []
                for (_, future), row in zip(batch, scores, strict=True):
                    future.set_result(row)
            except Exception as error:  # these requests fail, the next ones needn't
                for _, future in batch:
                    future.set_exception(error)

    @torch.inference_mode()
    def _call(self, images):
        size = next(size for size in self.sizes if size >= len(images))
        filled = torch.stack(images + images[:1] * (size - len(images))).to(self.device)
        scores = self.net(self.before(filled)).float().softmax(1)[: len(images)].tolist()
        self.images, self.calls = self.images + len(images), self.calls + 1
        return scores


def application(net, options):
    app = FastAPI(title="fastres")
    decoders = ThreadPoolExecutor(2)
    inside = 0  # requests between their first byte and their answer

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": net.name, "waiting": inside, "images": net.images, "calls": net.calls}

    @app.post("/classify")
    async def classify(request: Request, top: Annotated[int, Query(ge=1)] = 5):
        nonlocal inside
        if inside >= options.queue:
            raise HTTPException(503, f"{inside} requests are waiting already; try again", {"Retry-After": "1"})
        inside += 1
        try:
            data = await asyncio.wait_for(body(request), READ_S)
            image = await asyncio.get_running_loop().run_in_executor(decoders, net.decode, data)
            scores = await asyncio.wrap_future(net.submit(image))
        except ClientDisconnect:
            raise HTTPException(400, "the connection was closed before the image was complete") from None
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the image didn't arrive within {READ_S} s") from None
        except ImageError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            inside -= 1
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top]
        return {"classes": [{"name": net.classes[k], "score": scores[k]} for k in best]}

    async def body(request):
        """All of it is read, or a client that is still sending would not see the answer; up to the limit is kept."""
        data, limit = bytearray(), options.limit * 2**20
        async for chunk in request.stream():
            data += chunk[: int(limit) + 1 - len(data)]
        if len(data) > limit:
            raise HTTPException(413, f"the image has more than {options.limit:g} MiB")
        return bytes(data)

    return app


def try_it(url, server):
    """Sends all images at once and prints what came back."""
    try:
        file = io.BytesIO()
        Image.effect_noise((320, 240), 90).save(file, "jpeg")

        def send(path, data):
            with urllib.request.urlopen(url + path, data, timeout=60) as answer:
                return json.load(answer)

        with ThreadPoolExecutor(TRIED) as clients:
            answers = list(clients.map(send, ["/classify?top=2"] * TRIED, [file.getvalue()] * TRIED))
        print(json.dumps(answers[0]))
        print(f"{len(answers)} requests: {send('/health', None)}")
    except OSError as error:
        print(f"serve.py: {error}", file=sys.stderr)
    finally:
        server.should_exit = True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE_OR_NAME", help="as for `fastres predict` (default: random weights)")
    parser.add_argument("--model", metavar="NAME", help="resnet50, cifar-20, ... (default: as the weights say)")
    parser.add_argument("--batch", type=int, default=8, help="images per call at most (default: 8)")
    parser.add_argument("--wait", type=float, default=5, help="ms that an image waits for others (default: 5)")
    parser.add_argument("--queue", type=int, default=64, help="requests at a time, more get status 503 (default: 64)")
    parser.add_argument("--limit", type=float, default=10, help="MiB of an upload (default: 10)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    parser.add_argument("--self-test", action="store_true", help="send 16 images at once, print the answers, stop")
    options = parser.parse_args()
    if not 1 <= options.batch <= 128 or not options.wait >= 0 or options.queue < 1 or not options.limit > 0:
        parser.error("--batch is from 1 to 128, --wait from 0, --queue from 1, --limit above 0")
    if not 0 <= options.port < 65536:
        parser.error(f"--port {options.port}: 0 to 65535 are accepted")
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, 0 if options.self_test else options.port))  # taken: known before anything is read
        net = Net(options.weights, options.model, options.batch, options.wait / 1000)
        listener.listen(2048)
    except OSError as error:
        parser.error(f"--host {options.host} --port {options.port}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    Image.MAX_IMAGE_PIXELS = PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    url = f"http://{options.host}:{listener.getsockname()[1]}"
    app = application(net, options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=FINISH_S))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal that stopped it once more
    print(f"{net.name} on {net.device}, batches up to {options.batch}: {url}/classify", flush=True)
    if options.self_test:
        threading.Thread(target=try_it, args=(url, server)).start()
    server.run(sockets=[listener])
    net.stop()
    if options.self_test and net.images < TRIED:
        sys.exit(f"serve.py: the self-test failed: {net.images} of {TRIED} images were answered")
    print(f"stopped after {net.images} images in {net.calls} calls of the net", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while the net is made ready
        sys.exit(130)
