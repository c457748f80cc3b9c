"""The address policy, checked with the ranges of RFC 6890 and of cloud providers."""

import asyncio
import ipaddress
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.errors import SettingError
from pipeline.stages.crawl.addresses import (
    AddressPolicy,
    AddressRefused,
    GuardedResolver,
    check_address,
    is_public,
    parse_address,
)

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "192.167.255.255", "223.255.255.254"]
PUBLIC_V6 = ["2606:4700::1111", "2a00:1450:4001:81b::200e", "64:ff9b::808:808", "2002:808:808::1"]
REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",  # metadata, Alibaba
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",  # metadata, Azure
    "169.254.169.254",  # metadata, most
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",  # metadata, Oracle
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
REFUSED_V6 = [
    "::",
    "::1",
    "::7f00:1",  # IPv4-compatible
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "fc00::1",
    "fd00:ec2::254",  # metadata, Amazon
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("text", PUBLIC + PUBLIC_V6)
def test_public_addresses_are_allowed(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))
    assert AddressPolicy().allows_address(text, 443)


@pytest.mark.parametrize("text", REFUSED + REFUSED_V6)
def test_special_addresses_are_refused(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))
    assert not AddressPolicy().allows_address(text, 80)


@pytest.mark.parametrize("inner", REFUSED)
@pytest.mark.parametrize("prefix", ["::ffff:", "::", "64:ff9b::", "2002:"])
def test_an_embedded_address_counts(prefix: str, inner: str) -> None:
    high, low = divmod(int(ipaddress.IPv4Address(inner)), 65536)
    text = f"2002:{high:x}:{low:x}::1" if prefix == "2002:" else f"{prefix}{high:x}:{low:x}"
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text", ["2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.0.1.", "1.2.3", ""]
)
def test_odd_spellings_are_no_addresses(text: str) -> None:
    assert parse_address(text) is None
    assert not AddressPolicy(("127.0.0.1",)).allows_address(text, 80)


@pytest.mark.parametrize(
    ("entry", "address", "port", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1", 80, True),
        ("127.0.0.1", "127.0.0.2", 80, False),
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.0.0.1:8080", "127.0.0.1", 80, False),
        ("10.0.0.0/8", "10.200.3.4", 80, True),
        ("10.0.0.0/8", "11.0.0.1", 80, True),
        ("10.0.0.0/8", "192.168.0.1", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]:81", "::1", 81, True),
        ("[::1]:81", "::1", 80, False),
        ("fd00::/8", "fd12::1", 80, True),
        ("localhost", "127.0.0.1", 80, False),
    ],
)
def test_allow_hosts_opens_addresses(entry: str, address: str, port: int, allowed: bool) -> None:
    assert AddressPolicy((entry,)).allows_address(address, port) is allowed


def test_allow_hosts_opens_names() -> None:
    policy = AddressPolicy(("Minio.internal", "store:9000"))
    assert policy.allows_name("minio.internal.", 80)
    assert not policy.allows_name("evil.minio.internal", 80)
    assert policy.allows_name("store", 9000)
    assert not policy.allows_name("store", 80)


@pytest.mark.parametrize("entry", ["", " ", "http://host", "host/8", "a b", "*", "host:99999", "10.0.0.0/33"])
def test_a_senseless_entry_is_a_setting_error(entry: str) -> None:
    with pytest.raises(SettingError, match="allow_hosts"):
        AddressPolicy((entry,))


def test_one_address_of_a_host_is_checked() -> None:
    check_address("8.8.8.8", "example.com", 80, ())
    check_address("127.0.0.1", "localhost", 80, ("localhost",))
    with pytest.raises(AddressRefused):
        check_address("127.0.0.1", "localhost", 80, ())


class Answers(AbstractResolver):
    """Resolves each name to its given addresses, with the requested port."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.names[host]
        ]

    async def close(self) -> None:
        pass


def resolve(resolver: GuardedResolver, host: str, port: int = 80) -> list[str]:
    return [result["host"] for result in asyncio.run(resolver.resolve(host, port))]


def test_of_mixed_answers_the_public_ones_are_kept() -> None:
    resolver = GuardedResolver(AddressPolicy(), Answers(mixed=["10.0.0.1", "8.8.8.8", "127.0.0.1"], bad=["10.0.0.1"]))
    assert resolve(resolver, "mixed") == ["8.8.8.8"]
    with pytest.raises(AddressRefused):
        resolve(resolver, "bad")


def target(address: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


def test_the_socket_is_the_last_check() -> None:
    resolver = GuardedResolver(AddressPolicy(("store",)), Answers(store=["10.0.0.1"]))
    for address in ("127.0.0.1", "10.0.0.1", "2130706433", "localhost"):
        with pytest.raises(AddressRefused):
            resolver.open_socket(target(address, 80))
    resolver.open_socket(target("8.8.8.8", 80)).close()
    assert resolve(resolver, "store") == ["10.0.0.1"]
    resolver.open_socket(target("10.0.0.1", 80)).close()
    with pytest.raises(AddressRefused):
        resolver.open_socket(target("10.0.0.1", 81))
