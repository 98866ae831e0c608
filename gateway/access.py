"""Who may use the API: names that we are reached by, pages that may call us, keys.

ASGI layers around the application; each lets a request through or answers it itself.
"""

import ipaddress
from collections.abc import Sequence, Set
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import ForbiddenOriginError, InvalidKeyError, error_response
from gateway.keys import Keys
from shared.errors import TpserveError

HEALTH_PATHS = ("/health/live", "/health/ready")


class OriginGuard:
    """Refuses what a web page elsewhere sends: by a name that it points at us, or across origins."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in ("localhost", *hosts)}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except TpserveError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ForbiddenOriginError(
                f"the Host header is {host!r}, which is not a name of this server: start the "
                "gateway with --allowed-host NAME if it is"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin != f"http://{host}":
            raise ForbiddenOriginError(
                f"pages of {origin!r} may not use this server: start the gateway with "
                "--cors-origin ORIGIN to allow it"
            )

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            # Rebinding needs a name: who has a page come to a number has no page of that origin.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class KeyGuard:
    """Refuses requests without a key, but for paths that are open to all."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Set[str]) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and self._keys and scope["path"] not in self._open_paths:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
            if name is None:
                problem = "is wrong" if key else "is missing"
                error = InvalidKeyError(f"the API key {problem}: send Authorization: Bearer KEY")
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["user"] = scope["state"]["log_fields"]["key"] = name
        await self._app(scope, receive, send)
