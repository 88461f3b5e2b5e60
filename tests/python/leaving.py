"""How a rank with a process group of gloo's ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave() -> NoReturn:
    """Ends this process behind its exit handlers, and does not tear the interpreter down.

    A thread of gloo's may still let go of a tensor of the last collective, for which it needs the GIL. Where the
    interpreter is being torn down, Python ends a thread that asks for it, in the midst of a destructor, and C++ makes
    an abort of the whole process of that ("terminate called without an active exception", status -6): about one end in
    ten on a busy machine. `destroy_process_group` does not end the thread where a device mesh holds the group. The
    stack: ProcessGroupGloo::runLoop, TensorImpl::decref_pyobject, PyEval_AcquireThread, pthread_exit.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # Joins what Python would join.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
