"""The condition mapper M_φ: embeddings of visual tokens to the conditioning of a frozen diffusion decoder (Eq. 9)."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import ModelOutput

from .arguments_unicode2 import check_finite_weights


@dataclass
class UniCode2ConditionOutput(ModelOutput):
    r"""
    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, num_visual_tokens, output_dim)`):
            What a text encoder's token embeddings would be.
        pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`):
            What its pooled embedding would be; `None` for a decoder that reads none.
    """

    prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None


class UniCode2MapperAttnProcessor:
    """Attention over all tokens, by the backend that diffusers' `set_attention_backend` names."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention: "UniCode2MapperAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = (value.to(hidden_states.dtype) for value in (attention.in_proj_weight, attention.in_proj_bias))
        states = nn.functional.linear(hidden_states, weight, bias)  # (batch_size, num_visual_tokens, 3 * visual_dim)
        query, key, value = states.unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
        output = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )  # (batch_size, num_visual_tokens, num_heads, head_dim)
        return attention.out_proj(output.flatten(-2))


class UniCode2MapperAttention(nn.Module, AttentionModuleMixin):
    """[`~torch.nn.MultiheadAttention`] whose weights are used by the modules that hold them, which offloading needs."""

    _default_processor_cls = UniCode2MapperAttnProcessor
    _available_processors = [UniCode2MapperAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, visual_dim: int, num_heads: int):
        super().__init__()
        if visual_dim % num_heads:
            raise ValueError(f"`visual_dim` is {visual_dim}, which {num_heads} attention heads do not divide.")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * visual_dim, visual_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * visual_dim))
        self.out_proj = nn.Linear(visual_dim, visual_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.set_processor(UniCode2MapperAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class UniCode2MapperLayer(nn.Module):
    """A transformer layer that normalises first, with the names of [`~torch.nn.TransformerEncoderLayer`]."""

    def __init__(self, visual_dim: int, num_heads: int):
        super().__init__()
        self.self_attn = UniCode2MapperAttention(visual_dim, num_heads)
        self.linear1 = nn.Linear(visual_dim, 4 * visual_dim)
        self.linear2 = nn.Linear(4 * visual_dim, visual_dim)
        self.norm1 = nn.LayerNorm(visual_dim)
        self.norm2 = nn.LayerNorm(visual_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(normalise(self.norm1, hidden_states))
        hidden = nn.functional.gelu(self.linear1(normalise(self.norm2, hidden_states)))
        return hidden_states + self.linear2(hidden)


def normalise(norm: nn.Module | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm, if there is one, in the dtype of its own weight, which layerwise casting leaves as it is."""
    if norm is None:
        return hidden_states
    return norm(hidden_states.to(norm.weight.dtype)).to(hidden_states.dtype)


class UniCode2ConditionMapper(ModelMixin, ConfigMixin):
    r"""
    Two linear layers per token, as in FLUX Redux, behind a learnt 2-D position embedding and, optionally, a few
    transformer layers.

    FLUX and SDXL ignore the order of their conditioning tokens, so the position must be inside the token. They do not
    normalise it either, so the output is brought to a learnt scale per channel that starts at `output_scale`.

    Args:
        visual_dim (`int`, defaults to 1152): width of a visual token embedding, the `codebook_dim`.
        hidden_dim (`int`, defaults to 12288): width between the two linear layers.
        output_dim (`int`, defaults to 4096): width of the decoder's text embeddings.
        pooled_dim (`int`, *optional*, defaults to 768): width of the decoder's pooled text embedding; `None` for a
            decoder that reads none.
        num_visual_tokens (`int`, defaults to 729): tokens per image, a square number.
        num_layers (`int`, defaults to 0): transformer layers over the tokens in front of the two linear layers.
        num_attention_heads (`int`, defaults to 16): their heads.
        output_scale (`float`, defaults to 1.0): starting root mean square of `prompt_embeds`; take the text encoder's.
        pooled_scale (`float`, defaults to 1.0): the same for `pooled_prompt_embeds`.
        position_embedding (`bool`, defaults to `True`): whether tokens carry their position.
        output_norm (`bool`, defaults to `True`): whether the outputs are brought to the learnt scales.
    """

    @register_to_config
    def __init__(
        self,
        visual_dim: int = 1152,
        hidden_dim: int = 12288,
        output_dim: int = 4096,
        pooled_dim: int | None = 768,
        num_visual_tokens: int = 729,
        num_layers: int = 0,
        num_attention_heads: int = 16,
        output_scale: float = 1.0,
        pooled_scale: float = 1.0,
        position_embedding: bool = True,
        output_norm: bool = True,
    ):
        super().__init__()
        side = round(num_visual_tokens**0.5)
        if side * side != num_visual_tokens:
            raise ValueError(f"`num_visual_tokens` is {num_visual_tokens}, which is not a square number.")
        if position_embedding:
            self.row_embedding = nn.Parameter(torch.zeros(side, 1, visual_dim))
            self.column_embedding = nn.Parameter(torch.zeros(1, side, visual_dim))
            nn.init.normal_(self.row_embedding, std=0.02)
            nn.init.normal_(self.column_embedding, std=0.02)
        self.layers = nn.ModuleList(UniCode2MapperLayer(visual_dim, num_attention_heads) for _ in range(num_layers))
        self.up = nn.Linear(visual_dim, hidden_dim)
        self.act = nn.SiLU()
        self.down = nn.Linear(hidden_dim, output_dim)
        self.norm = make_norm(output_dim, output_scale) if output_norm else None
        if pooled_dim is not None:
            self.pool_score = nn.Linear(hidden_dim, 1)
            self.pool = nn.Linear(hidden_dim, pooled_dim)
            self.pool_norm = make_norm(pooled_dim, pooled_scale) if output_norm else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Stock. Raises `ValueError` when weights are missing, which would be random, or are not finite."""
        want_info, source = kwargs.pop("output_loading_info", False), pretrained_model_name_or_path
        mapper, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"The mapper in {source} lacks {len(missing)} weights; the first is {missing[0]}.")
        check_finite_weights(f"The mapper in {source}", mapper)
        return (mapper, info) if want_info else mapper

    @classmethod
    def from_redux(cls, path: str | Path, **fields) -> "UniCode2ConditionMapper":
        r"""
        A mapper that does what FLUX.1 Redux does with the patch features of SigLIP. Codes are means of such features,
        so FLUX redraws from codes without any training.

        Nothing is pooled: `pooled_prompt_embeds` are zeros, as diffusers gives FLUX with Redux.

        Args:
            path (`str` or `Path`): a Redux file, or a folder of a `ReduxImageEncoder`.
            **fields: of the mapper, such as `num_visual_tokens`; widths are those of the file.

        Raises:
            `ValueError`: when the file holds anything but the two layers of Redux, or values that are not finite; on
                a field that a mapper does not have, or that the file decides.
        """
        weights = read_redux(Path(path))
        hidden_dim, visual_dim = weights["up.weight"].shape
        sizes = {"visual_dim": visual_dim, "hidden_dim": hidden_dim, "output_dim": len(weights["down.weight"])}
        free = [name for name in signature(cls).parameters if name not in sizes]
        wrong = [name for name in fields if name not in free]
        if wrong:
            raise ValueError(
                f"`{wrong[0]}` cannot be chosen for the mapper of a Redux; choose among {', '.join(free)}."
            )
        mapper = cls(**{"position_embedding": False, "output_norm": False, **fields, **sizes})
        state = mapper.state_dict()
        pool = {name: torch.zeros_like(value) for name, value in state.items() if name.startswith("pool")}
        place = {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("_embedding")}
        mapper.load_state_dict({**state, **pool, **place, **{k: v.float() for k, v in weights.items()}})
        mapper.make_identity()
        check_finite_weights(f"The Redux in {path}", mapper)
        return mapper

    def make_identity(self, first: int = 0) -> None:
        """Makes the transformer layers from `first` on pass on what they get, until they learn."""
        for layer in self.layers[first:]:
            for last in (layer.self_attn.out_proj, layer.linear2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def save_redux(self, file: str | Path) -> None:
        r"""
        Writes the mapper as a Redux file, which ComfyUI loads as a style model. The pooled output has no place in it.

        Folders above it are made. Weights are in the dtype that the mapper computes in.

        Raises:
            `ValueError`: when it has more than the two layers of Redux, or `file` is a folder.
        """
        more = {"num_layers": self.config.num_layers, "output_norm": self.config.output_norm}
        more["position_embedding"] = self.config.position_embedding
        more = [f"`{name}` {value}" for name, value in more.items() if value]
        if more:
            raise ValueError(f"A Redux file holds two linear layers, and this mapper also has {', '.join(more)}.")
        if Path(file).is_dir():
            raise ValueError(f"{file} is a folder; name the file to write, such as redux.safetensors in it.")
        layers = {"redux_up": self.up, "redux_down": self.down}
        weights = {
            f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()
        }
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        # Layerwise casting stores them in 8 bits, which readers of such files do not know
        save_file({name: value.to(self.dtype).contiguous() for name, value in weights.items()}, file)

    def forward(self, visual_embeds: torch.Tensor, return_dict: bool = True) -> UniCode2ConditionOutput | tuple:
        r"""
        Args:
            visual_embeds (`torch.Tensor` of shape `(batch_size, num_visual_tokens, visual_dim)`):
                Rows of C2, in raster order.

        Raises:
            `ValueError`: on another number of tokens.
        """
        if visual_embeds.shape[1] != self.config.num_visual_tokens:
            raise ValueError(
                f"The mapper takes {self.config.num_visual_tokens} visual tokens an image and got "
                f"{visual_embeds.shape[1]}."
            )
        hidden = visual_embeds.to(self.dtype)
        if self.config.position_embedding:
            position = (self.row_embedding + self.column_embedding).flatten(0, 1)  # (num_visual_tokens, visual_dim)
            hidden = hidden + position.to(self.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.act(self.up(hidden))  # (batch_size, num_visual_tokens, hidden_dim)
        prompt_embeds, pooled = normalise(self.norm, self.down(hidden)), None
        if self.config.pooled_dim is not None:
            weights = self.pool_score(hidden).softmax(1)  # (batch_size, num_visual_tokens, 1)
            pooled = normalise(self.pool_norm, self.pool((weights * hidden).sum(1)))  # (batch_size, pooled_dim)
        if not return_dict:
            return prompt_embeds, pooled
        return UniCode2ConditionOutput(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)


def make_norm(dim: int, scale: float) -> nn.RMSNorm:
    """A norm whose output has the root mean square `scale`, until it learns others."""
    norm = nn.RMSNorm(dim, eps=1e-6)
    nn.init.constant_(norm.weight, scale)
    return norm


def read_redux(path: Path) -> dict[str, torch.Tensor]:
    """The weights of Redux as the mapper names them. Raises `ValueError` when there are others, or not all of them."""
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}; download a Redux first, names on the Hub are not read.")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    weights = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); download the Redux again.") from error
    expected = {f"redux_{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
    if weights.keys() != expected:
        found = ", ".join(sorted(weights)[:4]) or "no weights"
        raise ValueError(f"{path} is no Redux: it holds {found}; Redux has {', '.join(sorted(expected))}.")
    shapes = {name.removeprefix("redux_"): tuple(value.shape) for name, value in weights.items()}
    hidden_dim, output_dim = (shapes[f"{layer}.weight"][:1] for layer in ("up", "down"))
    fitting = shapes | {"up.bias": hidden_dim, "down.bias": output_dim, "down.weight": output_dim + hidden_dim}
    if shapes != fitting or any(len(shapes[f"{layer}.weight"]) != 2 for layer in ("up", "down")):
        said = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
        raise ValueError(f"The layers of the Redux in {path} do not fit each other: {said}; download it again.")
    return {name.removeprefix("redux_"): value for name, value in weights.items()}
