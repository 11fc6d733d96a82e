"""Pictures from addresses: only from hosts that were named, in time, and never more than is allowed."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time

import pytest
from PIL import Image

from longllava.errors import InputError
from longllava.inputs import address
from longllava.inputs.address import download
from tests.tiny import tiny_model

PICTURE = Image.new("RGB", (16, 16), (200, 30, 40))
HERE = ["127.0.0.1"]


def png():
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


def gif():
    file = io.BytesIO()
    frames = [PICTURE, Image.new("RGB", (16, 16), (0, 90, 200))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000)
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        name, _, rest = self.path[1:].partition("?")[0].partition("/")
        if name == "png":
            self.reply(200, png(), Content_Length=len(png()))
        elif name == "gif":
            self.reply(200, gif())
        elif name == "unstated":
            self.reply(200, png())
        elif name == "short":
            self.reply(200, png()[:40], Content_Length=len(png()))
        elif name == "stated":
            self.reply(200, b"", Content_Length=10**12)
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif name == "slow":
            try:
                for _ in range(100):
                    self.wfile.write(b"H")
                    time.sleep(0.1)
            except OSError:
                pass
        elif name == "drip":  # a picture, and then bytes now and then; rest: the length that is stated
            self.reply(200, gif(), **({"Content_Length": rest} if rest else {}))
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
        elif name == "to":
            self.reply(302, Location=rest)
        elif name == "letters":  # in a header, where servers write UTF-8
            self.reply(302, Location="/b\xfccher".encode().decode("latin-1"))
        elif name == "b%C3%BCcher":
            self.reply(200, png(), Content_Length=len(png()))
        elif name == "hops":
            self.reply(302, Location=f"/hops/{int(rest) - 1}" if rest != "0" else "/png")
        else:
            self.reply(404)


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def at(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


@pytest.mark.parametrize("path", ["png", "unstated", "to//png", "hops/2", "letters", "png?a=b c".replace(" ", "%20")])
def test_a_picture_comes_whole(server, path):
    assert download(at(server, path), HERE) == png()


def test_a_model_reads_it_only_where_it_may(server):
    model, short = tiny_model(), {"max_new_tokens": 4}
    expected = model.generate("a", PICTURE, **short)
    assert model.generate("a", at(server, "png"), allow_hosts=HERE, **short) == expected
    assert model.session(images=at(server, "png"), allow_hosts=HERE).ask("a", **short) == expected
    by_name = at(server, "png").replace("127.0.0.1", "Localhost")
    assert model.generate("a", by_name, allow_hosts=["LocalHost"], **short) == expected
    before = len(server.asked)
    for reading in ({}, {"allow_hosts": ["example.org"]}, {"allow_hosts": ["*"]}, {"tiles": "fit"}):
        with pytest.raises(InputError, match=r"^image 1 of 1: http://127\.0\.0\.1:\d+/png: host 127\.0\.0\.1 "):
            model.generate("a", at(server, "png"), **reading, **short)
        with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:\d+/gif: host 127\.0\.0\.1 "):
            model.generate("a", video=at(server, "gif"), **reading, **short)
    assert len(server.asked) == before
    assert model.generate("a", video=at(server, "gif"), allow_hosts=HERE, **short) == model.generate(
        "a", video=gif(), **short
    )
    for bad in ("127.0.0.1", None, 7, [7]):
        with pytest.raises(InputError, match="allow_hosts: got .*, expected a list"):
            model.generate("a", allow_hosts=bad)


@pytest.mark.parametrize(("tiles", "times"), [("2x3", 1), ("fit", 2)])  # fit: its header first
def test_a_picture_in_tiles_is_not_downloaded_for_each_reading(server, tiles, times):
    model, reading = tiny_model(), {"tiles": tiles, "max_new_tokens": 4}
    expected, before = model.generate("a", [PICTURE] * 2, **reading), len(server.asked)
    assert model.generate("a", [at(server, "png")] * 2, allow_hosts=HERE, **reading) == expected
    assert len(server.asked) == before + 2 * times
    with pytest.raises(InputError, match=r"^image 2 of 2: http://127\.0\.0\.1:\d+/none: the server answers 404"):
        model.generate("a", [PICTURE, at(server, "none")], allow_hosts=HERE, **reading)


def test_an_address_may_hold_its_picture():
    model, short = tiny_model(), {"max_new_tokens": 4}
    picture, film = (f"data:image/x;base64,{base64.b64encode(make()).decode()}" for make in (png, gif))
    expected = model.generate("a", PICTURE, **short)
    asked = [{"type": "image", "url": picture}, {"type": "text", "text": "a"}]
    wrapped = f"data:image/png;base64,{base64.encodebytes(png()).decode()}"  # 76 characters a line, and one at the end
    assert wrapped.count("\n") > 1
    for same in (picture, picture.replace("data:", "DATA:"), picture.replace("base64", "Base64"), wrapped,
                 wrapped.replace("\n", "\r\n"), wrapped.replace("\n", "%0A")):  # fmt: skip
        assert model.generate("a", same, **short) == expected
    assert model.generate([{"role": "user", "content": asked}], **short) == expected
    for same in (film, film.replace("data:", "Data:")):
        assert model.generate("a", video=same, **short) == model.generate("a", video=gif(), **short)
    for bad in (picture[:-1], "data:" + "a" * 10**6, "DATA:" + "a" * 10**6, "data:image/png;base64," + "a" * 10**6):
        for given, name in (({"images": bad}, "image 1 of 1: data:"), ({"video": bad}, "data:")):
            reasons = "(it is torn|not a picture|broken video|reading video)"
            with pytest.raises(InputError, match=f"(?i)^{name}.{{,40}}: {reasons}") as error:
                model.generate("a", **given)
            assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("none", "the server answers 404"),
        ("short", "bytes are missing|IncompleteRead"),
        ("stated", "more than 100,000 bytes"),
        ("endless", "more than 100,000 bytes"),
        ("hops/9", "more than 3 redirects"),
        ("slow", "it took more than 0.5 seconds"),
        ("drip", "it took more than 0.5 seconds"),
        ("drip/90000", "it took more than 0.5 seconds"),
        ("to/file:///etc/passwd", "scheme 'file'; allowed: http, https"),
        ("to/http://example.org/a.png", "host example.org may not be asked; allowed: 127.0.0.1"),
        ("to/http://[::1/", "not a well-formed address"),
        ("to///[::1/", "not a well-formed address"),
        ("to/gopher://127.0.0.1/", "scheme 'gopher'"),
        ("to/http://a:b@127.0.0.1/", "user name or password"),
    ],
)
def test_what_does_not_come_is_a_sentence(server, path, sentence):
    started = time.monotonic()
    with pytest.raises(InputError, match=sentence):
        download(at(server, path), HERE, max_bytes=100_000, seconds=0.5)
    assert time.monotonic() - started < 3


def test_no_socket_stays_open_for_an_answer_that_is_refused(server, monkeypatch):
    sockets, connect = [], address.connect

    def noted(*arguments):
        connection = connect(*arguments)
        sockets.append(connection.sock)
        return connection

    monkeypatch.setattr(address, "connect", noted)
    with pytest.raises(InputError, match="the server answers 404") as error:
        download(at(server, "to//none"), HERE)
    assert [socket.fileno() for socket in sockets] == [-1, -1] and error.value  # held, with all that it refers to


INSIDE = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]",
          "0.0.0.0", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "100.64.0.1",
          "[2002:7f00:1::]", "[fec0::1]", "[::127.0.0.1]", "224.0.0.1", "[64:ff9b::7f00:1]"]  # fmt: skip


@pytest.mark.parametrize("host", INSIDE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_any_public_host_is_no_way_into_the_local_network(server, host, scheme, monkeypatch):
    monkeypatch.setattr(address, "connect", lambda *arguments: pytest.fail("it connected"))
    with pytest.raises(InputError, match="not on the public internet|cannot be reached"):
        download(f"{scheme}://{host}:{server.server_port}/png", ["*"])


@pytest.mark.parametrize(
    "bad",
    ["http://", "http:///png", "ftp://a/b", "file:///etc/passwd", "http://a\\@b/", "http://a b/", "http://a/\n", "http://[::1/",
     "http://a:99999/", "http://a:b@c/", "data://x", "://"],
)  # fmt: skip
def test_malformed_addresses_are_refused_before_any_question(bad, monkeypatch):
    monkeypatch.setattr(address.socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("it asked"))
    with pytest.raises(InputError):
        download(bad, ["*"])


@pytest.mark.parametrize("host", ["a" * 64 + ".org", "a..b", ".org"])
def test_names_that_no_host_can_have(host):
    with pytest.raises(InputError, match="is not the name of a host"):
        download(f"https://{host}/", ["*"])


def test_a_handshake_takes_no_longer_than_allowed():
    """A server that sends a byte of it now and then never runs into the socket's own limit."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connected, _ = listening.accept()
            with connected, contextlib.suppress(OSError):
                for byte in b"\x16\x03\x03\x40\0" + bytes(60):
                    connected.send(bytes([byte]))
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(InputError, match="it took more than 0.5 seconds"):
            download(f"https://127.0.0.1:{listening.getsockname()[1]}/", HERE, seconds=0.5)
        assert time.monotonic() - started < 3
        thread.join()


def test_a_name_is_waited_for_no_longer_than_allowed(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(address.socket, "getaddrinfo", lambda *arguments, **options: [over.wait(5)][1:])
    started = time.monotonic()
    with pytest.raises(InputError, match="it took more than 0.5 seconds"):
        download("http://pictures.example/a.png", ["*"], seconds=0.5)
    assert time.monotonic() - started < 3
    over.set()


def test_the_connection_goes_to_the_number_that_was_checked(server, monkeypatch):
    """A name that answers differently the second time is only asked once."""
    answers = iter([[(0, 0, 0, "", ("127.0.0.1", 0))]])
    ask = address.socket.getaddrinfo

    def resolve(host, *arguments, **options):
        return next(answers) if host == "pictures.example" else ask(host, *arguments, **options)

    monkeypatch.setattr(address.socket, "getaddrinfo", resolve)
    name = at(server, "png").replace("127.0.0.1", "pictures.example")
    assert download(name, ["pictures.example"]) == png()


def test_letters_of_a_query_are_sent_as_browsers_send_them(server):
    assert download(at(server, "png?name=bücher&as=100%25|\""), HERE) == png()
    assert server.asked[-1] == '/png?name=b%C3%BCcher&as=100%25|"'
