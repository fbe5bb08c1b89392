# SPDX-License-Identifier: Apache-2.0
"""Sentences to vectors: all-MiniLM-L6-v2, a 6-layer BERT tuned on a billion sentence pairs (Wang et al., arXiv
2002.10957; Reimers and Gurevych, arXiv 1908.10084)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surg_perception.surgllm.base_models import find_base_model
from surg_perception.torch_extras import import_transformers

NAME = "all-minilm-l6-v2"
MAX_TOKENS = 128
_BATCH = 64


class SentenceEncoder:
    """A sentence's vector: the mean of its tokens' last hidden states, scaled to length 1.

    Args:
        folder: the model in Hugging Face layout; a BERT whose vectors are means of tokens. None: `all-minilm-l6-v2`.
        threads: CPU threads of a call; 0 leaves PyTorch's own setting.

    Raises:
        BaseModelMissing: the model is not on this machine.

    Not thread-safe: one call at a time.
    """

    def __init__(self, folder: str | Path | None = None, threads: int = 1) -> None:
        transformers = import_transformers()
        from tokenizers import Tokenizer

        self.folder = find_base_model(NAME if folder is None else folder)
        self.threads = threads
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        padding = json.loads((self.folder / "config.json").read_text()).get("pad_token_id", 0)
        self.tokenizer.enable_padding(pad_id=padding)
        self.model = transformers.BertModel.from_pretrained(str(self.folder)).eval()

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self.model.config.hidden_size)

    def embed(self, sentences: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of length 1, float32 [n, width]; what is beyond `MAX_TOKENS` tokens of a sentence is not seen."""
        vectors = np.zeros((len(sentences), self.width), np.float32)
        by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding in a batch
        with self._few_threads():
            for start in range(0, len(by_length), _BATCH):
                chosen = by_length[start : start + _BATCH]
                vectors[chosen] = self._embed([sentences[i] for i in chosen])
        return vectors

    def _embed(self, sentences: list[str]) -> NDArray[np.float32]:
        import torch

        encodings = self.tokenizer.encode_batch(sentences)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(states.dtype)
            means = (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(means, dim=1).float().numpy()

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        import torch

        before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
