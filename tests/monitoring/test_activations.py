# SPDX-License-Identifier: Apache-2.0
"""Activations at the last token, against forward passes by hand, and how two sets of them compare."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_safety.data import TokenizedExample, pad_batch
from lightning_safety.language import encode_prompt
from lightning_safety.monitoring import (
    compare_activations,
    direction_cosines,
    draw_activation_overlap,
    last_token_activations,
    linear_separability,
    refusal_direction_cosine,
)
from lightning_safety.monitoring.activations import last_token_states, layer_numbers
from tests.tiny import make_tiny_model

PROMPTS = [f"Tell me {'more ' * count}about the number {count}." for count in (0, 7, 2, 11, 4)]
LAYERS = [0, 1, 3, 4]


def make_gpt2() -> Any:
    """Positions are learned and absolute, so that counting them from padding would show."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def make_llama() -> Any:
    return make_tiny_model(num_hidden_layers=4)


@pytest.fixture(params=[make_llama, make_gpt2])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any) -> dict[int, torch.Tensor]:
    """Each prompt alone, and the last index of it."""
    states = [
        model(input_ids=torch.tensor([encode_prompt(tokenizer, prompt)]), output_hidden_states=True).hidden_states
        for prompt in PROMPTS
    ]
    return {layer: torch.cat([found[layer][:, -1] for found in states]) for layer in LAYERS}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_is_the_last_token_of_a_plain_forward_pass_whatever_the_batch(
    model: Any, tiny_tokenizer: Any, batch_size: int
) -> None:
    found = last_token_activations(model, tiny_tokenizer, PROMPTS, layers=LAYERS, batch_size=batch_size)
    expected = by_hand(model, tiny_tokenizer)
    assert list(found) == LAYERS
    for layer in LAYERS:
        assert found[layer].dtype == torch.float32
        torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_never_read_on_either_side(model: Any, tiny_tokenizer: Any, side: str) -> None:
    rows = [TokenizedExample(tokens, tokens) for tokens in (encode_prompt(tiny_tokenizer, text) for text in PROMPTS)]
    # The token that ends the prompt's turn: read as a token, it would be in the way.
    batch = pad_batch(rows, pad_token_id=2, padding_side=side)
    found = last_token_states(model, batch["input_ids"], batch["attention_mask"], LAYERS)
    expected = by_hand(model, tiny_tokenizer)
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], expected[layer], rtol=0, atol=1e-5)


def test_wrapped_models_give_the_same(tiny_tokenizer: Any) -> None:
    model = make_llama()
    plain = last_token_activations(model, tiny_tokenizer, PROMPTS, layers=LAYERS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted = last_token_activations(wrapped, tiny_tokenizer, PROMPTS, layers=LAYERS)
    assert all(torch.equal(plain[layer], adapted[layer]) for layer in LAYERS)


def test_no_logits_are_formed_and_the_model_is_left_as_it_was(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama().train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    model.config.use_cache = False
    monkeypatch.setattr(model.lm_head, "forward", None)
    random_state = torch.get_rng_state()
    last_token_activations(model, tiny_tokenizer, PROMPTS, layers=LAYERS)
    assert [part.training for part in model.modules()] == modes
    assert model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in model.parameters())


def test_bfloat16_models_give_float32_close_to_the_exact(tiny_tokenizer: Any) -> None:
    exact = last_token_activations(make_llama(), tiny_tokenizer, PROMPTS, layers=LAYERS)
    rounded = last_token_activations(make_llama().bfloat16(), tiny_tokenizer, PROMPTS, layers=LAYERS)
    for layer in LAYERS:
        assert rounded[layer].dtype == torch.float32
        assert (rounded[layer] - exact[layer]).norm() < 0.03 * exact[layer].norm()


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ((0.65, 0.90), 31, list(range(20, 27))),
        ((0.65, 0.90), 33, list(range(21, 29))),
        ((0.0, 1.0), 3, [0, 1, 2]),
        # In floating point 0.29 · 100 is just below 29.
        ((0.29, 0.31), 100, [29, 30]),
        ([4, 0, 4], 5, [0, 4]),
    ],
)
def test_layers_by_range_are_the_papers(layers: Any, count: int, expected: list[int]) -> None:
    assert layer_numbers(layers, count) == expected


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ((0.9, 0.65), ValueError, "the lower first, in"),
        ((0.5, 1.5), ValueError, "the lower first, in"),
        ((0.5, 0.6, 0.7), ValueError, "two shares"),
        ((0.65, 0.70), ValueError, "at least one of 5 hidden states"),
        ([-1], ValueError, "numbers from 0, the embeddings, but got -1"),
        ([5], ValueError, "numbers in 0 … 4 but got 5"),
        ([], TypeError, "two shares of the depth or a list"),
        ("all", TypeError, "two shares of the depth or a list"),
        ([True], TypeError, "two shares of the depth or a list"),
    ],
    ids=str,
)
def test_layers_out_of_range_are_named(tiny_tokenizer: Any, layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        last_token_activations(make_llama(), tiny_tokenizer, PROMPTS, layers=layers)


def test_what_cannot_be_read_is_named(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match="`prompts` expected to hold at least one prompt"):
        last_token_activations(model, tiny_tokenizer, [])
    with pytest.raises(TypeError, match="single string"):
        last_token_activations(model, tiny_tokenizer, "Hello")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, attention_mask: forward(input_ids, attention_mask))
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no `output_hidden_states`"):
        last_token_activations(model, tiny_tokenizer, PROMPTS[:1])
    monkeypatch.setattr(model.model, "forward", lambda output_hidden_states, **rest: forward(**rest))
    with pytest.raises(
        ValueError, match="the 5 hidden states that its config speaks of but LlamaForCausalLM gave none"
    ):
        last_token_activations(model, tiny_tokenizer, PROMPTS[:1])


def test_activations_that_are_not_finite_are_named_by_layer_and_prompt(tiny_tokenizer: Any) -> None:
    model = make_llama()
    [odd] = {*encode_prompt(tiny_tokenizer, "~")} - {*encode_prompt(tiny_tokenizer, "")}
    model.model.embed_tokens.weight.data[odd] = torch.inf
    assert last_token_activations(model, tiny_tokenizer, ["Hello", "~"], layers=[0])
    with pytest.raises(ValueError, match="layer 2 gives NaN or infinity for prompt 1, counted from 0"):
        last_token_activations(model, tiny_tokenizer, ["Hello", "~", "Yes"], layers=[0, 2])


def make_set(seed: int, prompts: int = 40, hidden: int = 200, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(prompts, hidden, generator=torch.Generator().manual_seed(seed)) + shift


def test_a_set_overlaps_with_itself_wholly() -> None:
    activations = {3: make_set(0, shift=2.0), 4: make_set(1)}
    for comparison in compare_activations(activations, activations).values():
        assert comparison.overlap == pytest.approx(1)
        assert comparison.overlap_centred == pytest.approx(1)
        assert float(comparison.direction.norm()) == 0


@pytest.mark.parametrize("energy", [0.2, 0.6])
def test_random_sets_overlap_as_much_as_the_closed_form_says(energy: float) -> None:
    found = [
        compare_activations({0: make_set(2 * seed)}, {0: make_set(2 * seed + 1, 60)}, energy=energy)[0]
        for seed in range(60)
    ]
    for name in ("overlap", "overlap_centred"):
        measured = sum(getattr(one, name) for one in found) / len(found)
        expected = sum(getattr(one, f"{name}_random") for one in found) / len(found)
        assert measured == pytest.approx(expected, rel=0.1)
        assert found[0].overlap_random == max(found[0].ranks) / 200
        assert found[0].overlap_centred_random == max(found[0].ranks_centred) / 200


def test_shuffled_sets_share_what_all_prompts_share_and_nothing_else() -> None:
    def alike(seed: int, axis: int) -> torch.Tensor:
        """Rows that spread along three axes that all share, and along three of their own."""
        rows = 0.1 * make_set(seed)
        rows[:, [0, 1, 2, *range(axis, axis + 3)]] += make_set(seed + 100, hidden=6)
        return rows

    same = [compare_activations({0: alike(2 * s, 10)}, {0: alike(2 * s + 1, 10)}, energy=0.8)[0] for s in range(10)]
    apart = [compare_activations({0: alike(2 * s, 10)}, {0: alike(2 * s + 1, 20)}, energy=0.8)[0] for s in range(10)]
    for name in ("overlap", "overlap_centred"):
        for found, gap in ((same, 0.0), (apart, 0.2)):
            measured, shuffled = (sum(getattr(one, n) for one in found) / 10 for n in (name, f"{name}_shuffled"))
            assert shuffled - measured == pytest.approx(gap, abs=0.05) if not gap else shuffled - measured > gap
            assert measured > 5 * sum(getattr(one, f"{name}_random") for one in found) / 10


def test_large_means_rule_the_overlap_unless_they_are_taken_away() -> None:
    [found] = compare_activations({7: make_set(0, shift=9.0)}, {7: make_set(1, shift=9.0)}).values()
    assert found.ranks == (1, 1)
    assert found.overlap > 0.99
    assert found.overlap_centred < 2 * found.overlap_centred_random


def test_sets_of_equal_activations_have_no_centred_overlap_and_no_direction() -> None:
    # As at the embeddings: every prompt ends with the same token.
    same = {0: make_set(0, 1).expand(5, -1)}
    [found] = compare_activations(same, same).values()
    assert found.overlap == pytest.approx(1)
    assert found.ranks_centred == (0, 0)
    assert torch.tensor([found.overlap_centred, found.overlap_centred_random]).isnan().all()
    assert found.separability == found.separability_chance == 0.5
    assert torch.tensor(refusal_direction_cosine({0: found.direction}, {0: found.direction})).isnan()


@pytest.mark.parametrize("hidden", [8, 64, 1000])
def test_separability_is_one_or_chance(hidden: int) -> None:
    shift = torch.zeros(hidden)
    shift[0] = 12 * (hidden / 8) ** 0.5
    apart = linear_separability(make_set(0, 40, hidden) + shift, make_set(1, 40, hidden))
    assert apart.accuracy > 0.97
    together = [linear_separability(make_set(2 * s, 40, hidden), make_set(2 * s + 1, 40, hidden)) for s in range(20)]
    assert sum(one.accuracy for one in together) / 20 == pytest.approx(0.5, abs=0.06)
    assert {one.chance for one in together} == {0.5}


def test_separability_of_sets_of_unlike_size_stands_beside_the_larger_share() -> None:
    found = [linear_separability(make_set(2 * s, 60, 20), make_set(2 * s + 1, 20, 20)) for s in range(20)]
    assert {one.chance for one in found} == {0.75}
    assert 0.6 < sum(one.accuracy for one in found) / 20 < 0.78


def test_separability_is_linear_seeded_and_blind_to_scale_and_rotation() -> None:
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]).repeat(20, 1)
    noisy = (corners + 0.1 * make_set(0, 80, 2)).view(20, 4, 2)
    assert linear_separability(noisy[:, :2].flatten(0, 1), noisy[:, 2:].flatten(0, 1)).accuracy < 0.6
    first, second = make_set(0, 30, 10, shift=0.3), make_set(1, 30, 10)
    rotation = 1000 * torch.linalg.qr(make_set(2, 10, 10)).Q
    assert linear_separability(first @ rotation, second @ rotation) == linear_separability(first, second)
    assert linear_separability(first, second, seed=1) == linear_separability(first, second, seed=1)
    assert len({linear_separability(first, second, seed=seed).accuracy for seed in range(8)}) > 1


def test_cosines_are_means_over_the_layers_that_have_one() -> None:
    start = {1: torch.tensor([1.0, 0.0]), 2: torch.tensor([0.0, 3.0])}
    now = {1: torch.tensor([5.0, 0.0]), 2: torch.tensor([0.0, -1.0])}
    assert direction_cosines(start, now) == {1: 1, 2: -1}
    assert refusal_direction_cosine(start, now) == 0
    assert refusal_direction_cosine(start, now | {2: torch.zeros(2)}) == 1
    assert torch.tensor(refusal_direction_cosine(start, {1: torch.zeros(2), 2: torch.zeros(2)})).isnan()
    with pytest.raises(ValueError, match="`start` and `now` expected to be of the same layers and hidden sizes"):
        refusal_direction_cosine(start, {1: now[1]})


def test_bad_sets_are_named() -> None:
    one = {0: make_set(0)}
    for energy in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`energy` expected to be in"):
            compare_activations(one, one, energy=energy)
    for other in ({}, {1: make_set(0)}, {0: make_set(0, hidden=30)}):
        with pytest.raises(ValueError, match="`harmful` and `harmless` expected to be of the same layers"):
            compare_activations(one, other)
    for prompts in (0, 1):
        with pytest.raises(ValueError, match="at least two vectors each"):
            compare_activations(one, {0: make_set(0, prompts)})
    with pytest.raises(ValueError, match="finite"):
        compare_activations(one, {0: make_set(0) / 0})


def test_the_figure_shows_both_overlaps_beside_their_random_values() -> None:
    pytest.importorskip("matplotlib")
    compared = compare_activations({2: make_set(0), 5: make_set(1)}, {2: make_set(2), 5: make_set(3)})
    [axes] = draw_activation_overlap(compared).axes
    curves = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    names = ("overlap", "without the means")
    assert set(curves) == {f"{name}{control}" for name in names for control in ("", ", shuffled", ", random")}
    assert list(curves["without the means"]) == [compared[2].overlap_centred, compared[5].overlap_centred]
