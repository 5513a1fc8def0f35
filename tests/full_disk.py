"""A disk that runs full, for every program of this process."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def limited_files(num_bytes=1000):
    """Limit files to some bytes: writing more fails in the same calls as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
