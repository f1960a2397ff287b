"""A second client that many front ends are built on: litellm, as it asks a server of OpenAI's kind.

It brings 350 MB along, and so is no part of what tests install: ``pip install litellm``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("httpx2")
litellm: Any = pytest.importorskip("litellm")

from engine.engine import Engine  # noqa: E402
from tests.served import KEY, SHAPE, asked, data_url, serving  # noqa: E402

pytestmark = [
    pytest.mark.slow(reason="needs the package litellm"),
    pytest.mark.filterwarnings("ignore"),  # its own
]


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE, "hub", "float32", "full")


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Any]:
    with serving(engine, keys=(KEY,)) as found:
        yield found


def complete(server: Any, **given: Any) -> Any:
    to = {"api_base": f"{server.url}/v1", "api_key": KEY, "model": "openai/tiny", "max_retries": 0}
    return litellm.completion(**(to | {"max_tokens": 8} | given))


def test_whole_and_streamed_answers_are_the_engines(engine: Engine, server: Any) -> None:
    alone = engine.generate("What?", [data_url(1)], max_new_tokens=8)
    messages = asked("What?", data_url(1))
    whole = complete(server, messages=messages)
    assert whole.choices[0].message.content == alone.text
    assert whole.usage.prompt_tokens == alone.prompt_tokens
    chunks = complete(
        server, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    pieces, usage = list[str](), None
    for chunk in chunks:
        pieces += [chunk.choices[0].delta.content or ""] if chunk.choices else []
        usage = getattr(chunk, "usage", None) or usage
    assert "".join(pieces) == alone.text
    assert usage is not None
    assert usage.completion_tokens == len(alone.token_ids)


def test_errors_are_litellms_own(server: Any) -> None:
    with pytest.raises(litellm.AuthenticationError):
        complete(server, messages=asked("What?"), api_key="wrong")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete(server, messages=asked("What?"), temperature=-1)
    with pytest.raises(litellm.NotFoundError):
        complete(server, messages=asked("What?"), model="openai/other")
