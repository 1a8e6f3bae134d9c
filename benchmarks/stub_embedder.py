"""An embedding server on the loopback that answers at once, with vectors that mean nothing: random ones of length 1.

For what is measured beside the embedding. A text always gets the same vector.
"""

import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

DIMENSION = 384
VECTORS = 512


@contextmanager
def serving_vectors() -> Iterator[str]:
    """-> the name of the embedder, as INGEST_EMBEDDER takes it."""
    rows = np.random.default_rng(0).standard_normal((VECTORS, DIMENSION))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    written = [json.dumps([round(float(number), 5) for number in row]) for row in rows]

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # one connection for all requests

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            places = [zlib.crc32(text.encode()) % VECTORS for text in asked["input"]]
            data = ",".join(f'{{"index":{n},"embedding":{written[place]}}}' for n, place in enumerate(places))
            body = f'{{"data":[{data}]}}'.encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#stub"
    finally:
        server.shutdown()
        server.server_close()
