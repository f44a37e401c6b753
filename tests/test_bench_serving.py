"""The benchmark of servers counts what the clients really got."""

import pytest
from serving import serving, tiny_chat

from pocketlm.bench import serving as bench


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_chat(tmp_path_factory.mktemp("bench"), n_ctx=256), slots=2, ignore_eos=True) as running:
        yield running


def test_every_client_gets_all_its_tokens(server):
    answer = bench.ask(server.port, 3, 12)
    assert answer.tokens == 12
    assert 0 < answer.first <= answer.whole
    speed, firsts = bench.together(server.port, 5, 12)
    assert speed > 0
    assert len(firsts) == 5
    assert server.idle()


def test_a_client_without_an_answer_ends_the_run(server):
    with pytest.raises(SystemExit, match=r"3 of 3 clients have no answer; client \d: 400: .*max_tokens"):
        bench.together(server.port, 3, -2)
    with pytest.raises(SystemExit, match=r"2 of 2 clients have no answer; client \d: .*refused"):
        bench.together(bench.free_port(), 2, 1)
