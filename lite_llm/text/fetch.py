"""Pictures from the web: one bounded download at a time, and only from public addresses unless others are listed.

A URL that a stranger sends may point into the network of the machine that fetches it. So every hop is checked by
itself, names are resolved once, and the addresses that were checked are those that are dialled.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from lite_llm.errors import SourceProblem, UsageError, shown

MOST_BYTES = 32 << 20
"""What a picture may weigh, from wherever it comes."""

_MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_FORBIDDEN_IN_URL = re.compile(r"[\x00-\x20\x7f-\x9f\\\ud800-\udfff]")
_GLANCE = 0.25  # seconds between two looks at whether anybody still waits
_HINT = "download it yourself and name the file"

# Which addresses are public is written down here: `ipaddress` called several of these ranges global until 3.11.10.
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "168.63.129.16/32",  # looks public, and is Azure's metadata service
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # of 2000::/3: special uses, some with IPv4 inside
    )
]  # fmt: skip
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # anything else of IPv6 is local, mapped, translated or unassigned

Resolve = Callable[[str, int, float], list[str]]
"""(host, port, seconds) -> numeric addresses, best first; OSError if there are none."""
Dial = Callable[[str, int, str | None, float], Any]
"""(numeric address, port, name for TLS or None for plain HTTP, seconds) -> a connected socket."""
Gone = Callable[[], bool]
"""Whether nobody waits for a picture any more; asked again and again, from the thread that fetches."""


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """The system's resolver, which knows no time limit of its own and so runs in a thread that may be left behind."""
    found: list[list[str] | OSError] = []

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.append(list(dict.fromkeys(str(answer[4][0]) for answer in answers)))
        except OSError as error:
            found.append(error)
        except UnicodeError:
            found.append(OSError("not a host name"))

    thread = threading.Thread(target=ask, name="lite_llm-resolve", daemon=True)
    thread.start()
    thread.join(seconds)
    answer = found[0] if found else TimeoutError()
    if isinstance(answer, OSError):
        raise answer
    return answer


def dial(address: str, port: int, tls_name: str | None, seconds: float) -> socket.socket:
    """A connection to a numeric address; with `tls_name` encrypted, the certificate checked for that name."""
    end = time.monotonic() + seconds
    connection = socket.create_connection((address, port), timeout=seconds)
    if tls_name is None:
        return connection
    try:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        return ssl.create_default_context().wrap_socket(connection, server_hostname=tls_name)
    except BaseException:
        connection.close()
        raise


class Fetcher:
    """Downloads pictures over http and https. It sends no cookies, no credentials, and uses no proxy.

    `seconds` are for a whole download: names, connections, redirects and data. UsageError for what is refused,
    SourceProblem for a server that fails. No message names a resolved address.
    """

    def __init__(
        self,
        seconds: float = 10.0,
        most_bytes: int = MOST_BYTES,
        resolve: Resolve = resolve,
        dial: Dial = dial,
        inside: Collection[str] = (),
    ):
        """`inside`: numeric addresses that may be asked although they are not public. A name is not enough, for
        whoever answers for it could point it anywhere."""
        self._seconds, self._most_bytes, self._resolve, self._dial = seconds, most_bytes, resolve, dial
        self._inside = inside

    def fetch(self, url: str, gone: Gone | None = None) -> bytes:
        """The body that `url` answers with, at most three redirects away.

        A SourceProblem soon after `gone` has become true: at once while data are awaited, else before the next hop.
        """
        end = time.monotonic() + self._seconds
        seen: list[str] = []
        while True:
            seen.append(url)
            parts, host, port = check_url(url)
            try:
                body, onward = self._get(parts, host, port, end, gone or _never)
            except TimeoutError:
                raise SourceProblem(
                    f"{host} did not deliver within {self._seconds:g} s", f"try again, or {_HINT}"
                ) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise SourceProblem(f"{host} cannot be read ({_what(error)})", f"try again, or {_HINT}") from None
            if onward is None:
                return body
            url = _next(url, onward, seen)

    def _get(self, url: SplitResult, host: str, port: int, end: float, gone: Gone) -> tuple[bytes, str | None]:
        """The body, or where a redirect leads."""
        addresses = self._resolve(host, port, _left(end))
        if not addresses:
            raise OSError("no address")
        if not all(is_public(address) or address in self._inside for address in addresses):
            hint = "the server's operator may list the address itself with --fetch-from" if self._inside else _HINT
            raise UsageError(f"{host} is an address inside a network, not a public one", hint)
        connection = self._connect(addresses, url.scheme, host, port, end)
        try:
            connection.settimeout(_left(end))
            connection.sendall(_request(url, host, port))
            response = http.client.HTTPResponse(_Answer(connection, end, gone), method="GET")
            response.begin()
            return self._read(response, host)
        finally:
            connection.close()

    def _connect(self, addresses: list[str], scheme: str, host: str, port: int, end: float) -> Any:
        for ahead, address in reversed(list(enumerate(reversed(addresses)))):
            try:
                # a share of the time each: a machine may have addresses that never answer
                return self._dial(address, port, host if scheme == "https" else None, _left(end) / (ahead + 1))
            except OSError:
                if not ahead:
                    raise
        raise AssertionError("no address")

    def _read(self, response: http.client.HTTPResponse, host: str) -> tuple[bytes, str | None]:
        onward = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and onward:
            return b"", onward
        if response.status != 200:
            raise SourceProblem(f"{host} answered with status {response.status}, not with a picture", "check the URL")
        encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
        if encoding != "identity":
            raise SourceProblem(f"{host} sent compressed data ({shown(encoding)}), which was not asked for", _HINT)
        kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if not is_picture_type(kind):
            raise SourceProblem(f"{host} sent {shown(kind)}; expected a picture", "use the picture's own URL")
        most = self._most_bytes
        if (response.length or 0) > most:
            raise UsageError(f"{host} would send {response.length:,} bytes; at most {most:,} are taken", _HINT)
        body = bytearray()
        while piece := response.read(1 << 16):
            body += piece
            if len(body) > most:
                raise UsageError(f"{host} sent more than {most:,} bytes, the most that are taken", _HINT)
        if response.length:  # told more than it sent
            raise OSError("cut short")
        return bytes(body), None


def is_picture_type(kind: str) -> bool:
    """Whether a media type may stand for a picture. Which one it is, the data say; servers often do not know."""
    return kind in ("", "application/octet-stream", "binary/octet-stream") or kind.startswith("image/")


def check_url(url: str) -> tuple[SplitResult, str, int]:
    """The parts, the host in ASCII and the port of a URL that may be asked for; else a UsageError."""
    if len(url) > 8192:
        raise UsageError(f"the URL has {len(url):,} characters; at most 8,192 are taken")
    if _FORBIDDEN_IN_URL.search(url):
        raise UsageError(f"{shown(url)} holds spaces, backslashes or control characters", "write them as %20 and so on")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise UsageError(f"{shown(url)} is not a URL", "expected http(s)://host/path") from None
    if parts.scheme not in _PORTS:
        raise UsageError(f"{shown(url)}: only http and https are fetched")
    if parts.username is not None or parts.password is not None:
        raise UsageError("a URL with a user name or password is not fetched", _HINT)
    port = _PORTS[parts.scheme] if port is None else port
    if port not in _PORTS.values() and port < 1024:
        raise UsageError(f"port {port} is not for pictures; 80, 443 and those from 1024 on are")
    return parts, _host(host, url), port


def is_public(address: str) -> bool:
    """Whether a numeric address is one that anybody on the internet could reach."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 6 and (parsed.scope_id is not None or parsed not in _GLOBAL_UNICAST):
        return False
    return not any(parsed in network for network in _NOT_PUBLIC if network.version == parsed.version)


def _host(host: str, url: str) -> str:
    try:
        if ":" in host:
            return ipaddress.IPv6Address(host).compressed
        host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    except ValueError:  # UnicodeError is one
        host = ""
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise UsageError(f"{shown(url)} names no host", "expected http(s)://host/path")
    return host


def _next(url: str, onward: str, seen: list[str]) -> str:
    try:
        onward = onward.strip().encode("latin-1", "replace").decode("utf-8", "replace")  # as http.client reads headers
        target = urljoin(url, onward).partition("#")[0]
    except ValueError:
        raise UsageError("the server redirects to something that is not a URL", _HINT) from None
    if url.startswith("https:") and target.startswith("http:"):
        raise UsageError("the server redirects from https to http, which is not followed", _HINT)
    if target in seen:
        raise UsageError("the server redirects in a circle", _HINT)
    if len(seen) > _MOST_REDIRECTS:
        raise UsageError(f"the server redirects more than {_MOST_REDIRECTS} times", _HINT)
    return target


def _request(url: SplitResult, host: str, port: int) -> bytes:
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    path = "".join(c if c.isascii() else "".join(f"%{byte:02X}" for byte in c.encode()) for c in path)
    name = f"[{host}]" if ":" in host else host
    name += "" if port == _PORTS[url.scheme] else f":{port}"
    lines = [f"GET {path} HTTP/1.1", f"Host: {name}", "User-Agent: lite_llm", "Accept: image/*"]
    return "\r\n".join([*lines, "Accept-Encoding: identity", "Connection: close", "", ""]).encode("ascii")


def _never() -> bool:
    return False


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _what(error: Exception) -> str:
    """The kind of failure only: texts of the system may hold addresses, those of http.client what the server sent."""
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not to be trusted"
    if isinstance(error, ssl.SSLError):
        return "the encryption fails"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, http.client.IncompleteRead) or str(error) == "cut short":
        return "the data end too early"
    if isinstance(error, (http.client.HTTPException, ValueError)):
        return "the answer is not HTTP"
    return "the network fails"


class _Answer(io.RawIOBase):
    """A connection as the file that `http.client` reads: each read waits for what is left of the time and no longer."""

    def __init__(self, connection: Any, end: float, gone: Gone):
        self._connection, self._end, self._gone = connection, end, gone

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self._connection.settimeout(min(_left(self._end), _GLANCE))
            if self._gone():
                raise SourceProblem("the download was given up", _HINT)
            try:
                return self._connection.recv_into(buffer)
            except TimeoutError:
                continue
