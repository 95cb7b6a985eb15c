"What is found in texts, what is left alone, and that nothing makes the search slow."
import sys

import pytest

from genai_lab.core import LabError
from genai_lab.personal_data import find_personal_data, kinds, recognise_names, redact_personal_data, restore


def found(text, **kw): return [(f.kind, f.text) for f in find_personal_data(text, **kw)]


@pytest.mark.parametrize('kind, value', [
    *(('card', v) for v in ('4111111111111111', '4111 1111 1111 1111', '5555-5555-5555-4444', '3782 822463 10005', '6011111111111117', '30569309025904', '3530111333300000', '4222222222222', '6304000000000000', '4000000000000000006')),
    *(('iban', v) for v in ('DE89370400440532013000', 'GB82 WEST 1234 5698 7654 32', 'fr14 2004 1010 0505 0001 3m02 606', 'NO9386011117947')),
    *(('ssn', v) for v in ('853-37-1694', '123 45 6789')),
    *(('email', v) for v in ('a.b+c@mail.example.co.uk', "o'neil@example.ie", 'jürgen@müller.example', 'JANE@EXAMPLE.ORG', 'x_1@a-b.museum')),
    *(('ip', v) for v in ('41.173.96.26', '10.0.0.0/8', '2001:db8:0:0:8:800:200c:417a', '2001:db8::8:800:200c:417a', 'fe80::1:2:3')),
    *(('phone', v) for v in ('(555) 123-4567x123', '555-123-4567', '555.123.4567', '+1-903-140-4508x769', '001-253-366-9781', '+44 (0)20 7946 0958', '+49(0) 30901820', '03.93.92.16.85', '0490 75 40 81', '079 2718 1155', '(08) 8747 6301', '+7 (495) 613-12-00', '00421 944 908 301')),
    *(('address', v) for v in ('12 Main Street', '221B Baker Street', '1600 Pennsylvania Ave, Springfield, IL 62701', 'Hauptstraße 5', '12 rue de Rivoli', 'PO Box 149', 'PSC 0413, Box 8144\nAPO AA 42323')),
])
@pytest.mark.parametrize('frame', ['{}', 'It is {}.', 'I gave ({}), as you asked', 'see:\n{}\n'])
def test_each_kind_is_found_with_its_exact_span(kind, value, frame):
    text = frame.format(value)
    f, = find_personal_data(text)
    assert (f.kind, f.text, text[f.start:f.end]) == (kind, value, value)


@pytest.mark.parametrize('value', ['467 3395', '358 0594', '78 651 450', '(99) 645-791', '60-56-85-91', '5403926876', '24 33 18 60', '9498777106', '(02199) 35181', '30/166 1318'])
def test_a_word_makes_a_short_number_a_telephone_number(value):
    assert found(f'Please call {value} today') == found(f'Phone:\n{value}\n') == found(f'{value} (mobile)') == [('phone', value)]
    assert found(f'call me about order {value}') == []


def test_one_sentence_does_not_speak_for_the_next(): assert found('I phoned. There are 467 3395 of them.') == []


@pytest.mark.parametrize('text', [
    'Order #W2378156 and order number 4571234890 of 2024-05-10 15:04:05, tracking no. 1Z999AA10123456784.', 'It was $1,299.99, now 1299.99 EUR or 2 499 000 Ft; 1.234.567,89.', 'EAN 4006381333931, ISBN 978-3-16-148410-0, SKU 10023456789.',
    'Open 10:00-18:00; call us between 9.30-17.30.', 'From 2019-2020 we grew; on 12.05.2024, 05/12/2024 and 12-05-24.', 'Sizes 38-46, 42.5, 120x80x200 cm, 1920x1080.', 'Version 1.2.3.4, section 10.1.2.3, 127.0.0.1, mask 255.255.255.0.', 'Text STOP to 12345, call 24/7, dial 911.',
    'pi is 3.14159265358979, and 0.371449635398431', 'call it 1000000 dollars', '550e8400-e29b-41d4-a716-446655440000, 00:1a:2b:3c:4d:5e, 4111111111111111abcdef', 'ticket 467-3395, ref 123-456-7890, part 123-45-6789', 'https://shop.example/p/4111111111111112?id=5551234567', 'a[::2]; std::map; a::b; 12:30:45',
    '@home a@b user@ x@1.2.3', 'card 1234 5678 9012 3456, 4111 1111 1111 1112, 0000 0000 0000 0000', 'error message 12345678', '10 people in the street, 20 standard lanes', 'PLASTIC CUPS 16 OZ/24 CT', '1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16', '=<<1200-1000=200>>200', 'Street 5, Weg 7', '', '\0\x01\x7f\ufffd', '\ud800 \U0010ffff'])
def test_ordinary_text_gives_no_alarm(text): assert found(text) == []


@pytest.mark.parametrize('text, kind, value', [
    ('card 4111\u200b1111\u200b1111\u200b1111.', 'card', '4111\u200b1111\u200b1111\u200b1111'), ('４１１１ １１１１ １１１１ １１１１', 'card', '４１１１ １１１１ １１１１ １１１１'), ('4111‑1111–1111−1111', 'card', '4111‑1111–1111−1111'), ('card 4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1', 'card', '4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1'),
    ('to jane＠mail。example', 'email', 'jane＠mail。example'), ('to jane\u00ad.doe@mail\u2060.example', 'email', 'jane\u00ad.doe@mail\u2060.example'), ('ann [at] mail (dot) example', 'email', 'ann [at] mail (dot) example'), ('tel ٠٢٠ ٧٩٤٦ ٠٩٥٨', 'phone', '٠٢٠ ٧٩٤٦ ٠٩٥٨'),
    ('at 41．173．96．26', 'ip', '41．173．96．26'), ('GВ82 WЕST 1234 5698 7654 32', 'iban', 'GВ82 WЕST 1234 5698 7654 32'), ('a\u200b 555\u00a0123\u00a04567', 'phone', '555\u00a0123\u00a04567')])
def test_disguises_are_seen_through_and_spans_are_those_of_the_original(text, kind, value):
    f, = find_personal_data(text)
    assert (f.kind, f.text, text[f.start:f.end]) == (kind, value, value)
    r = redact_personal_data(text)
    assert value not in r.text and restore(r.text, r.key) == text


def test_findings_are_sorted_apart_and_of_the_kinds_asked_for():
    text = 'jane@mail.example 853-37-1694 41.173.96.26 (555) 123-4567 4111 1111 1111 1111 GB82WEST12345698765432, 12 Main Street'
    all_ = find_personal_data(text)
    assert sorted(f.kind for f in all_) == sorted(kinds) and all(a.end <= b.start for a, b in zip(all_, all_[1:]))
    assert all([f for f in all_ if f.kind == k] == find_personal_data(text, kinds=k) for k in kinds)


def test_a_street_word_alone_is_no_error(): assert [k for k, _ in found('Straße 5')] in ([], ['address'])


def test_regions_decide_what_a_national_number_is():
    assert found('928 90 83 01') == [('phone', '928 90 83 01')] and found('928 90 83 01', regions=('US',)) == []


def test_one_value_has_one_placeholder_and_the_text_comes_back():
    text = 'Jane@Mail.example, jane@mail.example; +1 555 123 4567, (555) 123-4567, 555.123.4567 x9; 4111111111111111 and 4111 1111 1111 1111; gb82west12345698765432, GB82 WEST 1234 5698 7654 32'
    r = redact_personal_data(text)
    assert r.text == '[EMAIL_1], [EMAIL_1]; [PHONE_1], [PHONE_1], [PHONE_2]; [CARD_1] and [CARD_1]; [IBAN_1], [IBAN_1]'
    assert restore(r.text, r.key) == text and 'Jane' not in repr(r) + r._repr_html_() and r.to_frame()['times'].tolist() == [2, 2, 1, 2, 2]
    assert restore('[PHONE_2]? [EMAIL_1]! [CARD_9]', r.key) == '555.123.4567 x9? Jane@Mail.example! [CARD_9]'


def test_placeholders_of_the_text_itself_are_left_alone():
    for text in ('[EMAIL_1] a@b.example [EMAIL_2] [EMAIL_1]', '[[EMAIL_1]a@b.example]', '[EMAIL_a@b.example] [EMAIL_01]', '[PHONE_1] (555) 123-4567 [IP_1]'):
        r = redact_personal_data(text)
        assert restore(r.text, r.key) == text and not any(p in text for p in r.key)


def test_an_earlier_key_keeps_its_placeholders():
    first = redact_personal_data('a@b.example and c@d.example')
    second = redact_personal_data('x@y.example, C@D.example', key=first.key)
    assert second.text == '[EMAIL_3], [EMAIL_2]' and restore(second.text, second.key) == 'x@y.example, C@D.example'
    assert restore(first.text, second.key).lower() == 'a@b.example and c@d.example'


def test_names_come_from_the_recogniser_and_a_surname_is_the_same_person():
    import re
    r = redact_personal_data('Jane Doe met Max Roe. Doe left, JANE  DOE too.', kinds=('name',), names=lambda t: [m.span() for m in re.finditer(r'(?:jane +)?doe|max roe', t, re.I)])
    assert r.text == '[NAME_1] met [NAME_2]. [NAME_1] left, [NAME_1] too.'


def test_names_without_a_recogniser_say_what_to_install():
    with pytest.raises(LabError, match='pip install "genai-lab\\[names\\]"'): recognise_names('Jane Doe', model='no_such_model')
    assert 'presidio_analyzer' not in sys.modules or 'spacy' in sys.modules


def test_names_by_presidio_where_it_is_installed(tmp_path):
    pytest.importorskip('presidio_analyzer')
    import spacy
    nlp = spacy.blank('en')
    nlp.add_pipe('entity_ruler').add_patterns([dict(label='PERSON', pattern='Jane Doe')])
    nlp.to_disk(tmp_path / 'model')
    assert recognise_names('Ask Jane Doe.', model=str(tmp_path / 'model')) == [(4, 12)]


@pytest.mark.parametrize('call, words', [
    (lambda: find_personal_data(None), 'this is NoneType'), (lambda: find_personal_data(b'x'), 'decode bytes'), (lambda: find_personal_data('x', kinds=('phone', 'emial')), 'Did you mean "email"'), (lambda: find_personal_data('x', regions=('UK',)), '"UK" is no region'),
    (lambda: redact_personal_data('x', key={'a': 'b'}), 'give the key of a Redacted'), (lambda: restore('x', ['[EMAIL_1]']), 'give the key of a Redacted'), (lambda: restore(None, {}), 'this is NoneType')])
def test_bad_input_is_answered_in_one_line(call, words):
    with pytest.raises(LabError, match=words) as e: call()
    assert '\n' not in str(e.value)


hostile = ['1', '1 ', '12 ', '4111 ', '1-', '@', 'a.', 'a@', 'a@b[dot]', 'a[at]', '[', '(1', '((', ':', 'ab12:', '1.', '1.2.3.4 ', '+1', 'GB59', 'GB59 ', '1 Main ', '1 Main St ', 'via Tasso ', 'a\u200b', '１', 'call 467 3395 ', '0490 75 40 81 ', '91 23 45 67 89\n', 'x@y.example ', '555-123-4567x', 'PO Box ', 'аa＠']

def steps(text):
    "Lines of Python that a search runs: work counted, not timed."
    n = 0
    def trace(frame, event, arg):
        nonlocal n
        n += event == 'line'
        return trace
    sys.settrace(trace)
    try: redact_personal_data(text)
    finally: sys.settrace(None)
    return n

@pytest.mark.parametrize('piece', hostile)
def test_work_grows_with_the_length_and_no_faster(piece):
    small, large = ((piece * n)[:n] for n in (1_000, 4_000))
    redact_personal_data(large)   # what is remembered between calls is remembered now
    assert steps(large) <= 4.4 * steps(small) + 500

@pytest.mark.parametrize('piece', [*hostile, None])
def test_long_hostile_text_ends_and_comes_back(piece):
    text = ('9' * 10_000 + ' ') * 5 if piece is None else piece * (50_000 // len(piece))
    r = redact_personal_data(text)
    assert restore(r.text, r.key) == text
