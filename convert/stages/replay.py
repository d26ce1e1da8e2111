"""Outputs of a layer's finished linears, kept in files so that no linear computes a row twice.

With true_sequential the calibration rows run through a layer once for each group of linears that share an
input. The output of a linear does not change any more once it is quantized: it is computed once, from the
input that was captured for its Hessian, and read from its file whenever the layer runs again. So its dense
weight can be freed for a later linear's Hessian.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from lowmem.checkpoint.files.whole import as_output_error
from lowmem.checkpoint.files.writer import tensor_bytes
from lowmem.streaming.hidden_states import read_rows
from lowmem.streaming.layer_calls import LayerCall, replaced_forwards


class RowsFile:
    """Activations [rows, row_length, width] in a file: appended in order, read by rows."""

    def __init__(self, path: Path, row_length: int) -> None:
        self.path = path
        self.row_length = row_length
        self.width = 0
        self.dtype = torch.float32

    def append(self, chunk: torch.Tensor) -> None:
        """Append rows [.., width]. Raises OutputError when the disk is full."""
        self.width, self.dtype = chunk.shape[-1], chunk.dtype
        chunk = chunk.reshape(-1, self.row_length, self.width).cpu().contiguous()
        try:
            with self.path.open("ab") as stream:
                stream.write(tensor_bytes(chunk))
        except OSError as error:
            raise as_output_error(error, self.path) from error

    def read(self, start: int, end: int) -> torch.Tensor:
        """Read rows start..end, [end - start, row_length, width], in new memory."""
        return read_rows(self.path, start, end, (self.row_length, self.width), self.dtype)

    def delete(self) -> None:
        """Remove the file if it exists."""
        self.path.unlink(missing_ok=True)


class Replay:
    """The outputs of one layer's finished linears, by their names in the layer."""

    def __init__(self, folder: Path, row_length: int) -> None:
        self.folder = folder
        self.row_length = row_length
        self._inputs: dict[str, RowsFile] = {}
        self._outputs: dict[str, RowsFile] = {}
        self._start = 0

    def _file(self, kind: str, name: str) -> RowsFile:
        file = RowsFile(self.folder / f"replay-{kind}-{name}", self.row_length)
        file.delete()
        return file

    def keep_input(self, name: str, chunk: torch.Tensor) -> None:
        """Append rows of the input that the linear `name` shares with the others of its group."""
        if name not in self._inputs:
            self._inputs[name] = self._file("input", name)
        self._inputs[name].append(chunk)

    def compute(self, linears: Sequence[tuple[str, nn.Module]], count: int, rows: int) -> None:
        """Run the finished linears of a group, given by name, over all `count` rows, `rows` at a time."""
        inputs = self._inputs.pop(linears[0][0])
        device = next(linears[0][1].parameters()).device
        for name, _ in linears:
            self._outputs[name] = self._file("output", name)
        for start in range(0, count, rows):
            chunk = inputs.read(start, min(start + rows, count)).to(device)
            with torch.no_grad():
                for name, linear in linears:
                    self._outputs[name].append(linear(chunk))
        inputs.delete()

    def run(self, layer: nn.Module, call: LayerCall, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output for rows from `start` on; outputs of finished linears are read from
        files.
        """
        self._start = start
        with self._replayed(layer):
            return call.run(layer, hidden)

    def _replayed(self, layer: nn.Module) -> contextlib.AbstractContextManager[None]:
        def reader(file: RowsFile) -> Callable[[torch.Tensor], torch.Tensor]:
            def forward(x: torch.Tensor) -> torch.Tensor:
                rows = x.numel() // x.shape[-1] // file.row_length
                chunk = file.read(self._start, self._start + rows)
                return chunk.to(x.device).view(*x.shape[:-1], file.width)

            return forward

        return replaced_forwards(
            (layer.get_submodule(name), reader(file)) for name, file in self._outputs.items()
        )

    def clear(self) -> None:
        """Remove all files, including those of a killed process."""
        self._inputs, self._outputs = {}, {}
        for path in self.folder.glob("replay-*"):
            path.unlink(missing_ok=True)
