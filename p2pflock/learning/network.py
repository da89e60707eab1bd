"""A torch module behind the Network port of learner.py.

Law: the only bridge between torch and the vectors that peers agree on.  The module's parameters are views of
one buffer, so a vector becomes a model by one copy.  Only parameters make up a checkpoint: float32, and no
persistent buffers, whose updates (running statistics) would not be part of any payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pflock.errors import SpecError
from p2pflock.learning import entrypoint
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32
from p2pflock.learning.dataset import Dataset, Split
from p2pflock.learning.spec import TaskSpec


class TorchNetwork:
    """Built from a spec; see learner.Network for the contract.

    Raises:
        SpecError: the model or data set does not come up, or cannot be trained this way.
        MissingToolError: its data is not there and cannot be fetched.
    """

    def __init__(self, spec: TaskSpec, trusted_modules: Iterable[str] = ()) -> None:
        trusted = tuple(trusted_modules)
        torch.manual_seed(spec.task.seed)
        model = entrypoint.call(spec.model.factory, spec.model.arguments, trusted)
        if not isinstance(model, nn.Module):
            raise SpecError(f"{spec.model.factory} gave a {type(model).__name__}", "return a torch.nn.Module")
        self._model = model
        self._layout = _lay_out(model)
        self._buffer = np.zeros(self._layout.parameters, np.float32)
        self._parameters = _bind(model, self._layout, self._buffer)
        self._genesis = self._buffer.copy()
        if not np.isfinite(self._genesis).all():
            raise SpecError(f"{spec.model.factory} gave weights that are not finite", "initialise them")
        self._data: Dataset = entrypoint.call(spec.data.factory, spec.data.arguments, trusted)
        self._loss = entrypoint.resolve(spec.model.loss, trusted) if spec.model.loss else None
        self._sample = entrypoint.resolve(spec.model.sample, trusted) if spec.model.sample else None
        self._try_out(spec)

    @property
    def layout(self) -> Layout:
        return self._layout

    def genesis(self) -> F32:
        return self._genesis.copy()

    def size(self, split: Split) -> int:
        return self._data.size(split)

    def begin(self, seed: bytes) -> None:
        torch.manual_seed(int.from_bytes(seed[:8], "big") >> 1)

    def gradient(
        self, weights: F32, split: Split, indices: Sequence[int], *, is_training: bool
    ) -> tuple[float, F32]:
        np.copyto(self._buffer, weights)
        self._model.train(is_training)
        inputs, targets = self._data.batch(split, indices)
        loss = self._compute_loss(self._model(inputs), targets)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        flat = [
            torch.zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        return float(loss.detach()), torch.cat(flat).numpy()

    def loss(self, weights: F32, split: Split, indices: Sequence[int]) -> tuple[float, float]:
        np.copyto(self._buffer, weights)
        self._model.eval()
        with torch.inference_mode():
            inputs, targets = self._data.batch(split, indices)
            outputs = self._model(inputs)
            loss = float(self._compute_loss(outputs, targets))
            if self._loss is not None:
                return loss, 0.0
            return loss, float((outputs.argmax(-1) == targets).float().mean())

    def sample(self, weights: F32, length: int) -> str:
        if self._sample is None:
            return ""
        np.copyto(self._buffer, weights)
        self._model.eval()
        with torch.inference_mode():
            return str(self._sample(self._model, length))

    def _compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._loss is not None:
            loss: Tensor = self._loss(outputs, targets)
            return loss
        # (..., classes) and (...)
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

    def _try_out(self, spec: TaskSpec) -> None:
        """Some samples through model and loss, so that a mismatch is an error of the spec and not of round 1."""
        try:
            for split in ("train", "public", "test"):
                if self._data.size(split) < 1:
                    raise SpecError(f"{spec.data.factory}: the {split} split is empty", "give it samples")
            self.gradient(self._genesis, "train", range(min(64, self.size("train"))), is_training=False)
            self.loss(self._genesis, "test", [0])
        except SpecError:
            raise
        except Exception as error:
            raise SpecError(
                f"model and data do not fit together: {type(error).__name__}: {error}",
                "check [model], [data] and the loss",
            ) from error


def _lay_out(model: nn.Module) -> Layout:
    shapes: dict[str, Sequence[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32 or parameter.device.type != "cpu":
            raise SpecError(f"parameter {name} is {parameter.dtype} on {parameter.device}", "use float32 on cpu")
        shapes[name] = tuple(parameter.shape)
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set  # noqa: SLF001 - torch has no public way to ask
    }
    for name, _ in model.named_buffers():
        if name not in transient:
            raise SpecError(
                f"the model keeps state in buffer {name}, which peers could not agree on",
                "use GroupNorm or LayerNorm, or register the buffer with persistent=False",
            )
    if not shapes:
        raise SpecError("the model has no parameters", "return a model that can be trained")
    return Layout.of(shapes)


def _bind(model: nn.Module, layout: Layout, buffer: F32) -> list[nn.Parameter]:
    """Make every parameter a view of `buffer`, keeping its value; returns them in the order of the layout."""
    named = dict(model.named_parameters())
    bound = []
    for name, view in layout.split(buffer).items():
        parameter = named[name]
        view[...] = parameter.detach().numpy()
        parameter.data = torch.from_numpy(view)
        parameter.requires_grad_(True)
        bound.append(parameter)
    return bound


def initialise(model: nn.Module, bounds: Callable[[str, Tensor], float | None]) -> None:
    """Uniform weights that are the same bits on every machine, from torch's current seed.

    torch's own normal_ goes through logarithms and cosines, whose last bit depends on the processor.  Here
    integers are drawn and scaled by exact operations.

    Args:
        model: its parameters are changed in place, in the order of their names.
        bounds: (name, parameter) -> half width of the range around 0, or None to leave it as it is.
    """
    draw = np.random.Generator(np.random.PCG64(torch.initial_seed()))
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in sorted(parameters):
        parameter = parameters[name]
        bound = bounds(name, parameter)
        if bound is None:
            continue
        whole = draw.integers(-(1 << 23), 1 << 23, size=tuple(parameter.shape), dtype=np.int64)
        values = whole.astype(np.float32) * np.float32(2.0**-23) * np.float32(bound)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
