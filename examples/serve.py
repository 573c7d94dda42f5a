"""Serve a net over HTTP: POST an image, and get its classes and scores as JSON.

    python examples/serve.py --weights out/finetune/best.pt
    curl --data-binary @IMAGE http://127.0.0.1:8000/classify
    curl http://127.0.0.1:8000/health

Up to --batch requests that arrive within --wait ms of the first are answered by one call of the net. The net runs
through `fastres.optimize` and is prepared for all batch sizes before the port opens. SIGTERM and Ctrl-C stop the
server: it accepts no more connections, answers the requests in flight and exits with status 0.
"""

import argparse
import asyncio
import io
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated

import torch
from torchvision.transforms.v2 import functional as tvf

import fastres
from fastres.evaluate import Predictor, Views
from fastres.images import ImageError, opened, read_image
from fastres.pretrained import load_predictor
from fastres.train.data import by_channel

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from starlette.requests import ClientDisconnect
except ImportError as error:
    sys.exit(f"serve.py needs FastAPI and uvicorn ({error}): pip install 'fastres[serve]'")

READ_S, FINISH_S = 30, 30  # time limits: to receive an image, and to answer the requests in flight at shutdown
PIXELS, RATIO = 50_000_000, 20  # limits of an image: a small file can have many pixels, or need many when resized


class Upload(io.BytesIO):
    def __str__(self):
        return "the upload"  # its name in the error messages of fastres.images


class Net:
    def __init__(self, weights, model, batch):
        if weights is None:
            net = fastres.resnet18().to("cuda" if torch.cuda.is_available() else "cpu")
            self.predict, self.name = Predictor(net, Views(), by_channel(), fast=True), "resnet18 with random weights"
            self.classes = [str(k) for k in range(1000)]
        else:
            self.predict, self.name, self.classes = load_predictor(weights, model)
        ((preprocess, net),), side = self.predict.members, self.predict.views.size
        self.channels, self.images, self.calls = len(preprocess.mean), 0, 0
        self.sizes = sorted({min(2**k, batch) for k in range(8)})  # batches are padded to the next of these sizes
        for size in self.sizes:
            images = torch.zeros(size, self.channels, side, side, dtype=torch.uint8, device=self.predict.device)
            net.ready(preprocess(images))

    def decode(self, data):
        """Decode the bytes of an image file to uint8 [C, side, side]. Raises ImageError."""
        with opened(Upload(data)) as image:
            width, height = image.size
        if width * height > PIXELS or max(width, height) > RATIO * min(width, height):
            raise ImageError(f"{width}x{height}: up to {PIXELS:,} pixels and sides up to {RATIO}:1 are accepted")
        image = read_image(Upload(data), "L" if self.channels == 1 else "RGB")
        return self.predict.views.prepare(tvf.pil_to_tensor(image))

    def answer(self, images):
        """Return a list with the scores of each image."""
        size = next(size for size in self.sizes if size >= len(images))
        scores = self.predict(torch.stack(images + images[:1] * (size - len(images)))).tolist()
        self.images, self.calls = self.images + len(images), self.calls + 1
        return scores[: len(images)]


def application(net, options):
    decoders, caller = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
    decoded = asyncio.Queue()  # (image, future of its scores)
    inside = 0  # number of requests in flight

    async def work():
        while True:
            batch = [await decoded.get()]
            if decoded.qsize() < options.batch - 1:
                await asyncio.sleep(options.wait / 1000)
            batch += [decoded.get_nowait() for _ in range(min(decoded.qsize(), options.batch - 1))]
            images, futures = map(list, zip(*batch, strict=True))
            try:
                answers = await asyncio.get_running_loop().run_in_executor(caller, net.answer, images)
            except Exception as error:  # fail only the requests of this batch
                answers = [error] * len(batch)
            for future, scores in zip(futures, answers, strict=True):
                if not future.cancelled():
                    (future.set_exception if isinstance(scores, Exception) else future.set_result)(scores)

    @asynccontextmanager
    async def lifespan(_):
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(title="fastres", lifespan=lifespan)

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
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(decoders, net.decode, data)
            decoded.put_nowait((image, future := loop.create_future()))
            scores = await future
        except ClientDisconnect:
            raise HTTPException(400, "the connection was closed before the image was complete") from None
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the image did not arrive within {READ_S} s") from None
        except ImageError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            inside -= 1
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top]
        return {"classes": [{"name": net.classes[k], "score": scores[k]} for k in best]}

    async def body(request):
        """Return the request's body, at most --limit MiB.

        A longer body is read to its end, too, but not kept: a client that is still sending would not see the answer.
        """
        data, limit = bytearray(), int(options.limit * 2**20)
        async for chunk in request.stream():
            data += chunk[: limit + 1 - len(data)]
        if len(data) > limit:
            raise HTTPException(413, f"the image has more than {options.limit:g} MiB")
        return bytes(data)

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FILE_OR_NAME", help="as for `fastres predict` (default: random weights)")
    parser.add_argument("--model", metavar="NAME", help="resnet50, cifar-20, ... (default: that of the weights)")
    parser.add_argument("--batch", type=int, default=8, help="most images per call of the net (default: 8)")
    parser.add_argument("--wait", type=float, default=5, help="ms that an image waits for others (default: 5)")
    parser.add_argument("--queue", type=int, default=64, help="most requests in flight; more get a 503 (default: 64)")
    parser.add_argument("--limit", type=float, default=10, help="most MiB of an upload (default: 10)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for any free port (default: 8000)")
    options = parser.parse_args()
    if options.batch not in range(1, 129) or options.port not in range(65536) or options.queue < 1:
        parser.error("--batch must be from 1 to 128, --port from 0 to 65535, --queue at least 1")
    if not options.wait >= 0 or not options.limit > 0:
        parser.error("--wait must be at least 0, --limit above 0")
    if options.model and options.weights is None:
        parser.error("--model needs --weights")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the preparation ends it without a traceback
    settings = {"host": options.host, "port": options.port, "timeout_graceful_shutdown": FINISH_S}
    config = uvicorn.Config(lambda: application(net, options), factory=True, log_level="warning", **settings)
    listener = config.bind_socket()  # exits if the port is in use, before the weights are read
    try:
        net = Net(options.weights, options.model, options.batch)
    except ValueError as error:
        parser.error(str(error))
    listener.listen()
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again after its shutdown
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    url = f"http://{options.host}:{listener.getsockname()[1]}/classify"
    print(f"{net.name} on {net.predict.device}, batches up to {options.batch}: {url}", flush=True)
    server.run(sockets=[listener])
    print(f"stopped after {net.images} images in {net.calls} calls of the net", flush=True)


if __name__ == "__main__":
    main()
