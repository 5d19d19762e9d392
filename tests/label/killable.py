"""A server in a process of its own, for a session that is there already; prints its port when it answers."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from diffalign.label.session import LabelSession
from diffalign.label.store import VoteStore
from tests.label.support import running

if __name__ == "__main__":
    store = VoteStore(Path(sys.argv[1]) / "votes.db")
    with running(LabelSession(store, store.settings(), store.tasks())) as port:
        print(port, flush=True)
        threading.Event().wait()
