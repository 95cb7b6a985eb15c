"Runs that are repeated from their record, in a small repository of their own: same code, other code, other data, and everything that can be missing."
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import genai_lab
from genai_lab import reproduce as module
from genai_lab.core import LabError, forget_inputs, git_patch, input_fingerprint, inputs, library_fingerprint, path_fingerprint
from genai_lab.data import load_frame
from genai_lab.experiments import run_notebook
from genai_lab.reproduce import compare_frames, compare_metrics, diff, reproduce
from genai_lab.runs import find_run
from genai_lab.tracking import connect, local_path, open_record, Spool


def notebook(path, *cells, parameters='n: int = 5'):
    code = lambda source, i, tags=(): dict(cell_type='code', id=f'c{i}', source=source, metadata=dict(tags=list(tags)), outputs=[], execution_count=None)
    sources = ['import pandas as pd, random\nfrom genai_lab.tracking import start_run\nrun = start_run("small"); random.seed(7)', *cells, 'run.finish()']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[code(parameters, 0, ['parameters']), *(code(s, i) for i, s in enumerate(sources, 1))])))
    return path


sales = 'from genai_lab.data import load_frame\nsales = load_frame("../data/sales.csv")\nrun.log_metric("units", sales.units.sum() * n)'
prices = 'from genai_lab.data import load_frame\nprices = load_frame("../big/prices.csv")\nrun.log_frame(prices, "samples/prices")\nrun.log_metric("seconds", __import__("time").time())'


def git(repo, *args): return subprocess.run(['git', '-c', 'user.name=Ann', '-c', 'user.email=ann@shop.example', *args], cwd=repo, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path, mlflow_home, monkeypatch):
    "A lab under git: an experiment, data that git holds, and data that it does not."
    repo = tmp_path / 'lab'
    notebook(repo / 'experiments' / 'small.ipynb', sales, prices)
    for name, text in {'settings.ini': '[lab]\nseed = 7\n', '.gitignore': 'big\n__pycache__\n', 'data/sales.csv': 'shop,units\nnorth,3\nsouth,4\n', 'big/prices.csv': 'product,price\nice,2.5\nbread,3.25\n'}.items():
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text(text)
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
    monkeypatch.chdir(repo)
    git(repo, 'init', '-q')
    commit(repo, 'start')
    yield repo
    assert len(git(repo, 'worktree', 'list').splitlines()) == 1 and not list((tmp_path / 'tmp').glob('genai_lab-*'))


def commit(repo, message):
    git(repo, 'add', '.')
    git(repo, 'commit', '-qm', message)


def tags(run_id): return connect().get_run(run_id).data.tags
def run(repo, **kw):
    result = run_notebook(repo / 'experiments' / 'small.ipynb', **kw)
    assert result.exit_code == 0, result
    return result


# the same code and the same data

def test_in_place_and_from_another_state_of_the_checkout(repo):
    first = run(repo, params=dict(n=3))
    again = reproduce(first.run_id[:12])
    assert (again.verdict, again.exit_code, again.changed, again.doubts) == ('identical', 0, [], [])
    assert [c.name for c in again.compared] == ['metrics', 'samples/prices.parquet'] and again.result.metrics['units'] == 21
    assert (tags(first.run_id)['reproduced.by'], tags(first.run_id)['reproduction.verdict']) == (again.again, 'identical')
    assert (tags(again.again)['reproduction.of'], tags(again.again)['reproduction.verdict']) == (first.run_id, 'identical')
    told = json.loads((local_path(connect().get_run(again.again).info.artifact_uri) / 'reproduction.json').read_text())
    assert told['verdict'] == 'identical' and told['compared'][0]['n'] == 1
    # the notebook, its data and its settings go on; what git does not hold stays where it is
    notebook(repo / 'experiments' / 'small.ipynb', sales.replace('* n', '* 100'), prices)
    (repo / 'data' / 'sales.csv').write_text('shop,units\nnorth,30\n')
    commit(repo, 'another one')
    (repo / 'settings.ini').write_text('[lab]\nseed = 8\n')
    again = reproduce(first.run_id, strict=True)
    assert (again.verdict, again.exit_code) == ('identical', 0) and 'bit for bit' in str(again)
    assert tags(again.again)['git.commit'] == tags(first.run_id)['git.commit'] and tags(again.again)['seed'] == '7'
    assert git(repo, 'status', '--porcelain') == ' M settings.ini\n'
    assert tags(again.again)['mlflow.source.name'] == tags(first.run_id)['mlflow.source.name']   # so that a repetition can be repeated


def test_changes_on_top_of_the_commit_come_back(repo):
    notebook(repo / 'experiments' / 'small.ipynb', sales.replace('sum()', 'max()'), prices, 'import shades; run.log_metric("shade", shades.red)')
    (repo / 'experiments' / 'shades.py').write_text('red = 1\n')
    git(repo, 'add', 'experiments/shades.py')
    (repo / 'experiments' / 'shades.py').write_text('red = 2\n')
    first = run(repo)
    assert tags(first.run_id)['git.dirty'] == 'true' and first.metrics['shade'] == 2
    git(repo, 'reset', '-q', '--hard')
    assert not (repo / 'experiments' / 'shades.py').exists()
    again = reproduce(first.run_id, strict=True)
    assert again.verdict == 'identical' and again.result.metrics['shade'] == 2
    d = diff(first.run_id, again.again)
    assert d.equal or {s for s, rows in d.sections.items() if rows} <= {'metrics'}, str(d)   # "metrics": the time


def test_the_library_of_the_commit_is_the_one_that_is_imported(repo, monkeypatch):
    shutil.copytree(Path(genai_lab.__file__).parent, repo / 'genai_lab', ignore=shutil.ignore_patterns('__pycache__'))
    with open(repo / 'genai_lab' / 'data.py', 'a') as f: f.write('\nshade = 1\n')
    notebook(repo / 'experiments' / 'small.ipynb', 'from genai_lab.data import shade; run.log_metric("shade", shade)')
    commit(repo, 'a library')
    first = run(repo, env=dict(PYTHONPATH=str(repo)))
    connect().set_tag(first.run_id, 'fingerprint.library', library_fingerprint(repo / 'genai_lab'))   # as that library's own runner would have done
    with open(repo / 'genai_lab' / 'data.py', 'a') as f: f.write('\nshade = 2\n')
    commit(repo, 'another library')
    again = reproduce(first.run_id, strict=True)
    assert again.verdict == 'identical' and again.result.metrics['shade'] == 1
    assert tags(again.again)['fingerprint.library'] == tags(first.run_id)['fingerprint.library'] != library_fingerprint()


# not the same

def test_data_that_has_changed(repo):
    first = run(repo)
    (repo / 'big' / 'prices.csv').write_text('product,price\nice,2.5\nbread,3.5\n')
    before = len(connect().search_runs([connect().get_run(first.run_id).info.experiment_id]))
    with pytest.raises(LabError, match=r'cannot be reproduced strictly: data prices.csv has changed \(fingerprint \w+ instead of \w+\)') as e: reproduce(first.run_id, strict=True)
    assert '\n' not in str(e.value) and len(connect().search_runs([connect().get_run(first.run_id).info.experiment_id])) == before
    again = reproduce(first.run_id)
    assert (again.verdict, again.exit_code) == ('different', 1) and len(again.changed) == 1
    assert 'first samples/prices.parquet: row 1, "price" is 3.5 instead of 3.25. data prices.csv has changed' in again.headline()
    assert tags(first.run_id)['reproduction.verdict'] == 'different'
    # the same numbers from other data are no reproduction either
    (repo / 'big' / 'prices.csv').write_text('product,price\nice,2.50\nbread,3.25\n')
    again = reproduce(first.run_id)
    assert again.verdict == 'different' and max(c.worst for c in again.compared) == 0 and 'repeated with other inputs' in again.headline()
    (repo / 'big' / 'prices.csv').unlink()
    with pytest.raises(LabError, match='data prices.csv cannot be found'): reproduce(first.run_id, strict=True)
    failed = reproduce(first.run_id)
    assert (failed.verdict, failed.exit_code) == ('failed', 2) and 'there is no such file' in str(failed)
    assert tags(failed.again)['reproduction.verdict'] == 'failed'


def test_numbers_that_differ_a_little_and_numbers_that_differ(repo):
    notebook(repo / 'experiments' / 'small.ipynb', 'import os\ntiny = int.from_bytes(os.urandom(4), "big") * 1e-19', 'run.log_metric("a", .5 + tiny); run.log_frame(pd.DataFrame(dict(x=[1., 2. + tiny])), "tables/x")')
    commit(repo, 'noise')
    first = run(repo)
    again = reproduce(first.run_id, strict=True)
    assert (again.verdict, again.exit_code) == ('within tolerance', 1) and 'within the tolerance of 1e-06, not bit for bit' in again.headline()
    again = reproduce(first.run_id, rtol=1e-20)
    assert (again.verdict, again.exit_code) == ('different', 1) and again.headline().count('first') == 1
    d = diff(first.run_id, again.again)
    assert [r[0] for r in d.sections['metrics']] == ['a'] and not d.code and not d.sections['parameters'] and not d.equal
    assert first.run_id[:8] in d._repr_html_() and 'differ in 1 metric' in str(d) and list(d.to_frame().section) == ['metrics']


def test_frames_and_metrics_that_differ_in_shape():
    a = pd.DataFrame(dict(id=[1, 2], x=['a', 'b'], seconds=[1., 2.]))
    assert compare_frames(a, a.assign(seconds=9.)).worst == 0
    assert compare_frames(a, a.head(1)).first == '1 row instead of 2'
    assert compare_frames(a, a.drop(columns='x')).first == 'the column "x" is there only before'
    assert compare_frames(a, a.assign(y=1), ignore=['y']).worst == 0
    c = compare_frames(a, a.assign(x=['a', None], id=[1., 2.]))
    assert (c.close, c.other, c.first) == (0, 1, 'row 1, "x" is nan instead of \'b\'')
    assert compare_metrics(dict(a=[(0, 1.)]), dict(a=[(1, 1.)])).first == 'a has 1 value instead of 1, or other steps'
    assert compare_metrics(dict(a=[(0, float('nan'))]), dict(a=[(0, float('nan'))])).worst == 0


# what cannot be reproduced

def recorded(name, status='FINISHED', **more):
    "A run that nobody has executed."
    record = open_record('small', name, more, Spool(Path.cwd().parent / 'spool' / name))
    if status != 'RUNNING': record.end(status)
    return record.id


def test_everything_that_can_be_missing_is_one_line(repo, tmp_path, monkeypatch):
    first = run(repo)
    client, t = connect(), tags(first.run_id)

    def refused(run_id, words, **kw):
        with pytest.raises(LabError, match=words) as e: reproduce(run_id, **kw)
        assert '\n' not in str(e.value)
    refused('0' * 32, 'there is no run 0{32}.* genai-lab runs lists them')
    refused(first.run_id[:-1] + ('0' if first.run_id[-1] != '0' else '1'), f'Did you mean "{first.run_id}"')
    refused("x' OR 1=1", 'is no id')
    refused(recorded('running', 'RUNNING'), 'is still running on')
    refused(recorded('failed', 'FAILED', failure='cell 3 of 4 raised KeyError'), r'did not finish \(FAILED: cell 3 of 4 raised KeyError\)')
    refused(recorded('script'), 'has no notebook attached')
    parent = recorded('grid')
    recorded('one', **{'mlflow.parentRunId': parent})
    refused(parent, 'is a grid; reproduce one of its runs, such as')
    refused(recorded('empty', **{'mlflow.source.name': 'x.ipynb'}), 'has logged neither metrics nor samples')
    deleted = recorded('deleted')
    client.delete_run(deleted)
    refused(deleted, 'was deleted in MLflow; bring it back with')
    client.set_tag(first.run_id, 'git.dirty', 'true')
    refused(first.run_id, 'strictly: the run was made with changes on top of its commit that were not kept', strict=True)
    # the commit is somewhere else
    client.set_tag(first.run_id, 'git.commit', 'ab' * 20)
    refused(first.run_id, 'commit abababababab of run .* is not in the repository .*; fetch it, or name the right one with --repo')
    client.set_tag(first.run_id, 'git.commit', t['git.commit'])
    other = tmp_path / 'other'
    other.mkdir()
    refused(first.run_id, 'was made in a git repository, and .*other is in none', repo=str(other))
    # the notebook is not attached, and another one at the commit
    folder = local_path(client.get_run(first.run_id).info.artifact_uri)
    kept = (folder / 'small.ipynb').read_text()
    (folder / 'small.ipynb').unlink()
    client.set_tag(first.run_id, 'fingerprint.notebook', 'feedfeedfeedfeed')
    refused(first.run_id, 'has no notebook attached, and small.ipynb at its commit is another one')
    (folder / 'small.ipynb').write_text(kept.replace('units', '[redacted]'))
    refused(first.run_id, 'held a secret, which was redacted')
    # the files lie on another machine
    shutil.move(folder, tmp_path / 'away')
    refused(first.run_id, 'the files of run .* are not there any more')
    client.set_tag(first.run_id, 'host', 'gpu-box')
    refused(first.run_id, 'was made on gpu-box, and its files lie there in .*; use it on that machine, or set artifact_root')
    assert 'gpu-box' in str(diff(first.run_id, recorded('another'))) and socket.gethostname() != 'gpu-box'
    assert git(repo, 'status', '--porcelain') == ''


def test_outside_of_git_with_a_secret(tmp_path, mlflow_home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    path = notebook(tmp_path / 'loose.ipynb', 'run.log_metric("n", n + len(api_key))', parameters='api_key: str | None = None\nn: int = 1')
    first = run_notebook(path, texts=dict(api_key='mauve-walrus-42', n='9'))
    assert 'git.commit' not in tags(first.run_id)
    notebook(path, 'run.log_metric("n", 2 * n)')   # edited since: the attached one is what runs
    with pytest.raises(LabError, match=r'1 parameter of run \w+ was secret and not written down; give it again: -p api_key=…'): reproduce(first.run_id)
    again = reproduce(first.run_id, texts=dict(api_key='mauve-walrus-42'))
    assert again.verdict == 'identical' and again.result.metrics == dict(n=24)
    assert again.doubts == ['the run was made outside of a git repository, so only its notebook is known']
    assert 'walrus' not in ''.join(p.read_bytes().decode('latin-1') for p in mlflow_home.rglob('*') if p.is_file())


def test_ids_are_found_by_their_beginning(mlflow_home, tmp_path, monkeypatch):
    (tmp_path / 'x').mkdir()
    monkeypatch.chdir(tmp_path / 'x')
    ids = [recorded(str(i)) for i in range(3)]
    assert find_run(connect(), ids[2][:10]).info.run_id == ids[2]
    with pytest.raises(LabError, match='is no id'): find_run(connect(), ids[0][:3])


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    with pytest.raises(KeyError), module._environment(OMP_NUM_THREADS=None, GENAI_LAB_SEED='9'): raise KeyError
    import os
    assert os.environ['OMP_NUM_THREADS'] == '2' and 'GENAI_LAB_SEED' not in os.environ


# patches and inputs

def test_a_patch_holds_every_kind_of_change_and_touches_nothing(repo, tmp_path):
    for name, data in {'bytes.bin': bytes(range(256)), 'latin.txt': 'Käse\r\n'.encode('latin-1'), 'gone.txt': b'x\n', 'run.sh': b'#!/bin/sh\n', 'windows.txt': b'a\r\nb\r\n', 'old name.txt': b'one\ntwo\nthree\n'}.items(): (repo / name).write_bytes(data)
    commit(repo, 'files')
    assert git_patch(repo) == git_patch(repo / 'experiments') == ''
    (repo / 'bytes.bin').write_bytes(bytes(range(255, -1, -1)))
    (repo / 'windows.txt').write_bytes(b'a\r\nc\r\n')
    (repo / 'gone.txt').unlink()
    (repo / 'run.sh').chmod(0o755)
    (repo / 'old name.txt').rename(repo / 'neu é.txt')
    for name, data in {'new/deep.txt': b'new\n', 'big/ignored.csv': b'x', '.env': b'KEY=1\n', 'new/server.PEM': b'secret', 'huge.bin': bytes(2**20 + 1), 'empty.txt': b'', 'mlruns/x': b'x'}.items():
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(data)
    status, objects = git(repo, 'status', '--porcelain', '--untracked-files=all'), sorted((repo / '.git' / 'objects').rglob('*'))
    patch = git_patch(repo / 'experiments')
    assert (git(repo, 'status', '--porcelain', '--untracked-files=all'), sorted((repo / '.git' / 'objects').rglob('*'))) == (status, objects)
    assert [l for l in patch.splitlines() if l.startswith('# left out')] == [f'# left out: {f}' for f in ('.env', 'huge.bin', 'new/server.PEM')]
    (repo / 'latin.txt').write_bytes('Gemüse\r\n'.encode('latin-1'))   # no UTF-8 any more
    for text in (patch, git_patch(repo)):
        clone = tmp_path / f'clone{len(text)}'
        git(tmp_path, 'clone', '-q', str(repo), str(clone))
        (tmp_path / 'x.patch').write_bytes(text.encode())
        git(clone, 'apply', '--index', str(tmp_path / 'x.patch'))
        for f in ('bytes.bin', 'windows.txt', 'neu é.txt', 'new/deep.txt', 'empty.txt'): assert (clone / f).read_bytes() == (repo / f).read_bytes(), f
        assert not (clone / 'gone.txt').exists() and not (clone / 'old name.txt').exists() and (clone / 'run.sh').stat().st_mode & 0o100
    assert (clone / 'latin.txt').read_bytes() == (repo / 'latin.txt').read_bytes()


def test_no_patch_outside_of_git_or_before_the_first_commit(tmp_path, monkeypatch):
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert git_patch(tmp_path) == ''
    git(tmp_path, 'init', '-q')
    (tmp_path / 'x').write_text('x')
    assert git_patch(tmp_path) == ''


def test_what_is_read_is_noted_once_and_relative_to_the_lab(repo, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.chdir(repo / 'experiments')
    (tmp_path / 'far.csv').write_text('a\n1\n')
    forget_inputs()
    for source in ('../data/sales.csv', '../data/*.csv', repo / 'data', '../data/sales.csv', tmp_path / 'far.csv'): load_frame(source)
    assert [i['path'] for i in inputs()] == ['data/sales.csv', 'data/*.csv', 'data', str(tmp_path / 'far.csv')]
    assert all(input_fingerprint(i['path']) == i['fingerprint'] for i in inputs())
    before = {i['path']: i['fingerprint'] for i in inputs()}
    (repo / 'data' / 'more.csv').write_text('shop,units\nwest,1\n')
    assert [p for p, fp in before.items() if input_fingerprint(p) != fp] == ['data/*.csv', 'data']
    with pytest.raises(LabError, match='there is no such file'): path_fingerprint(repo / 'data' / '*.json')
    forget_inputs()
    load_frame(query="select * from '../data/sales.csv' where shop != 'o''hare'")
    load_frame(query='select units from t', tables=dict(t='../data/sales.csv'))
    load_frame([dict(a=1)])
    assert [(i['kind'], i['name'], i['path']) for i in inputs()] == [('data', 'sales.csv', 'data/sales.csv')]
    forget_inputs()
