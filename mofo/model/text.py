"""Captions -> text tokens, one row of (length, channels) per caption.

    text = load("small")                     # no weights; or a folder with Qwen3 and its tokenizer
    tokens = text.encode(["a red sofa"])     # (b, lt, c)

`Qwen3Text` is what FLUX.2 [klein] reads: the hidden states after layers 9, 18 and 27, side by side.
`SmallText` needs no network: a word is the sum of hashed vectors of its character n-grams (as in
fastText, Bojanowski et al. 2017, without training), so "sofa" is near "sofas" and far from "tower".
Neither is trained here; the caption "" is a caption like any other (the null text of guidance).
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

LAYERS = (9, 18, 27)  # of the klein bases
QWEN_LENGTH = 512
CACHED_CAPTIONS = 32  # 12.6 MB each for Qwen3-8B in bf16

SMALL_LENGTH, SMALL_CHANNELS = 24, 64
SMALL_GRAMS = (3, 4, 5)  # characters; a word counts as well, whatever its length


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = LAYERS,
) -> "Qwen3Text | SmallText":
    """The text encoder of "small", of a Qwen3 folder, or of a diffusers folder that holds one."""
    if str(path) == "small":
        return SmallText(device, dtype)
    parts = [Path(path) / "text_encoder", Path(path) / "tokenizer"]
    folder, tokenizer = parts if all(part.is_dir() for part in parts) else [Path(path)] * 2
    if not (folder / "config.json").exists():
        raise ValueError(
            f'{path} holds no text encoder; give "small", a Qwen3 folder (config.json, weights and '
            "tokenizer), or a diffusers folder with text_encoder/ and tokenizer/"
        )
    from transformers import AutoTokenizer  # seconds to import, so only where it is needed

    model = _first_layers(folder, max(layers), dtype)
    return Qwen3Text(
        model=model.to(device),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        layers=layers,
    )


def _first_layers(folder: Path, num_layers: int, dtype: torch.dtype) -> nn.Module:
    """Qwen3 without what lies above the layers that are read: bit-identical there, 25 % cheaper."""
    from transformers import AutoConfig, AutoModel, logging

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "qwen3" or config.num_hidden_layers < num_layers:
        raise ValueError(
            f"{folder} is a {config.model_type} of {config.num_hidden_layers} layers; "
            f"needed is a qwen3 of at least {num_layers}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every tensor of the layers left out
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            num_hidden_layers=num_layers,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    # hidden_states[-1] would otherwise be the only one that has passed the final norm.
    model.norm = nn.Identity()
    return model


class Qwen3Text:
    """Hidden states of a frozen Qwen3, concatenated over channels.

    A caption is one user turn (generation prompt on, thinking off), cut or padded on the right to
    `length`; Qwen3 masks the padding, the padded positions are returned like any other.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        layers: Sequence[int] = LAYERS,
        length: int = QWEN_LENGTH,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.layers, self.length = tokenizer, tuple(layers), length
        self.channels: int = len(self.layers) * model.config.hidden_size
        self._cache: dict[str, Float[Tensor, "lt c"]] = {}  # oldest use first

    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b lt c"]:
        """Tokens in the dtype and on the device of the model; captions seen lately cost nothing."""
        rows = {}
        for caption in captions:
            if caption not in rows:
                cached = self._cache.pop(caption, None)
                rows[caption] = self._run(caption) if cached is None else cached
        self._cache |= rows
        for caption in list(self._cache)[:-CACHED_CAPTIONS]:
            del self._cache[caption]
        return torch.stack([rows[caption] for caption in captions])

    def to(self, device: str | torch.device) -> None:
        """Move the network; what it said before is forgotten."""
        self.model.to(device)
        self._cache.clear()

    @torch.no_grad()
    def _run(self, caption: str) -> Float[Tensor, "lt c"]:
        """One caption at a time: in a batch, its neighbours would show in the last bits, and a
        resumed run (whose cache is empty) would not repeat the run it continues."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        ids = self.tokenizer(
            [prompt],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([states[layer][0] for layer in self.layers], dim=-1)


class SmallText:
    """Deterministic word tokens from hashes: the same on every machine and version."""

    length, channels = SMALL_LENGTH, SMALL_CHANNELS

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype

    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b lt c"]:
        """One token per word, then padding; words after the last token are dropped."""
        rows = [_small_tokens(caption) for caption in captions]
        return torch.stack(rows).to(self.device, self.dtype)

    def to(self, device: str | torch.device) -> None:
        """Give tokens on another device."""
        self.device = device


@lru_cache(maxsize=4096)
def _small_tokens(caption: str) -> Float[Tensor, "lt c"]:
    words = re.findall(r"\w+", caption.lower())[:SMALL_LENGTH]
    padding = [_hashed("<pad>")] * (SMALL_LENGTH - len(words))
    return torch.stack([_word(word) for word in words] + padding)


@lru_cache(maxsize=4096)
def _word(word: str) -> Float[Tensor, " c"]:
    marked = f"<{word}>"  # so that a prefix differs from a suffix
    grams = {marked[i : i + n] for n in SMALL_GRAMS for i in range(len(marked) - n + 1)} | {marked}
    total = torch.stack([_hashed(gram) for gram in sorted(grams)]).sum(0)
    return total / total.square().mean().sqrt()


def _hashed(gram: str) -> Float[Tensor, " c"]:
    """A vector of +1 and -1: bit i of the gram's sha256."""
    bits = int.from_bytes(hashlib.sha256(gram.encode()).digest(), "little")
    return torch.tensor([1.0 if bits >> i & 1 else -1.0 for i in range(SMALL_CHANNELS)])
