"""PPO's numbers: DeepSpeed-Chat's and TRL's golden vectors, a slow NumPy reference, and the laws of each function."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.generation.decoding import Generated
from effscale.rlhf import (
    DEEPSPEED_CHAT,
    adaptive_kl,
    gae,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    make_experience,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from effscale.rlhf.policy_loss import PolicyLossConfig, masked_average
from effscale.rlhf.rewards import with_next


def array(rows):
    return jnp.asarray(rows, jnp.float32)


class DeepSpeedChat:
    """Two responses of up to 4 tokens, the first of 2 and padding, which is its end-of-text token, too."""

    mask = jnp.array([[True, True, False, False], [True] * 4])
    log_probs = array([[-0.3, -0.4, -0.5, -0.6], [-0.8, -0.7, -0.6, -0.5]])
    reference = log_probs + array([[0.1, -0.1, 0.2, 0.0], [-0.2, 0.1, 0.0, 0.3]])
    values = array([[0.3, 0.2, 0.1, 0.6], [0.3, 0.4, 0.5, 0.6]])
    scores = array([7.0, -1.5])


class TRL:
    """Two responses of up to 5 tokens, the first ends after 3."""

    mask = jnp.array([[True, True, True, False, False], [True] * 5])
    old = array([[-1, -0.5, -2, -3, -3], [-0.7, -1.2, -0.3, -0.9, -1.5]])
    reference = array([[-1.1, -0.7, -1.5, -2, -2], [-0.9, -1, -0.6, -0.9, -1.1]])
    new = array([[-0.6, -0.8, -1.9, -3, -3], [-0.8, -0.9, -0.5, -0.9, -1.2]])
    values = array([[0.1, 0.2, 0.3, 0.4, 0.5], [0, -0.1, 0.2, 0.1, 0.3]])
    new_values = array([[0.5, 0.1, 0.7, 0.2, 0.9], [0.3, -0.5, 0.1, 0.4, 0]])
    scores = array([1.0, -0.5])  # after the penalty for the response without an end


def test_deepspeed_chat():
    given = DeepSpeedChat
    reach = with_next(given.mask)  # the score stands where the end-of-text token was drawn
    kl = kl_estimate(given.log_probs, given.reference)
    rewards = shaped_rewards(given.scores, kl, reach, kl_coef=0.1, clip=5.0)
    np.testing.assert_allclose(
        rewards, [[0.01, -0.01, 5.02, 0], [-0.02, 0.01, 0, -1.47]], atol=1e-6
    )
    # make_experience of the same numbers. Its mask has the token that ends the first response.
    tokens = jnp.array([[4, 5, 6, 7, 8, 0, 0], [4, 5, 6, 7, 8, 9, 3]])
    mask = jnp.concatenate([jnp.ones((2, 3), bool), reach], 1)
    drawn = Generated(tokens, mask, reach.sum(1), jnp.zeros(2, bool), given.log_probs)
    experience, _ = make_experience(
        *(drawn, given.reference, given.values, given.scores),
        stop_token_ids=(0,),
        config=DEEPSPEED_CHAT,
    )
    np.testing.assert_array_equal(experience.learned, given.mask)
    advantages, returns = gae(rewards, given.values, reach)
    np.testing.assert_allclose(experience.advantages, advantages, atol=1e-6)
    np.testing.assert_allclose(experience.returns, returns, atol=1e-6)
    expected = [[4.2458, 4.5640, 4.92, 0], [-1.50002, -1.66318, -1.86650, -2.07]]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    expected = [[4.5458, 4.7640, 5.02, 0], [-1.20002, -1.26318, -1.36650, -1.47]]
    np.testing.assert_allclose(returns, expected, atol=1e-5)

    new = given.log_probs + array([[0.1, -0.3, 0.4, 0], [0.05, 0.3, -0.1, -0.4]])
    loss, _ = policy_loss(new, given.log_probs, advantages, given.mask)
    np.testing.assert_allclose(loss, -0.15109555, rtol=1e-5)
    old_values = jnp.where(reach, given.values, 0.0)
    values = old_values + array([[0.5, -0.1, 0.3, 0], [-0.4, 0.1, 0.25, -0.05]])
    loss, _ = value_loss(values, old_values, returns, given.mask)
    np.testing.assert_allclose(loss, 4.2900162, rtol=1e-5)


def trl(*, estimator="k1", whitened=False, gamma=1.0, lam=0.95):
    given = TRL
    reach = with_next(given.mask)
    kl = jnp.where(given.mask, kl_estimate(given.old, given.reference, estimator), 0.0)
    rewards = shaped_rewards(given.scores, kl, reach, kl_coef=0.05)
    if whitened:
        rewards = whiten(rewards, reach, keep_mean=True)
    advantages, returns = gae(rewards, given.values, reach, gamma=gamma, lam=lam)
    advantages = whiten(advantages, given.mask)
    policy, metrics = policy_loss(given.new, given.old, advantages, given.mask)
    old_values = jnp.where(reach, given.values, 0.0)
    value, more = value_loss(given.new_values, old_values, returns, reach)
    return rewards, advantages, returns, (policy, value, policy + 0.1 * value), metrics | more, kl


def test_trl():
    rewards, advantages, returns, losses, metrics, kl = trl()
    expected = [[-0.005, -0.01, 0.025, 1, 0], [-0.01, 0.01, -0.015, 0, -0.48]]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    np.testing.assert_allclose(kl.sum(1).mean(), -0.15, atol=1e-6)
    expected = [
        [1.261132, 1.176207, 1.094587, 0, 0],
        [-0.498106, -0.356842, -0.861254, -0.731328, -1.084397],
    ]
    np.testing.assert_allclose(advantages, expected, atol=2e-6)
    expected = [
        [0.907738, 0.950250, 0.995, 1, 0],
        [-0.383127, -0.387502, -0.428950, -0.441, -0.48],
    ]
    np.testing.assert_allclose(returns, expected, atol=2e-6)
    np.testing.assert_allclose(losses, [0.0297770, 0.2100046, 0.0507775], atol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"], 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(metrics["value_clip_fraction"], 3 / 9, rtol=1e-6)


def test_trl_with_other_options():
    _, advantages, _, losses, _, kl = trl(estimator="k3")
    np.testing.assert_allclose(kl.sum(1).mean(), 0.172533, atol=1e-6)
    np.testing.assert_allclose(advantages[0], [1.271225, 1.177324, 1.079564, 0, 0], atol=2e-6)
    np.testing.assert_allclose(losses, [0.0307549, 0.2102550, 0.0517804], atol=1e-6)
    _, advantages, _, losses, _, _ = trl(whitened=True)
    expected = [-0.698835, -0.613061, -0.790654, -0.702061, -0.809717]
    np.testing.assert_allclose(advantages[1], expected, atol=2e-6)
    np.testing.assert_allclose(losses, [0.0296181, 1.5003284, 0.1796509], atol=2e-6)
    _, advantages, returns, losses, _, _ = trl(gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages[0], [0.920438, 1.019020, 1.200560, 0, 0], atol=2e-6)
    expected = [-0.102163, -0.103005, -0.206952, -0.2916, -0.48]
    np.testing.assert_allclose(returns[1], expected, atol=2e-6)
    np.testing.assert_allclose(losses, [0.0419015, 0.1270397, 0.0546055], atol=1e-6)


def test_whitening():
    x = array([[1, 2, 3, 10], [-1, 0, 4, 7]])
    mask = jnp.array([[True, True, True, False], [True] * 4])
    white = [[-0.477895, -0.106199, 0.265497, 0], [-1.221287, -0.849591, 0.637193, 1.752281]]
    np.testing.assert_allclose(whiten(x, mask), white, atol=2e-6)
    shifted = [[1.807820, 2.179516, 2.551211, 0], [1.064428, 1.436124, 2.922907, 4.037995]]
    np.testing.assert_allclose(whiten(x, mask, keep_mean=True), shifted, atol=2e-6)
    alone = whiten(x, jnp.zeros_like(mask).at[0, 0].set(True))
    np.testing.assert_array_equal(alone, np.zeros((2, 4)))


def test_the_first_minibatch_has_a_ratio_of_one_and_the_plain_gradient():
    given = TRL
    advantages = array(np.random.default_rng(0).normal(size=(2, 5)))

    def loss(log_probs):
        return policy_loss(log_probs, given.old, advantages, given.mask)

    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(given.old)
    assert float(metrics["ratio"]) == 1.0
    assert float(metrics["clip_fraction"]) == float(metrics["approx_kl"]) == 0.0
    np.testing.assert_allclose(gradient, np.where(given.mask, -advantages / 8, 0), rtol=1e-6)


@pytest.mark.parametrize("average", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("ratio_of", ["token", "sequence"])
def test_options_of_the_policy_loss_against_numpy(average, ratio_of):
    rng = np.random.default_rng(1)
    old, new, advantages = rng.normal(size=(3, 4, 6))
    mask = np.arange(6)[None] < np.array([[6], [3], [1], [0]])
    config = PolicyLossConfig(
        clip_low=0.1, clip_high=0.3, dual_clip=2.0, average=average, ratio_of=ratio_of
    )
    found, _ = policy_loss(array(new), array(old), array(advantages), jnp.asarray(mask), config)
    per_response, all_losses = [], []
    for i in range(4):
        ratios = np.exp((new - old)[i][mask[i]])
        if ratio_of == "sequence" and len(ratios):
            ratios = np.full(len(ratios), np.prod(ratios) ** (1 / len(ratios)))
        losses = []
        for ratio, advantage in zip(ratios, advantages[i][mask[i]], strict=True):
            one = max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.3))
            losses.append(min(one, -advantage * 2.0) if advantage < 0 else one)
        per_response.append(losses)
        all_losses += losses
    expected = {
        "token": np.mean(all_losses),
        "sequence": np.mean([np.mean(one) for one in per_response if one]),
        "fixed": np.mean([sum(one) / 6 for one in per_response]),
    }[average]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_estimators_of_the_divergence():
    """Their means over all tokens: those of k1 and k3 are the divergence itself, and k3 has no negative value."""
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), size=2)
    log_p, log_q = array(np.log(p))[None], array(np.log(q))[None]
    true = (p * np.log(p / q)).sum()
    for name in ("k1", "k3"):
        mean = (p * np.asarray(kl_estimate(log_p, log_q, name))[0]).sum()
        np.testing.assert_allclose(mean, true, rtol=1e-5)
    mean = (p * np.asarray(kl_estimate(log_p, log_q, "k2"))[0]).sum()
    np.testing.assert_allclose(mean, (p * np.log(p / q) ** 2).sum() / 2, rtol=1e-5)
    assert kl_estimate(log_p, log_q, "k3").min() >= 0
    assert kl_estimate(log_p, log_q, "k1").min() < 0


def test_advantages_of_groups():
    scores = array([1, 2, 6, 3, 3, 3])
    expected = [(s - 3) / (np.std([1, 2, 6], ddof=1) + 1e-4) for s in (1, 2, 6)] + [0, 0, 0]
    np.testing.assert_allclose(group_advantages(scores, 3), expected, rtol=1e-5)
    np.testing.assert_allclose(leave_one_out_advantages(scores, 3), [-3, -1.5, 4.5, 0, 0, 0])
    for function in (group_advantages, leave_one_out_advantages):
        for size in (1, 4):
            with pytest.raises(ValueError, match=f"group_size must .* got {size}"):
                function(scores, size)


def test_the_price_of_divergence_adapts():
    price = jnp.float32(0.15)
    for kl, expected in ((6.0, 0.15), (3.0, 0.15 * 0.98), (600.0, 0.15 * 1.02), (6.6, 0.15 * 1.01)):
        found = adaptive_kl(price, jnp.float32(kl), responses=1000)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_empty_response_counts_nowhere():
    """And does not make the others' numbers infinite."""
    mask = jnp.array([[False, False], [True, True]])
    one = jnp.ones((2, 2))
    rewards = shaped_rewards(array([100.0, 1.0]), one, mask, kl_coef=0.5)
    np.testing.assert_array_equal(rewards, [[0, 0], [-0.5, 0.5]])
    for average in ("token", "sequence", "fixed"):
        assert np.isfinite(masked_average(one, jnp.zeros_like(mask), average))


@pytest.mark.parametrize("far", [499.0, -499.0])
def test_gradients_are_finite_however_far_the_policies_are(far):
    """The ratio of such a token overflows, also where clipping or the mask removes it."""
    old = array([[-500.0 - min(far, 0.0), -1.0, -500.0]])
    mask = jnp.array([[True, True, False]])
    for advantage in (1.0, -1.0):
        loss = lambda new, a=advantage: policy_loss(new, old, jnp.full_like(new, a), mask)[0]
        gradient = jax.grad(loss)(old + array([[far, 0.0, far]]))
        assert np.isfinite(gradient).all()
        # A token that became far too likely is pushed back if it was bad, and else left alone.
        pushed = far > 0 > advantage
        assert (gradient[0, 0] > 0) == pushed
    kl = lambda new: masked_average(kl_estimate(new, old, "k3"), mask)
    assert np.isfinite(jax.grad(kl)(old + array([[far, 0.0, far]]))).all()


def test_bad_input():
    for option, message in (
        ({"clip_low": 0.0}, "clip_low must be above 0 and at most 1, got 0.0"),
        ({"clip_high": float("nan")}, "clip_high must be a finite number, got nan"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or None, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyLossConfig(**option)
    # The tests check the types of arguments; a caller's are not.
    rows = jnp.ones((3, 3))
    with pytest.raises(ValueError, match=r"advantages must have one value for each token"):
        inspect.unwrap(policy_loss)(rows, rows, jnp.ones(3), rows > 0)
    with pytest.raises(ValueError, match=r"returns must have one value for each token"):
        inspect.unwrap(value_loss)(rows, rows, jnp.ones((3, 1)), rows > 0)
