"""The HTTP service through Starlette's test client, with a model that watches what it is given."""

import base64
import contextlib
import http.client
import io
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel
from PIL import Image
from tiny_world import png

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

from starlette.testclient import TestClient

from clseave_cli.commands import serve as serve_command
from clseave_cli.core.config import ServeConfig
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.prediction import inference, predictor, service
from clseave_cli.core.prediction.service import create_app
from clseave_cli.errors import ExtraMissing


def picture(colour=(200, 20, 20), size=(40, 30), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def serve(model):
    """Opens a client to a service with some options; closes it at the end."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            app = create_app(model, ServeConfig(**options))
            client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
            return stack.enter_context(client)

        yield start


def ask(client, image=None, hypothesis="A sentence.", **form):
    image = picture() if image is None else image
    return client.post("/predict", files={"image": image}, data={"hypothesis": hypothesis, **form})


def test_an_answer_is_the_label_and_three_probabilities(serve):
    answer = ask(serve(), picture((10, 240, 30)), "Das ist grün.", lang="de")
    assert answer.status_code == 200
    body = answer.json()
    assert body["label"] == "neutral"
    assert list(body["probabilities"]) == ["entailment", "neutral", "contradiction"]
    assert sum(body["probabilities"].values()) == pytest.approx(1)
    assert body | {"probabilities": None} == {
        "hypothesis": "Das ist grün.", "lang": "de", "label": "neutral", "probabilities": None,
        "model": "align-de", "truncated": False, "warning": None,
    }  # fmt: skip
    body = ask(serve(), hypothesis="x" * 51).json()  # no language: English
    assert body["truncated"] is True and body["lang"] == "en"
    warning = ask(serve(), hypothesis="赤い円があります。").json()["warning"]
    assert warning == "the sentence is not in the script of en; check the language."


def test_below_a_threshold_the_answer_is_unsure(serve, model):
    model.calibrations["de"] = Calibration(thresholds={"neutral": 0.9}, precision=0.95)
    green = picture((10, 240, 30))
    assert [ask(serve(), green, lang=lang).json()["label"] for lang in ("de", "en")] == [
        "unsure", "neutral",
    ]  # fmt: skip
    assert ask(serve(), lang="de").json()["label"] == "entailment"  # has no threshold
    judged = serve().get("/openapi.json").json()["components"]["schemas"]["Judged"]
    assert "unsure" in judged["properties"]["label"]["enum"]
    assert "unsure:" in serve().get("/").text


def test_where_the_model_looked_is_drawn_for_those_who_ask(serve, model):
    assert "explanation" not in ask(serve(), explain="true").json()  # a head without patches
    model.cells = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert "explanation" not in ask(serve()).json()
    head, _, encoded = ask(serve(), explain="true").json()["explanation"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).width == 480


def test_metrics_count_answers_and_refusals(serve):
    client = serve()
    ask(client), ask(client, hypothesis="Two."), ask(client, image=b"none")
    client.get("/health")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert 'clseave_requests_total{status="200"} 2' in lines
    assert 'clseave_requests_total{status="400"} 1' in lines
    assert "clseave_sentences_total 2" in lines and "clseave_waiting 0" in lines
    names = [line.split("{")[0].split(" ")[0] for line in lines if line[0] != "#"]
    assert {f"# TYPE {name}" for name in names} == {
        line.rpartition(" ")[0] for line in lines if line[0] == "#"
    }


@contextmanager
def _held(model, app, send, reds):
    """Sends a photo of each red, all but the first of which wait; the block ends the wait."""
    with ThreadPoolExecutor(len(reds)) as pool:
        model.gate.clear()
        # One after the other, or the first is computed together with others.
        answers = [pool.submit(send, picture((reds[0], 0, 0)))]
        _wait_until(lambda: model.num_prepared == 1)
        answers += [pool.submit(send, picture((red, 0, 0))) for red in reds[1:]]
        _wait_until(lambda: len(app.state.batcher.waiting) == len(reds) - 1)
        try:
            yield answers
        finally:
            model.gate.set()


def test_requests_that_come_while_one_is_computed_go_together(serve, model):
    client = serve(batch_size=4)
    reds = [number * 20 for number in range(9)]

    def send(image):
        red = Image.open(io.BytesIO(image)).getpixel((0, 0))[0]
        return ask(client, image, lang=("en", "de")[red // 20 % 2])

    with _held(model, client.app, send, reds) as futures:
        pass
    answers = [each.result().json() for each in futures]
    assert model.image_batches == [1, 4, 4]
    assert {lang for lang, _ in model.sentence_batches} == {"en", "de"}
    # Every client gets its own answer: the redder the picture, the likelier the first label.
    likelihoods = [answer["probabilities"]["entailment"] for answer in answers]
    assert likelihoods == sorted(likelihoods) and len(set(likelihoods)) == 9
    assert [answer["lang"] for answer in answers] == [*("en", "de") * 4, "en"]


def test_a_photo_is_decoded_and_encoded_once_and_the_oldest_forgotten(serve, model, monkeypatch):
    client = serve()
    first, second = ask(client), ask(client, hypothesis="Another one.")
    assert first.json()["probabilities"] == second.json()["probabilities"]
    assert (model.num_prepared, model.image_batches) == (1, [1])
    monkeypatch.setattr(predictor, "_KEPT_BYTES", 2 * 3 * 4)
    client = serve()
    for red in (0, 100, 200, 0):
        ask(client, picture((red, 0, 0)))
    assert model.num_prepared == 1 + 4


def test_more_requests_than_may_wait_are_turned_away(serve, model):
    """G12."""
    client = serve(max_waiting=2)
    with _held(model, client.app, partial(ask, client), (1, 2)) as inside:
        refused = ask(client)
    assert [each.result().status_code for each in inside] == [200, 200]
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
    assert ask(client).status_code == 200


def test_a_poisonous_request_fails_alone(serve, model):
    """G12."""
    client = serve()
    model.poison = 1.0
    with _held(model, client.app, partial(ask, client), (0, 10, 255, 20, 30)) as answers:
        pass
    assert [each.result().status_code for each in answers] == [200, 200, 500, 200, 200]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda scores: scores * np.nan, "align-de: probabilities are not finite"),
        (lambda scores: scores[:0], "the model failed on this request"),
        (lambda scores: 1 / 0, "the model failed on this request"),
    ],
    ids=["nan", "too few", "exception"],
)
def test_a_failure_of_the_model_hits_one_request_only(serve, model, broken, message):
    client = serve()
    model.broken_scores = broken
    answer = ask(client, lang="de")
    assert answer.status_code == 500 and message in answer.json()["detail"]
    model.broken_scores = None
    assert ask(client).status_code == 200


def test_large_pictures_are_decoded_one_after_another(serve, model):
    """G12: a file of a few bytes may unpack to a gigabyte."""
    inside, most = [], []
    prepare = model.prepare

    def watched(image):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        inside.pop()
        return prepare(image.resize((4, 4)))

    model.prepare = watched
    client = serve(max_megapixels=1)
    flat = [picture((red, 0, 0), (900, 700)) for red in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        codes = [answer.status_code for answer in pool.map(lambda each: ask(client, each), flat)]
    assert codes == [200] * 3 and max(most) == 1


@pytest.mark.parametrize(
    ("host", "code"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("ve.example", 200),
     ("evil.example", 400), ("localhost.evil.example", 400), ("", 400)],
)  # fmt: skip
def test_only_named_hosts_are_answered(serve, host, code):
    """G12."""
    client = serve(allowed_host=("ve.example",))
    assert client.get("/health", headers={"Host": host}).status_code == code


def test_several_sentences_about_one_photo(serve, model):
    data = {"hypothesis": ["A cat.", "A dog sleeps.", "It rains."], "lang": "de"}
    answer = serve(batch_size=2).post("/judge", files={"image": picture()}, data=data)
    assert [each["hypothesis"] for each in answer.json()["results"]] == data["hypothesis"]
    assert (model.num_prepared, model.image_batches) == (1, [1])


def test_languages_are_identified_where_the_extra_is(serve, monkeypatch):
    class Identifier:
        def __init__(self, languages):
            assert list(languages) == ["en", "de"]

        def identify(self, text):
            return ("de" if "ist" in text else "en"), 1.0

    monkeypatch.setattr(service, "LanguageIdentifier", Identifier)
    client = serve(lang=("auto",))
    assert client.get("/health").json()["auto"]
    sentences = {"Das ist rot.": "de", "It is red.": "en"}
    for sentence, lang in sentences.items():
        assert ask(client, hypothesis=sentence).json()["lang"] == lang
    assert ask(serve(), lang="auto", hypothesis="Das ist rot.").json()["lang"] == "de"


def test_without_the_extra_auto_is_refused(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    client = serve()
    assert not client.get("/health").json()["auto"] and ask(client, lang="auto").status_code == 422
    with pytest.raises(ExtraMissing, match="langid"):
        serve(lang=("auto",))


def test_what_waits_when_the_service_stops_is_turned_away(model, capfd):
    with _running(model) as (server, address):
        send = partial(_post, address)
        with _held(model, server.config.app, send, (0, 1, 2, 3)) as (first, *rest):
            server.should_exit = True
            assert [each.result() for each in rest] == [503] * 3
        assert first.result() == 200
    assert "Traceback" not in capfd.readouterr().err


def test_idle_connections_give_way(tmp_path):
    """G12, with 200 descriptors, and 600 clients that connect and say nothing."""
    script = (
        "import resource, socket, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from fake_model import FakeModel\n"
        "from clseave_cli.core.config import ServeConfig\n"
        "from clseave_cli.core.prediction.service import create_app, make_server\n"
        "listening = socket.create_server(('127.0.0.1', 0), backlog=512)\n"
        "print(listening.getsockname()[1], flush=True)\n"
        "make_server(create_app(FakeModel(), ServeConfig())).run(sockets=[listening])\n"
    )
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))
    with (tmp_path / "stderr").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        address = ("127.0.0.1", int(server.stdout.readline()))
        idle = [socket.create_connection(address) for _ in range(600)]
        try:
            assert _post(address, picture()) == 200
        finally:
            for each in idle:
                each.close()
            server.terminate()
            server.communicate(timeout=20)
        log.seek(0)
        assert log.read() == ""


@pytest.mark.parametrize(
    ("image", "code", "message"),
    [
        (b"", 400, "damaged or not an image"),
        (b"not an image", 400, "damaged or not an image"),
        (picture()[:60], 400, "damaged"),
        (picture(size=(1000, 1001)), 413, "more than 1 megapixels"),
        # A decompression bomb: its header is enough, it is never decoded.
        (png(60_000, 60_000, bytes(10**6)), 413, "megapixels"),
        (picture(kind="TIFF"), 400, "expected one of JPEG, PNG, WEBP, GIF, BMP"),
    ],
    ids=["empty", "text", "cut", "large", "bomb", "format"],
)
def test_bad_images_are_refused(serve, model, image, code, message):
    """G12."""
    answer = ask(serve(max_megapixels=1), image)
    assert answer.status_code == code
    assert message in answer.json()["detail"]
    assert model.image_batches == [] and model.num_prepared == 0


def test_forms_that_lack_a_part_or_are_unusable_are_refused(serve):
    client = serve()
    for form, message in (
        ({"hypothesis": " \n"}, "empty"),
        ({"hypothesis": "x" * 1001}, "longer than 1000 characters"),
        ({"lang": "fr"}, "available: en, de"),
        ({"lang": "../en"}, "available: en, de"),
    ):
        answer = ask(client, **form)
        assert answer.status_code == 422 and message in answer.json()["detail"]
    assert client.post("/predict", data={"hypothesis": "x"}).status_code == 422
    assert client.post("/predict", files={"image": picture()}).status_code == 422
    assert client.post("/predict", json={"hypothesis": "x"}).status_code == 422
    for kind, code in {"multipart/form-data; boundary=x": 422, "multipart/form-data": 400}.items():
        headers = {"Content-Type": kind}
        broken = client.post("/predict", content=b"--x\r\nnonsense", headers=headers)
        assert broken.status_code == code
    assert client.get("/predict").status_code == 405


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused(serve, announced):
    client = serve(max_megabytes=0.01)
    body = b"x" * 20_000
    content = body if announced else iter([body[:8000], body[8000:16000], body[16000:]])
    answer = client.post(
        "/predict", content=content,
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )  # fmt: skip
    assert answer.status_code == 413
    assert "larger than 0.01 MB" in answer.json()["detail"]


@pytest.mark.parametrize(("announced", "code"), [(b"100", 408), (b"50000000", 413)])
def test_a_body_that_never_arrives_is_given_up(model, monkeypatch, announced, code):
    """At once, where it announces that it is too long."""
    import asyncio

    monkeypatch.setattr(service, "_BODY_SECONDS", 0.05)
    app = create_app(model, ServeConfig())
    sent = []

    async def receive():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/predict", "query_string": b"",
        "headers": [
            (b"content-type", b"multipart/form-data; boundary=x"), (b"host", b"localhost"),
            (b"content-length", announced),
        ],
        "asgi": {"version": "3.0"}, "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == code


def test_bad_requests_leave_no_line_in_the_log(model, monkeypatch, caplog):
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(inference, "load_model", lambda *_, **__: model)
    codes = []

    def run(server, sockets):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        with TestClient(server.config.app, base_url="http://localhost") as client:
            codes.append(client.post("/predict", content=bytes(300), headers=headers).status_code)
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve_command.run(ServeConfig(port=0))
    assert codes == [400]
    assert [record for record in caplog.records if "multipart" in record.name] == []


def test_health_openapi_and_the_page(serve):
    client = serve()
    health = client.get("/health").json()
    assert (health["status"], health["languages"]) == ("ok", ["en", "de"])
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/health", "/ready", "/predict", "/judge"}
    responses = schema["paths"]["/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "408", "413", "422", "500", "503"}
    assert client.get("/docs").status_code == 404
    assert client.get("/ready").status_code == 200
    client.app.state.batcher.stop()
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    answer = client.get("/")  # the page brings all it needs
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "://" not in answer.text


@contextmanager
def _running(model):
    """A real server in a thread: itself, and its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = service.make_server(create_app(model, ServeConfig()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    _wait_until(lambda: server.started)
    yield server, listening.getsockname()
    server.should_exit = True
    thread.join()


def _post(address, image):
    """The status of the answer to one question."""
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % part
        for part in ((b"hypothesis", b"", b"A cat."), (b"image", b'; filename="i"', image))
    )
    connection = http.client.HTTPConnection(*address, timeout=30)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/predict", body + b"--x--\r\n", headers)
    with contextlib.closing(connection):
        return connection.getresponse().status


def _wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
