"""The server, asked by real clients: answers, errors, limits, and clients that leave."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.insight.trace import Trace
from engine.serving.refusal import RefusalError
from engine.serving.request import Limits, parse
from tests.mllama_checkpoint import write_mllama
from tests.noise import noise

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")  # which comes with openai
openai = pytest.importorskip("openai")

from tests.served import KEY, SHAPE, asked, data_url, post, serving, settled  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Any]:
    with serving(engine, keys=("other", KEY)) as running:
        yield running


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


# -- answers ---------------------------------------------------------------------------------------


def test_a_client_gets_the_engines_own_answer(engine: Engine, client: Any) -> None:
    """Whole and streamed, with the counts of both."""
    picture = data_url(1)
    solo = engine.generate("What is it?", [picture], max_new_tokens=9, ignore_eos=True)
    wanted = {"max_tokens": 9, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(
        model="tiny", messages=asked("What is it?", picture), **wanted
    )
    assert whole.choices[0].message.content == solo.text
    assert whole.choices[0].finish_reason == "length"
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (solo.prompt_tokens, 9)
    assert usage.prompt_tokens_details.image_tokens == solo.image_tokens
    assert usage.cache["policy"] == engine.policy.spec
    assert usage.cache["bytes"] == solo.cache.bytes_used
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=asked("What is it?", picture),
            stream=True,
            stream_options={"include_usage": True},
            **wanted,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == solo.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == solo.prompt_tokens + 9
    assert {(c.id, c.created, c.model) for c in chunks} == {
        (chunks[0].id, chunks[0].created, "tiny")
    }


def test_many_answers_and_their_probabilities(engine: Engine, client: Any) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=asked("Say something."),
        n=3,
        temperature=0.9,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=6,
        extra_body={"ignore_eos": True, "top_k": 50},
    )
    for choice in found.choices:
        options = {"temperature": 0.9, "seed": 5 + choice.index, "top_k": 50, "ignore_eos": True}
        alone = engine.generate("Say something.", max_new_tokens=6, logprobs=True, **options)
        assert choice.message.content == alone.text
        told = [token.logprob for token in choice.logprobs.content]
        assert told == pytest.approx(alone.logprobs, abs=1e-4)
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        # Bytes that make no character together are each shown as one that stands for any.
        shown = said.decode(errors="replace")
        assert all(part.strip() in shown for part in alone.text.split("\ufffd"))


def test_streamed_probabilities_are_told_once(client: Any) -> None:
    wanted = {"max_tokens": 7, "logprobs": True, "extra_body": {"ignore_eos": True}}
    ask = {"model": "tiny", "messages": asked("Say something.")}
    whole = client.chat.completions.create(**ask, **wanted).choices[0].logprobs.content
    streamed = []
    for chunk in client.chat.completions.create(**ask, **wanted, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [t.token for t in streamed] == [t.token for t in whole]
    assert len(streamed) == 7


def test_requests_together_are_requests_alone(engine: Engine, server: Any) -> None:
    """Other policies, lengths, pictures and seeds beside each other: none sees the others."""
    policies = ["full", "avl:floor=4", "sift", "h2o", "zipvl:tau=0.8,every=3", None]
    bodies = [
        {
            "messages": asked(f"What is in {n}?" + "!" * n, *[data_url(n)] * (n % 3)),
            "max_tokens": 4 + n,
            "temperature": 0.8 * (n % 2),
            "seed": n,
            "ignore_eos": True,
            "cache": policies[n % len(policies)],
        }
        for n in range(12)
    ]
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        found[n] = post(server, bodies[n]).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, body in enumerate(bodies):
        alone = engine.with_cache(body["cache"] or engine.policy)
        if alone.policy.name == "sift" and n % 3:  # over the stored beginning, again
            assert found[n] == post(server, body).json()["choices"][0]["message"]["content"]
            continue
        pictures = [data_url(n)] * (n % 3)
        options = {"max_new_tokens": 4 + n, "temperature": 0.8 * (n % 2), "seed": n}
        messages = [{"role": "user", "content": [*[{"type": "image"}] * len(pictures)]}]
        messages[0]["content"].append({"type": "text", "text": f"What is in {n}?" + "!" * n})
        result = alone.generate(messages, pictures, ignore_eos=True, **options)
        assert found[n] == result.text, n


# -- what is told besides --------------------------------------------------------------------------


def test_models_health_metrics_and_the_page(server: Any, client: Any) -> None:
    assert post(server, {"messages": asked("hi"), "max_tokens": 1, "ignore_eos": True}).is_success
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "local"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    for line in text.splitlines():
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2
        assert line.startswith("# ") or float(line.rsplit(" ", 1)[1]) >= 0
    assert 'lvlm:requests_total{finish_reason="length"}' in text


def test_who_watches_sees_what_an_observer_sees(engine: Engine, client: Any) -> None:
    """Of every pass the means over the layers, in bytes; beside them the pictures' own panels."""
    watch(engine, client, "avl:floor=4,prefill=1", Trace())


def test_features_are_watched_where_cross_layers_look_at_them(tmp_path: Path) -> None:
    folder = write_mllama(tmp_path / "m")
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    with (
        serving(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        watch(engine, client, "avl:cross=0.3,text=1,prefill=1", Trace(across=True))


def watch(engine: Engine, client: Any, spec: str, trace: Trace) -> None:
    options = {"max_new_tokens": 9, "ignore_eos": True}
    engine.with_cache(spec).generate("What?", [data_url(1)], observer=trace, **options)
    watched = client.chat.completions.create(
        model="tiny",
        messages=asked("What?", data_url(1)),
        max_tokens=9,
        stream=True,
        extra_body={"ignore_eos": True, "cache": {"policy": spec, "tiers": True}},
    )
    shown = [chunk.cache for chunk in watched if getattr(chunk, "cache", None)]
    (panel,) = shown[0]["panels"]
    tokens = panel["tokens"] + panel["newlines"]
    assert sorted(tokens) == list(range(len(trace.passes[0][0].tiers)))
    assert [each["step"] for each in shown] == list(range(len(trace.passes)))
    for each, moments in zip(shown, trace.passes, strict=True):
        core = torch.stack([(moment.tiers == 2).float() for moment in moments]).mean(0)
        stored = torch.stack([moment.bits / 64 for moment in moments]).mean(0)
        for name, expected in (("core", core), ("stored", stored)):
            told = torch.tensor(list(base64.b64decode(each[name]))) / 255
            assert (told - expected).abs().max() < 0.003


# -- what is refused -------------------------------------------------------------------------------

BAD = {
    "messages": [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": "hi"}] * 300},
        {"messages": asked("hi", *[data_url()] * 9)},
    ],
    "messages[0].role": [{"messages": [{"role": "tool", "content": "x"}]}],
    "messages[0].content": [{"messages": [{"role": "user", "content": []}]}],
    "messages[0].content[0].type": [
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}
    ],
    "messages[0].content[0].image_url": [
        {"messages": asked("hi", url)}
        for url in ("/etc/passwd", "file:///etc/passwd", "https://example.org/a.png", "car.jpg")
    ],
    "messages[0].tool_calls": [
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}
    ],
    "n": [{"n": 0}, {"n": 9}, {"n": True}, {"n": "2"}],
    "max_tokens": [
        {"max_tokens": 0},
        {"max_tokens": 10**9},
        {"max_tokens": 2, "max_completion_tokens": 3},
    ],
    "temperature": [{"temperature": -1}, {"temperature": "hot"}, {"temperature": float("nan")}],
    "top_p": [{"top_p": 0}, {"top_p": 1.5}],
    "top_logprobs": [{"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}],
    "stop": [{"stop": ["x"] * 17}, {"stop": [""]}, {"stop": 5}, {"stop": ["x" * 300]}],
    "stream": [{"stream": "yes"}],
    "stream_options": [
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"x": 1}},
    ],
    "tools": [{"tools": [{"type": "function"}]}],
    "response_format": [{"response_format": {"type": "json_object"}}],
    "logit_bias": [{"logit_bias": {"5": 1}}],
    "frequency_penalty": [{"frequency_penalty": 0.5}],
    "cache": [
        *({"cache": 5}, {"cache": {"x": 1}}, {"cache": {"policy": 5}}, {"cache": {"tiers": True}}),
        {"cache": {"tiers": True}, "stream": True},
        {"cache": {"tiers": True}, "messages": asked("hi", data_url())},
        {"cache": {"tiers": True}, "messages": asked("hi", data_url()), "stream": True, "n": 2},
    ],
    "tiers": [{"cache": {"tiers": 1}}],
    "colour": [{"colour": "red"}],
    "seed": [{"seed": 1.5}],
}  # fmt: skip


@pytest.mark.parametrize("param", BAD)
def test_a_wrong_field_is_named(param: str) -> None:
    for body in BAD[param]:
        given = body if param == "messages" else {"messages": asked("hi")} | body
        with pytest.raises(RefusalError) as caught:
            parse(given, "tiny", Limits())
        assert (caught.value.status, caught.value.param) == (400, param)
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 200


def test_what_asks_for_nothing_is_accepted_and_what_has_no_effect_is_told(server: Any) -> None:
    """Other models than the served one are refused."""
    body = {
        "messages": asked("hi"),
        "max_tokens": 1,
        "tools": [],
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "logit_bias": None,
    }
    answer = post(server, body)
    assert answer.status_code == 200
    assert answer.headers["x-without-effect"] == "metadata, user"
    assert post(server, body | {"model": "gpt-4o"}).status_code == 404


def test_the_key_comes_before_all_else(server: Any) -> None:
    """Before the body is read, on every route but health and the page."""
    for key in ("", "Bearer", "Bearer wrong", f"Basic {KEY}"):
        answer = post(server, b"no json at all", headers={"authorization": key})
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
    for route in ("/metrics", "/v1/models", "/anything"):
        assert httpx.get(server.url + route).status_code == 401
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_bodies_are_measured_and_of_one_kind(engine: Engine) -> None:
    with serving(engine, body=5000) as server:
        assert post(server, b"x" * 6000).status_code == 413
        endless = (b"x" * 1000 for _ in range(100))  # which says no length
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, content=endless, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert post(server, {}, headers={"content-type": "text/plain"}).status_code == 415
        assert post(server, b"{").status_code == 400
        assert post(server, b"[" * 4000).status_code == 400
        assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_pictures_of_strangers(server: Any) -> None:
    """One line each, and the server goes on."""
    bomb = BytesIO()
    noise(3, 3).resize((1, 1)).save(bomb, "PNG")
    header = bytearray(bomb.getvalue())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # of pixels, says the header
    for data, word in (
        (b"GIF89a", "too short"),
        (b"%PDF-1.7", "PDF"),
        (bytes(header), ""),
        (b"", ""),
    ):
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        answer = post(server, {"messages": asked("hi", url), "max_tokens": 1})
        assert answer.status_code == 400, data
        error = answer.json()["error"]
        assert word in error["message"] or not word
        assert "\n" not in error["message"]
    assert post(server, {"messages": asked("hi"), "max_tokens": 1}).status_code == 200


def test_what_can_never_fit_is_refused_with_its_numbers(engine: Engine) -> None:
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    with serving(engine, budget=40 * per_slot) as server:
        body = {"messages": asked("hi", data_url()), "max_tokens": 30, "cache": "full"}
        answer = post(server, body)
        assert answer.status_code == 400
        assert "slots of cache" in answer.json()["error"]["message"]
        long = post(server, {"messages": asked("hi " * 5000), "max_tokens": 3})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_errors_reach_the_client_library(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown cache policy"):
        client.chat.completions.create(
            model="tiny", messages=asked("hi"), extra_body={"cache": "nope"}
        )
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# -- many, slow and leaving ------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(engine: Engine) -> None:
    with serving(engine, rows=1, queue=1) as server:
        body = {"messages": asked("Tell me a long story."), "max_tokens": 400, "ignore_eos": True}
        statuses: list[Any] = []

        def ask() -> None:
            statuses.append(post(server, body))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in statuses if answer.status_code == 429]
        assert refused
        assert len(refused) < 8
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert {answer.status_code for answer in statuses} == {200, 429}


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_runs_for_a_client_that_has_left(engine: Engine, stream: bool) -> None:
    with serving(engine, rows=2) as server:
        body = {
            "messages": asked("Tell me a long story."),
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": stream,
        }
        url = f"{server.url}/v1/chat/completions"
        if stream:
            with httpx.stream("POST", url, json=body) as answer:
                assert answer.status_code == 200
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.3)
        began = time.monotonic()
        settled(server)
        assert time.monotonic() - began < 5


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    with serving(engine, seconds=0.3) as server:
        body = {"messages": asked("A story."), "max_tokens": 1900, "ignore_eos": True}
        answer = post(server, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        settled(server)


def test_draining_takes_nothing_new(engine: Engine) -> None:
    with serving(engine) as server:
        server.draining = True
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert post(server, {"messages": asked("hi")}).status_code == 503


def test_memory_that_runs_out_in_a_step_ends_its_rows_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.errors import CapacityError
    from engine.running.scheduler import Scheduler

    with serving(engine) as server:
        step, times = Scheduler.step, iter(range(10**6))

        def failing(self: Scheduler) -> Any:
            if next(times) == 6:
                raise CapacityError("out of memory while answering")
            return step(self)

        monkeypatch.setattr(Scheduler, "step", failing)
        answer = post(server, {"messages": asked("A story."), "max_tokens": 50, "ignore_eos": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        assert post(server, {"messages": asked("hi"), "max_tokens": 2}).status_code == 200


# -- any body --------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("model", "messages", "n", "stop", "seed", "stream", "stream_options", "logprobs", "tools")
MORE = ("temperature", "top_p", "top_k", "max_tokens", "top_logprobs", "cache", "ignore_eos")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, *MORE]) | st.text(max_size=6), values))
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    refusal = None
    try:
        assert parse(body, "tiny", Limits()).messages
    except RefusalError as error:
        refusal = error
    assert refusal is None or 400 <= refusal.status < 500
    assert refusal is None or json.dumps(refusal.body)


def test_limits_are_those_of_the_server() -> None:
    body = {"messages": asked("hi"), "max_tokens": 50}
    with pytest.raises(RefusalError):
        parse(body, "tiny", replace(Limits(), tokens=49))
    assert parse(body, "tiny", Limits()).options["max_new_tokens"] == 50


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], ("--api-key-file",)),
        (["--rows", "0"], ("--rows is 0",)),
        (["--port", "70000"], ("--port is 70000",)),
        (["--image", "car.jpg"], ("--image",)),
        (["--cache", "nope"], ("unknown cache policy",)),
        (["--deadline", "0"], ("--deadline is 0",)),
        (["--cache-gb", "-1"], ("--cache-gb is -1",)),
    ],
)
def test_wrong_flags_are_refused_at_once(ask: Any, flags: list[str], words: tuple[str]) -> None:
    asked_ = ask("serve", *flags)
    assert asked_.code == 2
    assert all(word in asked_.err for word in words)
    assert asked_.err.count("\n") == 2


def test_a_signal_lets_answers_end_and_takes_no_more(tmp_path: Path) -> None:
    """The whole command: it says where it listens, answers, and drains on SIGTERM."""
    command = [sys.executable, str(ROOT / "main.py"), "serve", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        body = {
            "messages": asked("Describe the picture in detail."),
            "max_tokens": 600,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            said = list(lines)
        assert "data: [DONE]" in said
        assert '"finish_reason":"length"' in "".join(said)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
