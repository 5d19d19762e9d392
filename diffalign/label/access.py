"""Who may talk to the app: this machine alone, or holders of the token; never a foreign web page in the browser."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

COOKIE = "diffalign_label"
LONGEST_BODY = 64 * 1024
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """What a request must show.

    Args:
        token: secret that every request must carry, in a cookie or as bearer; None for none, which only a server on
            the loopback address may have. Then the name the server is called by must be one of this machine, so that
            a web page whose name was made to point here gets nothing.
    """

    token: str | None = None

    def allows(self, request: Request) -> bool:
        """Whether a request may be answered."""
        if self.token is None:
            return is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or "")
        given = request.cookies.get(COOKIE) or request.headers.get("authorization", "").removeprefix("Bearer ")
        return self.matches(given)

    def matches(self, given: str) -> bool:
        """Compare with the token in constant time."""
        return self.token is not None and secrets.compare_digest(given.encode(), self.token.encode())


def guard(app: FastAPI, access: Access) -> None:
    """Let an application answer only what :class:`Access` allows, and say in every answer what browsers must refuse."""

    @app.middleware("http")
    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _refusal(request, access) or await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response


def _refusal(request: Request, access: Access) -> Response | None:
    if request.url.path == "/" and access.matches(request.query_params.get("token", "")):
        # The token moves from the address, which is seen and kept in histories, into a cookie that no script reads.
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(COOKIE, access.token or "", httponly=True, samesite="strict", max_age=30 * 24 * 3600)
        return response
    if not access.allows(request):
        return PlainTextResponse("open the address that `diffalign label serve` printed, with its token", 401)
    if request.method == "POST":
        # Browsers let any page send a form here, but ask first before they send JSON.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return PlainTextResponse("expected application/json", 415)
        if not request.headers.get("content-length", "").isdigit():
            return PlainTextResponse("expected a content length", 411)
        if int(request.headers["content-length"]) > LONGEST_BODY:
            return PlainTextResponse(f"a vote has at most {LONGEST_BODY} bytes", 413)
    return None
