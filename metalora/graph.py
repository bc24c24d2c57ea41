"""The GPU work of a training step or of a denoising step, recorded once and played again from then on: thousands of launches become one.

At 512 px and batch 1 the processor needs longer to launch FLUX.1's kernels than the GPU needs to run them. One photo means fixed
shapes, so a recording stays valid for the whole training, and one size for all pictures of it [CUDA graphs, pytorch.org/docs: "CUDA
Graphs", whole-network capture].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FIRST_STEPS = 3  # run as they are: libraries choose their kernels and make their work spaces then, which must not be recorded

Work = Callable[[Sequence[Tensor]], Tensor]


class Recorded:
    """`work(inputs)`, which may write gradients and returns a tensor, as one recording of it.

    `inputs` are tensors on the GPU, of the same shapes at every call; the work must read and write nothing else that changes its
    place, and must not wait for the GPU.
    """

    def __init__(self, work: Work):
        self.work = work
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # one for all: memory that was freed on one stream is not used on another
        self.forget()

    def forget(self) -> None:
        """Free the recording and its memory; the next call begins anew."""
        self.calls, self.recording = 0, None
        self.inputs: list[Tensor] = []
        self.output = torch.empty(0)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        if self.calls <= FIRST_STEPS:
            return self._on_another_stream(inputs)
        if self.recording is None:
            self._record(inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.recording.replay()
        return self.output.clone()  # the next call writes over it

    def _on_another_stream(self, inputs: Sequence[Tensor]) -> Tensor:
        """As autograd wants it before a recording: what it holds of a step must not belong to the usual stream."""
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            output = self.work(inputs)
        usual.wait_stream(self.stream)
        return output

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        recording, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(recording):
                self.output = self.work(self.inputs)
        finally:
            torch.cuda.set_stream(usual)  # a recording that fails does not
        self.recording = recording


@dataclass
class Playing:
    """The last recording of a network's forward pass, kept from picture to picture: of one kind of input, and of one state of the network."""

    kind: Any = None
    recorded: Recorded | None = None

    def forget(self) -> None:
        """Free it."""
        self.kind = self.recorded = None

    @contextmanager
    def of(self, network: nn.Module, state: Any) -> Iterator[None]:
        """The network's forward pass is played meanwhile. It must return a tuple of one tensor, and its weights must keep their places.

        Of another `state`, or for tensors of other names or shapes, it is recorded anew.
        """
        forward = network.forward

        def played(**given: Any) -> tuple[Tensor]:
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            others = {name: value for name, value in given.items() if name not in tensors}
            kind = state, repr(others), [(name, t.shape, t.dtype) for name, t in tensors.items()]
            if self.recorded is None or kind != self.kind:
                self.forget()
                self.kind, self.recorded = kind, Recorded(partial(_call, forward, list(tensors), others))
            return (self.recorded(list(tensors.values())),)

        network.forward = played
        try:
            yield
        finally:
            del network.forward


def _call(forward: Callable[..., tuple[Tensor]], names: Sequence[str], others: dict[str, Any], tensors: Sequence[Tensor]) -> Tensor:
    return forward(**dict(zip(names, tensors)), **others)[0]
