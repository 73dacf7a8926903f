"""Bytes on the network: compiled programs and formulas agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.optim import (
    Workers,
    compressed_mean_bytes,
    mean_bytes,
    onebit_adam,
    onebit_lamb,
    zero_one_adam,
)
from effscale.parallel import MeshConfig, collectives, per_worker, sent_bytes, worker_params

PARAMS = {"kernel": jnp.zeros((40, 33)), "bias": jnp.zeros((33,))}


def program(optimizer, workers):
    def step(params, state, batch):
        gradients = jax.grad(lambda p: jnp.sum(batch @ p["kernel"] + p["bias"][None]) ** 2)(
            worker_params(params, state)
        )
        return optimizer.update(gradients, state, params)

    with jax.set_mesh(MeshConfig().build(jax.devices()[:workers])):
        state = optimizer.init(PARAMS)
        batch = jnp.ones((workers, 40))
        step = jax.jit(per_worker(step))
        text = step.lower(PARAMS, state, batch).compile().as_text()
        states = [state]
        for _ in range(4):
            states.append(step(PARAMS, states[-1], batch)[1])
    return text, [float(sent_bytes(s)) for s in states[1:]]


def sent_by_branch(text):
    """Bytes by the branch of the optimizer's own switch, which stands in that of `skip_nonfinite`."""
    found = {}
    for collective in collectives(text):
        if len(collective.branches) >= 2:
            key = collective.branches[1]
            found[key] = found.get(key, 0) + collective.sent
    return found


@pytest.mark.parametrize("workers", [2, 8])
@pytest.mark.parametrize("maker", [onebit_adam, onebit_lamb])
def test_warm_up_and_compressed_steps(maker, workers):
    text, sent = program(maker(0.01, freeze_step=2, workers=Workers("data")), workers)
    scales = "tree" if maker is onebit_lamb else "tensor"
    expected = [
        mean_bytes(PARAMS, workers),
        compressed_mean_bytes(PARAMS, workers, scales=scales),
    ]
    np.testing.assert_allclose([sent_by_branch(text)[b] for b in (0, 1)], expected)
    np.testing.assert_allclose(sent, [expected[0]] * 2 + [expected[1]] * 2)


def test_rounds_of_zero_one_adam():
    optimizer = zero_one_adam(
        0.01, var_freeze_step=3, var_update_scaler=2, local_step_scaler=1, local_step_clipper=2, workers=Workers("data")
    )  # fmt: skip
    text, sent = program(optimizer, 4)
    full, one_bit = mean_bytes(PARAMS, 4), compressed_mean_bytes(PARAMS, 4)
    found = sent_by_branch(text)
    np.testing.assert_allclose([found[0], found[1]], [full, one_bit])
    assert 2 not in found, "a local step sends nothing"
    np.testing.assert_allclose(sent, [full, full, one_bit, one_bit])


def test_only_bytes_cross_in_compressed_steps():
    text, _ = program(onebit_adam(0.01, freeze_step=2, workers=Workers("data")), 8)
    inner = [c for c in collectives(text) if c.branches[1:2] == (1,)]
    assert {c.kind for c in inner} == {"all-to-all", "all-gather"}
    assert all(c.dtypes == {"u8"} for c in inner)


@pytest.mark.parametrize("padded", [16, 72, 32])
def test_formula_of_the_papers(padded):
    """(W - 1) / W * n / 4 + 8 (W - 1) bytes for one tensor of n padded elements."""
    for workers in (2, 4):
        n = padded * workers * 8
        expected = (workers - 1) / workers * n / 4 + 8 * (workers - 1)
        assert compressed_mean_bytes(jnp.zeros(n), workers) == expected
        assert (
            mean_bytes(jnp.zeros(n, jnp.bfloat16), workers) / (expected - 8 * (workers - 1)) == 16
        )


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("%a = f32[4,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 24.0),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['data'=4,'tensor'=2] {'data'}, to_apply=%s", "all-reduce", 48.0),
        ("%a = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}", "reduce-scatter", 8.0),
        ("%a = bf16[6]{0} collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 12.0),
        ("%a = (u8[2]{0}, u8[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}", "all-gather", 6.0),
    ],
)  # fmt: skip
def test_forms_of_the_text(line, kind, sent):
    (found,) = collectives(line)
    assert (found.kind, found.sent) == (kind, sent)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("[2,4]<=[4,2]T(1,0)", ("fsdp",)),
        ("[1,8]<=[8]", ("fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("fsdp",)),
    ],
)
def test_the_axes_along_which_devices_lie(groups, axes):
    (found,) = collectives(f"%a = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%s")
    assert found.axes({"data": 1, "fsdp": 4, "tensor": 2}) == axes
    assert found.devices == {("tensor",): 2, ("fsdp",): 4}.get(axes, 8)


def test_a_permutation_may_begin_with_a_device_that_keeps_its_own():
    pairs = "{{0,0},{1,2},{2,1},{3,3}}"
    (found,) = collectives(f"%a = f32[8]{{0}} collective-permute(%x), source_target_pairs={pairs}")
    assert found.axes({"fsdp": 2, "tensor": 2}) == ("fsdp", "tensor")
    alone = "%a = f32[8]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}"
    assert collectives(alone) == []


def test_a_sum_of_which_each_keeps_a_part():
    """As a TPU's compiler writes it."""
    text = """\
%all-reduce-scatter.1 (input: f32[8]) -> f32[4] {
  %sum = f32[8]{0} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%sum, %place), dynamic_slice_sizes={4}
}
"""
    (found,) = collectives(text)
    assert (found.kind, found.sent) == ("reduce-scatter", 16.0)


def test_alone_nothing_is_sent():
    assert collectives("%a = f32[2]{0} all-reduce(%x), replica_groups={{0},{1}}") == []
    assert compressed_mean_bytes(jnp.zeros(64), 1) == mean_bytes(jnp.zeros(64), 1) == 0.0
    _, sent = program(onebit_adam(0.01, freeze_step=2, workers=Workers("data")), 1)
    assert sent == [0.0] * 4


LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (LOOP, 7),  # as a TPU's compiler leaves a scan
        (LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'), 5),
        (LOOP.replace("direction=LT", "direction=NE"), 1),
        (LOOP.replace("ROOT %less", "%less"), 1),  # a loop that may end before
        (LOOP.replace("%i = s32[]{:T(128)} get-tuple-element(%p), index=0", "%i = s32[] constant(3)"), 1),
    ],
)  # fmt: skip
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(text, times):
    assert [found.times for found in collectives(text)] == [times]
