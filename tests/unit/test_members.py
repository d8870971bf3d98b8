"""Who is in a set that changes while somebody looks."""

import sys
import weakref

from lazy_orbax._members import members_of


class Member:
    pass


def test_somebody_may_come_while_somebody_looks():
    first, late = [Member() for _ in range(3)], Member()
    living = weakref.WeakSet(first)

    def add(frame, event, argument):
        if event == "return" and frame.f_code is weakref.WeakSet.__iter__.__code__:
            living.add(late)

    sys.setprofile(add)  # Another thread would come just here, now and then.
    try:
        found = members_of(living)
    finally:
        sys.setprofile(None)
    assert late in living
    assert {*first} <= {*found} <= {*first, late}
