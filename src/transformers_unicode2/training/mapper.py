"""Training of the condition mapper against a frozen FLUX (section 3.4).

    accelerate launch -m transformers_unicode2.training.mapper --config training_recipes/unicode2-tiny/mapper-flux.yaml

Two losses, weighted by the recipe. The contrastive loss is the paper's (Eq. 10): the pooled conditioning of an image against
the frozen text encoder's pooled embedding of its caption, with the other captions of the batch as negatives. It leaves the
scale and the single tokens free, so flow matching through the frozen decoder, which the paper does not use, is there to teach
the tokens what the decoder understands. For a decoder that reads image prompts already, as FLUX.1-dev does with FLUX.1 Redux, the mapper
can start from what makes these out of patch features, and be drawn to its outputs for the same image (`image_prompts`,
`regression_weight`). A trained mapper can go on by itself, without a decoder: it learns to make of codes what it made of the patch
features behind them (`start`, `features_share`). Neither the decoder nor C2 learns.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class MapperArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet with images and captions"})
    tokens: str = field(metadata={"help": "folder of the same rows, pre-tokenized"})
    model: str = field(metadata={"help": "UniCode² checkpoint whose C2 embeds the tokens"})
    decoder: str | None = field(
        default=None,
        metadata={"help": "frozen FLUX pipeline with its text encoders; regression from `start` can do without"},
    )
    start: str | None = field(
        default=None,
        metadata={"help": "UniCode2ConditionMapper that goes on learning, drawn to what it makes of patch features"},
    )
    mapper: dict = field(
        default_factory=dict, metadata={"help": "fields of UniCode2ConditionMapper (default: those of `start`)"}
    )
    contrastive_weight: float = 1.0
    flow_matching_weight: float = 1.0
    flow_matching_share: float = field(
        default=1.0, metadata={"help": "share of the steps with flow matching, which takes most of a step's time"}
    )
    regression_weight: float = field(
        default=0.0, metadata={"help": "of the squared distance to the image prompts, or to what `start` makes"}
    )
    image_prompts: str | None = field(
        default=None, metadata={"help": "UniCode2ConditionMapper from patch features to prompts of this decoder"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "vision encoder of these patch features (default: the one in `model`)"}
    )
    features_share: float = field(
        default=0.0, metadata={"help": "share of the images whose patch features are mapped in place of their codes"}
    )
    code_noise: float = field(
        default=0.0,
        metadata={
            "help": "share of the codes, at most, that are replaced by near ones, as a language model would err; each image has its own"
        },
    )
    temperature: float = field(default=0.07, metadata={"help": "tau of Eq. 10"})
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices, AdamW for the rest; AdamW alone if false"}
    )


@torch.no_grad()
def encode_latents(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels `(batch_size, 3, height, width)` in [-1, 1] to normalised VAE latents `(batch_size, channels, h, w)`."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.mode().to(vae.dtype)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def flow_matching_loss(
    transformer,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    shift: float = 1.0,
) -> torch.Tensor:
    """The flow-matching loss of a FLUX transformer, a scalar.

    `x_t = (1 - t) x_0 + t noise` with `t` logit-normal in (0, 1), as FLUX was trained; the target is `noise - x_0`. `latents` is
    `(batch_size, channels, h, w)`, `prompt_embeds` `(batch_size, num_tokens, joint_attention_dim)`, `pooled_prompt_embeds`
    `(batch_size, pooled_projection_dim)`. `shift`, as of the scheduler, moves the times towards 1, where there is more noise.
    """
    from diffusers import FluxPipeline
    from diffusers.training_utils import compute_density_for_timestep_sampling

    batch_size, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, batch_size, channels, height, width)  # (batch_size, h*w/4, 4*channels)
    like = {"device": latents.device, "dtype": latents.dtype}
    image_ids = FluxPipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, **like)
    times = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0).to(latents.device)
    times = shift * times / (1 + (shift - 1) * times)
    noise = torch.randn_like(packed)
    mix = times[:, None, None]
    prediction = transformer(
        hidden_states=(1 - mix) * packed + mix * noise,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        timestep=times,
        img_ids=image_ids,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, **like),
    ).sample
    return torch.nn.functional.mse_loss(prediction.float(), (noise - packed).float())


def contrastive_loss(mapped: torch.Tensor, text: torch.Tensor, temperature: float) -> torch.Tensor:
    """Eq. 10: cosine similarity over `temperature`, in-batch negatives; both `(batch_size, dim)`. Equal texts are no negatives."""
    mapped, text = (
        torch.nn.functional.normalize(mapped.float(), dim=-1),
        torch.nn.functional.normalize(text.float(), dim=-1),
    )
    twins = (text @ text.T > 1 - 1e-5).fill_diagonal_(False)
    logits = (mapped @ text.T / temperature).masked_fill(twins, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class NearCodes:
    """Replaces codes by one of their nearest, as a language model errs that writes an image.

    Finding the nearest of all takes `2 codebook_size^2 visual_dim` operations, once a run: seconds for a few thousand codes, a minute on a
    GPU for 500,000.

    Args:
        visual_embeddings: C2, `(codebook_size, visual_dim)`.
        num_nearest: codes to choose from; the median error of unicode2-tiny's language model is the 6th nearest.
    """

    def __init__(self, visual_embeddings: torch.Tensor, num_nearest: int = 16):
        from tqdm import tqdm

        rows, nearest = visual_embeddings.float(), []
        for start in tqdm(range(0, len(rows), 1024), desc="nearest codes"):
            distances = torch.cdist(rows[start : start + 1024], rows)
            distances[:, start : start + 1024].fill_diagonal_(torch.inf)  # not the code itself
            nearest.append(distances.topk(min(num_nearest, len(rows) - 1), largest=False).indices.int())
        self.nearest = torch.cat(nearest)  # (codebook_size, num_nearest)

    def __call__(self, codes: torch.Tensor, share: float) -> torch.Tensor:
        """Codes `(num_images, num_visual_tokens)`, int64; of each image a share that is uniform in [0, `share`] is replaced."""
        choice = torch.randint(self.nearest.shape[1], codes.shape, device=codes.device)
        limits = share * torch.rand(len(codes), 1, device=codes.device)
        replaced = torch.rand(codes.shape, device=codes.device) < limits
        return torch.where(replaced, self.nearest[codes, choice].long(), codes)


class MapperWithLosses(torch.nn.Module):
    """The mapper, the only part that learns, and what its losses need, frozen and out of its state dict."""

    def __init__(self, mapper, decoder, visual_embeddings: torch.Tensor, args: MapperArguments):
        super().__init__()
        self.mapper, self.args = mapper, args
        near_codes = NearCodes(visual_embeddings) if args.code_noise else None
        # in a list, so that nothing of it is registered
        self.frozen = [decoder, visual_embeddings.detach(), near_codes]

    def forward(self, codes, latents=None, input_ids=None, features=None, **targets):
        """
        `features` `(num_images, num_visual_tokens, visual_dim)` take the places of the first codes; `targets` are what regression draws
        the outputs of these names to.
        """
        decoder, visual_embeddings, near_codes = self.frozen
        if near_codes:
            codes = near_codes(codes, self.args.code_noise)
        embeds = visual_embeddings[codes]  # (batch_size, num_visual_tokens, visual_dim)
        if features is not None:
            embeds = torch.cat([features.to(embeds), embeds[len(features) :]])
        small = embeds.device.type == "cpu" and embeds.shape[1] <= 256
        with sdpa_kernel(SDPBackend.MATH) if small else nullcontext():  # the fastest there
            condition = self.mapper(embeds)
        loss, losses = condition.prompt_embeds.sum() * 0.0, {}
        if self.args.contrastive_weight:
            with torch.no_grad():
                text = decoder.text_encoder(input_ids).pooler_output  # (batch_size, pooled_dim)
            contrastive = contrastive_loss(condition.pooled_prompt_embeds, text, self.args.temperature)
            loss = loss + self.args.contrastive_weight * contrastive
            losses["contrastive"] = contrastive.detach()
        # a pass through the decoder, by far the largest part of a step
        if self.args.flow_matching_weight and torch.rand(()) < self.args.flow_matching_share:
            shift = decoder.scheduler.config.shift
            flow = flow_matching_loss(decoder.transformer, latents, *condition.values(), shift=shift)
            loss = loss + self.args.flow_matching_weight * flow
            losses["flow"] = flow.detach()
        for name, target in targets.items():
            distance = (condition[name].float() - target).square().mean() / target.var()
            loss = loss + self.args.regression_weight * distance
            losses[name] = distance.detach()
        return {"loss": loss, **losses}


def check_arguments(args: MapperArguments) -> None:
    """Raises `ValueError` when what a loss needs is not given, or when nothing would be learnt."""
    if args.start and args.image_prompts:
        raise ValueError("`start` is drawn to its own outputs; give `start` or `image_prompts`, not both.")
    if args.encoder and not args.image_prompts:
        raise ValueError("`encoder` makes the patch features for `image_prompts`, which is not given.")
    weights = {name: getattr(args, f"{name}_weight") for name in ("contrastive", "flow_matching", "regression")}
    given = ", ".join(f"`{name}_weight` {value:g}" for name, value in weights.items())
    if not args.decoder and (not args.start or weights["contrastive"] or weights["flow_matching"]):
        raise ValueError(
            f"Without a `decoder` a mapper learns from `start` ({args.start}) by regression only; got {given}."
        )
    taught = bool(args.start or args.image_prompts)
    if min(weights.values()) < 0 or not (
        weights["contrastive"] or weights["flow_matching"] or weights["regression"] and taught
    ):
        raise ValueError(f"There is nothing to learn: {given}; none may be negative, and regression needs a teacher.")
    if not 0 <= args.features_share < 1 or args.features_share and not args.start:
        raise ValueError(f"`features_share` is {args.features_share:g}; it must be in [0, 1), and 0 without `start`.")
    if not 0 <= args.code_noise <= 1:
        raise ValueError(f"`code_noise` is {args.code_noise:g}; it must be in [0, 1].")


def start_from(mapper: torch.nn.Module, other: torch.nn.Module, whole: bool = False) -> None:
    """
    Copies the weights of `other` that make `prompt_embeds`, as far as `mapper` has them in the same shape; with `whole`, all of them.
    Transformer layers that only `mapper` has begin as the identity.

    Raises:
        `ValueError`: with `whole`, when `mapper` is not `other` with more layers.
    """
    if whole:
        pairs = {key: (other.config[key], mapper.config[key]) for key in inspect.signature(type(other)).parameters}
        differing = [
            f"`{key}` was {old} and is {new}"
            for key, (old, new) in pairs.items()
            if (new < old if key == "num_layers" else new != old) and not key.endswith("_scale")
        ]
        if differing:
            raise ValueError(f"A mapper goes on learning only as it is or with more layers: {', '.join(differing)}.")
    for layer in mapper.layers[len(other.layers) :]:
        for last in (layer.self_attn.out_proj, layer.linear2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    own = mapper.state_dict()
    fitting = {k: v for k, v in other.state_dict().items() if k in own and v.shape == own[k].shape}
    mapper.load_state_dict({**own, **{k: v for k, v in fitting.items() if whole or not k.startswith("pool")}})


def main(args: MapperArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.optimizer import check_muon
    from transformers_unicode2.training.stage import hash_inputs, stage
    from transformers_unicode2.training.tokens import check_same_rows, find_tables

    check_arguments(args)
    if args.muon:
        check_muon(training_args)
    images, tokens = find_tables(args.data, "train", "`data`"), find_tables(args.tokens, "train", "`tokens`")

    def hash_all() -> dict:
        check_same_rows(images, tokens)
        checkpoints = ("model", "start", "image_prompts", "encoder")
        return hash_inputs(args, images=("data",), tokens=("tokens",), checkpoints=checkpoints, pipelines=("decoder",))

    with stage("mapper", args, training_args, hash_all) as held:
        if not held.finished:
            train(args, training_args, tokens, held)


def train(args: MapperArguments, training_args, tokens: list, held) -> None:
    from diffusers import FluxPipeline
    from transformers import SiglipVisionModel, set_seed

    from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ForConditionalGeneration
    from transformers_unicode2.processes import agree
    from transformers_unicode2.training.data import load_images_with_codes, pixel_collator
    from transformers_unicode2.training.optimizer import MuonWithAdamW
    from transformers_unicode2.training.stage import StageTrainer
    from transformers_unicode2.training.tokens import check_codes

    set_seed(training_args.seed)
    device = training_args.device
    source = UniCode2ForConditionalGeneration.from_pretrained(args.model)
    size, num_tokens = source.config.codebook_config.codebook_size, source.config.num_image_tokens
    agree(lambda: check_codes(tokens, args.model, size, num_tokens))
    visual_embeddings = source.model.visual_embeddings.weight.detach().to(device)
    rows = load_images_with_codes(args.data, args.tokens)
    options, decoder, teacher, encoder = dict(args.mapper), None, None, None
    if args.decoder:
        decoder = FluxPipeline.from_pretrained(args.decoder)
        with torch.no_grad():  # calibrate the starting scale to the text encoders' (see UniCode2ConditionMapper)
            sample = decoder.encode_prompt(rows["caption"][:64], None, max_sequence_length=decoder.tokenizer_max_length)
        options.setdefault("output_scale", sample[0].square().mean().sqrt().item())
        options.setdefault("pooled_scale", sample[1].square().mean().sqrt().item())
        for module in (decoder.transformer, decoder.vae, decoder.text_encoder):
            module.requires_grad_(False).eval().to(device)
    if args.start or args.image_prompts:
        teacher = UniCode2ConditionMapper.from_pretrained(args.start or args.image_prompts)
        teacher = teacher.float().requires_grad_(False).eval().to(device)
        encoder = (
            SiglipVisionModel.from_pretrained(args.encoder) if args.encoder else source.get_quantizer().vision_model
        )
        encoder = encoder.requires_grad_(False).eval().to(device)
    del source
    if args.start:
        parameters = inspect.signature(UniCode2ConditionMapper).parameters
        options = {key: teacher.config[key] for key in parameters} | options
    mapper = UniCode2ConditionMapper(**options)
    if teacher:
        start_from(mapper, teacher, whole=bool(args.start))

    def collate(batch):
        pixel_values = pixel_collator(batch)["pixel_values"].to(device)
        inputs = {"codes": torch.tensor([row["codes"] for row in batch])}
        if decoder:
            captions, max_length = [row["caption"] for row in batch], decoder.tokenizer_max_length
            inputs["input_ids"] = decoder.tokenizer(
                captions, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
            )["input_ids"]
            inputs["latents"] = encode_latents(decoder.vae, pixel_values).cpu()
        if teacher:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=training_args.bf16):
                features = encoder(pixel_values).last_hidden_state  # (batch_size, num_patches, visual_dim)
                target = teacher(features)
            inputs["prompt_embeds"] = target.prompt_embeds.float().cpu()
            if args.start:
                inputs["pooled_prompt_embeds"] = target.pooled_prompt_embeds.float().cpu()
                inputs["features"] = features[: round(args.features_share * len(features))].float().cpu()
        return inputs

    model = MapperWithLosses(mapper, decoder, visual_embeddings, args)
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("down", "pool")) if args.muon else None
    optimizers = (optimizer, None)
    trainer = StageTrainer(model, training_args, train_dataset=rows, data_collator=collate, optimizers=optimizers)
    held.train(trainer)
    with held.result() as folder:
        if trainer.is_world_process_zero():
            mapper.save_pretrained(folder)


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, MapperArguments, TrainingArguments)
