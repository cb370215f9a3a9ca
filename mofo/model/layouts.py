"""Names of a FLUX.2 text-to-image base in diffusers' layout, and back to those of its own file."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
QKV = {"img": ["to_q", "to_k", "to_v"], "txt": ["add_q_proj", "add_k_proj", "add_v_proj"]}


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers `Flux2Transformer2DModel` state dict under the names of the original file."""
    out = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
        if block is None:
            module, kind = name.rsplit(".", 1)
            out[f"{NAMES.get(module, module)}.{kind}"] = tensor
        elif block[1]:
            out[f"single_blocks.{block[2]}.{SINGLE.get(block[3], block[3])}"] = tensor
        elif block[3] in DOUBLE:
            out[f"double_blocks.{block[2]}.{DOUBLE[block[3]]}"] = tensor
    # The two layouts order the final modulation differently: (scale, shift) there, here reversed.
    final = "final_layer.adaLN_modulation.1.weight"
    out[final] = torch.cat(list(reversed(out[final].chunk(2))))
    for i in range(count_blocks(out, "double_blocks")):
        for stream, parts in QKV.items():
            qkv = [tensors[f"transformer_blocks.{i}.attn.{part}.weight"] for part in parts]
            out[f"double_blocks.{i}.{stream}_attn.qkv.weight"] = torch.cat(qkv)
    return out


def count_blocks(names: Mapping[str, Any], stack: str) -> int:
    """How many blocks a stack has, from its tensors' names."""
    pattern = re.compile(rf"{stack}\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1)
