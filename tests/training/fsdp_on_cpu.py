"""Run `pacatune` with FSDP2 on CPUs: accelerate shards only where it sees an accelerator.

Nothing but the kind of distribution is changed, so all that is trained and saved is real.
"""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from pacatune.cli import main

_plain = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    sys.exit(main(sys.argv[1:]))
