r"""Model output made safe for a terminal: control and bidi characters become visible backslash escapes.

A model can be talked into writing terminal commands (retitle, write the clipboard, fake links, hide or reorder
text). Every character that starts or carries such a command is shown as Python would write it in a string literal.
"""

import re

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f"  # C0 without \t and \n: BEL, CR, ESC (so every CSI and OSC), and DEL
    "\x80-\x9f"  # C1: the one-character forms of CSI, OSC, ...
    "\u2028\u2029"  # line and paragraph separator
    "\u202a-\u202e\u2066-\u2069"  # bidi embeddings, overrides, isolates
    "\ud800-\udfff"  # lone surrogates: printing one raises
    "]"
)


def visible(text: str) -> str:
    r"""`text` with control characters other than \n and \t, bidi controls and lone surrogates escaped.

    ESC becomes the four characters `\x1b`, U+202E the six `\u202e`. Character by character, so a stream may be
    escaped chunk by chunk. An escape that the model spelled out itself (`\x1b` in source code) stays as it is: the
    result is for eyes, not for decoding.
    """
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
