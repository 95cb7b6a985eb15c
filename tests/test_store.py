"Remembered answers: kill -9, several processes, damage, full disks, secrets, replay."
import json, os, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path

import pytest

from faultproxy import Upstream
from genai_lab.core import LabError, ModelEntry
from genai_lab.models import HTTPModel
from genai_lab.scoring import Score
from genai_lab.store import Store, remember, replay_model

root = Path(__file__).resolve().parents[1]


def fails(f, *words):
    "The one-line message of the `LabError` that `f` raises, which holds all the words."
    with pytest.raises(LabError) as e: f()
    msg = str(e.value)
    assert '\n' not in msg and all(w in msg for w in words), msg
    return msg


def says(text): return [dict(role='user', content=text)]


def counted(up, **kw): return HTTPModel(ModelEntry(name='far', backend='openai', source='far-1', base_url=up.url, **kw), workers=4, timeout=5, first_wait=.02)


@pytest.fixture
def up():
    with Upstream() as u: yield u


prompts = [says(f'number {i} word{i}') for i in range(10)]
texts = [f'word{i}'[::-1] for i in range(10)]


def fill(path, n=50, model='f' * 16, long=''):
    "A store with n scores."
    s = Store(path)
    from genai_lab.store import answer_key, prompt_hash
    keys = []
    for i in range(n):
        request = dict(continuation=f' {i}')
        keys.append(answer_key(model, 'loglikelihood', prompt_hash('a context' + long), request))
        s.put(keys[-1], model, 'loglikelihood', 'a context' + long, request, dict(logprob=-i / 7, n_tokens=1, greedy=False))
    s.flush()
    return s, keys


# asking only once

def test_nothing_is_asked_twice(up, tmp_path):
    seen = []
    m = remember(counted(up), tmp_path / 'a.db')
    out = m.generate(prompts + prompts[:3], on_done=lambda i, g: seen.append(i))
    assert [g.text for g in out] == texts + texts[:3] and sorted(seen) == list(range(13))
    assert set(up.served.values()) == {1} and (m.asked, m.remembered) == (10, 0)
    again, seen = remember(counted(up), tmp_path / 'a.db'), []
    assert again.generate(prompts[2:5] + [says('a new one')], on_done=lambda i, g: seen.append((i, g.text)))[:3] == out[2:5]
    assert sum(up.served.values()) == 11 and (again.asked, again.remembered) == (1, 3) and seen[:3] == [(i, texts[i + 2]) for i in range(3)]
    assert again.usage.requests == 1 and again.price_in == 0


def test_what_makes_a_request_different(up, tmp_path):
    m = remember(counted(up), tmp_path / 'a.db')
    ask = lambda **kw: m.generate(prompts[:1], **kw)
    ask(); ask(seed=5); ask(stop=()); ask(top_p=.5)
    assert len(up.asks) == 1                          # nothing is drawn at temperature 0
    ask(max_tokens=5); ask(stop='x'); ask(temperature=1); ask(temperature=1, seed=5); ask(temperature=1, top_p=.5)
    ask(temperature=1, seeds=[5]); ask(stop=['x'])    # both are known
    assert len(up.asks) == 6
    m.generate([prompts[0][0]['content']])            # the same words, but not as a message
    assert len(up.asks) == 7
    remember(counted(up, revision='2'), tmp_path / 'a.db').generate(prompts[:1])
    assert len(up.asks) == 8


def test_the_same_bits_as_the_model(model, tmp_path):
    pairs = [('Bread is found in the', ' bakery'), (says('Where is bread?'), 'In the bakery'), ('Bread is found in the', ' museum')]
    first = remember(model, tmp_path / 'a.db')
    scores, texts, rolled = first.loglikelihood(pairs), first.generate([says('Name a fruit.')], max_tokens=4), first.rolling(['Bread and butter'])
    second = remember('smollm2-135m', tmp_path / 'a.db')
    assert (second.loglikelihood(pairs), second.generate([says('Name a fruit.')], max_tokens=4), second.rolling(['Bread and butter'])) == (scores, texts, rolled)
    assert (second.asked, second.remembered) == (0, 5) and second.inner._model is None
    assert second.count_tokens('Bread') == model.count_tokens('Bread') and second.can('rolling') and second.folder == model.folder


def test_failures_are_not_remembered(tmp_path):
    bad = ['word3']
    no = lambda ask: (400, dict(error=dict(message='refused'))) if bad and bad[0] in str(ask) else None
    with Upstream(reject=no) as up:
        m = remember(counted(up), tmp_path / 'a.db')
        assert [bool(g.error) for g in m.generate(prompts)] == [i == 3 for i in range(10)] and len(m.store) == 9
        bad.clear()
        assert [g.text for g in m.generate(prompts)] == texts and sum(up.served.values()) == 10


class Odd:
    "A model that reports nothing on the way, and whose second score is no number."
    name, fingerprint, context_length, price_in, price_out, chat, usage = 'odd', 'odd', 10, 0, 0, False, None
    calls = 0
    def can(self, what): return True
    def loglikelihood(self, pairs, on_done=None, progress=False):
        Odd.calls += 1
        return [Score(float('nan') if t == ' 1' else -.1, 1, True) for _, t in pairs]


def test_models_that_do_not_report_and_scores_that_are_no_numbers(tmp_path):
    m, seen = remember(Odd(), tmp_path / 'a.db'), []
    out = m.loglikelihood([('a', ' 0'), ('a', ' 1')], on_done=lambda i, s: seen.append(i))
    assert seen == [0, 1] and len(m.store) == 1 and out[1].logprob != out[1].logprob
    assert remember(m, m.store).inner is m.inner


# processes

worker = '''
import sys, time
sys.path.insert(0, 'tests')
from genai_lab.scoring import Score
from genai_lab.store import remember
class Slow:
    name, fingerprint, context_length, price_in, price_out, chat, usage = 'slow', 'slow', 10, 0, 0, False, None
    def can(self, what): return True
    def loglikelihood(self, pairs, on_done=None, progress=False):
        out = []
        for i, (c, t) in enumerate(pairs):
            time.sleep(float(sys.argv[2]))
            out.append(Score(-len(t) / 7, 1, True)); on_done(i, out[-1])
        return out
n = int(sys.argv[3])
remember(Slow(), sys.argv[1]).loglikelihood([('a context', f' option {i}') for i in range(n)], on_done=lambda i, s: print(i, flush=True))
print('end')
'''


def work(path, pause, n): return subprocess.Popen([sys.executable, '-c', worker, str(path), str(pause), str(n)], cwd=root, stdout=subprocess.PIPE, text=True)


def test_killed_at_any_moment(tmp_path):
    path, told, landed = tmp_path / 'a.db', set(), 0
    for kill_after in (1, 2, 3, 5, 8):
        p = work(path, .03, 30)
        new = []
        for line in p.stdout:
            if int(line) not in told: new.append(int(line))
            if len(new) >= kill_after: p.kill(); break
        p.communicate()
        landed += p.returncode == -signal.SIGKILL
        told |= set(new)
        db = sqlite3.connect(path)
        assert db.execute('pragma integrity_check').fetchone() == ('ok',)
        kept = {json.loads(r)['continuation'] for r, in db.execute('select request from answers')}
        db.close()
        assert len(told - {int(k.split()[-1]) for k in kept}) == 0, 'an answer that had been reported was lost'
    assert landed >= 3
    p = work(path, 0, 30)
    assert p.communicate()[0].split()[-1] == 'end' and len(Store(path)) == 30


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / 'a.db'
    ps = [work(path, .0005, 400) for _ in range(3)]
    mine, _ = fill(path, 300)
    assert [p.communicate()[0].split()[-1] for p in ps] == ['end'] * 3
    assert len(Store(path)) == 700 and sqlite3.connect(path).execute('pragma integrity_check').fetchone() == ('ok',)


def test_an_interrupted_run_pays_for_the_rest_only(tmp_path):
    many = [says(f'number {i} word{i}') for i in range(60)]
    with Upstream(delay=.02) as up:
        m = remember(counted(up), tmp_path / 'a.db')
        def stop(i, g):
            if i == 4: os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt): m.generate(many, on_done=stop)
        assert 5 <= len(m.store) < 60
        assert [g.text for g in m.generate(many)] == [f'word{i}'[::-1] for i in range(60)]
        assert set(up.served.values()) == {1}          # what was under way was awaited, so nothing is paid twice


def test_after_a_fork(tmp_path):
    s, keys = fill(tmp_path / 'a.db', 5)
    pid = os.fork()
    if pid == 0: os._exit(0 if len(s.get(keys)) == 5 and s._pid == os.getpid() else 1)
    assert os.waitpid(pid, 0)[1] == 0 and len(s.get(keys)) == 5


# files that break

def test_damage_is_set_aside(tmp_path):
    path = tmp_path / 'a.db'
    fill(path, 2000, long=' long' * 20)[0].close()
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3:len(data) * 2 // 3 + 9000] = os.urandom(9000)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='was damaged .* kept as a.db.damaged-1'): s = Store(path)
    assert 0 < len(s) < 2000 and (tmp_path / 'a.db.damaged-1').read_bytes() == data
    path2 = tmp_path / 'b.db'
    path2.write_bytes(b'this is a shopping list and no database' * 100)
    with pytest.warns(UserWarning, match='0 answers could be carried over'): s = Store(path2)
    assert len(s) == 0; s.close()
    path2.write_bytes(b'again')
    with pytest.warns(UserWarning, match='damaged-2'): Store(path2)
    assert sorted(p.name for p in tmp_path.glob('b.db.damaged-?')) == ['b.db.damaged-1', 'b.db.damaged-2']


def test_truncated(tmp_path):
    path = tmp_path / 'a.db'
    fill(path, 2000)[0].close()
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2 + 100])
    with pytest.warns(UserWarning, match='damaged'): s, keys = fill(path, 2000)
    assert len(s.get(keys)) == 2000


def test_damage_and_removal_while_it_is_open(up, tmp_path):
    path = tmp_path / 'a.db'
    m = remember(counted(up), path)
    m.generate(prompts[:5])
    for p in tmp_path.glob('a.db*'): p.unlink()
    assert [g.text for g in m.generate(prompts)] == texts and len(Store(path)) == 10
    m.store.db.execute('pragma wal_checkpoint(truncate)')
    with open(path, 'r+b') as f: f.write(b'rubbish' * 2000)
    with pytest.warns(UserWarning, match='damaged'): Store(path)
    assert [g.text for g in m.generate(prompts)] == texts and len(Store(path)) == 10      # the open store follows


def test_damage_that_is_found_late(tmp_path, monkeypatch):
    monkeypatch.setattr('genai_lab.store.CHECK_MB', 0)
    path = tmp_path / 'a.db'
    s, keys = fill(path, 3000)
    s.close()
    data = bytearray(path.read_bytes())
    for i in range(4096 * 9, len(data), 4096 * 7): data[i:i + 3000] = os.urandom(3000)
    path.write_bytes(data)
    s = Store(path)
    with pytest.warns(UserWarning, match='damaged'): found = s.get(keys)
    assert len(found) < 3000
    fill(path, 3000)
    assert len(s.get(keys)) == 3000


def test_a_flipped_digit_is_noticed(tmp_path):
    s, keys = fill(tmp_path / 'a.db', 10)
    s.db.execute("update answers set answer = replace(answer, '-1.', '-2.')")
    got = s.get(keys)
    assert 0 < len(got) < 10 and len(s) == len(got)


def test_full_disk(tmp_path, up):
    small = tmp_path / 'small'
    small.mkdir()
    mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'none', str(small)], capture_output=True).returncode
    try:
        m = remember(counted(up), small / 'a.db')
        m.generate(prompts[:3])
        if not mounted: m.store.db.execute('pragma max_page_count = 20')
        fails(lambda: m.generate([says(f'{i} ' * 300 + f' word{i}') for i in range(1000)]), 'full', 'a.db')
        served = sum(up.served.values())
        assert [g.text for g in m.generate(prompts[:3])] == texts[:3] and sum(up.served.values()) == served
    finally:
        if mounted: subprocess.run(['umount', '-l', str(small)])


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('x')
    fails(lambda: Store(tmp_path / 'file' / 'a.db'), 'file')
    fails(lambda: Store(tmp_path), 'cannot be used')
    fails(lambda: Store(tmp_path / 'none.db', readonly=True), 'no store')


# secrets

def test_secrets_never_reach_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv('SHOP_PASSWORD', 'mauve-walrus-77')
    for name in ('a.db', 'a.jsonl'):
        with Upstream() as up:
            m = remember(counted(up), tmp_path / name)
            ask = [says('log in with mauve-walrus-77'), says('my key is sk-abcdefghijklmnop1234'), 'plain mauve-walrus-77 text', says('harmless')]
            first = m.generate(ask, stop='mauve-walrus-77')
            assert first[0].text == '77-surlaw-evuam' and sum(up.served.values()) == 4
            assert remember(counted(up), tmp_path / name).generate(ask, stop='mauve-walrus-77')[3] == first[3] and sum(up.served.values()) == 4
        m.store.export(tmp_path / f'{name}.jsonl')
    everything = b''.join(p.read_bytes() for p in tmp_path.iterdir() if p.is_file())
    assert b'mauve-walrus' not in everything and b'sk-abc' not in everything and b'harmless' in everything


# replay and files for others

def test_replay_needs_no_model(model, tmp_path):
    chat = says('Where is bread?')
    pairs = [('Bread is found in the', ' bakery'), (chat, 'In the bakery')]
    for name in ('a.db', 'a.jsonl'):
        m = remember(model, tmp_path / name)
        want = m.loglikelihood(pairs)
        code = f'''
import sys
from genai_lab.store import replay_model
m = replay_model({str(tmp_path / name)!r})
print(m.name, m.fingerprint, m.chat, m.context_length, m.can("rolling"))
print([s.logprob for s in m.loglikelihood({pairs!r})])
assert m.render({chat!r}) == {model.render(chat)!r}
assert not {{'torch', 'transformers', 'openai', 'pandas'}} & set(sys.modules), set(sys.modules)
'''
        p = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, env={**os.environ, 'GENAI_LAB_CACHE_DIR': str(tmp_path / 'no-cache')})
        assert p.returncode == 0, p.stderr
        assert p.stdout.splitlines() == [f'smollm2-135m {model.fingerprint} True 8192 True', str([s.logprob for s in want])]
    told = replay_model(tmp_path / 'a.jsonl')
    fails(lambda: told.loglikelihood([*pairs, ('x', ' y'), ('x', ' z')]), '2 answers of 4', 'replay forbids', "'x'")
    fails(lambda: told.count_tokens('x'), 'model itself')
    fails(lambda: replay_model(tmp_path / 'a.jsonl', 'smollm'), 'Did you mean "smollm2-135m"?')
    fails(lambda: remember(model, tmp_path / 'empty.db', replay=True), 'no store')
    fails(lambda: replay_model(tmp_path / 'none.jsonl'), 'no store')


def test_recording(up, tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text(f'[lab]\n[model.far]\nbackend = openai\nsource = far-1\nbase_url = {up.url}\n')
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(tmp_path / 'settings.ini'))
    lesson = tmp_path / 'lesson.jsonl'
    monkeypatch.setenv('GENAI_LAB_RECORD', '1')
    replay_model(lesson, 'far').generate(prompts[:2])
    replay_model(lesson, 'far').generate(prompts[:4])
    monkeypatch.delenv('GENAI_LAB_RECORD')
    assert len(lesson.read_text().splitlines()) == 5 and sum(up.served.values()) == 4
    assert [g.text for g in replay_model(lesson).generate(prompts[:4])] == texts[:4]
    fails(lambda: replay_model(lesson).generate(prompts), '6 answers of 10')
    before = lesson.read_bytes()
    lesson.write_bytes(before[:-20])
    with pytest.warns(UserWarning, match='line 5 is cut short'): assert len(replay_model(lesson).store) == 3
    with pytest.warns(UserWarning): replay_model(lesson, 'far', record=True).generate(prompts[:4])
    with pytest.warns(UserWarning): assert len(replay_model(lesson).store) == 4
    (tmp_path / 'x.jsonl').write_text('shopping list\n')
    fails(lambda: replay_model(tmp_path / 'x.jsonl'), 'no store')
    (tmp_path / 'x.jsonl').write_text('{"milk": 2}\n')
    fails(lambda: replay_model(tmp_path / 'x.jsonl'), 'line 1')


def test_a_committed_file_is_only_read(up, tmp_path):
    shelf = tmp_path / 'shelf'
    m = remember(counted(up), shelf / 'a.db')
    m.generate(prompts)
    m.store.close()
    for tail in ('-wal', '-shm'): (shelf / f'a.db{tail}').unlink(missing_ok=True)
    before = (shelf / 'a.db').read_bytes()
    os.chmod(shelf, 0o555)
    try: assert [g.text for g in replay_model(shelf / 'a.db').generate(prompts)] == texts
    finally: os.chmod(shelf, 0o755)
    assert (shelf / 'a.db').read_bytes() == before
    s = Store(shelf / 'a.db', readonly=True)
    fails(lambda: s.put(b'k' * 16, 'm', 'generate', 'p', {}, {}), 'reading only')


def test_export_and_merge(up, tmp_path):
    m = remember(counted(up), tmp_path / 'a.db')
    m.generate(prompts); m.generate(['plain wörds 🧀'])
    m.store.export(tmp_path / 'a.jsonl'); m.store.export(tmp_path / 'b.jsonl', prompts=False); m.store.export(tmp_path / 'a.parquet')
    import pandas as pd
    frame = pd.read_parquet(tmp_path / 'a.parquet')
    assert set(frame.columns) >= {'key', 'model', 'kind', 'prompt', 'request', 'text', 'completion_tokens'} and len(frame) == 11
    for name in ('a.jsonl', 'b.jsonl'): assert [g.text for g in remember('far', tmp_path / name, replay=True).generate(prompts)] == texts
    other = Store(tmp_path / 'c.db')
    assert other.merge(tmp_path / 'a.jsonl') == 11 and other.merge(tmp_path / 'a.db') == 0
    other.export(tmp_path / 'c.jsonl')
    assert (tmp_path / 'c.jsonl').read_text() == (tmp_path / 'a.jsonl').read_text()
    lines = Store(tmp_path / 'd.jsonl')
    assert lines.merge(other) == 11 and len(Store(tmp_path / 'd.jsonl')) == 11
    fails(lambda: other.export(tmp_path / 'a.csv'), '.jsonl or .parquet')
    assert other.to_frame().answers.sum() == 11 and 'far' in other._repr_html_()


def test_pruning(tmp_path):
    s, keys = fill(tmp_path / 'a.db', 3000, long=' long' * 1000)
    fill(tmp_path / 'a.db', 10, model='e' * 16)
    s.db.execute("update answers set created = created - 864000 where model = 'ffffffffffffffff' and request like '%1%'")
    old = s.db.execute('select count(*) from answers where created < ?', (time.time() - 86400,)).fetchone()[0]
    assert s.prune(older_than=5) == old and len(s) == 3010 - old
    mb = s.size().mb
    assert s.prune(keep_mb=mb / 2) > 0 and s.size().mb <= mb / 2 and 0 < len(s) < 3010 - old
    s.db.execute("insert into models values ('eeeeeeeeeeeeeeee', 'e', '{\"name\": \"e\", \"fingerprint\": \"eeeeeeeeeeeeeeee\"}', 0)")
    assert s.prune(model='e') == 10 and 'answers' in str(s.size())
    fails(lambda: s.prune(), 'what is to be pruned')
    fails(lambda: s.prune(model='f'), 'no answers of model "f"')


def test_a_long_lock_is_waited_for(tmp_path):
    s, _ = fill(tmp_path / 'a.db', 3)
    other = sqlite3.connect(tmp_path / 'a.db', isolation_level=None, check_same_thread=False)
    other.execute('begin immediate')
    threading.Timer(.3, lambda: other.execute('commit')).start()
    assert len(fill(tmp_path / 'a.db', 6)[0]) == 6
