"""Topics about numbers: sums, differences, products, counting and comparing.

Sums and differences above 12 are held out by the pair of numbers (in either order, for a sum), so
a right answer there is arithmetic and not memory. Products are a table of 169 facts to learn by
heart, and are held out by phrase and pair.
"""

import random

from tools.demo_facts import cells, number_word
from tools.demo_topics import Memo, Turn
from tools.demo_words import styled

_FORMS = [
    "What is {x}?", "{x}", "{x} =", "{x}=?", "How much is {x}?", "Calculate {x}.", "What's {x}?",
    "Compute {x}.", "{x}?", "What does {x} equal?", "Tell me what {x} is.", "Can you calculate {x}?",
    "What is the result of {x}?", "How much is {x}", "Solve {x}.", "And what is {x}?", "Please compute {x}.",
]  # fmt: skip
_BARE = ["{x}", "{x} =", "{x}=?", "{x}?", "How much is {x}?", "How much is {x}"]
_SUM = ["Add {a} and {b}.", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?", "Sum of {a} and {b}?"]
_DIFFERENCE = ["Subtract {b} from {a}.", "Take {b} away from {a}.", "Can you subtract {b} from {a}?"]
_PRODUCT = ["Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."]
_SIGNS = {"+": ["+", "+", "plus"], "-": ["-", "-", "minus"], "*": ["*", "x", "×", "times", "times"]}


def _phrase(rng: random.Random, sign: str, a: int, b: int, special: list[str]) -> tuple[str, str]:
    """A styled question about `a sign b` and the phrase it was made from."""
    kind = rng.random()
    words = kind < 0.15
    x, y = (number_word(a), number_word(b)) if words else (str(a), str(b))
    if kind > 0.8:
        template = rng.choice(special)
        return styled(rng, template).replace("{a}", x).replace("{b}", y), template
    form = rng.choice(_FORMS)
    shown = _SIGNS[sign][-1] if words else rng.choice(_SIGNS[sign])
    tight = len(shown) == 1 and not words and rng.random() < 0.3
    inner = f"{x}{shown}{y}" if tight else f"{x} {shown} {y}"
    return styled(rng, form).replace("{x}", inner), form


def _operands(rng: random.Random) -> tuple[int, int]:
    top = rng.choice((12, 30, 99, 99))
    return rng.randint(0, top), rng.randint(0, top)


def _key(sign: str, a: int, b: int, phrase: str) -> str:
    """Empty, so never held, for the forms that the way of typing can turn into each other."""
    if max(a, b) <= 12:
        return "" if phrase in _BARE else f"{phrase}|{a}{sign}{b}"
    return f"{min(a, b)}+{max(a, b)}" if sign == "+" else f"{a}-{b}"


def add(rng: random.Random, memo: Memo) -> Turn:
    a, b = _operands(rng)
    text, phrase = _phrase(rng, "+", a, b, _SUM)
    return Turn("sum", _key("+", a, b, phrase), text, f"{a} + {b} = {a + b}.", f"{a + b}.")


def subtract(rng: random.Random, memo: Memo) -> Turn:
    a, b = _operands(rng)
    if a < b and rng.random() < 0.75:
        a, b = b, a
    text, phrase = _phrase(rng, "-", a, b, _DIFFERENCE)
    return Turn("difference", _key("-", a, b, phrase), text, f"{a} - {b} = {a - b}.", f"{a - b}.")


def multiply(rng: random.Random, memo: Memo) -> Turn:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    text, phrase = _phrase(rng, "*", a, b, _PRODUCT)
    return Turn("product", _key("*", a, b, phrase), text, f"{a} × {b} = {a * b}.", f"{a * b}.")


_GOODS = cells("apples|pears|coins|books|marbles|eggs|stamps|cards|shells|pencils")


def word_problem(rng: random.Random, memo: Memo) -> Turn:
    thing = rng.choice(_GOODS)
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        verb = rng.choice(("buy", "find", "get"))
        text = f"I have {a} {thing} and {verb} {b} more. How many {thing} do I have now?"
        total = f"{a} + {b} = {a + b}"
    else:
        a, b = max(a, b) + 1, min(a, b)
        verb = rng.choice(("lose", "sell", "give away"))
        text = f"I have {a} {thing} and {verb} {b}. How many {thing} do I have left?"
        total = f"{a} - {b} = {a - b}"
    key = _key(total.split()[1], a, b, verb)
    answer = f"{total}, so you have {total.split()[-1]} {thing}."
    return Turn("word problem", key, styled(rng, text), answer, f"{total.split()[-1]}.")


_COUNT = [
    "Count from {a} to {b}.", "Count from {a} to {b}", "Can you count from {a} to {b}?",
    "Please count from {a} to {b}.", "Count {a} to {b}.", "List the numbers from {a} to {b}.",
    "Give me the numbers from {a} to {b}.", "Start at {a} and count to {b}.",
]  # fmt: skip
_COUNT_DOWN = ["Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "Count down {a} to {b}."]
_COUNT_TO = ["Count to {b}.", "Can you count to {b}?", "Please count to {b}.", "Count up to {b}."]


def count(rng: random.Random, memo: Memo) -> Turn:
    length = 99 if rng.random() < 0.01 else rng.choice((rng.randint(2, 10), rng.randint(5, 25)))
    a = rng.choice((1, rng.randint(0, 100 - length), rng.randint(0, 100 - length)))
    a = min(a, 100 - length)
    b = a + length
    forms = _COUNT + _COUNT_TO * 2 if a == 1 else _COUNT
    if rng.random() < 0.25:
        a, b, forms = b, a, _COUNT_DOWN
    step = 1 if a < b else -1
    template = rng.choice(forms)
    text = styled(rng, template).replace("{a}", str(a)).replace("{b}", str(b))
    numbers = ", ".join(str(i) for i in range(a, b + step, step))
    return Turn("counting", f"{a}..{b}", text, f"{numbers}.", numbers)


_LARGER = ["Which is larger, {a} or {b}?", "Which is bigger, {a} or {b}?", "What is more, {a} or {b}?"]
_SMALLER = ["Which is smaller, {a} or {b}?", "What is less, {a} or {b}?"]
_EVEN = ["Is {a} even or odd?", "Is {a} an even number?", "Is {a} odd or even?", "Is {a} an odd number?"]


def compare(rng: random.Random, memo: Memo) -> Turn:
    a, b = rng.sample(range(100), 2)
    kind = rng.randrange(3)
    if kind == 2:
        template = rng.choice(_EVEN)
        text = styled(rng, template).replace("{a}", str(a))
        parity = "odd" if a % 2 else "even"
        return Turn("comparing", f"{template}|{a}", text, f"{a} is {parity}.", f"{parity.capitalize()}.")
    template = rng.choice((_LARGER, _SMALLER)[kind])
    text = styled(rng, template).replace("{a}", str(a)).replace("{b}", str(b))
    first, word = ((max(a, b), "larger"), (min(a, b), "smaller"))[kind]
    second = a + b - first
    return Turn("comparing", f"{a}|{b}", text, f"{first} is {word} than {second}.", f"{first}.")
