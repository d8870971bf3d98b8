"""Several threads of a process may save at once: each save has a number of its own."""

from __future__ import annotations

import threading

from lazy_orbax._orbax.symbols import SRC

_DONE = "lazy_orbax_tells_threads_apart"


def tell_threads_apart() -> None:
    """Lets several threads of this process begin saves at once. A second call does nothing.

    Orbax keeps one number for the save that is beginning, by which its parts find each other. A
    thread that begins a save in the middle of another's takes the number from them: they wait for
    the directories of the wrong save, or for none. After this, a thread that began a save finds
    the number of its own save. Others find the last one, as before.
    """
    ids = SRC.get("operation_ids")
    names = ("next_operation_id", "get_current_operation_id")
    if hasattr(ids, _DONE) or not all(hasattr(ids, name) for name in names):
        return
    next_of_process, last_of_process = (getattr(ids, name) for name in names)
    own, lock = threading.local(), threading.Lock()

    def begin(_: type) -> int:
        with lock:
            own.operation = next_of_process()
        return own.operation

    def current(_: type) -> str:
        return str(own.operation) if hasattr(own, "operation") else last_of_process()

    for name, method in zip(names, (begin, current), strict=True):
        setattr(ids, name, classmethod(method))
    setattr(ids, _DONE, True)
