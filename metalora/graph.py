"""The GPU work of a training step, recorded once and played again from then on: thousands of launches become one.

At 512 px and batch 1 the processor needs longer to launch FLUX.1's kernels than the GPU needs to run them. One photo means fixed
shapes, so a recording stays valid for the whole training [CUDA graphs, pytorch.org/docs: "CUDA Graphs", whole-network capture].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FIRST_STEPS = 3  # run as they are: libraries choose their kernels and make their work spaces then, which must not be recorded

Work = Callable[[Sequence[Tensor]], Tensor]


class Recorded:
    """`work(inputs)`, which writes gradients and returns a loss (), as one recording of it.

    `inputs` are tensors on the GPU, of the same shapes at every call; the work must read and write nothing else that changes its
    place, and must not wait for the GPU.
    """

    def __init__(self, work: Work):
        self.work = work
        self.forget()

    def forget(self) -> None:
        """Free the recording and its memory; the next call begins anew."""
        self.calls, self.recording = 0, None
        self.inputs: list[Tensor] = []
        self.loss = torch.empty(0)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        if self.calls <= FIRST_STEPS:
            return self._on_another_stream(inputs)
        if self.recording is None:
            self._record(inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.recording.replay()
        return self.loss.clone()  # the next call writes over it

    def _on_another_stream(self, inputs: Sequence[Tensor]) -> Tensor:
        """As autograd wants it before a recording: what it holds of a step must not belong to the usual stream."""
        usual, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(usual)
        with torch.cuda.stream(other):
            loss = self.work(inputs)
        usual.wait_stream(other)
        return loss

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        recording, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(recording):
                self.loss = self.work(self.inputs)
        finally:
            torch.cuda.set_stream(usual)  # a recording that fails does not
        self.recording = recording
