# SPDX-License-Identifier: Apache-2.0
"""The causal language model below SurgLLM, with one LoRA adapter per task that is switched in memory.

Any causal language model of the Hugging Face kind will do: it is given embeddings and gives logits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surg_perception.surgllm.base_models import find_base_model
from surg_perception.surgllm.config import JOINT, SurgLLMConfig
from surg_perception.torch_extras import import_transformers


def fast_dtype(device: str = "") -> torch.dtype:
    """bfloat16 where it is multiplied faster than float32, else float32.

    Args:
        device: "cpu" for a model that stays there; else that of the trainings, the GPU where there is one.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_tokenizer(config: SurgLLMConfig) -> Any:
    """The language model's own tokenizer; bytes for "tiny".

    Raises:
        BaseModelMissing: its files are not on this machine.
    """
    transformers = import_transformers()
    if config.language_model == "tiny":
        return transformers.ByT5Tokenizer(extra_ids=0)
    return transformers.AutoTokenizer.from_pretrained(find_base_model(config.language_model))


class LanguageModel(nn.Module):
    """A frozen causal language model with named LoRA adapters.

    Args:
        config: which model, and the adapters' rank.
        dtype: of the frozen weights.

    Raises:
        BaseModelMissing: its files are not on this machine.
    """

    def __init__(self, config: SurgLLMConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        transformers = import_transformers()
        shapes = _shapes(config.language_model)
        if shapes is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes)).to(dtype)
        else:
            folder: Path = find_base_model(config.language_model)
            self.base = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True
            )
        self.base.requires_grad_(False)
        self.adapters: list[str] = []
        self._plain: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return int(self.base.get_input_embeddings().embedding_dim)

    @property
    def words(self) -> Tensor:
        """Embeddings of all tokens [vocabulary, width], frozen."""
        return self.base.get_input_embeddings().weight.detach()

    @cached_property
    def word_length(self) -> float:
        """Mean Euclidean length of the tokens' embeddings."""
        return float(self.words.float().norm(dim=1).mean())

    def add_adapter(self, name: str, start: str | None = None) -> None:
        """A new adapter, equal to the adapter `start`, or one that changes nothing yet; it becomes the active one."""
        from peft import LoraConfig

        config = self.config
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.lora_targets),
            lora_dropout=0.0,
            bias="none",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            self.base.add_adapter(lora, name)
        self.adapters.append(name)
        for key, parameter in self.base.named_parameters():
            if _is_of(key, name):
                parameter.data = parameter.data.float()
        if start is not None:
            self.load_adapter_weights(name, self.adapter_weights(start))
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Answer with this adapter from now on."""
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        self.base.set_adapter(name)
        self.base.requires_grad_(False)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's matrices."""
        return [parameter for key, parameter in self.base.named_parameters() if _is_of(key, name)]

    def adapter_weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's matrices by name, without the adapter's own name in it."""
        return {
            _nameless(key, name): p.detach().clone() for key, p in self.base.named_parameters() if _is_of(key, name)
        }

    def load_adapter_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        """Set an adapter's matrices to those of `adapter_weights`.

        Raises:
            ValueError: other names or shapes, which are told.
        """
        own = {_nameless(key, name): p for key, p in self.base.named_parameters() if _is_of(key, name)}
        wrong = sorted(own.keys() ^ weights.keys()) + [
            key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape
        ]
        if wrong:
            raise ValueError(f"adapter {name!r}: {len(wrong)} matrices do not fit the language model, first {wrong[0]}")
        for key, parameter in own.items():
            parameter.data.copy_(weights[key])

    @torch.no_grad()
    def fuse(self, weights: dict[str, Tensor]) -> None:
        """Put an adapter into the frozen weights themselves: W + alpha / rank * B A, exactly undone by the next call.

        For answering: no adapter layers are run, and another adapter is a few milliseconds away.

        Args:
            weights: of `adapter_weights`, or {} for the plain model; the model itself has no adapters.

        Raises:
            ValueError: matrices that do not fit the language model; it is as it was.
        """
        expected = {
            f"{name}.lora_{side}.weight"
            for name, _ in self.base.named_modules()
            if name.rpartition(".")[2] in self.config.lora_targets
            for side in "AB"
        }
        if weights and (wrong := sorted(expected ^ weights.keys())):
            raise ValueError(
                f"an adapter does not fit the language model: {len(wrong)} matrices lacking or unknown, as {wrong[0]}"
            )
        scale = self.config.lora_alpha / self.config.lora_rank
        fused: dict[str, Tensor] = {}
        try:
            for key, down in weights.items():
                name, _, side = key.partition(".lora_A.")
                if not side:
                    continue
                layer = self.base.get_submodule(name)
                plain = self._plain.get(name, layer.weight)
                up = weights[key.replace(".lora_A.", ".lora_B.")]
                fused[name] = (plain.float() + scale * up.float() @ down.float()).to(plain.dtype)
        except RuntimeError as error:
            raise ValueError(f"an adapter does not fit the language model: {key}: {error}") from error
        for name in fused.keys() | self._plain.keys():
            weight = self.base.get_submodule(name).weight
            plain = self._plain.setdefault(name, weight.detach().clone())
            weight.copy_(fused.get(name, plain))

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [B, T, width] of tokens int64 [B, T]."""
        return self.base.get_input_embeddings()(ids)

    def hidden(self, embeddings: Tensor, attention: Tensor) -> Tensor:
        """Last hidden states [B, T, width], before the output layer."""
        return self.base.get_decoder()(
            inputs_embeds=embeddings.to(self.base.dtype), attention_mask=attention, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of hidden states [n, width]."""
        return self.base.get_output_embeddings()(hidden).float()


def adapters_that_fit(names: Sequence[str]) -> None:
    """Refuse names of tasks that an adapter, a file of questions or the router could not have.

    Raises:
        ValueError: a name is no word of a-z, 0-9 and _, or is that of the joint adapter.
    """
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == JOINT:
            raise ValueError(f"task name {name!r} found, expected a word of a-z, 0-9 and _, and not {JOINT!r}")


def _is_of(key: str, adapter: str) -> bool:
    return key.endswith((f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight"))


def _nameless(key: str, adapter: str) -> str:
    return key.removesuffix(f".{adapter}.weight") + ".weight"


def _shapes(name: str) -> dict[str, Any] | None:
    if name == "tiny":
        return {
            "vocab_size": 259,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,  # at the usual 0.02 no logit could stand out
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
    if name == "vicuna-7b":
        return {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
        }
    return None
