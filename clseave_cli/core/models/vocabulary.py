"""Training only the word vectors that the data use.

Half of a multilingual encoder's weights are vectors of tokens that never occur in one language's
data: mBERT has 119,547 of them, a hundred thousand sentences use a tenth. Their gradient is zero,
yet the optimiser would read and write them, and its two moments, in every step, and every saved
state would hold them.

Legend: V vocabulary · K kept tokens · H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable


@contextmanager
def reduced_vocabulary(encoder: SentenceEncoder, *tables: TokenTable) -> Iterator[None]:
    """Within the block, an encoder has word vectors for the tokens of some sentences only.

    The optimiser works on each weight by itself, so the K kept vectors are trained as they would
    be among all V. The others stay as they are; in the whole table weight decay alone would have
    moved them. Afterwards the encoder is whole again, whatever happened in the block.

    Args:
        encoder: left alone if its word vectors are not a plain table.
        tables: all sentences that the encoder will be given in the block.
    """
    whole = encoder.backbone.get_input_embeddings()
    if type(whole) is not nn.Embedding:
        yield
        return
    always = [encoder.pad_id] + ([] if whole.padding_idx is None else [whole.padding_idx])
    if not encoder.packs:
        # Some count positions over the ids that are not padding's: no other token may take its id.
        always = list(range(max(always) + 1))
    kept = np.unique(np.concatenate([always, *(table.ids for table in tables)]))
    places = np.full(whole.num_embeddings, -1)
    places[kept] = np.arange(len(kept))
    rows = torch.from_numpy(kept).to(whole.weight.device)
    part = nn.Embedding(
        len(kept),
        whole.embedding_dim,
        padding_idx=None if whole.padding_idx is None else int(places[whole.padding_idx]),
        _weight=whole.weight.detach()[rows],
    ).requires_grad_(whole.weight.requires_grad)
    encoder.backbone.set_input_embeddings(part)
    encoder.token_places = torch.from_numpy(places)
    try:
        yield
    finally:
        with torch.no_grad():
            whole.weight[rows] = part.weight.to(whole.weight.device)
        encoder.backbone.set_input_embeddings(whole)
        encoder.token_places = None
