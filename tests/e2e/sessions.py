"""What tests of sessions do alike, with a real server and the demo chat model."""

from client.zmq_client import Client
from shared.config import PROJECT_ROOT
from tests.e2e.server import Server

CHAT = f"chat={PROJECT_ROOT / 'models' / 'demo-chat'}"


def start(database_url: str) -> Server:
    """A server that keeps sessions, once it is ready.

    With the slowest kernels: answers that tests look at meanwhile must not be over before.
    """
    env = {"TPSERVE_ISA": "scalar"}
    server = Server("--model", CHAT, "--database", database_url, env=env)
    server.wait_ready()
    return server


def greedy(client: Client) -> int:
    """A new session without randomness."""
    return client.sessions.create(temperature=0, max_tokens=60).session.id


def say(client: Client, session: int, text: str) -> list[int]:
    """The tokens of the answer."""
    return client.sessions.send(session, text).result().token_ids


def path(client: Client, session: int) -> list[str]:
    """The texts on the selected path."""
    return [message.content for message in client.sessions.get(session).messages]
