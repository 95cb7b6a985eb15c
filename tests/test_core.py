"Settings, fingerprints, secrets and files under conditions that a page does not show."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genai_lab.core import (LabError, atomic_write, fingerprint, git_state, provenance, redact, register_secret, settings)

root = Path(__file__).resolve().parents[1]


def write(folder, text):
    (folder / 'settings.ini').write_text(text)
    return folder


def test_every_lab_key_is_overridden_by_its_variable(tmp_path, monkeypatch):
    write(tmp_path, '[lab]\nseed = 1\n')
    values = dict(tracking_uri='sqlite:///other.db', artifact_root='elsewhere', default_model='m', cache_dir='/c', seed='5', workers='3', request_timeout='1.5', run_timeout='9.0', server_patience='7.5', heartbeat_limit='30.0')
    for k, v in values.items(): monkeypatch.setenv(f'GENAI_LAB_{k.upper()}', v)
    assert {k: str(v) for k, v in settings(tmp_path).lab.model_dump().items()} == values


def test_mlflow_tracking_uri_is_honoured(tmp_path, monkeypatch):
    write(tmp_path, '')
    monkeypatch.delenv('GENAI_LAB_TRACKING_URI')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:1')
    assert settings(tmp_path).lab.tracking_uri == 'http://127.0.0.1:1'
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', 'sqlite:///mine.db')
    assert settings(tmp_path).lab.tracking_uri == 'sqlite:///mine.db'


@pytest.mark.parametrize('text, parts', [
    ('[lab]\nseed = -1', ['[lab] seed', '"-1"', 'at least 0']),
    ('[lab]\nrequest_timeout = soon', ['request_timeout', '"soon"', 'a number above 0']),
    ('[lob]\nseed = 1', ['unknown section [lob]', 'Did you mean "lab"']),
    ('[model.x]\nbackend = transformers', ['[model.x]', '"source" is missing']),
    ('[model.x]\nbackend = transformers\nsource = y\ncontext_length = long', ['[model.x] context_length', '"long"', 'a whole number']),
    ('[model.x]\nbackend = transformers\nsource = y\nprice_inn = 1', ['no key "price_inn"', 'Did you mean "price_in"']),
    ('[model.x]\nbackend = transformers\nsource = y\nchat = perhaps', ['[model.x] chat', 'true or false']),
    ('seed = 1', ['cannot be read as INI', 'line']),
    ('[lab]\nseed = 1\nseed = 2', ['cannot be read as INI', 'seed']),
])
def test_a_wrong_file_is_explained(tmp_path, text, parts):
    with pytest.raises(LabError) as e: settings(write(tmp_path, text))
    msg = str(e.value)
    assert 'settings.ini' in msg and '\n' not in msg
    for p in parts: assert p in msg


def test_a_missing_file_that_was_asked_for(tmp_path):
    with pytest.raises(LabError, match='no such settings file'): settings(tmp_path / 'other.ini')


def test_a_secret_in_the_wrong_place_is_not_repeated(tmp_path):
    with pytest.raises(LabError) as e: settings(write(tmp_path, '[lab]\nworkers = sk-abcdefghijklmnop1234'))
    assert 'abcdefgh' not in str(e.value)


def test_settings_are_found_from_a_folder_below(tmp_path, monkeypatch):
    write(tmp_path, '[lab]\nseed = 3')
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'a' / 'b')
    assert settings().lab.seed == 3 and settings().root == tmp_path.resolve()


def test_the_environment_wins_only_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_SEED', '')
    assert settings(write(tmp_path, '[lab]\nseed = 3')).lab.seed == 3


def test_fingerprints_tell_kinds_and_content_apart(tmp_path):
    things = [0, 0.0, False, None, '', b'', [], {}, '0', [0], [[0]], {'a': 0}, {'a': '0'}, np.zeros(2), np.zeros(3), np.zeros(2, 'float32'),
              pd.DataFrame({'a': [0]}), pd.DataFrame({'a': ['0']}), pd.DataFrame({'b': [0]}), pd.DataFrame({'a': [None]}), pd.DataFrame({'a': [0, 0]})]
    assert len({fingerprint(t) for t in things}) == len(things)


def test_a_fingerprint_is_the_same_in_another_process():
    code = 'import pandas as pd; from genai_lab.core import fingerprint as f; print(f({"x": pd.DataFrame({"a": ["é", None, "b"], "n": [1.5, 2, 3]}), "s": {"q", "r", "t"}}))'
    runs = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': s}, capture_output=True, text=True).stdout for s in ('1', '2')}
    assert len(runs) == 1 and len(runs.pop().strip()) == 16


def test_frames_with_lists_have_fingerprints():
    a, b = pd.DataFrame({'c': [['x', 'y'], ['z']]}), pd.DataFrame({'c': [['x', 'y'], ['w']]})
    assert fingerprint(a) == fingerprint(a.copy()) != fingerprint(b)


def test_folders_are_hashed_by_names_and_content(tmp_path):
    for d in ('one', 'two'):
        (tmp_path / d).mkdir(); (tmp_path / d / 'f').write_text('x')
    assert fingerprint(tmp_path / 'one') == fingerprint(tmp_path / 'two')
    (tmp_path / 'two' / 'f').rename(tmp_path / 'two' / 'g')
    assert fingerprint(tmp_path / 'one') != fingerprint(tmp_path / 'two')
    with pytest.raises(LabError, match='no such file'): fingerprint(tmp_path / 'three')


def test_an_unhashable_thing_is_a_bug_not_a_guess():
    with pytest.raises(TypeError): fingerprint(object())


def test_secrets_of_the_environment_are_redacted_in_every_spelling(monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'quo"te\\and-more')
    assert redact('key=quo"te\\and-more') == 'key=[redacted]'
    assert 'and-more' not in redact('{"k": "quo\\"te\\\\and-more"}')
    register_secret('abc')
    assert redact('abc') == 'abc', 'three letters would blot out ordinary words'


@pytest.mark.parametrize('text', ['sk-proj-ABCDEFGHIJKLMNOP', 'hf_abcdefghijklmnopqrst', 'AKIAIOSFODNN7EXAMPLE', 'ghp_abcdefghijklmnopqrstuvwxyz0123', 'postgresql://bob:hunter22@host/db'])
def test_key_shapes_are_redacted(text):
    assert '[redacted]' in redact(f'before {text} after') and redact(f'before {text} after').endswith('after')


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('mounting a small tmpfs needs root')
    try:
        atomic_write(disk / 'note', 'old')
        with pytest.raises(LabError, match='cannot be written: No space left'): atomic_write(disk / 'note', b'x' * 200_000)
        assert (disk / 'note').read_text() == 'old' and [p.name for p in disk.iterdir()] == ['note']
    finally: subprocess.run(['umount', disk], check=True)


def test_git_state_sees_commits_and_changes(tmp_path):
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True)
    assert git_state(tmp_path) == {}
    git('init', '-q'); (tmp_path / 'f').write_text('1'); git('add', 'f'); git('commit', '-qm', 'one')
    clean = git_state(tmp_path)
    assert clean['dirty'] == 'false' and len(clean['commit']) == 40
    (tmp_path / 'f').write_text('2')
    assert git_state(tmp_path)['dirty'] == 'true' and git_state(tmp_path)['patch']


def test_provenance_is_flat_text_and_free_of_secrets(monkeypatch):
    p = provenance()
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in p.items())
    assert p['package.torch'].startswith('2') and p['code'] and p['hardware.cores'] == str(os.cpu_count())




def test_importing_the_package_loads_nothing_heavy():
    heavy = ['torch', 'transformers', 'mlflow', 'pandas', 'scipy', 'sklearn', 'seaborn', 'datasets', 'papermill', 'openai', 'duckdb']
    code = f'import sys, genai_lab, genai_lab.core; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
