"""Shared settings: no hub, no accelerator look-up, one thread a process, private build folders."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SLAP_CACHE_DIR", tempfile.mkdtemp(prefix="slap-cache-"))
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
