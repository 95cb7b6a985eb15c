"Chromium without a window, for the tests that look at pages."
import json
import os
import subprocess
import time


class Chromium:
    "A headless browser, spoken to through a pipe in the DevTools protocol."
    def __init__(self, program, home):
        (theirs_in, self.out), (self.inp, theirs_out) = os.pipe(), os.pipe()
        options = '--headless --no-sandbox --disable-gpu --disable-background-networking --disable-dev-shm-usage --no-first-run --window-size=1250,640 --remote-debugging-pipe'
        self.process = subprocess.Popen(['bash', '-c', f'exec "$0" {options} --user-data-dir="$1" about:blank 3<&{theirs_in} 4>&{theirs_out}', program, str(home)],
                                        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in); os.close(theirs_out)
        self.rest, self.n, self.session, self.events = b'', 0, None, []
        page = next(t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self.session = self.page = self.call('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network'): self.call(f'{domain}.enable')
        self.call('Target.setAutoAttach', autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def call(self, method, **params):
        self.n += 1
        message = dict(id=self.n, method=method, params=params) | ({'sessionId': self.session} if self.session else {})
        with os.fdopen(os.dup(self.out), 'wb') as f: f.write(json.dumps(message).encode() + b'\0')
        while True:
            m = self.read()
            if m.get('id') == self.n:
                if 'error' in m: raise RuntimeError(m['error']['message'])
                return m['result']
            self.events.append(m)

    def read(self):
        while b'\0' not in self.rest:
            block = os.read(self.inp, 1 << 20)
            if not block: raise RuntimeError('the browser ended')
            self.rest += block
        message, self.rest = self.rest.split(b'\0', 1)
        return json.loads(message)

    def js(self, code):
        r = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in r: raise RuntimeError(r['exceptionDetails'].get('exception', {}).get('description', r))
        return r['result'].get('value')

    def until(self, condition, seconds=60):
        end = time.time() + seconds
        while time.time() < end:
            try:
                if self.js(condition): return
            except RuntimeError: pass
            time.sleep(.05)
        raise TimeoutError(condition)

    def open(self, path):
        self.events.clear(); self.session = self.page
        self.call('Page.navigate', url=f'file://{path}')
        self.until('document.readyState === "complete" && location.href.startsWith("file:")')

    def enter_frame(self):
        "Speak to the frame inside the page, which runs in a process of its own."
        end = time.time() + 60
        while time.time() < end:
            self.session = self.page
            self.call('Runtime.evaluate', expression='1')
            found = [m['params']['sessionId'] for m in self.events if m.get('method') == 'Target.attachedToTarget' and m['params']['targetInfo']['type'] == 'iframe']
            if found:
                self.session = found[-1]
                return
            time.sleep(.05)
        raise TimeoutError('no frame')

    def asked_for(self):
        return [m['params']['request']['url'] for m in self.events if m.get('method') == 'Network.requestWillBeSent']

    def close(self):
        self.session = None
        try: self.call('Browser.close')
        except (RuntimeError, OSError): pass
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.out); os.close(self.inp)
