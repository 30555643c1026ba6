"""Online calibration: what it learns, from what, and what it must not learn from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit, softmax

from tests.calibration_streams import Server, Workload, error
from vllm_dspark.calibration.metrics import expected_calibration_error
from vllm_dspark.calibration.online import LOGIT_LIMIT, MARGIN, OnlineCalibrator

OVERCONFIDENT = Workload(slope=0.6, intercept=-0.2)
DIFFERENT = Workload(slope=1.4, intercept=-2.0)


def state(calibrator: OnlineCalibrator) -> list[Any]:
    """Everything that a caller can see, to compare two calibrators to the bit."""
    arrays = [*calibrator.affine(), calibrator.prior(False), calibrator.prior(True)]
    return [*(a.tolist() for a in arrays), calibrator.metrics(), calibrator.version]


@pytest.mark.parametrize("temperature", [None, 0.5], ids=["alone", "on_sts"])
@pytest.mark.parametrize(("requests", "gamma"), [(1, 3), (37, 1), (256, 2)])
def test_true_map_is_learned(requests: int, gamma: int, temperature: float | None) -> None:
    """One request at a time learns as well as many. A temperature that is forgotten, or applied
    twice, shows in what `affine` returns; this one makes matters worse, and is corrected."""
    workload = Workload(slope=0.6, intercept=-0.2, gamma=gamma)
    calibrator = OnlineCalibrator(gamma, None if temperature is None else [temperature] * gamma)
    assert calibrator.affine()[0][0].tolist() == [1 / (temperature or 1)] * gamma
    assert (error(calibrator, workload) > 0.05).all()
    Server(calibrator, requests).serve(workload, 5000)
    assert (error(calibrator, workload) < 0.025).all()
    slope, intercept = calibrator.affine()
    np.testing.assert_allclose(slope[0], 0.6, atol=0.2)
    np.testing.assert_allclose(slope[0] * 2 + intercept[0], 1.0, atol=0.2)


def test_trimmed_drafts_are_no_rejections() -> None:
    """Everything is accepted nine times in ten, two of five are verified. Counted as rejected,
    position 3 would fall to 0; it follows position 2, as far as nothing else is known."""
    random = np.random.default_rng(0)
    calibrator = OnlineCalibrator(5)
    for _ in range(300):
        accepted = np.minimum(np.cumprod(random.random((16, 5)) < 0.9, axis=1).sum(axis=1), 2)
        calibrator.observe(np.full((16, 5), 0.9), accepted, np.full(16, 2), np.full(16, False))
    np.testing.assert_allclose(calibrator.prior(False), 0.9, atol=0.03)
    calibrated = calibrator.calibrate(np.full((1, 5), 0.9), [False])[0]
    np.testing.assert_allclose(calibrated, 0.9, atol=0.03)
    assert [m.observations > 0 for m in calibrator.metrics()["greedy"]] == [1, 1, 0, 0, 0]


def test_only_judged_drafts_are_read() -> None:
    """Positions beyond the verified ones, and beyond the first rejected one, may hold anything."""
    random = np.random.default_rng(1)
    ours, theirs = OnlineCalibrator(4), OnlineCalibrator(4)
    for _ in range(50):
        confidence = random.random((9, 4))
        verified = random.integers(0, 5, 9)
        accepted = random.integers(0, verified + 1)
        unjudged = np.arange(4) >= np.minimum(verified, accepted + 1)[:, None]
        noise = np.where(unjudged, random.choice([0.01, 0.99, math.nan], (9, 4)), confidence)
        ours.observe(confidence, accepted, verified, np.full(9, True))
        theirs.observe(noise, accepted, verified, np.full(9, True))
    assert state(ours) == state(theirs)
    assert ours.version > 0
    assert theirs.ignored == 0


def test_verification_that_follows_confidence_does_not_bias() -> None:
    """Only drafts with a survival above one half are verified, as a scheduler would have it."""
    calibrator, random = OnlineCalibrator(3), np.random.default_rng(2)
    for _ in range(1500):
        confidence = OVERCONFIDENT.confidence(random, 16)
        verified = (np.cumprod(confidence, axis=1) > 0.5).sum(axis=1)
        accepted = np.minimum(OVERCONFIDENT.accepted(random, confidence), verified)
        calibrator.observe(confidence, accepted, verified, np.full(16, False))
    assert (error(calibrator, OVERCONFIDENT) < 0.03).all()


def test_regimes_learn_apart() -> None:
    """Rows of both in one call; either alone leaves the other as it started."""
    calibrator, random = OnlineCalibrator(3), np.random.default_rng(3)
    sampled = np.arange(16) % 2 == 1
    for _ in range(1500):
        confidence = OVERCONFIDENT.confidence(random, 16)
        accepted = np.where(
            sampled,
            DIFFERENT.accepted(random, confidence),
            OVERCONFIDENT.accepted(random, confidence),
        )
        calibrator.observe(confidence, accepted, np.full(16, 3), sampled)
    assert (error(calibrator, OVERCONFIDENT, sampled=False) < 0.03).all()
    assert (error(calibrator, DIFFERENT, sampled=True) < 0.03).all()

    for regime in (False, True):
        alone, fresh = OnlineCalibrator(3), OnlineCalibrator(3)
        Server(alone).serve(DIFFERENT, 2000, sampled=regime)
        other = OnlineCalibrator.REGIMES[1 - regime]
        assert alone.metrics()[other] == fresh.metrics()[other]
        assert alone.affine()[0][1 - regime].tolist() == [1, 1, 1]
        assert alone.affine()[0][int(regime)].tolist() != [1, 1, 1]


def test_constrained_requests_teach_nothing() -> None:
    """As if their rows had not been there, while their confidences are still calibrated."""
    random = np.random.default_rng(4)
    ours, theirs = OnlineCalibrator(3), OnlineCalibrator(3)
    for step in range(200):
        confidence = OVERCONFIDENT.confidence(random, 16)
        accepted = OVERCONFIDENT.accepted(random, confidence)
        learn = random.random(16) < 0.5
        accepted[~learn] = 0  # the grammar rejected all of them
        request, verified, sampled = step * 16 + np.arange(16), np.full(16, 3), np.full(16, True)
        ours.observe(confidence, accepted, verified, sampled, learn, request)
        theirs.observe(
            confidence[learn],
            accepted[learn],
            verified[learn],
            sampled[learn],
            None,
            request[learn],
        )
    assert state(ours) == state(theirs)
    assert error(ours, OVERCONFIDENT, sampled=True)[0] < 0.03


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize(("requests", "steps"), [(4, 1000), (16, 250), (256, 28)])
def test_abrupt_change_of_workload(requests: int, steps: int, together: int) -> None:
    """Acceptance and its relation to confidence both change: 0.1 off. 4000 observations later,
    or 28 steps where these hold more than the tenth they may weigh, position 1 is within 0.03 of
    the truth; three times later all are. On the way none gets worse than it was. The same where
    eight steps are learned from at once, those eight steps later."""
    calibrator = OnlineCalibrator(3, steps=together)
    server = Server(calibrator, requests)
    server.serve(OVERCONFIDENT, 4000)
    start = error(calibrator, DIFFERENT)
    assert (start > 0.09).all()
    for _ in range(4):
        server.serve(DIFFERENT, steps * requests // 4)
        assert (error(calibrator, DIFFERENT) < start + 0.01).all()
    server.serve(DIFFERENT, (together - 1) * requests)
    assert error(calibrator, DIFFERENT)[0] < 0.03
    server.serve(DIFFERENT, 2 * steps * requests)
    assert (error(calibrator, DIFFERENT) < 0.03).all()
    many = DIFFERENT.confidence(np.random.default_rng(0), 20_000)
    rate = DIFFERENT.truth(many)[:, 0].mean()
    assert calibrator.prior(False)[0] == pytest.approx(rate, abs=0.04)


@pytest.mark.parametrize("requests", [8, 256])
def test_steady_workload_gives_a_steady_estimate(requests: int) -> None:
    """What the memory can know of a rate of 0.75 is ±0.008; three times that is a fault."""
    calibrator = OnlineCalibrator(3)
    server = Server(calibrator, requests)
    server.serve(OVERCONFIDENT, 6000)
    seen = []
    for _ in range(30):
        server.serve(OVERCONFIDENT, 500)
        seen.append(calibrator.calibrate([[0.9] * 3], [False])[0])
    truth = OVERCONFIDENT.truth(np.full(3, 0.9))
    np.testing.assert_allclose(np.mean(seen, axis=0), truth, atol=0.01)
    assert (np.std(seen, axis=0) < 0.016).all()
    assert all(m.ece is not None and m.ece < 0.03 for m in calibrator.metrics()["greedy"])


@pytest.mark.parametrize("others", [0, 15])
@pytest.mark.parametrize("known", [True, False], ids=["numbered", "anonymous"])
def test_one_request_cannot_take_over(others: int, known: bool) -> None:
    """2000 rounds of one request, all rejected, alone or among others. It moves the rate by a
    tenth at most; without request numbers it takes all when alone, so it is these that help."""
    calibrator = OnlineCalibrator(1)
    honest = Workload(slope=1, intercept=0, gamma=1)
    Server(calibrator).serve(honest, 6000)
    before, random = calibrator.prior(False)[0], np.random.default_rng(5)
    for step in range(2000):
        confidence = honest.confidence(random, 1 + others)
        accepted = honest.accepted(random, confidence)
        accepted[0] = 0
        request = 10**6 + step * others + np.arange(1 + others)
        request[0] = 10**5
        every = np.ones(1 + others, dtype=int)
        calibrator.observe(
            confidence, accepted, every, every == 0, request=request if known else None
        )
    after = calibrator.prior(False)[0]
    assert after < before
    if known or others:
        assert after > before * 0.9 - 0.02
    else:
        assert after < 0.3


def test_one_step_cannot_take_over() -> None:
    """5000 requests rejected at once weigh a tenth of the memory."""
    calibrator = OnlineCalibrator(1)
    Server(calibrator).serve(Workload(slope=1, intercept=0, gamma=1), 6000)
    before = calibrator.prior(False)[0]
    every = np.ones(5000, dtype=int)
    calibrator.observe(np.full((5000, 1), 0.9), every * 0, every, every == 0)
    assert before * 0.9 - 0.01 < calibrator.prior(False)[0] < before * 0.95


def test_a_position_that_is_no_longer_verified_gets_another_chance() -> None:
    """Position 2 was bad and is not verified since; position 1 is good. Without fading it would
    stay bad for good, and so never be verified again."""
    calibrator = OnlineCalibrator(2)
    ones = np.ones(16, dtype=int)
    confidence = np.full((16, 2), 0.7)
    for _ in range(200):
        calibrator.observe(confidence, ones, 2 * ones, ones == 0)
    bad = calibrator.calibrate(confidence, ones == 0)[0]
    for _ in range(2000):
        calibrator.observe(confidence, ones, ones, ones == 0)
    good = calibrator.calibrate(confidence, ones == 0)[0]
    assert bad[1] < 0.1
    assert good[1] > 0.9
    assert good[0] > 0.9


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_draft_probabilities_serve_without_a_head(greedy: bool) -> None:
    """Outcomes by the rules of verification themselves, for target p and an overconfident
    drafter q; the confidence is the largest q, known before the draw."""
    random = np.random.default_rng(6)

    def draft(rounds: int) -> tuple[np.ndarray, np.ndarray]:
        logits = random.normal(0, 4, (rounds, 50))
        noise = random.normal(0, 1, (rounds, 50))
        p, q = softmax(logits, axis=1), softmax(1.3 * logits + noise, axis=1)
        if greedy:
            return q.max(axis=1), p.argmax(axis=1) == q.argmax(axis=1)
        row = np.arange(rounds)
        token = (q.cumsum(axis=1) > random.random((rounds, 1))).argmax(axis=1)
        return q.max(axis=1), random.random(rounds) < p[row, token] / q[row, token]

    calibrator = OnlineCalibrator(1)
    for _ in range(300):
        confidence, accepted = draft(16)
        calibrator.observe(
            confidence[:, None], accepted.astype(int), np.ones(16, int), np.full(16, not greedy)
        )
    confidence, accepted = draft(20_001)
    calibrated = calibrator.calibrate(confidence[:, None], np.full(20_001, not greedy))[:, 0]
    assert expected_calibration_error(confidence, accepted) > 0.07
    assert expected_calibration_error(calibrated, accepted) < 0.03


def test_priors_before_and_after_learning() -> None:
    """A new request is not expected to survive for sure, and deep positions multiply."""
    calibrator = OnlineCalibrator(4)
    assert calibrator.prior(True).tolist() == [0.8] * 4
    np.testing.assert_allclose(calibrator.survival_prior(True), [0.8, 0.64, 0.512, 0.4096])
    random = np.random.default_rng(7)
    rates = np.array([0.9, 0.5, 0.7, 0.8])
    for _ in range(1000):
        accepted = np.cumprod(random.random((16, 4)) < rates, axis=1).sum(axis=1)
        calibrator.observe(random.random((16, 4)), accepted, np.full(16, 4), np.full(16, True))
    np.testing.assert_allclose(calibrator.prior(True), rates, atol=0.04)
    np.testing.assert_allclose(calibrator.survival_prior(True), np.cumprod(calibrator.prior(True)))
    assert calibrator.prior(False).tolist() == [0.8] * 4


def test_what_a_kernel_applies_is_what_calibrate_does() -> None:
    calibrator = OnlineCalibrator(3, [0.5, 1.0, 2.0])
    Server(calibrator).serve(OVERCONFIDENT, 3000, sampled=True)
    confidence = np.vstack([np.random.default_rng(8).random((50, 3)), np.zeros(3), np.ones(3)])
    slope, intercept = (a[1] for a in calibrator.affine())
    x = np.clip(logit(confidence), -LOGIT_LIMIT, LOGIT_LIMIT)
    expected = np.clip(expit(slope * x + intercept), MARGIN, 1 - MARGIN)
    calibrated = calibrator.calibrate(confidence, np.full(52, True))
    np.testing.assert_allclose(calibrated, expected, rtol=1e-12)
    np.testing.assert_array_equal(
        calibrator.calibrate([[math.nan] * 3], [True])[0], calibrator.prior(True)
    )


def test_a_version_names_one_map() -> None:
    """The map stands still between versions, moves with each, and callers cannot write to it."""
    calibrator, random = OnlineCalibrator(3), np.random.default_rng(9)
    maps: dict[int, list[Any]] = {}
    for step in range(600):
        confidence = OVERCONFIDENT.confidence(random, 1)
        accepted = OVERCONFIDENT.accepted(random, confidence)
        calibrator.observe(confidence, accepted, [3], [False], request=[step])
        now = [a.tolist() for a in (*calibrator.affine(), calibrator.prior(False))]
        assert maps.setdefault(calibrator.version, now) == now
    assert len(maps) > 5
    assert list(maps) == list(range(len(maps)))
    for array in (*calibrator.affine(), calibrator.prior(False)):
        array[:] = 7
    assert [a.tolist() for a in (*calibrator.affine(), calibrator.prior(False))] == now


@pytest.mark.parametrize("requests", [1, 7, 64])
def test_steps_at_once_teach_what_they_teach_one_by_one(requests: int) -> None:
    """Same rounds, same memory: maps and priors agree but for the order of Newton steps. Deep
    positions fade by what the steps hold together, as where they are one step of more requests."""
    calibrators = OnlineCalibrator(3), OnlineCalibrator(3, steps=8)
    for calibrator in calibrators:
        Server(calibrator, requests).serve(OVERCONFIDENT, 64 * requests * 40)
    one, other = calibrators
    assert other.version > 0
    np.testing.assert_allclose(other.prior(False), one.prior(False), atol=0.01)
    weights = [[m.observations for m in c.metrics()["greedy"]] for c in calibrators]
    np.testing.assert_allclose(weights[1], weights[0], rtol=0.2)
    assert weights[1][0] == pytest.approx(weights[0][0], rel=0.01)
    confidence = np.linspace(0.3, 0.99, 30)[:, None].repeat(3, axis=1)
    greedy = np.full(30, False)
    np.testing.assert_allclose(
        other.calibrate(confidence, greedy), one.calibrate(confidence, greedy), atol=0.015
    )


@pytest.mark.parametrize(("requests", "waits"), [(1, 32), (3, 11), (4, 8), (50, 8)])
def test_learning_waits_until_it_is_worth_it(requests: int, waits: int) -> None:
    """Eight steps, or as many as hold 32 requests; calls without any are no steps."""
    calibrator, every = OnlineCalibrator(1, steps=8), np.ones(requests, int)
    for step in range(1, waits + 1):
        assert calibrator.metrics()["greedy"][0].observations == 0
        calibrator.observe(np.full((requests, 1), 0.6), every, every, every == 0)
        calibrator.observe(np.empty((0, 1)), [], [], [])
        assert (calibrator.metrics()["greedy"][0].observations > 0) == (step == waits)


def test_rounds_with_and_without_a_number_are_learned_apart() -> None:
    """A caller may know the request of some rounds only."""
    calibrator, every = OnlineCalibrator(1, steps=8), np.ones(5, int)
    for step in range(40):
        request = None if step % 16 < 3 else every * step
        calibrator.observe(np.full((5, 1), 0.6), every, every, every == 0, request=request)
    assert calibrator.metrics()["greedy"][0].observations > 100
    assert calibrator.ignored == 0


def test_nothing_new_gives_no_new_version() -> None:
    """Nine of ten accepted in every step: soon there is nothing left to upload."""
    calibrator = OnlineCalibrator(1)
    accepted, every = (np.arange(10) > 0).astype(int), np.ones(10, int)

    def serve(steps: int) -> int:
        for _ in range(steps):
            calibrator.observe(np.full((10, 1), 0.6), accepted, every, every == 0)
        return calibrator.version

    assert serve(1000) == serve(200) > 0
    assert calibrator.calibrate([[0.6]], [False])[0, 0] == pytest.approx(0.9, abs=0.01)
