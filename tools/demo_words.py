"""Words that nobody taught the model: synthetic names and words, and the sloppy ways to type.

A model that has seen a hundred thousand made-up names cannot learn them by heart, so it has to
learn to copy; that is what makes it remember a name it never met.
"""

import random

from tools.demo_facts import NAMES, cells

_ONSETS = cells(
    "b|c|d|f|g|h|j|k|l|m|n|p|r|s|t|v|w|z|br|ch|cl|cr|dr|fl|fr|gl|gr|kl|kr|pl|pr|qu|sh|sl|sn|sp|st|str|sw|th|tr|tw|y"
)
_VOWELS = cells("a|e|i|o|u|a|e|i|o|a|e|ai|ea|ee|ia|ie|io|oa|oo|ou|ei|au|y")
_CODAS = cells("n|r|s|l|m|t|d|k|x|th|ck|nd|nt|rd|rn|sh|ss|st|ng|lt|mp|z|p|g|b")
_SCRIPTS = [
    "абвгдежзиклмнопрстуфхцчшыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "東京美咲健太郎花子山田愛翔陽大海星月雪春夏秋冬",
    "àáâäãåçèéêëíîïñóôöõøúûüýžšłćđ",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "가나다라마바사아자차카타파하민수지영현우",
]


def word(rng: random.Random) -> str:
    """A pronounceable lower-case word of one to four syllables."""
    out = ""
    for _ in range(rng.choices((1, 2, 3, 4), (3, 10, 5, 1))[0]):
        out += rng.choice(_ONSETS) if rng.random() < 0.85 else ""
        out += rng.choice(_VOWELS)
        out += rng.choice(_CODAS) if rng.random() < 0.4 else ""
    return out if len(out) > 1 else out + rng.choice(_CODAS)


def name(rng: random.Random) -> str:
    """A name: usually made up, sometimes real, of two words, or in another script."""
    kind = rng.random()
    if kind < 0.12:
        return rng.choice(NAMES)
    if kind < 0.16:
        letters = rng.choice(_SCRIPTS)
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 7))).capitalize()
    if kind < 0.19:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 8))).capitalize()
    if kind < 0.24:
        return f"{word(rng).capitalize()}{rng.choice(' -')}{word(rng).capitalize()}"
    return word(rng).capitalize()


def styled(rng: random.Random, text: str, shout: bool = False) -> str:
    """`text` as people type it: lower case, no full stop, a slip of the finger.

    Parts in braces are left alone, so a template can be styled before it is filled. With `shout`
    all capitals are possible too.
    """
    kind = rng.random()
    if kind < 0.25:
        text = _outside_braces(text, str.lower)
    elif kind < 0.27 and shout:
        text = text.upper()
    elif text[0].islower() and kind < 0.75:
        text = text[0].upper() + text[1:]
    if text[-1] in "?.!" and len(text) > 1 and rng.random() < 0.3:
        text = text[:-1]
    if rng.random() < 0.04:
        text = _slip(rng, text)
    return text


def _outside_braces(text: str, change) -> str:
    parts = text.replace("}", "{").split("{")  # odd parts were inside
    return "".join(f"{{{p}}}" if i % 2 else change(p) for i, p in enumerate(parts))


def _slip(rng: random.Random, text: str) -> str:
    """Drops, doubles or swaps one letter before the first brace."""
    head, brace, tail = text.partition("{")
    spots = [i for i in range(1, len(head) - 1) if head[i - 1 : i + 2].isalpha()]
    if len(spots) < 6:
        return text
    i = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        head = head[:i] + head[i + 1 :]
    elif kind == 1:
        head = head[:i] + head[i] + head[i:]
    else:
        head = head[: i - 1] + head[i] + head[i - 1] + head[i + 1 :]
    return head + brace + tail
