import pytest
import tiny
import torch
from torch import nn

from vlmq.exporter import families
from vlmq.exporter.errors import VlmqError
from vlmq.exporter.families import family_of
from vlmq.exporter.walk import walk


def walked(variant):
    model = tiny.tiny(variant)
    return model, walk(model, family_of(model.config))


def test_every_linear_of_the_model_is_a_site_or_kept_for_a_reason(variant):
    model, found = walked(variant)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sites = [site.name for site in found.sites]
    assert len(sites) == len(set(sites))
    assert set(sites) | set(found.kept) == linears
    assert not set(sites) & set(found.kept)
    assert all(found.kept.values())


def test_a_linear_that_no_table_names_stops_the_walk(variant):
    model = tiny.tiny(variant)
    model.extra = nn.Linear(64, 64)
    with pytest.raises(VlmqError, match=r"extra: 1 linears are not in the table"):
        walk(model, family_of(model.config))


def test_a_line_of_the_table_that_matches_nothing_stops_the_walk(monkeypatch):
    monkeypatch.setattr(families, "OPT", (*families.OPT, families.feedforward("fc3")))
    model = tiny.tiny("blip2-opt")
    with pytest.raises(VlmqError, match="fc3 matches no linear"):
        walk(model, family_of(model.config))


def test_linears_said_to_share_an_input_do_and_no_others_do(variant):
    """The table's claim of what reads what, against the tensors that really arrive."""
    model, found = walked(variant)
    arrived = {}
    for site in found.sites:
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: arrived.__setitem__(name, args[0].detach().clone())
        )
    processor = tiny.processor(variant)
    from PIL import Image

    text = family_of(model.config).question.format("what is the colour of the circle?")
    inputs = processor(images=Image.effect_noise((20, 20), 80).convert("RGB"), text=text, return_tensors="pt")
    with torch.no_grad():
        model(**tiny.forward_inputs(variant, inputs))
    assert set(arrived) == {site.name for site in found.sites}  # so no dead block is among the sites
    for block in found.blocks:
        for entry in block.inputs:
            first = arrived[entry.sites[0].name]
            assert all(torch.equal(first, arrived[site.name]) for site in entry.sites)
        firsts = [arrived[entry.sites[0].name] for entry in block.inputs]
        for index, one in enumerate(firsts):
            assert not any(one.shape == other.shape and torch.equal(one, other) for other in firsts[index + 1 :])


def test_the_vision_layer_that_llava_never_reads_is_kept_for_that_reason():
    _, found = walked("llava-llama")
    dead = {name for name, reason in found.kept.items() if "never read" in reason}
    assert dead
    assert all(name.startswith("model.vision_tower.encoder.layers.2.") for name in dead)


def test_grouped_query_heads_leave_nothing_to_fold_before_the_output_projection():
    for variant, foldable in (("llava-llama", True), ("llava-mistral", False)):
        _, found = walked(variant)
        sources = {site.name: entry.source for block in found.blocks for entry in block.inputs for site in entry.sites}
        assert (sources["model.language_model.layers.0.self_attn.o_proj"] is not None) == foldable


def test_a_fused_projection_names_the_rows_of_its_parts():
    _, found = walked("blip2-opt")
    site = next(site for site in found.sites if site.parts)
    assert site.parts == ("q", "k", "v")
    assert site.part_rows("v") == slice(128, 192)


def test_a_text_model_alone_is_refused_in_one_line():
    from transformers import LlamaConfig

    with pytest.raises(VlmqError, match="'llama' is not a vision-language model vlmq knows"):
        family_of(LlamaConfig())
