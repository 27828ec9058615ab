"""The lessons of the demo vision model: random dialogues about pictures to learn from, and held-out questions.

Every dialogue follows from its seed. Training pictures hold no shape that is held out; each exam picture holds one at
least, and the question is about it wherever the topic allows.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools import demo_topics
from tools import demo_vision_ask as ask
from tools.demo_facts import cells
from tools.demo_topics import Memo
from tools.demo_vision_ask import Turn
from tools.demo_vision_draw import Scene, scene

_TOPICS = {
    "naming": (ask.describe, 3.0),
    "colour": (ask.colour, 2.5),
    "shape": (ask.which, 2.5),
    "count": (ask.count, 3.0),
    "place": (ask.where, 2.5),
    "yes or no": (ask.yes_or_no, 2.5),
}
FOLLOW_UP, PICTURES, TALK = "follow-up", "several pictures", "no picture"
TOPIC_NAMES = [*_TOPICS, FOLLOW_UP, PICTURES, TALK]

NO_PICTURE = "I see no picture. Please give me one."
_UNKNOWN = "I do not know. I only know shapes, their colours, numbers and places."
_SMALL_TALK = [
    (cells("Hello!|Hi!|Hey!|Hello|Hi there|Good morning!|Good evening!"), "Hello! Ask me about a picture."),
    (cells("Thank you!|Thanks!|Thanks a lot!|Thank you very much.|Great, thanks!"), "You are welcome!"),
    (cells("Bye!|Goodbye!|See you!|Bye bye|Good night!"), "Goodbye!"),
    (cells("How are you?|How are you doing?|Are you well?"), "I am fine, thank you!"),
    (
        cells("Well done!|Good job!|Correct!|That is right.|You are great!|Nice!|Very good.|Perfect!"),
        "Thank you! I am glad to hear that.",
    ),
    (cells("That is wrong.|You are wrong.|Wrong!|No, that is not right."), "I am sorry. I am only a tiny model."),
    (
        cells("""
Who are you?|What are you?|What is your name?|What can you do?|What do you know?|Help!|Can you help me?
What can I ask?|What can I ask you?|How big are you?|Who made you?|How were you trained?
"""),
        "I am the demo of lite_llm for pictures, a tiny model. I know shapes, their colours, numbers and places.",
    ),
]
_SYSTEM = cells("""
You are a helpful assistant.|You answer questions about pictures.|You are a friendly assistant.
You are a vision model.|Answer the user's questions.
""")


@dataclass(frozen=True)
class Exchange:
    pictures: tuple[Scene, ...]  # that come with the question
    user: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    system: str | None
    exchanges: tuple[Exchange, ...]

    @property
    def scenes(self) -> list[Scene]:
        return [scene for exchange in self.exchanges for scene in exchange.pictures]


class _Writer:
    """Adds exchanges to a dialogue, and knows what has been shown and what "the picture" and "it" are."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.scenes: list[Scene] = []
        self.exchanges: list[Exchange] = []
        self._at = 0  # the picture that is spoken of
        self._last: Turn | None = None

    def show(self, held: bool, count: int) -> tuple[Scene, ...]:
        pictures = tuple(scene(self.rng, held, least=int(held)) for _ in range(count))
        self.scenes += pictures
        if pictures:
            self._at, self._last = len(self.scenes) - 1, None
        return pictures

    def follow_up(self) -> Turn | None:
        return ask.follow_up(self.rng, self.scenes[self._at], self._last) if self._last else None

    def about_picture(self, topic: str, named: bool) -> Turn:
        """A question about one picture, said to be the first, second ... if `named`."""
        draw = _TOPICS[topic][0]
        if not named:
            return draw(self.rng, self.scenes[self._at])
        self._at = self.rng.randrange(len(self.scenes))
        turn = draw(self.rng, self.scenes[self._at])
        return Turn(turn.topic, ask.in_picture(self.rng, turn.user, self._at), turn.answer, turn.about, turn.again)

    def say(self, turn: Turn, pictures: tuple[Scene, ...] = ()) -> None:
        user = ask.styled_question(self.rng, turn.user) if turn.topic != TALK else turn.user
        self.exchanges.append(Exchange(pictures, user.strip(), turn.answer))
        self._last = turn


def dialogue(seed: str) -> Dialogue:
    """A training dialogue of one to eight questions about up to two pictures."""
    rng = random.Random(seed)
    turns = rng.randint(1, 8)
    said = itertools.islice(exchanges(rng, rng.choices((0, 1, 2), (1, 8, 2))[0], min(turns - 1, 3)), turns)
    return Dialogue(system(rng), tuple(said))


def system(rng: random.Random) -> str | None:
    return rng.choice(_SYSTEM) if rng.random() < 0.05 else None


def exchanges(rng: random.Random, pictures: int, latest: int) -> Iterator[Exchange]:
    """Questions without an end about this many pictures, the last of which comes `latest` questions after the first."""
    writer = _Writer(rng)
    shown = _plan(rng, pictures, latest)
    for turn in itertools.count():
        fresh = writer.show(False, shown.count(turn))
        writer.say(_next(writer, len(fresh)), fresh)
        yield writer.exchanges[-1]


def _plan(rng: random.Random, pictures: int, latest: int) -> list[int]:
    """With which question each picture comes, usually the first one."""
    kind = rng.random()
    first = rng.randint(0, latest) if kind < 0.05 else 0
    if kind < 0.5:
        return [first] * pictures
    return [first, *(rng.randint(first, latest) for _ in range(pictures - 1))][:pictures]


def _next(writer: _Writer, fresh: int) -> Turn:
    rng, several = writer.rng, len(writer.scenes) > 1
    if not writer.scenes:
        return _blind(rng)
    if rng.random() < 0.05 and not fresh:
        return _small_talk(rng)
    if not fresh and rng.random() < 0.35:
        turn = writer.follow_up()
        if turn is not None:
            return turn
    if several and rng.random() < 0.25:
        return ask.about_all(rng, writer.scenes)
    topic = rng.choices(list(_TOPICS), [weight for _, weight in _TOPICS.values()])[0]
    return writer.about_picture(topic, several and rng.random() < (0.9 if fresh > 1 else 0.4))


def _blind(rng: random.Random) -> Turn:
    """What is said before there is a picture."""
    if rng.random() < 0.4:
        return _small_talk(rng)
    draw = rng.choice([draw for draw, _ in _TOPICS.values()])
    return Turn("", draw(rng, scene(rng)).user, NO_PICTURE)


def _small_talk(rng: random.Random) -> Turn:
    kind = rng.random()
    if kind < 0.7:
        says, answer = rng.choice(_SMALL_TALK)
        return Turn(TALK, rng.choice((str, str.lower))(rng.choice(says)), answer)
    other = rng.choice((demo_topics.capital, demo_topics.opposite, demo_topics.calendar, demo_topics.story))
    return Turn(TALK, other(rng, Memo()).user, _UNKNOWN)


def _finished(rng: random.Random, writer: _Writer) -> Dialogue:
    return Dialogue(system(rng), tuple(writer.exchanges))


def held_out(topic: str, count: int) -> list[Dialogue]:
    """`count` dialogues that end in a question of a topic; half of them begin with one to four others.

    Follow-ups have at least one before them. Before a question of "no picture" there is none, and nothing is held out.
    """
    return [_exam(random.Random(f"exam {topic} {i}"), topic) for i in range(count)]


def _exam(rng: random.Random, topic: str) -> Dialogue:
    while True:
        writer = _Writer(rng)
        if topic == TALK:
            writer.say(_blind(rng))
            return _finished(rng, writer)
        pictures = writer.show(True, 2 if topic == PICTURES else 1)
        fewest = 1 if topic == FOLLOW_UP else 0
        for _ in range(max(fewest, 0 if rng.random() < 0.5 else rng.randint(1, 4))):
            writer.say(_next(writer, len(pictures)), pictures)
            pictures = ()
        if topic == FOLLOW_UP:
            turn = writer.follow_up()
        elif topic == PICTURES:
            named = rng.random() < 0.6
            turn = writer.about_picture(rng.choice(list(_TOPICS)), True) if named else ask.about_all(rng, writer.scenes)
        else:
            turn = writer.about_picture(topic, False)
        if turn is not None:
            writer.say(turn, pictures)
            return _finished(rng, writer)
