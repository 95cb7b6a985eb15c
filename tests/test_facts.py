"Retail facts: what is a claim, whom it is about, what the catalogue and the policy say, and what bad input does."
import pandas as pd
import pytest

from genai_lab.core import LabError
from genai_lab.facts import Catalogue, FactsGuard, Policy, check_facts, extract_claims

ROWS = [  # name, colour, size, capacity, material, price, available, id
    ('Trail Shoes', 'black', '9', None, 'mesh', 89.90, True, '7001'), ('Trail Shoes', 'black', '10', None, 'mesh', 94.50, False, '7002'),
    ('Trail Shoes', 'blue', '9', None, 'leather', 119.00, True, '7003'), ('Trail Shoes', 'red', '11', None, 'leather', 121.00, False, '7004'),
    ('Water Bottle', 'green', None, '500ml', 'steel', 19.99, True, '7101'), ('Water Bottle', 'green', None, '1L', 'steel', 24.99, False, '7102'),
    ('Rain Jacket', 'navy', 'M', None, 'nylon', 1299.00, True, '7201'), ('Rain Jacket', 'navy', 'XL', None, 'nylon', 1349.00, True, '7202'),
    ('Action Camera', 'silver', None, None, None, 466.75, False, '7301'), ('Digital Camera', 'black', None, None, None, 2714.51, True, '7302')]
POLICY = '''# Returns
Items can be returned within 30 days of delivery for a full refund. Electronics must be returned within 14 days.
Exchanges are possible within 6 weeks. Refunds go to the original payment method in 5 to 7 business days; gift card refunds are immediate.
Pending orders can be cancelled within 24 hours. Standard shipping costs $5.99; free shipping on orders over $75. A 15% restocking fee applies to opened items.'''


@pytest.fixture(scope='module')
def shop(): return pd.DataFrame(ROWS, columns=['product', 'colour', 'size', 'capacity', 'material', 'price', 'in_stock', 'item_id'])


@pytest.fixture(scope='module')
def store(shop): return Catalogue(shop)


@pytest.fixture(scope='module')
def rules(): return Policy(POLICY)


TRUE = ['The black Trail Shoes in size 9 cost $89.90 and are in stock.',
        'Our trail shoe (colour: blue, size: 9, material: leather) is priced at 119 dollars.',
        'The runing and trail shoes start at $89.90.',
        'Trail Shoes range from $89.90 to $121.00, and the Water Bottle is between $19.99 and $24.99.',
        'We have a Water Bottle under $20: the 500 ml one is $19.99.',
        'The Water Bottle with 1 litre is sold out. The half-litre one (500ml) is available.',
        'The Rain Jacket comes in M and XL. It is in stock and costs from $1,299.00.',
        'The Rain Jacket in XL is USD 1,349.00; the black Trail Shoes in size 10 are currently unavailable.',
        'The Trail Shoes in black, size 9 and the navy Rain Jacket in size M cost $89.90 and $1,299.00 respectively.',
        'We do not have the Trail Shoes in green. They do not come in size 14 either.',
        'Item 7004 is the Trail Shoes in red. It costs $121.00 and is out of stock.',
        'You asked for the Rain Jacket in XXL for less than $100. We have it in M for $1,299.00.',
        'Would the Trail Shoes in size 12 for $70 be of interest? If they are sold out, we let you know.',
        'Your order #W1234567 of May 5, 2024 (2 items, 4.5 of 5 stars) had a total of $109.89; you paid with a $50 gift card and saved $10.',
        'Two Water Bottles (500ml) at $19.99 each come to $39.98 in total.',
        'You have 30 days from delivery to return it, and forty-two days to exchange it.',
        'We have a 30-day return policy. Refunds take 5-7 business days, or are immediate for gift cards.',
        'Electronics can be sent back within two weeks.', 'Pending orders can be cancelled within 24 hours.',
        'Shipping is $5.99, free for orders over $75, and there is a restocking fee of 15%.',
        'The shoes cost $89.90 in black, size 9. Both of our cameras are different: the Digital Camera costs 2.714,51 €.', '']

FALSE = [('price', 'The black Trail Shoes in size 9 cost $99.90.'), ('price', 'The Rain Jacket in M costs one thousand dollars.'),
         ('price', 'Trail Shoes start at $79.90.'), ('price', 'The Water Bottle ranges from $19.99 to $34.99.'),
         ('price', 'The Trail Shoes are available in blue, size 9. They cost $89.90.'),
         ('price', 'The Rain Jacket is over $2,000.'), ('price', 'We sell $15.99 for the Water Bottle in 500ml.'),
         ('price', 'The Water Bottle (500ml) is $19.99, while the Rain Jacket (size M) is $1,199.00.'),
         ('price', 'Item 7003 costs €99,00.'),
         ('option', 'The Trail Shoes are offered in size 13.'), ('option', 'The Water Bottle holds 750ml.'), ('option', 'We sell the Rain Jacket in XXL.'),
         ('option', 'The Trail Shoes come in green.'), ('option', 'The Rain Jacket is made of leather.'),
         ('option', 'Trail Shoes in sizes 8, 9 and 10 are on the shelf.'), ('option', 'The red Trail Shoes in size 9 cost $121.00.'),
         ('stock', 'The black Trail Shoes in size 9 are sold out.'), ('stock', 'The Water Bottle (1L) is in stock.'), ('stock', 'The Action Camera is available now.'),
         ('stock', "The Digital Camera isn't available at the moment."), ('stock', 'Unfortunately, we do not have the Rain Jacket in XL.'),
         ('stock', '| Trail Shoes | black | 10 | available |'), ('stock', 'Item 7102\nIn stock: yes'),
         ('window', 'You can return it within 60 days.'), ('window', 'Our 45-day return policy applies.'), ('window', 'Exchanges are possible for three weeks.'),
         ('window', 'Your refund takes 10 to 14 business days.'), ('window', 'Electronics can be returned within 30 days.'),
         ('window', 'Pending orders can be cancelled within 48 hours.'), ('fee', 'Shipping costs $9.99.'), ('fee', 'There is a 20% restocking fee.')]


@pytest.mark.parametrize('text', TRUE)
def test_what_is_true_passes(store, rules, text):
    found = check_facts(text, store, rules)
    assert found.ok, found


@pytest.mark.parametrize('kind, text', FALSE)
def test_what_is_false_is_found(store, rules, kind, text):
    found = check_facts(text, store, rules)
    assert [c.kind for c in found.contradicted] == [kind], found.to_frame().to_string()
    c = found.contradicted[0]
    assert text[c.start:c.end] == c.text and c.why


@pytest.mark.parametrize('text, value', [('It is $1,299.00.', 1299), ('It is 20 dollars.', 20), ('USD 20', 20), ('€19,99', 19.99), ('thirty-five dollars', 35), ('1.299,00 €', 1299), ('twenty dollars and fifty cents', 20.5)])
def test_money_in_many_notations(text, value):
    assert [c.value for c in extract_claims(text) if c.kind == 'price'] == [value]


@pytest.mark.parametrize('text, days', [('a 30-day return window', 30), ('return it within thirty days', 30), ('returns: two weeks', 14), ('you may return it for one month', 30), ('a fortnight to return it', 14)])
def test_windows_in_many_words(text, days):
    assert [c.value for c in extract_claims(text) if c.kind == 'window'] == [(days, days)]


@pytest.mark.parametrize('text, right', [('You have a fortnight to exchange it.', ''), ('Refunds are issued immediately.', 'in 5 to 7 days')])
def test_a_wrong_window_without_a_number_is_told_like_any_other(rules, text, right):
    assert [c.right for c in check_facts(text, None, rules).contradicted] == [right]


def test_a_denial_ends_with_its_line():
    assert [c.value for c in extract_claims('Mug: not available\nAvailable: yes') if c.kind == 'stock'] == [False, True]
    assert [c.value for c in extract_claims('never\navailable.') if c.kind == 'stock'] == [True]


def test_case_and_letters_that_grow_in_lower_case_do_not_move_claims(store):
    for text in ('İ THE TRAIL SHOES IN SIZE 9 COST USD 9.99 AND ARE SOLD OUT.', 'İ İ The Rain Jacket in XL COSTS $9.99, AND IS Sold Out.'):
        assert all(text[c.start:c.end] == c.text for c in check_facts(text, store))


@pytest.mark.parametrize('text', ['I bought it 30 days ago.', 'We are open 7 days a week.', 'The battery lasts 20 hours.', 'Rated 4.5 of 5 by 1,204 people.', 'Order #12345 has 3 items.', 'Call 555-0199 by May 5, 2024.'])
def test_numbers_that_claim_nothing(text):
    assert not [c for c in extract_claims(text) if c.kind in ('price', 'window', 'stock')]


def test_stock_counts_and_words_and_options_in_dictionaries():
    f = pd.DataFrame([dict(name='Mug', sku='m1', options={'color': 'red', 'size': 'L'}, price='$7.50', stock=3), dict(name='Mug', sku='m2', options='{"color": "blue", "size": "S"}', price='$6.50', stock=0),
                      dict(name='Bowl', sku='b1', options='color: white, size: M', price='8', stock='12')])
    c = Catalogue(f)
    assert c.options == ['color', 'size'] and len(c.products) == 2
    assert check_facts('The red Mug in L costs $7.50 and is in stock. The blue one is sold out. The white Bowl is available.', c).ok
    assert not check_facts('The blue Mug is in stock.', c).ok and not check_facts('The Bowl costs $9.00.', c).ok


@pytest.mark.parametrize('frame', [dict(title=['Mug'], sizes=['S, M'], colours=[['red', 'blue']], cost=[7.5], status=['in stock']), dict(name=['Mug'], variants=[{'1': dict(options={'color': 'red', 'size': 'S'}, price=7.5, available=True), '2': dict(options={'color': 'blue', 'size': 'M'}, price=7.5, available=True)}]),
                                   dict(name=['Mug', 'Mug'], variant=['red / S', 'blue / M'], price=[7.5, 7.5], available=[True, True])])
def test_options_in_lists(frame):
    c = Catalogue(pd.DataFrame(frame))
    assert check_facts('The Mug comes in red and blue, in size S or M, for $7.50. It is in stock.', c).ok
    assert [x.kind for x in check_facts('The Mug costs $8.50 and is sold out.', c).contradicted] == ['price', 'stock']


def test_fix_puts_the_right_value_in_place(store, rules):
    v = FactsGuard(store, rules, contradiction='fix').check('The black Trail Shoes in size 9 cost $99.90. Return them within 60 days.')
    assert (v.action, v.text) == ('fix', 'The black Trail Shoes in size 9 cost $89.90. Return them within 30 days.')
    assert FactsGuard(store, rules, contradiction='fix').check('The Trail Shoes cost $99.90.').action == 'block'   # several prices: nobody knows which


def test_what_nothing_supports_is_as_the_guard_says(store):
    text, policy = 'It has a warranty of two years.', 'Items can be returned within 30 days.'
    assert [FactsGuard(store, policy, unsupported=u).check(text).action for u in ('ask', 'block', 'pass')] == ['ask', 'block', 'pass']


def test_catalogue_and_policy_from_the_context(shop):
    g, context = FactsGuard(), dict(catalogue=shop, policy=POLICY)
    assert g.check('The Rain Jacket in M costs $9.', context).action == 'block' and g.check('Return it within 30 days.', context).action == 'pass'
    assert g.check('The Rain Jacket in M costs $9.').action == 'pass'


def test_duplicate_products(shop):
    twice = pd.concat([shop, shop.head(1)])
    assert len(Catalogue(twice).notes) == 1
    with pytest.raises(LabError, match='"Trail Shoes" stands twice with the same options, in rows 1 and 11'): Catalogue(twice.assign(price=[*shop.price, 1.0]))
    v = FactsGuard().check('The Trail Shoes cost $1.', dict(catalogue=twice.assign(price=[*shop.price, 1.0])))
    assert v.action == 'block' and 'stands twice' in v.reason


@pytest.mark.parametrize('text', ['Items can be returned within 30 days. You may return anything within 14 days of delivery.', 'Returns: 30 days\nReturns: 60 days', 'Refunds take 3 to 5 business days. We issue refunds within 10 business days.'])
def test_a_policy_that_contradicts_itself(text):
    with pytest.raises(LabError, match='contradicts itself about (return|refund)'): Policy(text)


@pytest.mark.parametrize('make, match', [(lambda s: Catalogue(s.head(0)), 'no rows'), (lambda s: Catalogue([1]), 'a DataFrame is needed'), (lambda s: Catalogue(s, price='prize'), 'no column "prize".*Did you mean "price"'),
                                         (lambda s: Catalogue(s.drop(columns='product')), 'looks like the product'), (lambda s: Catalogue(s.assign(product=[None, *s['product'][1:]])), 'row 1 has no name'),
                                         (lambda s: Policy(''), 'empty'), (lambda s: Policy(3), 'a text is needed'), (lambda s: FactsGuard(s, unsupported='warn'), 'not "warn"')])
def test_bad_input_is_said_in_one_line(shop, make, match):
    with pytest.raises(LabError, match=match) as e: make(shop)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('piece', ['9' * 10_000 + ' ', '$1,000,000,', 'within 30 ', '((((', 'Trail Shoes ', 'size 9, ', 'twenty ', '\u200b\u0430', '. ', 'in stock ', 'return 30 days ', 'Trail Shoes $9. ', '$9 to '])
def test_hostile_text_ends(store, rules, piece):
    text = (piece * 20_000)[:20_000]   # what grows with the square of the length would take minutes
    assert check_facts(text, store, rules).text == text


def test_a_result_shows_itself(store, rules):
    found = check_facts('The Rain Jacket in M costs $9 <b>.', store, rules)
    assert '&lt;b&gt;' in found._repr_html_() and 'contradicted' in repr(found) and list(found.to_frame().columns) == ['status', 'kind', 'text', 'product', 'right', 'why']
