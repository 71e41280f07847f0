"""A server that speaks OpenAI's chat protocol and answers as a script says, faults included."""
import json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text="[[A]]", finish="stop", refusal=None, tops=None, usage=(100, 10)):
    "The body of a chat completion; `tops`: {token: log-probability} of its first token."
    top = [{"token": t, "logprob": lp, "bytes": None} for t, lp in (tops or {}).items()]
    logprobs = {"content": [{"token": top[0]["token"], "logprob": top[0]["logprob"], "bytes": None, "top_logprobs": top}], "refusal": None} if top else None
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub",
            "choices": [{"index": 0, "finish_reason": finish, "logprobs": logprobs, "message": {"role": "assistant", "content": text, "refusal": refusal}}]}
    return body | ({"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}} if usage else {})


class Stub:
    "Answers request i with `script(request, i)`: a body, or (status, body, headers, seconds to wait before)."
    def __init__(self, script):
        self.requests, self.keys, self._lock, stub = [], [], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub._lock:
                    i = len(stub.requests)
                    stub.requests.append(request)
                    stub.keys.append(self.headers["authorization"])
                status, body, headers, seconds = got if isinstance(got := script(request, i), tuple) else (200, got, {}, 0)
                time.sleep(seconds)
                try:
                    self.send_response(status)
                    for name, value in {"content-type": "application/json", **headers}.items(): self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())
                except OSError: pass  # the client has gone

            def log_message(self, *args): pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
