"""An engine at the wire that computes: the part of vLLM's protocol that a check uses, by transformers and PEFT on any model.

What an engine may do wrong, it does when told: weigh an adapter otherwise, leave it out, compute with another base, or lay
prompts out in other tokens.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class TorchEngine:
    """Serves `model`, a folder, and the adapters in `folder`, each under the name of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.root, self.folder = model, folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.peft: Any = None
        self.names: set[str] = set()  # known
        self.asked: set[str] = set()  # ever
        self.reset()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.engine = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True, name="torch engine").start()

    def reset(self) -> None:
        self.weight = 1.0  # of an adapter; 0: it is not applied
        self.base_noise = 0.0  # of its base's last norm
        self.lays_out = "{}"  # the last message
        self.hangs_up = False  # on a connection that lies idle, without a word before: once its version was asked for

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def knows(self, name: str) -> bool:
        if name == "tiny" or name in self.names:
            return True
        if not (self.folder / name / "adapter_config.json").is_file():
            return False
        self.names.add(name)
        return True

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        last = {**messages[-1], "content": self.lays_out.format(messages[-1]["content"])}
        laid_out = self.tokenizer.apply_chat_template(
            [*messages[:-1], last], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(laid_out)

    def complete(self, name: str, prompt: str | list[int], at_most: int, goes_on: bool) -> dict[str, Any]:
        import torch

        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        said: list[int] = []
        scores: list[float] = []
        cache = None
        with self._lock, torch.inference_mode(), self._served(name) as model:
            while len(said) < at_most and (goes_on or self.tokenizer.eos_token_id not in said):
                given = torch.tensor([said[-1:] or tokens])
                found = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = found.past_key_values
                score, token = torch.log_softmax(found.logits[0, -1].float(), -1).max(-1)
                said.append(int(token))
                scores.append(float(score))
        return {"text": self.tokenizer.decode(said), "token_ids": said, "logprobs": {"token_logprobs": scores}}

    @contextmanager
    def _served(self, name: str) -> Iterator[Any]:
        norm = self.model.model.norm.weight
        norm.add_(self.base_noise)
        try:
            with self._adapted(name) as model:
                yield model
        finally:
            norm.sub_(self.base_noise)

    @contextmanager
    def _adapted(self, name: str) -> Iterator[Any]:
        from peft import PeftModel

        if name == "tiny" or not self.weight:
            yield self.model
            return
        tuned = PeftModel.from_pretrained(self.model, str(self.folder / name)).eval()
        for module in tuned.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {key: value * self.weight for key, value in module.scaling.items()}
        try:
            yield tuned
        finally:
            tuned.unload()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    engine: TorchEngine


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.server.engine
        if self.path == "/v1/models":
            base = {"id": "tiny", "root": str(engine.root), "parent": None, "max_model_len": 2048}
            loaded = [{"id": one, "root": "/", "parent": "tiny"} for one in sorted(engine.names)]
            self._json(200, {"data": [base, *loaded]})
        elif self.path == "/version":
            self._json(200, {"version": "0.0"})
            self.close_connection = engine.hangs_up
            time.sleep(0.1 if engine.hangs_up else 0)
        else:
            self._json(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        engine = self.server.engine
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/unload_lora_adapter":
            engine.names.discard(body["lora_name"])
            self._json(200, "removed")
            return
        engine.asked.add(body.get("model") or body.get("lora_name"))
        if "model" not in body or not engine.knows(body["model"]):
            self._json(404, {"error": {"message": "no such model"}})
        elif self.path == "/tokenize":
            self._json(200, {"tokens": engine.tokens(body["messages"])})
        else:
            goes_on = body.get("ignore_eos", False)
            self._json(200, {"choices": [engine.complete(body["model"], body["prompt"], body["max_tokens"], goes_on)]})

    def _json(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
