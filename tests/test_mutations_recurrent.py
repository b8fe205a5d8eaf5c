"""The tester's power over recurrent layers: every mistake here turns its check of ragged turns through a cache red."""

import jax
import jax.numpy as jnp
import pytest
import transformers
from cases import Case
from test_mamba import SHAPE as MAMBA
from test_mutations import wrap
from test_recurrent_gemma import SHAPE as GEMMA
from tester import FamilyTester

from jaxmodels import layers
from jaxmodels.cache import Recurrent
from jaxmodels.models import mamba, recurrent_gemma


def check(case):
    FamilyTester().also(case, *case.loaded)


@pytest.fixture(scope="module")
def selective(tmp_path_factory):
    case = Case.make(transformers.MambaConfig(**MAMBA), tmp_path_factory.mktemp("mamba"), greedy=False)
    case.loaded  # noqa: B018
    return case


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    config = transformers.RecurrentGemmaConfig(**GEMMA | {"num_hidden_layers": 1})
    case = Case.make(config, tmp_path_factory.mktemp("gemma"), greedy=False)
    case.loaded  # noqa: B018
    return case


def all_columns_are_tokens(original, *args, **kwargs):
    *args, real = args
    return original(*args, jnp.ones_like(real), **kwargs)


def padding_is_convolved(patch):
    wrap(patch, layers, "causal_conv", all_columns_are_tokens)


def padding_is_a_step(patch):
    wrap(patch, mamba, "selective_scan", all_columns_are_tokens)


def padding_is_a_step_of_the_unit(patch):
    wrap(patch, recurrent_gemma, "rg_lru", all_columns_are_tokens)


def no_window(patch):
    wrap(patch, Recurrent, "read", lambda original, self, step: ((None,), original(self, step)[1]))


def no_state(patch):
    wrap(patch, Recurrent, "read", lambda original, self, step: (original(self, step)[0], None))


def taps_reversed(patch):
    wrap(patch, layers, "causal_conv", lambda original, x, weight, *rest: original(x, weight[:, ::-1], *rest))


def B_and_C_swapped(patch):
    wrap(patch, mamba, "selective_scan", lambda original, x, dt, A, B, C, *rest: original(x, dt, A, C, B, *rest))


def half_the_decay(patch):
    wrap(patch, mamba, "selective_scan", lambda original, x, dt, A, *rest: original(x, dt, A / 2, *rest))


def linear_steps(patch):
    patch.setattr(jax.nn, "softplus", lambda x: x)


def nothing_begins(patch):
    def change(original, *args):
        *args, first, real = args
        return original(*args, jnp.zeros_like(first), real)

    wrap(patch, recurrent_gemma, "rg_lru", change)


def gates_swapped(patch):
    wrap(patch, recurrent_gemma, "rg_lru", lambda original, x, a, b, *rest: original(x, b, a, *rest))


MUTATIONS = {
    "selective": (
        padding_is_convolved,
        padding_is_a_step,
        no_window,
        no_state,
        taps_reversed,
        B_and_C_swapped,
        half_the_decay,
        linear_steps,
    ),
    "gated": (padding_is_convolved, padding_is_a_step_of_the_unit, no_window, no_state, nothing_begins, gates_swapped),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_nothing_is_caught_where_nothing_is_wrong(case, request):
    check(request.getfixturevalue(case))


@pytest.mark.parametrize(("case", "mutation"), [(case, f) for case, found in MUTATIONS.items() for f in found])
def test_a_wrong_recurrence_is_caught(case, mutation, request, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="max error"):
        check(request.getfixturevalue(case))
