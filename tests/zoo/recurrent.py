"""Recurrent nets: the hidden units of all time steps are the same; gates keep their order."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.entry import Entry, features, numbers


class Steps(nn.Module):
    """A recurrent layer, and a linear layer on its output at each step or at the last step."""

    def __init__(self, core: nn.RNNBase, width: int, last: bool = False) -> None:
        super().__init__()
        self.core, self.last = core, last
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported")
            outputs, _ = self.core(inputs)
        return self.head(outputs[:, -1] if self.last else outputs)


class FinalState(nn.Module):
    """The last hidden and cell states of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(3, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        _, (hidden, cell) = self.core(inputs)
        return self.head(torch.cat([hidden[-1], cell[0]], dim=-1))


class LearnedStart(nn.Module):
    """The state before the first step is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(3, 6, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, _ = self.core(inputs, self.start.expand(-1, inputs.shape[0], -1).contiguous())
        return self.head(outputs)


class Between(nn.Module):
    """Dropout between the layers, at the rate of a module that tests set to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Dropout(0.2)
        self.core = nn.LSTM(3, 6, num_layers=2, batch_first=True, dropout=self.rate.p)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.core.dropout = self.rate.p
        return self.head(self.core(inputs)[0])


class Stack(nn.Module):
    """Layers of different widths and types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(3, 7, batch_first=True)
        self.norm = nn.LayerNorm(7)
        self.second = nn.GRU(7, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(inputs)[0]))[0])


class LstmLoop(nn.Module):
    """Two cells in a loop over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(3, 7)
        self.second = nn.LSTMCell(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        lower: Any = None
        upper: Any = None
        outputs = []
        for step in inputs.unbind(1):
            lower = self.first(step, lower)
            upper = self.second(lower[0], upper)
            outputs.append(self.head(upper[0]))
        return torch.stack(outputs, 1)


class CellLoop(nn.Module):
    """A cell without a cell state, starting from zeros."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.new_zeros(inputs.shape[0], self.cell.hidden_size)
        for step in range(inputs.shape[1]):
            hidden = self.cell(inputs[:, step], hidden)
        return self.head(hidden)


class Reader(nn.Module):
    """Embeddings, an LSTM, and the mean over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5, padding_idx=0)
        self.core = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.core(self.embed(tokens))[0].mean(1))


class Packed(nn.Module):
    """Packed sequences of different lengths; the final states and all outputs are used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.core = nn.GRU(5, 7, batch_first=True, bidirectional=True)
        self.head = nn.Linear(14, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, last = self.core(packed)
        padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=tokens.shape[1])
        return self.head(padded), self.head(last.transpose(0, 1).flatten(1))


class Translator(nn.Module):
    """The encoder's last state is the decoder's first state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.encoder = nn.GRU(5, 7, batch_first=True)
        self.decoder = nn.GRU(5, 7, batch_first=True)
        self.head = nn.Linear(7, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(source))
        return self.head(self.decoder(self.embed(target), state)[0])


class Listener(nn.Module):
    """A decoder with additive attention to the states of a bidirectional encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, 5, batch_first=True, bidirectional=True)
        self.start = nn.Linear(10, 7)
        self.keys = nn.Linear(10, 6)
        self.query = nn.Linear(7, 6, bias=False)
        self.score = nn.Linear(6, 1)
        self.cell = nn.GRUCell(10, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.encoder(inputs)
        keys, hidden = self.keys(states), torch.tanh(self.start(states.mean(1)))
        outputs = []
        for _ in range(2):
            score = self.score(torch.tanh(keys + self.query(hidden)[:, None]))
            context = torch.bmm(score.softmax(1).transpose(1, 2), states).squeeze(1)
            hidden = self.cell(context, hidden)
            outputs.append(self.head(hidden))
        return torch.stack(outputs, 1)


class Elman(nn.Module):
    """A hand-written recurrence, with a mask that stops it where a sequence ends."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 6)
        self.recurrent = nn.Parameter(torch.randn(6, 6) / 3)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.zeros(inputs.shape[0], 6, dtype=inputs.dtype)
        for step in range(inputs.shape[1]):
            new = torch.tanh(self.norm(self.inputs(inputs[:, step]) + hidden @ self.recurrent))
            hidden = torch.where(mask[:, step, None], new, hidden)
        return self.head(hidden)


class StateSpace(nn.Module):
    """A diagonal state space for each channel, which may permute its own states."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.decay = nn.Parameter(torch.rand(6, 4))
        self.enter = nn.Parameter(torch.randn(6, 4))
        self.leave = nn.Parameter(torch.randn(6, 4))
        self.skip = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        state = hidden.new_zeros(hidden.shape[0], 6, 4)
        outputs = []
        for step in hidden.unbind(1):
            state = state * torch.sigmoid(self.decay) + step[:, :, None] * self.enter
            outputs.append((state * self.leave).sum(-1) + self.skip * step)
        return self.head(F.gelu(torch.stack(outputs, 1)))


class ConvLstm(nn.Module):
    """An LSTM over images: convolutions in place of matrices, gates cut from the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3 + 6, 4 * 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, films: Tensor) -> Tensor:
        batch, _, _, height, width = films.shape
        hidden = cell = films.new_zeros(batch, 6, height, width)
        for frame in films.unbind(1):
            gates = self.gates(torch.cat([frame, hidden], dim=1))
            enter, forget, leave, new = gates.split(6, dim=1)
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(cell)
        return self.head(hidden)


SERIES = features(2, 8, 3)
WORDS = numbers(11, 2, 8)

RECURRENT = {
    "lstm-last-step": Entry(
        lambda: Steps(nn.LSTM(3, 7, batch_first=True), 7, last=True), SERIES, (7,)
    ),
    "lstm-sequence-first-no-bias": Entry(lambda: Steps(nn.LSTM(3, 7, bias=False), 7), SERIES, (7,)),
    "lstm-two-layers": Entry(
        lambda: Steps(nn.LSTM(3, 6, num_layers=2, batch_first=True), 6), SERIES, (6, 6)
    ),
    "lstm-bidirectional": Entry(
        lambda: Steps(nn.LSTM(3, 6, batch_first=True, bidirectional=True), 12), SERIES, (6, 6)
    ),
    "lstm-two-layers-bidirectional": Entry(
        lambda: Steps(nn.LSTM(3, 5, num_layers=2, batch_first=True, bidirectional=True), 10),
        SERIES,
        (5, 5, 5, 5),
    ),
    "lstm-projected": Entry(
        lambda: Steps(nn.LSTM(3, 7, batch_first=True, proj_size=4), 4), SERIES, (4, 7)
    ),
    "lstm-projected-two-layers": Entry(
        lambda: Steps(nn.LSTM(3, 7, num_layers=2, batch_first=True, proj_size=4), 4),
        SERIES,
        (4, 4, 7, 7),
    ),
    "lstm-dropout": Entry(Between, SERIES, (6, 6)),
    "lstm-final-state": Entry(FinalState, SERIES, (6, 6)),
    "gru": Entry(lambda: Steps(nn.GRU(3, 7, batch_first=True), 7), SERIES, (7,)),
    "gru-two-layers-bidirectional": Entry(
        lambda: Steps(nn.GRU(3, 6, num_layers=2, batch_first=True, bidirectional=True), 12),
        SERIES,
        (6, 6, 6, 6),
    ),
    "gru-learned-start": Entry(LearnedStart, SERIES, (6,)),
    "rnn-tanh": Entry(lambda: Steps(nn.RNN(3, 7, batch_first=True), 7, last=True), SERIES, (7,)),
    "rnn-relu-two-layers": Entry(
        lambda: Steps(nn.RNN(3, 6, num_layers=2, nonlinearity="relu", batch_first=True), 6),
        SERIES,
        (6, 6),
    ),
    "recurrent-stack": Entry(Stack, SERIES, (5, 7)),
    "lstm-cells": Entry(LstmLoop, SERIES, (5, 7)),
    "gru-cell": Entry(lambda: CellLoop(nn.GRUCell(3, 7)), SERIES, (7,)),
    "rnn-cell": Entry(lambda: CellLoop(nn.RNNCell(3, 7)), SERIES, (7,)),
    "lstm-embedding-mean": Entry(Reader, WORDS, (5, 7)),
    "gru-packed": Entry(
        Packed,
        lambda: {"tokens": WORDS(), "lengths": torch.tensor([5, 8])},
        (5, 7, 7),
    ),
    "gru-translator": Entry(
        Translator, lambda: {"source": WORDS(), "target": WORDS()[:, :6]}, (5, 7)
    ),
    "gru-additive-attention": Entry(Listener, SERIES, (5, 5, 6, 7)),
    "elman-masked": Entry(
        Elman,
        lambda: {
            "inputs": torch.zeros(2, 8, 3),
            "mask": torch.arange(8) < torch.tensor([[5], [8]]),
        },
        (6,),
    ),
    "state-space": Entry(StateSpace, SERIES, (4, 6)),
    "conv-lstm": Entry(ConvLstm, features(2, 3, 3, 4, 4), (6,)),
}
