"""What attacks a server on somebody's computer is refused: other sites, other names, no key, paths."""

import argparse
import gzip
import json
import socket
from pathlib import Path

import pytest
from serving import Reply, everything, hello, path_fixture, server_fixture, serving, wait_until  # noqa: F401

from pocketlm.cli import main
from pocketlm.serve import command, guard
from pocketlm.serve import page as page_module
from pocketlm.serve.guard import Policy

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil",
                                  "[::2]", "192.168.1.5", "127.0.0.1@evil", "xn--lcalhost-55a", "a\tb",
                                  "localhost:x", None])  # fmt: skip
def test_a_name_that_leads_here_from_elsewhere_is_refused(server, host):
    """DNS rebinding; an empty or missing Host is no way around it."""
    reply = server.get("/v1/models", Host=host)
    assert reply.status in (400, 403)
    assert b"Tiny" not in reply.body
    assert reply.status == 400 or "a proxy in front has to send localhost" in reply.error["message"]  # nginx: its upstream's


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:1", "[::1]:8642", "LOCALHOST:8642", "chat.localhost"])
def test_this_computers_own_names_are_not(server, host):
    assert server.get("/v1/models", Host=host).status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", "", "http://localhost"])
def test_a_page_of_another_site_is_refused(server, origin):
    for reply in (server.post(CHAT, hello(), Origin=origin), server.get("/v1/models", Origin=origin),
                  server.ask("OPTIONS", CHAT, {"Origin": origin, "Access-Control-Request-Method": "POST"})):  # fmt: skip
        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers


def test_without_an_origin_the_browser_says_where_a_request_comes_from(server):
    for site in ("cross-site", "same-site"):
        assert server.get("/v1/models", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
        assert server.get("/v1/models", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 403
        assert server.get("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 200, "a link to the page is a link"
    assert server.get("/v1/models", Sec_Fetch_Site="same-origin").status == 200


def test_a_form_of_another_site_cannot_ask(server):
    """What a browser sends without asking first: three kinds of content, none of which is taken."""
    form = "application/x-www-form-urlencoded"
    for kind in ("text/plain", form, "multipart/form-data; boundary=x", None, "application/jsonp"):
        reply = server.ask("POST", CHAT, {"Content-Type": kind}, json.dumps(hello()).encode())
        assert reply.status == 415
    kind = "Application/JSON; charset=utf-8"
    assert server.ask("POST", CHAT, {"Content-Type": kind}, json.dumps(hello()).encode()).status == 200


def test_a_compressed_body_is_not_unpacked(server):
    body, headers = json.dumps(hello()).encode(), {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    reply = server.ask("POST", CHAT, headers, gzip.compress(body))
    assert (reply.status, reply.json["error"]["message"]) == (415, "the body must not be compressed")
    assert server.ask("POST", CHAT, {**headers, "Content-Encoding": "identity"}, body).status == 200


def test_the_pages_of_one_site_may_be_let_in(path):
    with serving(path, policy=Policy(origins=("https://friend.example",))) as server:
        asked = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
        preflight = server.ask("OPTIONS", CHAT, asked)
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
        assert preflight.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"], "as OpenAI's asks"
        odd = server.ask("OPTIONS", CHAT, {**asked, "Access-Control-Request-Headers": "x;y"})
        assert odd.headers["access-control-allow-headers"] == ""
        assert "access-control-allow-credentials" not in preflight.headers
        answer = server.post(CHAT, hello(), Origin="https://friend.example")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://friend.example")
        assert server.post(CHAT, hello(), Origin="https://friend.example.evil").status == 403


@pytest.mark.parametrize("address", ["/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page/chats/..%2f..%2fx",
                                     "/page/chats/%2e%2e", "/page/chats/a%00b", "/page/chats/..",
                                     "//etc/passwd", "/page/chats/%E2%80%AE",
                                     "/page.html",
                                     "/serve/page.html", "/page/chats/a/b/c"])  # fmt: skip
def test_no_path_leads_to_a_file(server, address):
    for method in ("GET", "POST"):
        headers = {guard.TOKEN: server.policy.token, "Content-Type": "application/json"}
        reply = server.ask(method, address, headers, b'{"messages": [], "revision": ""}')
        assert reply.status in (400, 404, 405), (method, address, reply.body)


def test_what_a_client_sends_becomes_no_header(server):
    """Header injection: texts of a request come back as JSON, and nowhere else."""
    evil = "x\r\nSet-Cookie: a=b\r\n\r\n"
    for reply in (server.post(CHAT, hello(model=evil)), server.post(CHAT, hello(**{evil: 1})),
                  server.get("/v1/models/x%0d%0aSet-Cookie:%20a=b"), server.get("/%0d%0aSet-Cookie:a")):  # fmt: skip
        assert "set-cookie" not in reply.headers
    for broken in (b"GET /\r\n x HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n b: c\x00\r\n\r\n"):
        assert Reply(server.raw(broken)).status == 400
    split = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
    split += b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = server.raw(split)
    assert Reply(found).status == 400
    assert found.count(b"HTTP/1.1") == 1, "two lengths: request smuggling"


def test_the_page_may_do_nothing_but_its_own(server):
    reply = server.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert server.policy.token.encode() not in reply.body


def test_the_page_is_small_and_asks_nobody_else():
    html = Path(page_module.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 60_000
    assert "innerHTML" not in html
    assert "insertAdjacentHTML" not in html
    words = html.replace("http://www.w3.org/2000/svg", "").split('"')
    assert not [word for word in words if word.startswith(("http:", "https:", "//"))]


def test_conversations_want_the_pages_token(server):
    for address in ("/page/facts", "/page/chats", "/page/chats/x"):
        assert server.get(address).status == 401
        assert server.get(address, **{guard.TOKEN: "wrong"}).status == 401
        assert server.get(address, **{guard.TOKEN: server.policy.token}).status in (200, 404)
    assert server.post("/page/chats", {"messages": []}).status == 401


def test_a_code_in_an_address_is_good_once(server):
    code = server.page.one_time_code()
    assert server.post("/page/enter", {"code": code}).json == {"token": server.policy.token}
    for body in ({"code": code}, {"code": ""}, {"code": None}, {}):
        assert server.post("/page/enter", body).status == 401
    assert server.post("/page/enter", []).status == 400
    assert server.post("/page/enter", {"code": server.policy.token}).status == 200


def test_with_a_key_nobody_asks_without_it(path):
    with serving(path, policy=Policy(key="s3cret")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"X-Api-Key": "S3cret"},
                        {"Authorization": "Bearer "}, {"Authorization": "Bearer sécret"}):  # fmt: skip
            reply = server.post(CHAT, hello(), **headers)
            assert (reply.status, reply.error["type"]) == (401, "authentication_error")
            assert server.get("/metrics", **headers).status == 401
        assert server.post(CHAT, hello(), Authorization="Bearer s3cret").status == 200
        assert server.post(CHAT, hello(), X_Api_Key="s3cret").status == 200
        assert server.post(CHAT, hello(), **{guard.TOKEN: server.policy.token}).status == 200, "the page has its token"
        for public in ("/health", "/v1/models", "/"):
            assert server.get(public).status == 200


def test_another_address_wants_a_key_or_an_explicit_word(path, capsys):
    assert main(["serve", str(path), "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "--api-key" in error
    assert "--open" in error
    assert main(["serve", str(path), "--cors", "*"]) == 2
    assert main(["serve", str(path), "--slots", "0"]) == 2
    assert main(["serve", str(path), "--host", "no address"]) == 2


def test_an_address_may_be_in_brackets_as_in_an_url():
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    assert parser.parse_args(["--host", "[::1]"]).host == "::1"


@pytest.mark.parametrize("key", ["sécret", "two words", "line\n", " "])
def test_a_key_that_no_request_can_send_is_refused(path, server, key, monkeypatch, capsys):
    words = ["serve", str(path), "--port", str(server.port)]  # which is taken: a key that is let through ends there
    assert main([*words, "--api-key", key]) == 2
    monkeypatch.setenv("POCKETLM_API_KEY", key)
    assert main(words) == 2
    assert [line.startswith("pocketlm: --api-key: ") for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_a_taken_port_is_one_line(path, server, capsys):
    assert main(["serve", str(path), "--port", str(server.port)]) == 1
    assert capsys.readouterr().err == (
        f"pocketlm: port {server.port} is taken by another program; choose another one with --port, or any with --port 0\n"
    )


OPEN, KEYED = Policy("0.0.0.0"), Policy("0.0.0.0", key="k")


@pytest.mark.parametrize(("policy", "host", "passes"), [
    (OPEN, "192.168.1.5", True), (OPEN, "laptop.local", True), (OPEN, "evil.example", False), (OPEN, "", False),
    (OPEN, socket.gethostname(), True), (KEYED, "evil.example", True), (KEYED, "", False), (OPEN, "[fe80::1]:80", True),
])  # fmt: skip
def test_in_a_network_names_are_local_or_a_key_is_needed(policy, host, passes):
    headers = {"host": host, "authorization": "Bearer k"}
    if passes:
        policy.check("GET", "/v1/models", headers)
    else:
        with pytest.raises(guard.ApiError):
            policy.check("GET", "/v1/models", headers)
