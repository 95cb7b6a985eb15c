"Loading, splitting and leak search: real files, real databases, properties on generated data, and the errors people see."
import gzip, itertools, json, os, random, sqlite3, string
from decimal import Decimal

import numpy as np, pandas as pd, pytest

from genai_lab.core import LabError, fingerprint
from genai_lab.data import (Splits, find_leaks, load_frame, normal_form, readable, require_columns, retail_audit, retail_departments,
                            retail_products, split)


def said(f, *args, **kw):
    "The message of the LabError that a call ends in; always one line."
    with pytest.raises(LabError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def put(folder, name, text, encoding='utf-8'):
    f = folder / name
    f.write_bytes(text.encode(encoding))
    return f


# ---------------------------------------------------------------- columns

def test_missing_columns_are_named_with_the_nearest():
    df = pd.DataFrame(columns=['product', 'department', 'price'])
    assert require_columns(df, 'price') is df
    msg = said(require_columns, df, ['prize', 'product', 'zzz'], 'shop.csv')
    for part in ('shop.csv', '"prize" and "zzz"', 'Did you mean "price"?', 'product, department, price'): assert part in msg
    wide = pd.DataFrame(columns=[f'c{i}' for i in range(200)])
    assert 'and 170 more' in said(require_columns, wide, 'x') and len(said(require_columns, wide, 'x')) < 300


# ---------------------------------------------------------------- CSV

@pytest.mark.parametrize('values, kind', [
    (['1', '20', '-3', '0'], 'int64'), (['1', '', '3'], 'Int64'), (['1.5', '2', '1e-05'], 'float64'), (['1.5', '', '2'], 'float64'),
    (['007', '8'], 'str'), (['00.5', '1'], 'str'), (['+1', '2'], 'str'), (['5E10', '1'], 'str'), (['1', 'NA'], 'str'), (['1', 'nan'], 'str'),
    (['1,000', '2'], 'str'), (['1_000', '2'], 'str'), ([' 1', '2'], 'str'), (['-0', '1'], 'float64'), (['123456789012345678901', '1'], 'str'),
    (['12345678901234567', '1'], 'int64'), (['True', 'False'], 'str'), (['inf', '1'], 'str'), (['0x10', '1'], 'str'), (['2024-01-02', '2024-01-03'], 'str'),
    (['٣', '1'], 'str'), (['1\n', '2'], 'str')])
def test_numbers_only_where_every_value_is_written_as_one(tmp_path, values, kind):
    pd.DataFrame(dict(other='x', v=values)).to_csv(tmp_path / 'a.csv', index=False)
    v = load_frame(tmp_path / 'a.csv').v
    assert str(v.dtype) == kind
    if kind == 'str': assert v.tolist() == values


def test_missing_words_stay_words(tmp_path):
    words = ['NA', 'N/A', 'null', 'None', 'nan', 'NaN', '-', '#N/A']
    f = put(tmp_path, 'a.csv', 'label,note\n' + ''.join(f'{w},x\n' for w in words) + ',\n"",y\n')
    df = load_frame(f)
    assert df.label[:8].tolist() == words
    assert df.label.isna().tolist() == [False] * 8 + [True, False]    # an empty field is missing, "" is an empty text
    assert load_frame(f, na=('', 'NA', 'null')).label.isna().sum() == 3


def test_as_text_keeps_a_column(tmp_path):
    f = put(tmp_path, 'a.csv', 'version,n\n1.10,1\n1.1,2\n')
    assert load_frame(f).version.tolist() == [1.1, 1.1]
    assert load_frame(f, as_text='version').version.tolist() == ['1.10', '1.1']
    assert 'Did you mean "version"?' in said(load_frame, f, as_text=['versoin'])


def test_csv_as_it_comes(tmp_path):
    rows = 'name,n\r\n"a ""quoted"" name, with comma",1\r\n"two\r\nlines",2\r\n'
    for f in (put(tmp_path, 'a.csv', '\ufeff' + rows), put(tmp_path, 'b.csv', rows, 'utf-16')):
        df = load_frame(f, encoding='utf-8' if f.name == 'a.csv' else 'utf-16')
        assert df.name.tolist() == ['a "quoted" name, with comma', 'two\r\nlines'] and df.n.tolist() == [1, 2]
    with gzip.open(tmp_path / 'c.csv.gz', 'wt', newline='') as f: f.write(rows)
    assert load_frame(tmp_path / 'c.csv.gz').n.tolist() == [1, 2]
    assert load_frame(put(tmp_path, 'd.tsv', 'a\tb\n1\tx,y\n')).b.tolist() == ['x,y']
    assert load_frame(put(tmp_path, 'e.csv', 'a;b\n1;x\n'), sep=';').columns.tolist() == ['a', 'b']
    assert load_frame(put(tmp_path, 'f.csv', ',a\n0,x\n')).columns.tolist() == ['column 1', 'a']
    assert load_frame(put(tmp_path, 'g.csv', 'größe\nklein\n', 'cp1252'), encoding='cp1252').columns.tolist() == ['größe']


@pytest.mark.parametrize('name, text, parts', [
    ('short.csv', 'a,b,c\n1,2,3\n4,5\n', ['short.csv row 3', 'Expected 3 columns, got 2: 4,5']),
    ('long.csv', 'a,b,c\n1,2,3\n4,5,6,7\n', ['row 3', 'Expected 3 columns, got 4']),
    ('open.csv', 'a,b\n1,2\n3,"four\n5,6\n', ['row 3', 'quotation mark', 'never closed']),
    ('semi.csv', 'a;b\n1;2\n', ["sep=';'"]),
    ('twice.csv', 'a,b,a\n1,2,3\n', ['the column "a" is there 2 times']),
    ('header.csv', 'a,b\n', ['has no rows', 'only the columns a, b']),
    ('nothing.csv', '', ['no header']),
    ('bad.jsonl', '{"a": 1}\n\n{"a": 2,}\n', ['bad.jsonl line 3', '{"a": 2,}']),
    ('list.jsonl', '{"a": 1}\n[1, 2]\n', ['line 2', 'expected an object', '[1, 2]']),
    ('none.jsonl', '\n\n', ['has no rows']),
    ('bad.json', '[{"a": 1},\n {"a": }]', ['bad.json line 2']),
    ('scalar.json', '{"a": 1}', ['scalar.json', 'column "a" is a int', 'list of objects']),
    ('uneven.json', '{"a": [1, 2], "b": [1]}', ['different lengths', 'a 2, b 1']),
    ('mixed.json', '[{"a": 1}, 5]', ['item 1 of the list is a int']),
    ('number.json', '5', ['number.json', 'a int is no source of rows']),
    ('empty.json', '[]', ['has no rows']),
    ('fake.parquet', 'not parquet at all', ['fake.parquet cannot be read as Parquet']),
    ('sheet.xlsx', 'x', ['".xlsx" is not known', '.csv, .tsv, .jsonl', '.parquet']),
    ('noext', 'x', ['extension "" is not known']),
    ('fake.csv.gz', 'plain text', ['fake.csv.gz cannot be read'])])
def test_bad_files_say_what_is_wrong(tmp_path, name, text, parts):
    msg = said(load_frame, put(tmp_path, name, text))
    for p in [name, *parts]: assert p in msg


def test_wrong_encoding_names_the_line(tmp_path):
    f = put(tmp_path, 'a.csv', 'a\nplain\ncafé\n', 'latin-1')
    assert 'a.csv line 3: not utf-8' in said(load_frame, f)
    assert load_frame(f, encoding='latin-1').a.tolist() == ['plain', 'café']
    assert 'encoding "utf8000" is not known' in said(load_frame, f, encoding='utf8000')


def test_missing_paths_name_what_is_near(tmp_path):
    put(tmp_path, 'products.csv', 'a\n1\n')
    assert 'Did you mean "products.csv"?' in said(load_frame, tmp_path / 'prodcuts.csv')
    assert 'The folder has: products.csv' in said(load_frame, tmp_path / 'zzz.parquet')
    assert 'there is no folder' in said(load_frame, tmp_path / 'nowhere' / 'a.csv')
    assert 'no file matches' in said(load_frame, tmp_path / '*.parquet')
    (tmp_path / 'void').mkdir()
    assert 'no data files' in said(load_frame, tmp_path / 'void')
    assert 'The folder is empty' in said(load_frame, tmp_path / 'void' / 'a.csv')
    assert 'not a local path' in said(load_frame, 'https://example.com/a.csv')
    assert 'say what to load' in said(load_frame)
    assert 'either a source or' in said(load_frame, 'a.csv', query='select 1')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file(tmp_path):
    f = put(tmp_path, 'a.csv', 'a\n1\n')
    f.chmod(0)
    assert 'a.csv cannot be read: Permission denied' in said(load_frame, f)


# ---------------------------------------------------------------- JSON, Parquet, several files

def test_json_keeps_its_types(tmp_path):
    rows = [dict(id='007', n=1, x=1.5, tags=['a'], line='a\u2028b'), dict(id='NA', n=None, x=2, tags=[]), dict(id='9', tags=None)]
    f = put(tmp_path, 'a.jsonl', '\n'.join(json.dumps(r, ensure_ascii=False) for r in rows) + '\n')
    df = load_frame(f)
    assert df.id.tolist() == ['007', 'NA', '9'] and str(df.n.dtype) == 'Int64' and df.x.dtype == float
    assert df.tags[0] == ['a'] and df.line[0] == 'a\u2028b'
    assert fingerprint(load_frame(put(tmp_path, 'a.json', json.dumps(rows)))) == fingerprint(df)
    assert fingerprint(load_frame(put(tmp_path, 'lines.json', f.read_text(encoding='utf-8')))) == fingerprint(df)
    assert fingerprint(load_frame(put(tmp_path, 'c.json', json.dumps(dict(a=[1, None], b=['x', 'y']))))) == fingerprint(pd.DataFrame(dict(a=pd.array([1, None], 'Int64'), b=['x', 'y'])))


def test_parquet_types(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    t = pa.table(dict(n=pa.array([1, None], pa.int32()), u=pa.array([1, None], pa.uint8()), d=pa.array([Decimal('1.50'), None], pa.decimal128(9, 2)),
                      day=pa.array([19723, None], pa.date32()), c=pa.array(['x', 'y']).dictionary_encode(), l=pa.array([['a', 'b'], None]), s=pa.array(['007', None])))
    pq.write_table(t, tmp_path / 'a.parquet')
    df = load_frame(tmp_path / 'a.parquet')
    assert [str(df[c].dtype) for c in 'nudcs'] == ['Int32', 'UInt8', 'float64', 'str', 'str']
    assert str(df.day[0].date()) == '2024-01-01' and df.l[0] == ['a', 'b'] and df.s[0] == '007'
    assert len(fingerprint(df)) == 16
    pd.DataFrame(dict(a=[1, 2])).iloc[1:].to_parquet(tmp_path / 'i.parquet')          # an index that pandas stored is not a column
    assert load_frame(tmp_path / 'i.parquet').columns.tolist() == ['a']


def test_folders_and_patterns(tmp_path):
    for i, text in enumerate(['id,n\n1,1\n', 'n,id\n2,02\n']): put(tmp_path, f'part-{i}.csv', text)
    put(tmp_path, '_SUCCESS', ''); put(tmp_path, '.hidden.csv', 'zzz\n1\n'); put(tmp_path, 'README.md', 'x')
    df = load_frame(tmp_path)
    assert df.id.tolist() == ['1', '02'] and df.n.tolist() == [1, 2]                  # one file's leading zero decides for all
    assert fingerprint(load_frame(tmp_path / 'part-*.csv')) == fingerprint(df)
    assert fingerprint(load_frame(str(tmp_path / '**' / '*.csv'))) == fingerprint(df)
    put(tmp_path, 'part-2.csv', 'id,m\n3,3\n')
    msg = said(load_frame, tmp_path)
    assert 'part-2.csv' in msg and 'only one of them has "n" and "m"' in msg
    put(tmp_path, 'more.jsonl', '{"a": 1}\n')
    assert 'several kinds (csv, jsonl)' in said(load_frame, tmp_path)


def test_partitioned_folder(tmp_path):
    for y, s in itertools.product((2023, 2024), ('a', 'b')):
        (tmp_path / f'year={y}' / f'shop={s}').mkdir(parents=True)
        pd.DataFrame(dict(n=[y])).to_parquet(tmp_path / f'year={y}' / f'shop={s}' / 'x.parquet')
    df = load_frame(tmp_path)
    assert df.year.tolist() == df.n.tolist() and df['shop'].tolist() == ['a', 'b'] * 2


# ---------------------------------------------------------------- objects

def test_objects(tmp_path):
    import pyarrow as pa
    want = pd.DataFrame(dict(a=['x', 'y'], n=[1, 2]))
    for x in (want, want.to_dict('records'), tuple(want.to_dict('records')), want.to_dict('list'), pa.table(want), dict(a=np.array(['x', 'y']), n=np.array([1, 2]))):
        assert fingerprint(load_frame(x)) == fingerprint(want)
    got = load_frame(want)
    got.loc[0, 'a'] = 'changed'
    assert want.a[0] == 'x'
    assert 'no rows' in said(load_frame, []) and 'no rows' in said(load_frame, want[:0])
    assert 'the column "a" is there 2 times' in said(load_frame, pd.concat([want, want], axis=1))
    assert 'item 1 of the list is a str' in said(load_frame, [dict(a=1), 'x'])
    assert 'a int is no source' in said(load_frame, 5)
    assert 'split="train" chooses from' in said(load_frame, want, split='train')


def test_hugging_face_datasets(tmp_path):
    import datasets
    features = datasets.Features(text=datasets.Value('string'), label=datasets.ClassLabel(names=['no', 'yes']), n=datasets.Value('int64'))
    d = datasets.Dataset.from_dict(dict(text=['a', 'b', 'c'], label=[0, 1, -1], n=[1, None, 3]), features=features)
    df = load_frame(d)
    assert df.label.tolist() == [0, 1, -1] and str(df.n.dtype) == 'Int64'
    names = load_frame(d, class_names=True).label
    assert names[:2].tolist() == ['no', 'yes'] and pd.isna(names[2])
    assert load_frame(d.select([2, 0])).text.tolist() == ['c', 'a']
    both = datasets.DatasetDict(train=d, test=d.select([1]))
    assert load_frame(both, split='test').text.tolist() == ['b']
    assert load_frame(datasets.DatasetDict(only=d)).text.tolist() == ['a', 'b', 'c']
    assert 'say which split; there are: train, test' in said(load_frame, both)
    assert 'Did you mean "train"?' in said(load_frame, both, split='tran')
    assert 'list(data.take(1000))' in said(load_frame, d.to_iterable_dataset())
    both.save_to_disk(tmp_path / 'saved')
    assert load_frame(tmp_path / 'saved', split='train').text.tolist() == ['a', 'b', 'c']
    assert 'no rows' in said(load_frame, d.select([]))


# ---------------------------------------------------------------- SQL

def test_duckdb_over_files_and_tables(tmp_path):
    pd.DataFrame(dict(id=['007', '008'], n=[1, 2])).to_csv(tmp_path / 'a.csv', index=False)
    pd.DataFrame(dict(id=['007', '009'], price=[1.5, 2.5])).to_parquet(tmp_path / 'b.parquet')
    df = load_frame(query=f"select id, n, price from a join '{tmp_path}/b.parquet' using (id)", tables=dict(a=tmp_path / 'a.csv'))
    assert df.to_dict('records') == [dict(id='007', n=1, price=1.5)]
    total = load_frame(query=f"select sum(n) as s from '{tmp_path}/a.csv'").s      # DuckDB's sum is a HUGEINT, which Arrow calls a decimal
    assert total.tolist() == [3] and str(total.dtype) == 'int64'
    assert load_frame(query='select * from a where n > $least', tables=dict(a=tmp_path / 'a.csv'), params=dict(least=1)).id.tolist() == ['008']
    df = load_frame(query="select 1.25 as d, date '2024-01-02' as day, null::int as k union all select 2, null, 4 order by d")
    assert df.d.dtype == float and str(df.k.dtype) == 'Int32' and len(fingerprint(df)) == 16


def test_duckdb_is_repeatable():
    big = pd.DataFrame(dict(g=np.arange(200_000) % 5003, x=np.random.default_rng(0).random(200_000)))
    runs = {fingerprint(load_frame(query='select g, sum(x) as s from t group by g', tables=dict(t=big))) for _ in range(3)}
    assert len(runs) == 1


@pytest.mark.parametrize('query, parts', [
    ('select * form t', ['SQL: Parser Error', 'syntax error at or near']),
    ('select prodct from t', ['"prodct" not found', 'product']),
    ('select * from tt', ['there is no table "tt"', 'Did you mean "t"?', 'Tables: t']),
    ('create table x (a int)', ['gives no rows']),
    ('select * from t where n > 5', ['the query has no rows', 'only the columns product, n']),
    ('select 1 as a, 2 as a', ['the column "a" is there 2 times']),
    ('select * from secret_variable', ['there is no table "secret_variable"'])])
def test_duckdb_errors(query, parts, secret_variable=pd.DataFrame(dict(a=[1]))):   # a query does not reach into Python
    msg = said(load_frame, query=query, tables=dict(t=[dict(product='ice', n=1)]))
    for p in parts: assert p in msg


def test_duckdb_missing_file(tmp_path):
    put(tmp_path, 'products.csv', 'a\n1\n')
    assert 'Did you mean "products.csv"?' in said(load_frame, query=f"select * from '{tmp_path}/prodcts.csv'")


@pytest.fixture
def shop(tmp_path):
    with sqlite3.connect(tmp_path / 'shop.db') as con:
        con.execute('create table products (id text, n int, price real, day date)')
        con.executemany('insert into products values (?, ?, ?, ?)', [('007', 1, 2.5, '2024-01-02'), ('008', None, 3.0, None)])
    return f'sqlite:///{tmp_path}/shop.db'


def test_warehouse(shop):
    df = load_frame(query='select * from products order by id', url=shop)
    assert df.id.tolist() == ['007', '008'] and str(df.n.dtype) == 'Int64' and df.price.tolist() == [2.5, 3.0]
    assert load_frame(query='select id from products where price > :p', url=shop, params=dict(p=2.7)).id.tolist() == ['008']
    text = "'; drop table products; --"
    assert 'no rows' in said(load_frame, query='select id from products where id = :i', url=shop, params=dict(i=text))
    assert 'gives no rows' in said(load_frame, query='delete from products', url=shop)
    assert len(load_frame(query='select * from products', url=shop)) == 2                 # nothing was committed


@pytest.mark.parametrize('kw, parts', [
    (dict(query='select * from product'), ['no such table: product', 'Tables: products']),
    (dict(query='select nope from products'), ['no such column: nope']),
    (dict(query='select id from products where id = :i'), ['bind parameter', 'i']),
    (dict(), ['say query=', 'Tables: products']),
    (dict(query='select id from products where 1 = 0'), ['the query has no rows, only the columns id']),
    (dict(query='select id, id from products'), ['the column "id" is there 2 times'])])
def test_warehouse_errors(shop, kw, parts):
    msg = said(load_frame, url=shop, **kw)
    for p in parts: assert p in msg


def test_bad_urls(tmp_path, shop):
    assert 'Did you mean "shop.db"?' in said(load_frame, query='select 1', url=f'sqlite:///{tmp_path}/shopp.db')
    assert not (tmp_path / 'shopp.db').exists()
    assert 'no database URL' in said(load_frame, query='select 1', url='shop.db')
    assert 'knows no database "nosuch"' in said(load_frame, query='select 1', url='nosuch://u:hunter2hunter2@h/x')
    for url in ('postgresql://u:hunter2hunter2@localhost:1/x', 'nosuch://u:hunter2hunter2@h/x'): assert 'hunter2' not in said(load_frame, query='select 1', url=url)
    assert 'pip install' in said(load_frame, query='select 1', url='oracle+oracledb://u:hunter2hunter2@h/x')


# ---------------------------------------------------------------- near duplicates

def test_normal_form():
    same = ['Bread: Italian/French', 'BREAD  italian-french', 'ｂｒｅａｄ “Italian” (French)!', 'bread_italian_french']
    assert {normal_form(t) for t in same} == {'bread italian french'}
    assert normal_form('Straße') == 'strasse' and normal_form('…') != '' and normal_form('👍') == '👍'


def words(rng, n): return ' '.join(''.join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(n))


def test_planted_near_duplicates_are_found_and_nothing_else():
    rng = random.Random(1)
    a = [words(rng, 12) for _ in range(2000)]
    b = [words(rng, 12) for _ in range(500)]
    for i in range(50):
        w = a[i].split()
        b[i] = [a[i].upper() + ' !', a[i][:20] + rng.choice('xyz') + a[i][20:], ' '.join(rng.sample(w, 12)), ' '.join(w + ['indeed']), ' '.join(w[:-1])][i % 5]
    f = find_leaks(pd.DataFrame(dict(text=a)), pd.DataFrame(dict(text=b)))
    assert sorted(zip(f.row_a, f.row_b)) == [(i, i) for i in range(50)]
    assert (f.kind == 'exact').sum() == 10 and f.similarity.between(.8, 1).all()


def brute(a, b, threshold):
    grams = lambda t: {g for w in t.split() for g in (lambda p: [p[i:i + 3] for i in range(len(p) - 2)])(f' {w} ')}
    A, B = [grams(normal_form(t)) for t in a], [grams(normal_form(t)) for t in b]
    return {(i, j) for i, x in enumerate(A) for j, y in enumerate(B) if len(x & y) / len(x | y) >= threshold - 1e-9}


@pytest.mark.parametrize('threshold', [.3, .5, .8, .95, 1.])
def test_the_search_loses_no_pair(threshold):
    "Prefix filtering gives exactly what comparing all pairs gives."
    rng, vocabulary = random.Random(2), [words(random.Random(i), 1) for i in range(12)]
    text = lambda: ' '.join(rng.choices(vocabulary, k=rng.randint(1, 7)))
    a, b = list(dict.fromkeys(text() for _ in range(300))), list(dict.fromkeys(text() for _ in range(200)))
    f = find_leaks(pd.DataFrame(dict(text=a)), pd.DataFrame(dict(text=b)), threshold=threshold)
    assert set(zip(f.row_a, f.row_b)) == brute(a, b, threshold) and len(f)


def test_small_blocks_give_the_same(monkeypatch):
    from genai_lab import data
    rng = random.Random(3)
    df = pd.DataFrame(dict(text=[' '.join(rng.choices(['red', 'green', 'blue', 'bread', 'ice', 'cream'], k=4)) for _ in range(300)]))
    whole, small = find_leaks(df), data._candidates
    monkeypatch.setattr(data, '_candidates', lambda a, b, t: small(a, b, t, block=50))
    pd.testing.assert_frame_equal(find_leaks(df), whole)


def test_leaks_of_several_columns_and_empty_texts():
    a = pd.DataFrame(dict(title=['Ice', 'Ice', None, ''], body=['cold', 'warm', None, ' ']))
    b = pd.DataFrame(dict(title=['ICE', None], body=['Cold.', None]))
    f = find_leaks(a, b, text=['title', 'body'])
    assert f[['row_a', 'row_b', 'kind']].values.tolist() == [[0, 0, 'exact']]
    assert find_leaks(a, b[1:], text=['title', 'body']).columns.tolist() == f.columns.tolist()
    assert 'the second frame: there is no column "body"' in said(find_leaks, a, b[['title']], text=['title', 'body'])
    for t in (0, 1.5, -1): assert 'outside 0 to 1' in said(find_leaks, a, b, text='title', threshold=t)


def test_a_repeated_text_is_one_line():
    a, b = pd.DataFrame(dict(text=['Ice'] * 3000)), pd.DataFrame(dict(text=['ice'] * 2000 + ['bread']))
    f = find_leaks(a, b)
    assert len(f) == 1 and f.rows_a[0] == 3000 and f.rows_b[0] == 2000


def test_a_template_is_an_error_and_not_a_full_memory(monkeypatch):
    from genai_lab import data
    monkeypatch.setattr(data, '_most_pairs', 1000)
    df = pd.DataFrame(dict(text=[f'Please answer the following question about our shop with yes or no: number {i}' for i in range(300)]))
    assert 'share a template' in said(find_leaks, df)


# ---------------------------------------------------------------- splits

@pytest.fixture(scope='module')
def frame():
    rng = random.Random(4)
    n = 1003
    return pd.DataFrame(dict(text=[words(rng, 5) for _ in range(n)], label=rng.choices(['a', 'b', 'c'], [.7, .25, .05], k=n),
                             user=[f'u{rng.randint(0, 120)}' for _ in range(n)], x=np.arange(n)))


def covers(s, df):
    got = pd.concat([*s.values(), s.rest])
    return sorted(got.index) == sorted(df.index)


@pytest.mark.parametrize('sizes', [dict(train=.6, test=.4), dict(a=.5, b=.3, c=.2), dict(test=100, train='rest'), dict(test=100, train=200), dict(train=.9, test='rest')])
@pytest.mark.parametrize('stratify', ['', 'label'])
def test_sizes_are_exact_and_classes_within_rounding(frame, sizes, stratify):
    s = split(frame, sizes, text='text', seed=3, stratify=stratify)
    assert isinstance(s, Splits) and list(s) == list(sizes) and covers(s, frame)
    n, total = len(frame), {k: len(d) for k, d in s.items()}
    for k, v in sizes.items():
        if isinstance(v, int): assert total[k] == v
        elif v != 'rest': assert abs(total[k] - v * n) < 1
    if stratify:
        for k, d in s.items():
            for c, m in frame.label.value_counts().items(): assert abs((d.label == c).sum() - m * total[k] / n) < 1


def test_order_of_rows_and_other_columns_do_not_matter(frame):
    args = dict(sizes=dict(train=.7, test=.2, dev=.1), text='text', seed=5, stratify='label')
    one = split(frame, **args)
    for other in (frame.sample(frac=1, random_state=1), frame.iloc[::-1].reset_index(drop=True)):
        two = split(other, **args)
        assert two.fingerprint == one.fingerprint
    for k, d in split(frame.assign(prediction=frame.x % 7), **args).items(): assert d.text.tolist() == one[k].text.tolist()
    by = dict(sizes=dict(train=.7, test=.3), text=(), group='user', stratify='label', seed=5)
    assert split(frame, **by).fingerprint == split(frame.sample(frac=1, random_state=2), **by).fingerprint


def test_seeds_differ_and_repeat(frame):
    prints = [split(frame, dict(train=.5, test=.5), text='text', seed=i).fingerprint for i in (1, 2, 3, 1)]
    assert len(set(prints)) == 3 and prints[0] == prints[3]
    for bad in (-1, 1.5, 'x', True): assert 'the seed' in said(split, frame, dict(train=.5, test=.5), text='text', seed=bad)


def test_every_row_has_the_same_chance(frame):
    "Over many seeds, each row is in the test part about as often as it should be."
    small = frame[:60]
    hits = sum(small.index.isin(split(small, dict(test=.25, train=.75), text=(), seed=i)['test'].index).astype(int) for i in range(150))
    assert hits.sum() == 150 * 15 and 15 < hits.min() and hits.max() < 61          # mean 37.5, standard deviation 5.3


def test_the_seed_of_the_settings_is_the_default(frame, tmp_path, monkeypatch):
    monkeypatch.setenv('GENAI_LAB_SEED', '11')
    assert split(frame, dict(train=.5, test=.5), text='text').seed == 11


@pytest.mark.parametrize('seed', range(5))
def test_no_group_crosses(frame, seed):
    s = split(frame, dict(train=.6, dev=.2, test=.2), text=(), group='user', stratify='label', seed=seed)
    assert covers(s, frame)
    users = [set(d.user) for d in s.values()]
    assert not any(a & b for a, b in itertools.combinations(users, 2))
    for k, d in s.items():
        assert abs(len(d) - s.asked[k]) <= 10
        for c, m in frame.label.value_counts().items(): assert abs((d.label == c).sum() - m * len(d) / len(frame)) <= 10


def test_groups_of_several_columns(frame):
    df = frame.assign(day=frame.x % 3)
    s = split(df, dict(train=.5, test=.5), text=(), group=['user', 'day'], seed=1)
    assert not set(zip(s['train'].user, s['train'].day)) & set(zip(s['test'].user, s['test'].day))
    assert set(s['train'].user) & set(s['test'].user)


def leaky(frame, k=40):
    "The frame with k copies in other spellings, and some copies of copies."
    copies = frame[:k].assign(text=[t.upper() + '.' if i % 2 else t + 's' for i, t in enumerate(frame.text[:k])], user=[f'v{i}' for i in range(k)])
    return pd.concat([frame, copies, copies[:5].assign(text=lambda d: d.text + ' s')], ignore_index=True)


def test_leaks_are_refused_and_reported(frame):
    df = leaky(frame)
    with pytest.raises(LabError) as e: split(df, dict(train=.5, test=.5), text='text', seed=1)
    found = e.value.leaks
    assert len(found) and set(found.kind) == {'exact', 'near'} and f'share {len(found)} texts' in str(e.value) and 'on_leak="group"' in str(e.value)
    assert split(df, dict(train=.5, test=.5), text=(), seed=1).text == []


@pytest.mark.parametrize('group', ['', 'user'])
@pytest.mark.parametrize('seed', range(3))
def test_duplicates_kept_together(frame, group, seed):
    df = leaky(frame)
    s = split(df, dict(train=.6, test=.4), text='text', seed=seed, stratify='label', on_leak='group', group=group)
    assert covers(s, df) and not len(find_leaks(s['train'], s['test'], 'text'))
    if group: assert not set(s['train'].user) & set(s['test'].user)
    else: assert [len(d) for d in s.values()] == list(s.asked.values())
    assert any('clusters of duplicates' in n for n in s.notes)


def test_chains_of_duplicates_stay_together():
    "a ~ b and b ~ c, although a and c are less alike than the threshold."
    text = ['one two three four five six seven', 'one two three four five six seven eight', 'one two three four five six seven eight nine', *[words(random.Random(i), 6) for i in range(17)]]
    df = pd.DataFrame(dict(text=text))
    assert len(find_leaks(df[:1], df[2:3])) == 0
    for seed in range(6):
        s = split(df, dict(train=.5, test=.5), on_leak='group', seed=seed)
        assert len({k for k, d in s.items() for i in d.index if i < 3}) == 1


def test_empty_texts_are_no_duplicates():
    df = pd.DataFrame(dict(text=[None, '', ' ', None, 'a', 'b']))
    s = split(df, dict(a=3, b=3), seed=1)
    assert s.report['repeats'].tolist() == [0, 0]
    assert [len(d) for d in split(df, dict(a=3, b=3), seed=1, on_leak='group').values()] == [3, 3]


@pytest.mark.parametrize('sizes, parts', [
    (dict(train=.6, test=.3), ['add up to 0.9']), (dict(train=.6, test=.6), ['add up to 1.2']), (dict(train=900, test=400), ['1,300 rows', '1,003']),
    (dict(train=.5, test=100), ['mixes fractions and numbers']), (dict(train='rest', test='rest'), ['only one part can be the rest', '"train" and "test"']),
    (dict(train=0, test=10), ['the size 0 of "train"']), (dict(train=-1, test=10), ['-1']), (dict(train=True, test=10), ['True']), (dict(train='half', test=10), ["'half'"]),
    (dict(train=float('nan'), test=.5), ['nan']), (dict(train=1003, test='rest'), ['and a rest']), ({}, ['say the parts']), (.5, ['say the parts']), (dict(train=.9999, test=.0001), ['no row at all', '"test"'])])
def test_impossible_sizes(frame, sizes, parts):
    msg = said(split, frame, sizes, text='text')
    for p in parts: assert p in msg


def test_impossible_splits(frame):
    half = dict(train=.5, test=.5)
    odd = frame.assign(label=['odd', 'one'] + ['a'] * 1001)
    msg = said(split, odd, half, text='text', stratify='label')
    assert 'the class "odd" of "label" has 1 member' in msg and '2 classes of 3' in msg
    one_user = frame.assign(label=np.where(frame.user == 'u5', 'rare', 'usual'))
    assert 'has 1 group, too few' in said(split, one_user, half, text=(), stratify='label', group='user')
    assert 'must stay together (a group of "user")' in said(split, frame.assign(user=['big'] * 900 + ['small'] * 103), half, text=(), group='user')
    assert 'a higher threshold' in said(split, frame.assign(text='all the same'), half, text='text', on_leak='group')
    assert '2 groups cannot be divided into 3 parts' in said(split, frame[:10].assign(user=list('aaaaabbbbb')), dict(a=5, b=3, c=2), text=(), group='user')
    assert 'the group column "user" is empty in 1 row, such as row 7' in said(split, frame.assign(user=frame.user.where(frame.x != 7)), half, text=(), group='user')
    assert 'Did you mean "label"?' in said(split, frame, half, text='text', stratify='lable')
    assert 'there is no column "txt"' in said(split, frame, half, text='txt')
    assert 'accepted: error, group' in said(split, frame, half, text='text', on_leak='drop')
    assert 'text, user' in said(split, frame, half, stratify='label')          # which of them does the model read?
    assert split(frame, half, stratify='label', group='user', seed=1).text == ['text'] # the only one left
    assert 'no rows' in said(split, frame[:0], half, text='text')
    assert 'no row is left for "c"' in said(split, frame[:9].assign(user=list('aaabbbccc')), dict(a=4, b=4, c=1), text=(), group='user')


def test_splits_show_themselves(frame):
    s = split(frame, dict(test=100, train=200), text='text', stratify='label', seed=1)
    assert s.report.part.tolist() == ['test', 'train'] and s.classes.sum().tolist() == [100, 200]
    assert s.fingerprint != s.report.fingerprint[0] == fingerprint(s['test'])
    assert '703 rows in no part' in repr(s) and 'seed 1, stratified by label' in s._repr_html_()
    assert s.to_frame().split.value_counts().to_dict() == dict(train=200, test=100)
    odd = split(frame, {'<b>': .5, 'test': .5}, text='text', seed=1)
    assert '<b>' not in odd._repr_html_()
    with pytest.raises(KeyError): s['tset']


def test_many_classes(frame):
    df = pd.DataFrame(dict(text=[f'{i} {words(random.Random(i), 3)}' for i in range(6000)], label=[f'c{i % 1500}' for i in range(6000)]))
    s = split(df, dict(train=.75, test=.25), text=(), stratify='label', seed=1)
    assert (s.classes.train == 3).all() and (s.classes.test == 1).all()


# ---------------------------------------------------------------- retail

@pytest.fixture(scope='module')
def retail(): return retail_departments()


def test_retail_is_one_clean_row_a_type(retail):
    assert len(retail) == 2016 and retail.product_type.is_unique and not retail.isna().any().any()
    assert retail.department.value_counts().index.tolist() == ['DRUG GM', 'GROCERY', 'PRODUCE', 'MEAT', 'NUTRITION', 'FLORAL', 'DELI', 'MEAT-PCKGD']
    assert retail.share.min() >= .9 and retail.groupby('label').department.nunique().eq(1).all()
    raw = retail_products()
    assert len(raw) == 92331
    counts = raw.dropna(subset=['product_category', 'product_type']).groupby(['product_type', 'department']).size()
    assert all(counts[r.product_type, r.department] == r.n_products for r in retail.sample(100, random_state=1).itertuples())
    assert fingerprint(retail_departments()) == fingerprint(retail)


def test_retail_choices():
    strict = retail_departments(min_share=1)
    assert (strict.share == 1).all() and len(strict) < 2016
    pairs = retail_departments(unit='pair')
    assert len(pairs) > 3000 and not pairs.duplicated(['product_type', 'product_category']).any()
    two = retail_departments(['GROCERY', 'Fresh Meat'], per_department=40, seed=1)
    assert two.label.value_counts().to_dict() == {'Grocery': 40, 'Fresh Meat': 40}
    assert fingerprint(two) != fingerprint(retail_departments(['GROCERY', 'Fresh Meat'], per_department=40, seed=2))
    assert retail_departments(3).department.nunique() == 3
    audit = retail_audit().set_index('step').number
    assert audit.iloc[-1] == 2016 and audit.iloc[2] - audit.iloc[4] - audit.iloc[5] == 2016
    assert 'Did you mean "Grocery"?' in said(retail_departments, ['GROCERI'])
    assert 'cannot be had' in said(retail_departments, 99) and 'has 55' in said(retail_departments, per_department=56)
    assert 'accepted: type, pair' in said(retail_departments, unit='product')


def test_readable_text_makes_nothing_up(retail):
    assert readable('SFT DRNK 2 LITER BTL CARB INCL') == 'Soft Drink 2 Liter Bottle Carb Incl'
    assert readable('POPULAR 750ML WINES') == 'Popular 750ml Wines' and readable('ICE - CRUSHED/CUBED') == 'Ice - Crushed/Cubed'
    assert retail['product'].str.strip().ne('').all() and retail['product'].is_unique


def test_retail_split_for_the_experiments(retail):
    s = split(retail, dict(test=400, train=600), text='product', stratify='label', on_leak='group', seed=20)
    assert [len(d) for d in s.values()] == [400, 600]
    assert not len(find_leaks(s['train'], s['test'], 'product')) and not set(s['train'].product_type) & set(s['test'].product_type)
