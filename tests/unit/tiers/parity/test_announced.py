"""Who asks for a step waits until it is known whether it comes."""

import threading

import pytest
from equipment.nodes import key_of

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity.announced import Announced


def test_what_is_there_is_not_waited_for():
    announced = Announced()
    announced.tell(key_of(1), is_there=True)
    announced.wait_for(key_of(1), 0.0)


def test_what_will_not_come_or_is_late_is_an_error():
    announced = Announced()
    announced.tell(key_of(1), is_there=False)
    with pytest.raises(KeeperError, match="will not be here"):
        announced.wait_for(key_of(1), 60)
    with pytest.raises(KeeperError, match="in time"):
        announced.wait_for(key_of(2), 0.0)


@pytest.mark.parametrize("comes", [True, False])
def test_who_waits_goes_on_when_it_comes_and_when_it_is_all_over(comes):
    announced, outcome = Announced(), []

    def waits():
        try:
            announced.wait_for(key_of(1), 60)
            outcome.append("there")
        except KeeperError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=waits)
    thread.start()
    if comes:
        announced.tell(key_of(1), is_there=True)
    else:
        announced.close()
    thread.join(60)
    assert outcome == ["there" if comes else "step 1 did not come in time"]


def test_whoever_leaves_knows_when_the_others_have_their_stripes():
    announced = Announced()
    announced.tell(key_of(1), is_there=True)
    announced.was_served(key_of(1), 0)
    announced.was_served(key_of(1), 0)
    assert not announced.wait_until_served(key_of(1), 2, 0.0)
    announced.was_served(key_of(1), 2)
    assert announced.wait_until_served(key_of(1), 2, 0.0)


def test_only_the_newest_are_remembered():
    announced = Announced()
    for step in range(100):
        announced.tell(key_of(step), is_there=True)
        announced.was_served(key_of(step), 1)
    announced.wait_for(key_of(99), 0.0)
    with pytest.raises(KeeperError):
        announced.wait_for(key_of(0), 0.0)
    assert len(announced._served) == len(announced._told) == 16
