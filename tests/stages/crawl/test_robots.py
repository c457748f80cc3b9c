"""robots.txt by the rules of RFC 9309, and with hosts that answer incorrectly."""

import asyncio
import itertools
import time
from typing import Any

import pytest

from pipeline.errors import SampleError
from pipeline.stages.crawl import robots
from pipeline.stages.crawl.download import Download, DownloadOptions, download_all
from pipeline.stages.crawl.robots import MAX_BYTES, parse_rules

JPEG = b"\xff\xd8\xff" + bytes(100)
RULES = b"User-agent: *\nDisallow: /private/\nAllow: /private/but/\n"


@pytest.fixture(autouse=True)
def forget() -> None:
    robots._kept.clear()


def fetch(server: Any, *paths: str, **changes: Any) -> list[Download | SampleError]:
    settings: dict[str, Any] = {"allow_hosts": ("127.0.0.1",), "timeout": 3.0, "robots_txt": True, "retry_delay": 0.01}
    urls = [(number, server.url + path) for number, path in enumerate(paths)]
    outcomes = dict(download_all(urls, DownloadOptions(**{**settings, **changes})))
    return [outcomes[number] for number in range(len(paths))]


def classes(outcomes: list[Download | SampleError]) -> list[str]:
    return [outcome.error_class if isinstance(outcome, SampleError) else "fetched" for outcome in outcomes]


def test_rules_are_asked_for_once_and_obeyed_before_anything_else(serve: Any) -> None:
    paths = [f"/{folder}/{number}.jpg" for folder in ("open", "private", "private/but") for number in range(5)]
    server = serve({"robots.txt": RULES, **dict.fromkeys(paths, JPEG)})
    outcomes = fetch(server, *paths)
    assert classes(outcomes) == ["fetched"] * 5 + ["robots"] * 5 + ["fetched"] * 5
    assert server.requests.count("/robots.txt") == 1 and server.requests[0] == "/robots.txt"
    assert not any(path.startswith("/private/") and "but" not in path for path in server.requests)
    refused = outcomes[5]
    assert isinstance(refused, SampleError)
    assert (refused.status, refused.message) == ("failed_to_download", "disallowed by robots.txt")
    # A second shard of the same worker asks no more.
    fetch(server, paths[0])
    assert server.requests.count("/robots.txt") == 1


def test_nobody_asks_for_them_by_default(serve: Any) -> None:
    server = serve({"robots.txt": b"User-agent: *\nDisallow: /\n", "a.jpg": JPEG})
    assert classes(fetch(server, "/a.jpg", robots_txt=False)) == ["fetched"]
    assert server.requests == ["/a.jpg"]


@pytest.mark.parametrize(
    ("status", "expected"), [(404, "fetched"), (403, "fetched"), (401, "fetched"), (410, "fetched")]
)
def test_a_4xx_allows_everything(serve: Any, status: int, expected: str) -> None:
    server = serve({"robots.txt": serve.Reply(b"User-agent: *\nDisallow: /", status=status), "a.jpg": JPEG})
    assert classes(fetch(server, "/a.jpg")) == [expected]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_5xx_forbids_everything_for_a_while(serve: Any, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    down = serve.Reply(b"", status=status)
    server = serve({"robots.txt": lambda before: RULES if before else down, "a.jpg": JPEG, "private/a.jpg": JPEG})
    assert classes(fetch(server, "/a.jpg", "/a.jpg")) == ["robots_unreachable"] * 2
    assert server.requests == ["/robots.txt"]
    assert "robots_unreachable" in robots_transient()
    later = time.monotonic() + robots._FAILURE_SECONDS + 1
    monkeypatch.setattr(robots.time, "monotonic", lambda: later)
    assert classes(fetch(server, "/a.jpg", "/private/a.jpg")) == ["fetched", "robots"]


def robots_transient() -> frozenset[str]:
    from pipeline.stages.crawl.download import TRANSIENT

    return TRANSIENT


def test_a_dead_host_is_asked_once_not_for_every_row(serve: Any) -> None:
    server = serve({})
    server.stop()
    began = time.monotonic()
    assert classes(fetch(server, *(f"/{number}.jpg" for number in range(200)))) == ["robots_unreachable"] * 200
    assert time.monotonic() - began < 5


def test_redirects_of_robots_txt_are_followed_five_times(serve: Any) -> None:
    def chain(length: int) -> dict[str, Any]:
        hops = {f"hop{n}": serve.Reply(b"", 302, {"Location": f"/hop{n - 1}"}) for n in range(1, length)}
        return {"robots.txt": serve.Reply(b"", 301, {"Location": f"/hop{length - 1}"}), **hops, "hop0": RULES}

    for length, expected in ((1, "robots"), (5, "robots"), (6, "fetched")):
        robots._kept.clear()
        server = serve({**chain(length), "private/a.jpg": JPEG})
        assert classes(fetch(server, "/private/a.jpg")) == [expected], length


def test_a_redirect_of_robots_txt_does_not_lead_inside(serve: Any) -> None:
    inside = serve({"robots.txt": RULES})
    port = inside.url.rpartition(":")[2]
    server = serve({"robots.txt": serve.Reply(b"", 302, {"Location": f"http://127.0.0.2:{port}/robots.txt"})})
    assert classes(fetch(server, "/a.jpg")) == ["robots_unreachable"]
    assert inside.requests == []


def test_each_hop_of_an_image_asks_its_own_host(serve: Any) -> None:
    other = serve({"robots.txt": RULES, "private/a.jpg": JPEG})
    server = serve({"a.jpg": serve.Reply(b"", 302, {"Location": other.url + "/private/a.jpg"})})
    assert classes(fetch(server, "/a.jpg")) == ["robots"]
    assert other.requests == ["/robots.txt"]


def test_our_own_group_counts_and_the_token_is_our_name(serve: Any) -> None:
    rules = (
        b"User-agent: clipmill\nDisallow: /ours\n\nUser-agent: MyBot\nDisallow: /mine\n\nUser-agent: *\nDisallow: /\n"
    )
    server = serve({"robots.txt": rules, "ours": JPEG, "mine": JPEG, "else": JPEG})
    paths = ("/ours", "/mine", "/else")
    assert classes(fetch(server, *paths)) == ["robots", "fetched", "fetched"]
    assert classes(fetch(server, *paths, user_agent_token="mybot")) == ["fetched", "robots", "fetched"]


def test_a_crawl_delay_keeps_requests_apart_up_to_a_cap(serve: Any) -> None:
    paths = [f"/{number}.jpg" for number in range(4)]
    server = serve({"robots.txt": b"User-agent: *\nCrawl-delay: 1000\n", **dict.fromkeys(paths, JPEG)})
    began = time.monotonic()
    assert classes(fetch(server, *paths, max_crawl_delay=0.1)) == ["fetched"] * 4
    assert 0.3 <= time.monotonic() - began < 3


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon", ""])
def test_a_senseless_crawl_delay_is_none_or_the_cap(serve: Any, value: str) -> None:
    server = serve({"robots.txt": f"User-agent: *\nCrawl-delay: {value}\n".encode(), "a.jpg": JPEG})
    assert classes(fetch(server, "/a.jpg", "/a.jpg", max_crawl_delay=0.05)) == ["fetched"] * 2


def test_five_hundred_kibibytes_are_read_and_no_more(serve: Any) -> None:
    padding = b"#" + b"x" * 1022 + b"\n"
    early = padding * 499 + b"User-agent: *\nDisallow: /a\n"
    late = padding * 501 + b"User-agent: *\nDisallow: /a\n" + padding * 20_000
    for text, expected in ((early, "robots"), (late, "fetched")):
        robots._kept.clear()
        assert classes(fetch(serve({"robots.txt": text, "a": JPEG}), "/a")) == [expected]
    assert len(early) < MAX_BYTES < len(late)


def test_rules_made_to_be_slow_are_not() -> None:
    agents = b"".join(b"User-agent: bot%d\n" % number for number in range(10_000))
    rules = b"".join(b"Disallow: /%d*a*b*c$\n" % number for number in range(12_000))
    text = agents + b"User-agent: *\n" + rules
    assert len(text) < MAX_BYTES
    began = time.process_time()
    parsed = parse_rules(text, "clipmill")
    assert parsed.can_fetch("http://a.test/x" + "a" * 10_000, "clipmill")
    assert not parsed.can_fetch("http://a.test/7xaxbxc", "clipmill")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        # RFC 9309, 2.2.2: the longest match wins, "Allow" where both are as long; 2.2.3: "*" and "$".
        ("User-agent: *\nDisallow: /\nAllow: /a/b", "/a/b/c", True),
        ("User-agent: *\nAllow: /a\nDisallow: /a/b", "/a/b/c", False),
        ("User-agent: *\nAllow: /page\nDisallow: /page", "/page", True),
        ("User-agent: *\nDisallow: *.gif$", "/x/y.gif", False),
        ("User-agent: *\nDisallow: *.gif$", "/x/y.gif?z", True),
        ("User-agent: *\nDisallow:", "/a", True),
        ("", "/a", True),
        ("<html><body>No robots here</body></html>", "/a", True),
        ("\ufeffUser-agent: *\nDisallow: /", "/a", False),
        ("user-AGENT : ClipMill\ndisallow : /a # all of it", "/a", False),
        ("User-agent: otherbot\nDisallow: /", "/a", True),
        ("User-agent: mill\nDisallow: /", "/a", True),
        ("User-agent: otherbot\nUser-agent: clipmill\nDisallow: /", "/a", False),
        (
            "User-agent: clipmill\nDisallow: /a\n\nUser-agent: x\nDisallow: /\n\nUser-agent: clipmill\nDisallow: /b",
            "/b",
            False,
        ),
        ("User-agent: *\nDisallow: /%7Ejoe", "/~joe/a", False),
    ],
)
def test_the_rules_mean_what_the_rfc_says(text: str, path: str, allowed: bool) -> None:
    assert parse_rules(text.encode(), "clipmill").can_fetch(f"http://a.test{path}", "clipmill") is allowed


def test_bytes_that_are_no_text_are_read_all_the_same() -> None:
    assert not parse_rules(b"\xff\xfe\nUser-agent: *\nDisallow: /\xff\nDisallow: /a", "clipmill").can_fetch(
        "http://a.test/a", "clipmill"
    )


def test_one_row_that_is_given_up_does_not_take_the_answer_from_the_others() -> None:
    async def work() -> list[Any]:
        asked = itertools.count()

        async def get(url: Any) -> tuple[int, bytes]:
            next(asked)
            await asyncio.sleep(0.05)
            return 200, RULES

        rules = robots.Robots(get, None, 5.0)
        url = robots.URL("http://a.test/private/x")
        first, second = (asyncio.ensure_future(rules.check(url)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        got = await asyncio.gather(first, second, return_exceptions=True)
        return [*got, next(asked)]

    first, second, asked = asyncio.run(work())
    assert isinstance(first, asyncio.CancelledError)
    assert getattr(second, "error_class", "") == "robots"
    assert asked == 1
