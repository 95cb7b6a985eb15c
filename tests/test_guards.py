"Guards and pipelines where things go wrong: guards that raise, texts that are none, streams, hostile input, traces."
import itertools
import os
import time

import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.guards import (Card, Claims, Competitors, Guard, Language, Length, OffBrand, Outcome, PersonalData, Pipeline, ReadingLevel, Repetition, Span, Terms, Text, Toxic,
                              Verdict, measure, sorry, text_guards)


class Raises(Guard):
    def look(self, text, context): raise RuntimeError('the model file is gone')


class Counts(Guard):
    "Lets everything pass and counts."
    hold = 10
    def __init__(self, **kw): super().__init__(**kw); self.seen = []
    def look(self, text, context): self.seen.append(str(text))


class Bare:
    "A guard that derives from nothing."
    name, card = 'bare', None
    def __init__(self, answer): self.answer = answer
    def check(self, text, context):
        if isinstance(self.answer, Exception): raise self.answer
        return self.answer


# --- guards that fail

def test_a_guard_that_raises_blocks_and_says_so():
    v = Raises().check('hello')
    assert (v.action, v.reason) == ('block', 'failed closed: RuntimeError: the model file is gone') and v.text == 'hello' and v.guard == 'raises'
    out = Pipeline([Raises(), Counts()]).check('hello')
    assert out.action == 'block' and out.text == sorry and out.skipped == ('counts',) and 'failed closed' in out.reason


def test_failing_open_has_to_be_asked_for_and_is_said_too():
    out = Pipeline([Raises(fail='open')]).check('hello')
    assert out.action == 'pass' and out.text == 'hello' and 'failed open: RuntimeError' in out.verdicts[0].reason
    with pytest.raises(LabError, match='"closed" or "open"'): Raises(fail='ajar')


@pytest.mark.parametrize('answer', [None, True, 'pass', ValueError('no'), RecursionError('deep')])
def test_a_foreign_guard_that_raises_or_talks_nonsense_blocks(answer):
    out = Pipeline([Bare(answer)]).check('hello')
    assert out.action == 'block' and out.verdicts[0].reason.startswith('failed closed')


def test_an_exception_does_not_carry_a_secret_into_the_reason(monkeypatch):
    monkeypatch.setenv('SHOP_API_KEY', 'abcdef123456')
    class Leaks(Guard):
        def look(self, text, context): raise ValueError('cannot log in with abcdef123456')
    assert 'abcdef' not in Leaks().check('hello').reason


def test_what_is_no_guard_is_refused_when_the_pipeline_is_made():
    with pytest.raises(LabError, match='is no guard'): Pipeline([str.upper])
    with pytest.raises(LabError, match='two guards are called "counts"'): Pipeline([Counts(), Counts()])
    with pytest.raises(LabError, match='lets no guard run'): Pipeline([], budget=0)
    with pytest.raises(LabError, match='late is'): Pipeline([], late='never')
    with pytest.raises(LabError, match='not "maybe"'): Verdict('maybe')


# --- texts that are none

@pytest.mark.parametrize('text, reason', [(b'\xff\xfe', 'no text but bytes'), (None, 'no text but NoneType'), (3.5, 'no text but float'), ('a\x00b', 'U+0000 at position 1'), ('ab\udcff', 'U+DCFF at position 2')])
def test_what_is_no_text_is_blocked_with_a_reason(text, reason):
    out = Pipeline(text_guards(competitors=['Target'])).check(text)
    assert out.action == 'block' and reason in out.reason and out.text == sorry
    assert next(iter(Pipeline([PersonalData()]).stream([text]))) == sorry


def test_empty_text_is_for_the_length_guard_to_judge():
    assert Pipeline([g for g in text_guards() if g.name != 'length']).check('').action == 'pass'
    assert Length().check('').reason == 'nothing is said'
    assert list(Pipeline([PersonalData()]).stream([])) == []


# --- pipelines

def test_order_short_circuit_and_the_most_severe_verdict():
    after = Counts()
    out = Pipeline([PersonalData(), Toxic(fallback='Let us stay polite.'), after]).check('ann@example.com, you idiot')
    assert [v.action for v in out.verdicts] == ['fix', 'block'] and not after.seen and out.text == 'Let us stay polite.' and out.draft == '[EMAIL_1], you idiot'
    out = Pipeline([OffBrand(), Toxic(), Length(most=2)], short=False).check('dude you are an idiot')
    assert [v.action for v in out.verdicts] == ['ask', 'block', 'ask'] and out.action == 'block'
    assert Pipeline([OffBrand(), Length(most=2)]).check('dude you are late').reason.count(';') == 1, 'the model hears all objections'


def test_a_pipeline_is_a_guard():
    inner = Pipeline([PersonalData()], name='inner')
    out = Pipeline([inner, Toxic()], name='outer').check('ann@example.com')
    assert isinstance(out, Outcome) and out.text == '[EMAIL_1]' and [v.guard for v in out.verdicts] == ['inner', 'toxic']


@pytest.mark.parametrize('late, action, said', [('block', 'block', sorry), ('ask', 'ask', sorry), ('pass', 'pass', 'hello')])
def test_a_budget_that_runs_out_is_said_and_decides_as_told(late, action, said):
    class Slow(Guard):
        def look(self, text, context): time.sleep(.005)
    after = Counts()
    out = Pipeline([Slow(), after], budget=.001, late=late).check('hello')
    assert (out.action, out.text, out.skipped) == (action, said, ('counts',)) and 'out of time: 1 guard not run' in out.reason and not after.seen
    assert Pipeline([Slow()], budget=.001).check('hello').action == 'pass', 'all guards have agreed'


def test_forms_of_a_text_are_computed_once_for_all_guards():
    seen = []
    class Keeps(Guard):
        def look(self, text, context): seen.append(text)
    Pipeline([Keeps(name='a'), Keeps(name='b')]).check('Hello')
    assert seen[0] is seen[1] and isinstance(seen[0], Text)


# --- disguises

disguised = ['i\u200bd\u200bi\u200bo\u200bt', 'ｉｄｉｏｔ', 'іdіоt', '1d10t', 'i.d.i.o.t', 'i d i o t', 'idiooooot', '𝓲𝓭𝓲𝓸𝓽', 'ⓘⓓⓘⓞⓣ', 'ídîöt', 'IDIOT', 'id!ot', 'i\u00addiot', 'ᴵᴰᴵᴼᵀ', 'i-d-i-o-t', 'idi*t']

@pytest.mark.parametrize('word', disguised)
def test_disguises_are_seen_through_and_the_span_is_where_they_stand(word):
    text = f'Dear guest, you {word} of ours.'
    v = Toxic().check(text)
    assert v.action == 'block' and text[v.spans[0].start:v.spans[0].end] == word


@pytest.mark.parametrize('text', ['We stock shiitake, Scunthorpe scarves and cocktail dresses.', 'Sizes S M L XL, 42 EU, A55 and 50% off!', 'Order W2611340, item 8124970213: $49.67.', 'Die Damen-Jacke ist rot.', 'Он носит красную рубашку.', 'Assess the classic bass bag.',
                                  'Class A, e.g. B & C; 5 p.m. to 8 p.m.', 'The cured ham and the heel cure balm are healthy.', 'We cannot guarantee the lowest price.', 'It does not cure acne and is no miracle cure.', 'Our target is the best gap filler, next to it.'])
def test_ordinary_sentences_pass(text):
    assert Pipeline([Toxic(), Claims(), OffBrand(), Competitors(['Target', 'Gap', 'Next', "Macy's"])]).check(text).action == 'pass'


def test_a_denial_ends_with_its_sentence():
    assert Claims().check('No problem. This cream cures acne.').action == 'block'
    assert Claims().check('This cream never cures acne.').action == 'pass'


def test_terms_that_cannot_work_are_refused():
    for terms, why in ([['.. price'], 'no word at its beginning'], [['price ..'], 'no word'], [['a*'], 'too short'], [['  '], 'a term is a text'], [[3], 'a term is a text']):
        with pytest.raises(LabError, match=why): Terms({'x': terms})
    with pytest.raises(LabError, match='no terms'): Competitors([])
    with pytest.raises(LabError, match='Did you mean "crap"'): Toxic(less=['crab'])


def test_lists_are_extended_and_cut():
    assert Claims(more={'house': ['wrinkle free']}).check('It stays wrinkle-free.').action == 'block'
    assert Claims(less=['no questions asked']).check('Returns, no questions asked.').action == 'pass'


# --- other guards

def test_personal_data_comes_back_with_the_key_and_own_numbers_stay():
    from genai_lab.personal_data import restore
    key, text = {}, 'Ann: ann@example.com, 020 7946 0958. Again ann@example.com; our shop: help@shop.example'
    v = PersonalData(allow=['help@shop.example']).check(text, {'key': key})
    assert v.action == 'fix' and v.text.count('[EMAIL_1]') == 2 and 'help@shop.example' in v.text and '7946' not in v.text
    assert restore(v.text, key) == text
    with pytest.raises(LabError, match='emial'): PersonalData(kinds=['emial'])


def test_language_reading_level_repetition_length():
    german = 'Das Hemd gibt es in Dunkelblau und in Weiß, und wir liefern es innerhalb von drei Tagen.'
    assert Language().check(german).action == 'ask' and Language(['en', 'de']).check(german).action == 'pass'
    assert Language().check(german, {'language': 'de'}).action == 'pass', 'the language of the guest goes before'
    assert Repetition().check('and again and again ' * 20).action == 'ask' and Repetition().check('!' * 50).action == 'ask'
    assert ReadingLevel().check('We sell shirts. They are blue. ' * 10).action == 'pass'
    with pytest.raises(LabError, match='cannot both hold'): Length(most=1, least=2)
    with pytest.raises(LabError, match='no language "english"'): Language('english')


# --- cards

def test_a_card_counts_and_refuses_what_it_cannot_count():
    frame = pd.DataFrame(dict(text=['you idiot', 'hello', 'you 1d10t', 'good morning'], bad=[1, 0, 1, 0]))
    card = measure(Toxic(), frame, data='4 texts')
    assert isinstance(card, Card) and (card.caught, card.bad, card.alarms, card.good) == (2, 2, 0, 2) and card.recall.low < 1 and card.milliseconds > 0
    for wrong, why in ((dict(bad='evil'), 'no column "evil"'), (dict(text='txt'), 'Did you mean "text"')):
        with pytest.raises(LabError, match=why): measure(Toxic(), frame, **wrong)
    with pytest.raises(LabError, match='no rows'): measure(Toxic(), frame.head(0))
    with pytest.raises(LabError, match='1 empty label'): measure(Toxic(), frame.assign(bad=[1, None, 0, 0]))
    one_class = measure(Toxic(), frame[frame.bad == 0])
    assert one_class.recall.n == 0 and one_class.recall.value != one_class.recall.value, 'no bad text, no recall'


# --- streams

answer = ('The shirt costs $20 and is in stock. ' * 6 + 'Write to ann@example.com, or to bob@example.com, card 4111 1111 1111 1111. ' + 'You may bring it back within thirty days. ' * 6 + 'Thank ann@example.com.')

def pieces(text, n): return (text[i:i + n] for i in range(0, len(text), n))

@pytest.mark.parametrize('n', [1, 5, 64, 10_000])
def test_a_stream_says_what_the_pipeline_says_about_the_whole(n):
    p = Pipeline([PersonalData(), Toxic(), Claims()])
    s = p.stream(pieces(answer, n))
    said = list(s)
    assert ''.join(said) == p.check(answer).text and s.outcome.ok
    if n < 64: assert len(said) > 3


@pytest.mark.parametrize('at', [0, 40, 200, 333])
def test_a_block_ends_the_stream_before_the_bad_words_leave(at):
    bad = answer[:at] + ' What an i.d.i.o.t you are, it cures all acne, lowest prices guaranteed. ' + answer[at:]
    for n in (1, 7, 50):
        asked = itertools.count()
        source = (next(asked) and x or x for x in pieces(bad, n))
        s = Pipeline([PersonalData(), Toxic(), Claims()]).stream(source)
        said = list(s)
        assert said[-1] == sorry and s.outcome.action == 'block' and 'd.i.o' not in ''.join(said)
        assert next(source, 'closed') == 'closed', 'nothing more is asked of the model'


def test_a_stream_holds_back_no_more_than_a_guard_needs():
    arrived, said = '', ''
    def source():
        nonlocal arrived
        for x in pieces('word ' * 200, 3): arrived += x; yield x
    for part in Pipeline([Counts()]).stream(source()):
        said += part
        assert len(arrived) - len(said) <= 10
    assert said == 'word ' * 200


def test_a_guard_of_whole_texts_holds_back_everything_and_an_ask_stops():
    p = Pipeline([Counts(), Length(most=5)])
    assert p.hold is None and list(p.stream(pieces('only four words here', 3))) == ['only four words here']
    assert list(p.stream(pieces('these are more than five words', 3))) == [sorry]
    assert list(Pipeline([OffBrand()]).stream(['Dude, ', 'no.'])) == [sorry]


def test_the_work_of_a_stream_grows_with_its_length():
    work = []
    for n in (2_000, 20_000):
        c = Counts()
        list(Pipeline([c]).stream(pieces('word ' * (n // 5), 5)))
        work.append(sum(map(len, c.seen)))
    assert work[1] < 15 * work[0]


def test_a_pipeline_in_a_pipeline_streams_as_a_whole_where_its_fixes_cannot_be_told_apart():
    inner = Pipeline([PersonalData(), Terms({'x': ['shirt*']}, action='fix', mask='item')], name='inner')
    text = answer[:300]
    assert ''.join(Pipeline([inner, Toxic()]).stream(pieces(text, 5))) == Pipeline([inner, Toxic()]).check(text).text
    assert ''.join(inner.stream(pieces(text, 5))) == inner.check(text).text


def test_a_fix_that_reaches_into_what_has_left_blocks():
    class Late(Guard):
        hold = 2   # claims to need two characters and then wants to change four
        def look(self, text, context):
            at = text.find('0123')
            return Verdict('fix', 'late', (Span(at, at + 4, 'x', '-'),)) if at >= 0 else None
    said = ''.join(Pipeline([Late()]).stream(pieces('abcdef 0123 ghi', 1)))
    assert said.endswith(sorry)


# --- hostile input

hostile = dict(brackets=lambda n: '[' * n, nested=lambda n: '([{<' * (n // 4), digits=lambda n: ('1234567890' * 1000 + ' ') * (n // 10001 + 1), one_word=lambda n: 'a' * n, leet=lambda n: 'a1' * (n // 2), apart=lambda n: 'a ' * (n // 2) + 'xx',
    zero_width=lambda n: 's\u200bh\u200bi\u200bt ' * (n // 8), homoglyphs=lambda n: 'ѕһіt рау ' * (n // 9), mixed=lambda n: 'aбγ中ا🙂' * (n // 6), signs=lambda n: 'a@' * (n // 2), masked=lambda n: 'f*' * (n // 2), blank=lambda n: ' ' * n, accents=lambda n: 'a\u0301' * (n // 2),
    claims=lambda n: 'cure guarantee lowest price ' * (n // 28), groups=lambda n: '4111-1111-' * (n // 10), dots=lambda n: 'a.' * (n // 2))

@pytest.mark.parametrize('kind', hostile)
def test_hostile_text_takes_time_in_proportion_to_its_length(kind):
    "Ten times the text may take thirty times the time, quadratic growth would take a hundred."
    guards = text_guards(competitors=['Target'])
    def seconds(n):
        text, start = hostile[kind](n), time.process_time()
        for g in guards: assert not g.check(text).reason.startswith('failed')
        return time.process_time() - start
    seconds(2_000)
    large = 1_000_000 if os.environ.get('GENAI_LAB_HOSTILE') else 60_000
    assert seconds(large) < 30 * max(seconds(large // 10), .01)


# --- traces

def test_decisions_become_traces_without_personal_data(mlflow_home):
    import mlflow
    p = Pipeline([PersonalData(), Toxic(), Raises(fail='open')], name='house', trace='guards')
    p.check('Write to ann@example.com, you idiot', question='I am bob@example.com')
    p.check('We are open')
    p.check(b'bytes')
    mlflow.flush_trace_async_logging()
    client = mlflow.MlflowClient(f'sqlite:///{mlflow_home}/mlflow.db')
    traces = client.search_traces(locations=[client.get_experiment_by_name('guards').experiment_id])
    spans = [{s.name: s.outputs for s in t.data.spans} for t in traces]
    assert sorted(s['house']['action'] for s in spans) == ['block', 'block', 'pass']
    blocked = next(s for s in spans if 'toxic' in s and s['toxic']['action'] == 'block')
    assert blocked['personal data']['action'] == 'fix' and blocked['house']['not_run'] == ['raises'] and 'insult' in blocked['toxic']['reason']
    assert not any('@example.com' in str(s.inputs) + str(s.outputs) for t in traces for s in t.data.spans)
    assert any(s.inputs.get('question') == 'I am [EMAIL_2]' for t in traces for s in t.data.spans if s.inputs)


def test_a_decision_stands_when_its_trace_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('no folder')
    monkeypatch.setenv('GENAI_LAB_TRACKING_URI', f'sqlite:///{tmp_path}/file/mlflow.db')
    assert Pipeline([Toxic()], trace='guards').check('you idiot').action == 'block'
    assert 'could not be traced' in capsys.readouterr().err
