"""Serve a session until it is interrupted."""

from __future__ import annotations

import secrets
import socket
import sys

import uvicorn

from diffalign.errors import UserError
from diffalign.label.access import Access, is_loopback
from diffalign.label.app import create_app
from diffalign.label.session import LabelSession


def serve(session: LabelSession, host: str, port: int, token: str | None) -> None:
    """Answer requests until Ctrl-C.

    Args:
        session: what is asked.
        host: address to listen on; anything but the loopback address asks for a token.
        port: its port; 0 for a free one.
        token: asked of every request; made up where one is needed and none is given.

    Raises:
        UserError: if the address cannot be had.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    elif token is not None and len(token) < 8:
        raise UserError("the token has fewer than 8 characters: give a longer one, or none to have one made")
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    asked = "compare images" if session.settings.mode == "compare" else "tag images"
    sys.stdout.write(f"{len(session.tasks)} tasks ({asked}): {address}\n")
    sys.stdout.write(f"votes go to {session.store.path}; Ctrl-C ends\n")
    sys.stdout.flush()
    config = uvicorn.Config(create_app(session, Access(token)), log_level="warning", access_log=False)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
        session.store.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}") from None
