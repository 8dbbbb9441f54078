"""The HTTP service: the personaliser's verbs, limits, and no request that it falls over."""

import json
import threading
import time
from urllib.request import urlopen

import pytest
import schemathesis
import torch
import uvicorn
import worlds
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings, strategies
from test_serving import BySign, people, serve

from envs.rules import Rules
from serving import StoreBusyError, service
from serving.personaliser import Personaliser
from serving.service import create_app


@pytest.fixture(scope="module")
def scenario():
    return worlds.digits("side").scenario


@pytest.fixture
def personaliser(scenario, tmp_path):
    with serve(scenario, tmp_path, keep=2) as found:
        yield found


@pytest.fixture
def client(personaliser):
    with TestClient(create_app(personaliser, megabytes=1)) as found:
        yield found


def shown(scenario, user):
    inputs, labels = people(scenario)[user]
    return {"user": user, "inputs": inputs.tolist(), "labels": labels.tolist(), "cost_weight": 0.1}


def test_the_verbs_are_the_personalisers(scenario, personaliser, client):
    first, second = [*people(scenario)][:2]
    for user in (first, second):
        given = client.post("/enroll", json=shown(scenario, user))
        assert given.status_code == 200 and given.json()["labels"] == 20
        assert tuple(given.json()["pathways"]) == personaliser.describe(user).pathways
    inputs = people(scenario, "query")[first][0][:3]
    asked = {"users": [first, second, "eve"], "inputs": inputs.tolist(), "unknown": "bare"}
    answer = client.post("/predict", json=asked).json()
    expected = personaliser.predict([first, second, "eve"], inputs, "bare")
    torch.testing.assert_close(torch.tensor(answer["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert answer["classes"] == expected.argmax(1).tolist()
    updated = client.post("/update", json={**shown(scenario, first), "inputs": inputs.tolist(), "labels": [0, 1, 2]})
    assert updated.status_code == 200 and updated.json()["labels"] == 3
    assert client.post("/forget", json={"users": [first, "eve"]}).json() == {"forgotten": 1}
    assert client.get("/stats").json()["enrolled"] == 1
    assert "dsa_enrolled 1\n" in client.get("/metrics").text
    assert client.get("/health").json() | {"pathways": []} == {
        "status": "ok",
        "classes": 10,
        "input": [1, 8, 8],
        "pathways": [],
    }
    assert client.get("/openapi.json").status_code == client.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "code", "said"),
    [
        ("/predict", {"users": ["eve"], "inputs": [[[[0.0] * 28] * 28]]}, 404, "not enrolled: 'eve'"),
        ("/update", {"user": "eve", "inputs": [[[[0.0] * 28] * 28]], "labels": [1]}, 404, "'eve' is not enrolled"),
        ("/predict", {"users": ["eve"], "inputs": [[[[0.0]], [[0.0, 1.0]]]]}, 422, "of one shape"),
        ("/predict", {"users": ["eve"], "inputs": ["a text"]}, 422, "reads"),
        ("/predict", {"users": ["eve"], "inputs": [[[[0.0] * 28] * 28]], "unknown": "guess"}, 422, "unknown"),
        ("/enroll", {"user": "x" * 257, "inputs": [[[[0.0] * 28] * 28]], "labels": [1]}, 422, "256"),
        ("/enroll", {"user": "ann", "inputs": [[[[0.0] * 28] * 28]], "labels": [10]}, 422, "0 to 9"),
        ("/enroll", {"user": "ann", "inputs": [[[[0.0] * 28] * 28]], "labels": [1]}, 422, "say which one"),
        ("/enroll", {"user": "ann", "inputs": [[[[0.0] * 28] * 28]], "labels": [True]}, 422, "valid integer"),
        ("/enroll", {"user": "ann", "inputs": [[[[0.0] * 28] * 28]], "labels": ["1"]}, 422, "valid integer"),
        ("/enroll", {"user": "ann", "inputs": [[[[1e300] * 28] * 28]], "labels": [1], "cost_weight": 0.1}, 422, "infinite"),
        ("/enroll", {"user": "ann", "inputs": [], "labels": []}, 422, "at least 1"),
        ("/forget", {"users": ["eve"], "all": True}, 422, "Extra inputs"),
        ("/forget", {"users": "eve"}, 422, "valid list"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(client, path, body, code, said):
    answer = client.post(path, json=body)
    assert answer.status_code == code and said in json.dumps(answer.json())


def test_bodies_have_a_limit_and_must_be_json(client):
    assert client.post("/forget", content=b'{"users": ["' + b"a" * 1_000_000 + b'"]}').status_code == 413

    def drops():
        for _ in range(12):
            yield b" " * 100_000

    assert client.post("/forget", content=drops()).status_code == 413
    for wrong in (b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"users": ["\\ud800"]}', b'{"users": [NaN]}'):
        answer = client.post("/forget", content=wrong, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), wrong[:20]


def test_refusals_do_not_repeat_what_was_sent(client):
    answer = client.post("/forget", json={"users": ["secret" * 1000], "more": "secret"})
    assert answer.status_code == 422 and "secret" not in answer.text and len(answer.text) < 500


def test_a_store_that_is_busy_is_503_and_said_in_the_log(scenario, personaliser, client, monkeypatch, caplog):
    def busy(*_):
        raise StoreBusyError("deleted, but their bytes may still be there")

    monkeypatch.setattr(personaliser, "forget", busy)
    answer = client.post("/forget", json={"users": ["ann"]})
    assert (answer.status_code, answer.json()["detail"]) == (503, "deleted, but their bytes may still be there")
    assert "/forget was answered with 503" in caplog.text


@pytest.mark.filterwarnings("ignore")  # of the tool, about itself
def test_a_thousand_random_requests_after_its_own_schema_do_not_break_it(personaliser, client):
    schema, codes = schemathesis.openapi.from_asgi("/openapi.json", client.app), []
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(
            max_examples=280, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        @given(case=operation.as_strategy())
        def ask(case):
            codes.append(case.call().status_code)

        ask()
    assert len(codes) >= 1000 and max(codes) < 500 and min(codes) == 200


@pytest.mark.filterwarnings("ignore")
def test_images_of_odd_sizes_and_contents_do_not_break_it(client):
    codes = []
    number = strategies.floats(width=32, allow_nan=False, allow_infinity=False) | strategies.integers() | strategies.none()
    shape = strategies.tuples(*(strategies.integers(*ends) for ends in ((1, 3), (0, 2), (0, 9), (0, 9))))
    label = strategies.integers(-1, 11)

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(shape, number, strategies.lists(label, min_size=1, max_size=3), strategies.sampled_from(["/enroll", "/update"]))
    def ask(size, value, labels, path):
        many, channels, height, width = size
        images = [[[[value] * width for _ in range(height)] for _ in range(channels)] for _ in range(many)]
        shown = {"user": "ann", "inputs": images, "labels": labels, "cost_weight": 0.1}
        codes.append(client.post(path, json=shown).status_code)
        codes.append(client.post("/predict", json={"users": ["ann"] * many, "inputs": images, "unknown": "bare"}).status_code)

    ask()
    assert {200, 422} <= {*codes} <= {200, 404, 422}


def test_it_answers_over_a_socket(personaliser):
    server = uvicorn.Server(uvicorn.Config(create_app(personaliser), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert json.load(answer)["status"] == "ok"
    finally:
        server.should_exit = True
        thread.join(30)


def test_unless_told_otherwise_it_listens_on_this_machine_alone(personaliser, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(Personaliser, "from_run", lambda run, store, **settings: asked.update(settings) or personaliser)
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: asked.update(settings))
    service.main(["run", "--store", str(tmp_path / "users.db"), "--keep", "3", "--num-threads", "1"])
    assert (asked["host"], asked["port"], asked["keep"], asked["slots"]) == ("127.0.0.1", 8000, 3, 1024)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="error: nowhere is not a run"):
        service.main(["nowhere", "--store", str(tmp_path / "users.db")])


def test_the_personaliser_can_be_served_with_a_fixed_price(scenario, tmp_path):
    with Personaliser(scenario, BySign(), Rules(0.1), tmp_path / "users.db") as fixed, TestClient(create_app(fixed)) as client:
        body = {key: value for key, value in shown(scenario, next(iter(people(scenario)))).items() if key != "cost_weight"}
        assert client.post("/enroll", json=body).json()["cost_weight"] == 0.1
