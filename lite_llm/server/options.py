"""What is settled before a model is loaded: the options, the address, who may be asked for pictures. Needs no torch."""

import errno
import ipaddress
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from lite_llm.errors import EnvironmentProblem, UsageError
from lite_llm.text.fetch import Fetcher, check_url, resolve


@dataclass(frozen=True)
class ServeOptions:
    """UsageError for an address that everybody can reach, without a key, and for a timeout that is none."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = None
    name: str | None = None  # of the model, for clients; None: `name_of` it
    max_queue: int = 512  # answers that may wait
    max_body: int = 8 << 20  # bytes
    timeout: float | None = None  # seconds that an answer may take at most; None: any time
    drain: float = 30.0  # seconds for running answers to finish when the server is stopped

    def __post_init__(self):
        if self.api_key is None and not _is_local(self.host):
            raise UsageError(
                f"host = {self.host} can be reached from other machines, and there is no API key",
                "pass --api-key KEY or set LITE_LLM_API_KEY, or serve on 127.0.0.1",
            )
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise UsageError(f"timeout = {self.timeout}; expected a number of seconds above 0")


def listen(options: ServeOptions) -> socket.socket:
    """The address, taken before a model is loaded. EnvironmentProblem if that cannot be."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends at once only if it knows that this is TCP
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)  # who comes now waits, and is not refused until a thread has started
    except OSError as error:
        hint = "stop the other program or pass --port" if error.errno == errno.EADDRINUSE else "pass another --host"
        raise EnvironmentProblem(f"{options.host} port {options.port}: {error.strerror}", hint) from None
    return listener


def fetcher_from(hosts: Sequence[str]) -> Fetcher | None:
    """Downloads pictures from these hosts alone, redirects included; None for no hosts. UsageError for a bad name.

    An address that is not public is asked only if it is listed itself; a name that leads to it does not suffice.
    """
    listed = {check_url(f"http://{host}/")[1] for host in hosts}

    def only_listed(host: str, port: int, seconds: float) -> list[str]:
        if host not in listed:
            raise UsageError(f"pictures are not fetched from {host}", "send the picture itself, as a data URL")
        return resolve(host, port, seconds)

    return Fetcher(resolve=only_listed, inside=listed) if listed else None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
