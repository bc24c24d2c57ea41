"""Meta-LoRA: a personal image model from one photo of a face.

The names below load on first use, so that ``import metalora`` costs nothing.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import Cancelled, MetaLoraError

# Must stand before torch loads. How long OpenMP's threads spin before they sleep: by default so long that a small model on a busy machine
# becomes many times slower, and where they sleep at once, waking them takes longer than the work. Measured, a step of learning on two
# free cores, and on two that others keep busy: 64 and 287 ms by default, 170 and 110 without spinning, 68 and 167 so.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which products on a GPU come out the same every time
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns on import that torchvision, which nothing here needs, is missing

for _library in ("torchao", "bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree"):  # where the former two are installed, all tell on
    logging.getLogger(_library).setLevel(logging.ERROR)  # import of kernels that they can do without

if TYPE_CHECKING:
    from .identity import Identity
    from .personalizer import Personalizer
    from .train import StepReport

__version__ = "0.1.0"
__all__ = ["Cancelled", "Identity", "MetaLoraError", "Personalizer", "StepReport"]
_HOMES = {"Identity": "identity", "Personalizer": "personalizer", "StepReport": "train"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metalora' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
