"""`ThreeStreamDiT`: one diffusion transformer over text, image and depth tokens.

FLUX.2's blocks with a third stream. Image and depth have their own times, so one set of weights
holds every conditional. Called with `depth=None` it *is* the text-to-image model; a configuration
with `depth_channels=0` has no depth parameters at all. Parameter names are those of the release.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mofo.model import layers
from mofo.model.layers import Linear, Modulation, ModulationHead, QKNorm, SwiGLU, TimeMLP

TIME_CHANNELS = 256  # size of the time sinusoid in FLUX.2


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Dimensions; field names are the `dit` section of a release's `config.json`."""

    in_channels: int = 128
    depth_channels: int = 256
    context_in_dim: int = 12288
    hidden_size: int = 4096
    num_heads: int = 32
    depth_double: int = 8
    depth_single: int = 24
    depth_decoder_num_layers: int = 4
    axes_dim: list[int] = field(default_factory=lambda: [32, 32, 32, 32])
    theta: int = 2000
    mlp_ratio: float = 3.0
    use_guidance_embed: bool = False
    cross_stream_timestep_mixing: bool = True

    def __post_init__(self) -> None:
        head_size, rest = divmod(self.hidden_size, self.num_heads)
        if rest:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if len(self.axes_dim) != 4 or sum(self.axes_dim) != head_size:
            raise ValueError(
                f"axes_dim {list(self.axes_dim)} must be 4 sizes that sum to the head size, "
                f"hidden_size / num_heads = {head_size}"
            )
        if any(dim % 2 for dim in self.axes_dim):
            raise ValueError(f"axes_dim {list(self.axes_dim)} must be even: channels turn in pairs")


class ThreeStreamDiT(nn.Module):
    """Velocity of the image tokens and clean depth tokens, from noisy ones."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        has_depth = config.depth_channels > 0
        self.names = ("txt", "img", "depth") if has_depth else ("txt", "img")

        self.img_in = Linear(config.in_channels, d)
        self.txt_in = Linear(config.context_in_dim, d)
        self.time_in = TimeMLP(TIME_CHANNELS, d)
        if config.use_guidance_embed:
            self.guidance_in = TimeMLP(TIME_CHANNELS, d)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, self.names) for _ in range(config.depth_double)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single))
        self.double_stream_modulation_img = ModulationHead(d, 2)
        self.double_stream_modulation_txt = ModulationHead(d, 2)
        self.single_stream_modulation = ModulationHead(d, 1)
        self.final_layer = FinalLayer(d, config.in_channels)
        if has_depth:
            self._add_depth_stream(config)
        self.initialize()

    def _add_depth_stream(self, config: DiTConfig) -> None:
        d = config.hidden_size
        self.depth_in = Linear(config.depth_channels, d)
        self.time_in_depth = TimeMLP(TIME_CHANNELS, d)
        if config.cross_stream_timestep_mixing:
            self.cross_alpha_img = nn.Parameter(torch.zeros(1))
            self.cross_alpha_depth = nn.Parameter(torch.zeros(1))
            self.time_in_depth_to_img = TimeMLP(TIME_CHANNELS, d)
            self.time_in_rgb_to_depth = TimeMLP(TIME_CHANNELS, d)
        self.double_stream_modulation_depth = ModulationHead(d, 2)
        self.single_stream_modulation_depth = ModulationHead(d, 1)
        if config.depth_decoder_num_layers:
            self.depth_decoder_blocks = nn.ModuleList(
                SingleBlock(config) for _ in range(config.depth_decoder_num_layers)
            )
            self.depth_decoder_modulation = ModulationHead(d, 1)
        self.depth_final_layer = FinalLayer(d, config.depth_channels)

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier weights; modulations and heads at zero, so that every block starts as identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.xavier_uniform_(module.weight)
                if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
                    module.weight.zero_()

    def forward(
        self,
        text: Float[Tensor, "b lt ct"],
        image: Float[Tensor, "b li ci"],
        depth: Float[Tensor, "b li cd"] | None,
        t_image: Float[Tensor, "b"],
        t_depth: Float[Tensor, "b"] | None,
        *,
        grid: tuple[int, int],
        guidance: Float[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, "b li ci"], Float[Tensor, "b li cd"] | None]:
        """(image velocity, clean depth); without depth the second is None. Tokens are row-major."""
        vec_image, vec_depth = self.embed_times(t_image, t_depth, guidance)

        double = {"txt": self.double_stream_modulation_txt(vec_image)}
        double["img"] = self.double_stream_modulation_img(vec_image)
        [single] = self.single_stream_modulation(vec_image)
        num_text, num_image = text.shape[1], image.shape[1]
        if depth is not None:
            double["depth"] = self.double_stream_modulation_depth(vec_depth)
            [single_depth] = self.single_stream_modulation_depth(vec_depth)
            single = layers.by_token([single, single_depth], [num_text + num_image, num_image])

        streams = {"txt": self.txt_in(text.to(self.dtype))}
        streams["img"] = self.img_in(image.to(self.dtype))
        if depth is not None:
            streams["depth"] = self.depth_in(depth.to(self.dtype))
        ids = layers.position_ids(num_text, grid, len(streams) - 1, text.device)
        rope = layers.rope_table(ids, self.config.axes_dim, self.config.theta)

        for block in self.double_blocks:
            streams = block(streams, double, rope)
        x = torch.cat(list(streams.values()), dim=1)  # (b, l, d)
        for block in self.single_blocks:
            x = block(x, single, rope)

        v_image = self.final_layer(x[:, num_text : num_text + num_image], vec_image)
        if depth is None:
            return v_image, None
        assert vec_depth is not None
        return v_image, self.decode_depth(x[:, -num_image:], vec_depth, grid)

    def embed_times(
        self,
        t_image: Float[Tensor, "b"],
        t_depth: Float[Tensor, "b"] | None,
        guidance: Float[Tensor, "b"] | None,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"] | None]:
        """The two conditioning vectors; version 2 lets each modality see the other's time."""
        at_image = layers.sinusoid(t_image, TIME_CHANNELS, self.dtype)
        vec_image = self.time_in(at_image)
        if (guidance is not None) != self.config.use_guidance_embed:
            needs = "needs" if self.config.use_guidance_embed else "takes no"
            raise ValueError(f"guidance is {guidance}, but this network {needs} guidance embedding")
        if guidance is not None:
            at_guidance = layers.sinusoid(guidance, TIME_CHANNELS, self.dtype)
            vec_image = vec_image + self.guidance_in(at_guidance)
        if t_depth is None:
            return vec_image, None
        at_depth = layers.sinusoid(t_depth, TIME_CHANNELS, self.dtype)
        vec_depth = self.time_in_depth(at_depth)
        if self.config.cross_stream_timestep_mixing:
            vec_image = vec_image + self.cross_alpha_img * self.time_in_depth_to_img(at_depth)
            vec_depth = vec_depth + self.cross_alpha_depth * self.time_in_rgb_to_depth(at_image)
        return vec_image, vec_depth

    def decode_depth(
        self, x: Float[Tensor, "b l d"], vec: Float[Tensor, "b d"], grid: tuple[int, int]
    ) -> Float[Tensor, "b l c"]:
        """Depth tokens alone through the decoder blocks, then the head, in the head's dtype."""
        if self.config.depth_decoder_num_layers:
            ids = layers.position_ids(0, grid, 2, x.device)[-x.shape[1] :]
            rope = layers.rope_table(ids, self.config.axes_dim, self.config.theta)
            [modulation] = self.depth_decoder_modulation(vec)
            for block in self.depth_decoder_blocks:
                x = block(x, modulation, rope)
        head_dtype = self.depth_final_layer.linear.weight.dtype  # fp32 over a bf16 body: no banding
        return self.depth_final_layer(x.to(head_dtype), vec.to(head_dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The body's dtype; the depth head may have its own."""
        return self.img_in.weight.dtype


class DoubleBlock(nn.Module):
    """Each stream has its own weights; attention is over all of them."""

    def __init__(self, config: DiTConfig, names: tuple[str, ...]) -> None:
        super().__init__()
        d, wide = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.num_heads = config.num_heads
        for name in names:
            self.add_module(f"{name}_attn", Attention(d, config.num_heads))
            mlp = nn.Sequential(Linear(d, 2 * wide), SwiGLU(), Linear(wide, d))
            self.add_module(f"{name}_mlp", mlp)

    def forward(
        self,
        streams: dict[str, Tensor],
        modulations: dict[str, list[Modulation]],
        rope: Tensor,
    ) -> dict[str, Tensor]:
        lengths = [x.shape[1] for x in streams.values()]
        heads = []
        for name, x in streams.items():
            attention = getattr(self, f"{name}_attn")
            normed = layers.modulate(x, modulations[name][0])
            heads.append(layers.split_heads(attention.qkv(normed), self.num_heads, attention.norm))
        joined = layers.Heads(*(torch.cat(parts, dim=2) for parts in zip(*heads, strict=True)))
        attended = layers.attend(joined, rope).split(lengths, dim=1)

        out = {}
        for (name, x), update in zip(streams.items(), attended, strict=True):
            first, second = modulations[name]
            projected = getattr(self, f"{name}_attn").proj(update)
            x = layers.add_gated(x, projected, first)
            widened = getattr(self, f"{name}_mlp")(layers.modulate(x, second))
            out[name] = layers.add_gated(x, widened, second)
        return out


class Attention(nn.Module):
    """One stream's share of a double block's attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.norm = QKNorm(width // num_heads)
        self.proj = Linear(width, width)


class SingleBlock(nn.Module):
    """Attention and MLP side by side over the joined sequence; also the depth decoder's block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, wide = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.num_heads = config.num_heads
        self.linear1 = Linear(d, 3 * d + 2 * wide)
        self.linear2 = Linear(d + wide, d)
        self.norm = QKNorm(d // config.num_heads)
        self.activation = SwiGLU()

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        modulation: Modulation,
        rope: Tensor,
    ) -> Float[Tensor, "b l d"]:
        d = x.shape[-1]
        wide = self.linear1(layers.modulate(x, modulation))
        qkv, gates = wide.split([3 * d, wide.shape[-1] - 3 * d], dim=-1)
        attended = layers.attend(layers.split_heads(qkv, self.num_heads, self.norm), rope)
        update = self.linear2(torch.cat([attended, self.activation(gates)], dim=-1))
        return layers.add_gated(x, update, modulation)


class FinalLayer(nn.Module):
    """Modulated norm and projection to token channels."""

    def __init__(self, width: int, num_channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, num_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(
        self, x: Float[Tensor, "b l d"], vec: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b l c"]:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(layers.modulate(x, Modulation(shift, 1 + scale, scale)))
