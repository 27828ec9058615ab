"""Questions about scenes, and the one right answer to each.

Where a scene holds shapes that are held out (see `demo_vision_draw`), as in the exam, questions are about those.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.demo_facts import cells
from tools.demo_vision_draw import COLOURS, MOST, PLACES, SHAPES, Scene, Shape
from tools.demo_words import styled

ORDINALS = ("first", "second", "third")
_NUMBERS = ("no", "one", "two", "three", "four")
_ANY = cells("shape|shape|object|thing")
_THINGS = cells("""
dog|cat|house|tree|car|man|woman|person|bird|boat|flower|cup|ball|moon|sun|hexagon|diamond|rectangle|oval|line|table
horse|fish|face|book|apple|hand|road|cloud|computer
""")


@dataclass(frozen=True)
class Turn:
    topic: str
    user: str
    answer: str
    about: Shape | None = None  # the one shape that "it" means from now on
    again: "Callable[[random.Random, Scene], Turn] | None" = None  # "And the square?"


Topic = Callable[[random.Random, Scene], Turn]


@dataclass(frozen=True)
class Noun:
    """Words for some of the shapes: "red star", "star", "red shape" or "shape"."""

    kind: str = ""
    colour: str = ""

    def of(self, scene: Scene) -> list[Shape]:
        return [s for s in scene.shapes if self.kind in ("", s.kind) and self.colour in ("", s.colour)]

    def words(self, rng: random.Random, count: int = 1) -> str:
        return f"{self.colour} {plural(self.kind or rng.choice(_ANY), count)}".strip()

    def __str__(self) -> str:
        return f"{self.colour} {self.kind or 'shape'}".strip()


def plural(word: str, count: int = 2) -> str:
    return word if count == 1 else word + ("es" if word.endswith("s") else "s")


def a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def listing(shapes: Sequence[Shape]) -> str:
    """ "a red circle and two blue stars", in the order of the first of each."""
    names = [shape.name for shape in shapes]
    counts = {name: names.count(name) for name in names}
    return joined([a(n) if c == 1 else f"{_NUMBERS[c]} {plural(n)}" for n, c in counts.items()]) if names else "nothing"


def seen(scene: Scene) -> str:
    return f"{listing(scene.shapes)} on {a(scene.background)} background"


def _up(text: str) -> str:
    return text[0].upper() + text[1:]


def _fill(rng: random.Random, templates: Sequence[str], **words: str) -> str:
    text = rng.choice(templates)
    for key, value in words.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _some(rng: random.Random, scene: Scene) -> Shape | None:
    """A shape of the scene, a held-out one if there are any."""
    shapes = [shape for shape in scene.shapes if shape.held] or scene.shapes
    return rng.choice(shapes) if shapes else None


def noun(rng: random.Random, scene: Scene, forms: str = "k c kc", there: float = 0.8) -> Noun:
    """Words of these forms (kind, colour, both) that fit a shape of the scene with probability `there`."""
    form, shape = rng.choice(forms.split()), _some(rng, scene)
    if shape is None or rng.random() > there:
        kind, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if shape is not None and rng.random() < 0.6:  # half of it is there: a colour and a kind that are not together
            kind, colour = rng.choice([(shape.kind, colour), (kind, shape.colour)])
    else:
        kind, colour = shape.kind, shape.colour
    return Noun(kind if "k" in form else "", colour if "c" in form else "")


def _one(shapes: Sequence[Shape]) -> Shape | None:
    return shapes[0] if len(shapes) == 1 else None


# ---- topics

_DESCRIBE = cells("""
What is in the picture?|What's in the picture?|What is in this picture?|What do you see?|What can you see?
Describe the picture.|Describe this picture.|What does the picture show?|What is shown in the picture?|What is this?
Tell me what you see.|What do you see in the picture?|Can you describe the picture?|Which shapes are in the picture?
What shapes are there?|What is on the picture?|Describe the image.|What is in the image?|What's in this image?
What is in this photo?|List the shapes.|What objects are in the picture?|What things do you see?|Name the shapes.
""")


def describe(rng: random.Random, scene: Scene) -> Turn:
    return Turn("naming", rng.choice(_DESCRIBE), f"I see {seen(scene)}.", _one(scene.shapes))


_BACKGROUND = cells("""
What colour is the background?|What is the background colour?|What's the colour of the background?
Which colour does the background have?|What is the colour of the background?|On what background?|And the background?
""")
_COLOUR = cells("""
What colour is the {x}?|What is the colour of the {x}?|Which colour does the {x} have?|Which colour is the {x}?
What's the colour of the {x}?|Tell me the colour of the {x}.|The colour of the {x}?|What colour does the {x} have?
""")
_COLOURS = cells("""
What colour are the {x}?|Which colours do the {x} have?|What are the colours of the {x}?|What colours are the {x}?
Tell me the colours of the {x}.
""")
_COLOUR_AT = cells("What colour is the {n} {p}?|Which colour is the {n} {p}?|What is the colour of the {n} {p}?")


def colour(rng: random.Random, scene: Scene) -> Turn:
    kind = rng.random()
    if kind < 0.15:
        return Turn("colour", rng.choice(_BACKGROUND), f"The background is {scene.background}.")
    if kind < 0.3:
        place = _place(rng, scene)
        found = _one([s for s in scene.shapes if s.place == place])
        text = _fill(rng, _COLOUR_AT, n=rng.choice(_ANY), p=PLACES[place])
        return Turn("colour", text, f"It is {found.colour}." if found else f"There is nothing {PLACES[place]}.", found)
    if kind < 0.33:
        thing = rng.choice(_THINGS)
        return Turn("colour", _fill(rng, _COLOUR, x=thing), f"There is no {thing}.")
    about = noun(rng, scene, "k", 0.9)
    found = about.of(scene)
    many = len(found) > 1 and rng.random() < 0.8
    text = _fill(rng, _COLOURS if many else _COLOUR, x=about.words(rng, 2 if many else 1))
    return Turn("colour", text, _colour_of(about, found), _one(found), _and_colour)


def _colour_of(about: Noun, found: Sequence[Shape]) -> str:
    if not found:
        return f"There is no {about}."
    colours = joined(list(dict.fromkeys(shape.colour for shape in found)))
    return f"The {about} is {colours}." if len(found) == 1 else f"The {plural(str(about))} are {colours}."


_AND = cells("And the {x}?|What about the {x}?|How about the {x}?|And what about the {x}?|The {x}?")


def _and_colour(rng: random.Random, scene: Scene) -> Turn:
    about = noun(rng, scene, "k", 0.9)
    found = about.of(scene)
    text = _fill(rng, _AND, x=about.words(rng, max(len(found), 1)))
    return Turn("colour", text, _colour_of(about, found), _one(found), _and_colour)


_WHICH = cells("""
What shape is {x}?|Which shape is {x}?|What is {x}?|What is the {x} {n}?|Which {n} is {x}?|Which {n}s are {x}?
What is {x} in the picture?|What {n}s are {x}?|What kind of shape is {x}?
""")
_AT = cells("""
What is {p}?|What do you see {p}?|What shape is {p}?|Which shape is {p}?|What's {p}?|Which {n} is {p}?
What is there {p}?|And what is {p}?|Is there something {p}?|What can you see {p}?
""")


def which(rng: random.Random, scene: Scene) -> Turn:
    if rng.random() < 0.5:
        place = _place(rng, scene)
        found, text = [s for s in scene.shapes if s.place == place], _fill(rng, _AT, p=PLACES[place])
    else:
        about = noun(rng, scene, "c", 0.9)
        found, text = about.of(scene), _fill(rng, _WHICH, x=about.colour)
    return Turn("shape", text.replace("{n}", rng.choice(_ANY)), f"{_up(listing(found))}.", _one(found))


def _place(rng: random.Random, scene: Scene) -> int:
    shape = _some(rng, scene)
    return rng.randrange(9) if shape is None or rng.random() < 0.2 else shape.place


_COUNT = cells("""
How many {x} are there?|How many {x} do you see?|How many {x} can you see?|Count the {x}.|How many {x}?
What is the number of {x}?|How many {x} are in the picture?|How many {x} does the picture show?|Can you count the {x}?
""")
_AND_COUNT = cells("And {x}?|And how many {x}?|What about {x}?|How many {x}?|How about {x}?")


def count(rng: random.Random, scene: Scene) -> Turn:
    return _count(rng, scene, _COUNT, "k k c kc all")


def _and_count(rng: random.Random, scene: Scene) -> Turn:
    return _count(rng, scene, _AND_COUNT, "k c kc")


def _count(rng: random.Random, scene: Scene, templates: Sequence[str], forms: str) -> Turn:
    about = noun(rng, scene, forms, 0.85)
    found = about.of(scene)
    text = _fill(rng, templates, x=about.words(rng, 2))
    return Turn("count", text, f"There {_are(about, len(found))}.", _one(found), _and_count)


def _are(about: Noun, number: int) -> str:
    return f"{'is' if number == 1 else 'are'} {_NUMBERS[number]} {plural(str(about), number)}"


_WHERE = cells("""
Where is the {x}?|Where do you see the {x}?|Where can I find the {x}?|In which place is the {x}?|Where's the {x}?
What is the position of the {x}?|Where in the picture is the {x}?|Find the {x}.
""")
_WHERE_MANY = cells("Where are the {x}?|Where do you see the {x}?|Where can I find the {x}?|Find the {x}.")


def where(rng: random.Random, scene: Scene) -> Turn:
    if rng.random() < 0.03:
        thing = rng.choice(_THINGS)
        return Turn("place", _fill(rng, _WHERE, x=thing), f"There is no {thing}.")
    about = noun(rng, scene, "k kc kc c", 0.9)
    many = len(about.of(scene)) > 1 and rng.random() < 0.8
    return _where(about, scene, _fill(rng, _WHERE_MANY if many else _WHERE, x=about.words(rng, 2 if many else 1)))


def _and_where(rng: random.Random, scene: Scene) -> Turn:
    about = noun(rng, scene, "k kc", 0.9)
    return _where(about, scene, _fill(rng, _AND, x=about.words(rng, max(len(about.of(scene)), 1))))


def _where(about: Noun, scene: Scene, text: str) -> Turn:
    found = about.of(scene)
    answer = f"{_up(joined([PLACES[s.place] for s in found]))}." if found else f"There is no {about}."
    return Turn("place", text, answer, _one(found), _and_where)


_IS_THERE = cells("""
Is there {x}?|Do you see {x}?|Is there {x} in the picture?|Can you see {x}?|Does the picture show {x}?
Is {x} in the picture?|Do you see {x} in the picture?
""")
_AND_A = cells("And {x}?|What about {x}?|Or {x}?|How about {x}?|And is there {x}?")
_IS_COLOUR = cells("Is the {x} {c}?|Does the {x} look {c}?|The {x} is {c}, right?|Is it true that the {x} is {c}?")
_ARE_THERE = cells(
    "Are there {n} {x}?|Do you see {n} {x}?|Are there exactly {n} {x}?|Are there {n} {x} in the picture?"
)


def yes_or_no(rng: random.Random, scene: Scene) -> Turn:
    kind = rng.random()
    if kind < 0.55:
        return _is_there(rng, scene, _IS_THERE)
    about = noun(rng, scene, "k" if kind < 0.8 else "k k c kc", 1.0)
    found = about.of(scene)
    if kind < 0.8 and len(found) == 1:
        said = found[0].colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
        right = said == found[0].colour
        text = _fill(rng, _IS_COLOUR, x=about.words(rng), c=said)
        return Turn("yes or no", text, "Yes." if right else f"No, it is {found[0].colour}.", found[0])
    said = len(found) if rng.random() < 0.5 and len(found) > 1 else rng.randint(2, MOST)
    text = _fill(rng, _ARE_THERE, n=_NUMBERS[said], x=about.words(rng, 2))
    return Turn("yes or no", text, "Yes." if said == len(found) else f"No, there {_are(about, len(found))}.")


def _and_is_there(rng: random.Random, scene: Scene) -> Turn:
    return _is_there(rng, scene, _AND_A)


def _is_there(rng: random.Random, scene: Scene, templates: Sequence[str]) -> Turn:
    if rng.random() < 0.04:
        return Turn("yes or no", _fill(rng, templates, x=a(rng.choice(_THINGS))), "No.", None, _and_is_there)
    about = noun(rng, scene, "k c kc kc", 0.5)
    found, words = about.of(scene), a(about.words(rng))
    if found and rng.random() < 0.15:
        place = found[0].place if rng.random() < 0.5 else rng.randrange(9)
        found, words = [s for s in found if s.place == place], f"{words} {PLACES[place]}"
    elif not about.kind and rng.random() < 0.5:
        words = f"anything {about.colour}"
    return Turn("yes or no", _fill(rng, templates, x=words), "Yes." if found else "No.", _one(found), _and_is_there)


# ---- what came before

_IT = {
    "colour": cells("What colour is it?|And its colour?|Which colour is it?|What is its colour?"),
    "place": cells("Where is it?|And where is it?|Where exactly?|Where?|In which place is it?"),
    "shape": cells("What is it?|What shape is it?|Which shape is it?|And what is it?"),
}


def follow_up(rng: random.Random, scene: Scene, last: Turn) -> Turn | None:
    """A question that only its forerunner explains; None if there is none."""
    if last.again is not None and (last.about is None or rng.random() < 0.6):
        return last.again(rng, scene)
    if last.about is None:
        return None
    it, topic = last.about, rng.choice([topic for topic in _IT if topic != last.topic])
    answer = {"colour": f"It is {it.colour}.", "place": f"{_up(PLACES[it.place])}.", "shape": f"{_up(a(it.name))}."}
    return Turn(topic, rng.choice(_IT[topic]), answer[topic], it)


# ---- several pictures

_HOW_MANY = cells("How many pictures are there?|How many pictures do you see?|How many images did I send?")
_WHICH_HAS = cells("""
Which picture has {x}?|Which picture shows {x}?|In which picture is {x}?|In which picture do you see {x}?
Which of the pictures has {x}?
""")
_ALL = cells(
    "What is in the pictures?|Describe the pictures.|What do you see in the pictures?|What do the pictures show?"
)


def in_picture(rng: random.Random, text: str, index: int) -> str:
    """A question that says which of several pictures it means."""
    name = rng.choice(("picture", "picture", "image"))
    for known in ("the picture", "this picture", "the image", "this image", "this photo"):
        if known in text:
            return text.replace(known, f"the {ORDINALS[index]} {name}")
    if rng.random() < 0.3:
        return f"In the {ORDINALS[index]} {name}, {text[0].lower()}{text[1:]}"
    return f"{text[:-1]} in the {ORDINALS[index]} {name}{text[-1]}"


def about_all(rng: random.Random, scenes: Sequence[Scene]) -> Turn:
    """A question about two or more pictures together."""
    kind = rng.random()
    if kind < 0.15:
        return Turn("pictures", rng.choice(_HOW_MANY), f"There are {_NUMBERS[len(scenes)]} pictures.")
    if kind < 0.45:
        said = [f"In the {ORDINALS[i]} picture I see {seen(scene)}." for i, scene in enumerate(scenes)]
        return Turn("pictures", rng.choice(_ALL), " ".join(said))
    about = noun(rng, rng.choice(scenes), "k c kc", 0.9)
    having = [f"the {ORDINALS[i]}" for i, scene in enumerate(scenes) if about.of(scene)]
    text = _fill(rng, _WHICH_HAS, x=a(about.words(rng)))
    return Turn("pictures", text, f"{_up(joined(having))}." if having else "None of them.")


_OPENERS = [
    opener and opener + " "
    for opener in cells(
        "|||||||||||||Please tell me:|Hey,|Tell me,|So,|And|Well,|Now,|Okay,|Can you tell me:|Question:"
    )
]


def styled_question(rng: random.Random, text: str) -> str:
    """As people type it; some of them write American."""
    opener = rng.choice(_OPENERS)
    text = styled(rng, opener + (text[0].lower() + text[1:] if opener else text), shout=True)
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    return text
