"""Captions for images that have none, by an image-text-to-text model of transformers.

    caption("data/made/photos", model="HuggingFaceTB/SmolVLM-Instruct")

They go to an overlay, `captions.jsonl` beside the set, so that shards stay as they are. Its first
line says what wrote it, each other one is a sample: `{"index", "key", "captions"}`, in the order
of the set. A batch is appended as a whole and flushed to the disk; what a kill left of a line is
dropped, and the next run goes on after the last. `read_overlay` is for readers of the set.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from mofo.data.sample import Sample
from mofo.data.shards import DamagedSample, Shards
from mofo.data.storage import lock, read_bytes

log = logging.getLogger(__name__)

OVERLAY = "captions.jsonl"
FORMAT = 1
PROMPT = "Describe this image in one sentence."


class Written(NamedTuple):
    """What a run added; `empty` counts the images about which the model said nothing."""

    captions: int
    empty: int
    damaged: list[str]


def read_overlay(source: str | Path) -> dict[str, tuple[str, ...]]:
    """Captions by key of the set at `source` (folder or URL; or an overlay itself), if any."""
    path = str(source) if str(source).endswith(".jsonl") else f"{source}/{OVERLAY}"
    try:
        lines = _lines(read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {line["key"]: tuple(line["captions"]) for line in lines[1:]}


def caption(
    source: str | Path,
    *,
    model: str | Path,
    prompt: str = PROMPT,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    device: str | torch.device | None = None,
    overlay: str | Path | None = None,
) -> Written:
    """Write a caption for each sample of a set without one; continue what an earlier run began.

    `model` is a folder or the id of a model on the hub, with weights as safetensors. Decoding is
    greedy. Damaged samples are named in the log, and left out.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}; both must be 1 or more"
        )
    shards = Shards(source)
    manifest = shards.manifest or {}
    if overlay is None and (shards.is_remote or not manifest):
        raise ValueError(f"{source} is no local set of shards; say with overlay= where to write")
    path = Path(f"{source}/{OVERLAY}" if overlay is None else overlay)
    made_from = {
        "format": FORMAT,
        "model": str(model),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "set": manifest.get("hash"),
    }
    if manifest.get("with_captions") == len(shards):
        return Written(0, 0, [])
    with lock(path):
        start = _continue(path, made_from)
        damaged: list[str] = []
        batches = _batches(_without_caption(shards, start, damaged), batch_size)
        num_captions = num_empty = 0
        speak = None
        with open(path, "ab") as file:
            for batch in batches:
                # Seconds to minutes, so only once there is an image without caption.
                speak = speak or Speaker(model, prompt, max_new_tokens, device)
                texts = speak([sample.image for _, sample in batch])
                _append(file.fileno(), batch, texts)
                num_captions += len(batch) - texts.count("")
                num_empty += texts.count("")
    return Written(num_captions, num_empty, damaged)


class Speaker:
    """A model and what prepares its input: images -> one text each, "" where it says nothing."""

    def __init__(
        self,
        model: str | Path,
        prompt: str,
        max_new_tokens: int,
        device: str | torch.device | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Most CPUs are slower in bf16 than in fp32.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        # Neither pickled weights nor code from the hub: both could do anything.
        safe = {"trust_remote_code": False, "use_safetensors": True}
        try:
            self.prepare = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, **safe)
        except ValueError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{model} is no image-text-to-text model of transformers ({reason}); give a folder "
                "or hub id of one, such as HuggingFaceTB/SmolVLM-Instruct"
            ) from error
        self.network = network.to(device).eval()
        # What is generated stands on the right, so what pads must stand on the left.
        tokenizer = self.prepare.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.max_new_tokens = max_new_tokens
        self.prompt = self._template(prompt)

    def _template(self, prompt: str) -> str:
        if self.prepare.chat_template is None:
            # What the model was trained to continue; some have no mark for the image.
            mark = getattr(self.prepare, "image_token", None) or ""
            return prompt if mark in prompt else f"{mark}{prompt}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.prepare.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[UInt8[ndarray, "_ _ 3"]]) -> list[str]:
        begins = self.prepare.tokenizer.bos_token
        inputs = self.prepare(
            text=[self.prompt] * len(images),
            images=[[Image.fromarray(image)] for image in images],
            padding=True,
            return_tensors="pt",
            # A template writes the first token itself.
            add_special_tokens=not (begins and self.prompt.startswith(begins)),
        ).to(self.network.device, self.network.dtype)
        tokens = self.network.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        # Most models repeat what they were given.
        given = inputs["input_ids"]
        if torch.equal(tokens[:, : given.shape[1]], given):
            tokens = tokens[:, given.shape[1] :]
        texts = self.prepare.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _without_caption(
    shards: Shards, start: int, damaged: list[str]
) -> Iterator[tuple[int, Sample]]:
    """Index and sample of those that need a caption; what cannot be read goes to `damaged`."""
    indices = range(start, len(shards))
    described = f"captioning {shards.source}"
    for index in tqdm(
        indices, described, total=len(shards), initial=start, unit="sample", disable=None
    ):
        try:
            sample = shards.read(index)
        except DamagedSample as error:
            log.warning("%s; it gets no caption", error)
            damaged.append(f"{error.shard}: {error.key}")
            continue
        if not sample.captions:
            yield index, sample


def _batches(
    samples: Iterator[tuple[int, Sample]], size: int
) -> Iterator[list[tuple[int, Sample]]]:
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _append(file: int, batch: Sequence[tuple[int, Sample]], texts: Sequence[str]) -> None:
    rows = [
        {"index": index, "key": sample.key, "captions": [text] if text else []}
        for (index, sample), text in zip(batch, texts, strict=True)
    ]
    _write(file, *rows)


def _write(file: int, *rows: Mapping[str, Any]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _continue(path: Path, made_from: Mapping[str, Any]) -> int:
    """The index to go on with, after half a line was cut off; a new file gets its first line."""
    data = path.read_bytes()
    lines = _lines(data, str(path))
    if len(lines) <= 1:
        # Nothing is lost: perhaps the model of the first try could not be found.
        with open(path, "wb") as file:
            _write(file.fileno(), made_from)
        return 0
    if lines[0] != made_from:
        raise ValueError(
            f"{path} was written with {lines[0]}, not {made_from}; delete it, or name another "
            "overlay"
        )
    os.truncate(path, data.rfind(b"\n") + 1)
    return lines[-1]["index"] + 1


def _lines(data: bytes, path: str) -> list[dict[str, Any]]:
    """The whole lines of an overlay; what follows the last of them was being written."""
    lines = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            expected = {"key", "captions", "index"} if lines else {"format", "model"}
            if not isinstance(row, dict) or not expected <= set(row):
                raise ValueError(f"it needs {sorted(expected)}")
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is damaged ({error}); delete it, or the file"
            ) from error
        lines.append(row)
    if lines and lines[0]["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {lines[0]['format']}, newer than {FORMAT}; update mofo"
        )
    return lines
