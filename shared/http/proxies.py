"""Which client a request counts as, directly or behind proxies. Imports no torch."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PORT = re.compile(r"^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$")  # some proxies add the client's port


class Proxies:
    """The proxies of --trusted_proxies: what they say of where a request came from is believed.

    Each proxy adds the address that it was called from at the end of X-Forwarded-For. What stands before the
    last address that is not a trusted proxy's may be forged by the client.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def client(self, peer: str, forwarded: str) -> str:
        """The client's key. Of a global IPv6 address it is the /64, all of which one client may use.

        Args:
            peer: the address that the connection came from.
            forwarded: the header X-Forwarded-For, or nothing.
        """
        address = _address(peer)
        if address is None:
            return peer
        hops = forwarded.split(",") if forwarded else []
        while hops and self._trusts(address):
            before = _address(hops.pop().strip())
            if before is None:
                break
            address = before
        if address.version == 6 and address.is_global:
            return str(ipaddress.ip_network((int(address), 64), strict=False))
        return str(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def _address(text: str) -> Address | None:
    """An address, without a port; IPv4 in IPv6's notation is IPv4. None where it is none."""
    if port := _PORT.match(text):
        text = port[1] or port[2]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.version == 6 and address.ipv4_mapped) or address
