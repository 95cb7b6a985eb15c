"Hygiene of notebooks: every fixture has the one fault that its name says; new experiments; schedules that cron and systemd understand."
import ast
import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from genai_lab.core import LabError
from genai_lab.experiments import Stop
from genai_lab.hygiene import calendar_lines, check_notebook, new_experiment, parse_when, read_code, rules, schedule, static_findings, upcoming
from genai_lab.notebooks import read_notebook

root = Path(__file__).resolve().parents[1]
notebooks = Path(__file__).parent / 'notebooks'


def found(name):
    path = notebooks / f'{name}.ipynb'
    return [(f.rule, f.cell, f.line) for f in static_findings(read_notebook(path), path)]


def messages(name):
    path = notebooks / f'{name}.ipynb'
    return [f.message for f in static_findings(read_notebook(path), path)]


# what is found by reading

@pytest.mark.parametrize('name, expected', [
    ('well_formed', []),
    ('uses_parameters_in_strings_and_magics', []),
    ('no_title', [('title', None, None)]),
    ('no_parameters', [('finish', None, None), ('parameters', None, None), ('title', None, None)]),
    ('no_types', [('typed', 1, 2), ('typed', 1, 3), ('typed', 1, 4)]),
    ('two_parameters_cells', [('parameters', 2, None)]),
    ('computes_in_parameters', [('parameters', 1, 2)]),
    ('unused_parameter', [('unused', 1, 2)]),
    ('sets_a_parameter_again', [('unused', 3, 1)]),
    ('defined_below', [('undefined', 3, 1)]),
    ('needs_a_deleted_cell', [('undefined', 3, 1)]),
    ('calls_a_function_too_early', [('undefined', 4, 1)]),
    ('executed_out_of_order', [('order', 4, None)]),
    ('absolute_paths', [('path', 3, line) for line in (2, 3, 4, 5, 6, 7, 8)]),
    ('shows_its_secrets', [('secret', None, None), ('secret', 3, 1), ('secret', 3, 2), ('secret', 3, 3), ('secret', 4, None)]),
    ('draws_without_a_seed', [('seed', 3, 1), ('seed', 3, 2)]),
    ('seed_is_no_parameter', [('seed', None, None)]),
    ('reads_data_without_a_trace', [('data', 3, 2)]),
    ('never_finishes', [('title', None, None), ('finish', 2, 2)]),
    ('logs_after_the_end', [('finish', 5, 1)]),
    ('records_nothing', [('finish', None, None)]),
    ('does_not_parse', [('syntax', 3, 2)]),
    ('silences_its_findings', [('ignore', 3, 2), ('path', 3, 2)]),
])
def test_each_notebook_has_the_fault_of_its_name(name, expected):
    assert found(name) == expected


def test_findings_say_what_to_do():
    assert 'in cell 4; move that up' in messages('defined_below')[0] and 'was the cell deleted' in messages('needs_a_deleted_cell')[0]
    assert 'count() is called here and reads "extra", which is defined below, in cell 5' in messages('calls_a_function_too_early')[0]
    assert '([6] after [7]); restart the kernel' in messages('executed_out_of_order')[0]
    assert 'whatever value a run gives' in messages('computes_in_parameters')[0]
    assert 'Did you mean "path"?' in messages('silences_its_findings')[0]


def test_a_finding_does_not_repeat_the_secret():
    report = check_notebook(notebooks / 'shows_its_secrets.ipynb', run=False)
    for text in (str(report), report._repr_html_(), json.dumps(report.to_dict())): assert not re.search('walrus|mauve|stoat|abcdefghij', text)


def test_the_labs_own_experiments_are_well_formed():
    for path in sorted((root / 'experiments').glob('*.ipynb')): assert static_findings(read_notebook(path), path) == [], path.name


@pytest.mark.parametrize('source, names', [
    ('!cp {a} $b\nx = 1', {'a', 'b'}),
    ('y = !ls {a}', {'a'}),
    ('x = 1\nx?', set()),
    ('?print', set()),
    ('%%bash -s "$a"\nif [ $b ]; then echo; fi', {'a', 'b'}),
    ('\n%%time\nfor i in range(3):\n    %timeit -n 1 -r 1 f(i)', set()),
    ('%matplotlib inline\nimport os', set()),
    ("!echo don't \\\n  stop (\nz = 1", set()),
    ('await f(x)', set()),
    ('s = """\n%d and !x\n"""', set()),
])
def test_what_is_not_python_keeps_its_place(source, names):
    c = read_code(1, dict(cell_type='code', source=source, metadata={}))
    assert c.error is None and c.names == names
    for n in ast.walk(c.tree):
        if isinstance(n, ast.Assign) and n.targets[0].id in 'xz': assert re.match(r'\s*[xz] = 1', source.split('\n')[n.lineno - 1])


def test_a_mistake_in_python_is_one_whatever_stands_around_it():
    c = read_code(1, dict(cell_type='code', source='!ls\nx = (1,\n%time y\n', metadata={}))
    assert c.error and c.tree is None


def test_rules_survive_odd_notebooks():
    code = lambda s, **kw: dict(cell_type='code', source=s, metadata={}, outputs=[]) | kw
    odd = ['from os import *\nprint(getcwd())', 'lambda x: (yield)', 'def f(a=b): global g; g = 1', 'x: int', 'del x', 'class A:\n    y = 1\n    def m(self): return A.y', 'async with a as b: pass', '{**c}', '%%html\n<p>', '%%', '%', '!', '\\', '?', '(', 'import', 'a = b = c', '[i for i in (j := 3,)]', 'match x:\n    case [y, *z]: pass', '\ufeffx = 1', 'f"{x!r:>{n}}"', '"\ud800"']
    for s in odd: static_findings(dict(cells=[code(s)], metadata={}), 'odd.ipynb')
    static_findings(dict(cells=[code('1', outputs=[dict(output_type='display_data', data={'application/json': {'a': [1]}, 'text/html': ['<p>']})], execution_count=None)], metadata={}))


# running

def test_a_good_notebook_is_run_and_nothing_is_recorded(tmp_path):
    before = sorted(notebooks.iterdir())
    report = check_notebook(notebooks / 'well_formed.ipynb', texts=dict(n='3'))
    assert (report.exit_code, report.ran, report.findings, report.ok) == (0, True, [], True)
    assert 'well-formed; it runs from top to bottom' in str(report)
    assert sorted(notebooks.iterdir()) == before and not (tmp_path / 'mlruns').exists()   # where runs of this test would be kept


def test_what_fails_from_a_clean_kernel_says_where():
    report = check_notebook(notebooks / 'works_only_in_an_old_kernel.ipynb')
    [f] = report.findings
    assert (f.rule, f.cell, f.line, report.exit_code, report.ran) == ('runs', 3, 1, 1, False) and "KeyError: 'tuesday'" in f.message


def test_what_cannot_run_is_not_run():
    report = check_notebook(notebooks / 'defined_below.ipynb')
    assert not report.ran and 'was not run, because of "undefined"' in report.headline() and report.exit_code == 1


def test_a_dead_kernel_and_a_time_out_are_findings_and_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
    died, hung = check_notebook(notebooks / 'dies.ipynb'), check_notebook(notebooks / 'hangs.ipynb', timeout=10)
    assert [f.message for f in died.findings if f.rule == 'runs'][0].startswith('the kernel died in cell 2')
    assert 'the time-out of 10 s passed in cell 3' in [f.message for f in hung.findings if f.rule == 'runs'][0]
    assert not list((tmp_path / 'tmp').iterdir())
    assert not [p for p in psutil.process_iter() if str(tmp_path) in ' '.join(_environ(p))]


def _environ(p):
    try: return [f'{k}={v}' for k, v in p.environ().items() if k == 'GENAI_LAB_RUN_DIR']
    except (psutil.Error, OSError): return []


def test_somebody_can_stop_the_check():
    stop = Stop()
    report = check_notebook(notebooks / 'hangs.ipynb', stop=stop, on_event=lambda e: e.cell == 3 and not stop.why and stop.ask())
    assert report.exit_code == 130 and not report.ran


def test_plain_mlflow_calls_in_a_checked_notebook_are_not_recorded(tmp_path):
    report = check_notebook(notebooks / 'uses_plain_mlflow.ipynb')
    assert report.ran and not (tmp_path / 'mlruns').exists() and not (notebooks / 'mlruns').exists()


@pytest.mark.parametrize('name, texts, words', [
    ('goood', None, 'Did you mean "good.ipynb"'), ('not_json', None, 'is no notebook'), ('no_code', None, 'no code to check'),
    ('well_formed', dict(m='3'), 'has no parameter "m"'), ('well_formed', dict(n='x'), 'takes a whole number'), ('unknown_kernel', None, 'not installed')])
def test_wrong_input_to_check(name, texts, words):
    with pytest.raises(LabError, match=words): check_notebook(notebooks / f'{name}.ipynb', texts=texts)


# new experiments

def test_new_experiments_get_the_next_number_and_never_overwrite(tmp_path):
    (tmp_path / '07_tone.ipynb').write_text('mine')
    (tmp_path / 'bench.ipynb').write_text('mine')
    names = [new_experiment(n, tmp_path).name for n in ('tone', 'Tone!', '07_tone.ipynb', 'x/../Über Größe')]
    assert names == ['08_tone.ipynb', '09_tone.ipynb', '10_tone.ipynb', '11_uber_grosse.ipynb']
    assert (tmp_path / '07_tone.ipynb').read_text() == 'mine' and {p.parent for p in tmp_path.rglob('*')} == {tmp_path}
    for bad in ('', '???', '../..'):
        with pytest.raises(LabError, match='is no name'): new_experiment(bad, tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(LabError, match='cannot be written'): new_experiment('tone', tmp_path / 'file' / 'x')


def test_a_new_experiment_goes_beside_the_settings(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_text('[lab]\n')
    (tmp_path / 'deep').mkdir()
    monkeypatch.chdir(tmp_path / 'deep')
    monkeypatch.delenv('GENAI_LAB_SETTINGS', raising=False)
    assert new_experiment('tone') == tmp_path / 'experiments' / '01_tone.ipynb'


def test_a_new_experiment_passes_the_check_and_runs(model, tmp_path):
    import nbformat
    path = new_experiment('review tone', tmp_path)
    nbformat.validate(nbformat.read(path, 4))
    report = check_notebook(path, texts=dict(departments='3', per_department='3'))
    assert (report.findings, report.ran, report.exit_code) == ([], True, 0)


# times

@pytest.mark.parametrize('text, cron', [
    ('daily 02:30', '30 2 * * *'), ('Daily 2:30', '30 2 * * *'), ('hourly', '0 * * * *'), ('hourly :15', '15 * * * *'), ('weekdays 06:00', '0 6 * * 1-5'), ('weekends 9:05', '5 9 * * 0,6'), ('mon 07:15', '15 7 * * 1'),
    ('Monday 07:15', '15 7 * * 1'), ('mon,thu 07:15', '15 7 * * 1,4'), ('wednesdays 23:59', '59 23 * * 3'), ('sun 0:00', '0 0 * * 0'), ('*/10 * * * *', '*/10 * * * *'), ('0 6 1,15 * MON-FRI', '0 6 1,15 * mon-fri'), ('0 0 29 2 *', '0 0 29 2 *'), ('0 0 * * 7', '0 0 * * 7')])
def test_times(text, cron): assert parse_when(text).cron == cron


@pytest.mark.parametrize('text, words', [
    ('', 'when'), ('daily', 'at what time'), ('mon', 'at what time'), ('daily 24:00', 'is no hour'), ('daily 12:60', 'is no minute'), ('daily noon', 'no time of day'), ('sometimes', 'no time that I understand'), ('daily at 2:30', 'no time that I understand'),
    ('* * * *', 'no time'), ('* * * * * *', 'no time'), ('60 * * * *', '"60" is no minute'), ('* 24 * * *', 'is no hour'), ('* * 0 * *', 'is no day'), ('* * * 13 *', 'is no month'), ('* * * * 8', 'is no weekday'), ('*/0 * * * *', 'is no minute'),
    ('5-1 * * * *', 'backwards'), ('a b c d e', 'is no minute'), ('0 0 30 2 *', 'never comes'), ('0 0 31 4,6 *', 'never comes'), ('-1 * * * *', 'is no minute'), ('1,,2 * * * *', 'is no minute'), ('१ * * * *', 'is no minute'), ('0 0 * * fri-mon', 'backwards')])
def test_nonsense_is_refused_with_advice(text, words):
    with pytest.raises(LabError, match=words): parse_when(text)


def test_the_next_times_are_those_of_cron():
    now = datetime(2026, 2, 27, 12, 0)   # a Friday
    at = lambda text, n=2: [t.strftime('%m-%d %H:%M') for t in upcoming(parse_when(text), n, now)]
    assert at('daily 02:30') == ['02-28 02:30', '03-01 02:30'] and at('weekdays 06:00') == ['03-02 06:00', '03-03 06:00'] and at('hourly') == ['02-27 13:00', '02-27 14:00']
    assert at('0 6 1 * mon') == ['03-01 06:00', '03-02 06:00'] and at('0 0 * * 7', 1) == ['03-01 00:00'] and at('0 0 29 2 *', 1) == ['02-29 00:00']
    assert at('0 12 * * *', 1) == ['02-28 12:00']


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='no systemd here')
def test_systemd_sees_the_same_times():
    now = datetime(2026, 2, 27, 12, 0)
    texts = ['daily 02:30', 'hourly :15', 'weekdays 06:00', 'sun,wed 07:15', '*/20 8-10 * * *', '0 0 1 jan,jul *', '30 4 1-7 * *', '0 0 29 2 *']
    lines = [calendar_lines(parse_when(t)) for t in texts]
    out = subprocess.run(['systemd-analyze', 'calendar', '--iterations=3', '--base-time=2026-02-27 12:00:00', *[l for ls in lines for l in ls]], capture_output=True, text=True)
    if 'unrecognized option' in out.stderr: pytest.skip('this systemd-analyze is too old')
    assert out.returncode == 0, out.stderr
    blocks = re.split(r'\n\s*\n', out.stdout.strip())
    for text, block in zip(texts, blocks):
        shown = re.findall(r'(?:Next elapse|Iter\. #\d|Iteration #\d): \w+ (\d{4}-\d\d-\d\d \d\d:\d\d)', block)
        assert shown == [t.strftime('%Y-%m-%d %H:%M') for t in upcoming(parse_when(text), 3, now)], text


# schedules

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A lab whose path is awkward; commands are typed in it."
    home = tmp_path / 'my lab 100%'
    (home / 'experiments').mkdir(parents=True)
    (home / 'settings.ini').write_text('[lab]\n')
    (home / 'experiments' / 'tone.ipynb').write_text('{}')
    monkeypatch.chdir(home)
    monkeypatch.delenv('GENAI_LAB_SETTINGS', raising=False)
    return home


@pytest.fixture
def program(tmp_path):
    "A program that writes down what it was called with, and where."
    path = tmp_path / 'bin dir' / 'genai-lab'
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n[ -z "$SLOW" ] || sleep "$SLOW"\n')
    path.chmod(0o755)
    return str(path)


odd = ['run', 'experiments/tone.ipynb', '-p', "name=it's $HOME 100% \"sure\" `date` \\ ok", '-g', 'x=1,2', '-p', 'empty=']


def cron_command(text):
    "What cron hands to /bin/sh: the sixth field, with escaped percent signs."
    line = text.splitlines()[1].split(' ', 5)[5]
    assert not re.search(r'(?<!\\)%', line)
    return line.replace('\\%', '%')


@pytest.mark.skipif(not shutil.which('flock'), reason='no flock here')
def test_what_cron_would_run_arrives_as_it_was_typed(desk, program):
    s = schedule(odd, 'daily 02:30', program=program)
    assert str(s).startswith('# genai-lab schedule: tone\n30 2 * * * ')
    env = dict(PATH='/usr/bin:/bin', HOME='/nowhere')
    done = subprocess.run(['/bin/sh', '-c', cron_command(str(s))], env=env, cwd='/', capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert (desk / 'logs' / 'tone.log').read_text().splitlines() == [str(desk), *odd]
    first = subprocess.Popen(['/bin/sh', '-c', cron_command(str(s))], env=env | dict(SLOW='20'), cwd='/', start_new_session=True)
    try:
        while len((desk / 'logs' / 'tone.log').read_text().splitlines()) < 2 * (len(odd) + 1): pass
        assert subprocess.run(['/bin/sh', '-c', cron_command(str(s))], env=env, cwd='/').returncode == 75   # the first one still holds the lock
    finally: os.killpg(first.pid, 9); first.wait()


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='no systemd here')
def test_systemd_understands_the_units(desk, program, tmp_path):
    s = schedule(odd, 'weekdays 06:00', kind='systemd', name='night & day', program=program)
    units = tmp_path / 'units'
    units.mkdir()
    (desk / 'logs').mkdir()
    assert list(s.units()) == ['genai-lab-night-day.service', 'genai-lab-night-day.timer']
    for name, text in s.units().items(): (units / name).write_text(text)
    done = subprocess.run(['systemd-analyze', 'verify', '--user', '--man=no', *map(str, units.iterdir())], capture_output=True, text=True, env={**os.environ, 'SYSTEMD_UNIT_PATH': f'{units}:', 'XDG_RUNTIME_DIR': str(tmp_path)})
    complaints = [l for l in done.stderr.splitlines() if 'genai-lab-night-day' in l]
    assert complaints == [] and 'WorkingDirectory=' + str(desk).replace('%', '%%') in s.units()['genai-lab-night-day.service']


@pytest.mark.parametrize('command, words', [
    ('', 'what is to be run'), ('genai-lab', 'what is to be run'), ('rum experiments/tone.ipynb', 'Did you mean "run"'), ('run experiments/tome.ipynb', 'no such file'), ('run --grid night.yaml', 'no such file'), ('run experiments/tone.ipynb -p api_key=mauve-walrus', 'is a secret'),
    (['run', 'experiments/tone.ipynb', '-p', 'a=1\n2'], 'one line'), ("run 'experiments", 'quot'), ('run experiments/tone.ipynb -p x=sk-abcdefghij0123456789', 'is a secret')])
def test_commands_that_would_fail_at_night_are_refused_now(desk, command, words):
    with pytest.raises(LabError, match=words) as e: schedule(command, 'hourly')
    assert 'walrus' not in str(e.value) and 'abcdefghij' not in str(e.value)
    with pytest.raises(LabError, match='cron or systemd'): schedule('run experiments/tone.ipynb', 'hourly', kind='at')


def test_installing_replaces_an_entry_of_the_same_name_and_nothing_else(desk, tmp_path, monkeypatch):
    "Against a stand-in for crontab, which is not installed everywhere: it keeps what it is given in a file."
    store, fake = tmp_path / 'tab', tmp_path / 'fake'
    fake.mkdir()
    (fake / 'crontab').write_text(f'#!/bin/sh\nif [ "$1" = -l ]; then cat "{store}" 2>/dev/null || {{ echo "no crontab for me" >&2; exit 1; }}; else cat > "{store}"; fi\n')
    (fake / 'crontab').chmod(0o755)
    monkeypatch.setenv('PATH', f'{fake}:{os.environ["PATH"]}')
    first = schedule('run experiments/tone.ipynb', 'daily 02:30', program='/x/genai-lab')
    first.install()
    assert store.read_text() == str(first) and (desk / 'logs').is_dir()
    store.write_text('MAILTO=ann\n0 5 * * * backup\n' + store.read_text() + '# mine\n')
    second = schedule('run experiments/tone.ipynb', 'hourly', program='/x/genai-lab')
    said = second.install()
    assert store.read_text() == 'MAILTO=ann\n0 5 * * * backup\n# mine\n' + str(second) and 'crontab -e' in said[0]


def test_without_cron_it_says_so(desk, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(LabError, match='no crontab on this machine; install cron, or use --kind systemd'): schedule('run experiments/tone.ipynb', 'hourly', program='/x/genai-lab').install()


def test_units_are_written_even_where_systemd_does_not_run(desk, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'config'))
    monkeypatch.setenv('PATH', '/nowhere')
    said = schedule('run experiments/tone.ipynb', 'hourly', kind='systemd', program='/x/genai-lab').install()
    assert {p.name for p in (tmp_path / 'config' / 'systemd' / 'user').iterdir()} == {'genai-lab-tone.service', 'genai-lab-tone.timer'}
    assert 'systemctl --user daemon-reload && systemctl --user enable --now genai-lab-tone.timer' in said[-1]


def test_the_examples_for_airflow_and_github_are_what_they_claim_to_be():
    import yaml
    text = '\n'.join(''.join(c['source']) for c in json.loads((root / 'nbs' / '33_hygiene.ipynb').read_text())['cells'] if c['cell_type'] == 'markdown')
    [airflow], [actions] = re.findall(r'```python\n(.*?)```', text, re.S), re.findall(r'```yaml\n(.*?)```', text, re.S)
    ast.parse(airflow)
    jobs = yaml.safe_load(actions)['jobs']
    assert {s['run'].split()[0] for j in jobs.values() for s in j['steps'] if 'run' in s} == {'pip', 'genai-lab', 'set', 'jq'}


def test_every_rule_is_explained(): assert set(rules) >= {'title', 'parameters', 'typed', 'unused', 'undefined', 'order', 'path', 'secret', 'seed', 'data', 'finish'} and all(r.about for r in rules.values())
