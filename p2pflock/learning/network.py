"""A torch module behind the Network port of learner.py.

Law: the only bridge between torch and the vectors that peers agree on.  The module's parameters are views of
one buffer, so a vector becomes a model by one copy.  Only parameters make up a checkpoint: float32, and no
persistent buffers, whose updates (running statistics) would not be part of any payload.

The buffer lies on the device, which is this peer's own affair: weights cross to it and gradients back once per call.
Weights, gradients and genesis are float32 whatever `local.precision` says; with "bfloat16", forward pass and loss of
`gradient` run under torch's autocast.  `loss` never does: evaluations are compared between peers.
With `local.micro_batch` a batch goes through the model in parts, and the parts' gradients, weighted by their sizes,
add up to that of the mean over the batch: for a loss that is a mean over samples, as the Dataset contract has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pflock.errors import MissingToolError, SpecError
from p2pflock.learning import entrypoint
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32
from p2pflock.learning.dataset import Dataset, Split
from p2pflock.learning.spec import TaskSpec

DEVICES = ("auto", "cpu", "cuda")


class TorchNetwork:
    """Built from a spec; see learner.Network for the contract.

    Raises:
        SpecError: the model or data set does not come up, or cannot be trained this way.
        MissingToolError: its data is not there and cannot be fetched, or the device is not.
    """

    def __init__(self, spec: TaskSpec, trusted_modules: Iterable[str] = (), device: str = "cpu") -> None:
        self._device = choose_device(device)
        self._is_mixed = spec.local.precision == "bfloat16"
        self._micro_batch = spec.local.micro_batch
        trusted = tuple(trusted_modules)
        torch.manual_seed(spec.task.seed)
        model = entrypoint.call(spec.model.factory, spec.model.arguments, trusted)
        if not isinstance(model, nn.Module):
            raise SpecError(f"{spec.model.factory} gave a {type(model).__name__}", "return a torch.nn.Module")
        self._model = model
        self._layout = _lay_out(model)
        self._genesis = _flatten(model, self._layout)
        model.to(self._device)
        self._buffer = torch.zeros(self._layout.parameters, device=self._device)
        self._parameters = _bind(model, self._layout, self._buffer)
        if not np.isfinite(self._genesis).all():
            raise SpecError(f"{spec.model.factory} gave weights that are not finite", "initialise them")
        self._data: Dataset = entrypoint.call(spec.data.factory, spec.data.arguments, trusted)
        self._loss = entrypoint.resolve(spec.model.loss, trusted) if spec.model.loss else None
        self._sample = entrypoint.resolve(spec.model.sample, trusted) if spec.model.sample else None
        self._hidden = self._try_out(spec)

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def hidden(self) -> frozenset[str]:
        return self._hidden

    @property
    def data(self) -> Dataset:
        return self._data

    def over(self, data: Dataset) -> TorchNetwork:
        """The same model, and the same memory, over other data; use the two in turn."""
        other = copy.copy(self)
        other._data = data  # noqa: SLF001 - its own class
        return other

    def genesis(self) -> F32:
        return self._genesis.copy()

    def size(self, split: Split) -> int:
        return self._data.size(split)

    def begin(self, seed: bytes) -> None:
        torch.manual_seed(int.from_bytes(seed[:8], "big") >> 1)

    def gradient(
        self, weights: F32, split: Split, indices: Sequence[int], *, is_training: bool
    ) -> tuple[float, F32]:
        self._load(weights)
        self._model.train(is_training)
        size = self._micro_batch or len(indices)
        if len(indices) <= size:
            loss, total = self._backward(split, indices)
            return float(loss), total.cpu().numpy()
        total = torch.zeros_like(self._buffer)
        mean = torch.zeros((), device=self._device)
        for begin in range(0, len(indices), size):
            part = indices[begin : begin + size]
            share = len(part) / len(indices)
            loss, gradient = self._backward(split, part)
            mean += loss * share
            total += gradient * share
        return float(mean), total.cpu().numpy()

    def _backward(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean loss (), and its gradient (parameters,), of samples that go through the model at once."""
        inputs, targets = self._batch(split, indices)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_mixed):
            loss = self._compute_loss(self._model(inputs), targets)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        flat = [
            torch.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        return loss.detach().float(), torch.cat(flat)

    def _load(self, weights: F32) -> None:
        self._buffer.copy_(torch.from_numpy(weights))

    def _batch(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = self._data.batch(split, indices)
        return inputs.to(self._device), targets.to(self._device)

    def loss(self, weights: F32, split: Split, indices: Sequence[int]) -> tuple[float, float]:
        self._load(weights)
        self._model.eval()
        with torch.inference_mode():
            inputs, targets = self._batch(split, indices)
            outputs = self._model(inputs)
            loss = float(self._compute_loss(outputs, targets))
            if self._loss is not None:
                return loss, 0.0
            return loss, float((outputs.argmax(-1) == targets).float().mean())

    def sample(self, weights: F32, length: int) -> str:
        if self._sample is None:
            return ""
        self._load(weights)
        self._model.eval()
        # The task's function knows nothing of devices, and its random numbers are to be the same on all.
        model = self._model if self._device.type == "cpu" else copy.deepcopy(self._model).cpu()
        with torch.inference_mode():
            return str(self._sample(model, length))

    def _compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._loss is not None:
            loss: Tensor = self._loss(outputs, targets)
            return loss
        # (..., classes) and (...)
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))

    def _try_out(self, spec: TaskSpec) -> frozenset[str]:
        """Some samples through model and loss, so that a mismatch is an error of the spec and not of round 1.

        Returns what `hidden` says."""
        try:
            for split in ("train", "public", "test"):
                if self._data.size(split) < 1:
                    raise SpecError(f"{spec.data.factory}: the {split} split is empty", "give it samples")
            self.gradient(self._genesis, "train", range(min(64, self.size("train"))), is_training=False)
            self.loss(self._genesis, "test", [0])
            return _find_hidden(self._model, self._batch("test", [0])[0])
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


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one.  Raises MissingToolError, SpecError."""
    if name not in DEVICES:
        raise SpecError(f"no device is called {name!r}", f"use one of {', '.join(DEVICES)}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingToolError("torch finds no CUDA device on this machine", "use --device auto or cpu")
    return torch.device("cuda")


def _find_hidden(model: nn.Module, inputs: Tensor) -> frozenset[str]:
    """Matrices and filters that are neither embeddings nor the layer whose output is the model's: the ones that
    Muon's authors advise it for.  A model with nothing else gives its only layer."""
    outputs: list[tuple[nn.Module, object]] = []
    layers = [module for module in model.modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))]
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output))) for module in layers
    ]
    model.eval()
    with torch.inference_mode():
        result = model(inputs)
    for hook in hooks:
        hook.remove()
    edges: list[nn.Module] = [module for module in layers if isinstance(module, nn.Embedding)]
    edges += [module for module, output in outputs if output is result]
    excluded = {id(parameter) for module in edges for parameter in module.parameters(recurse=False)}
    maps = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    inner = frozenset(name for name, parameter in maps.items() if id(parameter) not in excluded)
    return inner or frozenset(maps)


def _flatten(model: nn.Module, layout: Layout) -> F32:
    """The model's parameters as one vector, in the order of the layout."""
    vector = np.zeros(layout.parameters, np.float32)
    named = dict(model.named_parameters())
    for name, view in layout.split(vector).items():
        view[...] = named[name].detach().numpy()
    return vector


def _bind(model: nn.Module, layout: Layout, buffer: Tensor) -> list[nn.Parameter]:
    """Make every parameter a view of `buffer`; returns them in the order of the layout."""
    named = dict(model.named_parameters())
    bound, begin = [], 0
    for tensor in layout.tensors:
        parameter = named[tensor.name]
        parameter.data = buffer[begin : begin + tensor.size].view(tensor.shape)
        parameter.requires_grad_(True)
        bound.append(parameter)
        begin += tensor.size
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
