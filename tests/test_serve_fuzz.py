"""2,000 malformed requests in every run; `tests/fuzz_serve.py` makes them, and more when it is run by hand."""

from fuzz_serve import many_clients
from serving import hello, serving, tiny_chat, wait_until


def test_malformed_requests_are_refused_and_the_server_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with serving(tiny_chat(tmp_path, n_ctx=64)) as server:
        wanted = server.post("/v1/chat/completions", hello()).json["choices"]
        seen = many_clients(server, 2000, seed=1)
        wait_until(server.idle)
        assert sum(n for status, n in seen.items() if 400 <= status < 500) > 1000
        assert server.post("/v1/chat/completions", hello()).json["choices"] == wanted
        wait_until(lambda: not server.server.server_state.tasks)  # the last one ends after its answer was read
