"Groundedness: sentences, kinds of answers, measures, scales fitted to labels, the guard, and bad input."
import json
import math

import numpy as np
import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.grounding import Groundedness, Scale, default_scale, fit_scale, grounding, measures, most_characters

SOURCES = ['Items can be returned within 30 days of delivery. Keep the receipt. Gift cards cannot be returned.',
           'Refunds go to the original payment method in 5 to 7 business days. The Berlin shop is open on Saturday.']


def test_more_support_means_a_higher_score():
    said = ['Items can be returned within 30 days of delivery. Keep the receipt.', 'You may return an item within 30 days if you have the receipt.',
            'You may return an item within 30 days. We will also send a driver on Sunday to pick up your parcel for a small charge.', 'A driver comes on Sunday evening and picks up parcels for 12 dollars, even from a neighbour.']
    scores = [grounding(s, SOURCES).score for s in said]
    assert scores == sorted(scores, reverse=True) and scores[0] > .9 and scores[-1] < .2


@pytest.mark.parametrize('text, kind', [("I don't have information about that.", 'refusal'), ('The documents do not mention any opening hours.', 'refusal'), ('Unfortunately, I cannot answer this question.', 'refusal'), ("You're welcome! Anything else?", 'small talk'),
                                        ('Thank you, have a nice day.', 'small talk'), ('', 'empty'), (' \n', 'empty'), ('We open at nine.', 'answer'), ('I do not have the price. The shop opens at nine and closes at six in the evening.', 'answer')])
def test_kinds_of_answers(text, kind): assert grounding(text, SOURCES).kind == kind


@pytest.mark.parametrize('sources', [None, [], '', ['  ']])
def test_without_sources_there_is_a_verdict(sources):
    g = grounding('It takes 3 days.', sources)
    assert g.kind == 'no sources' and g.score < .1 and 'no source' in repr(g)
    assert Groundedness().check('It takes 3 days.', dict(sources=sources)).action == 'ask' and Groundedness(no_sources='block').check('It takes 3 days.').action == 'block'


def test_numbers_and_names_that_no_source_has():
    right, wrong = (grounding(t, SOURCES) for t in ('The shop in Berlin is open on Saturday.', 'The shop in Munich is open on Sunday.'))
    assert right.measures['figures'] == 1 and wrong.measures['figures'] == 0 and right.score > wrong.score
    assert set(wrong.sentences[0].missing) == {'Munich', 'Sunday'}


def test_sentences_name_their_passage():
    g = grounding('Keep the receipt.\n\n* **Refunds** take 5 to 7 business days.', SOURCES, question='How long does a refund take?')
    assert [g.text[s.start:s.end] for s in g.sentences] == ['Keep the receipt.', '**Refunds** take 5 to 7 business days.']
    assert [s.source for s in g.sentences] == [0, 1] and 'Keep the receipt.' in g.sentences[0].passage
    assert all(g.text[a:b] in ('Keep the receipt', '5 to 7 business days') for s in g.sentences for a, b in s.phrases)
    assert g.relevance > .4 and math.isnan(grounding('Keep it.', SOURCES).relevance)
    assert list(g.to_frame().source) == [0, 1]


def test_the_same_answer_gets_the_same_score_and_order_of_sources_does_not_matter():
    text = 'You may return an item within 30 days, and money comes back in 5 to 7 business days.'
    a, b = grounding(text, SOURCES), grounding(text, SOURCES[::-1])
    assert a.score == grounding(text, SOURCES).score and abs(a.score - b.score) < 1e-6


def test_long_sources_are_bounded():
    filler = 'Nothing of this is about parcels. ' * 9000
    g = grounding('Keep the receipt and bring it.', [SOURCES[0], filler])
    assert g.score > .5 and g.notes and 'were left out' in g.notes[0]
    assert len(SOURCES[0] + filler) > most_characters
    assert grounding('Keep ' * 20_000, SOURCES).kind == 'answer'   # ends


def test_html_is_escaped():
    g = grounding('Keep the <b>receipt</b> & go.', ['Keep the <b>receipt</b> & go.'])
    assert '<b>receipt' not in g._repr_html_() and '&lt;b&gt;' in g._repr_html_()


def labelled(n=40):
    good, bad = 'Items can be returned within 30 days of delivery.', 'A driver comes on Sunday for 12 dollars.'
    rows = [dict(answer=' '.join([good, 'Keep the receipt.'][:1 + i % 2] if i % 4 else [bad]), sources=SOURCES, human=[1., 4., 3., 4.][i % 4], talk=i // 4) for i in range(n)]
    return pd.DataFrame(rows)


def test_a_scale_learns_from_labels_and_is_numbers_only():
    scale, held = fit_scale(labelled(), group='talk')
    assert np.corrcoef(held, labelled().human)[0, 1] > .9
    again = Scale(**json.loads(scale.to_json()))
    assert again == scale and grounding('Keep the receipt.', SOURCES, scale=again).score == grounding('Keep the receipt.', SOURCES, scale=scale).score
    assert set(default_scale.weight) == set(measures)
    risks = [scale.risk(h) for h in (1, 2, 3, 4)]
    assert risks == sorted(risks, reverse=True)


@pytest.mark.parametrize('change, match', [(dict(human=3.), 'not all alike'), (dict(human=np.nan), '40 empty labels'), (dict(talk=1), 'one group only'), (dict(sources='x', human=4.), 'not all alike'), (dict(answer="You're welcome!"), '0 answers')])
def test_labels_that_teach_nothing(change, match):
    with pytest.raises(LabError, match=match): fit_scale(labelled().assign(**change), group='talk')


def test_bad_input_is_said_in_one_line():
    with pytest.raises(LabError, match='no column "humam".*Did you mean "human"'): fit_scale(labelled(), human='humam')
    with pytest.raises(LabError, match='a list with int'): grounding('Keep it.', [3])
    with pytest.raises(LabError, match='sources are a text or a list of texts, this is int'): grounding('Keep it.', 3)
    with pytest.raises(LabError, match='this is dict'): grounding('Keep it.', {'policy': 'Keep it.'})
    with pytest.raises(LabError, match='the answer is int'): grounding(3, SOURCES)
    with pytest.raises(LabError, match='not "drop"'): Groundedness(action='drop')
    v = Groundedness().check('Keep it.', dict(sources=[3]))
    assert v.action == 'block' and 'failed closed' in v.reason


def test_the_guard_says_where():
    text = 'Keep the receipt. A driver comes on Sunday evening and picks up parcels for 12 dollars.'
    v = Groundedness(risk=.05).check(text, dict(sources=SOURCES))
    assert v.action == 'ask' and [text[s.start:s.end] for s in v.spans] == [text[18:]] and 0 < v.score <= 1
    assert Groundedness().check('I do not know.', dict(sources=[])).action == 'pass'
