"""Where clients look for a server and how long they wait, unless told otherwise."""

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
DEFAULT_TIMEOUT_S = 5.0
"""For the first answer on a new connection."""
DEFAULT_SILENCE_S = 30.0
"""For a sign of life after that, health questions included."""
