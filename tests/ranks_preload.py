"""Imported once by the fork server, so that each rank starts in a fraction of a second."""

import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
