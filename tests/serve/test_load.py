"""Short forms of `python -m benchmarks.serve`: many clients, many malformed requests, one server."""

import random

import pytest

from benchmarks import serve


@pytest.fixture(scope="module")
def server(calibrated):
    with serve.serving(str(calibrated), "--decode-concurrency", 4) as one:
        yield one


def test_malformed_requests_get_a_4xx_and_leave_it_serving(server):
    found = serve.send_malformed(*server, count=400, seed=1)
    assert found["wrong"] == {}
    assert {400, 403, 404, 405, 411, 413, 431} <= set(found["statuses"])
    assert found["holds"]


def test_many_clients_meet_no_server_error_and_memory_stays(server):
    serve.load(*server, clients=24, seconds=3)  # until all that is made once is made
    found = serve.load(*server, clients=24, seconds=4)
    assert found["wrong"] == {}
    assert found["holds"], found
    assert found["tokens"] > 100


def test_a_sound_request_would_be_told_from_a_malformed_one(server):
    """The check above can fail: 200 is no status of a malformed request."""
    sound = serve._request(b'{"messages": [{"role": "user", "content": "fox"}], "max_tokens": 1}')
    assert sound != serve.malformed(random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "malformed", lambda rng: sound.replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n"))
        assert not serve.send_malformed(*server, count=1, seed=0)["holds"]
