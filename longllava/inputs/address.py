"""Pictures from http(s) addresses, for hosts that the caller named, and from data: addresses, which hold them.

One gate for the first address and for every redirect: the scheme, the host, and the numbers it resolves to are checked,
and the connection goes to the number that was checked, so that a name cannot change between the two.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from longllava.errors import InputError

ANY = "*"  # any host on the public internet
MAX_BYTES = 64 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 3
MOVED = (301, 302, 303, 307, 308)
BLOCK = 1 << 16
PATH = "/%:@!$&'()*+,;=~-._"  # what stands in a path as it is, beside letters and digits
QUERY = "".join(map(chr, range(33, 127)))
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 numbers in IPv6 ones (RFC 6052), which count as public

UNICAST = ipaddress.ip_network("2000::/3")  # the IPv6 numbers of hosts; site-local fec0::/10 counts as global


def download(address: str, hosts: Sequence[str], *, max_bytes: int = MAX_BYTES, seconds: float = MAX_SECONDS) -> bytes:
    """The bytes behind an address. hosts: those that may be asked; "*" any host with a public number.

    max_bytes and seconds hold for the whole, redirects included. Raises: InputError naming what is wrong with it.
    """
    deadline = time.monotonic() + seconds
    hosts = [host.lower() for host in hosts]  # as those of addresses are
    for _ in range(MAX_REDIRECTS + 1):
        content, moved_to = ask(address, hosts, max_bytes, deadline, seconds)
        if moved_to is None:
            return content
        try:
            address = urllib.parse.urljoin(address, moved_to)
        except ValueError:
            raise InputError(f"redirected to {moved_to!r:.80}, which is not a well-formed address") from None
    raise InputError(f"more than {MAX_REDIRECTS} redirects")


def held(address: str) -> bytes:
    """The bytes that a data: address holds itself. Raises: InputError."""
    head, comma, text = address.partition(",")
    content = urllib.parse.unquote_to_bytes(text)
    try:
        if comma:
            return from_base64(content) if head.lower().endswith(";base64") else content
    except ValueError:
        pass
    raise InputError("it is torn; expected data:image/png;base64, and the base64 text of a file")


def from_base64(text: str | bytes) -> bytes:
    """What base64 text holds, which is often cut into lines. Raises: ValueError; AttributeError for what is no text."""
    raw = text.encode("ascii") if isinstance(text, str) else text
    return base64.b64decode(b"".join(raw.split()), validate=True)


def ask(
    address: str, hosts: Sequence[str], max_bytes: int, deadline: float, seconds: float
) -> tuple[bytes, str | None]:
    """One request: (content, None), or (nothing, where it moved to)."""
    secure, host, port, path = parts_of(address, hosts)
    left = deadline - time.monotonic()
    if left <= 0:
        raise InputError(f"it took more than {seconds:g} seconds")
    try:
        connection = connect(host, port, numbers_of(host, port, hosts, deadline, seconds), secure, deadline)
    except OSError as error:
        raise InputError(f"{host} cannot be reached: {error.strerror or error}") from None
    # a server that sends a byte now and then never runs into the socket's own limit
    watch = threading.Timer(max(deadline - time.monotonic(), 0), hang_up, (connection.sock,))
    watch.daemon = True
    watch.start()
    try:
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "longllava"})
        with connection.getresponse() as response:  # which keeps the socket open beside the connection
            if response.status in MOVED and (location := response.getheader("Location")):
                with contextlib.suppress(UnicodeError):  # headers are read as Latin-1; addresses in them are UTF-8
                    location = location.encode("latin-1").decode("utf-8")
                return b"", location
            if response.status != 200:
                raise InputError(f"the server answers {response.status}")
            return read_all(response, max_bytes, deadline), None
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline:
            raise InputError(f"it took more than {seconds:g} seconds") from None
        raise InputError(f"broken answer: {' '.join(str(error).split()) or type(error).__name__}") from None
    finally:
        watch.cancel()
        connection.close()


def read_all(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """All of an answer; one that says, or turns out, to be too long is not read further. Raises: InputError; OSError
    when it was hung up on, which looks like its end where no length was stated."""
    content = bytearray()
    while (response.length or 0) <= max_bytes:  # what is still to come, where that was stated
        if not (block := response.read1(BLOCK)):
            if time.monotonic() >= deadline:
                raise TimeoutError
            if response.length:  # less came than was stated
                raise InputError(f"broken answer: {response.length} bytes are missing")
            return bytes(content)
        content += block
        if len(content) > max_bytes:
            break
    raise InputError(f"more than {max_bytes:,} bytes; download it and make it smaller")


def parts_of(address: str, hosts: Sequence[str]) -> tuple[bool, str, int, str]:
    """(https?, host, port, path and query) of an address that may be asked."""
    if any(ord(character) <= 32 or character in "\\\x7f" for character in address):
        raise InputError("it holds a space, a backslash or a control character")
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        path = urllib.parse.quote(parts.path or "/", safe=PATH)
        if parts.query:
            path += f"?{urllib.parse.quote(parts.query, safe=QUERY)}"  # as UTF-8, which is what browsers send
        host = host.encode("idna").decode("ascii") if not host.isascii() else host
    except (ValueError, UnicodeError):
        raise InputError("it is not a well-formed address") from None
    if parts.scheme not in ("http", "https"):
        raise InputError(f"scheme {parts.scheme!r}; allowed: http, https")
    if parts.username is not None or parts.password is not None:
        raise InputError("it holds a user name or password")
    if not host:
        raise InputError("it names no host")
    if host not in hosts and ANY not in hosts:
        allowed = ", ".join(hosts) or "none"
        raise InputError(f"host {host} may not be asked; allowed: {allowed} (allow_hosts names them, '*' for any)")
    return parts.scheme == "https", host, port or (443 if parts.scheme == "https" else 80), path


def numbers_of(host: str, port: int, hosts: Sequence[str], deadline: float, seconds: float) -> list[str]:
    """The numbers of a host. One that was not named itself must not lead into the local network.

    The system's own question knows no time limit, so a thread waits for its answer.
    """
    answer: Future[list[Any]] = Future()

    def resolve() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=resolve, name="longllava-resolve", daemon=True).start()
    try:
        found = [str(entry[4][0]) for entry in answer.result(max(deadline - time.monotonic(), 0))]
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise InputError(f"{host!r:.80} is not the name of a host") from None
    except FutureTimeout:  # another class than TimeoutError before Python 3.11
        raise InputError(f"it took more than {seconds:g} seconds") from None
    for number in found if host not in hosts else ():
        if not public(ipaddress.ip_address(number.partition("%")[0])):
            raise InputError(f"host {host} is not on the public internet; name it in allow_hosts if it is meant")
    return found


def public(number: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None)
    if number in NAT64:
        mapped = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    if mapped:
        return public(mapped)
    return number.is_global and not number.is_multicast and (number.version == 4 or number in UNICAST)


def connect(host: str, port: int, numbers: Sequence[str], secure: bool, deadline: float) -> http.client.HTTPConnection:
    """A connection whose socket is open to the first of `numbers` that answers; hands are not yet shaken."""
    connection = http.client.HTTPConnection(host, port)
    failure: OSError = OSError("it has no address")
    for number in numbers:
        if (left := deadline - time.monotonic()) <= 0:
            break
        try:
            plain = socket.create_connection((number, port), timeout=left)
        except OSError as error:
            failure = error
            continue
        context = ssl.create_default_context() if secure else None
        connection.default_port = 443 if secure else 80  # which the Host header leaves out
        connection.sock = (
            context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False) if context else plain
        )
        return connection
    raise failure


def hang_up(connected: socket.socket) -> None:
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not an SSLSocket's own, which breaks a read under way
    except OSError:  # it was over already
        pass
