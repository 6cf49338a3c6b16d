"""The mapper computes what it always did, whatever diffusers does with its weights meanwhile."""

import accelerate
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file, save_file
from torch import nn

from transformers_unicode2 import UniCode2ConditionMapper

SIZES = {"visual_dim": 16, "hidden_dim": 32, "output_dim": 24, "pooled_dim": 8, "num_visual_tokens": 16}
CPU = torch.device("cpu")


@pytest.fixture
def mapper():
    torch.manual_seed(0)
    return UniCode2ConditionMapper(**SIZES, num_layers=2, num_attention_heads=2, pooled_scale=2.0).eval()


@pytest.fixture
def embeds():
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))


def both(mapper, embeds):
    with torch.no_grad():
        return torch.cat([value.flatten(1) for value in mapper(embeds, return_dict=False)], 1)


def test_layers_are_those_of_torch_under_the_same_names(mapper, embeds):
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)
    )
    layers.load_state_dict(mapper.layers.state_dict())
    expected, mapper.layers = both(mapper, embeds), layers.eval()
    torch.testing.assert_close(both(mapper, embeds), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "sequential"])
def test_offloading(mapper, embeds, tmp_path, place, kind):
    expected = both(mapper, embeds)
    if kind == "sequential":
        accelerate.cpu_offload(mapper, CPU, offload_buffers=True)
        assert mapper.up.weight.device.type == "meta"
    else:
        disk = tmp_path if place == "disk" else None
        mapper.enable_group_offload(CPU, CPU, kind, num_blocks_per_group=1, offload_to_disk_path=disk)
    for _ in range(2):
        assert torch.equal(both(mapper, embeds), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_layerwise_casting(mapper, embeds, dtype, compute_dtype):
    expected = both(mapper, embeds)
    mapper.to(dtype).enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype)
    output = both(mapper, embeds)
    assert mapper.up.weight.dtype == torch.float8_e4m3fn
    assert output.dtype == (compute_dtype or dtype) == mapper.dtype
    assert (output.float() - expected).norm() < 0.1 * expected.norm()


def test_attention_backends_of_diffusers(mapper, embeds, monkeypatch):
    expected, used = both(mapper, embeds), []
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry.get_active_backend()[0]
    flex = attention_dispatch.AttentionBackendName.FLEX
    run = registry._backends[flex]
    monkeypatch.setitem(registry._backends, flex, lambda *args, **kwargs: used.append(1) or run(*args, **kwargs))
    mapper.set_attention_backend("flex")
    try:
        torch.testing.assert_close(both(mapper, embeds), expected, rtol=1e-4, atol=1e-5)
    finally:
        registry.set_active_backend(active)
    assert len(used) == 2


def test_saved_mapper_computes_the_same_and_odd_sizes_are_refused(mapper, embeds, tmp_path):
    mapper.save_pretrained(tmp_path)
    assert torch.equal(both(UniCode2ConditionMapper.from_pretrained(tmp_path), embeds), both(mapper, embeds))
    with pytest.raises(ValueError, match="`visual_dim` is 16, which 3 attention heads do not divide"):
        UniCode2ConditionMapper(**SIZES, num_layers=1, num_attention_heads=3)


@pytest.fixture
def redux():
    torch.manual_seed(0)
    return ReduxImageEncoder(redux_dim=16, txt_in_features=24)


@pytest.mark.parametrize("form", ["file", "folder", "bfloat16"])
def test_redux_is_computed_exactly(redux, embeds, tmp_path, form):
    """On the features of patches, before they become codes. What is pooled is zeros, as diffusers has it."""
    if form == "bfloat16":
        redux.bfloat16()
    redux.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    mapper = UniCode2ConditionMapper.from_redux(file if form == "file" else tmp_path, num_visual_tokens=16)
    prompt_embeds, pooled = mapper(embeds, return_dict=False)
    assert torch.equal(prompt_embeds, redux.float()(embeds).image_embeds)
    assert pooled.shape == (2, 768) and not pooled.any()
    mapper.save_pretrained(tmp_path / "mapper")
    again = UniCode2ConditionMapper.from_pretrained(tmp_path / "mapper")
    assert torch.equal(again(embeds).prompt_embeds, prompt_embeds)


def test_layers_in_a_mapper_of_redux_begin_as_none(redux, embeds, tmp_path):
    redux.save_pretrained(tmp_path)
    fields = {"num_visual_tokens": embeds.shape[1], "num_attention_heads": 2}
    mapper = UniCode2ConditionMapper.from_redux(tmp_path, num_layers=2, **fields)
    torch.testing.assert_close(mapper(embeds).prompt_embeds, redux(embeds).image_embeds)


def test_positions_begin_as_none_in_a_mapper_of_redux(redux, embeds, tmp_path):
    redux.save_pretrained(tmp_path)
    mapper = UniCode2ConditionMapper.from_redux(
        tmp_path, num_visual_tokens=16, position_embedding=True, pooled_dim=None
    )
    assert torch.equal(mapper(embeds).prompt_embeds, redux(embeds).image_embeds)
    assert mapper.row_embedding.requires_grad and mapper(embeds).pooled_prompt_embeds is None


def test_redux_is_saved_under_its_own_names(redux, embeds, tmp_path):
    """Which ComfyUI and diffusers read."""
    redux.save_pretrained(tmp_path)
    mapper = UniCode2ConditionMapper.from_redux(tmp_path, num_visual_tokens=16)
    with torch.no_grad():
        mapper.down.bias += 1
    mapper.save_redux(tmp_path / "new/redux.safetensors")
    other = ReduxImageEncoder(redux_dim=16, txt_in_features=24)
    other.load_state_dict(load_file(tmp_path / "new/redux.safetensors"))
    torch.testing.assert_close(other(embeds).image_embeds, redux(embeds).image_embeds + 1)


def test_what_is_no_redux_is_refused(mapper, tmp_path):
    mapper.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no Redux: it holds column_embedding.*redux_down.bias"):
        UniCode2ConditionMapper.from_redux(tmp_path)
    with pytest.raises(ValueError, match="There is no file or folder .*nothing; download a Redux first"):
        UniCode2ConditionMapper.from_redux(tmp_path / "nothing")
    said = "two linear layers, and this mapper also has `num_layers` 2, `output_norm` True, `position_embedding` True"
    with pytest.raises(ValueError, match=said):
        mapper.save_redux(tmp_path / "redux.safetensors")


def test_a_redux_is_saved_in_the_dtype_of_computing(redux, tmp_path):
    redux.save_pretrained(tmp_path)
    mapper = UniCode2ConditionMapper.from_redux(tmp_path)
    mapper.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    mapper.save_redux(str(tmp_path / "redux.safetensors"))
    assert {value.dtype for value in load_file(tmp_path / "redux.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="is a folder; name the file to write"):
        mapper.save_redux(tmp_path)


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def change(name, value):
    return lambda file: save_file({**load_file(file), f"redux_{name}": value}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "redux.safetensors is no whole safetensors file .*; download the Redux again"),
        (lambda file: file.write_bytes(b""), "redux.safetensors is no whole safetensors file"),
        (lambda file: torch.save(torch.zeros(2), file), "redux.safetensors is no whole safetensors file"),
        (change("down.weight", torch.zeros(24, 9)), r"do not fit each other: down.bias \(24,\), down.weight \(24, 9\)"),
        (change("up.weight", torch.zeros(48)), r"do not fit each other: .*up.weight \(48,\); download it again"),
        (
            change("down.bias", torch.full((24,), torch.nan)),
            "has 1 weights that are not finite, the first is down.bias",
        ),
    ],
)
def test_a_damaged_redux_is_refused(redux, tmp_path, damage, message):
    file = tmp_path / "redux.safetensors"
    save_file(redux.state_dict(), file)
    damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        UniCode2ConditionMapper.from_redux(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["foo", "visual_dim"])
def test_fields_that_a_redux_leaves_no_choice_of_are_refused(redux, tmp_path, field):
    redux.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{field}` cannot be chosen for the mapper of a Redux; choose among pooled_"):
        UniCode2ConditionMapper.from_redux(tmp_path, **{field: 7})


@pytest.mark.parametrize("changes", [{"pooled_dim": None}, {"position_embedding": False}, {"output_norm": False}])
def test_parts_that_are_left_out_have_no_weights(mapper, embeds, changes, tmp_path):
    smaller = UniCode2ConditionMapper(**{**SIZES, **changes})
    assert len(smaller.state_dict()) < len(UniCode2ConditionMapper(**SIZES).state_dict())
    smaller.save_pretrained(tmp_path)
    again = UniCode2ConditionMapper.from_pretrained(tmp_path)
    for one, other in zip(again(embeds, return_dict=False), smaller(embeds, return_dict=False)):
        assert (one is None and other is None) or torch.equal(one, other)
