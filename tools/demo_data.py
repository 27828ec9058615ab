"""The lessons of the demo chat model: random dialogues to learn from and held-out questions.

Every dialogue follows from its seed. A question whose key the hash rule `is_held` picks (about one
in twelve) never enters a training dialogue, whatever its style; the exam asks only such questions.
"""

import hashlib
import random
from collections.abc import Callable

from tools import demo_about as about
from tools import demo_memory as memory
from tools import demo_numbers as numbers
from tools import demo_topics as topics
from tools.demo_topics import Memo, Turn
from tools.demo_words import name

Message = dict[str, str]  # {"role": ..., "content": ...}
Topic = Callable[[random.Random, Memo], Turn]

_TOPICS: list[tuple[Topic, float]] = [
    (topics.capital, 9),
    (topics.country, 2),
    (topics.unknown_capital, 1.5),
    (topics.is_capital, 5),
    (topics.opposite, 6),
    (topics.colour, 3),
    (topics.calendar, 4),
    (topics.letters, 2),
    (topics.spell, 10),
    (topics.repeat, 3),
    (topics.about_lite_llm, 7),
    (topics.small_talk, 7),
    (topics.identity, 3),
    (topics.story, 2.5),
    (topics.unknown, 10),
    (numbers.add, 10),
    (numbers.subtract, 12),
    (numbers.multiply, 6),
    (numbers.word_problem, 3),
    (numbers.count, 4),
    (numbers.compare, 3),
]
_FACTUAL = [topics.capital, topics.opposite, topics.colour, topics.letters, topics.about_lite_llm, topics.story]
_HELD_ONE_IN = 12
MEMORY = "memory"
TOPIC_NAMES = [
    "capital", "country", "unknown place", "is it the capital", "opposite", "colour", "calendar", "letters", "spelling",
    "repeat", "lite_llm", "small talk", "identity", "story", "unknown", "sum", "difference", "product", "word problem",
    "counting", "comparing", MEMORY,
]  # fmt: skip


def is_held(key: str) -> bool:
    """Whether a question is kept for the exam. A key of two lines is if either is, an empty one never."""
    if not key:
        return False
    digests = (hashlib.blake2b(line.encode(), digest_size=4).digest() for line in key.split("\n"))
    return any(int.from_bytes(digest, "big") % _HELD_ONE_IN == 0 for digest in digests)


def dialogue(seed: str, longest: int = 60) -> list[Message]:
    """A training dialogue: 1 to 8 turns, rarely up to `longest`; sometimes a system prompt."""
    rng = random.Random(seed)
    memo, brief, messages = _opening(rng)
    kind = rng.random()
    turns = 1 if kind < 0.2 else rng.randint(2, 8) if kind < 0.985 else rng.randint(9, longest)
    talks = rng.random() < 0.6  # about the user, between the questions
    for _ in range(turns):
        _say(messages, _next(rng, memo, talks), memo, brief)
    return messages


def plain_text(seed: str) -> str:
    """Sentences outside any dialogue, for prompts that use no chat template."""
    rng = random.Random(seed)
    count = rng.choice((1, 1, 2, 3, 5))
    fact = rng.choice(_FACTUAL)
    return " ".join(_draw(rng, fact, Memo(), held=False).answer for _ in range(count))


def held_out(topic: str, count: int) -> list[tuple[list[Message], str]]:
    """`count` held-out questions of a topic: the dialogue up to the question, and the answer.

    Half of them stand alone, half follow one to five other turns. For "memory" the fact is told
    first, then come two to six turns about other things, then the question.
    """
    ask = _memory_exam if topic == MEMORY else _topic_exam
    return [ask(random.Random(f"exam {topic} {i}"), topic) for i in range(count)]


def _topic_exam(rng: random.Random, topic: str) -> tuple[list[Message], str]:
    memo, brief, messages = _opening(rng)
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 5)):
            _say(messages, _next(rng, memo, talks=True), memo, brief)
    turn = _draw(rng, _TOPIC_OF[topic], memo, held=True)
    _say(messages, turn, memo, brief)
    return messages[:-1], messages[-1]["content"]


def _memory_exam(rng: random.Random, topic: str) -> tuple[list[Message], str]:
    memo, brief, messages = _opening(rng)
    subject = rng.choice(("name", "name", "name", "city", "food", "colour", "pet"))
    tell = _draw(rng, lambda r, m: memory.tell(r, m, subject), memo, held=True)
    _say(messages, memory.remember(memo, tell), memo, brief)
    for _ in range(rng.randint(2, 6)):
        _say(messages, _next(rng, memo, talks=False), memo, brief)
    _say(messages, memory.recall(rng, memo, subject), memo, brief)
    return messages[:-1], messages[-1]["content"]


def _opening(rng: random.Random) -> tuple[Memo, bool, list[Message]]:
    """The memo, whether answers are brief, and the system message if there is one."""
    memo = Memo()
    kind = rng.random()
    if kind < 0.7:
        return memo, False, []
    if kind < 0.82:
        text = rng.choice(about.SYSTEM_PLAIN)
    elif kind < 0.92:
        text = rng.choice(about.SYSTEM_BRIEF)
    else:
        memo.bot = _unheld_name(rng)
        text = rng.choice(about.SYSTEM_NAMED).replace("{bot}", memo.bot)
    return memo, 0.82 <= kind < 0.92, [{"role": "system", "content": text}]


def _unheld_name(rng: random.Random) -> str:
    while is_held(f"name|{(found := name(rng)).lower()}"):
        pass
    return found


def _next(rng: random.Random, memo: Memo, talks: bool) -> Turn:
    if talks and rng.random() < 0.4:
        kind = rng.random()
        if kind < 0.45 or (not memo.known and kind < 0.9):
            return memory.remember(memo, _draw(rng, memory.tell, memo, held=False))
        return memory.summary(rng, memo) if kind > 0.95 else memory.recall(rng, memo)
    if not talks and rng.random() < 0.02:
        return memory.recall(rng, Memo(known=dict(memo.known)))
    return _draw(rng, rng.choices(_ASK, _WEIGHTS)[0], memo, held=False)


def _draw(rng: random.Random, topic: Topic, memo: Memo, held: bool) -> Turn:
    """Draws until the held-out rule says `held`; leaves the memo alone."""
    while True:
        turn = topic(rng, memo)
        if is_held(turn.key) == held:
            return turn


def _say(messages: list[Message], turn: Turn, memo: Memo, brief: bool) -> None:
    """Appends question and answer, and notes the topic for questions like "And Spain?"."""
    memo.last = turn.topic
    answer = turn.short if brief and turn.short else turn.answer
    messages += [{"role": "user", "content": turn.user.strip()}, {"role": "assistant", "content": answer}]


_ASK = [topic for topic, _ in _TOPICS]
_WEIGHTS = [weight for _, weight in _TOPICS]
_TOPIC_OF = dict(zip(TOPIC_NAMES[:-1], _ASK, strict=True))
