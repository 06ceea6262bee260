"""Something small to train: five numbers to three classes."""

import torch
from torch import nn
from torch.nn import functional

from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.training.loop import Selection, Stage, train
from clseave_cli.progress import SILENT

CPU = torch.device("cpu")


class Task:
    """Learnt by a network with or without dropout.

    Attributes:
        dev: dev losses to give in turn; None: the true ones.
        steps: called with the number of every step, before its loss is computed.
        at_epoch_end: called before the dev loss is computed.
        trained_first: parameters that are trained while the others are frozen for `freeze_epochs`.
        seen: the examples of every step.
        losses: the loss of every step.
    """

    def __init__(self, dropout=0.0, num_examples=20):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(num_examples, 5, generator=generator)
        self.labels = (self.inputs @ torch.randn(5, 3, generator=generator)).argmax(dim=1)
        torch.manual_seed(11)
        self.module = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        )
        self.dev = None
        self.trained_first, self.freeze_epochs = (), 0.0
        self.steps, self.at_epoch_end = [], []
        self.seen, self.losses = [], []

    def _error(self, rows):
        return functional.cross_entropy(self.module(self.inputs[rows]), self.labels[rows])

    def _loss(self, rows):
        for hook in self.steps:
            hook(len(self.seen))
        self.seen.append(rows.tolist())
        loss = self._error(rows)
        self.losses.append(loss.item())
        return loss

    def _evaluate(self):
        assert not self.module.training and not torch.is_grad_enabled()
        for hook in self.at_epoch_end:
            hook()
        every = torch.arange(len(self.inputs))
        return {"loss": self._error(every).item() if self.dev is None else self.dev.pop(0)}

    def run(self, folder, progress=SILENT, **options):
        defaults = {"epochs": 3, "batch_size": 6, "learning_rate": 0.01, "precision": "fp32"}
        stage = Stage(
            name="task",
            title="task de",
            module=self.module,
            num_examples=len(self.inputs),
            prepare=torch.from_numpy,
            loss=self._loss,
            evaluate=self._evaluate,
            selection=Selection("loss", "lowest"),
            trained_first=self.trained_first,
            freeze_epochs=self.freeze_epochs,
        )
        config = TrainingConfig(**(defaults | options))
        return train(stage, config, device=CPU, folder=folder, progress=progress)

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])
