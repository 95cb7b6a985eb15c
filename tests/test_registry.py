"The prompt registry: what comes back, who is first, what changed, and files in git; on SQLite and through a server."
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_team import Server

from genai_lab import registry
from genai_lab.core import LabError, forget_inputs, inputs, register_secret
from genai_lab.evaluation import evaluate
from genai_lab.prompts import Prompt, load_prompt, save_prompt
from genai_lab.registry import AliasMoved, alias_history, behaviour_diff, drop_alias, history, list_prompts, load, register, register_file, set_alias, set_tags, sync, text_diff
from genai_lab.runs import changed_inputs
from genai_lab.tasks import Task
from genai_lab.tracking import connect, start_run

root = Path(__file__).resolve().parents[1]
plain = Prompt('Review: {{ text }}\nHappy?', name='tone')
full = Prompt('{{ product }} ({{ category }})\nIn:', system='Departments: {{ choices | join(", ") }}.', answer='{{ label }}', name='full', delimiter='\t', separator='\n--\n',
              examples=[dict(product='Crème “brûlée” {{ x }} {% y %} 🥐', category='A\nB', label='Ⅷ', price=1.5, n=3, ok=True), dict(product='{"a": 1}', category='  ', label='', price=None)],
              blank=[dict(product='N/A', category='')], turns=[('assistant', 'Which store, {{ product }}?'), ('user', 'Any.')],
              schema=dict(type='object', properties=dict(label=dict(type='string'))), about=dict(owner='Anna', languages=['en', 'fr'], reviewed=dict(by='Bo', n=2)))


@pytest.fixture(autouse=True)
def here(mlflow_home, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    forget_inputs()


@pytest.fixture(scope='module')
def team(tmp_path_factory, database_template):
    "A tracking server with SQLite behind it."
    home = tmp_path_factory.mktemp('server')
    shutil.copy(database_template, home / 'mlflow.db')
    server = Server(home / 'artifacts', f'sqlite:///{home}/mlflow.db').start()
    yield server
    server.kill()


@pytest.fixture(params=['sqlite', 'server'])
def store(request, monkeypatch):
    "Both kinds of store, empty."
    if request.param == 'server': monkeypatch.setenv('GENAI_LAB_TRACKING_URI', request.getfixturevalue('team').url)
    yield request.param
    if request.param == 'server':
        for p in (client := connect()).search_prompts(max_results=1000): client.delete_prompt(p.name)


def raises(words, kind=LabError):
    return pytest.raises(kind, match=words)


# what comes back

@pytest.mark.parametrize('prompt', [plain, full, replace(full, examples=(), answer='', turns=()), Prompt(' ', name='x')], ids=['plain', 'full', 'without examples', 'blank'])
def test_a_prompt_comes_back_as_it_was(prompt):
    v = register(prompt, 'because', tags=dict(area='food'), run_id='0123456789abcdef')
    assert (v.version, v.message, v.tags, v.run_id, v.made_by, v.aliases, v.note) == (1, 'because', dict(area='food'), '0123456789abcdef', 'genai_lab', (), '')
    back = load(prompt.name)
    assert back.prompt == prompt and back.fingerprint == v.fingerprint == prompt.fingerprint and back.prompt.about == prompt.about and back.user and back.created
    row = dict(product='RYE', category='Bread', choices=['a', 'b'], text='fine')
    assert back.prompt.messages(row) == prompt.messages(row) and back.prompt.text(row) == prompt.text(row)


def test_a_large_prompt_survives_unharmed(store):
    rows = [dict(product=f'Product ü {i} ' + 'x' * (i % 90), category='Käse', label=f'L{i % 40}') for i in range(6000)]
    prompt = replace(full, name='large', examples=rows)
    register(prompt)
    assert load(prompt.name).prompt == prompt and len(load(prompt.name).prompt.examples) == 6000


def test_a_prompt_that_is_too_large_is_refused_before_anything_is_written():
    with raises('takes 4,.* characters and the registry 4,000,000; show fewer examples'): register(replace(full, examples=[dict(product='x' * 1000, category='', label='')] * 4100))
    assert list_prompts().empty


def test_a_selector_is_kept_with_its_rows(tmp_path):
    from genai_lab.fewshot import bm25_examples
    pool = pd.DataFrame(dict(product=['ice cream', 'rye bread', 'brie cheese', 'frozen peas'], label=['Frozen', 'Bakery', 'Dairy', 'Frozen']))
    pool.to_csv(tmp_path / 'pool.csv', index=False)
    for i, source in enumerate([pool, str(tmp_path / 'pool.csv')]):
        prompt = Prompt('{{ product }}:', answer='{{ label }}', examples=bm25_examples(source, k=2, columns=['product']), name=f'picks{i}')
        assert register(prompt).version == 1 and register(prompt).note
    (tmp_path / 'pool.csv').unlink()
    for i in (0, 1):
        back = load(f'picks{i}').prompt
        assert back.fingerprint == prompt.fingerprint and 'frozen peas' in back.text(dict(product='frozen corn'))


def test_mlflow_itself_can_read_what_we_write(store):
    prompt = Prompt('Product: {{ product }}', system='You sort.', examples=[dict(product='RYE {{ product }}', label='Bakery')], answer='{{ label }}', name='shown')
    v = register(prompt)
    said = connect().get_prompt_version(prompt.name, v.version)
    assert said.format(product='BRIE') == [dict(role='system', content='You sort.'), dict(role='user', content='Product: RYE { { product }}'), dict(role='assistant', content='Bakery'), dict(role='user', content='Product: BRIE')]


@pytest.mark.parametrize('tag, value', [('genai_lab.prompt.000', '{"template": "other"}'), ('genai_lab.prompt', '2 00'), ('genai_lab.prompt', 'x'), ('genai_lab.fingerprint', 'f' * 16), ('genai_lab.prompt.000', None)])
def test_a_damaged_version_is_refused_and_the_next_one_can_be_registered(tag, value):
    register(plain)
    client = connect()
    client.delete_prompt_version_tag('tone', 1, tag) if value is None else client.set_prompt_version_tag('tone', 1, tag, value)
    with raises('prompt "tone" version 1 is damaged in the registry'): load('tone/1')
    assert register(plain).version == 2 and load('tone').prompt == plain and history('tone').version.tolist() == [2, 1]


def test_what_mlflow_has_made_comes_as_far_as_it_goes():
    client = connect()
    client.register_prompt('text', 'Is {{ text }} happy?', commit_message='by hand')
    v = load('text')
    assert (v.prompt.template, v.made_by, v.message, v.tags) == ('Is {{ text }} happy?', 'mlflow', 'by hand', {}) and v.prompt.text(dict(text='it')) == 'Is it happy?' and 'made in MLflow' in str(v)
    client.register_prompt('chat', [dict(role='system', content='S'), dict(role='user', content='A'), dict(role='assistant', content='B'), dict(role='user', content='{{ q }}')], response_format=dict(type='object'))
    p = load('chat').prompt
    assert (p.system, p.turns, p.template, p.schema) == ('S', (('user', 'A'), ('assistant', 'B')), '{{ q }}', dict(type='object'))
    client.register_prompt('odd', [dict(role='user', content='A'), dict(role='assistant', content='B')])
    with raises('prompt "odd" version 1 was made in MLflow and is no prompt of genai_lab: .*the last one the user'): load('odd')
    client.register_prompt('broken', 'Say {% if %}')
    with raises('prompt "broken" version 1 was made in MLflow and is no prompt of genai_lab: .*line 1'): load('broken')
    assert register(Prompt('Is {{ text }} happy?', name='text')).version == 2   # the same text, and now whole


# versions

def test_the_same_content_makes_no_new_version():
    prompt = plain
    assert [register(prompt).version, register(prompt, 'again').version] == [1, 1] and 'no new version' in str(register(prompt))
    owned = register(replace(prompt, about=dict(owner='Anna')))
    assert owned.version == 2 and owned.fingerprint == prompt.fingerprint
    assert register(prompt).version == 3, 'an earlier content is a new version'
    with raises('the latest version of prompt .* is 3 and not 2 any more', AliasMoved): register(owned.prompt, expect=2)
    with raises('is 3 and not none any more', AliasMoved): register(owned.prompt, expect=None)


@pytest.mark.parametrize('name, words', [('', 'a prompt needs a name to be registered'), ('my prompt', '"my-prompt" would do'), ('a/b', '"a-b" would do'), ('.hidden', 'cannot be the name'), ('ü', 'cannot be the name'), ('x' * 201, 'at most 200'),
                                         ('genai_lab.lock.x', 'cannot be the name')])
def test_names_that_do_not_do(name, words):
    with raises(words) as e: register(replace(plain, name=name))
    assert '\n' not in str(e.value) and list_prompts().empty


def test_the_name_of_a_model_is_taken():
    connect().create_registered_model('tone')
    with raises('"tone" is the name of a registered model'): register(plain)
    with raises('there is no prompt "tone"'): load('tone')


def test_values_tags_and_messages_that_do_not_do():
    from datetime import date
    with raises('does not come back from text|cannot be stored'): register(Prompt('{{ d }}', answer='{{ a }}', examples=[dict(d=date(2026, 1, 1), a='x')], name='dates'))
    with raises('5,000 at most'): register(plain, 'x' * 5001)
    for key in ('genai_lab.run_id', 'mlflow.x', 'a\nb', ''):
        with raises('cannot be a tag'): register(plain, tags={key: 'x'})
    register(plain, 'two\nlines, “quoted”', tags={'score': .5, 'a b/c-d.e': 'ü'})
    assert load('tone').tags == {'score': '0.5', 'a b/c-d.e': 'ü'} and load('tone').message == 'two\nlines, “quoted”'
    set_tags('tone/1', dict(evidence='x' * 60_000))
    assert len(load('tone').tags['evidence']) == 60_000
    with raises('60,000 at most'): set_tags('tone/1', dict(evidence='x' * 60_001))


def test_a_secret_does_not_get_in():
    register_secret('mauve-walrus-7')
    with raises('holds a secret') as e: register(replace(plain, system='The key is mauve-walrus-7.'))
    assert 'walrus' not in str(e.value) and list_prompts().empty
    assert 'walrus' not in register(plain, 'key mauve-walrus-7', tags=dict(key='mauve-walrus-7')).message + str(load('tone').tags)


def test_what_does_not_exist_is_said_with_what_does(store):
    prompt = plain
    with raises(f'there is no prompt "{prompt.name}" in the registry'): load(prompt.name)
    register(prompt); set_alias(prompt.name, 'champion', 1)
    with raises(f'Did you mean "{prompt.name}"'): load('x' + prompt.name)
    with raises(r'has no alias "champoin". Did you mean "champion"\? There are: champion \(version 1\)'): load(f'{prompt.name}@champoin')
    with raises('has no version 7; the latest is 1'): load(f'{prompt.name}/7')
    with raises('has no version 7'): set_alias(prompt.name, 'champion', 7)
    with raises('has no alias "canary"'): drop_alias(prompt.name, 'canary')
    with raises('there is no prompt "nowhere"'): set_alias('nowhere', 'champion', 1)
    with raises('there is no prompt "nowhere"'): history('nowhere')
    assert drop_alias(prompt.name, 'champion') == 1
    with raises('It has none yet'): load(f'{prompt.name}@champion')


@pytest.mark.parametrize('ref', ['', 'a b', 'a/b', 'a@', 'a/1@b', "x' OR 1=1", 'a//1', 'prompts:/'])
def test_references_that_name_no_prompt(ref):
    with raises('names no prompt; write name, name/3 or name@champion'): load(ref)


@pytest.mark.parametrize('alias', ['', 'latest', 'Latest', 'v3', '3', 'a b', 'a/b', '-x', 'x' * 101])
def test_aliases_that_do_not_do(alias):
    register(plain)
    with raises('cannot be an alias'): set_alias('tone', alias, 1)


def test_history_and_lists(store):
    a = plain
    register(a, 'first'); register(replace(a, system='S'), 'second', run_id='abc')
    set_alias(a.name, 'champion', 1); set_alias(a.name, 'champion', 2, expect=1); set_alias(a.name, 'old', 1); set_alias(a.name, 'champion', 2)
    h = history(a.name)
    assert h.version.tolist() == [2, 1] and h.message.tolist() == ['second', 'first'] and h.aliases.tolist() == ['champion', 'old'] and h.fingerprint.tolist() == [replace(a, system='S').fingerprint, a.fingerprint] and h.run.tolist() == ['abc', '']
    moves = alias_history(a.name, 'champion')
    assert moves.version.tolist() == [2, 1] and moves.before.fillna(0).tolist() == [1, 0]   # the last call has moved nothing
    row = list_prompts().set_index('prompt').loc[a.name]
    assert (row.latest, row.aliases, row.message) == (2, 'champion (version 2), old (version 1)', 'second')
    assert load(f'{a.name}@latest').version == load(f'prompts:/{a.name}/2').version == 2


def test_more_versions_than_a_page(monkeypatch):
    for i in range(3): register(replace(plain, system=str(i)))
    search = type(connect()).search_prompt_versions
    monkeypatch.setattr(type(connect()), 'search_prompt_versions', lambda self, name, max_results, page_token: search(self, name, 2, page_token))   # the real call, on pages of two
    assert history('tone').version.tolist() == [3, 2, 1]


# who is first

race = '''
import os, sys, time
import mlflow.store.model_registry.sqlalchemy_store, mlflow.genai
from genai_lab.registry import AliasMoved, register, set_alias
from genai_lab.prompts import Prompt

def work(what, k):
    if what == 'alias': set_alias('tone', 'champion', k + 2, expect=1)
    else: register(Prompt(f'{k} {{{{ text }}}}', name='new'), expect=None)

for what in ('alias', 'register'):
    children, start = [], time.time() + .3
    for k in range(4):
        if pid := os.fork(): children.append(pid); continue
        try: time.sleep(max(0, start - time.time())); work(what, k); os._exit(0)
        except AliasMoved: os._exit(3)
        except BaseException as e: print(type(e).__name__, e, file=sys.stderr); os._exit(1)
    print(*(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in children))
'''


def test_of_four_processes_exactly_one_moves_the_alias_and_one_registers(store):
    for i in range(5): register(replace(plain, system=str(i)))
    set_alias('tone', 'champion', 1)
    done = subprocess.run([sys.executable, '-c', race], capture_output=True, text=True, timeout=120)
    alias, new = (line.split() for line in done.stdout.splitlines())
    assert sorted(alias) == sorted(new) == ['0', '3', '3', '3'], done.stdout + done.stderr
    assert load('tone@champion').version == 2 + alias.index('0') == alias_history('tone', 'champion').version[0]
    assert history('new').version.tolist() == [1] and load('new').prompt.template[0] == str(new.index('0'))
    assert not list(connect().search_registered_models()), 'a lock was left behind'


def test_threads_that_move_an_alias_in_turns_lose_no_move():
    register(plain); register(replace(plain, system='S'))
    set_alias('tone', 'champion', 1)
    won = []

    def work():
        for _ in range(3):
            now = load('tone@champion', note=False).version
            try: set_alias('tone', 'champion', 3 - now, expect=now); won.append(now)
            except AliasMoved: pass
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert won and load('tone@champion').version == (1 if len(won) % 2 == 0 else 2) and len(alias_history('tone', 'champion')) == len(won) + 1


def test_expectations():
    register(plain); register(replace(plain, system='S'))
    with raises('is nowhere and not at version 1', AliasMoved): set_alias('tone', 'champion', 1, expect=1)
    set_alias('tone', 'champion', 1, expect=None)
    for wrong in (None, 2):
        with raises('is at version 1 and not', AliasMoved) as e: set_alias('tone', 'champion', 2, expect=wrong)
        with raises('is at version 1 and not', AliasMoved): drop_alias('tone', 'champion', expect=wrong)
    assert 'genai-lab prompts history tone' in str(e.value) and load('tone@champion').version == 1
    assert drop_alias('tone', 'champion', expect=1) == 1 and not [m for m in connect().search_registered_models()], 'a lock was left behind'


def test_the_lock_of_a_process_that_has_died_is_removed(monkeypatch):
    register(plain)
    monkeypatch.setattr(registry, 'lock_patience', .5)
    connect().create_registered_model('genai_lab.lock.tone', tags={'genai_lab.holder': 'somebody@elsewhere'})
    assert set_alias('tone', 'champion', 1).aliases == ('champion',) and not list(connect().search_registered_models())


def test_a_lock_that_is_always_taken_is_given_up_with_its_holder(monkeypatch):
    register(plain)
    monkeypatch.setattr(registry, 'lock_patience', .3)
    client, end = connect(), threading.Event()
    client.create_registered_model('genai_lab.lock.tone', tags={'genai_lab.holder': 'anna 0'})

    def busy():
        for i in range(10**6):
            if end.wait(.05): return
            client.set_registered_model_tag('genai_lab.lock.tone', 'genai_lab.holder', f'anna {i}')
    t = threading.Thread(target=busy); t.start()
    try:
        with raises('tone is being changed by others all the time .now by anna'): set_alias('tone', 'champion', 1)
    finally: end.set(); t.join()


def test_somebody_without_the_lock_is_noticed(monkeypatch):
    register(plain); register(replace(plain, system='S'))
    note = registry._note_move

    def meanwhile(client, v, alias, before): note(client, v, alias, before); client.set_prompt_alias('tone', 'champion', 2)   # in MLflow's pages
    monkeypatch.setattr(registry, '_note_move', meanwhile)
    with raises('is at version 2 and not at version 1', AliasMoved): set_alias('tone', 'champion', 1)


# stores

def test_a_registry_that_cannot_be_reached(monkeypatch, mlflow_home, tmp_path):
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', 'http://127.0.0.1:9')
    (tmp_path / 'prompts').mkdir(); save_prompt(plain, tmp_path / 'prompts' / 'tone.yaml')
    for call in (lambda: load('tone'), lambda: register(plain), lambda: set_alias('tone', 'a', 1), lambda: sync('prompts'), list_prompts):
        with raises('cannot be reached .*refused.*set_tracking_uri|cannot be reached .*tracking_uri'): call()


def test_tables_of_an_older_version(mlflow_home):
    import sqlalchemy as sa
    engine = sa.create_engine(f'sqlite:///{mlflow_home}/mlflow.db')
    with engine.begin() as db: db.execute(sa.text("UPDATE alembic_version SET version_num = '451aebb31d03'"))
    engine.dispose()
    with raises('has an older schema .*mlflow db upgrade'): load('tone')


def test_another_store_by_its_address(tmp_path, database_template):
    shutil.copy(database_template, tmp_path / 'other.db')
    uri = f'sqlite:///{tmp_path}/other.db'
    register(plain, uri=uri)
    assert load('tone', uri=uri).version == 1 and list_prompts().empty
    with raises('None is registered yet'): load('tone')


# runs

def test_a_run_remembers_the_prompts_it_has_loaded(mlflow_home):
    register(plain); register(replace(plain, system='S')); set_alias('tone', 'champion', 1)
    run = start_run('uses-prompts')
    load('tone@champion'); load('tone/2'); load('tone@champion', note=False)
    run.finish()
    client = connect()
    found = json.loads(open(client.download_artifacts(run.id, 'inputs.json')).read())
    assert found == [dict(kind='prompt', name='tone@champion', fingerprint=plain.fingerprint, path='', how=dict(version=1)), dict(kind='prompt', name='tone/2', fingerprint=replace(plain, system='S').fingerprint, path='', how=dict(version=2))]
    assert changed_inputs(client, run.id) == []
    set_alias('tone', 'champion', 2)
    assert changed_inputs(client, run.id) == ['prompt tone@champion has changed']
    drop_alias('tone', 'champion')
    assert changed_inputs(client, run.id) == ['prompt tone@champion cannot be found']
    v = register(replace(plain, system='found by a run'), run_id=run.id)
    assert [p['name'] for p in json.loads(client.get_run(run.id).data.tags['mlflow.linkedPrompts'])] == ['tone'] and load(v.ref).run_id == run.id


# what is different

def test_text_diffs(tmp_path):
    assert not text_diff(plain, replace(plain)) and 'are the same' in str(text_diff(plain, replace(plain)))
    register(plain); save_prompt(replace(plain, system='<b>New</b>', about=dict(owner='Anna')), tmp_path / 'new.yaml')
    d = text_diff('tone', tmp_path / 'new.yaml')
    assert [l for l in d.lines[2:] if l[0] in '+-'] == ['+about:', '+  owner: Anna', '+system: <b>New</b>'] and d.lines[0] == '--- tone/1' and not d.same_text
    assert '&lt;b&gt;' in d._repr_html_() and '<b>New' not in d._repr_html_()
    assert text_diff(plain, replace(plain, about=dict(owner='A'))).same_text and inputs() == []
    with raises('there is no prompt "tune"'): text_diff('tune', plain)
    with raises('cannot be read'): text_diff('gone.yaml', plain)


def test_the_answers_that_change(model):
    goods = pd.DataFrame(dict(product=['Vanilla ice cream', 'Bananas', 'Cheddar cheese', 'Rye bread', 'Frozen peas', 'Skimmed milk', 'Apples', 'Croissants', 'Yoghurt', 'Fish fingers'],
                              department=['Frozen', 'Produce', 'Dairy', 'Bakery', 'Frozen', 'Dairy', 'Produce', 'Bakery', 'Dairy', 'Frozen']))
    task = Task('goods', goods, target='department', choices=['Frozen', 'Produce', 'Dairy', 'Bakery'])
    a, b = Prompt('{{ product }} is', name='short'), Prompt('Department of a supermarket for "{{ product }}":', name='long')
    register(a)
    d = behaviour_diff('short', b, task, model, chat=False)
    ea, eb = (e.samples.prediction.to_numpy() for e in d.comparison.evaluations)
    assert (ea == evaluate(task, model, a, chat=False).samples.prediction).all()
    right = lambda e: e == goods.department.to_numpy()
    expected = dict(samples=10, changed=int((ea != eb).sum()), became_right=int((~right(ea) & right(eb)).sum()), became_wrong=int((right(ea) & ~right(eb)).sum()), otherwise=int(((ea != eb) & ~right(ea) & ~right(eb)).sum()))
    assert d.counts == expected and d.counts['changed'] > 0 and (d.test.wins, d.test.losses) == (d.counts['became_right'], d.counts['became_wrong'])
    rows = d.changes.set_index('id')
    assert all(rows.loc[i, 'short/1'] == ea[i] and rows.loc[i, 'long'] == eb[i] and rows.loc[i, 'product' if 'product' in rows else 'target'] for i in rows.index)
    assert 'of 10 answers' in str(d).lower() and 'became wrong' in d._repr_html_()
    same = behaviour_diff('short/1', a, task.head(2), model, chat=False)
    assert same.counts['changed'] == 0 and same.changes.empty and 'No difference' in str(same)


def test_failed_answers_are_counted_as_changes(model):
    task = Task('t', pd.DataFrame(dict(x=['a', 'b'], y=['A', 'B'])), target='y', choices=['A', 'B'])
    d = behaviour_diff(Prompt('{{ x }}', name='ok'), Prompt('{{ x }}' + ' word' * 9000, name='too-long'), task, model, chat=False)
    assert d.counts['changed'] == 2 and d.changes['too-long'].tolist() == ['failed'] * 2 and '2 failed with too-long' in d.sentence()


# files

@pytest.fixture
def files(tmp_path):
    folder = tmp_path / 'prompts'
    folder.mkdir()
    return folder


def write(folder, prompt): return save_prompt(prompt, folder / f'{prompt.name}.yaml')


def text(folder, name='tone'): return load_prompt(folder / f'{name}.yaml').template


def test_files_and_registry_meet_and_stay_together(store, files):
    a, b = plain, replace(plain, name='b')
    write(files, a); register(b)
    dry = sync(files, dry_run=True)
    assert a.name in dry.of('pushed') and b.name in dry.of('pulled') and not (files / f'{b.name}.yaml').exists() and not (files / '.sync.json').exists() and a.name not in set(list_prompts().prompt) and 'a dry run' in str(dry)
    r = sync(files)
    assert a.name in r.of('pushed') and b.name in r.of('pulled') and load(a.name).prompt == a and load_prompt(files / f'{b.name}.yaml') == b
    assert load(a.name).message == f'from {a.name}.yaml'
    again = sync(files)
    assert {a.name, b.name} <= set(again.of('equal')) and not again.conflicts
    write(files, replace(a, system='ours')); register(replace(b, system='theirs'))
    r = sync(files)
    assert r.of('pushed') == [a.name] and r.of('pulled') == [b.name] and load(a.name).prompt.system == 'ours' and load_prompt(files / f'{b.name}.yaml').system == 'theirs'
    assert sync(files).to_frame().set_index('prompt').what[[a.name, b.name]].tolist() == ['equal', 'equal']


def test_where_both_have_changed_neither_is_overwritten(store, files):
    a = plain
    write(files, a); sync(files)
    write(files, replace(a, template='ours {{ text }}')); register(replace(a, template='theirs {{ text }}'))
    before = (files / f'{a.name}.yaml').read_bytes()
    for direction in ('both', 'push', 'pull'):
        r = sync(files, direction)
        [c] = r.conflicts
        assert c.name == a.name and '-template: theirs' in str(r) and '+template: ours' in str(r) and 'both have changed' in str(r) and 'theirs' in r._repr_html_()
    assert (files / f'{a.name}.yaml').read_bytes() == before and load(a.name).version == 2
    assert sync(files, keep={a.name: 'file'}).of('pushed') == [a.name] and load(a.name).prompt.template[:4] == 'ours'
    write(files, replace(a, template='ours again {{ text }}')); register(replace(a, template='theirs again {{ text }}'))
    assert a.name in sync(files, keep={a.name: 'registry'}).of('pulled') and text(files, a.name)[:6] == 'theirs' and not sync(files).conflicts


def test_two_people_with_their_own_checkouts(store, files, tmp_path):
    a = plain
    write(files, a); sync(files)
    other = tmp_path / 'colleague'
    shutil.copytree(files, other)            # git clone
    write(files, replace(a, system='mine')); sync(files)
    assert sync(other).of('pulled') == [a.name] and load_prompt(other / f'{a.name}.yaml').system == 'mine'   # last week's file is behind, not a change
    write(files, replace(a, system='newer')); sync(files)
    write(other, replace(a, system='at the same time'))
    assert [c.name for c in sync(other).conflicts] == [a.name]
    write(other, a)                          # the colleague has gone back to the first text on purpose
    assert [c.name for c in sync(other).conflicts] == [a.name] and load(a.name).prompt.system == 'newer'


def test_without_a_common_state_nothing_is_guessed(files, mlflow_home):
    a = plain
    write(files, a); sync(files); write(files, replace(a, system='2')); sync(files)
    (mlflow_home / 'mlflow.db.sync.json').unlink()
    write(files, a)
    assert sync(files, dry_run=True).of('pulled') == [a.name]     # it equals version 1
    write(files, replace(a, system='3'))
    r = sync(files)
    assert [c.name for c in r.conflicts] == [a.name] and 'nobody knows which of them is the later one' in str(r)


def test_one_direction_only(files):
    write(files, plain); register(replace(plain, name='b'))
    push = sync(files, 'push')
    assert (push.of('pushed'), push.of('behind')) == (['tone'], ['b']) and not (files / 'b.yaml').exists()
    write(files, replace(plain, system='new'))
    pull = sync(files, 'pull')
    assert (pull.of('ahead'), pull.of('pulled')) == (['tone'], ['b']) and load('tone').version == 1


def test_a_file_that_was_removed_stays_removed(files):
    write(files, plain); sync(files)
    (files / 'tone.yaml').unlink()
    r = sync(files)
    assert r.of('removed') == ['tone'] and 'get it back with --pull' in str(r) and not (files / 'tone.yaml').exists()
    assert sync(files, 'pull').of('pulled') == ['tone'] and text(files) == plain.template


def test_going_back_to_an_old_text_is_a_change(files):
    write(files, plain); sync(files); write(files, replace(plain, system='2')); sync(files); write(files, plain)
    assert sync(files).of('pushed') == ['tone'] and load('tone').version == 3 and load('tone').prompt == plain


def test_versions_of_mlflow_and_damaged_ones_are_not_pulled_over_a_file(files):
    write(files, full); sync(files)
    client = connect()
    client.register_prompt('full', 'Edited in the browser {{ product }}')
    client.register_prompt('foreign', 'Somebody else\'s')
    r = sync(files)
    assert [c.name for c in r.conflicts] == ['full'] and r.of('skipped') == ['foreign'] and 'made in MLflow' in r.to_frame().set_index('prompt').why['full'] and load_prompt(files / 'full.yaml') == full
    register(replace(full, system='3')); client.set_prompt_version_tag('full', 3, 'genai_lab.prompt.000', '{}')
    r = sync(files)
    assert [c.name for c in r.conflicts] == ['full'] and 'damaged' in str(r) and load_prompt(files / 'full.yaml') == full


def test_folders_and_files_that_do_not_do(files, mlflow_home):
    with raises('nowhere: there is no such folder'): sync('nowhere')
    with raises('direction "up" is not known'): sync(files, 'up')
    write(files, plain)
    with raises('there is no prompt "tune" in .*Did you mean "tone"'): sync(files, keep=dict(tune='file'))
    with raises('keep "mine" for tone is not known'): sync(files, keep=dict(tone='mine'))
    for bad, words in [('- a\n- b\n', 'bad.yaml.*(mapping|no prompt)'), ('name: x\ntemplat: y\n', 'bad.yaml.*templat'), ('name: [x\n', 'bad.yaml'), ('template: y\n', 'bad.yaml: the prompt has no name; add the line'),
                       ('name: tone\ntemplate: y\n', 'are both called "tone"'), ('name: a b\ntemplate: y\n', 'bad.yaml: "a b" cannot.*"a-b" would do'), ('name: x\ntemplate: "{{ a"\n', r'bad.yaml line \d')]:
        (files / 'bad.yaml').write_text(bad)
        with raises(words) as e: sync(files)
        assert '\n' not in str(e.value) and list_prompts().empty, 'nothing is done before all files are good'
    (files / 'bad.yaml').unlink()
    (files / 'tone.tests.yaml').write_text('cases: []\n')
    sync(files)
    (mlflow_home / 'mlflow.db.sync.json').write_text('<<<<<<< HEAD\n')
    with raises('sync.json cannot be read; take it from git again, or delete it'): sync(files)


def test_a_file_that_was_registered_by_hand_is_known_to_sync(files):
    path = write(files, plain)
    assert register_file(path, 'by hand').version == 1
    write(files, replace(plain, system='2'))
    assert sync(files).of('pushed') == ['tone']


def test_somebody_registers_while_sync_is_at_work(files, monkeypatch):
    write(files, plain); sync(files); write(files, replace(plain, system='ours'))
    git = registry.git_state

    def meanwhile(folder): register(replace(plain, system='theirs')); return git(folder)
    monkeypatch.setattr(registry, 'git_state', meanwhile)
    r = sync(files)
    assert [c.name for c in r.conflicts] == ['tone'] and 'just now; run sync again' in r.conflicts[0].why and load('tone').prompt.system == 'theirs'


def test_the_prompts_of_this_repository_are_good():
    found = registry._files(root / 'prompts')
    assert 'retail-departments' in found
    for path, p in found.values(): assert p.about.get('purpose') and p.about.get('owner'), path
    p = found['retail-departments'][1]
    assert len(p.examples) == 96 and {e['label'] for e in p.examples} == set(p.about['choices']) and registry.prompt_yaml(p) == found['retail-departments'][0].read_text()


# the command line

def call(*args):
    from typer.testing import CliRunner

    from genai_lab.cli import app
    r = CliRunner().invoke(app, ['prompts', *map(str, args)])
    if r.exception is not None and not isinstance(r.exception, SystemExit): raise r.exception
    return r.exit_code, r.stdout if '--json' in args else r.output


def test_the_commands(files, model, monkeypatch):
    path = write(files, plain)
    assert call('list') == (0, 'no prompts are registered\n')
    code, out = call('register', path, '-m', 'first', '--alias', 'champion')
    assert code == 0 and out == f'tone/1 {plain.fingerprint}, "first", now @champion\n'
    assert json.loads(call('register', path, '--json')[1])['note'].startswith('no new version')
    assert json.loads(call('list', '--json')[1]) == [dict(prompt='tone', latest=1, aliases='champion (version 1)', message='first')]
    shown = call('show', 'tone@champion')[1]
    (files / 'copy.yaml').write_text(shown)
    assert load_prompt(files / 'copy.yaml') == plain and shown.startswith('# tone/1 '); (files / 'copy.yaml').unlink()
    assert json.loads(call('show', path, '--json')[1])['prompt'] == plain.to_dict()
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(root)); monkeypatch.delenv('GENAI_LAB_CACHE_DIR')
    assert re.search(r'(?m)^96 examples +example +\d{3,}', call('show', root / 'prompts' / 'retail-departments.yaml', '--model', 'smollm2-135m')[1])
    write(files, replace(plain, system='Be brief.'))
    assert '+system: Be brief.' in call('diff', 'tone', path)[1] and json.loads(call('diff', 'tone', 'tone/1', '--json')[1])['same']
    assert call('sync', files)[0] == 0 and call('sync', files, '--dry-run')[1].startswith('equal')
    assert call('alias', 'tone', 2, 'champion', '--expect', 1)[0] == 0
    with raises('is at version 2 and not at version 1', AliasMoved): call('alias', 'tone', 2, 'champion', '--expect', 1)
    out = json.loads(call('history', 'tone', '--json')[1])
    assert [r['version'] for r in out] == [2, 1] and 'from tone.yaml' in call('history', 'tone')[1] and call('history', 'tone', '--moves')[1].count('champion') == 2
    assert call('alias', 'tone', 0, 'champion')[1] == 'tone@champion is gone; it was at version 2\n'
    register(replace(plain, system='theirs')); write(files, replace(plain, system='ours'))
    code, out = call('sync', files)
    assert code == 1 and '-system: theirs' in out and '+system: ours' in out
    assert call('sync', files, '--keep', 'tone=registry')[0] == 0 and load_prompt(path).system == 'theirs'


def test_answers_that_change_on_the_command_line(files, model, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_SETTINGS', str(root)); monkeypatch.delenv('GENAI_LAB_CACHE_DIR')
    register(plain); register(replace(plain, template='Review: {{ text }}\nThe guest is'))
    pd.DataFrame(dict(text=['Fresh and friendly', 'Rotten fruit', 'Never again', 'Lovely staff'], tone=['happy', 'unhappy', 'unhappy', 'happy'])).to_csv(tmp_path / 'reviews.csv', index=False)
    asked = ('diff', 'tone/1', 'tone/2', '--behaviour', '--data', tmp_path / 'reviews.csv', '--target', 'tone')
    out = json.loads(call(*asked, '--json')[1])
    assert out['samples'] == 4 and out['changed'] == len(out['changes']) and out['test']['n'] == 4
    with raises('has no column "tune".* Did you mean "tone"'): call(*asked[:-1], 'tune')
    with raises('say what to ask about: --data FILE --target COLUMN'): call('diff', 'tone/1', 'tone/2', '--behaviour')


def test_a_real_command_says_what_is_wrong_in_one_line(files):
    from test_cli import call as command
    r = command('prompts', 'show', 'tome')
    assert r.returncode == 2 and r.stderr == 'error: there is no prompt "tome" in the registry. None is registered yet\n' and r.stdout == ''
