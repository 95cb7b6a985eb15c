"""A small OpenAI-compatible server that counts what it is paid for, and a reverse proxy that breaks things on the way to it."""
import json, threading, time
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass
    def handle(self):
        try: super().handle()
        except (ConnectionError, ValueError): self.close_connection = True
    def body(self): return self.rfile.read(int(self.headers.get('content-length', 0)))

    def answer(self, status, data, headers=()):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for k, v in [('content-type', 'application/json'), ('content-length', str(len(data))), *headers]: self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def cut(self, first=b''):
        "Close the connection, possibly in the middle of an answer."
        self.close_connection = True
        if first: self.wfile.write(first); self.wfile.flush()
        self.connection.close()


class _Server:
    "A threading server on a free port of 127.0.0.1."
    def __enter__(self):
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('H', (self.Handler,), dict(owner=self)))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class Upstream(_Server):
    "Answers deterministically, honours `Idempotency-Key`, and counts completions for each prompt in `served`."
    def __init__(self, model=None, key='', delay=0., reject=lambda ask: None, echo=True):
        self.model, self.key, self.delay, self.reject, self.echo = model, key, delay, reject, echo
        self.served, self.known, self.lock, self.asks, self.at_once, self.most = Counter(), {}, threading.Lock(), [], 0, 0

    class Handler(_Handler):
        def do_POST(self):
            up, ask = self.owner, json.loads(self.body())
            if up.key and self.headers.get('authorization') != f'Bearer {up.key}': return self.answer(401, dict(error=dict(message=f'Incorrect API key provided: {self.headers.get("authorization")}', code='invalid_api_key')))
            if (no := up.reject(ask)): return self.answer(*no)
            with up.lock: up.at_once += 1; up.most = max(up.most, up.at_once)
            time.sleep(up.delay)
            done = up.complete(ask, self.headers.get('idempotency-key'), 'chat' in self.path)
            with up.lock: up.at_once -= 1
            self.answer(200, done)

    def complete(self, ask, key, chat):
        with self.lock:
            self.asks.append(ask)
            if key and key in self.known: return self.known[key]
            prompt = ask['messages'][-1]['content'] if chat else ask['prompt']
            self.served[prompt] += 1
            if ask.get('echo') and self.echo: choice = self.echoed(prompt)
            else:
                text = prompt.split()[-1][::-1]
                choice = dict(index=0, finish_reason='stop', **(dict(message=dict(role='assistant', content=text)) if chat else dict(text=text, logprobs=None)))
            self.known[key] = dict(id='x', object='completion', model=ask['model'], choices=[choice], usage=dict(prompt_tokens=len(prompt.split()), completion_tokens=1, total_tokens=1 + len(prompt.split())))
            return self.known[key]

    def echoed(self, prompt):
        "The prompt's tokens with their probabilities under the real model, as vLLM and others return them."
        import torch
        enc = self.model.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = enc['input_ids'], enc['offset_mapping']
        with torch.inference_mode(): logp = self.model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        values = [None] + [logp[i - 1, t].item() for i, t in enumerate(ids) if i]
        best = [None] + [{str(logp[i - 1].argmax().item()): logp[i - 1].max().item()} for i in range(1, len(ids))]
        last = logp[-1].argmax().item()
        return dict(index=0, finish_reason='length', text=prompt, logprobs=dict(tokens=[prompt[a:b] for a, b in spans] + [self.model.tokenizer.decode([last])], token_logprobs=values + [logp[-1].max().item()],
                    top_logprobs=best + [{str(last): logp[-1].max().item()}], text_offset=[a for a, _ in spans] + [len(prompt)]))


class FaultProxy(_Server):
    """Forwards to `upstream`; `plan(n, ask)` names the fault of the n-th request (from 0), or None.

    busy: 429 with Retry-After in seconds · date: the same as an HTTP date · broken: 500 · slow: no answer for `pause` seconds
    cut: the connection ends before anything is forwarded · lost: it ends after the upstream has answered
    garbage: 200 with something that is no JSON · half: the upstream's answer, cut in the middle
    """
    def __init__(self, upstream, plan, wait=0.1, pause=1.5):
        self.upstream, self.plan, self.wait, self.pause = urlsplit(upstream), plan, wait, pause
        self.n, self.lock, self.faults = 0, threading.Lock(), Counter()

    class Handler(_Handler):
        def do_POST(self):
            p, data = self.owner, self.body()
            with p.lock: n = p.n; p.n += 1
            fault = p.plan(n, json.loads(data))
            with p.lock: p.faults[fault] += 1
            if fault == 'busy': return self.answer(429, dict(error=dict(message='slow down')), [('Retry-After', str(p.wait))])
            if fault == 'date': return self.answer(429, dict(error=dict(message='slow down')), [('Retry-After', formatdate(time.time() + p.wait, usegmt=True))])
            if fault == 'broken': return self.answer(500, dict(error=dict(message='out of order')))
            if fault == 'garbage': return self.answer(200, b'<html>Welcome to the hotel network</html>')
            if fault == 'slow': time.sleep(p.pause); return self.cut()
            if fault == 'cut': return self.cut()
            status, body = p.forward(self.path, data, self.headers)
            if fault == 'lost': return self.cut()
            if fault == 'half': return self.answer(status, body[:len(body) // 2])
            self.answer(status, body)

        def do_GET(self): self.answer(404, dict(error=dict(message='nothing here')))

    def forward(self, path, data, headers):
        c = HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=60)
        try:
            c.request('POST', path, data, {k: v for k, v in headers.items() if k.lower() in ('authorization', 'content-type', 'idempotency-key')})
            r = c.getresponse()
            return r.status, r.read()
        finally: c.close()


@contextmanager
def broken_upstream(plan, wait=0.1, pause=1.5, **up):
    "An `Upstream` behind a `FaultProxy`."
    with Upstream(**up) as upstream, FaultProxy(upstream.url, plan, wait, pause) as proxy: yield upstream, proxy
