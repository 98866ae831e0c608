"""The application: routes inside, and around them the layers that a request goes through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from client.zmq_client import AsyncClient
from gateway.access import HEALTH_PATHS, KeyGuard, OriginGuard
from gateway.context import Gateway
from gateway.embedding_routes import embedding_routes
from gateway.errors import MethodError, NoRouteError, error_response
from gateway.job_routes import job_routes
from gateway.keys import Keys
from gateway.logs import RequestLog
from gateway.metrics import Metrics
from gateway.openai_routes import openai_routes
from gateway.openapi import document
from gateway.operator_routes import VERSION, document_route, health_routes, model_routes
from gateway.session_routes import session_routes
from gateway.settings import HttpSettings
from gateway.token_routes import token_routes
from gateway.web_page import page_routes, read_page
from shared.errors import InvalidRequestError, TpserveError

CLIENT_CLOSED_REQUEST = 499
"""The status that logs have for a client that went before it was answered (nginx's)."""


def build_app(settings: HttpSettings, keys: Keys) -> ASGIApp:
    """Everything that answers HTTP requests."""
    gateway = Gateway(settings, AsyncClient(settings.server), Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.client.close()

    app = FastAPI(
        title="tpserve", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None
    )
    routers = (
        openai_routes(gateway),
        embedding_routes(gateway),
        token_routes(gateway),
        health_routes(gateway),
        model_routes(gateway),
        session_routes(gateway),
        job_routes(gateway),
    )
    for router in routers:
        app.include_router(router)
    described = [route for router in routers for route in router.routes]
    app.include_router(document_route(document(described, VERSION, has_keys=bool(keys))))
    page = read_page()
    app.include_router(page_routes(page))
    app.add_exception_handler(TpserveError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientDisconnect, _tell_nobody)
    app.add_exception_handler(Exception, _tell_bug)

    guarded: ASGIApp = KeyGuard(app, keys, open_paths={*HEALTH_PATHS, *page})
    if settings.cors_origin:
        # Outside the keys: a browser's first question comes without one.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=settings.cors_origin,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "X-Request-Id"),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    hosts = [*settings.allowed_host, settings.address.host]
    return RequestLog(OriginGuard(guarded, hosts, settings.cors_origin), gateway.metrics)


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, TpserveError)
    return error_response(error)


async def _tell_http(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return error_response(NoRouteError(f"there is no {method} {path}: see docs/http.md"))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another one")
        answer = error_response(MethodError(f"{path} does not take {method}, but {allowed}"))
        answer.headers.update(error.headers or {})
        return answer
    return error_response(InvalidRequestError(str(error.detail)))


async def _tell_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _tell_bug(_: Request, __: Exception) -> Response:
    """The log has the traceback; the client learns no more than that."""
    return error_response(TpserveError("the gateway has made a mistake: its log says more"))
