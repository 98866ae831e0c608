"""What reaches the user's terminal, and in which form: text and notes.

What a model or a server says must not control a terminal: there, control characters are replaced.
"""

import sys

_CONTROL_PICTURES = 0x2400
_VISIBLE = {
    **{code: _CONTROL_PICTURES + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: _CONTROL_PICTURES + 0x21,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """`text` with a visible sign in place of each control character but tab and line break."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """`text` for a message: printable and without line breaks."""
    return printable(" ".join(text.split()))


def write(text: str) -> None:
    """Put text out at once; unchanged when it does not go to a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def clear_screen() -> None:
    """Begin at the top of an empty terminal; elsewhere, an empty line."""
    sys.stdout.write("\x1b[H\x1b[2J" if sys.stdout.isatty() else "\n")


def note(text: str) -> None:
    """Tell somebody who sits at a terminal; say nothing when nobody does."""
    if sys.stderr.isatty():
        print(f"[{one_line(text)}]", file=sys.stderr, flush=True)
