"""Which pages may call a host, and under which names it may be found.

A page that a user visits can send requests to a host on the user's machine or network. Browsers name the page
(Origin) and the name under which they found the host (Host); neither can be forged by the page.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from urllib.parse import urlsplit

from flask import Request, Response

from shared.launch.flags import HostConfig
from shared.launch.parser import API_KEY_VARIABLE
from shared.launch.wording import shown

_EXPOSED = (
    "X-Seed, X-Steps, X-Size, X-Request-Id, X-Warnings, X-Should-Retry, Server-Timing, Retry-After, "
    "Location, Preference-Applied, Content-Disposition"
)
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    # The star stands for all but the first; the openai SDK sends a dozen of its own.
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Accept, Prefer, X-Request-Id, *",
    "Access-Control-Max-Age": "600",
}


class AccessRules:
    """The checks of one launch."""

    def __init__(self, config: HostConfig) -> None:
        self._hosts = {name.lower() for name in (*(config.trusted_hosts or ()), config.host)}
        self._origins = {origin.lower().rstrip("/") for origin in config.allow_origin or ()}

    def refusal(self, host: str, origin: str | None) -> str:
        """Why a request with these headers is answered 403; nothing where it is not."""
        if host and not self._trusts(host):
            return f"the Host {shown(host)} is not trusted; --trusted_hosts can add it"
        if origin is not None and not (_same(origin, host) or self._allows(origin)):
            return f"pages of the Origin {shown(origin)} may not call this host; --allow_origin can allow it"
        return ""

    def cors(self, http: Request, response: Response) -> None:
        """Let the pages of --allow_origin read the answer."""
        origin = http.headers.get("Origin")
        if not self._origins:
            return
        response.vary.add("Origin")
        if origin is not None and self._allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
            if is_preflight(http):
                response.headers.update(_PREFLIGHT)
                if http.headers.get("Access-Control-Request-Private-Network") == "true":
                    response.headers["Access-Control-Allow-Private-Network"] = "true"

    def _trusts(self, host: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        trusted = {"*", name, host.lower()} & self._hosts or name == "localhost" or _is_address(name)
        return bool(trusted) or name in own_names()

    def _allows(self, origin: str) -> bool:
        return bool({"*", origin.lower()} & self._origins)


def is_preflight(http: Request) -> bool:
    """Whether a browser asks if a page may send a request; such a question carries no token."""
    return http.method == "OPTIONS" and "Access-Control-Request-Method" in http.headers


def _name(host: str) -> str | None:
    """The Host header without its port, in lower case; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises where it is no number
        sound = parts.netloc == host and "@" not in host
    except ValueError:
        return None
    return parts.hostname.removesuffix(".") if sound and parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(origin: str, host: str) -> bool:
    """Whether the page came from this host; browsers leave the scheme's own port out of both."""
    scheme, _, rest = origin.lower().partition("://")
    return scheme in ("http", "https") and bool(rest) and rest == host.lower()


@functools.cache
def own_names() -> frozenset[str]:
    """This machine's names, with and without its domain."""
    name = socket.gethostname().lower()
    names = {name, name.split(".")[0], socket.getfqdn().lower(), f"{name.split('.')[0]}.local"}
    return frozenset(names - {""})


def exposure_warnings(config: HostConfig) -> list[str]:
    """What the operator should know of who can reach this launch."""
    if config.api_key is not None or _is_loopback(config.host):
        return []
    return [
        f"--host={config.host} without --api_key: anyone who reaches port {config.port} can use this host; "
        f"give a key (--api_key_file, or the variable {API_KEY_VARIABLE})"
    ]


def _is_loopback(host: str) -> bool:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        return all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses)
    except (OSError, UnicodeError, ValueError):
        return False
