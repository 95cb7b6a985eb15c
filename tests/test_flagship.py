"The main job, small: the flagship notebook through the command line, twice, and in a plain kernel."
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest

root = Path(__file__).resolve().parents[1]
notebook = root / 'experiments' / '01_compare_prompts.ipynb'
small = ['-p', 'per_department=4', '-p', 'shots=1', '-p', 'more_shots=2']


def lab(*args, **env):
    "Call the command line as a user would."
    return subprocess.run([Path(sys.executable).parent / 'genai-lab', *map(str, args)], cwd=root, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def runs(tmp_path_factory, database_template):
    "Two runs of the same command; their terminal output, MLflow records and folders."
    import shutil
    home = tmp_path_factory.mktemp('flagship')
    shutil.copy(database_template, home / 'mlflow.db')
    env = dict(GENAI_LAB_TRACKING_URI=f'sqlite:///{home}/mlflow.db', GENAI_LAB_ARTIFACT_ROOT=str(home / 'artifacts'))
    said = [lab('run', notebook, *small, '--output', home / f'out{i}', **env) for i in (1, 2)]
    client = mlflow.MlflowClient(tracking_uri=env['GENAI_LAB_TRACKING_URI'])
    found = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    return said, sorted(found, key=lambda r: r.info.start_time), [home / 'out1', home / 'out2'], home


def test_it_ends_well_and_shows_table_verdict_and_where_to_look(runs):
    for r in runs[0]:
        assert r.returncode == 0, r.stderr
        for variant in ('zero-shot', 'few-shot', 'designed'): assert re.search(rf'{variant}\s+[\d.]+% \[[\d.]+, [\d.]+\]', r.stdout), r.stdout
        assert re.search(r'beats|No difference can be claimed', r.stdout)
        for word in ('notebook', 'HTML', 'story', 'MLflow'): assert word in r.stdout


def test_the_same_command_twice_gives_the_same_numbers_bit_for_bit(runs):
    a, b = runs[1]
    assert a.data.metrics == b.data.metrics and len(a.data.metrics) >= 9
    files = [sorted(p.relative_to(o) for p in o.rglob('*.parquet')) for o in runs[2]]
    assert files[0] == files[1] and len(files[0]) >= 3
    for f in files[0]: pd.testing.assert_frame_equal(pd.read_parquet(runs[2][0] / f), pd.read_parquet(runs[2][1] / f), check_exact=True)


def test_the_record_holds_what_is_needed_to_believe_and_repeat_it(runs):
    _, (run, _), (out, _), home = runs
    assert run.info.status == 'FINISHED'
    assert run.data.params['per_department'] == '4' and run.data.params['seed'] == '20', 'defaults are recorded as well'
    tags = ' '.join(run.data.tags)
    for part in ('git.commit', 'package.torch', 'hardware.cpu', 'code'): assert part in tags or not (root / '.git').exists(), part
    assert any('data' in k for k in run.data.tags) and any('model' in k for k in run.data.tags) and any('prompt' in k for k in run.data.tags)
    artifacts = [p.name for p in (home / 'artifacts').rglob('*') if p.is_file()]
    for name in ('01_compare_prompts.ipynb', '01_compare_prompts.html', 'story.html'): assert name in artifacts
    assert any(n.endswith('.png') for n in artifacts) and any(n.endswith('.parquet') for n in artifacts)


def test_every_number_has_its_interval(runs):
    m = runs[1][0].data.metrics
    values = [k for k in m if re.search(r'accuracy$', k)]
    assert len(values) >= 3
    for k in values: assert f'{k}.low' in m and f'{k}.high' in m and m[f'{k}.low'] <= m[k] <= m[f'{k}.high'], sorted(m)


def test_no_test_product_is_in_a_prompt(runs):
    for f in runs[2][0].rglob('*.parquet'):
        s = pd.read_parquet(f)
        if 'prompt' in s:
            asked = s.prompt.str.rsplit('Product: ', n=1).str[-1]
            for question, text in zip(asked, s.prompt): assert text.count('Product: ' + question) == 1
            assert len(s) == 32


def test_the_experiment_of_the_readme_runs_as_it_is_printed(tmp_path, mlflow_home):
    import nbformat
    code = re.search(r'```python\n(.*?)```', (root / 'README.md').read_text(), re.S)[1]
    parameters, rest = code.split('\n\n', 1)
    pd.DataFrame(dict(text=['Fresh bread, kind staff.', 'The milk was sour.', 'I will come again!', 'Never again.'], tone=['happy', 'unhappy'] * 2)).to_csv(tmp_path / 'reviews.csv', index=False)
    v4 = nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_code_cell(parameters, metadata=dict(tags=['parameters'])), v4.new_code_cell(rest)])
    nbformat.write(nb, tmp_path / 'review_tone.ipynb')
    r = lab('run', tmp_path / 'review_tone.ipynb', '-p', f'file={tmp_path}/reviews.csv', GENAI_LAB_SETTINGS=str(root / 'settings.ini'))
    assert r.returncode == 0, r.stderr + r.stdout
    assert 'short' in r.stdout and 'question' in r.stdout and 'No difference can be claimed' in r.stdout, r.stdout
