"""Captions -> text tokens, one row of (length, channels) per caption.

    text = load("small")                     # no weights; or a folder or hub id of Qwen3
    tokens = text.encode(["a red sofa"])     # (b, lt, c)

`Qwen3Text` is what FLUX.2 [klein] reads: the hidden states after layers 9, 18 and 27, side by side.
`SmallText` needs no network: a word is the sum of hashed vectors of its character n-grams (as in
fastText, Bojanowski et al. 2017, without training), so "sofa" is near "sofas" and far from "tower".
Neither is trained here; the caption "" is a caption like any other (the null text of guidance).
"""

import gc
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mofo.model import hub

LAYERS = (9, 18, 27)  # of the klein bases
QWEN_LENGTH = 512
CACHED_CAPTIONS = 32  # 12.6 MB each for Qwen3-8B in bf16
CONFIG = "config.json"
QWEN3 = hub.Wanted(
    patterns=(CONFIG, "model*.safetensors", "tokenizer.json", "tokenizer_config.json"),
    files=f"{CONFIG}, model*.safetensors, tokenizer.json and tokenizer_config.json of Qwen3",
    option="--text-encoder",
)

SMALL_LENGTH, SMALL_CHANNELS = 24, 64
SMALL_GRAMS = (3, 4, 5)  # characters; a word counts as well, whatever its length


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = LAYERS,
) -> "Qwen3Text | SmallText":
    """The text encoder of "small", of Qwen3 (a folder, or a hub id), or of a diffusers folder.

    Weights are read (and downloaded) when the first caption needs them, not here.
    """
    if str(path) == "small":
        return SmallText(device, dtype)
    return Qwen3Text(path, device=device, dtype=dtype, layers=layers)


class Qwen3Text:
    """Hidden states of a frozen Qwen3, concatenated over channels.

    A caption is one user turn (generation prompt on, thinking off), cut or padded on the right to
    `length`; Qwen3 masks the padding, the padded positions are returned like any other. `channels`
    and `num_bytes` are known before the network is loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        layers: Sequence[int] = LAYERS,
        length: int = QWEN_LENGTH,
    ) -> None:
        self.path, self.device, self.dtype = path, torch.device(device), dtype
        self.layers, self.length = tuple(layers), length
        only_config = QWEN3._replace(patterns=(CONFIG,))
        self.sizes = _read_sizes(_parts(hub.fetch(path, only_config))[0], max(layers))
        self.channels: int = len(self.layers) * self.sizes["hidden_size"]
        self._cache: dict[str, Float[Tensor, "lt c"]] = {}  # oldest use first

    @cached_property
    def model(self) -> Any:
        """The network up to the last layer that is read; reading this loads it."""
        folder, _ = _parts(hub.fetch(self.path, QWEN3))
        return _first_layers(folder, max(self.layers), self.dtype).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # seconds to import, so only where it is needed

        _, folder = _parts(hub.fetch(self.path, QWEN3))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @property
    def num_bytes(self) -> int:
        """What the network takes when it is loaded: the embeddings and the layers that are read."""
        d, wide, k = (self.sizes[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
        queries, pairs = (
            self.sizes[key] * k for key in ("num_attention_heads", "num_key_value_heads")
        )
        # Queries and output, keys and values, gated MLP; norms of the layer, of queries and keys.
        layer = 2 * d * queries + 2 * d * pairs + 3 * d * wide + 2 * d + 2 * k
        return (self.sizes["vocab_size"] * d + max(self.layers) * layer) * self.dtype.itemsize

    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b lt c"]:
        """Tokens in `dtype` on `device`; captions of this call, and some before it, are kept."""
        rows = {}
        for caption in captions:
            if caption not in rows:
                cached = self._cache.pop(caption, None)
                rows[caption] = self._run(caption) if cached is None else cached
        self._cache |= rows
        for caption in list(self._cache)[: -max(CACHED_CAPTIONS, len(rows))]:
            del self._cache[caption]
        return torch.stack([rows[caption].to(self.device) for caption in captions])

    def knows(self, captions: Sequence[str]) -> bool:
        """Whether these can be encoded without the network."""
        return all(caption in self._cache for caption in captions)

    def free(self) -> None:
        """Give the network's memory back. What is known stays known, in the host's memory."""
        self._cache = {caption: row.cpu() for caption, row in self._cache.items()}
        if vars(self).pop("model", None) is not None:
            gc.collect()  # the network refers to itself
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def to(self, device: str | torch.device) -> None:
        """Move the network; what it said before is forgotten."""
        self.device = torch.device(device)
        if "model" in vars(self):
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
        ).to(self.device)
        states = self.model(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([states[layer][0] for layer in self.layers], dim=-1)


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where weights and tokenizer are: both in the folder, or apart as diffusers lays them out."""
    parts = folder / "text_encoder", folder / "tokenizer"
    return parts if all(part.is_dir() for part in parts) else (folder, folder)


def _read_sizes(folder: Path, num_layers: int) -> dict[str, Any]:
    """`config.json` of a Qwen3 that has the layers that are read."""
    try:
        sizes = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{folder} holds no text encoder ({CONFIG}: {error}); give "small", a Qwen3 folder '
            f"({QWEN3.files}), or a diffusers folder with text_encoder/ and tokenizer/"
        ) from error
    kind, found = sizes.get("model_type"), sizes.get("num_hidden_layers", 0)
    if kind != "qwen3" or found < num_layers:
        raise ValueError(
            f"{folder} is a {kind} of {found} layers; needed is a qwen3 of at least {num_layers}"
        )
    return sizes


def _first_layers(folder: Path, num_layers: int, dtype: torch.dtype) -> nn.Module:
    """Qwen3 without what lies above the layers that are read: bit-identical there, 25 % cheaper."""
    from transformers import AutoModel, logging

    if not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} has no model*.safetensors; other files could hold code")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every tensor of the layers left out
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            num_hidden_layers=num_layers,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    # hidden_states[-1] would otherwise be the only one that has passed the final norm.
    model.norm = nn.Identity()
    return model.eval().requires_grad_(False)


class SmallText:
    """Deterministic word tokens from hashes: the same on every machine and version."""

    length, channels, num_bytes = SMALL_LENGTH, SMALL_CHANNELS, 0

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype

    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b lt c"]:
        """One token per word, then padding; words after the last token are dropped."""
        rows = [_small_tokens(caption) for caption in captions]
        return torch.stack(rows).to(self.device, self.dtype)

    def knows(self, captions: Sequence[str]) -> bool:
        """Always: there is no network."""
        return True

    def free(self) -> None:
        """Nothing is held."""

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
