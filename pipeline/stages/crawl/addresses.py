"""The policy of network addresses that a download may connect to.

Urls are not trusted, and a data job runs inside a private network. So only public unicast addresses are allowed: no
private, loopback, link-local, shared (RFC 6598), multicast, reserved or documentation ranges, no cloud metadata
services, and no IPv6 address that contains such an IPv4 address (mapped, 6to4, Teredo, NAT64). Addresses are checked,
not only names, and the decisive check is made when the socket is opened. So neither a redirect nor a changed DNS answer
bypasses it.
"""

import ipaddress
import socket
import weakref
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.errors import SettingError

Address = IPv4Address | IPv6Address

# What Python's own tables leave out, or left out in some versions: protocol assignments with Oracle's metadata service,
# the 6to4 relays, and the public-looking address on which Azure answers metadata requests.
_SPECIAL_V4 = tuple(IPv4Network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefused(OSError):
    """An address that the policy forbids; an OSError, as connectors expect from DNS look-ups and sockets."""


def is_public(address: Address) -> bool:
    """Whether ``address`` is public, so that an untrusted url may lead to it."""
    if isinstance(address, IPv4Address):
        unicast = address.is_global and not address.is_multicast and not address.is_reserved
        return unicast and not any(address in network for network in _SPECIAL_V4)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    # Mapped and compatible forms lie outside the global unicast range, so they fall with all that is special there.
    if address not in _GLOBAL_UNICAST_V6 or not address.is_global:
        return False
    inner = [address.sixtofour, *(address.teredo or ())]
    return all(is_public(part) for part in inner if part is not None)


def parse_address(text: str) -> Address | None:
    """The address in canonical spelling ``text``; None for names, and for spellings such as 127.1 or 017.0.0.1."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Rule:
    name: str
    network: IPv4Network | IPv6Network | None
    port: int | None


@dataclass(frozen=True)
class AddressPolicy:
    """Public addresses, and the additions of ``allow_hosts``.

    An entry is a name (``localhost``), an address (``127.0.0.1``, ``::1``) or a network (``10.0.0.0/8``); the first two
    may end in a port (``localhost:9000``, ``[::1]:80``). A name opens whatever it resolves to, for that name only.

    Raises:
        SettingError: an invalid entry.
    """

    allow_hosts: tuple[str, ...] = ()
    _rules: tuple[_Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rules", tuple(_parse_rule(entry) for entry in self.allow_hosts))

    def allows_name(self, host: str, port: int) -> bool:
        """Whether ``host`` may resolve to any address at all."""
        host = host.lower().rstrip(".")
        return any(rule.name == host and rule.port in (None, port) for rule in self._rules if rule.network is None)

    def allows_address(self, text: str, port: int) -> bool:
        """Whether a connection to the address ``text`` may be opened; False for a non-canonical address."""
        address = parse_address(text)
        if address is None:
            return False
        return is_public(address) or any(
            rule.network is not None and address in rule.network and rule.port in (None, port) for rule in self._rules
        )


def check_address(address: str, host: str, port: int, allow_hosts: tuple[str, ...]) -> None:
    """Raise :class:`AddressRefused` unless ``address``, to which ``host`` resolved, may be connected to."""
    policy = AddressPolicy(allow_hosts)
    if not policy.allows_name(host, port) and not policy.allows_address(address, port):
        raise AddressRefused("refused: not a public address")


class GuardedResolver(AbstractResolver):
    """Resolves names with ``inner`` and returns the addresses that the policy allows.

    Addresses that are allowed only by their name are recorded in ``opened``, for the check at the socket. ``sockets``
    are the sockets created and still alive.
    """

    def __init__(self, policy: AddressPolicy, inner: AbstractResolver) -> None:
        self._policy = policy
        self._inner = inner
        self.opened: set[tuple[str, int]] = set()
        self.sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of ``host``; raises :class:`AddressRefused` where none of them is allowed."""
        found = await self._inner.resolve(host, port, family)
        if self._policy.allows_name(host, port):
            self.opened.update((result["host"], result["port"]) for result in found)
            return found
        allowed = [result for result in found if self._policy.allows_address(result["host"], result["port"])]
        if found and not allowed:
            raise AddressRefused("refused: the name resolves to no public address")
        return allowed

    async def close(self) -> None:
        """Close the inner resolver."""
        await self._inner.close()

    def open_socket(
        self, target: tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
    ) -> socket.socket:
        """A socket for the very address about to be connected to (getaddrinfo's tuple), or :class:`AddressRefused`."""
        family, kind, protocol, _, address = target
        host, port = address[0], address[1]
        if not self._policy.allows_address(host, port) and (host, port) not in self.opened:
            raise AddressRefused("refused: not a public address")
        made = socket.socket(family, kind, protocol)
        self.sockets.add(made)
        return made


def _parse_rule(entry: str) -> _Rule:
    text, port = entry.strip().lower(), None
    try:
        return _Rule("", ipaddress.ip_network(text), None)
    except ValueError:
        pass
    host, colon, digits = text.rpartition(":")
    if colon and digits.isdigit() and int(digits) < 65536:
        text, port = host, int(digits)
    text = text.removeprefix("[").removesuffix("]").rstrip(".")
    address = parse_address(text)
    if address is not None:
        return _Rule("", ipaddress.ip_network(address), port)
    if not text or not all(character.isalnum() or character in "-._" for character in text):
        raise SettingError("allow_hosts", entry, "a name, an address or a network such as 10.0.0.0/8, maybe with :port")
    return _Rule(text, None, port)
