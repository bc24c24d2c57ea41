"""Functions of tensors that one kernel computes where very many pictures are rendered; compiling it takes as long as some hundred pictures."""

import functools
from collections.abc import Callable
from typing import Any

import torch


class Fused:
    """A decorator: the function as it is, or, from when `Fused.compiling` is set, compiled at its next call.

    What it is given may be of any length each time. Compiled, it rounds a little differently. A CPU needs a C++ compiler such as g++.
    """

    compiling = False

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        return torch.compile(self.function, dynamic=True)

    def __call__(self, *given: Any) -> Any:
        return (self.compiled if Fused.compiling else self.function)(*given)
