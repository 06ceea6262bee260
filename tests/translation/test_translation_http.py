"""The engines behind an address, against real servers that misbehave."""

import json
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from loopback import CAPTCHA, Loopback, translated

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.engine import (
    Fault,
    Refusal,
    Rejection,
    Unreachable,
    create_engine,
)
from clseave_cli.core.translation.web import address, retry_after
from clseave_cli.errors import TranslationError, UsageError


def _engine(server, target="de", **options):
    config = TranslateConfig(engine=server.kind, url=server.url, timeout_seconds=0.5, **options)
    return create_engine(config, "en", target)


def _always(server, fault):
    server.fault = lambda handler, body, texts: fault(handler, body, texts) or True


def test_translates_and_says_who_asks(server):
    engine = _engine(server)
    texts = ["A man & <b>two</b> dogs.", 'He says "100 %".', "naïve 犬 😀 العربية", "a+b=c?&q=1#x"]
    answers = [answer for text in texts for answer in engine.translate([text], 0)]
    assert answers == [translated(text) for text in texts]
    assert len(server.agents - {""}) == 1 and server.agents.pop().startswith("clseave/")
    engine.close()


@pytest.mark.parametrize(("lang", "code"), [("zh", "zh-CN"), ("zh-Hant", "zh-TW"), ("he", "iw")])
def test_google_uses_its_own_codes_and_one_request_a_text(google, lang, code):
    engine = _engine(google, lang)
    assert engine.translate(["A man."], 0) == [translated("A man.", code)]
    assert google.last_request["tl"] == [code] and google.last_request["sl"] == ["en"]
    assert engine.limits.batch_size == 1


@pytest.mark.parametrize(
    ("text", "element"), [("?!", "result-container"), ("Berlin", "result-container"), ("犬ß", "t0")]
)
def test_google_pages_without_charset_are_utf8_and_may_repeat_the_text(google, text, element):
    page = f'<div class="{element}">{text}</div>'.encode()
    _always(google, lambda h, body, texts: h.send(200, page, "text/html"))
    assert _engine(google).translate([text], 0) == [text]


def test_googles_page_for_robots_is_a_captcha(google):
    _always(google, lambda h, b, t: h.send(302, b"", Location="https://google.com/sorry/index"))
    with pytest.raises(Refusal, match="captcha"):
        _engine(google).translate(["A man."], 0)


def test_a_closed_port_is_unreachable():
    with Loopback("google") as server:
        engine = _engine(server)
    with pytest.raises(Unreachable, match="cannot be reached; is the address right"):
        engine.translate(["A man."], 0)


def test_libre_batches_and_the_servers_own_codes(libre):
    texts = [f"A man {index}." for index in range(10)]
    translations = [translated(text, "zh-Hans") for text in texts]
    assert _engine(libre, "zh").translate(texts, 0) == translations
    assert libre.last_request["source"] == "en" and libre.last_request["target"] == "zh-Hans"
    assert "api_key" not in libre.last_request
    with pytest.raises(TranslationError, match="does not know the language ko"):
        _engine(libre, "ko").translate(["A man."], 0)


def test_libre_key_is_sent_and_never_shown(libre, monkeypatch):
    monkeypatch.setenv("LIBRETRANSLATE_API_KEY", "secret-key-1")
    engine = _engine(libre)
    engine.translate(["A man."], 0)
    assert libre.last_request["api_key"] == "secret-key-1"
    _always(libre, lambda h, body, texts: h.send(403, b'{"error": "Invalid API key secret-key-1"}'))
    with pytest.raises(Refusal) as refusal:
        engine.translate(["A man."], 0)
    assert "secret" not in f"{refusal.value!r} {engine.identity!r} {engine.licence}"
    assert "HTTP 403" in str(refusal.value)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (lambda h, b, t: h.send(429, b"", Retry_After="7"), Refusal, "HTTP 429"),
        (lambda h, b, t: h.send(403, b"no"), Refusal, "HTTP 403"),
        (lambda h, b, t: h.send(500, b"oops"), Fault, "HTTP 500"),
        (lambda h, b, t: h.send(503, b"", Retry_After="7"), Fault, "HTTP 503"),
        (lambda h, b, t: h.send(503, b"", Retry_After="\u00b2"), Fault, "HTTP 503"),
        (lambda h, b, t: h.send(200, b"", "text/html"), Fault, "an empty answer"),
        (lambda h, b, t: h.send(200, b"[" * 99_999), Fault, "complete"),
        (lambda h, b, t: h.send(200, CAPTCHA, "text/html"), Refusal, "captcha"),
        (lambda h, b, t: h.send(413, b""), Rejection, "HTTP 413"),
        (lambda h, b, t: h.send(400, b"{}"), Rejection, "HTTP 400"),
        (lambda h, b, t: h.send(401, b""), TranslationError, "API key is missing or wrong"),
        (lambda h, b, t: h.send(404, b""), TranslationError, "Check --url"),
        (lambda h, b, t: h.half_send(b, "application/json", True), Fault, "broke off"),
        (lambda h, b, t: h.half_send(b, "text/html", False), Fault, "complete"),
        (lambda h, b, t: h.send(200, b"<html>nice weather</html>", "text/html"), Fault, "complete"),
        (lambda h, b, t: threading.Event().wait(1.0), Fault, r"no answer within 0\.5 s"),
        (lambda h, b, t: h.hang_up(), Fault, "broke off|the connection"),
    ],
)  # fmt: skip
def test_faults(server, fault, kind, said):
    engine = _engine(server)
    assert engine.translate(["A man."], 0) == ["deA deman."]
    _always(server, fault)
    with pytest.raises(kind, match=said) as caught:
        engine.translate(["A man."], 0)
    assert type(caught.value) is kind
    assert "127.0.0.1" in str(caught.value) and "A man" not in str(caught.value)
    if said in ("HTTP 429", "HTTP 503"):
        assert isinstance(caught.value, Fault)
        assert caught.value.retry_after in (7, None if said == "HTTP 503" else 7)


@pytest.mark.parametrize(
    "answer",
    [{"translatedText": 3}, {"translatedText": [1]}, [], "x", {"error": "busy"}, {}, None],
)
def test_libre_answers_of_another_shape(libre, answer):
    engine = _engine(libre)
    _always(libre, lambda h, body, texts: h.send(200, json.dumps(answer).encode()))
    with pytest.raises(Fault, match="an answer without translations"):
        engine.translate(["A man.", "A dog."], 0)


@pytest.mark.parametrize("what", ["status", "header", "body"])
def test_a_dripping_server_is_cut_off(google, what):
    def drip(handler, body, texts):
        if what != "status":
            handler.send_response(200)
            handler.send_header("Content-Type", "text/html")
            handler.send_header("Content-Length", "1000")
        if what == "body":
            handler.end_headers()
        else:
            handler.flush_headers()
        for _ in range(100):  # a byte now and then keeps every read alive
            try:
                handler.wfile.write(b"H")
                handler.wfile.flush()
            except OSError:
                return
            if over.wait(0.05):
                break
        handler.close_connection = True

    over = threading.Event()
    _always(google, drip)
    with pytest.raises(Fault, match=r"no answer within 0\.5 s"):
        _engine(google).translate(["A man."], 0)
    over.set()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(server, monkeypatch, status):
    """Neither with the key, nor to wherever an address of the network may lead."""
    monkeypatch.setenv("LIBRETRANSLATE_API_KEY", "secret-key-1")
    with Loopback("libre") as other:
        engine = _engine(server)
        engine.translate(["A man."], 0)
        _always(server, lambda h, b, t: h.send(status, b"", Location=f"{other.url}/x?key=1"))
        with pytest.raises(TranslationError, match=rf"redirects to {other.url}/x; .*--url") as said:
            engine.translate(["A man."], 0)
        assert not isinstance(said.value, Fault) and "secret" not in str(said.value)
        assert other.requested == []


@pytest.mark.parametrize(
    ("options", "target", "error", "message"),
    [
        ({"engine": "babelfish"}, "de", UsageError,
         "no such engine; choose from nmt, google, libre, file"),
        ({"engine": "google"}, "tlh", TranslationError,
         r"does not know the language tlh; it knows: af "),
        ({"engine": "libre"}, "de", UsageError, "--url is missing"),
        *(
            ({"engine": name, "url": url}, "de", UsageError, "expected an address such as http")
            for name in ("google", "libre")
            for url in ("x.example.org", "ftp://x.org", "http://", "file:///etc", "http://x:port")
        ),
    ],
)  # fmt: skip
def test_engines_and_addresses_that_are_refused(options, target, error, message):
    with pytest.raises(error, match=message):
        create_engine(TranslateConfig(**options), "en", target)


def test_retry_after_header():
    assert retry_after(None) is None
    assert retry_after(" 120 ") == 120
    for header in ("soon", "²", "１２", "١٢", "-1", "1e3", "Wed, 21 Oct 99999 07:28:00 GMT"):
        assert retry_after(header) is None
    assert retry_after("9" * 5000) == float("inf")
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < (retry_after(format_datetime(later, usegmt=True)) or 0) <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_addresses_show_no_secrets():
    assert address("https://me:pw@x.org:8443/m?q=text&key=1#a") == "https://x.org:8443/m"
