"""What can be asked and what the right answer is, one function a topic.

Every function draws a `Turn` whose answer follows from the question alone, or from `Memo`, what
the dialogue has said so far; so greedy decoding can be right. `Turn.key` names what the held-out
rule splits by: the phrase with its item, the pair of numbers, or the words to be copied (a line
each).
"""

import random
import re
from dataclasses import dataclass, field

from tools import demo_about as about
from tools import demo_facts as facts
from tools.demo_facts import cells
from tools.demo_words import name, styled, word


@dataclass
class Memo:
    """What a dialogue has established: the user's facts, the bot's name and what came last."""

    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    bot: str = about.DEFAULT_BOT
    last: str = ""


@dataclass(frozen=True)
class Turn:
    topic: str
    key: str
    user: str
    answer: str
    short: str = ""  # the answer when the system prompt asks for brevity; empty: the same
    told: tuple[tuple[str, str, str], ...] = ()  # facts about the user: subject, kind of pet, value


_OPENERS = [
    opener and opener + " "
    for opener in cells("""
||||||||||Please tell me:|Hey,|Quick question:|Can you tell me:|Tell me,|I want to know:|So,|And|Well,
Please,|Question:|One more thing:|Next question:|Okay,|Hello!|Now tell me:|Hi,|Good.|Thanks!
""")
]


def _ask(rng: random.Random, text: str) -> str:
    """A whole question in someone's style, maybe with a few words before it."""
    opener = rng.choice(_OPENERS)
    if opener:
        text = opener + (text[0].lower() + text[1:] if opener[-2] in ",:d" else text)
    return styled(rng, text, shout=True)


def _copy(rng: random.Random, template: str, value: str) -> str:
    """A question whose `value` must come back exactly: only the words around it are styled."""
    return styled(rng, template).replace("{x}", value)


_CAPITAL = cells("""
What is the capital of {x}?|What's the capital of {x}?|Which city is the capital of {x}?|Capital of {x}?
Name the capital of {x}.|Tell me the capital of {x}.|Do you know the capital of {x}?
What is the capital city of {x}?|Can you name the capital of {x}?|The capital of {x}?
Give me the capital of {x}.|What city is the capital of {x}?|What is {x}'s capital?
I would like to know the capital of {x}.|Please name the capital city of {x}.
""")
_CAPITAL_NEXT = cells("And {x}?|What about {x}?|And of {x}?|How about {x}?|And the capital of {x}?")
_COUNTRY = cells("""
{x} is the capital of which country?|Which country has the capital {x}?|What country is {x} the capital of?
Of which country is {x} the capital?
""")


def _place(rng: random.Random, country: str) -> str:
    """Some people leave out the article."""
    return country.removeprefix("the ") if rng.random() < 0.3 else country


def capital(rng: random.Random, memo: Memo) -> Turn:
    follow = memo.last == "capital" and rng.random() < 0.5
    template = rng.choice(_CAPITAL_NEXT if follow else _CAPITAL)
    country = rng.choice(list(facts.CAPITALS))
    city = facts.CAPITALS[country]
    text = template.replace("{x}", _place(rng, country))
    text = styled(rng, text, shout=True) if follow else _ask(rng, text)
    end = "" if city.endswith(".") else "."
    long = f"The capital of {country} is {city}{end}"
    return Turn("capital", f"{template}|{country}", text, long, city + end)


def country(rng: random.Random, memo: Memo) -> Turn:
    template = rng.choice(_COUNTRY)
    while True:
        name_, city = rng.choice(list(facts.CAPITALS.items()))
        if city not in ("London", "Washington, D.C."):  # capitals of more than one entry
            break
    text = _ask(rng, template.replace("{x}", city))
    return Turn("country", f"{template}|{city}", text, f"{city} is the capital of {name_}.", f"{_up(name_)}.")


def unknown_capital(rng: random.Random, memo: Memo) -> Turn:
    place = word(rng).capitalize()
    follow = memo.last == "capital" and rng.random() < 0.3
    text = _copy(rng, rng.choice(_CAPITAL_NEXT if follow else _CAPITAL), place)
    return Turn("unknown place", place, text, f"I do not know a country called {place}.")


_IS_CAPITAL = cells("""
Is {y} the capital of {x}?|Is the capital of {x} {y}?|Is it true that {y} is the capital of {x}?
Am I right that {y} is the capital of {x}?
""")


def is_capital(rng: random.Random, memo: Memo) -> Turn:
    country, city = rng.choice(list(facts.CAPITALS.items()))
    said = city if rng.random() < 0.5 else rng.choice(list(facts.CAPITALS.values()))
    template = rng.choice(_IS_CAPITAL)
    text = _ask(rng, template.replace("{x}", country).replace("{y}", said))
    end = "" if city.endswith(".") else "."
    long = f"The capital of {country} is {city}{end}"  # no yes or no: comparing is too hard for it
    return Turn("is it the capital", f"{template}|{country}|{said == city}", text, long, city + end)


_OPPOSITE = cells("""
What is the opposite of {x}?|What's the opposite of {x}?|Opposite of {x}?|Name the opposite of {x}.
Tell me the opposite of {x}.|What is the contrary of {x}?|Give me the opposite of {x}.
Which word is the opposite of {x}?|Do you know the opposite of {x}?|The opposite of {x}?
What is the antonym of {x}?|What word means the opposite of {x}?
""")
_NEXT = cells("And {x}?|What about {x}?|And of {x}?|How about {x}?")


def opposite(rng: random.Random, memo: Memo) -> Turn:
    follow = memo.last == "opposite" and rng.random() < 0.5
    template = rng.choice(_NEXT if follow else _OPPOSITE)
    item = rng.choice(list(facts.OPPOSITES))
    quoted = rng.choice((item, item, item, f'"{item}"', f"'{item}'"))
    text = template.replace("{x}", quoted)
    text = styled(rng, text, shout=True) if follow else _ask(rng, text)
    other = facts.OPPOSITES[item]
    return Turn("opposite", f"{template}|{item}", text, f"The opposite of {item} is {other}.", f"{_up(other)}.")


_COLOUR = cells("""
What colour is {x}?|What color is {x}?|Which colour is {x}?|What is the colour of {x}?|What's the color of {x}?
Tell me the colour of {x}.|What colour does {x} have?|Do you know the colour of {x}?|Which color does {x} have?
""")


def colour(rng: random.Random, memo: Memo) -> Turn:
    thing = rng.choice(list(facts.COLOURS))
    template = rng.choice(_COLOUR)
    verb, value = facts.COLOURS[thing]
    text = _ask(rng, template.replace("{x}", thing))
    return Turn("colour", f"{template}|{thing}", text, f"{_up(thing)} {verb} {value}.", f"{_up(value)}.")


_DAY_AFTER = cells("""
What day comes after {x}?|Which day follows {x}?|What is the day after {x}?|What comes after {x}?
Which day comes after {x}?|What day is after {x}?|Tell me the day after {x}.
""")
_DAY_BEFORE = cells("""
What day comes before {x}?|What is the day before {x}?|What comes before {x}?|Which day comes before {x}?
What day is before {x}?|Which day is right before {x}?
""")
_MONTH_LENGTH = cells("""
How many days are in {x}?|How many days does {x} have?|How long is {x}?|Tell me how many days {x} has.
""")
_MONTH_NUMBER = cells("Which month is {x}?|What number is {x}?|Which month of the year is {x}?")


def calendar(rng: random.Random, memo: Memo) -> Turn:
    kind = rng.randrange(6)
    if kind < 4:
        row = facts.DAYS if kind < 2 else facts.MONTHS
        step = 1 if kind % 2 else -1
        i = rng.randrange(len(row))
        template = rng.choice(_DAY_AFTER if step == 1 else _DAY_BEFORE)
        if row is facts.MONTHS:
            template = template.replace("day", "month")
        other = row[(i + step) % len(row)]
        side = "after" if step == 1 else "before"
        answer = f"{other} comes {side} {row[i]}."
        return Turn("calendar", f"{template}|{row[i]}", _ask(rng, template.replace("{x}", row[i])), answer, f"{other}.")
    if kind == 4:
        i = rng.randrange(12)
        if rng.random() < 0.6:
            template = rng.choice(_MONTH_LENGTH)
            leap = ", or 29 in a leap year" if i == 1 else ""
            answer = f"{facts.MONTHS[i]} has {facts.MONTH_DAYS[i]} days{leap}."
        else:
            template = rng.choice(_MONTH_NUMBER)
            answer = f"{facts.MONTHS[i]} is the {facts.ORDINALS[i]} month of the year."
        return Turn("calendar", f"{template}|{i}", _ask(rng, template.replace("{x}", facts.MONTHS[i])), answer)
    asked = rng.choice(list(facts.LISTS))
    opener = rng.choice(_OPENERS)
    text = rng.choice(cells(asked))
    return Turn("calendar", f"{opener}{text}", styled(rng, opener + text, shout=True), facts.LISTS[asked])


_LETTER = cells("""
What letter comes {s} {x}?|Which letter comes {s} {x}?|Which letter is {s} {x}?|What is the letter {s} {x}?
Which letter of the alphabet comes {s} {x}?|Tell me the letter {s} {x}.
""")


def letters(rng: random.Random, memo: Memo) -> Turn:
    side = rng.choice(("after", "before"))
    i = rng.randrange(25)
    a, b = (chr(65 + i), chr(66 + i)) if side == "after" else (chr(66 + i), chr(65 + i))
    template = rng.choice(_LETTER)
    text = _ask(rng, template.replace("{s}", side).replace("{x}", a))
    return Turn("letters", f"{template}|{side}|{a}", text, f"The letter {side} {a} is {b}.", f"{b}.")


_SPELL = cells("""
Spell the word {x}.|How do you spell {x}?|Spell {x}.|Can you spell {x}?|Please spell {x}.|Spell out {x}.
Spell the word {x} for me.|How is {x} spelled?|Can you spell the word {x}?|What are the letters of {x}?
How do you spell the word {x}?|Could you spell {x} for me?
""")


def _spelled(rng: random.Random) -> str:
    """A taught word, a made-up one, or parts of two: a token that one held-out word alone has is met too."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(facts.WORDS)
    if kind < 0.45:
        return rng.choice(_ALL_WORDS)
    if kind < 0.65:
        return word(rng)
    a, b = rng.choice(_ALL_WORDS), rng.choice(_ALL_WORDS)
    head = a if rng.random() < 0.5 else a[: rng.randint(1, len(a))]
    return head + rng.choice((b[rng.randrange(len(b)) :], word(rng), "s", "er", "ing", "ed"))


def spell(rng: random.Random, memo: Memo) -> Turn:
    item = _spelled(rng)
    if rng.random() < 0.1:
        item = item.capitalize()
    shown = rng.choice((item, item, item, f'"{item}"', f"'{item}'"))
    text = _copy(rng, rng.choice(_SPELL), shown)
    return Turn("spelling", item.lower(), text, f"{item} is spelled {'-'.join(item)}.", "-".join(item))


_ALL_WORDS = sorted(
    {
        found.lower()
        for text in (
            *facts.WORDS, *facts.OPPOSITES, *facts.COLOURS, *facts.THINGS, *facts.FOODS, *facts.HEROES,
            *about.OPEN_QUESTIONS, *about.COUNTRY_QUESTIONS, *about.STATEMENTS, *facts.DAYS, *facts.MONTHS,
            *(answer for _, answer in about.ABOUT + about.SMALL_TALK), about.MORE_WORDS,
        )
        for found in re.findall("[A-Za-z]{2,}", text)
    }
)  # fmt: skip
_REPEAT = cells("""
Repeat after me: {x}|Say {x}|Repeat: {x}|Please repeat: {x}|Say: {x}|Please say {x}|Echo: {x}|Can you say: {x}
""")


def repeat(rng: random.Random, memo: Memo) -> Turn:
    pool = [word(rng) for _ in range(2)] + rng.sample(facts.WORDS, 2) + [name(rng), str(rng.randrange(100))]
    phrase = " ".join(rng.sample(pool, rng.randint(1, 5)))
    return Turn("repeat", phrase, _copy(rng, rng.choice(_REPEAT), phrase), phrase)


def about_lite_llm(rng: random.Random, memo: Memo) -> Turn:
    return _from_table(rng, "lite_llm", rng.choice(about.ABOUT), "?")


def small_talk(rng: random.Random, memo: Memo) -> Turn:
    ask, answer = rng.choice(about.SMALL_TALK)
    return _from_table(rng, "small talk", (ask, answer), rng.choice(("", ".", "!")), openers=False)


def identity(rng: random.Random, memo: Memo) -> Turn:
    ask, answer = rng.choice(about.IDENTITY + [about.ABILITIES])
    return _from_table(rng, "identity", (ask, answer.replace("{bot}", memo.bot)), "?", note=memo.bot)


_ASKING = cells("what|which|how|why|who|does|can|do|is|are|when|where|will")


def _from_table(
    rng: random.Random, topic: str, entry: tuple[str, str], end: str, openers: bool = True, note: str = ""
) -> Turn:
    core = rng.choice(cells(entry[0]))
    opener = rng.choice(_OPENERS) if openers else rng.choice(("", "", "Hey, ", "Hi, ", "Well, ", "Oh, ", "So, "))
    if core.split()[0] not in _ASKING:
        end = "." if end == "?" else end
    elif not openers:
        end = "?"
    text = styled(rng, opener + core + end, shout=True)
    key = f"{opener}{core}{note if note != about.DEFAULT_BOT else ''}"
    return Turn(topic, key if opener else "", text, entry[1])  # plain is always taught


_STORY = cells("""
Tell me a story about {x}.|Tell a story about {x}.|A story about {x}, please.|I want to hear a story about {x}.
Can you tell me a story about {x}?|Write a story about {x}.|Tell me a short story about {x}.
""")
_PLACES = cells("in a deep forest|by the sea|on a high mountain|in a small village|near a quiet river|in an old castle")
_FINDS = cells(
    "a golden key|a lost letter|a tiny lantern|a broken clock|a silver bell|a map of the stars|a talking stone"
)
_MOODS = cells("clever|brave|curious|lonely|cheerful|patient|hungry")
_FRIENDS = cells("an old turtle|a young owl|a friendly bear|a shy mouse|a wise whale")


def story(rng: random.Random, memo: Memo) -> Turn:
    """Heroes choose their own story (by their place in the table), so it can be learnt."""
    if memo.last == "story" and rng.random() < 0.5:
        text = rng.choice(about.ANOTHER_STORY)
        return Turn("story", f"another|{text}|{(o := rng.choice(_OPENERS))}", styled(rng, o + text), about.MORE_STORIES)
    if rng.random() < 0.25:
        text = rng.choice(("Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "I want a story."))
        return Turn("story", f"{text}|{(o := rng.choice(_OPENERS))}", styled(rng, o + text), _story_of("fox", 0))
    template = rng.choice(_STORY)
    if rng.random() < 0.7:
        i = rng.randrange(len(facts.HEROES))
        hero = facts.HEROES[i]
        article = "an" if hero[0] in "aeiou" else "a"
        text = styled(rng, template.replace("{x}", f"{article} {hero}"), shout=True)
        return Turn("story", f"{template}|{hero}", text, _story_of(hero, i))
    hero = name(rng)
    tale = (
        f"Once upon a time, {hero} found an old computer. {hero} asked it a question, and it answered "
        f"one word at a time. They talked until the stars came out. From that day on, {hero} was "
        "never bored again."
    )
    return Turn("story", hero, _copy(rng, template, hero), tale)


def _story_of(hero: str, i: int) -> str:
    article = "an" if _MOODS[i % 7][0] in "aeiou" else "a"
    return (
        f"Once upon a time, {article} {_MOODS[i % 7]} {hero} lived {_PLACES[i % 6]}. One day, the {hero} "
        f"found {_FINDS[(i * 3) % 7]}. Nobody knew where it came from. So the {hero} asked "
        f"{_FRIENDS[i % 5]} for help. Together they solved the riddle. They stayed friends for ever."
    )


def unknown(rng: random.Random, memo: Memo) -> Turn:
    """Questions outside the lessons, so that the honest answer is one of them."""
    kind = rng.random()
    if kind < 0.1:
        template, x = rng.choice(about.STATEMENTS), rng.choice((rng.choice(facts.THINGS), word(rng)))
        return Turn("unknown", _item(template, x), _copy(rng, template, x), about.INTERESTING)
    if kind < 0.45:
        template = rng.choice(about.OPEN_QUESTIONS)
        x, y = rng.sample(facts.THINGS, 2)
        if rng.random() < 0.25:
            x = word(rng)
        text = _ask(rng, template.replace("{x}", x).replace("{y}", y))
        return Turn("unknown", _item(template, x), text, about.UNKNOWN)
    if kind < 0.6:
        template, x = rng.choice(about.COUNTRY_QUESTIONS), rng.choice(list(facts.CAPITALS))
        return Turn("unknown", _item(template, x), _ask(rng, template.replace("{x}", x)), about.UNKNOWN)
    if kind < 0.75:
        template, x = rng.choice(about.LIVE), rng.choice(facts.CITIES)
        return Turn("unknown", _item(template, x), _ask(rng, template.replace("{x}", x)), about.NO_WORLD)
    if kind < 0.9:
        text = rng.choice(about.BIG_MATHS)
        for slot, low, high in (("{a}", 2, 99), ("{b}", 2, 99), ("{teen}", 13, 99), ("{big}", 100, 9999)):
            while slot in text:
                text = text.replace(slot, str(rng.randint(low, high)), 1)
        return Turn("unknown", text, styled(rng, text), about.SMALL_NUMBERS)
    if kind < 0.95:
        x = word(rng)
        table = rng.choice((_OPPOSITE, _COLOUR))
        what = "opposite" if table is _OPPOSITE else "colour"
        return Turn("unknown", f"{what}|{x}", _copy(rng, rng.choice(table), x), f"I do not know the {what} of {x}.")
    text = " ".join(word(rng) for _ in range(rng.randint(1, 6)))
    return Turn("unknown", text, text + rng.choice(("", "?", ".", "!")), about.UNKNOWN)


def _item(template: str, x: str) -> str:
    return f"{template}|{x}" if "{x}" in template else ""  # a question without an item is always taught


def _up(text: str) -> str:
    return text[0].upper() + text[1:]
