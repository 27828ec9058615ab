"""Topics that need memory across turns: the user says something and later asks for it.

A value comes back exactly as it was typed. The latest statement wins, and a question about what
was never said gets "You have not told me ...".
"""

import random

from tools.demo_facts import CITIES, COLOUR_NAMES, FOODS, PETS, cells
from tools.demo_topics import Memo, Turn
from tools.demo_words import name, styled, word

# what: statements, reply to them, questions, answer, answer when unknown, line in the summary
_SUBJECTS = {
    "name": (
        "My name is {x}.|I am {x}.|I'm {x}.|Call me {x}.|My name's {x}.|You can call me {x}.|Hi, I'm {x}."
        "|Hello, my name is {x}.|Hi, my name is {x}!|Hello! I am {x}.|People call me {x}.|The name is {x}."
        "|Hey, I am {x}.|Please call me {x}.|Remember that my name is {x}.|Actually, my name is {x}.",
        "Nice to meet you, {x}!",
        "What is my name?|What's my name?|Do you remember my name?|Who am I?|Tell me my name.|Do you know my name?"
        "|What am I called?|Can you tell me my name?|Can you remember my name?|My name?|And what is my name?"
        "|What was my name?|What was my name again?|Say my name.|Do you know who I am?|Do you still know my name?",
        "Your name is {x}.",
        "You have not told me your name yet.",
    ),
    "colour": (
        "My favourite colour is {x}.|My favorite color is {x}.|I like the colour {x} most.|The colour I love is {x}."
        "|I love the color {x}.|Remember that my favourite colour is {x}.",
        "I will remember that your favourite colour is {x}.",
        "What is my favourite colour?|What's my favorite color?|Which colour do I like most?|Which color do I love?"
        "|Do you remember my favourite colour?|Do you know my favorite color?|Tell me my favourite colour.",
        "Your favourite colour is {x}.",
        "You have not told me your favourite colour yet.",
    ),
    "city": (
        "I live in {x}.|My home is in {x}.|I come from {x}.|I am from {x}.|My city is {x}.|I'm from {x}."
        "|I live in {x} now.|Remember that I live in {x}.",
        "I will remember that you live in {x}.",
        "Where do I live?|Which city do I live in?|Do you remember where I live?|What is my city?|Where am I from?"
        "|In which city do I live?|Do you know where I live?|What city am I from?|Tell me where I live.",
        "You live in {x}.",
        "You have not told me where you live yet.",
    ),
    "food": (
        "My favourite food is {x}.|My favorite food is {x}.|I like to eat {x}.|I love eating {x}."
        "|Remember that my favourite food is {x}.",
        "I will remember that your favourite food is {x}.",
        "What is my favourite food?|What's my favorite food?|What do I like to eat?|Do you remember my favourite food?"
        "|Which food do I like?|Tell me my favourite food.",
        "Your favourite food is {x}.",
        "You have not told me your favourite food yet.",
    ),
    "number": (
        "My favourite number is {x}.|My favorite number is {x}.|My lucky number is {x}.|Remember the number {x}.",
        "I will remember that your number is {x}.",
        "What is my favourite number?|What's my favorite number?|What is my lucky number?|Do you remember my number?"
        "|Which number did I tell you?|What is my number?",
        "Your number is {x}.",
        "You have not told me a number yet.",
    ),
    "age": (
        "I am {x} years old.|I'm {x} years old.|My age is {x}.|I am {x} years old now.",
        "I will remember that you are {x} years old.",
        "How old am I?|What is my age?|Do you remember how old I am?|Do you know my age?|Tell me how old I am.",
        "You are {x} years old.",
        "You have not told me your age yet.",
    ),
    "pet": (
        "My {k} is called {x}.|My {k}'s name is {x}.|I have a {k} called {x}.|I have a {k} named {x}."
        "|The name of my {k} is {x}.|My {k} has the name {x}.",
        "I will remember that your {k} is called {x}.",
        "What is my {k} called?|What is my {k}'s name?|What is the name of my {k}?|Do you remember my {k}'s name?"
        "|What's my {k}'s name?|How is my {k} called?|What is my pet called?|What is my pet's name?"
        "|Do you know the name of my {k}?|Tell me the name of my {k}.",
        "Your {k} is called {x}.",
        "You have not told me about your pet yet.",
    ),
}
SUBJECTS = list(_SUBJECTS)
_BOTH = cells(
    "I am {x} and I live in {y}.|Hello, I'm {x} and I live in {y}.|My name is {x} and I live in {y}."
    "|I am {x} from {y}.|Hi, I'm {x} from {y}.|My name is {x} and I am from {y}.|I'm {x}, I live in {y}."
    "|Hi! My name is {x}. I live in {y}."
)
_SUMMARY = cells(
    "What do you know about me?|What have I told you?|Tell me what you know about me.|What do you remember about me?"
)


def _value(rng: random.Random, subject: str) -> str:
    if subject == "colour":
        return rng.choice(COLOUR_NAMES) if rng.random() < 0.7 else word(rng)
    if subject == "food":
        return rng.choice(FOODS) if rng.random() < 0.6 else word(rng)
    if subject in ("number", "age"):
        return str(rng.randint(1, 99))
    value = rng.choice(CITIES) if subject == "city" and rng.random() < 0.4 else name(rng)
    return value.lower() if rng.random() < 0.15 else value


def tell(rng: random.Random, memo: Memo, subject: str = "") -> Turn:
    """The user states a fact or two; `memo` takes them over when the turn is used (see `remember`)."""
    if not subject and rng.random() < 0.12:
        return _tell_two(rng)
    subject = subject or rng.choices(SUBJECTS, (6, 2, 2, 1, 1, 1, 2))[0]
    says, reply, *_ = _SUBJECTS[subject]
    value = _value(rng, subject)
    kind = rng.choice(PETS) if subject == "pet" else ""
    text = styled(rng, rng.choice(cells(says)).replace("{k}", kind)).replace("{x}", value)
    key = f"{subject}|{value.lower()}"
    return Turn("telling", key, text, _fill(reply, kind, value), told=((subject, kind, value),))


def _tell_two(rng: random.Random) -> Turn:
    """Name and city in one sentence."""
    name_, city = _value(rng, "name"), _value(rng, "city")
    text = styled(rng, rng.choice(_BOTH)).replace("{x}", name_).replace("{y}", city)
    reply = f"Nice to meet you, {name_}! I will remember that you live in {city}."
    key = f"name|{name_.lower()}\ncity|{city.lower()}"
    return Turn("telling", key, text, reply, told=(("name", "", name_), ("city", "", city)))


def remember(memo: Memo, turn: Turn) -> Turn:
    """Puts what a turn tells into the memo, and returns the turn."""
    memo.known.update({subject: (kind, value) for subject, kind, value in turn.told})
    return turn


def recall(rng: random.Random, memo: Memo, subject: str = "") -> Turn:
    """A question about the user; one for a given `subject` always has an answer in the memo."""
    missing_pet = not subject
    if not subject:
        told = rng.random() < 0.85 and memo.known
        subject = rng.choice(sorted(memo.known)) if told else rng.choice(SUBJECTS)
    _, _, asks, answer, missing = _SUBJECTS[subject]
    ask = rng.choice(cells(asks))
    if subject not in memo.known:
        text = styled(rng, ask.replace("{k}", rng.choice(PETS)))
        return Turn("recall", "", text, missing)
    kind, value = memo.known[subject]
    if subject == "pet" and missing_pet and rng.random() < 0.12:
        other = rng.choice([pet for pet in PETS if pet != kind])
        text = styled(rng, rng.choice([a for a in asks.split("|") if "{k}" in a]).replace("{k}", other))
        return Turn("recall", "", text, f"You have not told me about a {other} yet.")
    text = styled(rng, ask.replace("{k}", kind), shout=True)
    return Turn("recall", f"{subject}|{value.lower()}", text, _fill(answer, kind, value), f"{value}.")


def summary(rng: random.Random, memo: Memo) -> Turn:
    """Everything told so far, as a list in the fixed order of the subjects."""
    text = styled(rng, rng.choice(_SUMMARY), shout=True)
    if not memo.known:
        return Turn("recall", "", text, "You have not told me anything about you yet.")
    lines = ["- " + _fill(_SUBJECTS[s][3], *memo.known[s]) for s in SUBJECTS if s in memo.known]
    return Turn("recall", "", text, "This is what I know about you:\n\n" + "\n".join(lines))


def _fill(template: str, kind: str, value: str) -> str:
    return template.replace("{k}", kind).replace("{x}", value)
