"""Downloads: only public addresses are dialled, those that were checked, and nothing outlives its time or size."""

import contextlib
import itertools
import socket
import ssl
import threading
import time

import pytest

from lite_llm.errors import LiteLLMError, SourceProblem, UsageError
from lite_llm.text.fetch import Fetcher, check_url, is_public, resolve

PUBLIC = "93.184.216.34"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


class Web:
    """Names, and what their servers send: bytes, or a function of a socket. It keeps what was asked and dialled."""

    def __init__(self, names: dict, pages: dict):
        self.names, self.pages = names, pages
        self.dialled: list[tuple] = []
        self.requests: list[bytes] = []
        self.sockets: list[socket.socket] = []

    def resolve(self, host, port, seconds):
        assert seconds > 0
        found = self.names.get(host)
        if found is None:
            raise socket.gaierror(-2, "Name or service not known")
        return next(found) if isinstance(found, itertools.count | type(iter([]))) else found

    def dial(self, address, port, tls_name, seconds):
        assert seconds > 0
        self.dialled.append((address, port, tls_name))
        here, there = socket.socketpair()
        self.sockets.append(here)
        threading.Thread(target=self._serve, args=(there,), daemon=True).start()
        return here

    def _serve(self, there):
        with there:
            request = b""
            while b"\r\n\r\n" not in request:
                request += there.recv(4096)
            self.requests.append(request)
            lines = request.decode().split("\r\n")
            host = next(line[6:] for line in lines if line.startswith("Host: "))
            page = self.pages[host + lines[0].split()[1]]
            with contextlib.suppress(OSError):  # the client may leave
                page(there) if callable(page) else there.sendall(page)

    def fetch(self, url, gone=None, **limits):
        return Fetcher(resolve=self.resolve, dial=self.dial, **limits).fetch(url, gone)


def web(page, path="/a.png", **names):
    return Web({"example.com": [PUBLIC]} | names, {"example.com" + path: page})


def refused(make, kind=LiteLLMError) -> str:
    with pytest.raises(kind) as info:
        make()
    message = str(info.value)
    assert "\n" not in message and " at 0x" not in message and len(message) < 400
    return message


# ---- what comes


@pytest.mark.parametrize("answer", [
    HEAD + b"Content-Length: 4\r\n\r\ndata",
    HEAD + b"Content-Length: 4\r\n\r\ndata and more than was promised",
    HEAD + b"\r\ndata",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nda\r\n2;x=y\r\nta\r\n0\r\n\r\n",
    b"HTTP/1.0 200\r\n\r\ndata",
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\ndata",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream; x=y\r\nContent-Encoding: identity\r\n\r\ndata",
])  # fmt: skip
def test_a_body_arrives_however_it_is_framed(answer):
    assert web(answer).fetch("http://example.com/a.png") == b"data"


def test_the_request_says_little():
    site = web(HEAD + b"\r\ndata", path="/a%20b.png?x=1&y=%C3%A9")
    site.fetch("http://EXAMPLE.com:80/a%20b.png?x=1&y=é#part")
    lines = site.requests[0].decode().split("\r\n")
    assert lines[:2] == ["GET /a%20b.png?x=1&y=%C3%A9 HTTP/1.1", "Host: example.com"]
    assert {line.partition(":")[0] for line in lines[2:] if line} == {
        "User-Agent", "Accept", "Accept-Encoding", "Connection"
    }  # fmt: skip


def test_tls_is_for_the_name_and_the_dialled_address_for_the_wire():
    site = web(HEAD + b"\r\ndata")
    assert site.fetch("https://example.com/a.png") == b"data"
    assert site.dialled == [(PUBLIC, 443, "example.com")]


def test_addresses_are_tried_in_order():
    site = web(HEAD + b"\r\ndata", **{"example.com": ["2606:2800:220:1::1", PUBLIC]})
    dial = site.dial

    def v4_only(address, *rest):
        if ":" in address:
            raise OSError("no route")
        return dial(address, *rest)

    assert Fetcher(resolve=site.resolve, dial=v4_only).fetch("http://example.com/a.png") == b"data"


# ---- where it may go

FORBIDDEN = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 127.0.0.1 127.1.2.3 169.254.169.254 169.254.0.1
    172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255
    198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:8.8.8.8 ::127.0.0.1 ::8.8.8.8
    64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::1 100::1 2001::1 2001:0:53aa:64c::1 2001:10::1 2001:20::1 2001:db8::1
    2002:7f00:1::1 2002:808:808::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fd12:3456::1 fe80::1 fe80::1%eth0
    fec0::1 ff02::1 ff05::2 2606:4700::1111%1 nonsense 1.2.3 1.2.3.4.5 256.1.1.1 0x7f.1 2130706433 127.1
"""


@pytest.mark.parametrize("address", FORBIDDEN.split())
def test_a_name_of_an_address_that_is_not_public_is_not_dialled(address):
    site = web(HEAD + b"\r\ndata", **{"example.com": [PUBLIC, address]})
    message = refused(lambda: site.fetch("http://example.com/a.png"), UsageError)
    assert not site.dialled and address not in message and "not a public one" in message


PUBLIC_TOO = (
    "1.1.1.1 8.8.8.8 172.32.0.1 192.0.1.1 223.255.255.255 100.128.0.1 2606:4700::1111 2a00:1450::1 2400:cb00::1"
)


@pytest.mark.parametrize("address", PUBLIC_TOO.split())
def test_public_addresses_are(address):
    assert is_public(address)


def system_like(host, port, seconds):
    """As getaddrinfo reads hosts that are numbers: short, octal, hexadecimal and all."""
    try:
        return [socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))]
    except OSError:
        names = {"localhost": "127.0.0.1", "metadata.google.internal": "169.254.169.254", "intranet": "10.1.1.1",
                 "127.0.0.1.nip.io": "127.0.0.1", "xn--nxasmq6b": "10.0.0.1"}  # fmt: skip
        return [names.get(host.rstrip("."), host if ":" in host else "10.0.0.7")]


URLS = """
    http://127.0.0.1/ http://localhost/ http://localhost./ http://LOCALHOST/ http://127.1/ http://127.0.1/ http://0/
    http://0.0.0.0/ http://2130706433/ http://0x7f000001/ http://0x7f.0.0.1/ http://0177.0.0.1/ http://017700000001/
    http://0x7F.1/ http://127.0.0.1:8080/ https://127.0.0.1/ http://127.0.0.1.nip.io/ http://169.254.169.254/latest/
    http://[::1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/ http://[0:0:0:0:0:0:0:1]/
    http://[fe80::1%25eth0]/ http://[fd00:ec2::254]/ http://[64:ff9b::7f00:1]/ http://[::ffff:a9fe:a9fe]/
    http://metadata.google.internal/computeMetadata/v1/ http://intranet/ http://10.0.0.1/ http://192.168.1.1/
    http://172.16.0.1/ http://100.100.100.200/ http://①②⑦.⓪.⓪.①/ http://127。0。0。1/ http://１２７.0.0.1/ http://ⓛocalhost/
    http://user@example.com/ http://user:pass@example.com/ http://example.com@127.0.0.1/ http://a:b@127.0.0.1:80/
    http://example.com\\@127.0.0.1/ http://example.com:22/ http://example.com:25/ http://example.com:0/
    http://example.com:99999/ http://example.com:x/ http://[::1/ http://]/ http:// http:/// http://./ http://../
    http://-/%00 http://exa%6dple.com/ http://example..com/ http://a_b!/ http://[v1.x]/ http://[1.2.3.4]/
    file:///etc/passwd FILE:///etc/passwd ftp://example.com/a gopher://127.0.0.1:70/_x dict://127.0.0.1:11211/stat
    data:image/png;base64,AAAA javascript:alert(1) jar:http://a!/ ldap://127.0.0.1/ //example.com/a /etc/passwd
    httpx://a/ http:example.com https:/example.com blob:http://a/b about:blank unix:///var/run/docker.sock
"""
HOSTILE = [
    *URLS.split(),
    "", "http://exam ple.com/", "http://example.com/a\r\nX: y", "http://example.com/\x00", "http://example.com\t/",
    " http://example.com/", "http://example.com/\ud800", "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 127 + "com/",
    "http://example.com/" + "a" * 9000, "http://" + "a-" * 100 + "!/",
]  # fmt: skip


@pytest.mark.parametrize("url", HOSTILE, ids=lambda url: ascii(url)[:40])
def test_hostile_urls_are_refused_without_dialling(url):
    dialled = []
    message = refused(lambda: Fetcher(resolve=system_like, dial=lambda *a: dialled.append(a)).fetch(url), UsageError)
    assert not dialled and message.isprintable()


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 60 and len(FORBIDDEN.split()) >= 50


def test_a_host_is_checked_in_linear_time():
    start = time.perf_counter()
    refused(lambda: check_url("http://" + "a" * 250 + "!/"))
    assert time.perf_counter() - start < 0.1


def test_the_checked_address_is_the_dialled_one():
    """A resolver that answers public once and private from then on."""
    site = web(HEAD + b"\r\ndata", **{"example.com": iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])})
    site.fetch("http://example.com/a.png")
    assert [address for address, *_ in site.dialled] == [PUBLIC]
    refused(lambda: site.fetch("http://example.com/a.png"), UsageError)
    assert len(site.dialled) == 1


# ---- redirects


def moved(to, status=302):
    return f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode("latin-1", "replace")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    site = web(moved("/b.png", status))
    site.pages["example.com/b.png"] = moved("https://www.example.com/c.png#x", status)
    site.names["www.example.com"] = ["1.1.1.1"]
    site.pages["www.example.com/c.png"] = HEAD + b"\r\ndata"
    assert site.fetch("http://example.com/a.png") == b"data"
    assert site.dialled[2] == ("1.1.1.1", 443, "www.example.com")
    assert all(one.fileno() < 0 for one in site.sockets)


@pytest.mark.parametrize("to, dials", [
    ("http://127.0.0.1/", 1), ("//localhost/", 1), ("http://[::1]/", 1), ("http://rebound/", 1),
    ("file:///etc/passwd", 1), ("ftp://example.com/", 1), ("data:image/png;base64,AA", 1),
    ("http://u:p@example.com/", 1),
    ("http://example.com:22/", 1), ("http://[broken/", 1), ("/a b", 1), ("/a.png", 1), ("#again", 1),
])  # fmt: skip
def test_each_hop_is_checked(to, dials):
    site = web(moved(to), localhost=["127.0.0.1"], rebound=["10.0.0.1"], **{"127.0.0.1": ["127.0.0.1"], "::1": ["::1"]})
    refused(lambda: site.fetch("http://example.com/a.png"), UsageError)
    assert len(site.dialled) == dials


def test_https_does_not_become_http():
    site = web(moved("http://example.com/b.png"))
    assert "https to http" in refused(lambda: site.fetch("https://example.com/a.png"), UsageError)


def test_three_redirects_and_no_more():
    site = web(b"")
    for hop in range(4):
        site.pages[f"example.com/{hop}"] = moved(f"/{hop + 1}")
    site.pages["example.com/4"] = HEAD + b"\r\ndata"
    assert site.fetch("http://example.com/1") == b"data"
    assert "more than 3" in refused(lambda: site.fetch("http://example.com/0"), UsageError)


def test_a_circle():
    site = web(moved("/b"))
    site.pages["example.com/b"] = moved("/a.png")
    assert "circle" in refused(lambda: site.fetch("http://example.com/a.png"), UsageError)


# ---- bad servers


def drip(data, pause):
    def serve(there):
        for byte in data:
            there.sendall(bytes([byte]))
            time.sleep(pause)

    return serve


def stall(data):
    def serve(there):
        there.sendall(data)
        there.recv(1)

    return serve


def endless(start, more):
    def serve(there):
        there.sendall(start)
        while True:
            there.sendall(more)

    return serve


@pytest.mark.parametrize("page", [
    drip(HEAD + b"\r\n" + b"d" * 500, 0.02), drip(HEAD * 20, 0.02), stall(b""), stall(HEAD), stall(HEAD + b"\r\nda"),
    stall(HEAD + b"Content-Length: 9\r\n\r\nda"), endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
], ids=["drip", "drip-head", "silent", "head", "body", "length", "continue"])  # fmt: skip
def test_time_is_limited(page):
    site, start = web(page), time.monotonic()
    message = refused(lambda: site.fetch("http://example.com/a.png", seconds=0.3), SourceProblem)
    assert time.monotonic() - start < 1.5 and "within 0.3 s" in message
    assert all(one.fileno() < 0 for one in site.sockets)


@pytest.mark.parametrize("page", [drip(HEAD + b"\r\n" + b"d" * 5000, 0.01), stall(b""), stall(HEAD + b"\r\nda")])
def test_a_download_that_nobody_waits_for_ends(page):
    """IMG-12."""
    site, start = web(page), time.monotonic()
    message = refused(lambda: site.fetch("http://example.com/a.png", lambda: time.monotonic() - start > 0.1))
    assert 0.1 < time.monotonic() - start < 1 and "given up" in message
    assert all(one.fileno() < 0 for one in site.sockets)


def test_the_time_is_for_all_hops_together():
    site = web(b"")
    for hop in range(3):
        site.pages[f"example.com/{hop}"] = drip(moved(f"/{hop + 1}"), 0.003)
    site.pages["example.com/3"] = stall(b"")
    start = time.monotonic()
    refused(lambda: site.fetch("http://example.com/0", seconds=0.5), SourceProblem)
    assert time.monotonic() - start < 0.9


def test_a_resolver_that_hangs(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: over.wait(5) and [])
    start = time.monotonic()
    refused(lambda: Fetcher(seconds=0.2).fetch("http://example.com/"), SourceProblem)
    assert time.monotonic() - start < 1
    over.set()


def test_the_resolver_of_the_system(monkeypatch):
    answers = [(2, 1, 6, "", (PUBLIC, 80)), (2, 1, 6, "", (PUBLIC, 80)), (10, 1, 6, "", ("::1", 80, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers)
    assert resolve("example.com", 80, 1.0) == [PUBLIC, "::1"]


@pytest.mark.parametrize("page", [
    HEAD + b"Content-Length: 1001\r\n\r\n", HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    HEAD + b"\r\n" + b"d" * 1001, endless(HEAD + b"\r\n", b"d" * 4096),
    endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b"d" * 1024 + b"\r\n"),
], ids=["length", "huge", "body", "endless", "chunks"])  # fmt: skip
def test_size_is_limited(page):
    site = web(page)
    assert "1,000" in refused(lambda: site.fetch("http://example.com/a.png", most_bytes=1000), UsageError)
    assert all(one.fileno() < 0 for one in site.sockets)


def test_exactly_the_limit_is_taken():
    assert len(web(HEAD + b"\r\n" + b"d" * 1000).fetch("http://example.com/a.png", most_bytes=1000)) == 1000


@pytest.mark.parametrize("page, said", [
    (HEAD + b"Content-Length: 9\r\n\r\nda", "too early"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nda", "too early"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nda", "cannot be read"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nda", ""),
    (HEAD + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", "compressed"),
    (HEAD + b"Content-Encoding: br\r\n\r\nx", "compressed"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "text/html"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: \x1b[31mred\r\n\r\nx", "expected a picture"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", "204"), (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
    (b"HTTP/1.1 500 Oops\r\n\r\n", "500"), (b"HTTP/1.1 302 Found\r\n\r\n", "302"), (b"HTTP/1.1 304 No\r\n\r\n", "304"),
    (b"", "cannot be read"), (b"SSH-2.0-OpenSSH_9\r\n", "not HTTP"), (b"\x15\x03\x01\x00\x02", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 70000 + b"\r\n\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "not HTTP"),
    (b"HTTP/9.9 200 OK\r\n\r\n", "not HTTP"),
])  # fmt: skip
def test_an_answer_that_is_no_picture(page, said):
    message = refused(lambda: web(page).fetch("http://example.com/a.png", seconds=2.0), SourceProblem)
    assert said in message and message.isprintable() and PUBLIC not in message


@pytest.mark.parametrize("error, said", [
    (ConnectionRefusedError(111, "refused by 93.184.216.34"), "connection refused"),
    (OSError(113, "no route"), "network"),
    (TimeoutError(), "within"), (ssl.SSLCertVerificationError("bad cert"), "certificate"),
    (ssl.SSLError("x"), "encrypt"),
])  # fmt: skip
def test_a_connection_that_fails(error, said):
    def dial(*_):
        raise error

    site = web(b"")
    message = refused(lambda: Fetcher(resolve=site.resolve, dial=dial).fetch("http://example.com/"), SourceProblem)
    assert said in message and PUBLIC not in message and message.startswith("example.com")


def test_a_name_that_does_not_exist():
    assert "no such host" in refused(lambda: web(b"").fetch("http://nowhere.example/"), SourceProblem)
