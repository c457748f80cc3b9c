"""GroupViT against transformers' port on copied weights, and against numbers by hand where the port differs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import GroupViTConfig, GroupViTModel
from transformers.models.groupvit import modeling_groupvit as port

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.text import TextSettings
from pipeline.models.groupvit import NETWORK, TINY, Config, Groupvit
from pipeline.models.groupvit.network import (
    Grouped,
    GroupingNetwork,
    assign,
    gumbel,
    hard_assignment,
    kept_branches,
    uniforms,
)
from pipeline.models.groupvit.prompts import TEMPLATES, PromptReader, SeedReader
from pipeline.models.groupvit.views import (
    GroupedView,
    GroupedWindow,
    assignment_maps,
    best_of_views,
    resized,
    segment_scores,
)
from pipeline.models.losses import contrastive_loss
from pipeline.models.segments import ImageViews, Segmentation
from pipeline.shards.sample import Sample

SHAPES = {
    "two stages": {},
    "one stage": {"depths": (2,), "group_tokens": (5,), "segments": (3,)},
    "no blocks after the last grouping": {"depths": (1, 2), "group_tokens": (6, 4)},
    "fewer segments than tokens": {"group_tokens": (6, 4), "segments": (6, 2)},
}
WORDS = ("red star", "blue disc", "green", "a b c")


def groupvit(**changes: Any) -> Groupvit:
    torch.manual_seed(0)
    method = Groupvit(Config(**{**TINY, **changes})).eval()
    with torch.no_grad():  # away from the start, where tokens of the second stage are equal
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def ported(method: Groupvit) -> Any:
    """The port with the weights of ``method``."""
    theirs = GroupViTModel(GroupViTConfig(**json.loads(method.description()[NETWORK]))).eval()
    theirs.load_state_dict(method.model.state_dict())
    return theirs


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_assignments_and_loss_are_the_ports(shape: str) -> None:
    method = groupvit(**SHAPES[shape])
    theirs = ported(method)
    pixels = method.normalised(torch.stack([image(32, 32, seed) for seed in range(3)]))
    tokens = method.tokenizer(["a red star", "two blue discs, on a table", "x"])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=pixels, output_attentions=True, return_loss=True)
        found = method.model.group(pixels)
        images = method.model.projected("visual", found.tokens.mean(dim=1))
        texts = method.encode_text(tokens)
        loss = contrastive_loss(images, texts, method.model.logit_scale.exp())
    torch.testing.assert_close(found.tokens, expected.vision_model_output.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(found.logits) == len(expected.vision_model_output.attentions) == len(method.config.group_tokens)
    for logits, attention in zip(found.logits, expected.vision_model_output.attentions, strict=True):
        torch.testing.assert_close(logits.softmax(dim=1), attention, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(images, expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts, expected.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_ports() -> None:
    """Without noise; the straight-through gradient through both groupings included."""
    method = groupvit()
    theirs = ported(method)
    pixels = method.normalised(torch.stack([image(32, 32, seed) for seed in range(3)]))
    weights = torch.randn(3, 3, 32)
    (method.model.group(pixels).tokens * weights).sum().backward()
    (theirs.vision_model(pixels).last_hidden_state * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in method.model.vision_model.named_parameters():
        if parameter.requires_grad:
            wanted = expected[f"vision_model.{name}"].grad
            slack = max(1e-5, 1e-4 * float(wanted.abs().max()))  # some biases have no effect: rounding errors
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=slack)


def test_untrained_biases_have_no_effect() -> None:
    method = groupvit().train()
    batch = training_batch(method)
    before = method.training_step(batch)
    untrained = [parameter for parameter in method.parameters() if not parameter.requires_grad]
    assert len(untrained) == 7
    with torch.no_grad():
        for parameter in untrained:
            parameter.add_(torch.randn(()))
    after = method.training_step(batch)
    for name, loss in before.items():
        torch.testing.assert_close(after[name], loss, rtol=1e-3, atol=1e-3)


def training_batch(method: Groupvit, count: int = 4) -> dict[str, Tensor]:
    texts = method.tokenizer([f"a red {number} star" for number in range(count)])[:, :9]
    prompts = torch.stack([method.tokenizer([f"a {number} {k}" for k in range(2)])[:, :9] for number in range(count)])
    images = torch.stack([image(32, 32, seed) for seed in range(count)])
    return {"image": images, "text": texts, "prompts": prompts, "seeds": torch.arange(count) * 1_000_003}


@pytest.mark.parametrize("height, width", [(64, 64), (32, 64), (40, 24)])
def test_positions_are_resized_as_in_the_port(height: int, width: int) -> None:
    method = groupvit()
    theirs = ported(method)
    pixels = method.normalised(image(height, width)[None])
    with torch.no_grad():
        states = theirs.vision_model.embeddings(pixels, interpolate_pos_encoding=True)
        expected = theirs.vision_model.encoder(states, output_attentions=True, return_dict=True)
        found = method.model.group(pixels)
    last = theirs.vision_model.layernorm(expected.last_hidden_state)
    torch.testing.assert_close(found.tokens, last, rtol=1e-4, atol=1e-5)
    assert found.logits[0].shape == (1, 6, height * width // 64)


def test_sizes_are_the_papers() -> None:
    """Millions of parameters, as the authors' model has them."""
    with torch.device("meta"):
        network = GroupingNetwork(Config().network())

    def millions(part: Any) -> float:
        return sum(parameter.numel() for parameter in part.parameters()) / 1e6

    parts = network.vision_model, network.text_model, network.text_projection, network.visual_projection
    found = [round(millions(part), 2) for part in parts]
    assert found == [28.84, 22.15, 2.11, 2.63]


def test_initial_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    model: Any = Groupvit(Config(**{**TINY, "width": 96, "heads": 3, "text_width": 64})).model.requires_grad_(False)
    vision, text = model.vision_model, model.text_model
    for tensor in (
        vision.embeddings.position_embeddings,
        vision.encoder.stages[0].group_token,
        vision.encoder.stages[1].layers[0].self_attn.q_proj.weight,
        vision.encoder.stages[1].layers[0].mlp.fc1.weight,
        vision.encoder.stages[0].downsample.assign.proj.weight,
        text.embeddings.token_embedding.weight,
    ):
        assert float(tensor.std()) == pytest.approx(0.02, rel=0.1)
    assert not vision.encoder.stages[1].group_token.any()
    assert float(text.embeddings.position_embedding.weight.std()) == pytest.approx(0.01, rel=0.1)
    layer = text.encoder.layers[0]
    assert float(layer.self_attn.q_proj.weight.std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(layer.self_attn.out_proj.weight.std()) == pytest.approx(64**-0.5 * 2**-0.5, rel=0.1)
    assert float(layer.mlp.fc1.weight.std()) == pytest.approx(128**-0.5, rel=0.1)
    bound = 96**-0.5  # torch's linear layers are uniform up to here
    assert bound * 0.95 < float(model.visual_projection[0].weight.abs().max()) <= bound


def test_a_bag_of_words_has_no_order() -> None:
    torch.manual_seed(0)
    method = Groupvit(Config(**{**TINY, "text_start": "bag_of_words"})).eval()  # one layer
    tokens = method.tokenizer(["a red star", "star red a", "a red star star", "a blue star"])
    with torch.no_grad():
        states = method.model.text_states(tokens)
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-4)
    assert all((states[0] - states[other]).abs().max() > 0.1 for other in (2, 3))


def test_hard_assignment_has_the_softmax_gradient() -> None:
    """One-hot forward; backward, finite differences of a weighted sum of the softmax."""
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    logits.requires_grad_()
    hard = hard_assignment(logits)
    assert torch.equal(hard, functional.one_hot(logits.argmax(dim=1), 4).transpose(1, 2).double())
    (hard * weights).sum().backward()
    step, numeric = 1e-6, torch.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        moved = torch.zeros_like(logits)
        moved[place] = step
        with torch.no_grad():
            both = [((logits + sign * moved).softmax(dim=1) * weights).sum() for sign in (1, -1)]
        numeric[place] = (both[0] - both[1]) / (2 * step)
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-6, atol=1e-9)


def test_two_patches_by_hand() -> None:
    """Hard sums are divided by their count plus one, and the segments' own vectors are added."""
    method = groupvit(group_tokens=(2,), depths=(1,))
    block: Any = method.model.vision_model.encoder.stages[0].downsample
    states, tokens = torch.randn(1, 3, 32), torch.randn(1, 2, 32)
    with torch.no_grad():
        for linear in (block.assign.v_proj, block.assign.proj):
            linear.weight.copy_(torch.eye(32))
            linear.bias.zero_()
        block.mlp_channels.fc2.weight.zero_()
        block.mlp_channels.fc2.bias.zero_()
        found, logits = assign(block, states, tokens, None, 0)
        values = block.norm_x(states)[0]
        own = block.pre_assign_attn(block.project_group_token(block.norm_tokens(tokens)), block.norm_x(states))[0]
    chosen = logits[0].argmax(dim=0)
    for segment in range(2):
        members = values[chosen == segment]
        torch.testing.assert_close(found[0, segment], members.sum(dim=0) / (len(members) + 1) + own[segment])


def test_noise_is_gumbel_and_a_function_of_each_seed() -> None:
    seeds = torch.randint(0, 2**63 - 1, (40,), generator=torch.Generator().manual_seed(1))
    noise = gumbel(seeds, 3, (50, 100), torch.float64)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.equal(gumbel(seeds[7:9], 3, (50, 100), torch.float64), noise[7:9])
    assert not torch.equal(gumbel(seeds, 4, (50, 100), torch.float64), noise)
    # A sample of the maximum over segments is a sample of the softmax (Gumbel-max).
    logits = torch.tensor([0.0, 1.0, 2.0])
    wins = (logits[:, None] + gumbel(seeds, 5, (3, 2000), torch.float32)).argmax(dim=1).flatten()
    shares = torch.bincount(wins, minlength=3) / len(wins)
    torch.testing.assert_close(shares, logits.softmax(dim=0), rtol=0.02, atol=0.005)


def test_uniform_numbers_are_independent_and_inside() -> None:
    some = uniforms(torch.arange(300), 0, 400)
    assert some.min() > 0 and some.max() < 1
    counts = torch.histc(some, 20, 0, 1)
    assert float(((counts - 6000).square() / 6000).sum()) < 50  # chi-squared of 19 degrees: 0.01 % above
    assert float(torch.corrcoef(some[:, :60].T).fill_diagonal_(0).abs().max()) < 0.25
    assert float(torch.corrcoef(some[:60]).fill_diagonal_(0).abs().max()) < 0.25
    assert uniforms(torch.tensor([5]), 0, 400).unique().numel() > 395


def test_branches_are_dropped_as_often_as_they_should() -> None:
    method = groupvit(depths=(3, 2, 1), drop_path=0.4)
    assert method.model.drop_rates == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4])
    first, *others = kept_branches(torch.arange(4000), method.model.drop_rates, torch.zeros(1))
    assert first is None
    for kept, rate in zip(others, method.model.drop_rates[1:], strict=True):
        assert kept is not None and kept.shape == (2, 4000, 1, 1)
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
    rows = torch.cat([kept.flatten(1) for kept in others if kept is not None])
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.07  # branches are independent
    assert kept_branches(None, [0.0, 0.4], torch.zeros(1)) == [None, None]
    layer: Any = method.model.vision_model.encoder.stages[0].layers[0]
    states, nothing = torch.randn(2, 7, 32), torch.zeros(2, 2, 1, 1)
    assert torch.equal(layer(states, nothing), states)
    torch.testing.assert_close(layer(states, nothing + 1), layer(states))


def test_training_is_random_and_evaluation_is_not() -> None:
    method = groupvit(drop_path=0.5)
    batch = training_batch(method)
    still = method.training_step(batch)["contrastive"]
    assert torch.equal(method.training_step({**batch, "seeds": batch["seeds"] + 1})["contrastive"], still)
    method.train()
    first = method.training_step(batch)["contrastive"]
    assert torch.equal(method.training_step(batch)["contrastive"], first)
    assert not torch.equal(method.training_step({**batch, "seeds": batch["seeds"] + 1})["contrastive"], first)


def test_loss_of_prompts_by_hand() -> None:
    """Two images, two prompts equal to each: an image has logits (2, 2, 0, 0), a prompt (2, 0)."""
    images = torch.eye(2, dtype=torch.float64)
    loss = contrastive_loss(images, images[:, None].repeat(1, 2, 1), torch.tensor(2.0, dtype=torch.float64))
    by_image = math.log(2 * math.exp(2) + 2) - 2
    by_prompt = math.log(math.exp(2) + 1) - 2
    assert float(loss) == pytest.approx((by_image + by_prompt) / 2)


def test_losses_are_the_two_formulas() -> None:
    """Projections with torch's own batch normalisation over captions and prompts together."""
    method = groupvit(prompt_weight=0.3).train()
    embedded = method.embed(training_batch(method))
    found = method.compare(embedded)
    method.model.logit_scale.data.fill_(1.0)

    def project(kind: str, states: Tensor) -> Tensor:
        first, norm, _, last = getattr(method.model, f"{kind}_projection")
        hidden = functional.batch_norm(first(states), None, None, norm.weight, norm.bias, training=True)
        return functional.normalize(last(hidden.relu()), dim=1)

    images = project("visual", embedded["image"])
    texts = project("text", embedded["text"].flatten(0, 1)).unflatten(0, (4, 3))
    logits = method.prompt_scale.exp() * images @ texts[:, 1:].flatten(0, 1).T
    own = torch.eye(4).repeat_interleave(2, dim=1)
    prompts = (functional.cross_entropy(logits, own / 2) + functional.cross_entropy(logits.T, own.T)) / 2
    torch.testing.assert_close(found["prompts"], 0.3 * prompts)
    pairs = math.exp(1.0) * images @ texts[:, 0].T
    expected = (
        functional.cross_entropy(pairs, torch.arange(4)) + functional.cross_entropy(pairs.T, torch.arange(4))
    ) / 2
    torch.testing.assert_close(method.compare(embedded)["contrastive"], expected)
    tiled = groupvit(prompt_weight=0.3, loss_tile=3).train()
    tiled.load_state_dict(method.state_dict())
    torch.testing.assert_close(tiled.compare(embedded), method.compare(embedded))


def sample(words: Sequence[tuple[str, str]], caption: str = "A dog chases the red ball") -> Sample:
    spans = [{"text": word, "start": 0, "end": len(word), "caption": 0, "kind": kind} for word, kind in words]
    return Sample("k", {"txt": caption.encode()}, {"phrases": {"phrases.json": json.dumps(spans)}})


def prompt_reader(method: Groupvit, prompts: int = 3, verbs: bool = True, seed: int = 0) -> PromptReader:
    return PromptReader(
        tokenizer=method.tokenizer,
        end_of_text=method.end_of_text,
        settings=TextSettings(),
        prompts=prompts,
        verbs=verbs,
        seed=seed,
    )


def parted(text: str) -> tuple[str, str]:
    """The template of a prompt, and its word."""
    fits = [
        (template, text) for template in TEMPLATES if template.split("{}")[0] == text[: len(template.split("{}")[0])]
    ]
    found = [
        (template, text.removeprefix(template.split("{}")[0]).removesuffix(template.split("{}")[1]))
        for template, text in fits
        if text.endswith(template.split("{}")[1])
    ]
    (best,) = [one for one in found if one[1] in ("dog", "chases", "ball", "tail")]
    return best


def test_prompts_are_words_in_templates() -> None:
    assert len(TEMPLATES) == 80 and all(template.count("{}") == 1 for template in TEMPLATES)
    method = groupvit()
    reader = prompt_reader(method)
    words = [("dog", "noun"), ("chases", "verb"), ("ball", "noun"), ("red ball", "phrase"), ("tail", "noun")]
    chosen: list[str] = []
    templates: set[str] = set()
    for number in range(200):
        caption, *prompts = reader.read(sample(words), SamplePosition(1, number))["texts"]
        assert caption == "A dog chases the red ball"
        pairs = [parted(prompt) for prompt in prompts]
        assert len({word for _, word in pairs}) == 3  # without replacement
        chosen += [word for _, word in pairs]
        templates |= {template for template, _ in pairs}
    for word in ("dog", "chases", "ball", "tail"):
        assert chosen.count(word) / 200 == pytest.approx(3 / 4, abs=0.12)
    assert len(templates) > 75
    at = SamplePosition(1, 7)
    assert reader.read(sample(words), at) == prompt_reader(method).read(sample(words), at)
    assert reader.read(sample(words), at) != prompt_reader(method, seed=1).read(sample(words), at)
    assert reader.read(sample(words), at) != reader.read(sample(words), SamplePosition(2, 7))
    nouns = prompt_reader(method, verbs=False).read(sample(words), at)["texts"][1:]
    assert {parted(prompt)[1] for prompt in nouns} == {"dog", "ball", "tail"}


def test_captions_take_the_place_of_missing_words() -> None:
    reader, at = prompt_reader(groupvit()), SamplePosition(0, 0)
    caption = "A dog chases the red ball"
    texts = reader.read(sample([("dog", "noun"), ("dog", "noun")]), at)["texts"]
    assert parted(texts[1])[1] == "dog" and texts[2:] == [caption, caption]
    assert reader.read(sample([]), at)["texts"] == [caption] * 4
    second = sample([("dog", "noun")])
    second.rows["phrases"] = {
        "phrases.json": second.rows["phrases"]["phrases.json"].replace('"caption": 0', '"caption": 1')
    }
    assert reader.read(second, at)["texts"] == [caption] * 4
    assert reader.read(sample([("dog", "noun")]))["texts"][1] == TEMPLATES[0].replace("{}", "dog")
    second.rows["phrases"] = {"phrases.json": "no json"}
    with pytest.raises(SidecarError, match="extract_phrases"):
        reader.read(second, at)


def test_a_batch_of_prompts() -> None:
    method = groupvit()
    reader = prompt_reader(method, prompts=2)
    rows = [{"texts": ["one two three four", "a", "b"]}, {"texts": ["x", "y", "z"]}]
    batch = reader.collate(rows)
    assert batch["text"].shape == (2, 6) and batch["prompts"].shape == (2, 2, 6)
    assert torch.equal(batch["prompts"][1, 1], method.tokenizer(["z"])[0, :6])
    assert torch.equal(batch["text"][0], method.tokenizer(["one two three four"])[0, :6])
    seeds = SeedReader(seed=3)
    found = [seeds.read(sample([]), SamplePosition(0, number)) for number in range(3)]
    assert len({row["seeds"] for row in found}) == 3 and seeds.collate(found)["seeds"].min() >= 0


def test_stored_tokens_have_no_words() -> None:
    with pytest.raises(SettingError, match="tokens"):
        Groupvit.sidecars(Config(**TINY), TextSettings(tokens="tokens"))
    without = Config(**{**TINY, "prompts": 0})
    assert [one.name for one in Groupvit.sidecars(without, TextSettings(tokens="tokens"))] == ["tokens"]
    assert not Groupvit.sidecars(without) and "prompt_scale" not in dict(Groupvit(without).named_parameters())
    (wanted,) = Groupvit.sidecars(Config(**TINY), TextSettings(caption="json:title"))
    assert wanted.name == "phrases" and wanted.facts == {"caption": "json:title"}


def test_scores_by_hand() -> None:
    """Two segments, three words, the best two of the window: softmax over three times softmax over two."""
    vectors, window = torch.eye(3), torch.tensor([[0.6, 0.8, 0.0]])
    segments = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    found = segment_scores(segments, window, vectors, torch.tensor(2.0), top=2)[0]
    e = math.exp(2)
    expected = [[e / (e + 2) * e / (e + 1), 1 / (e + 2) / (e + 1), 0], [1 / (e + 2) / 2, 1 / (e + 2) / 2, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_maps_of_two_stages_by_hand() -> None:
    first = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # three segments of two patches
    second = torch.tensor([[[0.0, 3.0, 0.0], [1.0, 0.0, 1.0]]])  # two segments of these three
    grouped = Grouped(torch.zeros(1, 2, 4), (first, second))
    soft = assignment_maps(grouped, 1, "soft")
    torch.testing.assert_close(soft[1][0, :, 0], second[0].softmax(dim=0) @ first[0].softmax(dim=0))
    hard = assignment_maps(grouped, 1, "hard")
    assert hard[0][0, :, 0].argmax(dim=0).tolist() == [0, 1]
    assert hard[1][0, :, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def by_the_port(method: Groupvit, part: Tensor, words: Sequence[str]) -> Tensor:
    """Scores [N, h, w] of one window, from the port's features and its own map of the groups."""
    theirs = ported(method)
    with torch.no_grad():
        pixels = method.normalised(part[None])
        states = theirs.vision_model.embeddings(pixels, interpolate_pos_encoding=True)
        output = theirs.vision_model.encoder(states, output_attentions=True, return_dict=True)
        tokens = theirs.vision_model.layernorm(output.last_hidden_state)[0]
        vectors = theirs.get_text_features(method.tokenizer([f"a photo of a {word}." for word in words])).pooler_output
        features = theirs.visual_projection(torch.cat([tokens, tokens.mean(dim=0, keepdim=True)]))
    logits = theirs.logit_scale.exp() * functional.normalize(features) @ functional.normalize(vectors).T
    likely = logits[-1].argsort(descending=True)[: method.config.top_classes].tolist()
    scores = torch.zeros(len(tokens), len(words))
    for group, row in enumerate(logits[:-1].detach()):
        total = row.exp().sum()
        among = row[likely].exp().sum()
        for word in likely:
            scores[group, word] = row[word].exp() ** 2 / total / among
    maps = port.get_grouping_from_attentions(output.attentions, part.shape[1:])[0]
    return scores[maps.argmax(dim=0)].permute(2, 0, 1)


def test_segments_of_one_window_are_the_papers() -> None:
    method = groupvit(window=32, top_classes=2)
    part = image(32, 32)
    (found,) = method.segment([part], WORDS)
    scores = by_the_port(method, part, WORDS)
    torch.testing.assert_close(found.scores, scores.max(dim=0).values, rtol=1e-3, atol=1e-5)
    assert (found.labels == scores.argmax(dim=0)).float().mean() > 0.99
    torch.testing.assert_close(found.limits, scores.max().expand(32, 32), rtol=1e-3, atol=1e-5)


def test_windows_scales_and_mirroring_are_means() -> None:
    """A wide image: three windows of 32 x 32 at a distance of 16, each also mirrored, in two sizes."""
    method, words = groupvit(window=32), WORDS
    whole = image(32, 64)
    (found,) = method.segment([whole], words, ImageViews(flip=True, side=None))
    total, count = torch.zeros(len(words), 32, 64), torch.zeros(64)
    for left in (0, 16, 32):
        part = whole[:, :, left : left + 32]
        both = by_the_port(method, part, words) + by_the_port(method, part.flip(-1), words).flip(-1)
        total[:, :, left : left + 32] += both / 2
        count[left : left + 32] += 1
    scores = total / count
    torch.testing.assert_close(found.scores, scores.max(dim=0).values, rtol=1e-3, atol=1e-5)
    (twice,) = method.segment([whole], words, ImageViews(scales=(1.0, 2.0)))
    small, large = (method.segment([whole], words, ImageViews(scales=(scale,)))[0] for scale in (1.0, 2.0))
    assert (twice.scores <= (small.scores + large.scores) / 2 + 1e-6).all()
    assert not torch.equal(small.scores, large.scores)


def test_sizes_of_views() -> None:
    assert resized(image(100, 200), 8, shorter=64).shape == (3, 64, 128)
    assert resized(image(100, 200), 8, shorter=64, longer=96).shape == (3, 48, 96)
    assert resized(image(3, 9000), 16, shorter=448).shape == (3, 16, 2048)
    assert resized(image(1, 1), 16, shorter=448).shape == (3, 448, 448)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (200, 3), (17, 40)])
def test_odd_images_have_a_word_everywhere(size: tuple[int, int]) -> None:
    method = groupvit()
    (found,) = method.segment([image(*size)], WORDS)
    assert found.labels.shape == found.scores.shape == size and found.labels.min() >= 0
    assert 0 < found.scores.min() and found.scores.max() <= 1
    stages = method.groups([image(*size)])[0]
    assert [stage.shape for stage in stages] == [size, size] and stages[1].max() < 3


@pytest.mark.parametrize("most", [1, 500, 1 << 22])
def test_scores_in_strips_are_scores_at_once(most: int) -> None:
    """Overlapping windows of two sizes of an image, resized to its own, against the scores of all pixels."""
    random = torch.Generator().manual_seed(0)
    views, expected = [], torch.zeros(7, 30, 37)
    for height, width in ((16, 24), (48, 40)):
        windows, total, count = [], torch.zeros(7, height, width), torch.zeros(height, width)
        for top, left in ((0, 0), (0, width - 16), (height - 16, 0), (height - 16, width - 16), (16, 16), (8, 8)):
            if top + 16 <= height and left + 16 <= width:
                segments = torch.randint(0, 4, (16, 16), generator=random)
                windows.append(GroupedWindow(top, left, segments, torch.rand(4, 6, generator=random)))
        windows.append(GroupedWindow(0, 0, torch.zeros(height, width).long(), torch.rand(1, 6, generator=random)))
        for window in windows:
            rows, columns = window.segments.shape
            place = (slice(None), slice(window.top, window.top + rows), slice(window.left, window.left + columns))
            highest = window.scores.max().expand(rows, columns, 1)
            total[place] += torch.cat([window.scores[window.segments], highest], dim=2).permute(2, 0, 1)
            count[place[1:]] += 1
        views.append(GroupedView(height, width, windows))
        mean = (total / count)[None]
        expected += functional.interpolate(mean, size=(30, 37), mode="bilinear", align_corners=False)[0] / 2
    found = best_of_views(views, 30, 37, most)
    torch.testing.assert_close(found.scores, expected[:6].max(dim=0).values)
    torch.testing.assert_close(found.limits, expected[6])
    assert torch.equal(found.labels.long(), expected[:6].argmax(dim=0))


def test_groups_are_the_largest_assignments() -> None:
    method = groupvit(window=64)
    whole = image(64, 64)
    (stages,) = method.groups([whole])
    with torch.no_grad():
        output = method.model.group(method.normalised(whole[None]))
    maps = port.get_grouping_from_attentions([logits.softmax(dim=1) for logits in output.logits], (64, 64))[0]
    assert (stages[-1] == maps.argmax(dim=0)).float().mean() > 0.999
    assert stages[0].dtype == torch.int16 and int(stages[0].max()) < 6


def test_a_threshold_above_the_best_score_is_lowered_to_it() -> None:
    """The paper's rule: t = min(threshold, highest score), so that one segment of a window always has a word."""
    scores = torch.tensor([[0.2, 0.5], [0.4, 0.5]])
    labels = torch.zeros(2, 2, dtype=torch.int16)
    found = Segmentation(labels, scores, torch.full((2, 2), 0.5))
    assert found.below(0.95).tolist() == [[True, False], [True, False]]
    assert found.below(0.3).tolist() == [[True, False], [False, False]]
    assert found.below(torch.tensor([[0.1, 0.9], [0.45, 0.1]])).tolist() == [[False, False], [True, False]]
    assert Segmentation(labels, scores).below(0.95).all()


def test_words_are_checked_and_encoded_once() -> None:
    method = groupvit()
    with pytest.raises(SettingError, match="words"):
        method.segment([image(32, 32)], [])
    with pytest.raises(SettingError, match="at most 32767"):
        method.segment([image(32, 32)], [f"word {number}" for number in range(32768)])
    with pytest.raises(SettingError, match="window"):
        method.segment([image(32, 32)], WORDS, ImageViews(window=20))
    before = method.word_vectors(WORDS)
    assert torch.equal(method.word_vectors(WORDS[::-1]), before.flip(0))
    method.train()
    with torch.no_grad():
        method.model.text_projection[3].bias.add_(1.0)
    assert not torch.equal(method.eval().word_vectors(WORDS), before)


def test_what_decays() -> None:
    method = groupvit()
    decaying, still = method.parameter_groups()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    found = {names[id(parameter)] for parameter in decaying["params"]}
    for name in (
        "prompt_scale",
        "model.logit_scale",
        "model.vision_model.embeddings.position_embeddings",
        "model.vision_model.encoder.stages.0.group_token",
        "model.text_model.embeddings.token_embedding.weight",
    ):
        assert name in found
    assert "weight_decay" not in decaying and still["weight_decay"] == 0.0
    assert all(parameter.ndim == 1 for parameter in still["params"])


def test_layers_go_up() -> None:
    layers = groupvit(depths=(2, 1, 1)).layers()
    stages = "model.vision_model.encoder.stages"
    order = [
        "model.vision_model.embeddings.position_embeddings",
        f"{stages}.0.layers.0.mlp.fc1.weight",
        f"{stages}.0.downsample.assign.q_proj.weight",
        f"{stages}.1.layers.0.mlp.fc1.weight",
        f"{stages}.2.layers.0.mlp.fc1.weight",
        "model.vision_model.layernorm.weight",
    ]
    assert [layers[name].above for name in order] == [5, 4, 3, 2, 1, 0]
    assert layers[f"{stages}.0.group_token"].above == 5 and layers[f"{stages}.1.group_token"].above == 3
    assert layers["model.text_model.embeddings.token_embedding.weight"] == ("text", 2)
    assert layers["model.visual_projection.0.weight"] == ("image", 0)


def test_weights_of_a_file(tmp_path: Path) -> None:
    method = groupvit()
    state = {name: tensor for name, tensor in ported(method).state_dict().items()}
    changed = {"visual_projection.1.num_batches_tracked": torch.tensor(3)}  # in files of the port
    changed["logit_scale"] = torch.tensor(6.0)  # the authors' code uses at most 100 = exp(4.6)
    save_file({**state, **changed}, tmp_path / "port.safetensors")
    loaded = Groupvit(dataclasses.replace(method.config, pretrained=str(tmp_path / "port.safetensors"))).eval()
    tokens = method.tokenizer(["a red star"])
    assert torch.equal(loaded.encode_text(tokens), method.encode_text(tokens))
    assert loaded.measures()["logit_scale"] == pytest.approx(100)
    with pytest.raises(DataError, match="does not fit"):
        Groupvit(Config(**{**TINY, "depths": (1, 1), "pretrained": str(tmp_path / "port.safetensors")}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("image_size", 30),
        ("window", 20),
        ("width", 33),
        ("text_width", 17),
        ("depths", ()),
        ("depths", (1, 0, 1)),
        ("group_tokens", (6,)),
        ("group_tokens", (6, 3, 2, 1)),
        ("segments", (5, 3)),
        ("segments", (6,)),
        ("drop_path", 1.0),
        ("prompts", -1),
        ("prompt_weight", 0.0),
        ("temperature", 0.0),
        ("crop_scale", (0.5, 0.1)),
        ("flip", 2.0),
        ("erase", -0.1),
        ("top_classes", 0),
    ],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**{**TINY, field: value})


@pytest.mark.parametrize("policy", ["augmix", "rand-x9"])
def test_policies_are_checked(policy: str) -> None:
    Groupvit.check(Config())
    with pytest.raises(SettingError, match="augment"):
        Groupvit.check(Config(augment=policy))
