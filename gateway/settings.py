"""Settings of the gateway: flags, environment variables, defaults, and the checks of them."""

import argparse
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from client.defaults import DEFAULT_ADDRESS
from gateway.keys import Keys, read_keys
from shared.config import parse_bytes
from shared.errors import ConfigError
from shared.http_address import DEFAULT_HTTP, HttpAddress, is_loopback, parse_http_address

_VARIABLES = {"http": "TPSERVE_HTTP", "server": "TPSERVE_SERVER", "api_key": "TPSERVE_API_KEYS"}
"""Those that are not called TPSERVE_HTTP_ and the setting's name."""
_Seconds = Meta(gt=0, le=86400)


class HttpSettings(Struct, frozen=True, kw_only=True):
    """Every option of `python -m gateway`. Lists: repeat the flag, or commas in the environment."""

    http: Annotated[str, Meta(description="HOST:PORT to listen at; port 0: any free one")] = (
        DEFAULT_HTTP
    )
    server: Annotated[str, Meta(description="ZeroMQ address of the coordinator")] = DEFAULT_ADDRESS
    api_key: Annotated[list[str], Meta(description="key that clients must send; repeatable")] = []
    api_key_file: Annotated[
        str, Meta(description="file with a line name:KEY or name:SHA256 for each key")
    ] = ""
    allowed_host: Annotated[
        list[str], Meta(description="name that clients may reach this server by; repeatable")
    ] = []
    cors_origin: Annotated[
        list[str], Meta(description="web page's origin that may use the API; repeatable")
    ] = []
    max_body: Annotated[str, Meta(description="longest request body, such as 1M")] = "1M"
    max_connections: Annotated[int, Meta(ge=1, le=65536, description="open at once")] = 1024
    header_timeout: Annotated[
        float, _Seconds, Meta(description="seconds for a request's headers")
    ] = 10.0
    body_timeout: Annotated[float, _Seconds, Meta(description="seconds for a body")] = 30.0
    keep_alive: Annotated[
        int, _Seconds, Meta(description="seconds that an idle connection stays open")
    ] = 30
    slow_reader: Annotated[
        float, _Seconds, Meta(description="seconds after which a client that reads nothing is cut")
    ] = 10.0
    ping: Annotated[
        float, _Seconds, Meta(description="seconds without an event after which a ping is sent")
    ] = 10.0
    grace: Annotated[
        int, _Seconds, Meta(description="seconds for requests to finish at the end")
    ] = 30
    log_format: Annotated[Literal["console", "json"], Meta(description="of log lines")] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="how much to log")
    ] = "info"

    @property
    def max_body_bytes(self) -> int:
        """`max_body` in bytes."""
        return parse_bytes(self.max_body)

    @property
    def address(self) -> HttpAddress:
        """`http`, parsed."""
        return parse_http_address(self.http)


def argument_parser() -> argparse.ArgumentParser:
    """The flags; one that is not given stays absent."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="An OpenAI-compatible HTTP API in front of a tpserve server.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = HttpSettings()
    for name, hint in _field_types().items():
        kind = hint.__origin__
        description = next(m.description for m in hint.__metadata__ if m.description)
        default = getattr(defaults, name)
        shown = "none" if default in ("", []) else default
        choices = kind.__args__ if getattr(kind, "__origin__", None) is Literal else ()
        is_list = getattr(kind, "__origin__", None) is list
        parser.add_argument(
            "--" + name.replace("_", "-"),
            action="append" if is_list else "store",
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{description} (environment: {_variable(name)}; default: {shown})",
        )
    parser.add_argument("--fd", type=int, help="inherited socket that listens already")
    parser.add_argument("--parent", type=int, help="process to end with")
    return parser


def load_settings(flags: argparse.Namespace, environ: Mapping[str, str]) -> HttpSettings:
    """Flags over environment over defaults. Raises ConfigError naming what is wrong."""
    values: dict[str, Any] = {}
    for name, hint in _field_types().items():
        raw: Any
        if name in flags:
            raw, source = getattr(flags, name), "flag --" + name.replace("_", "-")
        elif environ.get(_variable(name)):
            raw, source = environ[_variable(name)], f"environment {_variable(name)}"
            if getattr(hint.__origin__, "__origin__", None) is list:
                raw = [item.strip() for item in raw.split(",") if item.strip()]
        else:
            continue
        try:
            values[name] = msgspec.convert(raw, hint, strict=False)
        except msgspec.ValidationError as error:
            seen = "" if name == "api_key" else f" is {raw!r}"
            raise ConfigError(f"{name} ({source}){seen}: {error}") from None
    settings = HttpSettings(**values)
    if settings.max_body_bytes < 1:
        raise ConfigError(f"max_body is {settings.max_body!r}: a request needs room, such as 1M")
    for origin in settings.cors_origin:
        if "://" not in origin or origin.endswith("/"):
            raise ConfigError(
                f"cors_origin is {origin!r}: write scheme and host, such as https://example.org"
            )
    return settings


def checked_keys(settings: HttpSettings) -> Keys:
    """The keys. Raises ConfigError when there are none but strangers can reach the address."""
    keys = read_keys(settings.api_key, settings.api_key_file)
    host = settings.address.host
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"http is {settings.http!r}: whoever can reach {host} could use this server; give "
            "--api-key or --api-key-file (TPSERVE_API_KEYS, TPSERVE_HTTP_API_KEY_FILE), or "
            "listen at 127.0.0.1"
        )
    return keys


def _variable(name: str) -> str:
    return _VARIABLES.get(name, "TPSERVE_HTTP_" + name.upper())


def _field_types() -> dict[str, Any]:
    return get_type_hints(HttpSettings, include_extras=True)
