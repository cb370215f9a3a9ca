"""`sample`: one Euler loop for joint, i2d and d2i, as the method's inference code walks it.

There is no mode argument: the mode is which modality is given. What is given stays clean at
time 0; a given depth with `log2_alpha` is soft: re-noised along the tilted walk with one fixed
noise (the method's project page). The sampler's state is float32 whatever the network's dtype.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mofo import flow
from mofo.flow import SampleStreams
from mofo.model.dit import ThreeStreamDiT
from mofo.schedule import Schedule

Noise = tuple[Tensor | None, Tensor | None]


@torch.no_grad()
def sample(
    dit: ThreeStreamDiT,
    schedule: Schedule,
    text: Float[Tensor, "b lt c"],
    *,
    grid: tuple[int, int],
    image: Float[Tensor, "b li ci"] | None = None,
    depth: Float[Tensor, "b li cd"] | None = None,
    null_text: Float[Tensor, "_ lt c"] | None = None,
    num_steps: int = 50,
    cfg_scale: float = 1.0,
    log2_alpha: float | None = None,
    guidance: float | Float[Tensor, "b"] | None = None,
    seeds: Sequence[int] = (0,),
    noise: Noise | None = None,
    on_step: Callable[[], None] | None = None,
) -> tuple[Float[Tensor, "b li ci"], Float[Tensor, "b li cd"] | None]:
    """Clean image and depth tokens; the given modality comes back untouched.

    `seeds` (one per sample) draw image noise, then depth noise, on the CPU: sample k is the same
    alone and in any batch. `noise` = (image_noise, depth_noise) replaces them; the entry of a hard
    given modality is None. `null_text` is the embedding of "" and is used when `cfg_scale` > 1.
    `on_step` is called after every step.
    """
    given = _check(image, depth, null_text, cfg_scale, log2_alpha)
    soft = given == "depth" and log2_alpha is not None
    t_image, t_depth = schedule.walk(num_steps, given, log2_alpha)
    image_noise, depth_noise = noise or _draw(dit, text, grid, given, soft, seeds)

    z_image = image if image is not None else image_noise
    z_depth = depth if depth is not None else depth_noise  # None: a text-to-image network
    assert z_image is not None
    z_image, z_depth = z_image.float(), None if z_depth is None else z_depth.float()
    text, null_text, guidance = _conditions(text, null_text, cfg_scale, guidance)
    for i in range(num_steps):
        at_image, at_depth = t_image[i].expand(len(z_image)), t_depth[i].expand(len(z_image))
        at_image, at_depth = at_image.to(z_image.device), at_depth.to(z_image.device)
        if soft and depth is not None and depth_noise is not None:
            z_depth = flow.mix(depth.float(), depth_noise.float(), at_depth)
        v_image, x_depth = _predict(
            dit, text, null_text, z_image, z_depth, at_image, at_depth, grid, cfg_scale, guidance
        )
        if given != "depth" and z_depth is not None and x_depth is not None:
            v_depth = flow.velocity(z_depth, x_depth, at_depth)
            z_depth = flow.step(z_depth, v_depth, t_depth[i], t_depth[i + 1])
        if given != "image":
            z_image = flow.step(z_image, v_image, t_image[i], t_image[i + 1])
        if on_step is not None:
            on_step()
    return z_image if image is None else image, z_depth if depth is None else depth


def _predict(
    dit, text, null_text, z_image, z_depth, t_image, t_depth, grid, cfg_scale, guidance
) -> tuple[Tensor, Tensor | None]:
    """Velocity and clean depth; both halves of classifier-free guidance in one batched forward."""
    t_depth = None if z_depth is None else t_depth
    inputs = [text, z_image, z_depth, t_image, t_depth]
    if null_text is None:
        v, x = dit(*inputs, grid=grid, guidance=guidance)
        return v.float(), None if x is None else x.float()
    nulls = [null_text, *inputs[1:]]
    pairs = zip(nulls, inputs, strict=True)
    twice = [None if one is None else torch.cat([null, one]) for null, one in pairs]
    guidance = None if guidance is None else torch.cat([guidance, guidance])
    v, x = dit(*twice, grid=grid, guidance=guidance)
    return _guide(v.float(), cfg_scale), None if x is None else _guide(x.float(), cfg_scale)


def _guide(halves: Tensor, cfg_scale: float) -> Tensor:
    null, conditional = halves.chunk(2)
    return null + cfg_scale * (conditional - null)


def _check(image, depth, null_text, cfg_scale: float, log2_alpha: float | None) -> str | None:
    if image is not None and depth is not None:
        raise ValueError("image and depth are both given, so nothing is left to generate")
    if cfg_scale > 1 and null_text is None:
        raise ValueError(
            f"cfg_scale is {cfg_scale}, but guidance above 1 needs null_text, the embedding of ''"
        )
    if image is not None and log2_alpha is not None:
        raise ValueError(
            f"log2_alpha={log2_alpha} tilts depth against the image's walk, but a given image does "
            "not walk; leave log2_alpha out"
        )
    return "image" if image is not None else "depth" if depth is not None else None


def _draw(dit, text, grid, given: str | None, soft: bool, seeds: Sequence[int]) -> Noise:
    if len(seeds) != len(text):
        raise ValueError(f"{len(seeds)} seeds for {len(text)} captions; give one seed per sample")
    streams = SampleStreams.from_seeds(seeds, text.device)
    num_tokens = grid[0] * grid[1]
    image = depth = None
    if given != "image":
        image = streams.normal((num_tokens, dit.config.in_channels))
    if dit.config.depth_channels and (given != "depth" or soft):
        depth = streams.normal((num_tokens, dit.config.depth_channels))
    return image, depth


def _conditions(text, null_text, cfg_scale: float, guidance):
    null_text = null_text.expand(len(text), -1, -1) if cfg_scale > 1 else None
    if isinstance(guidance, float | int):
        guidance = torch.full((len(text),), float(guidance), device=text.device)
    return text, null_text, guidance
