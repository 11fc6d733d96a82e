"""Which tokens can be drawn, worked out by hand."""

import pytest
import torch

from longllava.errors import InputError, LongLLaVAError
from longllava.generation.sampling import Sampling, kept, next_tokens
from tests.tiny import tiny_model, tiny_pictures

PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25]])


@pytest.mark.parametrize(
    ("settings", "survivors"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.8}, [1, 2, 3]),
        ({"top_k": 2, "top_p": 0.66}, [1]),  # of the two left, the first has 2/3
    ],
)
def test_top_k_and_top_p(settings, survivors):
    left = kept(PROBABILITIES, Sampling(temperature=1.0, **settings))
    assert left.nonzero()[:, 1].tolist() == survivors
    assert torch.equal(left[left > 0], PROBABILITIES[0, survivors])


def test_draws_follow_the_probabilities():
    logits = PROBABILITIES.log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = next_tokens(logits, Sampling(temperature=1.0), [generator] * 4000)
    assert (torch.bincount(drawn, minlength=4) / 4000 - PROBABILITIES[0]).abs().max() < 0.03
    cold = next_tokens(logits, Sampling(temperature=0.05), [generator] * 4000)
    assert (cold == 1).all()


def test_temperature_zero_takes_the_likeliest():
    assert next_tokens(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(), []).tolist() == [1]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("row", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_finite_are_an_error(row, temperature):
    with pytest.raises(LongLLaVAError, match="logits are NaN or infinite"):
        next_tokens(torch.tensor([[0.0, 1.0], row]), Sampling(temperature=temperature), [torch.Generator()] * 2)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 1e-300])
def test_the_coldest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[-torch.inf, 2000.0, 1999.0]])
    assert next_tokens(logits, Sampling(temperature=temperature), [torch.Generator()]).tolist() == [1]


def test_top_k_alone_drops_none_of_the_k():
    """The running sum is 1 by rounding before the last of them."""
    steep = torch.tensor([[1.0, 1e-8, 1e-8, 1e-9]])
    assert kept(steep, Sampling(temperature=1.0, top_k=3)).tolist() == [[1.0, *steep[0, 1:3].tolist(), 0.0]]


def test_seeds_repeat_and_differ():
    model = tiny_model()
    draw = lambda seed: model.generate("a", tiny_pictures(1), temperature=1.0, seed=seed, max_new_tokens=12)  # noqa: E731
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) == 5
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.1), ("top_p", None), ("top_k", -1), ("top_k", 1.5),
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("seed", -1), ("seed", 1.0),
        ("stop", [""]), ("stop", [3]), ("stop", 3), ("stop", ""), ("stop", {"a": 1}),
    ],
)  # fmt: skip
def test_bad_settings_get_a_sentence(name, value):
    with pytest.raises(InputError, match=f"^{name}: got "):
        Sampling(**{name: value})
