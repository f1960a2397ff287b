"""Every policy of the table is asked the same; one that is added is asked it too."""

from __future__ import annotations

import pytest

from engine.policies.specs import POLICIES
from tests import every_policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_spells_itself(name: str) -> None:
    every_policy.spells_itself(name)


@pytest.mark.parametrize("name", POLICIES)
def test_no_layer_takes_more_than_was_promised(name: str) -> None:
    every_policy.keeps_its_promise(name)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_answers_alike_however_it_is_asked(name: str) -> None:
    every_policy.answers_alike(name)


@pytest.mark.parametrize("name", POLICIES)
def test_a_conversation_goes_on_under_a_policy(name: str) -> None:
    every_policy.goes_on(name)
